"""Muon for matrices, AdamW for the rest: twice the progress of AdamW per step on the embedded base.

When: EVERY STEP, where `training.optimizer` is `muon`; the script that builds the embedded base uses it too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from vlmdet.errors import ConfigError
from vlmdet.models.families import AREAS, area_of
from vlmdet.settings import TrainingSettings


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made nearly orthogonal by Newton-Schulz steps (K. Jordan et al., 2024), beside AdamW.

    torch has a Muon as well; it multiplies in bfloat16, which a CPU without AVX-512 emulates sixty times slower than
    float32, and it leaves everything that is no matrix to a second optimiser, where the Trainer takes one.

    Args:
        groups: parameter groups with the key `muon`, see `muon_groups`.
        lr: of the matrices; the AdamW groups say their own.
        momentum: share of the old direction that is kept.
        iterations: Newton-Schulz steps; five is usual, three cost a third less and did as well here.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, lr: float, momentum: float = 0.95, iterations: int = 3
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "muon": True})
        self.momentum, self.iterations = momentum, iterations

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    (self._muon if group["muon"] else self._adamw)(weight, weight.grad, group["lr"])

    def _muon(self, weight: torch.Tensor, grad: torch.Tensor, lr: float) -> None:
        state = self.state[weight]
        if not state:
            state["mean"] = torch.zeros_like(weight)
        state["mean"].lerp_(grad, 1 - self.momentum)
        update = orthogonal(grad.lerp(state["mean"], self.momentum), iterations=self.iterations)
        weight.add_(update, alpha=-lr * max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5)

    def _adamw(self, weight: torch.Tensor, grad: torch.Tensor, lr: float) -> None:
        state = self.state[weight]
        if not state:
            state.update(step=torch.zeros(()), mean=torch.zeros_like(weight), square=torch.zeros_like(weight))
        state["step"] += 1
        state["mean"].lerp_(grad, 0.1)
        state["square"].lerp_(grad.square(), 0.02)
        mean = state["mean"] / (1 - 0.9 ** state["step"])
        square = state["square"] / (1 - 0.98 ** state["step"])
        weight.addcdiv_(mean, square.sqrt() + 1e-8, value=-lr)


def orthogonal(matrix: torch.Tensor, *, iterations: int) -> torch.Tensor:
    """Bring the singular values of a matrix near 1 and keep its singular vectors.

    Input: (m, n) float32. Output: (m, n); the coefficients of the quintic are those of Jordan et al.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if tall else x


def muon_groups(model: nn.Module, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Divide a model's trainable parameters: hidden matrices to Muon, all others to AdamW at a tenth of the rate.

    Embeddings, the output head, convolutions, norms and biases are for AdamW, and so are matrices of half a million
    numbers and more, whose orthogonal form costs more than it brings on a CPU.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            hidden = weight.ndim == 2 and "embed" not in name and "lm_head" not in name and weight.numel() < 500_000
            (matrices if hidden else others).append(weight)
    return [
        {"params": matrices, "lr": lr, "weight_decay": weight_decay, "muon": True},
        {"params": others, "lr": lr / 10, "weight_decay": weight_decay, "muon": False},
    ]


def rates_by_area(training: TrainingSettings) -> dict[str, float]:
    """Return the peak rate of each area of `models.families.AREAS`, trained or not.

    When: once per run, for the optimizer, the plan and the gate. Deepstack mergers go with the merger. Of Muon the rate is that
    of its matrices; embeddings and head go to AdamW, at a tenth.
    """
    rates = dict.fromkeys(AREAS, training.learning_rate)
    if training.optimizer == "muon":
        rates["embeddings"] = rates["head"] = training.learning_rate / 10
    if training.vision_learning_rate is not None:
        rates["vision"] = training.vision_learning_rate
    if training.merger_learning_rate is not None:
        rates["merger"] = rates["deepstack"] = training.merger_learning_rate
    return rates


def make_optimizer(model: nn.Module, training: TrainingSettings) -> torch.optim.Optimizer | None:
    """Make Muon, or AdamW with rates by area, where the settings ask for it; None leaves plain AdamW to the trainer.

    When: once per run, after adapters are built.

    Raises:
        ConfigError: a rate is given for an area that does not train.
    """
    if training.optimizer == "muon":
        groups = muon_groups(model, lr=training.learning_rate, weight_decay=training.weight_decay)
        return Muon(groups, lr=training.learning_rate)
    own = {"vision": training.vision_learning_rate, "merger": training.merger_learning_rate}
    if not any(own.values()):
        return None
    groups = area_groups(model, rates=rates_by_area(training), weight_decay=training.weight_decay)
    trained = {group["area"] for group in groups}
    for setting, areas in (("vision", {"vision"}), ("merger", {"merger", "deepstack"})):
        if own[setting] is not None and not areas & trained:
            raise ConfigError(
                f"training.{setting}_learning_rate is {own[setting]:g}, but nothing of {' or '.join(sorted(areas))} trains",
                "leave it out, or name the area in lora.targets or training.areas",
            )
    return torch.optim.AdamW(groups, lr=training.learning_rate)


def area_groups(model: nn.Module, *, rates: Mapping[str, float], weight_decay: float) -> list[dict[str, Any]]:
    """Divide the trainable parameters by area, and by whether they decay: biases, norms and other vectors do not.

    Input: `rates` by area, see `rates_by_area`.
    Output: parameter groups with the key `area`, none of them empty.
    """
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            area, decays = area_of(name), weight.ndim > 1
            settings = {"area": area, "lr": rates[area], "weight_decay": weight_decay if decays else 0.0}
            groups.setdefault((area, decays), {"params": [], **settings})["params"].append(weight)
    return list(groups.values())

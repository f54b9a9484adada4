"""Muon: matrices are made orthogonal; every parameter goes to one group, and each area has its rate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from vlmdet.errors import ConfigError
from vlmdet.models.families import area_of
from vlmdet.models.loader import load
from vlmdet.models.lora import train_only
from vlmdet.settings import TrainingSettings
from vlmdet.training.optim import Muon, make_optimizer, muon_groups, orthogonal, rates_by_area


def test_orthogonal_brings_singular_values_near_one() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(40, 24), iterations=5))
    assert values.min() > 0.5
    assert values.max() < 1.4


def test_hidden_matrices_go_to_muon_and_all_else_to_adamw() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "hidden": nn.Linear(4, 3), "norm": nn.LayerNorm(3)})
    matrices, others = muon_groups(model, lr=0.1, weight_decay=0.0)
    assert [tuple(weight.shape) for weight in matrices["params"]] == [(3, 4)]
    assert len(others["params"]) == 4  # embedding, bias, and the norm's two
    assert (matrices["muon"], others["muon"]) == (True, False)
    assert others["lr"] == matrices["lr"] / 10


def test_a_step_goes_downhill_in_both_groups() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    x = torch.randn(32, 4)
    target = x.sum(dim=1, keepdim=True)
    optimizer = Muon(muon_groups(model, lr=0.02, weight_decay=0.0), lr=0.02)
    losses = []
    for _ in range(100):
        loss = (model(x) - target).square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 2


def areas_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, set[float]]:
    """Return the rates that each area's parameters have in an optimizer."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    found: dict[str, set[float]] = {}
    for group in optimizer.param_groups:
        for weight in group["params"]:
            found.setdefault(area_of(names[id(weight)]), set()).add(group["lr"])
    return found


def test_areas_have_their_own_rates(small_base: Path) -> None:
    model = load(str(small_base), min_pixels=3136, max_pixels=12544).model
    training = TrainingSettings(method="full", learning_rate=1e-5, vision_learning_rate=2e-6, weight_decay=0.1)
    optimizer = make_optimizer(model, training)
    assert optimizer is not None
    found = areas_of(optimizer, model)
    assert found == {"vision": {2e-6}, "merger": {1e-5}, "language": {1e-5}, "embeddings": {1e-5}}
    count = sum(weight.numel() for group in optimizer.param_groups for weight in group["params"])
    assert count == sum(weight.numel() for weight in model.parameters())
    decays = {
        weight.ndim > 1: group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]
    }  # fmt: skip
    assert decays == {True: 0.1, False: 0.0}


def test_a_rate_for_an_area_that_does_not_train_is_refused(small_base: Path) -> None:
    model = load(str(small_base), min_pixels=3136, max_pixels=12544).model
    train_only(model, ["vision"])
    assert make_optimizer(model, TrainingSettings(method="full", areas=("vision",))) is None
    with pytest.raises(ConfigError, match=r"merger_learning_rate is 0\.001, but nothing of deepstack or merger trains"):
        make_optimizer(model, TrainingSettings(method="full", areas=("vision",), merger_learning_rate=1e-3))


def test_rates_by_area_follow_the_settings() -> None:
    training = TrainingSettings(learning_rate=1e-4, vision_learning_rate=2e-5, merger_learning_rate=3e-5)
    others = {"language": 1e-4, "embeddings": 1e-4, "head": 1e-4}
    assert rates_by_area(training) == {"vision": 2e-5, "merger": 3e-5, "deepstack": 3e-5, **others}
    muon = rates_by_area(TrainingSettings(method="full", optimizer="muon", learning_rate=0.01))
    assert muon["language"] == 0.01 and muon["embeddings"] == muon["head"] == pytest.approx(0.001)

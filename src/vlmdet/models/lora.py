"""LoRA by exact module names, and the refusal of models that would not train.

When: PER RUN, before the trainer is built, and once more after.
"""

from __future__ import annotations

from collections.abc import Sequence

from peft import LoraConfig, PeftModel
from torch import nn

from vlmdet.errors import TrainingError
from vlmdet.models.families import parameters_by_area, resolve_targets


def build_lora_config(
    model: nn.Module, *, rank: int, alpha: float, dropout: float, targets: Sequence[str]
) -> LoraConfig:
    """Describe an adapter; the trainer builds it, once, from this.

    When: once per run.

    Input: an unwrapped `model`; `rank`, size of the update (higher: more to learn and more memory); `alpha`, the update
    is scaled by alpha / rank; `targets`, roles or patterns, see `resolve_targets`.
    Output: a configuration whose `target_modules` is a list of full module names, so that nothing is left to PEFT's
    suffix matching (peft#2964).

    Raises:
        TrainingError: the model carries an adapter already.
        ConfigError: a target matches nothing, or no linear layer.
    """
    if is_wrapped(model):
        raise TrainingError(
            "the model carries an adapter already and would be wrapped twice",
            "pass the plain base, or merge the adapter first",
        )
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=resolve_targets(model, targets),
        task_type="CAUSAL_LM",
    )


def is_wrapped(model: nn.Module) -> bool:
    """Tell whether a model is a `PeftModel` or holds LoRA layers."""
    return isinstance(model, PeftModel) or any("lora_" in name for name, _ in model.named_modules())


def refuse_untrainable(model: nn.Module) -> dict[str, dict[str, int]]:
    """Check the model that the trainer really holds, before the first step.

    Output: parameters by area, trainable and frozen.

    Raises:
        TrainingError: nothing is trainable; or adapters are nested, or there is more than one.
    """
    counts = parameters_by_area(model.named_parameters())
    if not any(count["trainable"] for count in counts.values()):
        raise TrainingError(
            "no parameter of the model is trainable: the loss would stay where it is",
            "choose training.method=lora or full, and check what freezes the model",
        )
    if isinstance(model, PeftModel):
        if isinstance(model.get_base_model(), PeftModel):
            raise TrainingError("the model is wrapped in two adapters", "wrap the plain base once")
        if len(model.peft_config) != 1:
            raise TrainingError(f"the model carries {len(model.peft_config)} adapters", "train one at a time")
    return counts


def refuse_zero_adapter(model: nn.Module, name: str) -> None:
    """Check a loaded adapter: one whose updates are all zero does nothing, and would pass as a tuned model.

    Raises:
        TrainingError: there are no LoRA layers, or every B matrix is zero.
    """
    updates = [weight for key, weight in model.named_parameters() if "lora_B" in key]
    if not updates:
        raise TrainingError(
            f"{name}: the adapter holds no LoRA layer that fits the model", "check the base it was made for"
        )
    if not any(bool(weight.detach().any()) for weight in updates):
        raise TrainingError(f"{name}: every update of the adapter is zero, so it equals the base", "train it first")


def format_areas(counts: dict[str, dict[str, int]]) -> str:
    """Lay the counts of `refuse_untrainable` out as a table of five lines and a head."""
    lines = [f"{'area':<12}{'trainable':>14}{'frozen':>14}"]
    lines += [f"{area:<12}{count['trainable']:>14,}{count['frozen']:>14,}" for area, count in counts.items()]
    return "\n".join(lines)

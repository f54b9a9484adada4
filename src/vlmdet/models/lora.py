"""LoRA by exact module names, full tuning by area, and the refusal of models that would not train.

When: PER RUN, before the trainer is built, and once more after. Who does what with a 4-bit base (TRL 1.16, PEFT 0.21):

    loader.load          makes the 4-bit layers, and proves that the vision tower has none
    build_lora_config    names the layers that get an adapter
    SFTTrainer           wraps the base once with `get_peft_model`, which freezes it; lets the embeddings' output carry a gradient
                         where activations are recomputed; casts the adapters of a 4-bit base to bfloat16, which
                         `training.train` takes back
    refuse_untrainable   checks what came out

PEFT's `prepare_model_for_kbit_training` is called by nobody. It would widen norms, embeddings and the unquantised vision tower
to float32, and freeze an adapter that is there already: called twice, by TRL 0.22 to 0.23, it left nothing to train (trl#3926).

Recomputed activations and frozen embeddings go together because transformers 5 recomputes without re-entering autograd
(`use_reentrant=False`): each block then learns from its own parameters, whether or not its input carries a gradient. Under the
older way the blocks of a vision tower, whose first input never does, got no gradient at all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn

from vlmdet.errors import ConfigError, TrainingError, did_you_mean
from vlmdet.models.families import AREAS, area_of, is_quantised, parameters_by_area, resolve_targets


def build_lora_config(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str],
    ranks: Mapping[str, int] | None = None,
    dora: bool = False,
    rslora: bool = False,
) -> LoraConfig:
    """Describe an adapter; the trainer builds it, once, from this.

    When: once per run.

    Input: an unwrapped `model`; `rank`, size of the update (higher: more to learn and more memory); `alpha`, the update
    is scaled by alpha / rank; `targets`, roles or patterns, see `resolve_targets`; `ranks`, roles or patterns whose layers
    take another rank than `rank`, where two match a layer the later one; `dora`, learn the length of each row of a weight
    apart; `rslora`, scale by alpha / sqrt(rank).
    Output: a configuration whose `target_modules` is a list of full module names, so that nothing is left to PEFT's
    suffix matching (peft#2964); when it builds the adapter it shortens a long list to endings that fit the same layers. A
    layer with a rank of its own gets an alpha of its own, such that the scale of its update is that of all others: at rank 64
    and alpha 128, `{"vision.attn": 16}` gives these layers alpha 32. So a rank says how much can be learnt, and nothing about
    how fast.

    Raises:
        TrainingError: the model carries an adapter already.
        ConfigError: a target matches nothing, no linear layer, or the head; a key of `ranks` matches nothing that gets an
            adapter; a rank is below 1.
    """
    if is_wrapped(model):
        raise TrainingError(
            "the model carries an adapter already and would be wrapped twice",
            "pass the plain base, or merge the adapter first",
        )
    names = resolve_targets(model, targets)
    heads = [name for name in names if area_of(name) == "head"]
    if heads:
        raise ConfigError(
            f"the targets {', '.join(targets)} match the head, {heads[0]}",
            "the trainer reads the head's own weight, so an adapter there would never train; leave it out",
        )
    own_ranks: dict[str, int] = {}
    for key, value in (ranks or {}).items():
        if value < 1:
            raise ConfigError(f"the rank of '{key}' is {value}", "a rank is 1 or more; leave a target out to freeze it")
        matched = [name for name in resolve_targets(model, [key]) if name in names]
        if not matched:
            raise ConfigError(
                f"a rank is given for '{key}', and none of its layers gets an adapter",
                f"add it to the targets: {', '.join(targets)}",
            )
        own_ranks |= dict.fromkeys(matched, value)
    own_ranks = {name: value for name, value in own_ranks.items() if value != rank}

    def own_alpha(value: int) -> float:
        return alpha * (math.sqrt(value / rank) if rslora else value / rank)

    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=names,
        # PEFT reads the keys as patterns for the end of a name
        rank_pattern={f"^{re.escape(name)}": value for name, value in own_ranks.items()},
        alpha_pattern={f"^{re.escape(name)}": own_alpha(value) for name, value in own_ranks.items()},
        use_dora=dora,
        use_rslora=rslora,
        task_type="CAUSAL_LM",
    )


def train_only(model: nn.Module, areas: Sequence[str]) -> dict[str, dict[str, int]]:
    """Let the parameters of some areas train and freeze all others: a full fine-tune of these areas.

    When: once per run, before the trainer is built.

    Input: a plain `model`; `areas` of `AREAS`, or none for all that the model has.
    Output: parameters by area, see `parameters_by_area`.

    Raises:
        ConfigError: an area is unknown, or the model has no parameter in it; a head that is tied to the embeddings is counted
            there.
        TrainingError: the weights that shall train are in 4 bits, or the model carries an adapter.
    """
    if is_wrapped(model):
        raise TrainingError("the model carries an adapter already", "pass the plain base, or merge the adapter first")
    named = list(model.named_parameters())
    present = {area_of(name) for name, _ in named}
    for area in areas:
        if area not in AREAS:
            raise ConfigError(f"unknown area '{area}'", did_you_mean(area, AREAS))
        if area not in present:
            tied = area == "head" and getattr(model.config, "tie_word_embeddings", False)
            raise ConfigError(
                f"the model has no parameters of its own in the area '{area}'",
                "its head is tied to the embeddings; name embeddings"
                if tied
                else f"it has: {', '.join(name for name in AREAS if name in present)}",
            )
    wanted = set(areas) or present
    fixed = next((name for name, weight in named if area_of(name) in wanted and is_quantised(weight)), None)
    if fixed is not None:
        raise TrainingError(
            f"{fixed} is in 4 bits and cannot be trained itself",
            "use model.quantization=none, or training.method=lora",
        )
    for name, weight in named:
        weight.requires_grad_(area_of(name) in wanted)
    return parameters_by_area(named)


def is_wrapped(model: nn.Module) -> bool:
    """Tell whether a model is a `PeftModel` or holds LoRA layers."""
    return isinstance(model, PeftModel) or any("lora_" in name for name, _ in model.named_modules())


def refuse_untrainable(model: nn.Module) -> dict[str, dict[str, int]]:
    """Check the model that the trainer really holds, before the first step.

    Output: parameters by area: trainable, frozen, quantised.

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


def merge_adapter(model: Any) -> Any:
    """Add an adapter into the weights that it lies on and return the plain model; works in place.

    When: once per stage that another one, or a merge, stands on.

    An adapter on one of two tied weights, the embeddings and the output head, makes them two: they are parted first, or
    merging into one would change the other (peft#2018), and the configuration then says that they are no longer tied.
    """
    inner = model.get_base_model()
    head, embedding = inner.get_output_embeddings(), inner.get_input_embeddings()
    touched = [
        layer for layer in (head, embedding) if hasattr(layer, "base_layer") or hasattr(layer, "modules_to_save")
    ]
    if touched and inner.config.get_text_config().tie_word_embeddings:
        base_head = getattr(head, "base_layer", None) or getattr(head, "original_module", head)
        base_head.weight = nn.Parameter(base_head.weight.detach().clone())
        inner.config.tie_word_embeddings = inner.config.get_text_config().tie_word_embeddings = False
    return model.merge_and_unload(safe_merge=True)


def format_areas(counts: dict[str, dict[str, int]]) -> str:
    """Lay the counts of `parameters_by_area` out as a table: a head, a line per area that has parameters, the sums."""
    kinds = ("trainable", "frozen", "quantised")
    rows = [(area, [count[kind] for kind in kinds]) for area, count in counts.items() if any(count.values())]
    rows.append(("all", [sum(count[kind] for count in counts.values()) for kind in kinds]))
    lines = [f"{'area':<12}" + "".join(f"{kind:>16}" for kind in kinds)]
    lines += [f"{area:<12}" + "".join(f"{number:>16,}" for number in numbers) for area, numbers in rows]
    return "\n".join(lines)

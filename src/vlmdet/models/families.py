"""Areas and roles of a model's parts, by the names that its family gives them.

When: PER RUN. An *area* is where a parameter lies: vision, merger, language, embeddings, head. A *role* names the linear
layers that an adapter may sit on, `language.attn`, whatever a family calls them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

from vlmdet.errors import ConfigError, did_you_mean

AREAS = ("vision", "merger", "language", "embeddings", "head")

ROLES: dict[str, str] = {
    "language.attn": r"language_model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj$",
    "language.mlp": r"language_model\.layers\.\d+\.mlp\.(gate|up|down)_proj$",
    "vision.attn": r"visual\.blocks\.\d+\.attn\.(qkv|proj)$",
    "vision.mlp": r"visual\.blocks\.\d+\.mlp\.(fc1|fc2)$",
    "merger": r"visual\.merger\.mlp\.(0|2)$",
}
"""Role to a pattern over the module names of Qwen2-VL in transformers 5."""


def area_of(name: str) -> str:
    """Return the area of a parameter by its name, `model.visual.merger.mlp.0.weight` -> `merger`."""
    if "visual.merger" in name:
        return "merger"
    if "visual." in name:
        return "vision"
    if "embed_tokens" in name:
        return "embeddings"
    if "lm_head" in name:
        return "head"
    return "language"


def resolve_targets(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Turn roles or patterns into the exact names of linear layers.

    When: once per run, before an adapter is built.

    Input: `targets`, roles of `ROLES` or regular expressions that are searched in module names.
    Output: module names, sorted as the model lists them.

    Raises:
        ConfigError: a target matches nothing, or something that is not a `torch.nn.Linear`.
    """
    modules = dict(model.named_modules())
    chosen: dict[str, None] = {}
    for target in targets:
        pattern = ROLES.get(target, target)
        try:
            names = [name for name in modules if re.search(pattern, name)]
        except re.error as error:
            raise ConfigError(f"the target '{target}' is no pattern ({error})", did_you_mean(target, ROLES)) from error
        if not names:
            raise ConfigError(f"the target '{target}' matches no module of the model", did_you_mean(target, ROLES))
        odd = [name for name in names if not isinstance(modules[name], nn.Linear)]
        if odd:
            raise ConfigError(
                f"the target '{target}' matches {odd[0]}, a {type(modules[odd[0]]).__name__}",
                "an adapter sits on linear layers only; end the pattern with $",
            )
        chosen.update(dict.fromkeys(names))
    return [name for name in modules if name in chosen]


def parameters_by_area(named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, dict[str, int]]:
    """Count parameters by area: `{"vision": {"trainable": …, "frozen": …}, …}`; a tied tensor counts once."""
    counts = {area: {"trainable": 0, "frozen": 0} for area in AREAS}
    for name, parameter in named:
        counts[area_of(name)]["trainable" if parameter.requires_grad else "frozen"] += parameter.numel()
    return counts

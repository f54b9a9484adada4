"""Each family's names: which parameters lie in which area, which linear layers play which role, which codec is its own.

When: PER RUN. An *area* is where a parameter lies. A *role* names the linear layers that an adapter may sit on, whatever a
family calls them:

    role            Qwen2-VL          Qwen2.5-VL               Qwen3-VL
    language.attn   q_proj, k_proj, v_proj, o_proj of the decoder's layers
    language.mlp    gate_proj, up_proj, down_proj of the decoder's layers
    vision.attn     qkv, proj of the vision blocks
    vision.mlp      fc1, fc2          gate, up and down_proj   linear_fc1, linear_fc2
    merger          mlp.0, mlp.2      mlp.0, mlp.2             linear_fc1, linear_fc2
    deepstack       -                 -                        linear_fc1, linear_fc2 of each deepstack merger

Names as in transformers 5.24. To add a family, add an entry to `FAMILIES`; its areas are found by `AREA_PATTERNS`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import nn

from vlmdet.errors import ConfigError, did_you_mean
from vlmdet.grounding import get_codec

AREAS = ("vision", "merger", "deepstack", "language", "embeddings", "head")

AREA_PATTERNS = {
    "deepstack": r"deepstack_merger_list\.",
    "merger": r"visual\.merger\.|multi_modal_projector\.|connector\.",
    "vision": r"visual\.|vision_tower\.|vision_model\.",
    "embeddings": r"embed_tokens|language_model\.shared",
    "head": r"lm_head",
}
"""Area to a pattern that is searched in parameter names, the first that fits; what fits none is the language model."""


@dataclass(frozen=True)
class Family:
    """What is particular about one `model_type`.

    Attributes:
        codec: name of the family's own codec, see `vlmdet.grounding.CODECS`.
        roles: role to a pattern that is searched in module names.
    """

    codec: str
    roles: dict[str, str]


_DECODER = {
    "language.attn": r"language_model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj$",
    "language.mlp": r"language_model\.layers\.\d+\.mlp\.(gate|up|down)_proj$",
}
_VISION_ATTENTION = {"vision.attn": r"visual\.blocks\.\d+\.attn\.(qkv|proj)$"}
_MERGER = {"merger": r"visual\.merger\.mlp\.(0|2)$"}

FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family(
        codec="qwen2_vl",
        roles=_DECODER | _VISION_ATTENTION | {"vision.mlp": r"visual\.blocks\.\d+\.mlp\.(fc1|fc2)$"} | _MERGER,
    ),
    "qwen2_5_vl": Family(
        codec="qwen2_5_vl",
        roles=_DECODER
        | _VISION_ATTENTION
        | {"vision.mlp": r"visual\.blocks\.\d+\.mlp\.(gate|up|down)_proj$"}
        | _MERGER,
    ),
    "qwen3_vl": Family(
        codec="qwen3_vl",
        roles=_DECODER
        | _VISION_ATTENTION
        | {
            "vision.mlp": r"visual\.blocks\.\d+\.mlp\.linear_fc(1|2)$",
            "merger": r"visual\.merger\.linear_fc(1|2)$",
            "deepstack": r"visual\.deepstack_merger_list\.\d+\.linear_fc(1|2)$",
        },
    ),
    "paligemma": Family(codec="paligemma", roles=_DECODER | {"merger": r"multi_modal_projector\.linear$"}),
    "internvl": Family(codec="internvl", roles=_DECODER | {"merger": r"multi_modal_projector\.linear_(1|2)$"}),
    "florence2": Family(
        codec="florence2",
        roles={
            "language.attn": r"language_model\.(encoder|decoder)\.layers\.\d+\.(self|encoder)_attn\.(q|k|v|out)_proj$",
            "language.mlp": r"language_model\.(encoder|decoder)\.layers\.\d+\.fc(1|2)$",
            "merger": r"multi_modal_projector\.image_projection$",
        },
    ),
}
"""`model_type` of a configuration to what is particular about it."""

OTHER = Family(
    codec="plain_json",
    roles={
        role: pattern.replace("language_model", "(language_model|text_model)") for role, pattern in _DECODER.items()
    },
)
"""What is assumed of a model that `FAMILIES` does not list: a decoder of the usual make, and no native way to write boxes."""

ROLES = tuple(dict.fromkeys(role for family in FAMILIES.values() for role in family.roles))
"""Every role that some family has."""


def family_of(model: nn.Module) -> Family:
    """Return the family of a model, plain or under an adapter, by its configuration."""
    return FAMILIES.get(model.config.model_type, OTHER)


def codec_of(model: nn.Module | str, asked: str = "auto") -> str:
    """Return the name of the codec to use.

    When: once per run, for the contract.

    Input: a model or a `model_type`; `asked`, a codec's name, or `auto` for the family's own.
    Output: `codec_of("qwen2_5_vl")` -> `"qwen2_5_vl"`; `plain_json` for a family that is not listed.

    Raises:
        ConfigError: there is no codec of that name.
    """
    if asked == "auto":
        family = FAMILIES.get(model, OTHER) if isinstance(model, str) else family_of(model)
        return family.codec
    get_codec(asked)
    return asked


def area_of(name: str) -> str:
    """Return the area of a parameter by its name, `model.visual.merger.mlp.0.weight` -> `merger`."""
    return next((area for area, pattern in AREA_PATTERNS.items() if re.search(pattern, name)), "language")


def resolve_targets(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Turn roles or patterns into the exact names of linear layers.

    When: once per run, before an adapter is built.

    Input: a plain `model` or one under an adapter, 4-bit layers included; `targets`, roles of its family or regular
    expressions that are searched in module names.
    Output: module names, in the order of the model.

    Raises:
        ConfigError: a target matches nothing, or something that is not a `torch.nn.Linear`; the message shows module names
            near to it.
    """
    modules = {name: module for name, module in model.named_modules() if "lora_" not in name}
    linear = [name for name, module in modules.items() if _is_linear(module) and not name.endswith("base_layer")]
    chosen: dict[str, None] = {}
    for target in targets:
        pattern = _pattern_of(model, target)
        try:
            names = [name for name in modules if re.search(pattern, name)]
        except re.error as error:
            raise ConfigError(f"the target '{target}' is no pattern ({error})", did_you_mean(target, ROLES)) from error
        if not names:
            raise ConfigError(f"the target '{target}' matches no module of the model", _near(target, model, linear))
        odd = [name for name in names if name not in linear]
        if odd:
            fitting = [name for name in linear if name in names] or [
                name for name in linear if name.startswith(f"{odd[0]}.")
            ]
            near = f"; linear layers near to it: {', '.join(_kinds(fitting)[:3])}" if fitting else ""
            raise ConfigError(
                f"the target '{target}' matches {odd[0]}, a {type(modules[odd[0]]).__name__}",
                f"an adapter sits on linear layers only; end the pattern with ${near}",
            )
        chosen.update(dict.fromkeys(names))
    return [name for name in linear if name in chosen]


def _pattern_of(model: nn.Module, target: str) -> str:
    """Return the pattern of a role, or the target itself; a role of other families only is refused."""
    roles = family_of(model).roles
    if target in ROLES and target not in roles:
        having = [name for name, family in FAMILIES.items() if target in family.roles]
        raise ConfigError(
            f"{model.config.model_type} has no layers of the role '{target}'",
            f"it has {', '.join(roles)}; {target} is a role of {', '.join(having)}",
        )
    return roles.get(target, target)


def _is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a linear layer (4-bit ones are), bare or under an adapter."""
    return isinstance(getattr(module, "base_layer", module), nn.Linear)


def _near(target: str, model: nn.Module, linear: Sequence[str]) -> str:
    """Word the roles and layers whose names are like a target that matches nothing."""
    roles = difflib.get_close_matches(target, family_of(model).roles, n=1, cutoff=0.6)
    if roles:
        return f"did you mean '{roles[0]}'?"
    wanted = re.sub(r"\\[dDwWsSbB]|[^A-Za-z0-9_.]|\.(?=[*+?])", "", target).strip(".").lower()
    endings: dict[str, str] = {}  # `self_attn.q_proj`, and the like, to the first layer that ends so
    for name in _kinds(linear):
        parts = name.split(".")
        for start in range(len(parts)):
            endings.setdefault(".".join(parts[start:]).lower(), name)
    near = difflib.get_close_matches(wanted, endings, n=6, cutoff=0.5)
    shown = list(dict.fromkeys(endings[ending] for ending in near)) or _kinds(linear)
    return f"near it: {', '.join(shown[:3])}; roles: {', '.join(family_of(model).roles)}"


def _kinds(names: Iterable[str]) -> list[str]:
    """Return the first name of each kind; those that differ in the number of their block or layer only are one kind."""
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\.\d+\.", ".N.", name), name)
    return list(kinds.values())


def parameters_by_area(named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, dict[str, int]]:
    """Count parameters by area and by what happens to them.

    Input: `model.named_parameters()`, which lists a tied tensor once.
    Output: `{"vision": {"trainable": …, "frozen": …, "quantised": …}, …}` in the order of `AREAS`. What is held in 4 bits is
    quantised, and not counted again as frozen; the count is of the real numbers, not of the bytes that hold two each.
    """
    counts = {area: {"trainable": 0, "frozen": 0, "quantised": 0} for area in AREAS}
    for name, parameter in named:
        kind = "quantised" if is_quantised(parameter) else "trainable" if parameter.requires_grad else "frozen"
        counts[area_of(name)][kind] += numbers_of(parameter)
    return counts


def is_quantised(parameter: Any) -> bool:
    """Tell whether a parameter is held in 4 bits, or stands for one that will be (see `loader.build_skeleton`)."""
    return type(parameter).__name__ == "Params4bit" or getattr(parameter, "planned_nf4", False)


def numbers_of(parameter: Any) -> int:
    """Count the numbers of a parameter; bitsandbytes keeps two to a byte and the true shape beside them."""
    state = getattr(parameter, "quant_state", None)
    return prod(parameter.shape if state is None else state.shape)

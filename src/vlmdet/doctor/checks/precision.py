"""Checks of where and how a model lies: layers in 4 or 8 bits, several devices.

When: as part of `checks.model`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from vlmdet.doctor.calls import NotAvailable
from vlmdet.doctor.checks import Check, Outcome, check, found, looked, skipped
from vlmdet.doctor.checks.built import kind_of_module, model_of, modules_of, trainer_of
from vlmdet.doctor.checks.targets import area_of

if TYPE_CHECKING:
    from vlmdet.doctor.evidence import Evidence


@check("M07", needs=("model|build_trainer|settings",))
def quantised_vision(evidence: Evidence) -> Outcome:
    """List the layers of vision tower and merger that are, or will be, in 4 or 8 bits."""
    model, built, options = model_of(evidence), trainer_of(evidence), evidence.options
    layers = {} if model is None else modules_of(evidence)
    held = [name for name, one in layers.items() if re.search(r"4bit|8bit", kind_of_module(one)) or _in_bits(one)]
    where, skip, sure = "model", None, 1.0
    if not held:
        asked = [keywords for _, _, keywords in (built.loads.models if built is not None else ())]
        configs = [one.get("quantization_config") for one in asked]
        config = next((one for one in configs if one is not None), None)
        config = config if config is not None else options.get("quantization_config")
        values = config if isinstance(config, dict) else vars(config) if hasattr(config, "__dict__") else {}
        bits = any(
            values.get(name) or values.get(f"_{name}") or options.get(name) or any(one.get(name) for one in asked)
            for name in ("load_in_4bit", "load_in_8bit")
        )
        if not bits:
            if model is None and not options:
                raise NotAvailable("a model, or settings")
            yield looked("M07", "nothing is quantised")
            return
        where = "quantization_config"
        skip = (
            values.get("llm_int8_skip_modules") or options.get("llm_int8_skip_modules") or options.get("skip_modules")
        )
        sure = 0.9 if values else 0.7
        layers = layers or modules_of(evidence)
        linear = [name for name, one in layers.items() if kind_of_module(one) == "Linear"]
        held = [name for name in linear if area_of(name) != "head" and not _left_out(name, skip or ())]
    seeing = [name for name in held if area_of(name) in ("vision", "merger", "deepstack")]
    if not seeing:
        yield looked("M07", f"{len(held)} quantised layers, none of them of vision or merger")
        return
    kinds = sorted({re.sub(r"\.\d+(?=\.|$)", ".N", name) for name in seeing})
    left = f"; llm_int8_skip_modules={list(skip)!r} leaves none of them out" if skip else ""
    yield found(
        "M07",
        where=where,
        certainty=sure,
        evidence=f"{len(seeing)} of {len(held)} quantised layers see the picture: {', '.join(kinds[:6])}{left}",
        cause="every linear layer but the head is quantised unless it is named",
        fix='llm_int8_skip_modules=[".*visual", "lm_head"]: names are matched from their start, so "visual" '
        "alone leaves out nothing of model.visual",
    )


def _in_bits(module: Any) -> bool:
    weight = getattr(getattr(module, "base_layer", module), "weight", None)
    return type(weight).__name__ in ("Params4bit", "Int8Params") and not list(module.children())


def _left_out(name: str, patterns: Any) -> bool:
    """Tell whether a layer stays as it is: as transformers 5 reads the names, and leniently, as a part of the name."""
    for one in [patterns] if isinstance(patterns, str) else patterns:
        if str(one) in name.split(".") or f".{one}." in f".{name}." or name.startswith(str(one)):
            return True
        try:
            if re.match(str(one), name):
                return True
        except re.error:
            continue
    return False


@check("M09", needs=("settings|build_trainer|model",))
def several_devices(evidence: Evidence) -> Outcome:
    """Compare visible devices, processes and where the model lies."""
    from torch import nn

    options, model, built = evidence.options, model_of(evidence), trainer_of(evidence)
    devices = options.number("num_gpus")
    visible = options.get("cuda_visible_devices")
    if devices is None and isinstance(visible, (str, list, tuple)):
        devices = len(
            [one for one in (visible.split(",") if isinstance(visible, str) else visible) if str(one).strip()]
        )
    world = options.number("world_size")
    where_map = options.get("device_map")
    if where_map is None and built is not None:
        where_map = next(
            (one.get("device_map") for _, _, one in built.loads.models if one.get("device_map") is not None), None
        )
    launcher = str(options.get("launcher") or options.get("launch") or "").lower()
    spread = where_map in ("auto", "balanced", "balanced_low_0", "sequential") or (
        isinstance(where_map, dict) and len(set(map(str, where_map.values()))) > 1
    )
    shown = ", ".join(
        f"{name}={value}"
        for name, value in (("num_gpus", devices), ("world_size", world), ("device_map", where_map))
        if value is not None
    )
    wrapped = isinstance(model, nn.DataParallel) or isinstance(
        getattr(getattr(built, "trainer", None), "model_wrapped", None), nn.DataParallel
    )
    if wrapped:
        yield found(
            "M09",
            where="model",
            evidence=f"the trainer's model is a DataParallel{'; ' + shown if shown else ''}",
            cause="one process copies the model to every visible GPU at each step",
        )
    elif (world or 1) > 1 and spread and not isinstance(where_map, dict):
        yield found(
            "M09",
            where="settings",
            evidence=shown,
            certainty=0.9,
            cause="each process spreads the model over all GPUs, which the others use too",
            fix='device_map={"": local_rank}, or one process',
        )
    elif (
        devices
        and devices > 1
        and (world or 1) <= 1
        and not spread
        and not any(one in launcher for one in ("torchrun", "accelerate", "deepspeed"))
    ):
        yield found(
            "M09",
            where="settings",
            evidence=f"{shown}: {devices:.0f} GPUs are visible to {world or 1:.0f} process",
            cause="transformers wraps the model in DataParallel where one process sees several GPUs: batches "
            "are larger and steps fewer than planned",
            certainty=1.0 if world is not None else 0.7,
        )
    elif devices is None and world is None and where_map is None:
        yield skipped("M09", "num_gpus and world_size in the settings")
    else:
        yield looked("M09", shown)


CHECKS: tuple[Check, ...] = (quantised_vision, several_devices)

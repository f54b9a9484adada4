"""Checks of saved adapters: do they do anything, and do they lie on the base that they were trained on?

When: as part of `checks.model`; reads headers and small weights of safetensors, no torch but
for the names of a model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmdet.doctor.calls import NotAvailable, UserCodeError
from vlmdet.doctor.checks import Check, Outcome, check, found, looked
from vlmdet.doctor.checks.built import adapter_configs, carries_adapter, modules_of
from vlmdet.doctor.checks.targets import layer_of

if TYPE_CHECKING:
    from vlmdet.doctor.evidence import Evidence
    from vlmdet.doctor.gather.files import Artefact

READ = 40
"""Weights that are read of each adapter, at most."""

CONFIG = "adapter_config.json"


def adapters_of(evidence: Evidence) -> dict[str, Artefact]:
    """Return artefacts that are adapters, or are meant to be, by name."""
    found = evidence.artefacts()
    kept = {}
    for name, one in found.items():
        if (
            CONFIG in one.configs
            or any("lora_" in tensor for tensor in one.tensors)
            or ("adapter" in name.lower() and one.path.suffix != ".json")
        ):
            kept[name] = one
    if not kept:
        raise NotAvailable("a saved adapter among the artefacts")
    return kept


@check("M10", needs=("artefacts|run_dir",))
def adapter_acts(evidence: Evidence) -> Outcome:
    """See whether saved adapters have weights, that are not 0, under names that the model has."""
    told: list[str] = []
    for name, one in adapters_of(evidence).items():
        lora = {key: tensor for key, tensor in one.tensors.items() if "lora_" in key}
        others = [file for file in one.files if file.endswith((".bin", ".pt", ".safetensors"))]
        where = f"{name}: {one.path}"
        if not one.exists:
            yield found(
                "M10",
                where=where,
                evidence=f"{one.path} does not exist",
                cause="code that takes a missing adapter for none runs the base",
            )
            return
        if not lora and not others and CONFIG in one.configs and one.path != Path():
            yield found(
                "M10",
                where=where,
                evidence=f"files: {', '.join(one.files)}",
                cause="the configuration is there and the weights are not",
            )
            return
        if not lora:
            continue
        zero = [key for key, tensor in list(lora.items()) if "lora_B" in key]
        norms = {key: float(np.abs(lora[key].read().astype(np.float32)).max(initial=0.0)) for key in zero[:READ]}
        if norms and not any(norms.values()):
            yield found(
                "M10",
                where=where,
                evidence=f"{len(norms)} of {len(zero)} LoRA B were read, and all are 0: {next(iter(norms))}",
                cause="the adapter was saved as it began: it never trained, or another copy did",
            )
            return
        named = [key for key in lora if re.search(r"lora_[AB]\.[^.]+\.weight$", key)]
        bare = [key for key in lora if not key.startswith("base_model.model.")]
        if named or bare:
            key = (named or bare)[0]
            yield found(
                "M10",
                where=where,
                evidence=f"{len(named or bare)} of {len(lora)} weights are named "
                f"otherwise than PEFT reads them, such as {key}",
                cause="the state dict was saved by hand: PEFT looks for base_model.model.….lora_A.weight, "
                "finds none, and only warns",
            )
            return
        missing, of = _absent_layers(evidence, lora)
        if missing:
            yield found(
                "M10",
                where=where,
                evidence=f"{len(missing)} of {of} layers of the adapter are not in the model, such as {missing[0]}",
                cause="layers are named otherwise in this release of the library, or in this architecture; "
                "what is not found is skipped with a warning",
            )
            return
        told.append(
            f"{name}: {len(lora)} weights, largest B {max(norms.values(), default=0):.3g}"
            + (f", {of} layers found in the model" if of else "")
        )
    if not told:
        raise NotAvailable("an adapter with weights in safetensors")
    yield looked("M10", "; ".join(told))


def _absent_layers(evidence: Evidence, lora: Mapping[str, Any]) -> tuple[list[str], int]:
    """Return layers of an adapter that no module of the architecture is called, blocks counted as one."""
    subject = evidence.subject
    if (
        subject.model is None
        and subject.processor is None
        and not evidence.options.get("model_name")
        and not evidence.options.get("model_type")
    ):
        return [], 0
    try:
        modules = modules_of(evidence)
    except (NotAvailable, UserCodeError):
        return [], 0
    known = {re.sub(r"\.\d+(?=\.|$)", ".N", name) for name in modules}
    layers = {layer_of(key) for key in lora}
    return sorted(one for one in layers if re.sub(r"\.\d+(?=\.|$)", ".N", one) not in known), len(layers)


@check("M10", needs=("model",))
def loaded_adapter(evidence: Evidence) -> Outcome:
    """See whether the adapter of a model that was passed, loaded for inference, changes anything."""
    model = evidence.subject.model
    configs = adapter_configs(model)
    if not carries_adapter(model) or not all(getattr(one, "inference_mode", False) for one in configs.values()):
        raise NotAvailable("a model with an adapter that was loaded for inference")
    norms = {name: float(one.detach().float().norm()) for name, one in model.named_parameters() if "lora_B" in name}
    off = [name for name, one in model.named_modules() if getattr(one, "disable_adapters", False) is True]
    if norms and (not any(norms.values()) or off):
        cause = "its weights were not found in the file under the names of this model, so they are as they begin"
        yield found(
            "M10",
            where="model",
            evidence=f"{sum(not norm for norm in norms.values())} of {len(norms)} LoRA B are 0; {len(off)} "
            "layers have it switched off",
            cause="the adapter is switched off" if off else cause,
        )
        return
    yield looked("M10", f"{len(norms)} LoRA B, largest norm {max(norms.values(), default=0):.3g}")


@check("M11", needs=("artefacts|run_dir",))
def adapter_on_its_base(evidence: Evidence) -> Outcome:
    """Compare the base that an adapter names with the one that it is put on: name, fingerprint, sizes of layers, weights."""
    artefacts = evidence.artefacts()
    adapters = {name: one for name, one in adapters_of(evidence).items() if isinstance(one.configs.get(CONFIG), dict)}
    base = next(
        (
            one
            for name, one in artefacts.items()
            if name.lower() in ("base", "base_model", "model", "eval_base", "serve_base")
        ),
        None,
    )
    told: list[str] = []
    for name, one in adapters.items():
        recorded = str(one.configs[CONFIG].get("base_model_name_or_path") or "")
        used = [(text, option) for text, option in _bases(evidence, base) if text]
        where = f"{name}: {one.path}"
        for text, option in used:
            if recorded and not _same_base(recorded, text):
                yield found(
                    "M11",
                    where=where,
                    evidence=f"adapter_config.json names {recorded}; {option} is {text}",
                    certainty=0.95,
                    cause="the adapter is a difference to one base, and means nothing on another",
                )
                return
        for key, mine, theirs in _fingerprints(one, base):
            if mine != theirs:
                yield found(
                    "M11",
                    where=where,
                    evidence=f"{key}: {mine} when trained, {theirs} of the base now",
                    cause="the base has the same name and other weights",
                )
                return
        other = _other_sizes(one, base) or _other_weights(recorded, base)
        if other:
            yield found(
                "M11", where=where, evidence=other, cause="the adapter was trained on another base than it is put on"
            )
            return
        if recorded and (used or base is not None):
            told.append(
                f"{name}: trained on {recorded}, put on {', '.join(text for text, _ in used) or (base and base.path)}"
            )
    if not told:
        raise NotAvailable("an adapter_config.json, and the base that it is put on (artefact 'base', or model_name)")
    yield looked("M11", "; ".join(told))


def _bases(evidence: Evidence, base: Artefact | None) -> list[tuple[str, str]]:
    options, model = evidence.options, evidence.subject.model
    texts = [
        (str(options.get("model_name", phase=phase) or ""), options.shown("model_name", phase=phase).split("=")[0])
        for phase in ("eval", "serve", "base")
    ]
    texts.append((str(options.get("model_name") or ""), options.shown("model_name").split("=")[0]))
    if isinstance(model, (str, Path)):
        texts.append((str(model), "model"))
    if base is not None:
        config = base.configs.get("config.json")
        texts.append(
            (str(config.get("_name_or_path") or "") if isinstance(config, dict) else "", "the base's config.json")
        )
        texts.append((str(base.path) if base.exists and base.path != Path() else "", "the base"))
    return [one for one in texts if one[0] != "None"]


_FAMILY = re.compile(r"qwen|llava|gemma|intern|idefics|smol|florence|pixtral|phi|molmo|minicpm", re.IGNORECASE)


def _same_base(recorded: str, used: str) -> bool:
    """Tell whether two names may mean one base; a folder of a name that says nothing may be any."""
    one, other = (_hub_name(text) or Path(text).name.lower() for text in (recorded, used))
    plain = [re.sub(r"(_|-)(bnb|4bit|8bit|fp16|bf16|hf)\b.*$", "", text) for text in (one, other)]
    known = [bool(_FAMILY.search(text)) for text in plain]
    return plain[0] == plain[1] or not all(known)


def _hub_name(path: str) -> str:
    """Return the name of a model by its folder in a hub cache, `…/models--Qwen--Qwen2-VL-2B/snapshots/…`; "" elsewhere."""
    match = re.search(r"models--(?:[^/]+--)?([^/]+)/snapshots/", path)
    return match.group(1).lower() if match else ""


def _fingerprints(adapter: Artefact, base: Artefact | None) -> list[tuple[str, Any, Any]]:
    """Return fingerprints of the base that both directories hold: (name, adapter's, base's)."""
    if base is None:
        return []
    mine = {
        key: value
        for config in adapter.configs.values()
        if isinstance(config, dict)
        for key, value in config.items()
        if _is_mark(key) and "base" in key.lower()
    }
    theirs = {
        key: value
        for config in base.configs.values()
        if isinstance(config, dict)
        for key, value in config.items()
        if _is_mark(key)
    }
    pairs = []
    for key, value in mine.items():
        names = (key, re.sub(r"^base(_model)?_", "", key.lower()), key.lower())
        name = next((one for one in names if one in theirs), None)
        if name is not None and type(value) is type(theirs[name]):
            pairs.append((key, value, theirs[name]))
    return pairs


def _is_mark(key: str) -> bool:
    return any(word in key.lower() for word in ("fingerprint", "sha256", "checksum", "weights_hash", "digest", "hash"))


def _other_sizes(adapter: Artefact, base: Artefact | None) -> str:
    """Compare the input width of adapted layers with the base's weights, or with its configuration."""
    if base is None:
        return ""
    shapes = {_tail(key): tensor.shape for key, tensor in base.tensors.items() if key.endswith(".weight")}
    for key, tensor in adapter.tensors.items():
        if key.endswith("lora_A.weight") and len(tensor.shape) == 2:
            shape = shapes.get(_tail(layer_of(key) + ".weight"))
            if shape is not None and len(shape) == 2 and shape[1] != tensor.shape[1]:
                return f"{layer_of(key)} has width {shape[1]} in the base, {tensor.shape[1]} in the adapter"
    return ""


def _tail(name: str) -> str:
    """Return a weight's name from its area on, which is the same in files of several releases."""
    return re.sub(
        r"^.*?(visual\.|vision_tower\.|layers\.|blocks\.)",
        r"\1",
        re.sub(r"^(base_model\.)?(model\.)+(language_model\.)?(model\.)?", "", name),
    )


def _other_weights(recorded: str, base: Artefact | None) -> str:
    """Compare a few weights of the base that the adapter names, where it lies here, with those of the one that is used."""
    from vlmdet.doctor.gather.files import read_artefact

    path = Path(recorded) if recorded else None
    if base is None or path is None or not path.is_dir() or path.resolve() == base.path.resolve():
        return ""
    own = read_artefact("recorded", path)
    for key in sorted(set(own.tensors) & set(base.tensors))[:6]:
        one, other = own.tensors[key], base.tensors[key]
        if one.shape != other.shape or (
            one.end - one.start < 50_000_000 and not np.array_equal(one.read(), other.read())
        ):
            return f"{key} differs between {recorded}, which the adapter names, and {base.path}"
    return ""


CHECKS: tuple[Check, ...] = (adapter_acts, loaded_adapter, adapter_on_its_base)

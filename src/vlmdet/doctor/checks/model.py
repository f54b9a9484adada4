"""Checks of the stage model: what trains once the trainer is built, on which model, and in which precision its parts lie.

When: CHECK BEFORE TRAINING. The user's trainer is built on a small random model of his architecture; without a trainer
a model that was passed is
looked at. Target and freeze patterns are in `adapters`, three steps in `steps`, saved adapters in `saved_adapters`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from vlmdet.doctor.calls import NotAvailable, place_of
from vlmdet.doctor.checks import (
    Check,
    Outcome,
    adapters,
    check,
    found,
    generation,
    looked,
    saved_adapters,
    skipped,
    steps,
)
from vlmdet.doctor.checks.built import (
    adapter_configs,
    carries_adapter,
    kind_of_module,
    model_of,
    modules_of,
    trainer_of,
    uses_adapter,
)
from vlmdet.doctor.checks.targets import area_of, plain_name, table, told

if TYPE_CHECKING:
    from vlmdet.doctor.evidence import Evidence

FREEZING_TRL = ("0.22.0", "0.22.1", "0.22.2", "0.23.0")
"""Releases of TRL that prepare a 4-bit or 8-bit model once more and so freeze the adapter that it carries (trl#3926)."""

ZERO_START = (True, None, "gaussian", "orthogonal", "true")
"""Values of `init_lora_weights` with which every LoRA B begins at 0."""


@check("M01", "M02", "M03", needs=("build_trainer|model|settings",))
def after_building(evidence: Evidence) -> Outcome:
    """Build the trainer and count what trains, on which model, with how many adapters."""
    if evidence.subject.build_trainer is not None:
        evidence.trainer()  # what it raises is told here
    yield from _known_release(evidence)
    model, built = model_of(evidence), trainer_of(evidence)
    if model is None:
        raise NotAvailable("build_trainer, or a model")
    where = place_of(evidence.subject.build_trainer) if built is not None else "model"
    counts = table((name, one.numel(), one.requires_grad) for name, one in model.named_parameters())
    trainable = sum(some for some, _ in counts.values())
    shown = f"{type(model).__name__}: {told(counts)}"
    other = _another_model(evidence)
    if other:
        yield found("M02", where=where, evidence=f"{other[0]}\n{shown}", cause=other[1], certainty=other[2])
    elif built is not None or carries_adapter(model):
        yield looked("M02", f"the trainer's model is a {type(model).__name__}")
    else:
        yield skipped("M02", "build_trainer")
    if trainable == 0 and built is not None:
        again = [one for one in built.warnings if "requires_grad" in one or "no trainable" in one.lower()][:1]
        yield found(
            "M01",
            where=where,
            evidence="\n".join([f"after the trainer is built 0 parameters are trainable; {shown}", *again]),
            cause="a freeze policy that covers everything, or a second preparation of the model, undid what "
            "was to train",
        )
    elif trainable == 0 and evidence.subject.build_trainer is None and carries_adapter(model):
        yield found(
            "M01",
            where=where,
            evidence=f"no parameter is trainable; {shown}",
            certainty=0.9,
            cause="the adapter was loaded for inference (is_trainable=False), or frozen after it was made",
        )
    elif trainable or built is not None:
        yield looked("M01", shown)
    else:
        yield skipped("M01", "build_trainer: a model in evaluation need not train")
    yield from _earlier_adapter(evidence, model, where)


def _known_release(evidence: Evidence) -> Outcome:
    """Tell of a release of TRL that freezes the adapter of a quantised model, where the set-up is the one that it hits."""
    version = evidence.versions().get("trl", "")
    if version.split("+")[0] not in FREEZING_TRL:
        return
    options, built = evidence.options, trainer_of(evidence)
    quantised = bool(options.get("load_in_4bit") or options.get("load_in_8bit") or _bits(evidence))
    given = built.loads.given if built is not None else []
    wrapped = any(has and not config for has, config in given) if given else uses_adapter(evidence) is not False
    passed = options.get("peft_config")
    if quantised and wrapped and not passed:
        yield found(
            "M01",
            where=f"trl {version}",
            certainty=1.0 if given else 0.85,
            evidence=f"trl {version}; the base is quantised (4 or 8 bits), and the trainer gets a model that "
            "carries its adapter already, "
            "without peft_config",
            cause=f"SFTTrainer of trl {version} prepares a quantised model a second time, which sets "
            "requires_grad=False on the adapter too",
            fix="Update trl to 0.23.1 or later, or pass the plain base with peft_config and let the trainer "
            "make the adapter",
        )


def _bits(evidence: Evidence) -> bool:
    built = trainer_of(evidence)
    models = [evidence.subject.model, *(built.loads.made if built is not None else ())]
    return any(getattr(one, f"is_loaded_in_{bits}", False) for one in models for bits in ("4bit", "8bit"))


def _another_model(evidence: Evidence) -> tuple[str, str, float] | None:
    """Return evidence, cause and certainty where an adapter was made and the trainer does not train it."""
    built = trainer_of(evidence)
    if built is None:
        return None
    model, made = built.model, built.loads.made
    from peft import PeftModel

    native = getattr(model, "_hf_peft_config_loaded", False)
    if carries_adapter(model):
        if isinstance(model, PeftModel) or native:
            return None
        return (
            f"the trainer's model is a {type(model).__name__} that holds layers of LoRA and is no PeftModel",
            "the model beneath the PeftModel was passed, not what get_peft_model returned: whole weights are "
            "saved, under names of PEFT",
            1.0,
        )
    if adapter_configs(model):
        return None  # another method of PEFT
    adapted = [i for i, one in enumerate(made) if carries_adapter(one)]
    if adapted:
        names = ", ".join(f"{i + 1}. {name}" for i, (name, _, _) in enumerate(built.loads.models))
        return (
            f"models loaded, in order: {names}; number {adapted[0] + 1} got the adapter, and the trainer's "
            "model carries none",
            "the model was loaded again after get_peft_model, or the plain one was passed",
            1.0,
        )
    lora = [
        key for key in ("lora_rank", "lora_alpha", "lora_dropout", "use_lora", "use_peft") if evidence.options.get(key)
    ]
    if evidence.subject.target_modules is not None or lora:
        asked = "target_modules" if evidence.subject.target_modules is not None else evidence.options.shown(lora[0])
        return (
            f"{asked} is set, and the trainer's model carries no adapter",
            "get_peft_model was not called, or on another model",
            0.8,
        )
    return None


def _earlier_adapter(evidence: Evidence, model: Any, where: str) -> Outcome:
    """Tell of several adapters, and of LoRA B that are not 0 before the first step."""
    built, configs = trainer_of(evidence), adapter_configs(model)
    if not carries_adapter(model):
        yield (
            looked("M03", "no adapter")
            if built is not None
            else skipped("M03", "build_trainer, or a model with an adapter")
        )
        return
    names = {
        match.group(1) for name, _ in model.named_parameters() if (match := re.search(r"\.lora_[AB]\.([^.]+)\.", name))
    }
    again = (
        [one for one in built.warnings if re.search(r"second time|multiple adapters|already.{0,40}peft_config", one)]
        if built is not None
        else []
    )
    nested = [
        name for name, _ in model.named_parameters() if name.count("base_model.model.") > 1 or name.count("lora_") > 1
    ]
    if len(names) > 1 or again or nested:
        shown = f"adapters in the model: {', '.join(sorted(names))}" + (
            f"; wrapped twice: {nested[0]}" if nested else ""
        )
        yield found(
            "M03",
            where=where,
            evidence="\n".join([shown, *again[:1]]),
            cause="get_peft_model was called on a model that had an adapter of an earlier run",
        )
        return
    norms = built.started if built is not None else {}
    begun = {name: norm for name, norm in norms.items() if norm > 0}
    known = all(getattr(config, "init_lora_weights", True) in ZERO_START for config in configs.values())
    loaded = built is not None and (
        built.loads.adapters or any(_holds_adapter(name) for name, _, _ in built.loads.models)
    )
    if begun and known and not loaded:
        name = max(begun, key=lambda one: begun[one])
        yield found(
            "M03",
            where=where,
            evidence=f"{len(begun)} of {len(norms)} LoRA B are not 0 before the first step: "
            f"{plain_name(name)} has norm {begun[name]:.3g}",
            cause="the model object was trained before: its adapter goes on where an earlier trainer left it",
        )
        return
    yield looked(
        "M03", f"one adapter ({', '.join(sorted(names))}), {len(norms) - len(begun)} of {len(norms)} LoRA B begin at 0"
    )


def _holds_adapter(name: str) -> bool:
    from pathlib import Path

    return (Path(name) / "adapter_config.json").is_file()


# ---- precision and devices --------------------------------------------------------------------------------------------


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


# ---- new tokens --------------------------------------------------------------------------------------------------------


@check("T05", needs=("build_trainer|model|settings",))
def new_tokens(evidence: Evidence) -> Outcome:
    """Compare the tokenizer with the rows of the embeddings, and see whether rows of new tokens train and are saved."""
    model, built, subject, options = model_of(evidence), trainer_of(evidence), evidence.subject, evidence.options
    holders = [getattr(built.trainer, "processing_class", None) if built is not None else None, subject.processor]
    processor = next((one for one in holders if one is not None), None)
    tokenizer = getattr(processor, "tokenizer", processor)
    asked = [
        str(one)
        for name in ("new_tokens", "added_tokens", "extra_tokens", "new_special_tokens")
        for one in _listed(options.get(name))
    ]
    if model is None or tokenizer is None or not hasattr(tokenizer, "__len__"):
        if not asked:
            raise NotAvailable("a model or trainer, with a processor")
        yield from _told_new(evidence, asked, "settings", 0.7)
        return
    embedding = _embedding(model)
    if embedding is None:
        raise NotAvailable("a model with input embeddings")
    rows = int(embedding.weight.shape[0])
    size = (
        max(len(tokenizer), *(1 + one for one in tokenizer.get_vocab().values()))
        if hasattr(tokenizer, "get_vocab")
        else len(tokenizer)
    )
    if size > rows:
        over = sorted(word for word, number in tokenizer.get_vocab().items() if number >= rows)[:6]
        yield found(
            "T05",
            where="model",
            evidence=f"the tokenizer has {size:,} tokens, the embeddings {rows:,} rows; without a row: {', '.join(map(repr, over))}",
            cause="tokens were added and the embeddings were not resized (or resized on another object)",
        )
        return
    base = getattr(subject.processor, "tokenizer", subject.processor)
    known = set(base.get_vocab()) if built is not None and base is not None and hasattr(base, "get_vocab") else None
    added = sorted(set(tokenizer.get_vocab()) - known) if known is not None and base is not tokenizer else []
    new = added or [one for one in asked if one in tokenizer.get_vocab()]
    if new or asked:
        yield from _told_new(evidence, new or asked, "build_trainer" if added else "settings", 1.0 if added else 0.8)
        return
    yield looked("T05", f"{size:,} tokens, {rows:,} rows of embeddings, no tokens added")


def _told_new(evidence: Evidence, new: list[str], where: str, certainty: float) -> Outcome:
    """Tell of added tokens whose rows an adapter leaves random."""
    model, options = model_of(evidence), evidence.options
    if uses_adapter(evidence) is not True:
        yield looked("T05", f"{len(new)} added tokens; whole weights train")
        return
    configs = adapter_configs(model).values()
    saved = [str(one) for config in configs for one in _listed(getattr(config, "modules_to_save", None))]
    saved += [str(one) for one in _listed(options.get("modules_to_save"))]
    rows = any(getattr(config, "trainable_token_indices", None) for config in configs) or options.get(
        "trainable_token_indices"
    )
    trains = model is not None and any(
        one.requires_grad for name, one in model.named_parameters() if area_of(plain_name(name)) == "embeddings"
    )
    shown = f"added tokens: {', '.join(map(repr, new[:6]))}; modules_to_save={saved or None}"
    if rows or trains or any(area_of(one) == "embeddings" for one in saved):
        yield looked("T05", shown)
        return
    yield found(
        "T05",
        where=where,
        evidence=f"{shown}; the embeddings do not train",
        certainty=certainty,
        cause="the adapter trains other layers only: rows of new tokens stay random, and are not saved with it",
    )


def _listed(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [one for inner in value.values() for one in _listed(inner)]
    return [value] if isinstance(value, str) else list(value) if isinstance(value, (list, tuple, set)) else []


def _embedding(model: Any) -> Any:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


CHECKS: tuple[Check, ...] = (
    after_building,
    adapters.target_patterns,
    adapters.freeze_policy,
    quantised_vision,
    several_devices,
    new_tokens,
    *steps.CHECKS,
    *generation.CHECKS,
    *saved_adapters.CHECKS,
)

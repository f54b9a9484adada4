"""Checks of the stage model: what trains once the trainer is built, on which model, and in which precision its parts lie.

When: CHECK BEFORE TRAINING. The user's trainer is built on a small random model of his architecture; without a trainer
a model that was passed is looked at. Target and freeze patterns are in `adapters`, three steps in `steps`, precision in
`precision`, saved
adapters in `saved_adapters`.
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
    new_tokens,
    precision,
    saved_adapters,
    skipped,
    steps,
)
from vlmdet.doctor.checks.built import (
    adapter_configs,
    carries_adapter,
    model_of,
    trainer_of,
    uses_adapter,
)
from vlmdet.doctor.checks.targets import plain_name, table, told

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
    elif trainable == 0 and evidence.subject.build_trainer is None and _is_to_train(evidence, model):
        yield found(
            "M01",
            where=where,
            evidence=f"no parameter is trainable; {shown}",
            certainty=0.9,
            cause="a freeze policy that covers everything, or a second preparation of the model, undid what "
            "was to train",
        )
    elif trainable or built is not None:
        yield looked("M01", shown)
    else:
        yield skipped("M01", "build_trainer: a model in evaluation need not train")
    yield from _earlier_adapter(evidence, model, where)


def _is_to_train(evidence: Evidence, model: Any) -> bool:
    """Tell whether a model without a trainer is meant for training: its adapter was made for it, or the settings have a rate."""
    configs = adapter_configs(model)
    if configs:
        return not all(getattr(config, "inference_mode", False) for config in configs.values())
    return "learning_rate" in evidence.options


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
    if built.loads.wrapped:
        return (
            f"{len(built.loads.wrapped)} PeftModel was made, and the trainer's model is a "
            f"{type(model).__name__} without an adapter",
            "the trainer was given another model object than the one that get_peft_model returned",
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


CHECKS: tuple[Check, ...] = (
    after_building,
    adapters.target_patterns,
    adapters.freeze_policy,
    adapters.frozen_projector,
    *precision.CHECKS,
    *new_tokens.CHECKS,
    *steps.CHECKS,
    *generation.CHECKS,
    *saved_adapters.CHECKS,
)

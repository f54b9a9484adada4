"""What the checks of model and optimisation ask of a subject: module names, adapter, what trains, how it was loaded.

When: shared by `checks.model`, `checks.steps` and `checks.optimisation`. A trainer that was built comes before a model
that was passed, and that before a small one of the architecture. What fails for the user's own code is told by the
check that asks for it first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vlmdet.doctor.calls import NotAvailable, UserCodeError
from vlmdet.doctor.checks.targets import AREAS, plain_name

if TYPE_CHECKING:
    from vlmdet.doctor.evidence import Evidence


def trainer_of(evidence: Evidence) -> Any:
    """Return the built trainer (`live.trainer.Built`), None where there is none or it raised."""
    if evidence.subject.build_trainer is None:
        return None
    try:
        return evidence.trainer()
    except (NotAvailable, UserCodeError):
        return None


def model_of(evidence: Evidence) -> Any:
    """Return the model that trains: of the trainer, else the user's own; None where there is neither."""
    built = trainer_of(evidence)
    if built is not None:
        return built.model
    model = evidence.subject.model
    return model if hasattr(model, "named_modules") else None


def modules_of(evidence: Evidence) -> dict[str, Any]:
    """Return modules by plain name, without those of an adapter.

    Raises:
        NotAvailable: no model, and none can be made.
    """
    model = model_of(evidence)
    if model is None:
        model = evidence.tiny().model
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if "lora_" in name or name.endswith(".modules_to_save"):
            continue
        plain = plain_name(name)
        if plain and plain != "base_model" and (plain not in found or name.endswith(".base_layer")):
            found[plain] = module
    return found


def kind_of_module(module: Any) -> str:
    """Return the type of a module beneath an adapter: `Linear`, `Conv3d`, `ModuleList`."""
    return type(getattr(module, "base_layer", module)).__name__


def adapter_configs(model: Any) -> dict[str, Any]:
    """Return the configurations of a model's adapters by name, `{}` where it has none."""
    found = getattr(model, "peft_config", None)
    return dict(found) if isinstance(found, Mapping) else {}


def carries_adapter(model: Any) -> bool:
    """Tell whether a model holds layers of LoRA."""
    return model is not None and any("lora_" in name for name, _ in model.named_modules())


def targets_of(evidence: Evidence) -> tuple[Any, str]:
    """Return `target_modules` as the user gave it, and where it stands; None where it is nowhere."""
    subject, options = evidence.subject, evidence.options
    if subject.target_modules is not None:
        return subject.target_modules, "target_modules"
    for name in ("target_modules", "lora_target_modules", "lora_targets", "lora_target"):
        if options.get(name):
            value = options.get(name)
            if isinstance(value, str) and "," in value and not any(sign in value for sign in "(|*"):
                value = [one.strip() for one in value.split(",")]
            return value, f"settings: {options.shown(name).split('=')[0]}"
    for name, config in adapter_configs(model_of(evidence)).items():
        if getattr(config, "target_modules", None):
            return config.target_modules, f"peft_config[{name!r}].target_modules of the built trainer"
    return None, ""


def uses_adapter(evidence: Evidence) -> bool | None:
    """Tell whether training is by LoRA; None where nothing says so."""
    options, model = evidence.options, model_of(evidence)
    if trainer_of(evidence) is not None or carries_adapter(model):
        return carries_adapter(model) or _says_lora(evidence) is True
    return _says_lora(evidence) if not options.get("full_finetune") else False


def _says_lora(evidence: Evidence) -> bool | None:
    options = evidence.options
    if options.get("full_finetune") is True:
        return False
    words = str(options.get("method") or options.get("finetuning_type") or options.get("peft_type") or "").lower()
    if "lora" in words or "dora" in words:
        return True
    if "full" in words:
        return False
    for name in ("use_lora", "use_peft", "lora", "use_dora"):
        if isinstance(options.get(name), bool):
            return bool(options.get(name))
    keys = {
        key
        for key in options.flat
        if key.startswith("lora_") or key in ("peft_config", "target_modules", "use_qlora", "r")
    }
    given = evidence.subject.target_modules is not None or any(options.flat[key] is not None for key in keys)
    return True if given or options.get("load_in_4bit") is True else None


def argument(evidence: Evidence, name: str, default: Any = None) -> Any:
    """Return a training argument: as settings have it, else as the built trainer was given it."""
    value = evidence.options.get(name)
    if value is not None:
        return value
    built = trainer_of(evidence)
    if built is None:
        return default
    found = built.arguments.get(name)
    return default if found is None else getattr(found, "value", found)


def wishes(evidence: Evidence) -> Iterator[tuple[str, bool, str]]:
    """Yield (area, whether it shall train, the option that says so) from options of yes and no, as trainers in use name them."""
    words = {
        "vision": (
            "vision",
            "vit",
            "visual",
            "vision_tower",
            "vision_model",
            "vision_encoder",
            "mm_vision",
            "vision_layers",
        ),
        "merger": ("merger", "projector", "aligner", "multi_modal_projector", "mm_mlp", "connector", "mm_projector"),
        "language": ("llm", "language_model", "language", "mm_llm", "language_layers", "text_model"),
    }
    for key, value in evidence.options.flat.items():
        if not isinstance(value, bool):
            continue
        for area, names in words.items():
            for name in names:
                shown = f"{evidence.options.names.get(key, key)}={value!r}"
                if value and key in (f"freeze_{name}", f"{name}_frozen", f"frozen_{name}"):
                    yield area, False, shown
                elif key in (
                    f"train_{name}",
                    f"tune_{name}",
                    f"finetune_{name}",
                    f"unfreeze_{name}",
                    f"lora_{name}",
                    f"{name}_lora",
                    f"adapt_{name}",
                    f"lora_on_{name}",
                ):
                    yield area, value, shown


def gradient_areas(gradients: Mapping[str, float | None]) -> dict[str, tuple[int, int]]:
    """Count trainable tensors by area: (with a gradient that is not zero, all)."""
    from vlmdet.doctor.checks.targets import area_of

    found: dict[str, tuple[int, int]] = {}
    for name, norm in gradients.items():
        area = area_of(plain_name(name))
        some, every = found.get(area, (0, 0))
        found[area] = (some + bool(norm), every + 1)
    return {area: found[area] for area in AREAS if area in found}

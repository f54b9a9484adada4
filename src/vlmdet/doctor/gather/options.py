"""The user's options under one name each, whatever they are called.

When: wherever a check asks for an option. Names are those of transformers, TRL and qwen-vl-utils where they exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

ALIASES: dict[str, tuple[str, ...]] = {
    "learning_rate": ("lr", "base_lr"),
    "vision_learning_rate": ("vision_lr", "vision_tower_lr", "vit_lr", "lr_vision"),
    "max_length": ("max_seq_length", "max_seq_len", "cutoff_len", "model_max_length", "max_len", "seq_length"),
    "min_pixels": ("image_min_pixels",),
    "max_pixels": ("image_max_pixels",),
    "max_new_tokens": ("generation_max_length", "max_tokens", "generate_max_new_tokens"),
    "per_device_train_batch_size": ("batch_size", "train_batch_size", "micro_batch_size", "per_device_batch_size"),
    "per_device_eval_batch_size": ("eval_batch_size",),
    "gradient_accumulation_steps": ("grad_accum", "accumulation_steps", "gradient_accumulation", "grad_accumulation"),
    "num_train_epochs": ("epochs", "num_epochs"),
    "max_steps": ("steps", "total_steps"),
    "warmup_steps": ("num_warmup_steps",),
    "warmup_ratio": (),
    "save_steps": ("save_every",),
    "eval_steps": ("eval_every",),
    "save_total_limit": (),
    "load_best_model_at_end": (),
    "metric_for_best_model": (),
    "greater_is_better": (),
    "eval_strategy": ("evaluation_strategy",),
    "save_strategy": (),
    "model_name": (
        "model_name_or_path",
        "model_id",
        "base_model",
        "model_path",
        "model",
        "pretrained_model_name_or_path",
    ),
    "model_type": ("architecture",),
    "bf16": (),
    "fp16": (),
    "dtype": ("torch_dtype", "compute_dtype", "bnb_4bit_compute_dtype"),
    "load_in_4bit": ("use_4bit", "qlora"),
    "load_in_8bit": (),
    "system_prompt": ("system", "system_message"),
    "user_prompt": ("prompt", "user_message", "instruction", "question"),
    "trl_version": (),
    "transformers_version": (),
    "peft_version": (),
    "lora_rank": ("r", "rank", "lora_r"),
    "lora_alpha": ("alpha",),
    "lora_dropout": (),
    "modules_to_save": (),
    "freeze": ("freeze_patterns", "frozen", "freeze_modules", "freeze_policy", "freeze_prefixes", "frozen_modules"),
    "trainable": ("trainable_patterns", "unfreeze", "train_modules", "unfreeze_patterns", "trainable_modules"),
    "gradient_checkpointing": (),
    "gradient_checkpointing_kwargs": (),
    "assistant_only_loss": ("train_on_responses_only",),
    "packing": ("padding_free",),
    "padding_side": (),
    "do_sample": (),
    "temperature": (),
    "skip_special_tokens": (),
    "num_gpus": ("n_gpu", "gpus", "num_devices", "n_gpus", "visible_gpus"),
    "world_size": ("num_processes", "nproc_per_node"),
    "device_map": (),
    "num_samples": ("num_rows", "n_train", "train_size", "dataset_size", "num_train_samples", "num_train_rows"),
    "full_finetune": ("full_finetuning", "full_ft", "full"),
    "cached_rows": ("cache", "cached", "cached_jsonl", "formatted_jsonl", "cache_file", "cached_dataset"),
    "eos_token_id": ("stop_token_ids",),
    "seed": (),
}
"""Canonical name to the other names that are read as it."""

PHASES: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "eval": (
        "eval",
        "evaluation",
        "val",
        "validation",
        "inference",
        "infer",
        "test",
        "predict",
        "generation",
        "generate",
    ),
    "callback": ("callback", "cb"),
    "base": ("base", "baseline", "zero_shot"),
    "serve": ("serve", "serving", "server", "vllm", "api", "deploy", "deployment", "app", "production"),
}
"""Phase to the prefixes and suffixes that mark an option of it: `eval_max_pixels`, `max_pixels_eval`."""


class Options:
    """Options of a user by canonical name.

    Args:
        settings: a dict (nested ones are read as phases), a dataclass, a namespace, or None.
    """

    def __init__(self, settings: Any) -> None:
        self.flat: dict[str, Any] = {}
        self.names: dict[str, str] = {}
        for key, value in as_mapping(settings).items():
            name = str(key).replace("-", "_").strip("_")
            values = as_mapping(value) if isinstance(value, Mapping) or is_dataclass(value) else None
            phase = next((phase for phase, words in PHASES.items() if name.lower() in words), None)
            if values is not None and (phase or name.lower() in _GROUPS):
                for inner, one in values.items():
                    full = f"{phase}_{inner}" if phase and phase != "train" else str(inner)
                    self._put(full, one, f"{key}.{inner}")
                    if phase == "train":
                        self._put(f"train_{inner}", one, f"{key}.{inner}")
            else:
                self._put(name, value, str(key))

    def _put(self, name: str, value: Any, shown: str) -> None:
        name = name.lower().replace("-", "_")
        self.flat.setdefault(name, value)
        self.names.setdefault(name, shown)

    def get(self, name: str, default: Any = None, *, phase: str | None = None) -> Any:
        """Return an option by its canonical name; with `phase` only what is set for that phase."""
        key = self.key(name, phase=phase)
        return default if key is None else self.flat[key]

    def key(self, name: str, *, phase: str | None = None) -> str | None:
        """Return the user's own (lower-case) name of an option, None where it is not set."""
        for one in (name, *ALIASES.get(name, ())):
            tried = (
                [one]
                if phase is None
                else [text for word in PHASES[phase] for text in (f"{word}_{one}", f"{one}_{word}")]
            )
            for text in tried:
                if self.flat.get(text) is not None:
                    return text
        return None

    def shown(self, name: str, *, phase: str | None = None) -> str:
        """Return `max_pixels=1003520`, as the user wrote it; the bare name where it is not set."""
        key = self.key(name, phase=phase)
        return name if key is None else f"{self.names[key]}={self.flat[key]!r}"

    def number(self, name: str, default: float | None = None, *, phase: str | None = None) -> float | None:
        """Return an option as a number; `default` where it is not set or no number."""
        value = self.get(name, phase=phase)
        if isinstance(value, bool) or value is None:
            return default
        try:
            return float(value)
        except (TypeError, ValueError):
            return default

    def __contains__(self, name: str) -> bool:
        return self.key(name) is not None

    def __bool__(self) -> bool:
        return bool(self.flat)


_GROUPS = ("training_args", "args", "generation", "lora", "lora_config", "peft", "data", "model", "processor", "image", "trainer",
           "sft", "sft_config", "optim", "optimizer", "generation_config", "quantization", "quantization_config")  # fmt: skip


def as_mapping(value: Any) -> dict[str, Any]:
    """Return the entries of a dict, a dataclass, TrainingArguments or a namespace; `{}` of None."""
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return dict(value)
    if is_dataclass(value) and not isinstance(value, type):
        try:
            return asdict(value)
        except (TypeError, ValueError):
            return dict(vars(value))
    return (
        {key: one for key, one in vars(value).items() if not key.startswith("__")} if hasattr(value, "__dict__") else {}
    )

"""Training set-ups that work: LoRA by PEFT, full fine-tuning, TRL's SFTTrainer with an own collator."""

from __future__ import annotations

import tempfile
from typing import Any

from benchmarks.faults.homes import cookbook

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
NAME = "Qwen/Qwen2-VL-2B-Instruct"


def arguments(**changes: Any) -> Any:
    from transformers import TrainingArguments

    options: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(prefix="vlmdet-fault-"),
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-4,
        "max_steps": 20,
        "report_to": "none",
        "remove_unused_columns": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**(options | changes))


def sft_arguments(**changes: Any) -> Any:
    from trl import SFTConfig

    options: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(prefix="vlmdet-fault-"),
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-4,
        "max_steps": 20,
        "report_to": "none",
        "remove_unused_columns": False,
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_length": None,
        "gradient_checkpointing": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "dataloader_pin_memory": False,
    }
    return SFTConfig(**(options | changes))


def load_model() -> Any:
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    return Qwen2VLForConditionalGeneration.from_pretrained(NAME, dtype=torch.float32)


def lora(**changes: Any) -> Any:
    from peft import LoraConfig

    options: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"}
    return LoraConfig(**(options | changes))


def examples(count: int = 12) -> list[dict[str, Any]]:
    return [cookbook.format_data(row) for row in cookbook.dataset(count)]


def fields(build: Any, **more: Any) -> dict[str, Any]:
    return {k: v for k, v in cookbook.fields().items() if k in ("processor", "collate", "rows", "convert")} | {
        "build_trainer": build,
        **more,
    }

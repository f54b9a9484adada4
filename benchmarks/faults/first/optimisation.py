"""Faults of schedules, precision and of finished runs' logs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from benchmarks.faults.homes import cookbook, trainers
from benchmarks.faults.registry import fault, subject


def write_state(folder: Path, log: list[dict[str, Any]], **more: Any) -> Path:
    """Write trainer_state.json as transformers does."""
    steps = max(entry["step"] for entry in log)
    state = {
        "best_global_step": None,
        "best_metric": None,
        "best_model_checkpoint": None,
        "epoch": 3.0,
        "eval_steps": 50,
        "global_step": steps,
        "is_hyper_param_search": False,
        "is_local_process_zero": True,
        "is_world_process_zero": True,
        "log_history": log,
        "logging_steps": 10,
        "max_steps": steps,
        "num_train_epochs": 3,
        "save_steps": 50,
        "stateful_callbacks": {},
        "total_flos": 1.2e15,
        "train_batch_size": 2,
        "trial_name": None,
        "trial_params": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps(state | more, indent=2))
    return folder


def wiggle(step: int, scale: float = 0.03) -> float:
    return scale * math.sin(step * 1.7) + scale / 2 * math.cos(step * 0.31)


def curve(step: int, *, start: float = 2.2, end: float = 0.35, pace: float = 60) -> float:
    return end + (start - end) * math.exp(-step / pace)


@fault("O01", stage="optimisation")
def a_full_recipes_rate_for_forty_steps_of_lora() -> Any:
    settings = {
        "use_peft": True,
        "lora_r": 8,
        "learning_rate": 2e-7,
        "num_train_epochs": 1,
        "dataset_size": 320,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "model_type": "qwen2_vl",
    }
    return subject({}, settings=settings)


@fault("O02", stage="optimisation")
def all_weights_at_a_rate_for_adapters() -> Any:
    settings = {
        "use_peft": False,
        "finetuning_type": "full",
        "learning_rate": 1e-3,
        "num_train_epochs": 10,
        "dataset_size": 300,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "model_type": "qwen2_5_vl",
    }
    return subject({}, settings=settings)


@fault("O03", stage="optimisation")
def half_precision_for_weights_made_in_bfloat16() -> Any:
    settings = {"fp16": True, "bf16": False, "model_name": "Qwen/Qwen2-VL-7B-Instruct", "learning_rate": 1e-5}
    return subject({}, settings=settings)


@fault("O03", stage="optimisation")
def a_log_of_nan_norms(folder: Path) -> Any:
    log = []
    for step in range(10, 310, 10):
        broken = step > 60
        log.append(
            {
                "epoch": step / 100,
                "grad_norm": float("nan") if broken else 1.4 + wiggle(step),
                "learning_rate": 1e-4 * (1 - step / 320),
                "loss": 0.0 if broken else curve(step) + wiggle(step),
                "step": step,
            }
        )
    return subject({}, run_dir=str(write_state(folder, log)), settings={"fp16": True})


@fault("O05", stage="optimisation")
def saved_at_other_steps_than_evaluated() -> Any:
    settings = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 50,
        "save_steps": 80,
        "save_total_limit": 1,
        "dataset_size": 1600,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
    }
    return subject({}, settings=settings)


@fault("O06", stage="optimisation")
def five_hundred_steps_of_warmup_in_a_run_of_six_hundred() -> Any:
    settings = {
        "warmup_steps": 500,
        "dataset_size": 1600,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 3,
        "learning_rate": 1e-4,
        "use_peft": True,
    }
    return subject({}, settings=settings)


@fault("O08", stage="optimisation")
def token_loss_falls_and_overlap_falls_too(folder: Path) -> Any:
    log: list[dict[str, Any]] = []
    for step in range(10, 410, 10):
        log.append({"epoch": step / 130, "learning_rate": 1e-4, "loss": curve(step) + wiggle(step), "step": step})
        if step % 50 == 0:
            log.append(
                {
                    "epoch": step / 130,
                    "eval_loss": curve(step, start=2.0, end=0.4),
                    "eval_mean_iou": 0.34 - 0.0005 * step + wiggle(step, 0.004),
                    "step": step,
                }
            )
    return subject({}, run_dir=str(write_state(folder, log)))


@fault("O10", stage="optimisation", also=("M01", "M15"))
def validation_loss_is_the_same_to_six_decimals(folder: Path) -> Any:
    log: list[dict[str, Any]] = []
    for step in range(10, 310, 10):
        log.append(
            {
                "epoch": step / 100,
                "grad_norm": 0.0,
                "learning_rate": 2e-4 * (1 - step / 310),
                "loss": 1.83 + wiggle(step, 0.05),
                "step": step,
            }
        )
        if step % 50 == 0:
            log.append({"epoch": step / 100, "eval_loss": 1.8271539211273193, "eval_runtime": 41.2, "step": step})
    return subject({}, run_dir=str(write_state(folder, log)))


@fault("O04", stage="optimisation")
def sums_of_losses_are_divided_by_the_rows_alone() -> Any:
    """A custom loss that forgets how many items an accumulated batch has."""

    def build() -> Any:
        from transformers import Trainer

        class Summing(Trainer):
            def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
                import torch

                labels = inputs["labels"]
                outputs = model(**{k: v for k, v in inputs.items() if k != "labels"})
                logits, wanted = outputs.logits[:, :-1].float(), labels[:, 1:]
                loss = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="sum"
                )
                loss = loss / labels.shape[0]
                return (loss, outputs) if return_outputs else loss

        collator = cookbook.DetectionCollator(cookbook.fields()["processor"])
        return Summing(
            model=trainers.load_model(),
            args=trainers.arguments(gradient_accumulation_steps=4),
            train_dataset=trainers.examples(),
            data_collator=collator,
        )

    return subject(trainers.fields(build))

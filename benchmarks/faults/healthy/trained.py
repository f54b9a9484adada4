"""Healthy trainers, adapters, merged weights and finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults.bases import folder_of, model_of, processor_of
from benchmarks.faults.first.evaluation import as_json, shifted, write_predictions
from benchmarks.faults.first.model import parts, to_dataset, write_adapter
from benchmarks.faults.first.optimisation import curve, wiggle, write_state
from benchmarks.faults.homes import trainers
from benchmarks.faults.pictures import scenes
from benchmarks.faults.registry import healthy, subject


@healthy
def lora_on_the_language_model() -> Any:
    def build() -> Any:
        from peft import get_peft_model
        from transformers import Trainer

        _, collator, data = parts()
        model = get_peft_model(trainers.load_model(), trainers.lora())
        return Trainer(model=model, args=trainers.arguments(), train_dataset=data, data_collator=collator)

    return subject(trainers.fields(build, target_modules=trainers.ATTENTION))


@healthy
def lora_on_both_towers() -> Any:
    def build() -> Any:
        from peft import get_peft_model
        from transformers import Trainer

        _, collator, data = parts()
        config = trainers.lora(target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "qkv", "mlp.0", "mlp.2"])
        model = get_peft_model(trainers.load_model(), config)
        return Trainer(model=model, args=trainers.arguments(), train_dataset=data, data_collator=collator)

    return subject(trainers.fields(build))


@healthy
def full_fine_tuning_with_a_frozen_tower() -> Any:
    def build() -> Any:
        from transformers import Trainer

        _, collator, data = parts()
        model = trainers.load_model()
        for param in model.model.visual.parameters():
            param.requires_grad_(False)
        args = trainers.arguments(learning_rate=1e-5)
        return Trainer(model=model, args=args, train_dataset=data, data_collator=collator)

    return subject(trainers.fields(build, settings={"learning_rate": 1e-5, "freeze_vision": True}))


@healthy
def full_fine_tuning_of_everything() -> Any:
    def build() -> Any:
        from transformers import Trainer

        _, collator, data = parts()
        args = trainers.arguments(learning_rate=1e-5, gradient_accumulation_steps=2)
        return Trainer(model=trainers.load_model(), args=args, train_dataset=data, data_collator=collator)

    return subject(trainers.fields(build))


@healthy
def sft_trainer_with_an_own_collator() -> Any:
    def build() -> Any:
        from trl import SFTTrainer

        processor, collator, data = parts()
        return SFTTrainer(
            model=trainers.load_model(),
            args=trainers.sft_arguments(),
            train_dataset=to_dataset(data),
            data_collator=collator,
            peft_config=trainers.lora(),
            processing_class=processor,
        )

    return subject(trainers.fields(build))


@healthy
def sft_trainer_with_trls_collator_on_prompts_and_completions() -> Any:
    """TRL's own collator; only the completion is learnt."""

    def build() -> Any:
        from datasets import Dataset
        from trl import SFTTrainer

        processor, _, data = parts()
        rows = [{"images": [e["image"]], "prompt": e["messages"][:-1], "completion": e["messages"][-1:]} for e in data]
        return SFTTrainer(
            model=trainers.load_model(),
            args=trainers.sft_arguments(dataset_kwargs=None),
            train_dataset=Dataset.from_list(rows),
            peft_config=trainers.lora(),
            processing_class=processor,
        )

    return subject({}, build_trainer=build, processor=processor_of("qwen2_vl"))


@healthy
def checkpointing_that_does_not_cut() -> Any:
    def build() -> Any:
        from peft import get_peft_model
        from transformers import Trainer

        _, collator, data = parts()
        model = get_peft_model(trainers.load_model(), trainers.lora())
        args = trainers.arguments(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})
        return Trainer(model=model, args=args, train_dataset=data, data_collator=collator)

    return subject(trainers.fields(build))


@healthy
def adapter_beside_its_base(folder: Path) -> Any:
    processor = processor_of("qwen2_vl")
    write_adapter(folder / "adapter")
    processor.save_pretrained(folder / "adapter")
    processor.save_pretrained(folder / "train_processor")
    artefacts = {
        "adapter": str(folder / "adapter"),
        "base": str(folder_of("qwen2_vl")),
        "train_processor": str(folder / "train_processor"),
    }
    return subject({}, processor=processor, artefacts=artefacts)


@healthy
def merged_as_it_should_be(folder: Path) -> Any:
    from peft import PeftModel

    processor = processor_of("qwen2_5_vl")
    adapter = write_adapter(folder / "adapter", family="qwen2_5_vl")
    merged = PeftModel.from_pretrained(model_of("qwen2_5_vl"), str(adapter)).merge_and_unload()
    merged.save_pretrained(folder / "merged")
    processor.save_pretrained(folder / "merged")
    processor.save_pretrained(folder / "adapter")
    artefacts = {
        "adapter": str(adapter),
        "base": str(folder_of("qwen2_5_vl")),
        "merged": str(folder / "merged"),
        "processor": str(folder / "merged"),
    }
    return subject({}, artefacts=artefacts)


@healthy
def a_finished_run(folder: Path) -> Any:
    log: list[dict[str, Any]] = []
    for step in range(10, 610, 10):
        log.append(
            {
                "epoch": step / 200,
                "grad_norm": 1.1 + wiggle(step, 0.2),
                "learning_rate": 1e-4 * min(1.0, step / 30) * (1 - step / 620),
                "loss": curve(step) + wiggle(step, 0.02),
                "step": step,
            }
        )
        if step % 100 == 0:
            log.append(
                {
                    "epoch": step / 200,
                    "eval_loss": curve(step, end=0.4) + 0.02,
                    "eval_mean_iou": 0.8 - 0.5 * float(np.exp(-step / 150)),
                    "step": step,
                }
            )
    write_state(folder / "checkpoint-600", log, eval_steps=100, save_steps=100)
    write_state(folder, log, eval_steps=100, save_steps=100)
    rng = np.random.default_rng(81)
    rows = []
    for number, scene in enumerate(scenes(60, 81)):
        boxes = [shifted(box, rng) for box in scene.boxes]
        rows.append(
            {
                "id": f"val-{number}",
                "width": scene.width,
                "height": scene.height,
                "text": as_json(boxes, scene.labels),
                "boxes": boxes,
                "labels": scene.labels,
                "truth": scene.boxes,
                "truth_labels": scene.labels,
                "new_tokens": 12 + 30 * len(boxes),
                "truncated": False,
            }
        )
    write_predictions(folder, rows)
    return subject({}, run_dir=str(folder), settings={"max_new_tokens": 512, "learning_rate": 1e-4, "use_peft": True})


@healthy
def a_finished_run_of_a_weak_model(folder: Path) -> Any:
    """Boxes are noisy and some are missed; nothing is wrong but the model's skill."""
    log = [
        {
            "epoch": step / 100,
            "learning_rate": 2e-5,
            "loss": curve(step, end=0.8, pace=140) + wiggle(step),
            "step": step,
        }
        for step in range(5, 305, 5)
    ]
    write_state(folder, log, logging_steps=5)
    rng = np.random.default_rng(82)
    rows = []
    for number, scene in enumerate(scenes(60, 82)):
        boxes = [shifted(box, rng, 11.0) for box in scene.boxes if rng.random() > 0.25]
        rows.append(
            {"id": number, "text": as_json(boxes, scene.labels[: len(boxes)]), "boxes": boxes, "truth": scene.boxes}
        )
    write_predictions(folder, rows)
    return subject({}, run_dir=str(folder))


@healthy
def settings_of_a_sound_recipe() -> Any:
    settings = {
        "model_type": "qwen2_5_vl",
        "use_peft": True,
        "learning_rate": 2e-4,
        "warmup_steps": 20,
        "num_train_epochs": 3,
        "dataset_size": 1600,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 8,
        "bf16": True,
        "save_steps": 100,
        "eval_steps": 50,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_f1",
        "do_sample": False,
    }
    return subject({}, settings=settings)

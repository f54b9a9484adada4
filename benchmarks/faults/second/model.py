"""More faults of adapters, trainers and optimisation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.faults.bases import folder_of, model_of, processor_of
from benchmarks.faults.first.model import parts, to_dataset, write_adapter
from benchmarks.faults.first.optimisation import curve, wiggle, write_state
from benchmarks.faults.homes import trainers
from benchmarks.faults.registry import fault, subject


@fault("M01", stage="model")
def an_adapter_loaded_for_inference_is_trained_on() -> Any:
    """A second stage: `PeftModel.from_pretrained` without `is_trainable`, and nothing has a gradient."""
    import tempfile

    stage_one = write_adapter(Path(tempfile.mkdtemp(prefix="vlmdet-fault-")) / "stage1")

    def build() -> Any:
        from peft import PeftModel
        from transformers import Trainer

        _, collator, data = parts()
        model = PeftModel.from_pretrained(trainers.load_model(), str(stage_one))
        return Trainer(model=model, args=trainers.arguments(), train_dataset=data, data_collator=collator)

    return subject(trainers.fields(build))


@fault("M01", stage="model")
def a_callback_freezes_what_its_name_does_not_hold() -> Any:
    """Only weights with `adapter` in their name shall be trained; PEFT calls them `lora_A.default`, TRL's trainer runs."""

    def build() -> Any:
        from trl import SFTTrainer

        processor, collator, data = parts()
        trainer = SFTTrainer(
            model=trainers.load_model(),
            args=trainers.sft_arguments(),
            train_dataset=to_dataset(data),
            data_collator=collator,
            peft_config=trainers.lora(),
            processing_class=processor,
        )
        for name, weight in trainer.model.named_parameters():
            weight.requires_grad = "adapter" in name
        return trainer

    return subject(trainers.fields(build))


@fault("M03", stage="model")
def one_model_object_for_two_experiments() -> Any:
    """The second cell makes a new trainer of the model that the first one has adapted and trained already."""

    def build() -> Any:
        import torch
        from peft import get_peft_model
        from transformers import Trainer

        _, collator, data = parts()
        model = get_peft_model(trainers.load_model(), trainers.lora())
        first = Trainer(model=model, args=trainers.arguments(), train_dataset=data, data_collator=collator)
        with torch.no_grad():  # what `first.train()` left behind
            for name, weight in first.model.named_parameters():
                if "lora_B" in name:
                    weight.add_(0.03)
        args = trainers.arguments(learning_rate=2e-4)
        return Trainer(model=model, args=args, train_dataset=data, data_collator=collator)

    return subject(trainers.fields(build))


@fault("M04", stage="model")
def a_role_of_another_library_among_the_targets() -> Any:
    return subject({}, model=model_of("qwen3_vl"), target_modules=["q_proj", "o_proj", "visual_attn_proj"])


@fault("M05", stage="model")
def gate_up_and_down_are_names_of_the_tower_too() -> Any:
    """Meant for the language model; Qwen2.5's vision blocks have a `gate_proj`, `up_proj` and `down_proj` as well."""
    settings = {"freeze_vision": True, "lora_on": "language model only"}
    return subject(
        {},
        model=model_of("qwen2_5_vl"),
        target_modules=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
        settings=settings,
    )


@fault("M09", stage="model")
def two_cards_seen_and_one_process_started() -> Any:
    settings = {"n_gpu": 2, "world_size": 1, "device_map": {"": 0}, "per_device_train_batch_size": 2}
    return subject({}, settings=settings)


@fault("M12", stage="model")
def answers_are_generated_while_dropout_is_on() -> Any:
    def build() -> Any:
        from peft import get_peft_model
        from transformers import Trainer, TrainerCallback

        _, collator, data = parts()
        model = get_peft_model(trainers.load_model(), trainers.lora(lora_dropout=0.3))
        model.config.use_cache = False

        class Look(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
                if state.global_step == 2:
                    model.train()
                    batch = collator(data[:1])
                    batch.pop("labels")
                    model.generate(**batch, max_new_tokens=4, use_cache=False)

        args = trainers.arguments()
        return Trainer(model=model, args=args, train_dataset=data, data_collator=collator, callbacks=[Look()])

    return subject(trainers.fields(build, settings={"use_cache": False, "generate_in_train_mode": True}))


@fault("M14", stage="model")
def vision_and_language_but_no_merger() -> Any:
    settings = {"tune_merger": True, "lora_on": "vision, merger and language model"}
    return subject(
        {}, model=model_of("qwen2_vl"), target_modules=["q_proj", "v_proj", "qkv", "fc1", "fc2"], settings=settings
    )


@fault("M15", stage="model")
def the_rate_is_zero_by_a_default_of_the_config() -> Any:
    def build() -> Any:
        from peft import get_peft_model
        from transformers import Trainer

        _, collator, data = parts()
        options = {"lr": 2e-4}
        args = trainers.arguments(learning_rate=float(options.get("learning_rate", 0)))
        model = get_peft_model(trainers.load_model(), trainers.lora())
        return Trainer(model=model, args=args, train_dataset=data, data_collator=collator)

    return subject(trainers.fields(build))


@fault("M13", stage="model")
def pictures_are_detached_between_tower_and_merger() -> Any:
    def build() -> Any:
        from peft import get_peft_model
        from transformers import Trainer

        _, collator, data = parts()
        model = trainers.load_model()

        def cut(module: Any, inputs: Any, output: Any) -> Any:
            return output.detach()

        model.model.visual.blocks[-1].register_forward_hook(cut)
        config = trainers.lora(target_modules=["q_proj", "v_proj", "qkv", "fc1", "fc2"])
        model = get_peft_model(model, config)
        return Trainer(model=model, args=trainers.arguments(), train_dataset=data, data_collator=collator)

    return subject(trainers.fields(build))


@fault("M10", stage="model")
def an_adapter_that_was_never_moved(folder: Path) -> Any:
    """All B matrices are zero: laid on, it changes nothing."""
    write_adapter(folder, noise=0.0)
    artefacts = {"adapter": str(folder), "base": str(folder_of("qwen2_vl"))}
    return subject({}, model=model_of("qwen2_vl"), artefacts=artefacts)


@fault("M10", stage="model")
def a_config_without_its_weights(folder: Path) -> Any:
    write_adapter(folder)
    (folder / "adapter_model.safetensors").unlink()
    artefacts = {"adapter": str(folder), "base": str(folder_of("qwen2_vl"))}
    return subject({}, artefacts=artefacts)


@fault("T05", stage="template")
def new_rows_of_the_embedding_stay_as_they_were_drawn() -> Any:
    """Tokens are added and the embedding is resized; LoRA trains attention alone and saves no embedding."""
    processor = processor_of("qwen2_vl")
    processor.tokenizer.add_tokens(["<cup>", "<plate>", "<sign>"], special_tokens=True)
    model = model_of("qwen2_vl")
    model.resize_token_embeddings(len(processor.tokenizer))

    def build() -> Any:
        from peft import get_peft_model
        from transformers import Trainer

        _, collator, data = parts()
        return Trainer(
            model=get_peft_model(model, trainers.lora(modules_to_save=None)),
            args=trainers.arguments(),
            train_dataset=data,
            data_collator=collator,
        )

    settings = {"added_tokens": ["<cup>", "<plate>", "<sign>"], "modules_to_save": None, "use_peft": True}
    return subject({}, processor=processor, build_trainer=build, settings=settings)


@fault("O01", stage="optimisation")
def a_loss_that_crept_for_a_whole_run(folder: Path) -> Any:
    log = [
        {
            "epoch": step / 200,
            "grad_norm": 2.1 + wiggle(step, 0.1),
            "learning_rate": 2e-7,
            "loss": 1.62 - 0.00002 * step + wiggle(step, 0.03),
            "step": step,
        }
        for step in range(10, 610, 10)
    ]
    settings = {"learning_rate": 2e-7, "use_peft": True}
    return subject({}, run_dir=str(write_state(folder, log)), settings=settings)


@fault("O02", stage="optimisation")
def training_loss_falls_and_validation_rises(folder: Path) -> Any:
    log: list[dict[str, Any]] = []
    for step in range(10, 1010, 10):
        log.append({"epoch": step / 50, "learning_rate": 1e-3, "loss": curve(step, end=0.01, pace=90), "step": step})
        if step % 100 == 0:
            log.append({"epoch": step / 50, "eval_loss": 0.7 + 0.0012 * step + wiggle(step), "step": step})
    settings = {"learning_rate": 1e-3, "finetuning_type": "full", "num_train_epochs": 20, "dataset_size": 100}
    return subject({}, run_dir=str(write_state(folder, log)), settings=settings)


@fault("O05", stage="optimisation")
def a_run_too_short_to_be_evaluated_once() -> Any:
    settings = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_iou",
        "eval_strategy": "steps",
        "eval_steps": 500,
        "save_steps": 500,
        "dataset_size": 800,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 3,
    }
    return subject({}, settings=settings)


@fault("O06", stage="optimisation")
def warmup_by_a_ratio_of_a_half() -> Any:
    settings = {
        "warmup_ratio": 0.5,
        "dataset_size": 2000,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-4,
        "use_peft": True,
    }
    return subject({}, settings=settings)


@fault("O07", stage="optimisation")
def labels_hide_under_a_name_the_trainer_does_not_know() -> Any:
    def build() -> Any:
        from peft import get_peft_model
        from transformers import Trainer

        _, collator, data = parts()
        model = get_peft_model(trainers.load_model(), trainers.lora())
        args = trainers.arguments(
            eval_strategy="steps", eval_steps=5, label_names=["target_ids"], metric_for_best_model="eval_loss"
        )
        return Trainer(model=model, args=args, train_dataset=data, eval_dataset=data[:4], data_collator=collator)

    return subject(trainers.fields(build))


@fault("O09", stage="optimisation")
def the_second_stage_began_at_the_raw_base(folder: Path) -> Any:
    """Stage two says that it continues stage one; its base is the raw one, and the first stage's weights differ from both."""
    from peft import PeftModel

    one = write_adapter(folder / "stage1" / "adapter")
    merged = PeftModel.from_pretrained(model_of("qwen2_vl"), str(one)).merge_and_unload()
    merged.save_pretrained(folder / "stage1" / "merged")
    two = write_adapter(folder / "stage2" / "adapter", r=4)
    config = json.loads((two / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder_of("qwen2_vl"))
    (two / "adapter_config.json").write_text(json.dumps(config))
    artefacts = {
        "previous_stage": str(folder / "stage1" / "merged"),
        "adapter": str(two),
        "base": str(folder_of("qwen2_vl")),
    }
    return subject({}, artefacts=artefacts, settings={"stage": 2, "init_from": str(folder / "stage1" / "merged")})


@fault("O10", stage="optimisation", also=("M01", "M15"))
def an_epochs_log_with_a_frozen_validation(folder: Path) -> Any:
    """Evaluated once an epoch in a checkpoint folder; training loss is noise without a trend."""
    log: list[dict[str, Any]] = []
    for epoch in range(1, 8):
        for part in range(4):
            step = epoch * 40 + part * 10 - 30
            log.append({"epoch": step / 40, "learning_rate": 5e-5, "loss": 0.94 + wiggle(step, 0.06), "step": step})
        log.append(
            {"epoch": float(epoch), "eval_loss": 0.9312874, "eval_runtime": 9.1 + wiggle(epoch), "step": epoch * 40}
        )
    write_state(folder / "checkpoint-280", log)
    return subject({}, run_dir=str(folder))


@fault("O11", stage="optimisation")
def half_the_planned_steps(folder: Path) -> Any:
    log = [
        {"epoch": step / 100, "learning_rate": 1e-4, "loss": curve(step) + wiggle(step, 0.02), "step": step}
        for step in range(10, 310, 10)
    ]
    settings = {
        "dataset_size": 1600,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 3,
    }
    return subject({}, run_dir=str(write_state(folder, log)), settings=settings)

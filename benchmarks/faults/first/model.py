"""Faults of models, adapters and trainers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.faults.bases import folder_of, model_of
from benchmarks.faults.homes import cookbook, trainers
from benchmarks.faults.registry import fault, subject


def parts() -> tuple[Any, Any, list[dict[str, Any]]]:
    fields = cookbook.fields()
    processor = fields["processor"]
    return processor, cookbook.DetectionCollator(processor), trainers.examples()


@fault("M01", stage="model")
def everything_is_frozen_and_the_head_is_tied() -> Any:
    """A freeze policy meant for the vision tower walks over the whole model."""

    def build() -> Any:
        from transformers import Trainer

        _, collator, data = parts()
        model = trainers.load_model()
        for _, param in model.named_parameters():
            param.requires_grad = False
        for name, param in model.named_parameters():
            if name.startswith("lm_head"):
                param.requires_grad = True
        return Trainer(model=model, args=trainers.arguments(), train_dataset=data, data_collator=collator)

    return subject(trainers.fields(build))


@fault("M01", stage="model")
def prepared_for_kbit_after_the_adapter_was_laid_on() -> Any:
    """`prepare_model_for_kbit_training` freezes all weights, those of LoRA too."""

    def build() -> Any:
        from peft import get_peft_model, prepare_model_for_kbit_training
        from transformers import Trainer

        _, collator, data = parts()
        model = get_peft_model(trainers.load_model(), trainers.lora())
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        return Trainer(model=model, args=trainers.arguments(), train_dataset=data, data_collator=collator)

    return subject(trainers.fields(build))


@fault("M02", stage="model")
def the_model_is_loaded_again_in_a_later_cell() -> Any:
    def build() -> Any:
        from peft import get_peft_model
        from transformers import Trainer

        _, collator, data = parts()
        model = trainers.load_model()
        peft_model = get_peft_model(model, trainers.lora())
        peft_model.print_trainable_parameters()
        # cell 14
        model = trainers.load_model()
        return Trainer(model=model, args=trainers.arguments(), train_dataset=data, data_collator=collator)

    return subject(trainers.fields(build, settings={"use_peft": True, "lora_r": 8, "learning_rate": 1e-4}))


@fault("M04", stage="model")
def a_regex_among_names_matches_nothing() -> Any:
    targets = [*trainers.ATTENTION, r"model\.visual\.blocks\.\d+\.attn\.qkv"]
    return subject({}, model=model_of("qwen2_vl"), target_modules=targets)


@fault("M04", stage="model")
def one_of_the_names_belongs_to_an_older_family() -> Any:
    def build() -> Any:
        from trl import SFTTrainer

        processor, collator, data = parts()
        config = trainers.lora(target_modules=["q_proj", "v_proj", "query_key_value"])
        return SFTTrainer(
            model=trainers.load_model(),
            args=trainers.sft_arguments(),
            train_dataset=to_dataset(data),
            data_collator=collator,
            peft_config=config,
            processing_class=processor,
        )

    return subject(trainers.fields(build, target_modules=["q_proj", "v_proj", "query_key_value"]))


def to_dataset(data: list[dict[str, Any]]) -> Any:
    """TRL asks for a map-style dataset of its library; pictures and messages stay as they are."""
    from datasets import Dataset, Features, Image, List, Value

    kind = {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
    table = Dataset.from_list(data, features=Features({"image": Image(), "messages": List(kind)}))
    return table.with_transform(without_empty_keys)


def without_empty_keys(batch: dict[str, Any]) -> dict[str, Any]:
    messages = [
        [
            {"role": m["role"], "content": [{k: v for k, v in p.items() if v is not None} for p in m["content"]]}
            for m in row
        ]
        for row in batch["messages"]
    ]
    return {"image": batch["image"], "messages": messages}


@fault("M05", stage="model")
def proj_is_the_end_of_many_names() -> Any:
    return subject({}, model=model_of("qwen2_5_vl"), target_modules=r".*(proj|qkv|fc1|fc2).*")


@fault("M06", stage="model")
def the_freeze_policy_names_modules_of_old() -> Any:
    """`visual.` was the prefix before transformers 4.52; nothing is frozen."""

    def build() -> Any:
        from transformers import Trainer

        _, collator, data = parts()
        model = trainers.load_model()
        for name, param in model.named_parameters():
            if name.startswith("visual."):
                param.requires_grad_(False)
        return Trainer(
            model=model, args=trainers.arguments(learning_rate=1e-5), train_dataset=data, data_collator=collator
        )

    settings = {"freeze_vision": True, "freeze_prefixes": ["visual."], "learning_rate": 1e-5}
    return subject(trainers.fields(build, settings=settings))


@fault("M08", stage="model")
def checkpointing_cuts_the_adapters_off() -> Any:
    def build() -> Any:
        from peft import get_peft_model
        from transformers import Trainer

        _, collator, data = parts()
        model = trainers.load_model()
        model.config.use_cache = False
        model = get_peft_model(model, trainers.lora())
        inner = model.get_base_model()
        inner.gradient_checkpointing_enable({"use_reentrant": True})
        inner.disable_input_require_grads()  # "not needed, the embeddings are frozen"
        return Trainer(model=model, args=trainers.arguments(), train_dataset=data, data_collator=collator)

    return subject(trainers.fields(build))


@fault("M13", stage="model")
def the_tower_runs_without_gradients() -> Any:
    """Vision LoRA is asked for, and the pictures pass through a `no_grad` that an earlier experiment left behind."""

    def build() -> Any:
        import torch
        from peft import get_peft_model
        from transformers import Trainer

        _, collator, data = parts()
        model = trainers.load_model()
        tower = model.model.visual
        plain = tower.forward

        def quick(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                return plain(*args, **kwargs)

        tower.forward = quick
        config = trainers.lora(target_modules=["q_proj", "v_proj", "qkv"])
        return Trainer(
            model=get_peft_model(model, config),
            args=trainers.arguments(),
            train_dataset=data,
            data_collator=collator,
        )

    return subject(trainers.fields(build))


@fault("M15", stage="model")
def the_optimiser_was_made_before_the_adapter() -> Any:
    def build() -> Any:
        import torch
        from peft import get_peft_model
        from transformers import Trainer

        _, collator, data = parts()
        model = trainers.load_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        model = get_peft_model(model, trainers.lora())
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        return Trainer(
            model=model,
            args=trainers.arguments(),
            train_dataset=data,
            data_collator=collator,
            optimizers=(optimizer, scheduler),
        )

    return subject(trainers.fields(build))


def write_adapter(folder: Path, *, family: str = "qwen2_vl", noise: float = 0.02, **changes: Any) -> Path:
    """Save a LoRA adapter of a tiny base as PEFT does, with B matrices that are not zero."""
    import torch
    from peft import get_peft_model

    torch.manual_seed(3)
    model = get_peft_model(model_of(family), trainers.lora(**changes))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, noise)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    return folder


@fault("M10", stage="model")
def an_adapter_saved_before_the_modules_were_renamed(folder: Path) -> Any:
    from safetensors.torch import load_file, save_file

    write_adapter(folder)
    path = folder / "adapter_model.safetensors"
    old = {key.replace(".model.language_model.", ".model."): value for key, value in load_file(path).items()}
    save_file(old, path)
    artefacts = {"adapter": str(folder), "base": str(folder_of("qwen2_vl"))}
    return subject({}, model=model_of("qwen2_vl"), artefacts=artefacts)


@fault("M11", stage="model")
def trained_on_the_2b_and_laid_on_the_7b(folder: Path) -> Any:
    write_adapter(folder / "adapter")
    path = folder / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = "Qwen/Qwen2-VL-2B-Instruct"
    path.write_text(json.dumps(config))
    model_of("qwen2_5_vl").save_pretrained(folder / "Qwen2.5-VL-7B-Instruct")
    artefacts = {"adapter": str(folder / "adapter"), "base": str(folder / "Qwen2.5-VL-7B-Instruct")}
    return subject({}, artefacts=artefacts, settings={"model_name": "Qwen/Qwen2.5-VL-7B-Instruct"})

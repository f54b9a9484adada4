"""A user's own training set-up, as small as it can be written: rows, a collator, and a trainer on a model that is
loaded by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import Qwen2VLForConditionalGeneration, Trainer, TrainingArguments

from vlmdet.models.loader import load

NAME = "Qwen/Qwen2-VL-2B-Instruct"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SEEING = r".*visual\.blocks\.\d+\.attn\.(qkv|proj)|.*visual\.merger\.mlp\.[02]|.*language_model.*(q|v)_proj"
PROCESSOR: Any = load("tiny").processor


def rows() -> list[dict[str, Any]]:
    return [{"image": Image.new("RGB", (112, 84), (20 * i, 90, 60)), "text": "cup " * (1 + i % 4)} for i in range(12)]


def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    texts = []
    for one in examples:
        user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Find"}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": one["text"]}]}
        texts.append(PROCESSOR.apply_chat_template([user, answer], tokenize=False))
    batch = PROCESSOR(text=texts, images=[[one["image"]] for one in examples], return_tensors="pt", padding=True)
    labels = batch["input_ids"].clone()
    labels[(batch["attention_mask"] == 0) | (labels == PROCESSOR.image_token_id)] = -100
    batch["labels"] = labels
    return dict(batch)


def base(**keywords: Any) -> Any:
    return Qwen2VLForConditionalGeneration.from_pretrained(NAME, dtype=torch.float32, **keywords)


def adapted(model: Any = None, targets: Any = None, **keywords: Any) -> Any:
    return get_peft_model(
        base() if model is None else model, LoraConfig(r=4, target_modules=targets or ALL, **keywords)
    )


def trainer(
    model: Any, kind: type[Trainer] = Trainer, *, more: dict[str, Any] | None = None, **arguments: Any
) -> Trainer:
    usual = {
        "output_dir": "never-written",
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-4,
        "remove_unused_columns": False,
    }
    return kind(
        model=model,
        args=TrainingArguments(**{**usual, **arguments}),
        train_dataset=rows(),
        data_collator=collate,
        **more or {},
    )


Build = Callable[[], Trainer]

"""Healthy user code of other families and habits: conversation, template and labels find nothing of severity 3 or 4."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from doctor_hands import SYSTEM, collator, messages, render, spans, subject, tiny_processor, told
from PIL import Image

from vlmdet.doctor.checks import conversation, labels, template

CHECKS = (*conversation.CHECKS, *template.CHECKS, *labels.CHECKS)
Row = dict[str, Any]


def few_rows() -> list[Row]:
    rng = np.random.default_rng(1)
    pictures = [Image.fromarray(rng.integers(0, 255, (64, 80, 3), dtype=np.uint8)) for _ in range(6)]
    boxes = [[[4 + i, 5, 40, 30 + i], [1, 2, 20 + i, 30]][: 1 + i % 2] for i in range(6)]
    return [
        {"image": picture, "objects": {"bbox": one, "category": ["cup"] * len(one)}}
        for picture, one in zip(pictures, boxes, strict=True)
    ]


def fractions(row: Row) -> list[list[float]]:
    width, height = row["image"].size
    return [[x1 / width, y1 / height, x2 / width, y2 / height] for x1, y1, x2, y2 in row["objects"]["bbox"]]


def as_json(row: Row) -> str:
    return json.dumps([{"bbox_2d": [round(1000 * one) for one in box], "label": "cup"} for box in fractions(row)])


def family(base: Callable[[str], Any], name: str) -> tuple[Any, str]:
    import transformers

    folder = str(base(name))
    return transformers.AutoProcessor.from_pretrained(folder), folder


@pytest.mark.parametrize("side", ["left", "right"])
def test_paligemma_by_suffix(other_base: Any, side: str) -> None:
    processor, folder = family(other_base, "paligemma")
    processor.tokenizer.padding_side = side

    def convert(row: Row) -> Row:
        boxes = [[round(1023 * box[i]) for i in (1, 0, 3, 2)] for box in fractions(row)]
        text = " ; ".join("".join(f"<loc{one:04d}>" for one in box) + " cup" for box in boxes)
        return {"image": row["image"], "prefix": "detect cup", "suffix": text}

    def collate(examples: list[Row]) -> Any:
        return processor(
            text=["<image>" + one["prefix"] for one in examples], images=[one["image"] for one in examples],
            suffix=[one["suffix"] for one in examples], return_tensors="pt", padding="longest",
        )  # fmt: skip

    def without_end(examples: list[Row]) -> Any:
        batch = collate(examples)
        batch["labels"][batch["labels"] == processor.tokenizer.eos_token_id] = -100
        return batch

    given = {"rows": few_rows(), "convert": convert, "processor": processor, "model": folder}
    assert told(CHECKS, subject(collate=collate, **given)) == []
    assert told(CHECKS, subject(collate=without_end, **given)) == ["L01"]


def test_florence_with_labels_of_the_decoder(other_base: Any) -> None:
    processor, folder = family(other_base, "florence2")

    def convert(row: Row) -> Row:
        text = "".join("cup" + "".join(f"<loc_{round(999 * one)}>" for one in box) for box in fractions(row))
        return {"image": row["image"], "messages": messages(text, system=None, question="<OD>")}

    def collate(examples: list[Row], end: str = "</s>") -> Any:
        pictures = [one["image"] for one in examples]
        batch = processor(
            text=["Locate the objects"] * len(examples), images=pictures, return_tensors="pt", padding=True
        )
        answers = [one["messages"][-1]["content"][0]["text"] + end for one in examples]
        made = processor.tokenizer(answers, return_tensors="pt", padding=True, return_token_type_ids=False)
        batch["labels"] = made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)
        return batch

    given = {"rows": few_rows(), "convert": convert, "processor": processor, "model": folder}
    assert told(CHECKS, subject(collate=collate, **given)) == []
    assert told(CHECKS, subject(collate=lambda examples: collate(examples, ""), **given)) == ["L01"]


@pytest.mark.parametrize("name", ["idefics3", "internvl"])
def test_chats_masked_by_the_length_of_the_prompt(other_base: Any, name: str) -> None:
    processor, folder = family(other_base, name)

    def encode(turns: list[list[Row]], pictures: list[Any], **more: Any) -> Any:
        texts = [processor.apply_chat_template(one, tokenize=False, **more) for one in turns]
        return processor(text=texts, images=pictures, padding=True, return_tensors="pt", add_special_tokens=False)

    def collate(examples: list[Row]) -> Any:
        batch = encode([one["messages"] for one in examples], [[one["image"]] for one in examples])
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for row, one in enumerate(examples):
            prompt = encode([one["messages"][:-1]], [[one["image"]]], add_generation_prompt=True)["input_ids"].shape[1]
            padding = 0 if batch["attention_mask"][row, 0] else int((batch["attention_mask"][row] == 0).sum())
            batch["labels"][row, : padding + prompt] = -100
        return batch

    given = subject(
        rows=few_rows(), processor=processor, model=folder, collate=collate, render=lambda row: messages(None, system=None),
        convert=lambda row: {"messages": messages(as_json(row), system=None), "image": row["image"]},
    )  # fmt: skip
    assert told(CHECKS, given, least=3) == []


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("system", [SYSTEM, None])
def test_qwen_of_three_releases(family_base: Any, name: str, system: str | None) -> None:
    processor, folder = family(family_base, name)
    given = subject(
        processor=processor, model=folder, collate=collator(processor), render=lambda row: messages(None, system=system),
        convert=lambda row: {"messages": messages(as_json(row), system=system), "image": row["image"]},
    )  # fmt: skip
    assert told(CHECKS, given) == []


@pytest.mark.parametrize("how", [{"padding": "max_length", "max_length": 200}, {"pad_to_multiple_of": 64}])
@pytest.mark.parametrize("masked", [True, False])
def test_padding_of_other_habits(how: Row, masked: bool) -> None:
    processor = tiny_processor()

    def collate(examples: list[Row]) -> Any:
        texts = [processor.apply_chat_template(one["messages"], tokenize=False) for one in examples]
        pictures = [[one["image"]] for one in examples]
        batch = processor(text=texts, images=pictures, **{"padding": True, "return_tensors": "pt", **how})
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
        for row, ids in enumerate(batch["input_ids"].tolist()):
            for first, stop in spans(ids, processor):
                batch["labels"][row, first:stop] = batch["input_ids"][row, first:stop]
        if not masked:
            del batch["attention_mask"]
        return batch

    assert told(CHECKS, subject(collate=collate, render=render)) == []


def test_collator_as_a_class() -> None:
    class Collator:
        def __init__(self, processor: Any) -> None:
            self.processor = processor

        def __call__(self, features: list[Row]) -> Any:
            return collator(self.processor)(features)

    assert told(CHECKS, subject(collate=Collator, render=render)) == []

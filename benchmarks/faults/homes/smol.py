"""A SmolVLM notebook: Idefics3, plain words and numbers, the whole conversation masked up to the answer by its header."""

from __future__ import annotations

import re
from typing import Any

from benchmarks.faults.bases import processor_of
from benchmarks.faults.homes.scoring import mean_overlap
from benchmarks.faults.pictures import scenes

ASK = "Detect every cup, plate and sign. Answer like: cup box 100 200 300 400"
NUMBERS = re.compile(r"box (\d+) (\d+) (\d+) (\d+)")


def load(count: int = 12, seed: int = 6, **kind: Any) -> list[dict[str, Any]]:
    return [
        {"image": s.image, "boxes": [list(b) for b in s.boxes], "labels": list(s.labels)}
        for s in scenes(count, seed, **kind)
    ]


def say(row: dict[str, Any]) -> str:
    sides = row["image"].size * 2
    lines = []
    for box, label in zip(row["boxes"], row["labels"], strict=True):
        grid = " ".join(str(round(1000 * v / side)) for v, side in zip(box, sides, strict=True))
        lines.append(f"{label} box {grid}")
    return "\n".join(lines) or "nothing there"


def ask(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ASK}]}]


def talk(row: dict[str, Any]) -> dict[str, Any]:
    reply = {"role": "assistant", "content": [{"type": "text", "text": say(row)}]}
    return {"messages": [*ask(row), reply], "images": [row["image"]]}


def make_collate(processor: Any, *, extra: int = 1) -> Any:
    """Labels are the last tokens of a row: those of the answer and `extra` more for its end."""

    def collate(examples: list[dict[str, Any]]) -> Any:
        texts = [processor.apply_chat_template(e["messages"], tokenize=False).strip() for e in examples]
        batch = processor(
            text=texts, images=[e["images"] for e in examples], padding=True, padding_side="left", return_tensors="pt"
        )
        labels = batch["input_ids"].clone().fill_(-100)
        for row, example in enumerate(examples):
            answer = " " + example["messages"][-1]["content"][0]["text"]
            size = len(processor.tokenizer(answer, add_special_tokens=False)["input_ids"])
            stop = labels.shape[1] - 1 + extra
            start = labels.shape[1] - 1 - size
            labels[row, start:stop] = batch["input_ids"][row, start:stop]
        batch["labels"] = labels
        return batch

    return collate


def read(text: str) -> list[list[int]]:
    return [[int(v) for v in found] for found in NUMBERS.findall(text)]


def fields(**kind: Any) -> dict[str, Any]:
    processor = processor_of("idefics3")
    return {
        "rows": load(**kind),
        "box_format": "xyxy/pixel",
        "convert": talk,
        "render": ask,
        "processor": processor,
        "collate": make_collate(processor),
        "decode": lambda ids: processor.tokenizer.decode(ids, skip_special_tokens=True),
        "parse": read,
        "metric": mean_overlap,
        "settings": {"model_type": "idefics3", "learning_rate": 1e-4, "max_new_tokens": 128},
    }

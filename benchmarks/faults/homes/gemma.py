"""PaliGemma by prefix and suffix: `<loc>` tokens in the order y1, x1, y2, x2; the processor itself makes the labels."""

from __future__ import annotations

import re
from typing import Any

from benchmarks.faults.bases import processor_of
from benchmarks.faults.homes.scoring import labelled_f1
from benchmarks.faults.pictures import scenes

PREFIX = "detect cup ; plate ; sign"
LOC = re.compile(r"<loc(\d{4})><loc(\d{4})><loc(\d{4})><loc(\d{4})> ?([a-z ]+)")


def rows_of(count: int = 12, seed: int = 5, **kind: Any) -> list[dict[str, Any]]:
    return [
        {"image": s.image, "objects": {"bbox": [list(map(float, b)) for b in s.boxes], "category": s.labels}}
        for s in scenes(count, seed, **kind)
    ]


def suffix_of(row: dict[str, Any]) -> str:
    w, h = row["image"].size
    texts = []
    for (x1, y1, x2, y2), label in zip(row["objects"]["bbox"], row["objects"]["category"], strict=True):
        grid = (y1 / h, x1 / w, y2 / h, x2 / w)
        texts.append("".join(f"<loc{min(1023, round(v * 1024)):04d}>" for v in grid) + f" {label}")
    return " ; ".join(texts) or "none"


def inference(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PREFIX}]}]


def to_pair(row: dict[str, Any]) -> dict[str, Any]:
    reply = {"role": "assistant", "content": [{"type": "text", "text": suffix_of(row)}]}
    return {"image": row["image"], "messages": inference(row) + [reply]}


def make_collate(processor: Any) -> Any:
    def collate(items: list[dict[str, Any]]) -> Any:
        return processor(
            text=["<image>" + item["messages"][0]["content"][1]["text"] for item in items],
            images=[item["image"].convert("RGB") for item in items],
            suffix=[item["messages"][1]["content"][0]["text"] for item in items],
            return_tensors="pt",
            padding="longest",
        )

    return collate


def from_loc(text: str, width: int, height: int) -> list[dict[str, Any]]:
    return [
        {
            "bbox": [int(b) * width / 1024, int(a) * height / 1024, int(d) * width / 1024, int(c) * height / 1024],
            "label": label.strip(),
        }
        for a, b, c, d, label in LOC.findall(text)
    ]


def fields(**kind: Any) -> dict[str, Any]:
    processor = processor_of("paligemma")
    return {
        "rows": rows_of(**kind),
        "box_format": "xyxy/pixel",
        "convert": to_pair,
        "render": inference,
        "processor": processor,
        "collate": make_collate(processor),
        "decode": lambda ids: processor.tokenizer.decode(ids, skip_special_tokens=True),
        "parse": from_loc,
        "metric": labelled_f1,
        "settings": {"model_type": "paligemma", "learning_rate": 2e-5, "max_new_tokens": 128},
    }

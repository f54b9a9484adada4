"""A team's script: Qwen2.5-VL, boxes stored as y1, x1, y2, x2 fractions, JSON answers in pixels of the resized picture."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from benchmarks.faults.bases import MAX_PIXELS, MIN_PIXELS, processor_of
from benchmarks.faults.homes.scoring import labelled_f1
from benchmarks.faults.pictures import scenes

TASK = "Find all objects and report their bounding boxes as JSON."


def load_rows(count: int = 12, seed: int = 2, **kind: Any) -> list[dict[str, Any]]:
    out = []
    for scene in scenes(count, seed, **kind):
        w, h = scene.width, scene.height
        out.append(
            {
                "image": scene.image,
                "bboxes": [[y1 / h, x1 / w, y2 / h, x2 / w] for x1, y1, x2, y2 in scene.boxes],
                "labels": scene.labels,
            }
        )
    return out


def seen(width: int, height: int) -> tuple[int, int]:
    """Width and height of what the model sees."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    h, w = smart_resize(height, width, factor=28, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    return w, h


def target(row: dict[str, Any]) -> str:
    w, h = seen(*row["image"].size)
    found = [
        {"bbox_2d": [round(x1 * w), round(y1 * h), round(x2 * w), round(y2 * h)], "label": label}
        for (y1, x1, y2, x2), label in zip(row["bboxes"], row["labels"], strict=True)
    ]
    return json.dumps(found)


def question(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": [{"type": "image", "image": row["image"]}, {"type": "text", "text": TASK}]},
    ]


def to_chat(row: dict[str, Any]) -> dict[str, Any]:
    reply = {"role": "assistant", "content": [{"type": "text", "text": target(row)}]}
    return {"messages": question(row) + [reply], "images": [row["image"]]}


def make_collate(processor: Any) -> Callable[[list[dict[str, Any]]], Any]:
    """Each prompt is processed alone to learn its length; padding is on the right."""
    processor.tokenizer.padding_side = "right"

    def collate(batch: list[dict[str, Any]]) -> Any:
        full, lengths, pictures = [], [], []
        for item in batch:
            pictures.extend(item["images"])
            full.append(processor.apply_chat_template(item["messages"], tokenize=False).rstrip("\n"))
            ask = processor.apply_chat_template(item["messages"][:-1], tokenize=False, add_generation_prompt=True)
            lengths.append(processor(text=[ask], images=item["images"], return_tensors="pt")["input_ids"].shape[1])
        out = processor(text=full, images=pictures, padding=True, return_tensors="pt")
        labels = out["input_ids"].clone()
        for index, length in enumerate(lengths):
            labels[index, :length] = -100
        labels[out["attention_mask"] == 0] = -100
        out["labels"] = labels
        return out

    return collate


def read_answer(text: str, width: int, height: int) -> list[dict[str, Any]]:
    """Boxes in pixels of the original picture; raises on what is no JSON."""
    w, h = seen(width, height)
    body = re.sub(r"<\|[a-z_]+\|>", "", text).strip()
    return [
        {
            "bbox": [
                item["bbox_2d"][0] * width / w,
                item["bbox_2d"][1] * height / h,
                item["bbox_2d"][2] * width / w,
                item["bbox_2d"][3] * height / h,
            ],
            "label": item["label"],
        }
        for item in json.loads(body)
    ]


def fields(**kind: Any) -> dict[str, Any]:
    processor = processor_of("qwen2_5_vl")
    return {
        "rows": load_rows(**kind),
        "box_format": "yxyx/fraction",
        "convert": to_chat,
        "render": question,
        "processor": processor,
        "collate": make_collate(processor),
        "decode": lambda ids: processor.decode(ids, skip_special_tokens=True),
        "parse": read_answer,
        "metric": labelled_f1,
        "settings": {
            "model_type": "qwen2_5_vl",
            "min_pixels": MIN_PIXELS,
            "max_pixels": MAX_PIXELS,
            "max_new_tokens": 300,
            "learning_rate": 2e-4,
        },
    }

"""A LLaMA-Factory-like JSON for Qwen3-VL: COCO annotations in, `messages` with `images` out, masks by offsets of the answer."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.faults.bases import processor_of
from benchmarks.faults.homes.scoring import f1
from benchmarks.faults.pictures import LABELS, scenes

NAMES = {index + 1: label for index, label in enumerate(LABELS)}
INSTRUCTION = "Locate every cup, plate and sign. Return a JSON list with bbox_2d and label."


def coco_rows(count: int = 12, seed: int = 4, **kind: Any) -> list[dict[str, Any]]:
    rows = []
    for number, scene in enumerate(scenes(count, seed, **kind)):
        rows.append(
            {
                "id": number,
                "image": scene.image,
                "width": scene.width,
                "height": scene.height,
                "annotations": [
                    {"bbox": [a, b, c - a, d - b], "category_id": LABELS.index(label) + 1, "area": (c - a) * (d - b)}
                    for (a, b, c, d), label in zip(scene.boxes, scene.labels, strict=True)
                ],
            }
        )
    return rows


def grounding(row: dict[str, Any]) -> str:
    def on_grid(value: float, side: int) -> int:
        return min(1000, max(0, round(value / side * 1000)))

    w, h = row["image"].size
    out = []
    for ann in row["annotations"]:
        x, y, bw, bh = ann["bbox"]
        box = [on_grid(x, w), on_grid(y, h), on_grid(x + bw, w), on_grid(y + bh, h)]
        out.append({"bbox_2d": box, "label": NAMES[ann["category_id"]]})
    return json.dumps(out)


def user_turn(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": INSTRUCTION}]}]


def build_example(row: dict[str, Any]) -> dict[str, Any]:
    answer = {"role": "assistant", "content": [{"type": "text", "text": grounding(row)}]}
    return {"messages": [*user_turn(row), answer], "images": [row["image"]]}


class PromptLengthCollator:
    """Text, images and labels in one go; the prompt's tokens are counted after the picture has been expanded."""

    def __init__(self, processor: Any) -> None:
        self.p = processor

    def tokens(self, text: str, images: list[Any]) -> list[int]:
        return self.p(text=[text], images=images)["input_ids"][0]

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        texts = [self.p.apply_chat_template(f["messages"], tokenize=False) for f in features]
        batch = self.p(
            text=texts,
            images=[image for f in features for image in f["images"]],
            padding="longest",
            padding_side="right",
            return_tensors="pt",
        )
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for i, f in enumerate(features):
            asked = self.p.apply_chat_template(f["messages"][:-1], tokenize=False, add_generation_prompt=True)
            batch["labels"][i, : len(self.tokens(asked, f["images"]))] = -100
        return batch


def parse_json(text: str) -> list[dict[str, Any]]:
    """Objects as the model writes them, on the scale of 1,000; fences are taken away."""
    text = text.replace("<|im_end|>", "").strip()
    if text.startswith("```"):
        text = text.strip("`").removeprefix("json").strip()
    return [{"bbox_2d": item["bbox_2d"], "label": item["label"]} for item in json.loads(text)]


def score(predictions: Any, truths: Any) -> dict[str, float]:
    def plain(boxes: Any) -> Any:
        return [b if not isinstance(b, dict) else b.get("bbox_2d") or b.get("bbox") or b.get("box") for b in boxes]

    return f1([plain(b) for b in predictions], [plain(b) for b in truths])


def fields(**kind: Any) -> dict[str, Any]:
    processor = processor_of("qwen3_vl")
    return {
        "rows": coco_rows(**kind),
        "box_format": "xywh/pixel",
        "convert": build_example,
        "render": user_turn,
        "processor": processor,
        "collate": PromptLengthCollator,
        "decode": lambda ids: processor.tokenizer.decode(ids),
        "parse": parse_json,
        "metric": score,
        "settings": {"model_type": "qwen3_vl", "max_length": 2048, "max_new_tokens": 512, "learning_rate": 1e-4},
    }

"""A LLaVA-style fine-tune: `conversations` with `<image>` tags, turns tokenised one by one, left padding."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.faults.bases import processor_of
from benchmarks.faults.homes.scoring import mean_overlap
from benchmarks.faults.pictures import scenes

ASK = "<image>\nOutline the position of all objects and output all coordinates as JSON."
ROLES = {"human": "user", "gpt": "assistant"}


def answer_text(scene: Any) -> str:
    w, h = scene.width, scene.height
    return json.dumps(
        [
            {
                "bbox_2d": [round(a * 1000 / w), round(b * 1000 / h), round(c * 1000 / w), round(d * 1000 / h)],
                "label": name,
            }
            for (a, b, c, d), name in zip(scene.boxes, scene.labels, strict=True)
        ]
    )


def entries(count: int = 12, seed: int = 3, **kind: Any) -> list[dict[str, Any]]:
    """Rows that carry the answer as text, and COCO-like boxes (x, y, w, h in pixels) beside it."""
    rows = []
    for number, scene in enumerate(scenes(count, seed, **kind)):
        rows.append(
            {
                "id": f"{seed:03d}{number:05d}",
                "image": scene.image,
                "conversations": [
                    {"from": "human", "value": ASK},
                    {"from": "gpt", "value": answer_text(scene)},
                ],
                "annotations": [
                    {"bbox": [a, b, c - a, d - b], "category": label}
                    for (a, b, c, d), label in zip(scene.boxes, scene.labels, strict=True)
                ],
            }
        )
    return rows


def split_tag(text: str) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for index, piece in enumerate(text.split("<image>")):
        if index:
            parts.append({"type": "image"})
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip()})
    return parts


def to_messages(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        "messages": [
            {"role": ROLES[turn["from"]], "content": split_tag(turn["value"])} for turn in entry["conversations"]
        ],
        "image": entry["image"],
    }


def ask_only(entry: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": split_tag(entry["conversations"][0]["value"])}]


class TurnCollator:
    """Builds ids and labels turn by turn, as the LLaVA family of trainers does."""

    def __init__(self, processor: Any, model: Any = None, side: str = "left") -> None:
        self.processor, self.side = processor, side
        self.tok = processor.tokenizer
        self.merge = processor.image_processor.merge_size**2

    def encode(self, text: str) -> list[int]:
        return self.tok(text, add_special_tokens=False)["input_ids"]

    def one(self, sample: dict[str, Any]) -> tuple[list[int], list[int], Any]:
        pixels = self.processor.image_processor(images=[sample["image"]], return_tensors="pt")
        room = int(pixels["image_grid_thw"][0].prod()) // self.merge
        ids: list[int] = self.encode("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
        labels = [-100] * len(ids)
        for message in sample["messages"]:
            body = "".join(
                "<|vision_start|>" + "<|image_pad|>" * room + "<|vision_end|>" if p["type"] == "image" else p["text"]
                for p in message["content"]
            )
            head = self.encode(f"<|im_start|>{message['role']}\n")
            tail = self.encode(body + "<|im_end|>")
            ids += head + tail + self.encode("\n")
            learnt = tail if message["role"] == "assistant" else [-100] * len(tail)
            labels += [-100] * len(head) + learnt + [-100]
        return ids, labels, pixels

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        rows = [self.one(sample) for sample in samples]
        longest = max(len(ids) for ids, _, _ in rows)
        out: dict[str, Any] = {"input_ids": [], "labels": [], "attention_mask": [], "mm_token_type_ids": []}
        image = self.tok.convert_tokens_to_ids("<|image_pad|>")
        for ids, labels, _ in rows:
            gap = longest - len(ids)
            columns = {
                "input_ids": (ids, self.tok.pad_token_id),
                "labels": (labels, -100),
                "attention_mask": ([1] * len(ids), 0),
                "mm_token_type_ids": ([int(i == image) for i in ids], 0),
            }
            for key, (values, fill) in columns.items():
                out[key].append([fill] * gap + values if self.side == "left" else values + [fill] * gap)
        out = {key: torch.tensor(value) for key, value in out.items()}
        out["pixel_values"] = torch.cat([pixels["pixel_values"] for _, _, pixels in rows])
        out["image_grid_thw"] = torch.cat([pixels["image_grid_thw"] for _, _, pixels in rows])
        return out


def numbers(text: str) -> list[list[int]]:
    """Boxes on the scale of 1,000; an answer that is no JSON raises."""
    return [item["bbox_2d"] for item in json.loads(text)]


def fields(**kind: Any) -> dict[str, Any]:
    processor = processor_of("qwen2_vl")
    processor.tokenizer.padding_side = "left"
    return {
        "rows": entries(**kind),
        "box_format": "xywh/pixel",
        "convert": to_messages,
        "render": ask_only,
        "processor": processor,
        "collate": TurnCollator,
        "decode": lambda ids: processor.tokenizer.decode(ids, skip_special_tokens=True),
        "parse": numbers,
        "metric": mean_overlap,
        "settings": {"model_name": "Qwen/Qwen2-VL-2B-Instruct", "learning_rate": 1e-5, "max_new_tokens": 512},
    }

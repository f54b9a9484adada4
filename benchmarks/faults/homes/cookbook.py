"""A notebook's hand: Qwen2-VL, an `objects` column, native box tokens, a collator class that masks by scanning roles."""

from __future__ import annotations

import re
from typing import Any

from benchmarks.faults.bases import processor_of
from benchmarks.faults.homes.scoring import f1
from benchmarks.faults.pictures import LABELS, scenes

SYSTEM = "You are a helpful assistant."
QUESTION = "Detect every cup, plate and sign in this image. If there is none, answer: none"
BOX = re.compile(r"\((\d+),\s*(\d+)\),\s*\((\d+),\s*(\d+)\)")


def dataset(count: int = 12, seed: int = 1, **kind: Any) -> list[dict[str, Any]]:
    """Rows with boxes in pixels, x1, y1, x2, y2."""
    return [
        {
            "image_id": f"{seed}-{number}",
            "image": scene.image,
            "width": scene.width,
            "height": scene.height,
            "objects": {"bbox": scene.boxes, "category": [LABELS.index(label) for label in scene.labels]},
        }
        for number, scene in enumerate(scenes(count, seed, **kind))
    ]


def answer_of(sample: dict[str, Any]) -> str:
    width, height = sample["image"].size
    pieces = []
    for (x1, y1, x2, y2), category in zip(sample["objects"]["bbox"], sample["objects"]["category"], strict=True):
        a, b, c, d = (round(v * 1000 / side) for v, side in ((x1, width), (y1, height), (x2, width), (y2, height)))
        pieces.append(
            f"<|object_ref_start|>{LABELS[category]}<|object_ref_end|><|box_start|>({a},{b}),({c},{d})<|box_end|>"
        )
    return "".join(pieces) or "none"


def prompt_of(sample: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
    ]


def format_data(sample: dict[str, Any]) -> dict[str, Any]:
    answer = {"role": "assistant", "content": [{"type": "text", "text": answer_of(sample)}]}
    return {"image": sample["image"], "messages": [*prompt_of(sample), answer]}


class DetectionCollator:
    """Everything outside the assistant's turns gets -100."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        tokenizer = processor.tokenizer
        self.header = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
        self.end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        texts = [self.processor.apply_chat_template(example["messages"], tokenize=False) for example in examples]
        images = [[example["image"]] for example in examples]
        batch = self.processor(text=texts, images=images, return_tensors="pt", padding=True)
        labels = batch["input_ids"].clone().fill_(-100)
        for row, ids in enumerate(batch["input_ids"].tolist()):
            self.open_turns(ids, labels[row], batch["input_ids"][row])
        batch["labels"] = labels
        return batch

    def open_turns(self, ids: list[int], labels: Any, source: Any) -> None:
        size, place = len(self.header), 0
        while place < len(ids):
            if ids[place : place + size] == self.header:
                start = place + size
                stop = ids.index(self.end, start) + 1
                labels[start:stop] = source[start:stop]
                place = stop
            else:
                place += 1


def boxes_in(text: str, width: int, height: int) -> list[list[float]]:
    """Boxes of an answer in pixels of the picture."""
    return [
        [int(a) * width / 1000, int(b) * height / 1000, int(c) * width / 1000, int(d) * height / 1000]
        for a, b, c, d in BOX.findall(text)
    ]


def fields(**kind: Any) -> dict[str, Any]:
    processor = processor_of("qwen2_vl")
    return {
        "rows": dataset(**kind),
        "box_format": "xyxy/pixel",
        "convert": format_data,
        "render": prompt_of,
        "processor": processor,
        "collate": DetectionCollator,
        "decode": lambda ids: processor.tokenizer.decode(ids, skip_special_tokens=False),
        "parse": boxes_in,
        "metric": f1,
        "settings": {"model_type": "qwen2_vl", "learning_rate": 1e-4, "max_new_tokens": 256, "max_length": 1024},
    }

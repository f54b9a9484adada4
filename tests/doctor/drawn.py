"""Rows of a user: drawn pictures with boxes, and a converter for Qwen2-VL; faults are cut from them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from PIL import Image, ImageDraw

SIZES = ((640, 480), (480, 640), (800, 400))
SETTINGS = {"model_name": "Qwen/Qwen2-VL-2B-Instruct", "max_pixels": 1_003_520}
Row = dict[str, Any]


def draw_rows(count: int = 24, box_format: str = "xyxy/pixel", *, seed: int = 0, most: int = 3) -> list[Row]:
    """Draw pictures of dark rectangles on paper; every eighth has none. Boxes are sorted from top to bottom."""
    chance = random.Random(seed)
    order, unit = box_format.split("/")
    rows = []
    for i in range(count):
        width, height = chance.choice(SIZES)
        image = Image.new("RGB", (width, height), (240, 240, 235))
        draw = ImageDraw.Draw(image)
        draw.point((i % width, seed % height), fill=(200, 200, 200))  # no two pictures are equal
        boxes = []
        for _ in range(0 if i % 8 == 7 else chance.randint(1, most)):
            w, h = chance.randint(60, 220), chance.randint(60, 150)
            x, y = chance.randint(0, width - w), chance.randint(0, height - h)
            colour = (chance.randint(0, 120), chance.randint(0, 180), chance.randint(0, 255))
            draw.rectangle([x, y, x + w - 1, y + h - 1], fill=colour)
            boxes.append((x, y, x + w, y + h))
        boxes.sort(key=lambda box: (box[1], box[0]))
        written = [write(box, order, unit, width, height) for box in boxes]
        objects = {"bbox": written, "category": ["logo"] * len(boxes)}
        rows.append({"id": f"{seed}-{i}", "image": image, "width": width, "height": height, "objects": objects})
    return rows


def write(box: tuple[float, ...], order: str, unit: str, width: int, height: int) -> list[float]:
    """Write corners in pixels in another format, by hand."""
    x1, y1, x2, y2 = box
    if unit == "fraction":
        x1, y1, x2, y2 = x1 / width, y1 / height, x2 / width, y2 / height
    return {
        "xyxy": [x1, y1, x2, y2],
        "yxyx": [y1, x1, y2, x2],
        "xywh": [x1, y1, x2 - x1, y2 - y1],
        "cxcywh": [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1],
    }[order]


def answer_of(boxes: list[tuple[float, ...]], scale: tuple[float, float], label: str = "logo") -> str:
    """Write Qwen2-VL's answer for corners in pixels; numbers are times `scale` (1000 / width, 1000 / height)."""
    texts = []
    for x1, y1, x2, y2 in boxes:
        a, b, c, d = round(x1 * scale[0]), round(y1 * scale[1]), round(x2 * scale[0]), round(y2 * scale[1])
        texts.append(f"<|object_ref_start|>{label}<|object_ref_end|><|box_start|>({a},{b}),({c},{d})<|box_end|>")
    return "".join(texts) or "none"


def talk(question: str, answer: str, image: Any) -> Row:
    """Lay out a conversation as a converter does."""
    return {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
        "image": image,
    }


Change = Callable[[list[tuple[float, ...]], Row], tuple[list[tuple[float, ...]], tuple[float, float]]]


def make_convert(
    change: Change | None = None, *, question: str = "Find every logo.", label: str = "logo"
) -> Callable[[Row], Row]:
    """Return a converter of rows in xyxy/pixel; `change` spoils boxes or scale."""

    def convert(row: Row) -> Row:
        width, height = row["image"].size
        boxes = [tuple(box) for box in row["objects"]["bbox"]]
        scale = (1000 / width, 1000 / height)
        if change is not None:
            boxes, scale = change(boxes, row)
        return talk(question, answer_of(boxes, scale, label), row["image"])

    return convert

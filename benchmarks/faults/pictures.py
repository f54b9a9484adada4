"""Drawn pictures with objects at known places."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

LABELS = ("cup", "plate", "sign")
COLOURS = {"cup": (200, 40, 40), "plate": (40, 60, 210), "sign": (30, 160, 60)}
SIZES = ((224, 168), (168, 224), (252, 140), (196, 196), (140, 252), (224, 140))


@dataclass
class Scene:
    """A picture, its boxes as x1, y1, x2, y2 in whole pixels, and a label for each."""

    image: Image.Image
    boxes: list[list[int]]
    labels: list[str]

    @property
    def width(self) -> int:
        return self.image.width

    @property
    def height(self) -> int:
        return self.image.height


def draw(size: tuple[int, int], boxes: list[list[int]], labels: list[str], seed: int) -> Image.Image:
    """Draw filled rectangles on a noisy ground."""
    rng = np.random.default_rng(seed)
    ground = rng.integers(90, 200, (7, 9, 3), dtype=np.uint8)
    image = Image.fromarray(ground).resize(size, Image.Resampling.BICUBIC)
    brush = ImageDraw.Draw(image)
    for box, label in zip(boxes, labels, strict=True):
        brush.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=COLOURS[label], outline=(250, 250, 250))
    return image


def scenes(
    count: int = 12, seed: int = 0, *, labels: tuple[str, ...] = LABELS, most: int = 3, negatives: bool = True
) -> list[Scene]:
    """Make scenes of one to `most` objects that do not overlap, sorted by (y, x); every sixth is empty."""
    found = []
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        size = SIZES[number % len(SIZES)]
        wanted = 0 if negatives and number % 6 == 5 else 1 + number % most
        boxes: list[list[int]] = []
        for _ in range(400):
            if len(boxes) == wanted:
                break
            width, height = (int(rng.integers(40, max(52, side * 5 // 9))) for side in size)
            left, top = int(rng.integers(2, size[0] - width - 1)), int(rng.integers(2, size[1] - height - 1))
            new = [left, top, left + width, top + height]
            if all(new[2] <= o[0] or o[2] <= new[0] or new[3] <= o[1] or o[3] <= new[1] for o in boxes):
                boxes.append(new)
        boxes.sort(key=lambda box: (box[1], box[0]))
        names = [labels[int(rng.integers(len(labels)))] for _ in boxes]
        found.append(Scene(draw(size, boxes, names, seed * 1000 + number), boxes, names))
    return found

"""Move a picture and its boxes together, then write the target again.

When: EVERY ACCESS to a training row, through `datasets.Dataset.with_transform`; off unless a setting asks for it. The
answer is written by the same codec as before, so that text and boxes cannot part.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F  # noqa: N812

from vlmdet.boxes import Boxes, BoxFormat
from vlmdet.data.dataset import ViewOf, build_messages
from vlmdet.images import to_upright_rgb

_PIXELS = BoxFormat("xyxy", "pixel")


def augment(
    image: Image.Image,
    boxes: Boxes,
    rng: np.random.Generator,
    *,
    flip_horizontal: float = 0.0,
    flip_vertical: float = 0.0,
    rotate: float = 0.0,
    crop: float = 0.0,
    shrink: float = 0.0,
    color: float = 0.0,
) -> tuple[Image.Image, Boxes]:
    """Change one picture and its boxes together; each chance of 0 leaves that change out.

    Input: an upright RGB `image`; n `boxes` on it; chances from 0 to 1:
    `flip_horizontal`, a mirror image (0 where labels name left or right); `flip_vertical` and `rotate`, upside down and
    turned by 90, 180 or 270 degrees (only for pictures without an up); `crop`, a window that holds every box whole;
    `shrink`, the picture laid on a grey ground up to twice as large; `color`, other brightness, contrast, saturation, hue.
    Output: a new picture and n boxes in the same order, cut to it.
    """
    points = tv_tensors.BoundingBoxes(  # type: ignore[call-arg]
        torch.from_numpy(boxes.to_array(_PIXELS, *image.size)),
        format="XYXY",
        canvas_size=(image.height, image.width),
    )
    if rng.random() < flip_horizontal:
        image, points = F.horizontal_flip(image), F.horizontal_flip(points)
    if rng.random() < flip_vertical:
        image, points = F.vertical_flip(image), F.vertical_flip(points)
    if rng.random() < rotate:
        angle = float(rng.choice([90, 180, 270]))
        image, points = F.rotate(image, angle, expand=True), F.rotate(points, angle, expand=True)
    if rng.random() < crop:
        top, left, height, width = _window(rng, np.asarray(points), *image.size)
        image, points = F.crop(image, top, left, height, width), F.crop(points, top, left, height, width)
    if rng.random() < shrink:
        extra = rng.uniform(0, 1, size=2) * [image.width, image.height]
        before = rng.uniform(0, 1, size=2) * extra
        (left, top), (right, bottom) = before.astype(int), (extra - before).astype(int)
        sides = [int(left), int(top), int(right), int(bottom)]
        grey = int(rng.integers(90, 170))
        image, points = F.pad(image, sides, fill=[grey] * 3), F.pad(points, sides)
    if rng.random() < color:
        image = F.adjust_brightness(image, float(rng.uniform(0.75, 1.25)))
        image = F.adjust_contrast(image, float(rng.uniform(0.75, 1.25)))
        image = F.adjust_saturation(image, float(rng.uniform(0.7, 1.3)))
        image = F.adjust_hue(image, float(rng.uniform(-0.04, 0.04)))
    return image, Boxes.from_array(np.asarray(points), _PIXELS, image.width, image.height).clip()


def _window(rng: np.random.Generator, points: np.ndarray, width: int, height: int) -> tuple[int, int, int, int]:
    """Choose top, left, height, width of a window that holds all boxes and at least half of each side."""
    low = points[:, :2].min(axis=0) if len(points) else np.array([width, height]) * 0.4
    high = points[:, 2:].max(axis=0) if len(points) else np.array([width, height]) * 0.6
    size = np.array([width, height])
    first = np.floor(rng.uniform(0, 1, 2) * np.clip(np.minimum(low, size * 0.25), 0, None)).astype(int)
    last = np.ceil(size - rng.uniform(0, 1, 2) * np.clip(np.minimum(size - high, size * 0.25), 0, None)).astype(int)
    return int(first[1]), int(first[0]), int(last[1] - first[1]), int(last[0] - first[0])


def augment_rows(
    rows: dict[str, list[Any]],
    *,
    chances: Mapping[str, float],
    asked: Sequence[str],
    codec: str,
    box_order: str,
    seed: int,
    epoch: Callable[[], int],
    view_of: ViewOf | None = None,
) -> dict[str, list[Any]]:
    """Change a batch of training rows: the function for `Dataset.with_transform`.

    Input: columns of `data.dataset.build_rows`: `id`, `messages`, `image`, `boxes`, `labels`; `chances` as keywords of `augment`;
    `asked`, labels of the prompt; `seed` of the run; `epoch()`, number of the current pass; `view_of` as in `build_rows`, asked
    for the size of the new picture.
    Output: the same columns with new pictures, boxes and messages. What happens to a row depends on the seed, the epoch and its
    id alone, so it is the same in any worker, on any number of machines, and when a stopped run goes on.
    """
    result = dict(rows)
    result["image"], result["boxes"], result["messages"] = [], [], []
    for row_id, image, box_list, labels in zip(rows["id"], rows["image"], rows["boxes"], rows["labels"], strict=True):
        rng = np.random.default_rng([seed, epoch(), zlib.crc32(row_id.encode())])
        picture, boxes = augment(
            _open(image), Boxes(np.asarray(box_list, dtype=np.float64).reshape(-1, 4)), rng, **chances
        )
        result["image"].append(picture)
        result["boxes"].append(boxes.tolist())
        result["messages"].append(
            build_messages(
                asked,
                boxes=boxes,
                labels=labels,
                size=picture.size,
                view=view_of(*picture.size) if view_of else None,
                codec=codec,
                box_order=box_order,
            )
        )
    return result


def _open(image: Any) -> Image.Image:
    if isinstance(image, dict):
        image = Image.open(io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"])
    return to_upright_rgb(image)

"""Which reading of boxes lies on the objects: contrast across the sides of each box, in the user's own pictures.

When: where numbers alone cannot tell x first from y first. numpy only. A side of a true box runs along an edge of the
object, so pixels
just within differ from those just without; a box read in the wrong order cuts through anything.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

SIDE = 320
_POINTS = 24


def thumbnail(image: Image.Image) -> np.ndarray:
    """Return a small copy of an upright RGB picture: (h, w, 3) float32."""
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32)


def side_contrast(pixels: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return the mean contrast across the sides of each box, 0 to 255; NaN where no side lies within the picture.

    Input: `pixels` (h, w, 3); `boxes` (n, 4) as fractions x1, y1, x2, y2.
    """
    height, width = pixels.shape[:2]
    scores = np.full(len(boxes), np.nan)
    for i, (x1, y1, x2, y2) in enumerate(boxes * np.array([width, height, width, height])):
        if x2 - x1 < 3 or y2 - y1 < 3:
            continue
        reach = float(np.clip(min(x2 - x1, y2 - y1) / 6, 1.5, 4))
        along_x, along_y = (np.linspace(low + reach, high - reach, _POINTS) for low, high in ((x1, x2), (y1, y2)))
        pairs = []
        for x, sign in ((x1, 1), (x2, -1)):
            pairs.append(((np.full(_POINTS, x + sign * reach), along_y), (np.full(_POINTS, x - sign * reach), along_y)))
        for y, sign in ((y1, 1), (y2, -1)):
            pairs.append(((along_x, np.full(_POINTS, y + sign * reach)), (along_x, np.full(_POINTS, y - sign * reach))))
        values = []
        for within, without in pairs:
            if not (
                without[0].min() >= 0
                and without[0].max() < width
                and without[1].min() >= 0
                and without[1].max() < height
            ):
                continue
            values.append(np.abs(_at(pixels, *within) - _at(pixels, *without)).max(axis=1).mean())
        if values:
            scores[i] = float(np.mean(values))
    return scores


def _at(pixels: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    return pixels[np.clip(y.astype(int), 0, height - 1), np.clip(x.astype(int), 0, width - 1)]


def compare_readings(
    pictures: Sequence[np.ndarray], first: Sequence[np.ndarray], second: Sequence[np.ndarray]
) -> tuple[float, float, float, int]:
    """Compare two readings of the same boxes.

    Output: mean contrast of the first and of the second, share of boxes on which the second has more, and how many boxes
    were compared: those that differ between the readings by more than a fifth in IoU.
    """
    from vlmdet.doctor.gather.text_boxes import paired_iou

    one, other = [], []
    for pixels, a, b in zip(pictures, first, second, strict=True):
        if not len(a):
            continue
        apart = paired_iou(a, b) < 0.8
        inside = ((b > -0.02) & (b < 1.02)).all(axis=1) | ((a > -0.02) & (a < 1.02)).all(axis=1)
        keep = apart & inside
        one.append(np.nan_to_num(side_contrast(pixels, a[keep])))
        other.append(np.nan_to_num(side_contrast(pixels, b[keep])))
    if not one or not sum(map(len, one)):
        return 0.0, 0.0, 0.0, 0
    x, y = np.concatenate(one), np.concatenate(other)
    return float(x.mean()), float(y.mean()), float((y > x).mean()), len(x)

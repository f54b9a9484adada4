"""Find boxes in any text, and say in which order and space the numbers of targets are, by comparing with the truth.

When: wherever a check reads a target without the user's parser. numpy only; patterns run in linear time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_NUMBER = r"(-?\d{1,6}(?:\.\d{1,12})?)"
_GAP = r"[^\d\-]{1,12}"
_LOCATION = re.compile(r"<loc_?(\d{1,4})>" * 4)
_FOUR = re.compile(rf"(?<![\d.\-]){_NUMBER}{_GAP}{_NUMBER}{_GAP}{_NUMBER}{_GAP}{_NUMBER}(?![\d.])")
_KEYED = re.compile(
    rf"[\"']?(?:x1|xmin|x_min|left)[\"']?\s{{0,3}}[:=]\s{{0,3}}{_NUMBER}{_GAP}[\"']?[a-z_12]{{1,8}}[\"']?\s{{0,3}}[:=]\s{{0,3}}"
    rf"{_NUMBER}{_GAP}[\"']?[a-z_12]{{1,8}}[\"']?\s{{0,3}}[:=]\s{{0,3}}{_NUMBER}{_GAP}[\"']?[a-z_12]{{1,8}}[\"']?"
    rf"\s{{0,3}}[:=]\s{{0,3}}{_NUMBER}",
    re.IGNORECASE,
)
_KEYED_OPEN = re.compile(r"[{,]\s*[\"'](?:bbox_2d|bbox|box_2d|box|coordinates)[\"']\s*:\s*[\[{(]", re.IGNORECASE)
_TIDY = re.compile(r"[\"'](?:bbox|box)_2d[\"']\s*:|<\|box_start\|>|<\|box_end\|>|<box>|</box>")

SYNTAX: dict[str, re.Pattern[str]] = {
    "qwen2_vl": re.compile(r"<\|box_start\|>\s*\(\s*-?\d"),
    "json": re.compile(r"[\"'](?:bbox_2d|bbox|box_2d|box|boxes|bboxes)[\"']\s*:\s*[\[{(]"),
    "paligemma": re.compile(r"<loc\d{4}>"),
    "florence2": re.compile(r"<loc_\d{1,4}>"),
    "internvl": re.compile(r"<box>\s*\[\["),
    "qwen_vl": re.compile(r"<box>\s*\("),
    "parentheses": re.compile(r"\(\s*-?\d[\d.]*\s*,\s*-?\d[\d.]*\s*\)\s*,?\s*\("),
    "list": re.compile(r"\[\s*-?\d[\d.]*(?:\s*,\s*-?\d[\d.]*){3}\s*\]"),
}
"""Name of a syntax to the pattern that shows it, the surest first."""


@dataclass(frozen=True)
class TextBox:
    """Four numbers as they stand in a text, and between which characters."""

    numbers: tuple[float, float, float, float]
    start: int
    end: int


def boxes_in(text: str) -> list[TextBox]:
    """Return every group of four numbers that may be a box, in order.

    Input: an answer in any usual syntax: `(x1,y1),(x2,y2)`, JSON, `[x1, y1, x2, y2]`, `<locY1>…`, `<loc_x1>…`, keyed corners.
    """
    pattern = _LOCATION if _LOCATION.search(text) else _KEYED if _KEYED.search(text) else _FOUR
    # the digit of `bbox_2d` is none of a box; the same length is kept, so that places stay true
    clean = text if pattern is not _FOUR else _TIDY.sub(lambda m: re.sub(r"\d", "_", m.group()), text)
    found = []
    for match in pattern.finditer(clean):
        x1, y1, x2, y2 = (float(one) for one in match.groups()[:4])
        found.append(TextBox((x1, y1, x2, y2), match.start(), match.end()))
    return found


_WRITTEN_LABELS = (
    re.compile(r"<\|object_ref_start\|>([^<>|]{1,80})<\|object_ref_end\|>"),
    re.compile(r"<ref>([^<>]{1,80})</ref>"),
    re.compile(
        r"[\"'](?:label|category|class|name|class_name|category_name)[\"']\s*:\s*[\"']([^\"'{}\[\]]{1,80})[\"']"
    ),
    re.compile(r"(?:<loc\d{4}>){4}\s{0,4}([^<>;\n]{1,80})"),
)


def labels_in(text: str) -> set[str]:
    """Return the class names that an answer writes beside its boxes, in the syntaxes that mark them."""
    return {name.strip() for pattern in _WRITTEN_LABELS for name in pattern.findall(text) if name.strip()}


def syntax_of(text: str) -> str | None:
    """Return the name of the syntax of an answer, see `SYNTAX`; None where it holds no box."""
    return next((name for name, pattern in SYNTAX.items() if pattern.search(text)), None)


ORDERS: dict[str, tuple[int, int, int, int]] = {"xyxy": (0, 1, 2, 3), "yxyx": (1, 0, 3, 2)}


@dataclass(frozen=True)
class Space:
    """In which order and space the numbers of the targets are.

    Attributes:
        order: `xyxy`, `yxyx`, `xywh` or `cxcywh`.
        unit: `per_mille`, `bins` (0 to 1023), `fraction`, `pixel` (of the original picture), `given` (of the picture that
            the converter gives, where that is another), `resized` (of the picture as the
            model sees it) or `other`.
        iou: mean IoU of target and truth when read so, 0 to 1.
        runner_up: the next best reading, `yxyx/per_mille`, and its mean IoU.
        boxes: number of boxes compared.
        scale: numbers a picture's width and height are worth, the median over rows; (1000, 1000) for per mille.
    """

    order: str
    unit: str
    iou: float
    runner_up: str
    runner_up_iou: float
    boxes: int
    scale: tuple[float, float]

    def __str__(self) -> str:
        return f"{self.order}/{self.unit}"


def corners_of(numbers: np.ndarray, order: str) -> np.ndarray:
    """Turn numbers (n, 4) of an order into x1, y1, x2, y2."""
    if order == "yxyx":
        return numbers[:, [1, 0, 3, 2]]
    if order == "xywh":
        return np.concatenate([numbers[:, :2], numbers[:, :2] + numbers[:, 2:]], axis=1)
    if order == "cxcywh":
        return np.concatenate([numbers[:, :2] - numbers[:, 2:] / 2, numbers[:, :2] + numbers[:, 2:] / 2], axis=1)
    return numbers


def paired_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the IoU of each row of one (n, 4) array of corners with the same row of the other: (n,)."""
    low, high = np.maximum(first[:, :2], second[:, :2]), np.minimum(first[:, 2:], second[:, 2:])
    both = (high - low).clip(min=0).prod(axis=1)
    areas = [(one[:, 2:] - one[:, :2]).clip(min=0).prod(axis=1) for one in (first, second)]
    union = areas[0] + areas[1] - both
    return np.divide(both, union, out=np.zeros_like(both), where=union > 0)


def best_iou(candidates: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return for each box (n, 4) its best IoU with any of the candidates (m, 4): (n,)."""
    if not len(candidates) or not len(boxes):
        return np.zeros(len(boxes))
    return np.stack([paired_iou(np.broadcast_to(one, candidates.shape), candidates).max() for one in boxes])


def read_space(
    numbers: Sequence[np.ndarray],
    truth: Sequence[np.ndarray],
    sizes: Sequence[tuple[int, int]],
    resized: Sequence[tuple[int, int] | None] = (),
    given: Sequence[tuple[int, int] | None] = (),
) -> Space | None:
    """Find the reading of the numbers of targets under which they lie on the truth.

    Input: for each row the numbers of its target (m, 4), the true boxes (n, 4) as fractions, width and height of the upright
    picture, and, where known, of the picture as the model sees it and of the one that the converter gives.
    Output: the best reading, by the best IoU of each box of a target with any true one (so a target that leaves boxes
    out is still read); None where there is no box to compare.
    """
    rows = [i for i in range(len(numbers)) if len(numbers[i]) and len(truth[i])]
    if not rows:
        return None
    units: dict[str, list[np.ndarray]] = {
        "per_mille": [np.full(4, 1000.0)] * len(rows),
        "bins": [np.full(4, 1024.0)] * len(rows),
        "fraction": [np.ones(4)] * len(rows),
        "pixel": [np.tile(np.array(sizes[i], float), 2) for i in rows],
        "percent": [np.full(4, 100.0)] * len(rows),
    }
    if resized and all(resized[i] is not None for i in rows):
        units["resized"] = [np.tile(np.array(resized[i], float), 2) for i in rows]
    if given and all(given[i] is not None for i in rows) and any(given[i] != sizes[i] for i in rows):
        units["given"] = [np.tile(np.array(given[i], float), 2) for i in rows]
    scores: dict[tuple[str, str], float] = {}
    counted = 0
    turned = np.array([1, 0, 3, 2])
    for unit, scales in units.items():
        for order in ("xyxy", "yxyx", "xywh", "cxcywh"):
            values = []
            for scale, i in zip(scales, rows, strict=True):
                values.append(best_iou(truth[i], corners_of(numbers[i], order) / scale))
            every = np.concatenate(values)
            counted = len(every)
            scores[order, unit] = float(every.mean())
            if order == "yxyx" and unit in ("pixel", "resized", "given"):
                # x taken for y before it was multiplied: y times the width stands first
                crossed = [
                    best_iou(truth[i], corners_of(numbers[i], order) / scale[turned])
                    for scale, i in zip(scales, rows, strict=True)
                ]
                scores[order, unit] = max(scores[order, unit], float(np.concatenate(crossed).mean()))
    ranked = sorted(scores.items(), key=lambda item: -item[1])
    (order, unit), iou = ranked[0]
    (second, second_unit), second_iou = ranked[1]
    median = np.median(np.stack(units[unit]), axis=0)
    if iou < 0.35:
        unit = "other"
    return Space(order, unit, iou, f"{second}/{second_unit}", second_iou, counted, (float(median[0]), float(median[1])))

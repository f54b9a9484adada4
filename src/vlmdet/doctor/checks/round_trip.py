"""Does a user's parser read his own training targets back: all boxes, in one space, in the declared order?

When: WHEN WRONG; numpy only. A target that was written from known boxes is decoded as his evaluation does and parsed; what
comes back is compared with the boxes in every order and space that the field knows. `checks/evaluation.py` makes findings of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vlmdet.boxes import FRACTIONS, Boxes
from vlmdet.doctor.calls import NotAvailable, UserCodeError, as_boxes, call_parse

GOOD = 0.9
"""Mean IoU from which boxes count as read back: above what rounding to a grid costs all but the smallest."""

ORDERS: dict[str, tuple[int, int, int, int]] = {"xyxy": (0, 1, 2, 3), "yxyx": (1, 0, 3, 2)}
"""Places of x1, y1, x2, y2 in four numbers; xywh and cxcywh are turned first."""

SPACES = ("fraction", "per_mille", "1023 grid", "original pixels", "resized pixels")


@dataclass(frozen=True)
class Target:
    """One training answer, and what it was written from.

    Attributes:
        row: its name, for messages.
        text: the answer as it is read by the parser.
        width, height: of the upright picture in pixels.
        resized: (width, height) that the model sees; the picture's own where that is unknown.
        boxes: (n, 4) xyxy fractions.
    """

    row: str
    text: str
    width: int
    height: int
    resized: tuple[int, int]
    boxes: np.ndarray


class ReadBack(NamedTuple):
    """What a parser made of targets.

    `iou` is the mean best IoU over true boxes in the reading that fits best, `order` and `space` that reading; `declared` the
    same for the order xyxy alone; `found` and `wanted` count boxes; `per_row` is (found, wanted) of each target; `failure` is
    what the parser raised first, with its place.
    """

    iou: float
    order: str
    space: str
    declared: float
    found: int
    wanted: int
    per_row: tuple[tuple[int, int], ...]
    failure: str
    example: tuple[str, str, str]


def read_back(parse: Callable[..., Any], targets: Sequence[Target]) -> ReadBack:
    """Parse targets and compare the boxes with those that they were written from.

    Input: the user's parser; targets with at least one box each.
    """
    parsed: list[np.ndarray] = []
    failure, example = "", ("", "", "")
    for target in targets:
        try:
            boxes = [box for _, box in as_boxes(call_parse(parse, target.text, target.width, target.height))]
        except UserCodeError as error:
            failure = failure or f"{error.text} at {error.where}"
            boxes = []
        except NotAvailable as error:
            failure = failure or str(error)
            boxes = []
        parsed.append(np.asarray(boxes, dtype=np.float64).reshape(-1, 4))
        if not example[0] or (len(boxes) < len(target.boxes) and example[2] == ""):
            missing = "" if len(boxes) >= len(target.boxes) else "missing"
            example = (target.text, str(boxes), missing)
    readings = {
        (order, space): _mean_iou(parsed, targets, order, space)
        for order in ("xyxy", "yxyx", "xywh", "cxcywh")
        for space in SPACES
    }
    best = max(readings, key=lambda key: (round(readings[key], 3), key[0] == "xyxy", -SPACES.index(key[1])))
    return ReadBack(
        iou=readings[best],
        order=best[0],
        space=best[1],
        declared=max(value for (order, _), value in readings.items() if order == "xyxy"),
        found=sum(map(len, parsed)),
        wanted=sum(len(target.boxes) for target in targets),
        per_row=tuple((len(boxes), len(target.boxes)) for boxes, target in zip(parsed, targets, strict=True)),
        failure=failure,
        example=example,
    )


def _mean_iou(parsed: Sequence[np.ndarray], targets: Sequence[Target], order: str, space: str) -> float:
    """Return the mean best IoU over true boxes of one reading; boxes outside the picture or without area count 0."""
    total, count = 0.0, 0
    for values, target in zip(parsed, targets, strict=True):
        count += len(target.boxes)
        if not len(values):
            continue
        boxes = _corners(values, order) / _divisor(space, target)
        boxes = boxes[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]) & (np.abs(boxes) < 10).all(axis=1)]
        if not len(boxes):
            continue
        truth = Boxes.from_array(target.boxes, FRACTIONS, target.width, target.height)
        total += float(_iou(truth.xyxy, boxes).max(axis=1).sum())
    return total / count if count else 0.0


def _corners(values: np.ndarray, order: str) -> np.ndarray:
    if order in ORDERS:
        return values[:, list(ORDERS[order])]
    if order == "xywh":
        return np.concatenate([values[:, :2], values[:, :2] + values[:, 2:]], axis=1)
    return np.concatenate([values[:, :2] - values[:, 2:] / 2, values[:, :2] + values[:, 2:] / 2], axis=1)


def _divisor(space: str, target: Target) -> np.ndarray:
    sides = {
        "fraction": (1.0, 1.0),
        "per_mille": (1000.0, 1000.0),
        "1023 grid": (1023.5, 1023.5),
        "original pixels": (float(target.width), float(target.height)),
        "resized pixels": (float(target.resized[0]), float(target.resized[1])),
    }[space]
    return np.asarray([*sides, *sides])


def _iou(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the (n, m) IoU matrix; boxes may reach over the picture's edge, which `Boxes` would not allow."""
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    high = np.minimum(one[:, None, 2:], other[None, :, 2:])
    inner = np.clip(high - low, 0, None).prod(axis=2)
    area = (one[:, 2:] - one[:, :2]).prod(axis=1)[:, None] + (other[:, 2:] - other[:, :2]).prod(axis=1)[None]
    return np.divide(inner, area - inner, out=np.zeros_like(inner), where=area - inner > 0)

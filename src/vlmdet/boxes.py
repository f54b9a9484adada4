"""Boxes and the ways in which files write them.

When: ALWAYS; numpy only. A `Boxes` holds x1, y1, x2, y2 as fractions of the upright picture, and nothing else crosses a
module border. What a file or a model family writes is a `BoxFormat`, order and unit:

    xyxy   x1 y1 x2 y2           pixel      0 to width or height
    yxyx   y1 x1 y2 x2           fraction   0 to 1
    xywh   x1 y1 width height    per_mille  0 to 1000
    cxcywh centre x, centre y, width, height
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from vlmdet.errors import ConfigError, DataError, did_you_mean

Order = Literal["xyxy", "yxyx", "xywh", "cxcywh"]
Unit = Literal["pixel", "fraction", "per_mille"]


@dataclass(frozen=True)
class BoxFormat:
    """Order and unit of four numbers, written `yxyx/fraction`."""

    order: Order
    unit: Unit

    @classmethod
    def parse(cls, text: str) -> BoxFormat:
        """Read `"yxyx/fraction"`.

        Raises:
            ConfigError: order or unit is unknown.
        """
        order, _, unit = text.partition("/")
        if order not in get_args(Order):
            raise ConfigError(f"unknown box order '{order}' in '{text}'", did_you_mean(order, get_args(Order)))
        if unit not in get_args(Unit):
            raise ConfigError(f"unknown box unit '{unit}' in '{text}'", did_you_mean(unit, get_args(Unit)))
        return cls(order, unit)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.order}/{self.unit}"


FORMATS = tuple(BoxFormat(order, unit) for unit in get_args(Unit) for order in get_args(Order))
"""All twelve."""


def _scale(unit: Unit, width: int, height: int) -> np.ndarray:
    return {
        "pixel": np.array([width, height, width, height], dtype=np.float64),
        "fraction": np.ones(4),
        "per_mille": np.full(4, 1000.0),
    }[unit]


def corners(values: np.ndarray, order: Order) -> np.ndarray:
    """Turn numbers of any order into x1, y1, x2, y2, in the unit that they are in: (n, 4) to (n, 4) float64."""
    if order == "yxyx":
        return values[:, [1, 0, 3, 2]]
    if order == "xywh":
        return np.concatenate([values[:, :2], values[:, :2] + values[:, 2:]], axis=1)
    if order == "cxcywh":
        return np.concatenate([values[:, :2] - values[:, 2:] / 2, values[:, :2] + values[:, 2:] / 2], axis=1)
    return values


def many_to_fractions(values: np.ndarray, box_format: BoxFormat, sizes: np.ndarray) -> np.ndarray:
    """Read boxes of many pictures at once.

    When: by readers, whose sets have a million boxes; `Boxes.from_array` is for those of one picture.

    Input: `values` (n, 4) float64, finite; `sizes` (n, 2), width and height in pixels of the picture of each box, used
    with pixels only.
    Output: (n, 4) float64, x1, y1, x2, y2 as fractions.
    """
    read = corners(values, box_format.order)
    if box_format.unit == "pixel":
        return read / np.concatenate([sizes, sizes], axis=1)
    return read / (1000.0 if box_format.unit == "per_mille" else 1.0)


def overlap(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return intersection and union of pairs of boxes; a box whose side is not positive has area 0.

    Input: two (…, 4) float64, x1, y1, x2, y2 in one unit, of shapes that broadcast. Output: two (…) float64, in that unit
    squared; not finite where numbers are too large to multiply.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        low = np.maximum(first[..., :2], second[..., :2])
        high = np.minimum(first[..., 2:], second[..., 2:])
        both = (high - low).clip(min=0).prod(axis=-1)
        areas = [(boxes[..., 2:] - boxes[..., :2]).clip(min=0).prod(axis=-1) for boxes in (first, second)]
        return both, areas[0] + areas[1] - both


@dataclass(frozen=True, eq=False)
class Boxes:
    """Boxes of one picture.

    Attributes:
        xyxy: (n, 4) float64, x1, y1, x2, y2 as fractions of the upright picture; may lie outside 0..1 until clipped.
    """

    xyxy: np.ndarray

    @classmethod
    def from_array(cls, values: Any, box_format: BoxFormat, width: int, height: int) -> Boxes:
        """Read boxes as a file or a model wrote them; the only way in.

        Input: `values` (n, 4), numbers in `box_format`; `width` and `height` of the upright picture in pixels.
        Output: `Boxes` of n rows in the same order, neither clipped nor sorted.

        Raises:
            DataError: not n rows of four finite numbers, or a side of the picture is not positive.
        """
        if width <= 0 or height <= 0:
            raise DataError(f"the picture is {width} x {height} pixels", "both sides must be positive")
        try:
            array = np.asarray(values, dtype=np.float64).reshape(-1, 4) if len(values) else np.zeros((0, 4))
        except (TypeError, ValueError) as error:
            raise DataError(f"boxes must be rows of four numbers: {str(values)[:80]}") from error
        if not np.isfinite(array).all():
            raise DataError(f"boxes must be finite numbers: {str(values)[:80]}")
        return cls(corners(array, box_format.order) / _scale(box_format.unit, width, height))

    @classmethod
    def empty(cls) -> Boxes:
        """Return no boxes."""
        return cls(np.zeros((0, 4)))

    def to_array(self, box_format: BoxFormat, width: int, height: int) -> np.ndarray:
        """Write the boxes in a format: (n, 4) float64, not rounded."""
        array = self.xyxy * _scale(box_format.unit, width, height)
        if box_format.order == "yxyx":
            return array[:, [1, 0, 3, 2]]
        if box_format.order == "xywh":
            return np.concatenate([array[:, :2], array[:, 2:] - array[:, :2]], axis=1)
        if box_format.order == "cxcywh":
            return np.concatenate([(array[:, :2] + array[:, 2:]) / 2, array[:, 2:] - array[:, :2]], axis=1)
        return array

    def clip(self) -> Boxes:
        """Cut the boxes to the picture."""
        return Boxes(self.xyxy.clip(0.0, 1.0))

    def area(self) -> np.ndarray:
        """Return areas (n,) as fractions of the picture; 0 where a side is not positive."""
        return (self.xyxy[:, 2:] - self.xyxy[:, :2]).clip(min=0).prod(axis=1)

    def iou(self, other: Boxes) -> np.ndarray:
        """Return intersection over union with every other box: (n, m) float64; 0 where both are empty."""
        both, union = overlap(self.xyxy[:, None], other.xyxy[None])
        return np.divide(both, union, out=np.zeros_like(both), where=union > 0)

    def raster_order(self) -> np.ndarray:
        """Return row numbers (n,) from top to bottom, then left to right, by the upper left corner."""
        return np.lexsort((self.xyxy[:, 0], self.xyxy[:, 1]))

    def turned(self, orientation: int) -> Boxes:
        """Move boxes of a stored picture onto the same picture made upright.

        Input: `orientation`, the EXIF tag 274, 1 to 8 (EXIF 2.32, 4.6.4.A): what a viewer must undo.
        Output: boxes as fractions of the upright picture.
        """
        x1, y1, x2, y2 = self.xyxy.T
        turned = {
            1: (x1, y1, x2, y2),
            2: (1 - x2, y1, 1 - x1, y2),
            3: (1 - x2, 1 - y2, 1 - x1, 1 - y1),
            4: (x1, 1 - y2, x2, 1 - y1),
            5: (y1, x1, y2, x2),
            6: (1 - y2, x1, 1 - y1, x2),
            7: (1 - y2, 1 - x2, 1 - y1, 1 - x1),
            8: (y1, 1 - x2, y2, 1 - x1),
        }.get(orientation, (x1, y1, x2, y2))
        return Boxes(np.stack(turned, axis=1))

    def __len__(self) -> int:
        return len(self.xyxy)

    def __getitem__(self, rows: Any) -> Boxes:
        return Boxes(self.xyxy[rows].reshape(-1, 4))

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.xyxy)

    def tolist(self) -> list[list[float]]:
        """Return [[x1, y1, x2, y2], …] as plain floats, for JSON and Arrow."""
        return [[float(value) for value in row] for row in self.xyxy]


FRACTIONS = BoxFormat("xyxy", "fraction")
"""How boxes are stored in our own files."""

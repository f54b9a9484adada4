"""Rows of predictions with their boxes end to end, so that all pictures are counted at once.

When: AFTER generation; numpy only. Ahead of it runs `files.read_predictions`; `match.py` pairs the boxes of a `Table`,
everything else counts the pairs. Rows stand by rising id here, so that a seed of the bootstrap draws the same pictures
whatever the order of the file:

    rows        "a" (2 true, 1 predicted)   "b" (0 true, 2 predicted)
    truth       image 0 0                   label 1 0      into `names`
    predicted   image 0 1 1                 label 1 -1 0   -1: the text named none
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmdet.errors import ConfigError, DataError

Row = Mapping[str, Any]
"""A row of `predictions.jsonl`."""


@dataclass(frozen=True, eq=False)
class Side:
    """Boxes of many pictures, true or predicted, end to end.

    Attributes:
        image: (k,) int64, number of the picture, never falling.
        label: (k,) int64, number of the label; -1 for none, which equals no class.
        xyxy: (k, 4) float64, x1, y1, x2, y2 as fractions of the picture.
    """

    image: np.ndarray
    label: np.ndarray
    xyxy: np.ndarray

    def __len__(self) -> int:
        return len(self.image)


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of a run, laid out.

    Attributes:
        rows: n rows by rising id. One with status `error` has no boxes here: an exception is not a bad box.
        scored: (n,) bool, False for those.
        names: labels by number: first those asked for, then others of the truth, then others predicted.
        asked: how many were asked for.
        classes: how many are classes: asked for, or in the truth.
        truth: true boxes, in the order of each row.
        ignored: (truth,) bool, regions that neither count nor cost anything.
        predicted: predicted boxes, in the order of each row.
        scores: (predicted,) float64, or None where any box has no finite score.
        wide, high: (n,) float64, size of each picture in pixels.
    """

    rows: tuple[Row, ...]
    scored: np.ndarray
    names: tuple[str, ...]
    asked: int
    classes: int
    truth: Side
    ignored: np.ndarray
    predicted: Side
    scores: np.ndarray | None
    wide: np.ndarray
    high: np.ndarray


def sort_rows(rows: Sequence[Row]) -> list[Row]:
    """Sort rows by id: a seed then draws the same images whatever the order of the file.

    Raises:
        DataError: two rows have one id.
    """
    ordered = sorted(rows, key=lambda row: str(row["id"]))
    for one, other in itertools.pairwise(ordered):
        if one["id"] == other["id"]:
            raise DataError(f"two predictions have the id '{one['id']}'", "leave one of them out")
    return ordered


def resolve_labels(labels: Sequence[str | None], labels_asked: Sequence[str]) -> list[str | None]:
    """Put the one label that was asked for where a box came without any.

    A predicted label may be None: the text gave a box and no name. None never equals a class, unless the run asked
    for exactly one: then it can only mean that one, and counts as it.

    Input: `["cup", None]` and `["cup"]`. Output: `["cup", "cup"]`; with two labels asked, `["cup", None]`.
    """
    only = labels_asked[0] if len(labels_asked) == 1 else None
    return [only if label is None else label for label in labels]


def lay_out(rows: Sequence[Row], *, labels_asked: Sequence[str]) -> Table:
    """Lay the boxes of all rows end to end.

    When: once per scoring.

    Raises:
        ConfigError: `labels_asked` is empty.
        DataError: two rows have one id; or the boxes of a row are not four finite numbers each, or differ in number from
            labels or flags.
    """
    if isinstance(labels_asked, str) or not labels_asked:
        raise ConfigError("no labels to score", "give the list of classes that the model was asked for")
    ordered = sort_rows(rows)
    scored = np.asarray([row["status"] != "error" for row in ordered], dtype=bool)
    true_rows = [row["truth"] if good else _NO_TRUTH for row, good in zip(ordered, scored, strict=True)]
    predicted_rows = [row if good else _NO_BOXES for row, good in zip(ordered, scored, strict=True)]
    for row, true, predicted in zip(ordered, true_rows, predicted_rows, strict=True):
        if not len(true["boxes"]) == len(true["labels"]) == len(true["ignore"]):
            raise DataError(f"'{row['id']}': true boxes, labels and flags differ in number", "mend the row")
        if len(predicted["boxes"]) != len(predicted["labels"]):
            raise DataError(f"'{row['id']}': predicted boxes and labels differ in number", "mend the row")

    true_labels = [label for row in true_rows for label in row["labels"]]
    predicted_labels = resolve_labels([label for row in predicted_rows for label in row["labels"]], labels_asked)
    codes: dict[str | None, int] = {name: number for number, name in enumerate(dict.fromkeys(labels_asked))}
    asked = len(codes)
    codes |= {name: asked + i for i, name in enumerate(sorted(set(true_labels) - codes.keys()))}
    classes = len(codes)
    others = {label for label in predicted_labels if label is not None} - codes.keys()
    codes |= {name: classes + i for i, name in enumerate(sorted(others))}
    names = tuple(str(name) for name in codes)
    codes[None] = -1

    def side(of: Sequence[Row], labels: Iterable[str | None]) -> Side:
        counts = [len(row["boxes"]) for row in of]
        return Side(
            np.repeat(np.arange(len(of)), counts),
            np.asarray([codes[label] for label in labels], dtype=np.int64),
            _read_boxes(of, ordered, sum(counts)),
        )

    return Table(
        rows=tuple(ordered),
        scored=scored,
        names=names,
        asked=asked,
        classes=classes,
        truth=side(true_rows, true_labels),
        ignored=np.asarray([bool(flag) for row in true_rows for flag in row["ignore"]], dtype=bool),
        predicted=side(predicted_rows, predicted_labels),
        scores=_read_scores(predicted_rows),
        wide=np.asarray([row["width"] for row in ordered], dtype=np.float64),
        high=np.asarray([row["height"] for row in ordered], dtype=np.float64),
    )


_NO_BOXES: Row = {"boxes": [], "labels": [], "scores": []}
_NO_TRUTH: Row = {"boxes": [], "labels": [], "ignore": []}


def _read_boxes(of: Sequence[Row], rows: Sequence[Row], count: int) -> np.ndarray:
    """Return all boxes (count, 4), or name the first row whose boxes are none."""
    try:
        boxes = np.asarray([box for row in of for box in row["boxes"]], dtype=np.float64).reshape(count, 4)
        if np.isfinite(boxes).all():
            return boxes
    except (TypeError, ValueError, OverflowError):
        pass
    for row, held in zip(rows, of, strict=True):
        for box in held["boxes"]:
            if not (len(box) == 4 and all(isinstance(x, int | float) and math.isfinite(x) for x in box)):
                raise DataError(f"'{row['id']}': a box must be four finite numbers: {str(box)[:80]}", "mend the row")
    raise AssertionError("boxes that are well one by one are well together")


def _read_scores(rows: Sequence[Row]) -> np.ndarray | None:
    """Return a score for each predicted box, None where one has none."""
    scores: list[float] = []
    for row in rows:
        given = row.get("scores")
        if given is None and row["boxes"]:
            return None
        scores.extend(given or [])
    real = all(isinstance(s, int | float) and not isinstance(s, bool) and math.isfinite(s) for s in scores)
    return np.asarray(scores, dtype=np.float64) if real and scores else None

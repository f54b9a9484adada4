"""Which predicted box found which true box, one image at a time.

When: AFTER generation; numpy only. Scores play no part: a text that lists boxes gives none. Ahead of this runs a
codec's `parse`, after it `metrics.py`, which adds up what is counted here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlmdet.boxes import Boxes

IOU_DECIMALS = 9
"""IoU is rounded to this, so that noise of the last bit neither breaks a tie nor misses a threshold met exactly."""


def resolve_labels(labels: Sequence[str | None], labels_asked: Sequence[str]) -> list[str | None]:
    """Put the one label that was asked for where a box came without any.

    A predicted label may be None: the text gave a box and no name. None never equals a class, unless the run asked
    for exactly one: then it can only mean that one, and counts as it.

    Input: `["cup", None]` and `["cup"]`. Output: `["cup", "cup"]`; with two labels asked, `["cup", None]`.
    """
    only = labels_asked[0] if len(labels_asked) == 1 else None
    return [only if label is None else label for label in labels]


@dataclass(frozen=True, eq=False)
class Matching:
    """One-to-one pairs of one image, at every threshold at once.

    Pairs were taken in order of falling IoU, so those that stand at a threshold are exactly the ones that matching
    at this threshold would have taken.

    Attributes:
        pairs: (k, 2) int64, row of the true box and row of the predicted one, by falling IoU, all above 0.
        iou: (k,) float64, of each pair.
        best_iou: (n,) float64, per true box the highest IoU with a prediction of its label; 0 where there is none.
            One prediction may serve several. NaN for an ignored box.
        predicted_iou: (m,) float64, IoU of the pair that a predicted box is in; 0 without one.
        ignored_iou: (m,) float64, the highest IoU of a predicted box with an ignored one of its label.
    """

    pairs: np.ndarray
    iou: np.ndarray
    best_iou: np.ndarray
    predicted_iou: np.ndarray
    ignored_iou: np.ndarray

    def count(self, thresholds: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Count true positives, false positives and false negatives.

        Input: t thresholds above 0; a pair with IoU equal to the threshold stands.
        Output: three (t,) int64 arrays. tp + fn is the number of true boxes that are not ignored; a prediction
        without a pair that lies on an ignored box with IoU at the threshold or above is neither tp nor fp.
        """
        level = np.asarray(thresholds, dtype=np.float64)[:, None]
        tp = (self.iou >= level).sum(axis=1)
        fp = ((self.predicted_iou < level) & (self.ignored_iou < level)).sum(axis=1)
        return tp, fp, (~np.isnan(self.best_iou)).sum() - tp


def match_boxes(
    truth: Boxes,
    truth_labels: Sequence[str],
    predicted: Boxes,
    predicted_labels: Sequence[str | None],
    *,
    labels_asked: Sequence[str],
    ignore: Sequence[bool] | None = None,
) -> Matching:
    """Pair true and predicted boxes of equal label one to one, the highest IoU first.

    When: once per image and scoring.

    Input: n true boxes and labels; m predicted ones, a label may be None (see `resolve_labels`); `labels_asked`, the
    classes of the run; `ignore`, n flags: such a box is never a hit or a miss, and takes predictions off the count.
    Output: `Matching`, rows as in the input. Equal IoUs are settled by the boxes' coordinates, so the order of the
    input changes nothing.

    Raises:
        ValueError: boxes, labels and flags differ in number.
    """
    names = resolve_labels(predicted_labels, labels_asked)
    ignored = np.zeros(len(truth), dtype=bool) if ignore is None else np.asarray(ignore, dtype=bool).reshape(-1)
    if not len(truth) == len(truth_labels) == len(ignored) or len(predicted) != len(names):
        raise ValueError(
            f"{len(truth)} true boxes, {len(truth_labels)} labels, {len(ignored)} flags; "
            f"{len(predicted)} predicted boxes, {len(names)} labels"
        )
    same = np.asarray([[true == name for name in names] for true in truth_labels], dtype=bool)
    iou = np.where(same.reshape(len(truth), len(names)), truth.iou(predicted).round(IOU_DECIMALS), 0.0)
    real = np.where(ignored[:, None], 0.0, iou)

    rows, columns = np.nonzero(real)
    order = np.lexsort((_ranks(predicted)[columns], _ranks(truth)[rows], -real[rows, columns]))
    pairs: list[tuple[int, int]] = []
    taken_rows: set[int] = set()
    taken_columns: set[int] = set()
    for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if row not in taken_rows and column not in taken_columns:
            taken_rows.add(row)
            taken_columns.add(column)
            pairs.append((row, column))

    matched = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
    matched_iou = real[matched[:, 0], matched[:, 1]]
    predicted_iou = np.zeros(len(names))
    predicted_iou[matched[:, 1]] = matched_iou
    return Matching(
        pairs=matched,
        iou=matched_iou,
        best_iou=np.where(ignored, np.nan, iou.max(axis=1, initial=0.0)),
        predicted_iou=predicted_iou,
        ignored_iou=np.where(ignored[:, None], iou, 0.0).max(axis=0, initial=0.0),
    )


def count_duplicates(boxes: Boxes, labels: Sequence[str | None], *, above: float = 0.9) -> int:
    """Count the boxes that repeat another one of the same label.

    Boxes with an IoU over `above` hang together, also by way of a third; each such group counts all its boxes but
    one. Counting by groups makes the figure independent of the order of the boxes. Two boxes without a label share
    one.

    Input: m boxes and labels. Output: 0 to m - 1.
    """
    same = np.asarray([[one == other for other in labels] for one in labels], dtype=bool).reshape(
        len(boxes), len(boxes)
    )
    near = (same & (boxes.iou(boxes).round(IOU_DECIMALS) > above)) | np.eye(len(boxes), dtype=bool)
    group = np.arange(len(boxes))
    while True:  # each box takes the lowest number among its neighbours, until nothing moves: at most m rounds
        lowest = np.where(near, group[None, :], len(boxes)).min(axis=1, initial=len(boxes))
        if (lowest == group).all():
            return len(boxes) - len(np.unique(group))
        group = lowest


def _ranks(boxes: Boxes) -> np.ndarray:
    """Return each box's place (n,) in the order of coordinates; equal boxes are interchangeable, so theirs is free."""
    ranks = np.empty(len(boxes), dtype=np.int64)
    ranks[np.lexsort(boxes.xyxy.T[::-1])] = np.arange(len(boxes))
    return ranks

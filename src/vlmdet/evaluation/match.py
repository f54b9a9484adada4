"""Which predicted box found which true box, in one picture or in all of a run at once.

When: AFTER generation; numpy only. Scores play no part: a text that lists boxes gives none. Ahead of this runs
`table.py`, or a codec's `parse`; after it everything that counts.

Boxes of equal label are paired one to one, the highest IoU first. Pairs that stand at a threshold are then exactly those
that matching at this threshold would have taken, so one pass serves them all. Equal IoUs are settled by the coordinates
of the true box, then of the predicted one: the order of a file changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vlmdet.boxes import Boxes, overlap
from vlmdet.evaluation.table import Side, resolve_labels

IOU_DECIMALS = 9
"""IoU is rounded to this, so that noise of the last bit neither breaks a tie nor misses a threshold met exactly."""

DUPLICATE_IOU = 0.9
"""Two predictions of one label that overlap by more than this say the same thing twice."""

_PAIRS_AT_ONCE = 1_000_000


@dataclass(frozen=True, eq=False)
class Matching:
    """One-to-one pairs at every threshold at once; n true boxes, m predicted ones.

    Attributes:
        pairs: (k, 2) int64, row of the true box and row of the predicted one, by falling IoU, all above 0.
        iou: (k,) float64, of each pair.
        best_iou: (n,) float64, per true box the highest IoU with a prediction of its label; 0 where there is none.
            One prediction may serve several. NaN for an ignored box.
        truth_iou: (n,) float64, IoU of the pair that a true box is in; 0 without one.
        predicted_iou: (m,) float64, IoU of the pair that a predicted box is in; 0 without one.
        ignored_share: (m,) float64, the largest share of a predicted box that lies on an ignored one of its label.
        ignored_by: (m,) int64, row of that ignored box; -1 where there is none.
        overlaps: rows of true boxes that are not ignored and of predicted ones, and the IoU, of all pairs of any labels
            that overlap: (o,) int64, (o,) int64, (o,) float64.
    """

    pairs: np.ndarray
    iou: np.ndarray
    best_iou: np.ndarray
    truth_iou: np.ndarray
    predicted_iou: np.ndarray
    ignored_share: np.ndarray
    ignored_by: np.ndarray
    overlaps: tuple[np.ndarray, np.ndarray, np.ndarray]

    def count(self, thresholds: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Count true positives, false positives and false negatives.

        Input: t thresholds above 0; a pair with IoU equal to the threshold stands.
        Output: three (t,) int64 arrays. tp + fn is the number of true boxes that are not ignored; a prediction
        without a pair is neither tp nor fp where the share of it that lies on an ignored box is at the threshold or above.
        """
        level = np.asarray(thresholds, dtype=np.float64)[:, None]
        tp = (self.iou >= level).sum(axis=1)
        fp = (self.excuse < level).sum(axis=1)
        return tp, fp, (~np.isnan(self.best_iou)).sum() - tp

    @property
    def excuse(self) -> np.ndarray:
        """(m,) float64: up to this threshold a predicted box is no false positive, but a hit or ignored."""
        return np.maximum(self.predicted_iou, self.ignored_share)


def match_sides(truth: Side, predicted: Side, *, ignored: np.ndarray) -> Matching:
    """Pair the boxes of many pictures.

    When: once per scoring.

    Input: n true and m predicted boxes; `ignored` (n,) bool. An ignored box is never a hit or a miss, and takes
    predictions off the count by COCO's rule for crowds: by the share of the prediction that lies on it, any number of
    them. Source: pycocotools, `maskApi.c`, `bbIou`, `iscrowd`.
    Output: `Matching`, rows as in the input.
    """
    rows, columns, iou, share = _overlaps(truth, predicted)
    same = truth.label[rows] == predicted.label[columns]
    real = ~ignored[rows]

    best_iou = np.where(ignored, np.nan, 0.0)
    np.maximum.at(best_iou, rows[same & real], iou[same & real])
    pairs = take_pairs(rows, columns, iou, same & real & (iou > 0), truth=truth, predicted=predicted)
    truth_iou, predicted_iou = np.zeros(len(truth)), np.zeros(len(predicted))
    truth_iou[rows[pairs]] = iou[pairs]
    predicted_iou[columns[pairs]] = iou[pairs]

    ignored_share, ignored_by = np.zeros(len(predicted)), np.full(len(predicted), -1)
    on = np.flatnonzero(same & ~real)
    on = on[np.lexsort((rank_boxes(truth)[rows[on]], -share[on], columns[on]))]
    covered, first = np.unique(columns[on], return_index=True)
    ignored_share[covered] = share[on[first]]
    ignored_by[covered] = rows[on[first]]
    return Matching(
        pairs=np.stack([rows[pairs], columns[pairs]], axis=1),
        iou=iou[pairs],
        best_iou=best_iou,
        truth_iou=truth_iou,
        predicted_iou=predicted_iou,
        ignored_share=ignored_share,
        ignored_by=ignored_by,
        overlaps=(rows[real], columns[real], iou[real]),
    )


def match_boxes(
    truth: Boxes,
    truth_labels: Sequence[str],
    predicted: Boxes,
    predicted_labels: Sequence[str | None],
    *,
    labels_asked: Sequence[str],
    ignore: Sequence[bool] | None = None,
) -> Matching:
    """Pair true and predicted boxes of one picture.

    When: per picture, where a whole run is not at hand.

    Input: n true boxes and labels; m predicted ones, a label may be None (see `resolve_labels`); `labels_asked`, the
    classes of the run; `ignore`, n flags (see `match_sides`).
    Output: `Matching`, rows as in the input.

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
    codes: dict[str | None, int] = {None: -1}
    for label in (*truth_labels, *names):
        codes.setdefault(label, len(codes))
    return match_sides(
        _one_picture(truth, [codes[label] for label in truth_labels]),
        _one_picture(predicted, [codes[label] for label in names]),
        ignored=ignored,
    )


def take_pairs(
    rows: np.ndarray, columns: np.ndarray, iou: np.ndarray, allowed: np.ndarray, *, truth: Side, predicted: Side
) -> np.ndarray:
    """Choose pairs one to one: the highest IoU first, equal ones by coordinates.

    Input: (k,) rows of true boxes, rows of predicted ones, their IoU, and which of these pairs may be taken.
    Output: (p,) int64, places of the chosen pairs in the input, by falling IoU.
    """
    order = order_pairs(rows, columns, iou, allowed, truth=truth, predicted=predicted)
    return order[choose_pairs(rows[order], columns[order])]


def order_pairs(
    rows: np.ndarray, columns: np.ndarray, iou: np.ndarray, allowed: np.ndarray, *, truth: Side, predicted: Side
) -> np.ndarray:
    """Return the places of the allowed pairs by falling IoU, equal ones by the coordinates and labels of their boxes."""
    may = np.flatnonzero(allowed)
    keys = rank_boxes(predicted)[columns[may]], rank_boxes(truth)[rows[may]], -iou[may]
    return may[np.lexsort(keys)]


def choose_pairs(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Take each pair, in the order given, whose two boxes are both free still; returns their places, rising."""
    alone = (np.bincount(rows)[rows] == 1) & (np.bincount(columns)[columns] == 1)  # most: nobody else wants either box
    contested = np.flatnonzero(~alone)
    taken = alone.copy()
    taken_rows: set[int] = set()
    taken_columns: set[int] = set()
    for place, row, column in zip(
        contested.tolist(), rows[contested].tolist(), columns[contested].tolist(), strict=True
    ):
        if row not in taken_rows and column not in taken_columns:
            taken_rows.add(row)
            taken_columns.add(column)
            taken[place] = True
    return np.flatnonzero(taken)


def count_duplicates(boxes: Boxes, labels: Sequence[str | None]) -> int:
    """Count the boxes of one picture that repeat another one of the same label; see `duplicates_by_image`."""
    codes = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    return int(duplicates_by_image(_one_picture(boxes, [codes[label] for label in labels]), 1)[0])


def duplicates_by_image(predicted: Side, images: int) -> np.ndarray:
    """Count the predicted boxes of each picture that repeat another one of the same label.

    Boxes with an IoU over `DUPLICATE_IOU` hang together, also by way of a third; each such group counts all its boxes but
    one. Counting by groups makes the figure independent of the order of the boxes. Two boxes without a label share one.

    Input: m boxes of `images` pictures. Output: (images,) int64.
    """
    solid = (predicted.xyxy[:, 2:] > predicted.xyxy[:, :2]).all(axis=1)  # an empty box has IoU 0, also with itself
    named = np.column_stack([predicted.image, predicted.label, predicted.xyxy])[solid]
    different = np.unique(named, axis=0)  # a thousand times the same box is one, a thousand times
    picture, label, xyxy = different[:, 0].astype(np.int64), different[:, 1].astype(np.int64), different[:, 2:]
    _, of_label = np.unique(different[:, :2], axis=0, return_inverse=True)
    group = np.arange(len(different))
    alike = Side(of_label.reshape(-1), label, xyxy)
    one, other, _, _ = _overlaps(alike, alike, above=DUPLICATE_IOU)
    while True:  # each box takes the lowest number among its neighbours, until nothing moves
        lowest = group.copy()
        np.minimum.at(lowest, one, group[other])
        lowest = lowest[lowest]
        if (lowest == group).all():
            break
        group = lowest
    heads = picture[group == np.arange(len(group))]
    return np.bincount(named[:, 0].astype(np.int64), minlength=images) - np.bincount(heads, minlength=images)


def _one_picture(boxes: Boxes, labels: list[int]) -> Side:
    return Side(np.zeros(len(boxes), dtype=np.int64), np.asarray(labels, dtype=np.int64), boxes.xyxy)


def _overlaps(left: Side, right: Side, *, above: float = -1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Find the pairs of one picture that overlap, with an IoU over `above`.

    Output: rows left and right, IoU, and the share of the right one, each (k,). A pair whose IoU rounds to 0 is one, too.
    """
    found = [_overlap_block(left, right, rows, columns, above) for rows, columns in _blocks(left, right)]
    if not found:
        none = np.zeros(0, dtype=np.int64)
        return none, none, np.zeros(0), np.zeros(0)
    rows, columns, iou, share = (np.concatenate(part) for part in zip(*found, strict=True))
    return rows, columns, iou, share


def _overlap_block(
    left: Side, right: Side, rows: np.ndarray, columns: np.ndarray, above: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    both, union = overlap(left.xyxy[rows], right.xyxy[columns])
    touch = (both > 0) & (union > 0)
    rows, columns, both, union = rows[touch], columns[touch], both[touch], union[touch]
    with np.errstate(over="ignore", invalid="ignore"):
        area = (right.xyxy[columns, 2:] - right.xyxy[columns, :2]).prod(axis=1)
        iou = np.nan_to_num(both / union).round(IOU_DECIMALS)
        share = np.nan_to_num(both / area).round(IOU_DECIMALS)
    kept = iou > above
    return rows[kept], columns[kept], iou[kept], share[kept]


def _blocks(left: Side, right: Side) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Name all pairs of one picture, some at a time: two arrays of rows of equal length."""
    first = np.searchsorted(right.image, left.image, side="left")
    count = np.searchsorted(right.image, left.image, side="right") - first
    ends = np.cumsum(count)
    start = 0
    while start < len(left):
        before = int(ends[start] - count[start])
        stop = max(start + 1, int(np.searchsorted(ends, before + _PAIRS_AT_ONCE, side="right")))
        here = slice(start, stop)
        rows = np.repeat(np.arange(start, stop), count[here])
        columns = np.arange(len(rows)) + np.repeat(first[here] - (ends[here] - count[here] - before), count[here])
        yield rows, columns
        start = stop


def rank_boxes(side: Side) -> np.ndarray:
    """Return each box's place (k,) in the order of coordinates, then labels; boxes equal in both are interchangeable."""
    ranks = np.empty(len(side), dtype=np.int64)
    ranks[np.lexsort((side.label, *side.xyxy.T[::-1]))] = np.arange(len(side))
    return ranks

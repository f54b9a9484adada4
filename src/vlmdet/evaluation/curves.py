"""Distributions over boxes: IoU and errors of place of the pairs, and precision and recall against the score.

When: AFTER matching; numpy only. They show what one figure hides: a shift that all boxes share, or a threshold that would
pay.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vlmdet.evaluation.match import Matching, choose_pairs, order_pairs
from vlmdet.evaluation.metrics import BILLION, FORMULAS, add_up, make_figure
from vlmdet.evaluation.mistakes import FOUND_IOU, NEAR_IOU
from vlmdet.evaluation.table import Table

IOU_BINS = 20
OFFSET_BINS = 40
OFFSET_LIMIT = 1.0
CURVE_POINTS = 101


def iou_histogram(matching: Matching) -> dict[str, Any]:
    """Count the one-to-one pairs by IoU, also those below every threshold.

    Output: `{"edges": [0.0, 0.05, …, 1.0], "counts": […]}`; a pair on an edge belongs to the bin above it, 1 to the last.
    """
    step = round(BILLION) // IOU_BINS
    bins = ((matching.iou * BILLION).round().astype(np.int64) // step).clip(max=IOU_BINS - 1)
    edges = (np.arange(IOU_BINS + 1) / IOU_BINS).tolist()
    return {"edges": edges, "counts": np.bincount(bins, minlength=IOU_BINS).tolist()}


def offsets(table: Table, matching: Matching) -> dict[str, Any]:
    """Tell by how much predicted boxes are off: centre x and y, width and height, predicted minus true.

    A model that reads coordinates in another space shows here: all its boxes are off by the same share.

    Output: `{"x": {"edges": [-1.0, …, 1.0], "counts": […], "median": 0.01}, "y": …, "w": …, "h": …}` in fractions of the true
    box's side, over pairs with IoU of .1 or more; what lies beyond an end is in the last bin. The median is None of none.
    """
    near = matching.iou >= NEAR_IOU
    true = table.truth.xyxy[matching.pairs[near, 0]]
    predicted = table.predicted.xyxy[matching.pairs[near, 1]]
    side = true[:, 2:] - true[:, :2]
    moved = ((predicted[:, :2] + predicted[:, 2:]) - (true[:, :2] + true[:, 2:])) / 2 / side
    grown = (predicted[:, 2:] - predicted[:, :2]) / side - 1
    edges = np.linspace(-OFFSET_LIMIT, OFFSET_LIMIT, OFFSET_BINS + 1).round(9)
    found = {}
    for name, values in zip("xywh", np.column_stack([moved, grown]).T.round(9), strict=True):
        counts, _ = np.histogram(values.clip(-OFFSET_LIMIT, OFFSET_LIMIT), edges)
        median = float(np.median(values)) if len(values) else None
        found[name] = {"edges": edges.tolist(), "counts": counts.tolist(), "median": median}
    return found


def score_curve(
    table: Table, matching: Matching, drawn: np.ndarray, *, threshold: float | None = None
) -> dict[str, Any] | None:
    """Return precision, recall and F1 at IoU .5 where predictions below a score are left out.

    What is left is matched again at every score, so each point is what scoring such a run would give.

    Input: `threshold`, a score that was chosen on another split; without it the best of the curve is taken, and said to be
    chosen on this split, which flatters it.
    Output: `{"score": […], "precision": […], "recall": […], "f1": […], "best": {"score", "chosen_on": "this split"|"given",
    "precision": {"value", "low", "high", "n"}, "recall", "f1"}}` by rising score, at most 101 scores; None where the boxes
    have no scores, or all the same.
    """
    scores = table.scores
    if scores is None or len(np.unique(scores)) < 2:
        return None
    steps = np.unique(scores)
    if len(steps) > CURVE_POINTS:
        steps = np.unique(np.quantile(scores, np.linspace(0, 1, CURVE_POINTS), method="nearest"))
    candidates = _candidates(table, matching)
    counts = [_count_above(table, matching, candidates, score) for score in steps.tolist()]
    sums = {name: np.asarray([count[name].sum(axis=0) for count in counts]) for name in counts[0]}
    curve = {name: _plain(FORMULAS[f"{name}_50"](sums)) for name in ("precision", "recall", "f1")}
    if threshold is None:
        best = int(np.argmax([value or 0.0 for value in curve["f1"]]))
        threshold, chosen_on, count = float(steps[best]), "this split", counts[best]
    else:
        chosen_on, count = "given", _count_above(table, matching, candidates, threshold)
    added = add_up(count, drawn)
    figures = {name: make_figure(f"{name}_50", added, n=len(drawn)) for name in curve}
    return {"score": steps.tolist(), **curve, "best": {"score": threshold, "chosen_on": chosen_on, **figures}}


def _candidates(table: Table, matching: Matching) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs that may be hits at IoU .5, in the order in which they are taken: rows true and predicted."""
    rows, columns, iou = matching.overlaps
    may = (table.truth.label[rows] == table.predicted.label[columns]) & (iou >= FOUND_IOU)
    order = order_pairs(rows, columns, iou, may, truth=table.truth, predicted=table.predicted)
    return rows[order], columns[order]


def _count_above(
    table: Table, matching: Matching, candidates: tuple[np.ndarray, np.ndarray], score: float
) -> dict[str, np.ndarray]:
    """Count at IoU .5, image by image, what predictions of a score or above find: (n, 1) for tp, fp, fn; (n,) truth."""
    n = len(table.rows)
    assert table.scores is not None
    kept = table.scores >= score
    rows, columns = (side[kept[candidates[1]]] for side in candidates)
    chosen = choose_pairs(rows, columns)
    false = kept & (matching.ignored_share < FOUND_IOU)
    false[columns[chosen]] = False
    tp = np.bincount(table.truth.image[rows[chosen]], minlength=n).astype(np.float64)
    fp = np.bincount(table.predicted.image[false], minlength=n).astype(np.float64)
    truth = np.bincount(table.truth.image[~table.ignored], minlength=n).astype(np.float64)
    return {"tp": tp[:, None], "fp": fp[:, None], "fn": (truth - tp)[:, None], "truth": truth}


def _plain(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]

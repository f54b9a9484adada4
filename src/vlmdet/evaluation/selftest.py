"""Is the metric itself in order? Asked of the run's own first rows, before any figure is believed.

When: AFTER generation, at the start of every evaluation; numpy only, some milliseconds. Boxes whose score is known beforehand
are put in place of the predictions. What is expected comes from a formula per box, worked out here and not by the code that
is tested:

    perfect       the truth itself                     1 throughout
    empty         nothing                              recall and F1 0, precision undefined
    swapped axes  y1 x1 y2 x2                          w x h and h x w share s^2, s = min(x2, y2) - max(x1, y1) if above 0
    shifted       by d widths to the right             (1 - d) / (1 + d)
    threshold     shifted by a third: IoU 1/2          a hit, because equal counts
    twice         every box said two times             precision 1/2, recall 1
    other label   right boxes, a label never asked for 0 throughout, every box off-list
    shuffled      the run's own rows, in another order the same figures
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from vlmdet.errors import VlmdetError
from vlmdet.evaluation import metrics
from vlmdet.evaluation.table import Row

FIRST_ROWS = 32
FIRST_BOXES = 64
TOLERANCE = 1e-6
SHIFTS = (0.2, 0.5)
"""Shares of the width: IoU 2/3 and 1/3, neither of them a threshold."""

LEAST_SIDE = 1e-5
"""Boxes with a shorter side, as a fraction of the picture, have no place in the test: their IoU is noise, or undefined."""


class Check(TypedDict):
    """One comparison that held."""

    case: str
    figure: str
    expected: float | None
    found: float | None


def self_test(rows: Sequence[Row], *, labels_asked: Sequence[str]) -> list[Check]:
    """Score predictions whose figures are known, made of the first rows, and compare.

    When: once at the start of an evaluation.

    Input: `rows` of `predictions.jsonl`; the first 32 are used, and of their true boxes the first 64. A run without true boxes
    is tested with one that is made up.
    Output: what was compared, e.g. `[{"case": "shifted by 0.5 widths", "figure": "f1_50", "expected": 0.0, "found":
    0.0}, …]`.

    Raises:
        VlmdetError: a figure is not what it must be; names the case, what was expected and what was found.
        ConfigError, DataError: the rows cannot be scored at all.
    """
    rows = rows[:FIRST_ROWS]
    truth = [
        (box, label)
        for row in rows
        for box, label, ignored in zip(*(row["truth"][name] for name in ("boxes", "labels", "ignore")), strict=True)
        if not ignored and min(box[2] - box[0], box[3] - box[1]) > LEAST_SIDE
    ][:FIRST_BOXES] or [([0.1, 0.2, 0.5, 0.4], labels_asked[0])]
    boxes, labels = [box for box, _ in truth], [label for _, label in truth]
    checks: list[Check] = []

    def check(case: str, given: Sequence[Row], expected: Mapping[str, float | None]) -> None:
        found = metrics.score_rows(given, labels_asked=labels_asked, resamples=0)
        for figure, value in expected.items():
            got = found[figure]["value"]
            checks.append({"case": case, "figure": figure, "expected": value, "found": got})
            if (got is None) != (value is None) or (got is not None and abs(got - (value or 0.0)) > TOLERANCE):
                raise VlmdetError(
                    f"self-test of the metrics: {case}: {figure} must be {_show(value)}, and is {_show(got)}",
                    "no figure of this evaluation can be trusted: install vlmdet anew, and report it if that does not help",
                )

    exact = {
        "f1_50": 1.0,
        "f1": 1.0,
        "precision_50": 1.0,
        "recall_50": 1.0,
        "mean_best_iou": 1.0,
        "mean_matched_iou": 1.0,
    }
    check("perfect", _rows(boxes, labels, [[box] for box in boxes]), exact | {"count_error": 0.0})
    whole = [row for row in rows if row["status"] != "error"]
    check("perfect, whole rows", *_whole(whole, exact))
    nothing = {"f1_50": 0.0, "f1": 0.0, "precision_50": None, "recall_50": 0.0, "mean_best_iou": 0.0}
    check("empty", _rows(boxes, labels, [[] for _ in boxes]), nothing)

    swapped = [[box[1], box[0], box[3], box[2]] for box in boxes]
    check("swapped axes", *_analytic(boxes, labels, swapped, [_swapped_iou(box) for box in boxes]))
    for d in SHIFTS:
        moved = [_shift(box, d) for box in boxes]
        check(f"shifted by {d} widths", *_analytic(boxes, labels, moved, [(1 - d) / (1 + d)] * len(boxes)))
    third = _rows(boxes, labels, [[_shift(box, 1 / 3)] for box in boxes])
    check("on the threshold", third, {"mean_best_iou": 0.5, "f1_50": 1.0, "f1": 0.1})
    twice = {"precision_50": 0.5, "recall_50": 1.0, "f1_50": 2 / 3, "duplicate_rate": 0.5, "mean_best_iou": 1.0}
    check("twice", _rows(boxes, labels, [[box, box] for box in boxes]), twice | {"count_error": 1.0})

    unheard = "no such label"
    while unheard in labels or unheard in labels_asked:
        unheard += "!"
    wrong = _rows(boxes, labels, [[box] for box in boxes], said=[unheard] * len(boxes))
    check("other label", wrong, {"f1_50": 0.0, "recall_50": 0.0, "mean_best_iou": 0.0, "off_list_rate": 1.0})

    before = metrics.score_rows(rows, labels_asked=labels_asked, resamples=0)
    check("shuffled", _shuffled(rows), {name: figure["value"] for name, figure in before.items()})
    return checks


def _rows(
    truth: Sequence[Sequence[float]],
    labels: Sequence[str],
    predicted: Sequence[Sequence[Sequence[float]]],
    *,
    said: Sequence[str] | None = None,
) -> list[Row]:
    """Make rows of one true box each."""
    return [
        {
            "id": f"{number:06}",
            "width": 1000,
            "height": 1000,
            "truth": {"boxes": [box], "labels": [label], "ignore": [False]},
            "boxes": answer,
            "labels": [name] * len(answer),
            "status": "ok" if answer else "none",
            "truncated": False,
        }
        for number, (box, label, answer, name) in enumerate(zip(truth, labels, predicted, said or labels, strict=True))
    ]


def _whole(rows: Sequence[Row], exact: dict[str, float]) -> tuple[list[Row], dict[str, float | None]]:
    """Answer each row, as it is, by its truth; ignored and degenerate boxes are left out."""
    answered: list[Row] = []
    count = 0
    for row in rows:
        truth = row["truth"]
        kept = [
            i
            for i, box in enumerate(truth["boxes"])
            if not truth["ignore"][i] and min(box[2] - box[0], box[3] - box[1]) > LEAST_SIDE
        ]
        count += len(kept)
        side = {name: [truth[name][i] for i in kept] for name in ("boxes", "labels")}
        same = {**row, **side, "scores": None, "truth": {**side, "ignore": [False] * len(kept)}}
        answered.append({**same, "status": "ok" if kept else "none"})
    expected: dict[str, float | None] = {name: value if count else None for name, value in exact.items()}
    return answered, expected | {"count_error": 0.0 if rows else None}


def _shift(box: Sequence[float], widths: float) -> list[float]:
    x1, y1, x2, y2 = box
    return [x1 + widths * (x2 - x1), y1, x2 + widths * (x2 - x1), y2]


def _swapped_iou(box: Sequence[float]) -> float:
    x1, y1, x2, y2 = box
    shared = max(0.0, min(x2, y2) - max(x1, y1)) ** 2
    return shared / (2 * (x2 - x1) * (y2 - y1) - shared)


def _analytic(
    boxes: Sequence[Sequence[float]],
    labels: Sequence[str],
    predicted: Sequence[Sequence[float]],
    ious: Sequence[float],
) -> tuple[list[Row], dict[str, float | None]]:
    """Put one prediction of known IoU against each true box; those within a hair of a threshold are left out."""
    kept = [i for i, iou in enumerate(ious) if all(abs(iou - level / 100) > TOLERANCE for level in range(50, 100, 5))]
    n = len(kept)
    chosen = [ious[i] for i in kept]
    hits = [sum(iou > level / 100 for iou in chosen) for level in range(50, 100, 5)]
    matched = [iou for iou in chosen if iou > 0.5]
    expected: dict[str, float | None] = dict.fromkeys(("mean_best_iou", "f1_50", "f1", "recall_50", "mean_matched_iou"))
    if n:  # one true and one predicted box a picture: F1 = 2 tp / (2 tp + fp + fn) = tp / n
        expected |= {"mean_best_iou": math.fsum(chosen) / n, "f1_50": hits[0] / n, "f1": sum(hits) / 10 / n}
        expected |= {"recall_50": hits[0] / n}
        expected["mean_matched_iou"] = math.fsum(matched) / len(matched) if matched else None
    rows = _rows([boxes[i] for i in kept], [labels[i] for i in kept], [[predicted[i]] for i in kept])
    return rows, expected


def _shuffled(rows: Sequence[Row]) -> list[Row]:
    """Put rows, and the boxes of each side, in another order, the same every time."""
    rng = random.Random(0)
    result: list[Row] = []
    for row in rng.sample(list(rows), len(rows)):
        truth = row["truth"]
        order = rng.sample(range(len(row["boxes"])), len(row["boxes"]))
        true_order = rng.sample(range(len(truth["boxes"])), len(truth["boxes"]))
        result.append(
            {
                **row,
                **{name: [row[name][i] for i in order] for name in ("boxes", "labels")},
                "scores": None,
                "truth": {name: [truth[name][i] for i in true_order] for name in ("boxes", "labels", "ignore")},
            }
        )
    return result


def _show(value: float | None) -> Any:
    return "undefined" if value is None else round(value, 6)

"""What kind of mistake each false or missing box is, and what each kind costs.

When: AFTER matching; numpy only. In the manner of TIDE (Bolya et al. 2020, "TIDE: A General Toolbox for Identifying Object
Detection Errors", section 2.2), with its limits of IoU .5 and .1, without scores. A false prediction is of the first kind
that fits:

    class          IoU >= .5 with a true box of another label, more than with any of its own
    duplicate      IoU >= .5 with a true box of its label, which another prediction has found
    localisation   IoU >= .1 with a true box of its label
    both           IoU >= .1 with a true box of another label
    background     none of these

TIDE asks for localisation first and for duplicates after class; here the truth that a box overlaps most decides, so that a
dog called a cat is a matter of class also where a cat stands near. A true box that is not found is explained by a class or
localisation mistake that would find it once mended, one to one; else it is `missed`.

The cost of a kind is what F1@0.5 gains when mistakes of this kind alone are mended: labels and boxes are put right (those
with no true box left to find are taken away), `both`, `duplicate` and `background` are taken away, missed boxes are found.
TIDE takes missed boxes out of the truth instead, which AP needs and F1 does not. Without a true box there is no F1 to gain, and
no cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmdet.evaluation.match import Matching, rank_boxes, take_pairs
from vlmdet.evaluation.metrics import FORMULAS, Counts, add_up, interval
from vlmdet.evaluation.table import Table

FOUND_IOU = 0.5
NEAR_IOU = 0.1

KINDS = ("hit", "class", "localisation", "both", "duplicate", "background", "ignored")
"""What a prediction is, at IoU .5."""

MISTAKES = ("class", "localisation", "both", "duplicate", "background", "missed")


@dataclass(frozen=True, eq=False)
class Explanation:
    """What became of each box; n true boxes, m predicted ones.

    Attributes:
        kind: (m,) int64, place in `KINDS`.
        truth: (m,) int64, row of the true box that decided the kind; -1 for background.
        iou: (m,) float64, IoU with it, for `ignored` the share that lies on it; for background the highest with any.
        found: (n,) bool, true boxes that are found.
        prediction: (n,) int64, row of the prediction that found a true box, or would, its label or place put right; else -1.
        mended: (m,) bool, class and localisation mistakes that would find a box.
    """

    kind: np.ndarray
    truth: np.ndarray
    iou: np.ndarray
    found: np.ndarray
    prediction: np.ndarray
    mended: np.ndarray


def explain(table: Table, matching: Matching) -> Explanation:
    """Tell the kind of each prediction, and which prediction each true box has.

    When: once per scoring.
    """
    rows, columns, iou = matching.overlaps
    same = table.truth.label[rows] == table.predicted.label[columns]
    m = len(table.predicted)
    rank = rank_boxes(table.truth)
    own_iou, own_truth = _most(rows[same], columns[same], iou[same], rank, m)
    other_iou, other_truth = _most(rows[~same], columns[~same], iou[~same], rank, m)

    hit = matching.predicted_iou >= FOUND_IOU
    tests = {  # the first that holds
        "hit": hit,
        "ignored": matching.ignored_share >= FOUND_IOU,
        "class": (other_iou >= FOUND_IOU) & (other_iou > own_iou),
        "duplicate": own_iou >= FOUND_IOU,
        "localisation": own_iou >= NEAR_IOU,
        "both": other_iou >= NEAR_IOU,
    }
    kind = np.select(list(tests.values()), [KINDS.index(name) for name in tests], KINDS.index("background"))
    by_other = np.isin(kind, [KINDS.index("class"), KINDS.index("both")])
    truth, best = np.where(by_other, other_truth, own_truth), np.where(by_other, other_iou, own_iou)
    stands = matching.iou >= FOUND_IOU
    truth[matching.pairs[stands, 1]] = matching.pairs[stands, 0]
    best[hit] = matching.predicted_iou[hit]
    ignored, background = kind == KINDS.index("ignored"), kind == KINDS.index("background")
    truth[ignored], best[ignored] = matching.ignored_by[ignored], matching.ignored_share[ignored]
    truth[background], best[background] = -1, np.maximum(own_iou, other_iou)[background]

    found = matching.truth_iou >= FOUND_IOU
    prediction = np.full(len(table.truth), -1)
    prediction[matching.pairs[stands, 0]] = matching.pairs[stands, 1]
    mended = np.zeros(m, dtype=bool)
    for name, fits in (("class", ~same & (iou >= FOUND_IOU)), ("localisation", same & (iou >= NEAR_IOU))):
        may = fits & (kind[columns] == KINDS.index(name)) & ~found[rows]
        chosen = take_pairs(rows, columns, iou, may, truth=table.truth, predicted=table.predicted)
        mended[columns[chosen]] = True
        truth[columns[chosen]], best[columns[chosen]] = rows[chosen], iou[chosen]
        unexplained = prediction[rows[chosen]] < 0
        prediction[rows[chosen][unexplained]] = columns[chosen][unexplained]
    return Explanation(kind, truth, best, found, prediction, mended)


def _most(
    rows: np.ndarray, columns: np.ndarray, iou: np.ndarray, rank: np.ndarray, m: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return, per prediction, its highest IoU and the true box that it is with: (m,) and (m,), 0 and -1 without one."""
    highest, truth = np.zeros(m), np.full(m, -1)
    order = np.lexsort((rank[rows], -iou, columns))
    named, first = np.unique(columns[order], return_index=True)
    highest[named], truth[named] = iou[order[first]], rows[order[first]]
    return highest, truth


def count_mistakes(table: Table, matching: Matching, explained: Explanation) -> Counts:
    """Count mistakes image by image: for each kind its number, and for those that can be mended the boxes then found.

    Output: `Counts` of n images, `<kind>` and `<kind>_found`.
    """
    n, image = len(table.rows), table.predicted.image
    counts = {name: np.bincount(image[explained.kind == KINDS.index(name)], minlength=n) for name in MISTAKES[:-1]}
    for name in ("class", "localisation"):
        mended = explained.mended & (explained.kind == KINDS.index(name))
        counts[f"{name}_found"] = np.bincount(image[mended], minlength=n)
    missed = ~np.isnan(matching.best_iou) & ~explained.found & (explained.prediction < 0)
    counts["missed"] = np.bincount(table.truth.image[missed], minlength=n)
    return {name: values.astype(np.float64) for name, values in counts.items()}


def cost_mistakes(counts: Counts, sums: Counts, drawn: np.ndarray) -> dict[str, Any]:
    """Tell how often each kind of mistake was made, and how much F1@0.5 it costs.

    Input: `count_mistakes` of n images; `sums` of `metrics.add_up`, of the same images; `drawn` (n, 1 + resamples).
    Output: `{"class": {"count": 3, "cost": {"value", "low", "high", "n"}}, …}`.
    """
    added = add_up(counts, drawn)
    before = {name: sums[name][:, :1] for name in ("tp", "fp", "fn")}
    none = np.zeros(len(added["missed"]))
    result = {}
    for name in MISTAKES:
        gone = none if name == "missed" else added[name]
        found = added["missed"] if name == "missed" else added.get(f"{name}_found", none)
        after = {
            "tp": before["tp"] + found[:, None],
            "fp": before["fp"] - gone[:, None],
            "fn": before["fn"] - found[:, None],
        }
        value, low, high = interval(FORMULAS["f1_50"](after) - FORMULAS["f1_50"](before))
        cost = {"value": value, "low": low, "high": high, "n": len(drawn)}
        result[name] = {"count": int(added[name][0]), "cost": cost}
    return result

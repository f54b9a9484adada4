"""Figures of a run, from the rows of its `predictions.jsonl`.

When: AFTER generation, on stored rows; numpy only, so any figure can be computed again without the model. `table.py` and
`match.py` run before it; `results.py` makes the whole of `results.json` of the same counts, `compare.py` compares those of
two runs.

Three steps: each image is counted once (`count_images`), counts are added up over the images or over resamples of them
(`resample`), and every figure is a ratio of such sums (`FORMULAS`). Boxes of all images are pooled: an image with ten
objects weighs ten times one with a single object.

IoUs are rounded to nine decimals and added up as whole billionths. Whole numbers stay exact in float64 up to 9e15,
so that no sum depends on the order of boxes or images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypedDict

import numpy as np

from vlmdet.evaluation.match import Matching, duplicates_by_image, match_sides
from vlmdet.evaluation.table import Row as Row
from vlmdet.evaluation.table import Table, lay_out
from vlmdet.evaluation.table import sort_rows as sort_rows

THRESHOLDS = np.arange(50, 100, 5) / 100
"""IoU thresholds of COCO: .50, .55, … .95."""

BILLION = 1e9
"""IoUs are added up in billionths."""

Counts = dict[str, np.ndarray]
"""Counts by name: (n,) or, for tp, fp and fn, (n, 10) float64; n images, or n sums over images."""


class Figure(TypedDict):
    """A figure with its 95 % interval; None where it is undefined; n is the number of images it is taken over."""

    value: float | None
    low: float | None
    high: float | None
    n: int


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Divide; NaN where there is nothing to divide by."""
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below > 0)


def _f1(counts: Counts) -> np.ndarray:
    """Return F1 at each threshold, (n, 10): 2 tp / (2 tp + fp + fn)."""
    return _ratio(2 * counts["tp"], 2 * counts["tp"] + counts["fp"] + counts["fn"])


FORMULAS: dict[str, Callable[[Counts], np.ndarray]] = {
    "mean_best_iou": lambda c: _ratio(c["best_iou"], c["truth"]) / BILLION,
    "f1_50": lambda c: _f1(c)[:, 0],
    "f1": lambda c: _f1(c).mean(axis=1),
    "precision_50": lambda c: _ratio(c["tp"][:, 0], c["tp"][:, 0] + c["fp"][:, 0]),
    "recall_50": lambda c: _ratio(c["tp"][:, 0], c["truth"]),
    "mean_matched_iou": lambda c: _ratio(c["matched_iou"], c["tp"][:, 0]) / BILLION,
    "boxes_per_image": lambda c: _ratio(c["predicted"], c["images"]),
    "count_error": lambda c: _ratio(c["count_error"], c["images"]),
    "parse_failure_rate": lambda c: _ratio(c["parse_failure"], c["images"]),
    "off_list_rate": lambda c: _ratio(c["off_list"], c["predicted"]),
    "duplicate_rate": lambda c: _ratio(c["duplicates"], c["predicted"]),
    "truncation_rate": lambda c: _ratio(c["truncated"], c["images"]),
    "correct_empty_rate": lambda c: _ratio(c["correct_empty"], c["empty"]),
    "detection_rate": lambda c: _ratio(c["detected"], c["with_truth"]),
    "error_rate": lambda c: _ratio(c["error"], c["images"]),
}
"""Each figure as a function of counts or sums of them."""

BOX_FIGURES = ("f1_50", "f1", "precision_50", "recall_50", "mean_best_iou", "mean_matched_iou")
"""Figures of boxes alone, for a part of them: a class, a size."""

_TAKEN_OVER = {"correct_empty_rate": "empty", "detection_rate": "with_truth"}
"""Figures that only some of the images have a part in, and the count of those; the others are taken over all."""


def score_rows(
    rows: Sequence[Row], *, labels_asked: Sequence[str], resamples: int = 1000, seed: int = 0
) -> dict[str, Figure]:
    """Score a run: every figure with a 95 % interval over images.

    When: once per run and split; during training on a few images.

    Input: `rows` of `predictions.jsonl`, in any order; `labels_asked`, the classes of the run; `resamples` of the
    bootstrap, 0 for no intervals; `seed` of them.
    Output: `{"f1_50": {"value": 0.81, "low": 0.74, "high": 0.87, "n": 64}, …}`:

    * `f1_50`, `precision_50`, `recall_50`: one-to-one matching at IoU 0.5; `f1`: the mean of F1 at .50, .55, … .95.
    * `mean_matched_iou`: over the pairs matched at 0.5. `mean_best_iou`: over true boxes, the best prediction of the
      same label; one may serve several, none counts 0. It has no threshold and no cost for a false box: read it
      beside `boxes_per_image`.
    * `boxes_per_image`: predicted. `count_error`: mean of |predicted - true|, ignored boxes and what lies on them
      left out.
    * `parse_failure_rate`, `truncation_rate`: share of images. `off_list_rate`, `duplicate_rate`: share of predicted
      boxes with a label that was not asked for, or that repeat another box of their label (IoU over 0.9).
    * `correct_empty_rate`: of the images without a true box, those answered by none; a parse failure is no answer.
    * `detection_rate`: of the images with a true box, those with at least one matched at 0.5.
    * `error_rate`: share of rows with status `error`. They have a part in no other figure: an exception is not a bad
      box.

    The interval is the percentile bootstrap: images are drawn with replacement (Efron and Tibshirani, 1993, chapter
    13). Resamples in which a figure is undefined are left out of its interval.

    Raises:
        ConfigError: `labels_asked` is empty.
        DataError: two rows have one id.
    """
    counts = count_images(rows, labels_asked=labels_asked)
    scored = {name: values[counts["error"] == 0] for name, values in counts.items()}
    sums = resample(scored, resamples=resamples, seed=seed)
    figures = {name: make_figure(name, sums) for name in FORMULAS}
    figures["error_rate"] = make_figure("error_rate", resample(counts, resamples=resamples, seed=seed))
    return figures


def per_image(rows: Sequence[Row], *, labels_asked: Sequence[str]) -> list[dict[str, Any]]:
    """Return the figures of each image, for `per_image.csv`.

    Input: `rows` of `predictions.jsonl`.
    Output: in the order of the rows `{"id", "status", "n_truth", "n_pred", "tp", "fp", "fn", "mean_best_iou", "f1"}`,
    matched at IoU 0.5; None where undefined, and in all figures of a row with status `error`.

    Raises:
        ConfigError: `labels_asked` is empty.
    """
    table = lay_out(rows, labels_asked=labels_asked)
    return image_figures(rows, table, count_table(table, match_table(table)))


def image_figures(rows: Sequence[Row], table: Table, counts: Counts) -> list[dict[str, Any]]:
    """Make the lines of `per_image` of what was counted, in the order of `rows`."""
    columns = {
        "n_truth": counts["truth"],
        "n_pred": counts["predicted"],
        "tp": counts["tp"][:, 0],
        "fp": counts["fp"][:, 0],
        "fn": counts["fn"][:, 0],
    }
    whole = {name: values.astype(np.int64).tolist() for name, values in columns.items()}
    shares = {"mean_best_iou": FORMULAS["mean_best_iou"](counts).tolist(), "f1": FORMULAS["f1_50"](counts).tolist()}
    place = {row["id"]: number for number, row in enumerate(table.rows)}
    lines = []
    for row in rows:
        i = place[row["id"]]
        scored = bool(table.scored[i])
        line: dict[str, Any] = {"id": row["id"], "status": row["status"]}
        line |= {name: values[i] if scored else None for name, values in whole.items()}
        line |= {name: None if not scored or math.isnan(v[i]) else v[i] for name, v in shares.items()}
        lines.append(line)
    return lines


def count_images(rows: Sequence[Row], *, labels_asked: Sequence[str]) -> Counts:
    """Count what every figure needs, image by image.

    Input: n `rows`. Output: `Counts` of n, by rising id; a row with status `error` has 0 everywhere but in `images`
    and `error`.

    Raises:
        ConfigError: `labels_asked` is empty.
        DataError: two rows have one id.
    """
    table = lay_out(rows, labels_asked=labels_asked)
    return count_table(table, match_table(table))


def match_table(table: Table) -> Matching:
    """Pair all boxes of a run."""
    return match_sides(table.truth, table.predicted, ignored=table.ignored)


def count_table(table: Table, matching: Matching) -> Counts:
    """Count what every figure needs, image by image: (n,) or (n, 10) float64 for each name."""
    n = len(table.rows)
    counts = tally(matching, table.truth.image, table.predicted.image, n)
    true = np.bincount(table.truth.image, minlength=n)  # with ignored ones
    empty = table.scored & (true == 0)
    status = np.asarray([row["status"] for row in table.rows], dtype=object)
    truncated = np.asarray([bool(row["truncated"]) for row in table.rows], dtype=bool)
    off_list = (table.predicted.label < 0) | (table.predicted.label >= table.asked)
    failed = status == "parse_failure"
    single: dict[str, np.ndarray] = {
        "images": np.ones(n),
        "error": ~table.scored,
        # tp + fp: predictions that do not lie on an ignored box
        "count_error": np.abs(counts["tp"][:, 0] + counts["fp"][:, 0] - counts["truth"]),
        "parse_failure": failed,
        "off_list": np.bincount(table.predicted.image, off_list, minlength=n),
        "duplicates": duplicates_by_image(table.predicted, n),
        "truncated": truncated & table.scored,
        "empty": empty,
        "correct_empty": empty & (counts["predicted"] == 0) & ~failed,
        "with_truth": counts["truth"] > 0,
        "detected": counts["tp"][:, 0] > 0,
    }
    return counts | {name: np.asarray(values, dtype=np.float64) for name, values in single.items()}


def tally(matching: Matching, truth_group: np.ndarray, predicted_group: np.ndarray, groups: int) -> Counts:
    """Count boxes by group: by picture, or by picture and class.

    Input: the group of each true and each predicted box, 0 to `groups` - 1; -1 leaves a box out. A hit counts in the group
    of its true box, a false box in its own.
    Output: `tp`, `fp`, `fn` (groups, 10); `truth` (that are not ignored), `predicted`, `best_iou`, `matched_iou` (groups,),
    the IoUs in billionths.
    """
    real = ~np.isnan(matching.best_iou) & (truth_group >= 0)
    group, own = truth_group[real], predicted_group[predicted_group >= 0]
    tp = _levels(matching.truth_iou[real], group, groups)[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]
    fp = _levels(matching.excuse[predicted_group >= 0], own, groups).cumsum(axis=1)[:, :-1]
    truth = np.bincount(group, minlength=groups).astype(np.float64)
    matched = np.where(matching.truth_iou >= THRESHOLDS[0], matching.truth_iou, 0.0)
    return {
        "tp": tp,
        "fp": fp,
        "fn": truth[:, None] - tp,
        "truth": truth,
        "predicted": np.bincount(own, minlength=groups).astype(np.float64),
        "best_iou": np.bincount(group, (matching.best_iou[real] * BILLION).round(), minlength=groups),
        "matched_iou": np.bincount(group, (matched[real] * BILLION).round(), minlength=groups),
    }


def _levels(iou: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """Count boxes by how many thresholds they reach: (groups, 11) float64."""
    steps = len(THRESHOLDS) + 1
    reached = np.searchsorted(THRESHOLDS, iou, side="right")
    return np.bincount(group * steps + reached, minlength=groups * steps).reshape(groups, steps).astype(np.float64)


@lru_cache(maxsize=2)  # every figure, run and pair of a comparison takes the same draw
def draw_images(n: int, *, resamples: int, seed: int) -> np.ndarray:
    """Draw n images with replacement, again and again.

    Output: (n, 1 + resamples) uint8, read-only, how often each image is drawn; the first column takes each once. The same n
    and seed draw the same images, which is what pairs two runs.
    """
    drawn = np.ones((n, 1 + resamples), dtype=np.uint8)  # 256 times the same image is not to be seen in this world
    rng = np.random.default_rng(seed)
    at_once = max(1, 4_000_000 // max(n, 1))  # 32 MB; numbers drawn do not depend on it
    for start in range(0, resamples if n else 0, at_once):
        size = min(at_once, resamples - start)
        drawn[:, 1 + start : 1 + start + size] = rng.multinomial(n, np.full(n, 1 / n), size=size).T
    drawn.setflags(write=False)
    return drawn


def add_up(counts: Counts, drawn: np.ndarray, images: np.ndarray | None = None) -> Counts:
    """Add counts up over the images of each resample.

    Input: `counts` of k rows; `drawn` of `draw_images`; `images` (k,), the image of each row where they are not all.
    Output: `Counts` of 1 + resamples sums.
    """
    k = len(next(iter(counts.values())))
    table = np.concatenate([values.reshape(k, math.prod(values.shape[1:])).T for values in counts.values()])
    added = np.zeros((len(table), drawn.shape[1]))
    at_once = max(1, 4_000_000 // max(drawn.shape[1], 1))
    for start in range(0, k, at_once):
        here = slice(start, start + at_once)
        weights = drawn[here] if images is None else drawn[images[here]]
        added += table[:, here] @ weights.astype(np.float64)
    ends = np.cumsum([math.prod(values.shape[1:]) for values in counts.values()])
    parts = np.split(added.T, ends[:-1], axis=1)
    return {
        name: part.reshape(len(part), *values.shape[1:])
        for (name, values), part in zip(counts.items(), parts, strict=True)
    }


def resample(counts: Counts, *, resamples: int, seed: int) -> Counts:
    """Add counts up over all images, and over images drawn with replacement.

    Input: `counts` of n images. Output: `Counts` of 1 + resamples sums; the first is over each image once. Of no images
    all sums are 0.
    """
    n = len(next(iter(counts.values())))
    return add_up(counts, draw_images(n, resamples=resamples, seed=seed))


def interval(values: np.ndarray) -> tuple[float | None, float | None, float | None]:
    """Return value, low and high of a figure and its resamples.

    Input: (1 + resamples,) float64, the figure first; NaN where undefined. Output: the figure and the percentiles 2.5
    and 97.5 of the defined resamples; all None where the figure is undefined, low and high None where there are no
    resamples.
    """
    if math.isnan(values[0]):
        return None, None, None
    drawn = values[1:][~np.isnan(values[1:])]
    if not len(drawn):
        return float(values[0]), None, None
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(values[0]), float(low), float(high)


def make_figure(name: str, sums: Counts, *, n: int | None = None) -> Figure:
    """Make a figure of the sums of `add_up`; `n`, where it is taken over a part of the images."""
    value, low, high = interval(FORMULAS[name](sums))
    if n is None:
        n = int(sums[_TAKEN_OVER.get(name, "images")][0])
    return {"value": value, "low": low, "high": high, "n": n}

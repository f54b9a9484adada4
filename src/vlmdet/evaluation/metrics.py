"""Figures of a run, from the rows of its `predictions.jsonl`.

When: AFTER generation, on stored rows; numpy only, so any figure can be computed again without the model. `match.py`
runs before it, `files.py` writes what comes out; `compare.py` takes the same counts of two runs.

Three steps: each image is counted once (`count_images`), counts are added up over the images or over resamples of them
(`resample`), and every figure is a ratio of such sums (`FORMULAS`). Boxes of all images are pooled: an image with ten
objects weighs ten times one with a single object.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from vlmdet.boxes import FRACTIONS, Boxes
from vlmdet.errors import ConfigError, DataError
from vlmdet.evaluation.match import Matching, count_duplicates, match_boxes, resolve_labels

THRESHOLDS = np.arange(50, 100, 5) / 100
"""IoU thresholds of COCO: .50, .55, … .95."""

Row = Mapping[str, Any]
"""A row of `predictions.jsonl`."""

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
    "mean_best_iou": lambda c: _ratio(c["best_iou"], c["truth"]),
    "f1_50": lambda c: _f1(c)[:, 0],
    "f1": lambda c: _f1(c).mean(axis=1),
    "precision_50": lambda c: _ratio(c["tp"][:, 0], c["tp"][:, 0] + c["fp"][:, 0]),
    "recall_50": lambda c: _ratio(c["tp"][:, 0], c["truth"]),
    "mean_matched_iou": lambda c: _ratio(c["matched_iou"], c["tp"][:, 0]),
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
    everything = count_images(rows, labels_asked=labels_asked)
    scored = {name: values[everything["error"] == 0] for name, values in everything.items()}
    sums = resample(scored, resamples=resamples, seed=seed)
    figures = {name: _figure(name, sums) for name in FORMULAS}
    figures["error_rate"] = _figure("error_rate", resample(everything, resamples=resamples, seed=seed))
    return figures


def per_image(rows: Sequence[Row], *, labels_asked: Sequence[str]) -> list[dict[str, Any]]:
    """Return the figures of each image, for `per_image.csv`.

    Input: `rows` of `predictions.jsonl`.
    Output: in the order of the rows `{"id", "status", "n_truth", "n_pred", "tp", "fp", "fn", "mean_best_iou", "f1"}`,
    matched at IoU 0.5; None where undefined, and in all figures of a row with status `error`.

    Raises:
        ConfigError: `labels_asked` is empty.
    """
    _check_asked(labels_asked)
    return [_image_figures(row, labels_asked) for row in rows]


def _image_figures(row: Row, labels_asked: Sequence[str]) -> dict[str, Any]:
    """Make one line of `per_image`."""
    counts = {name: np.asarray([value]) for name, value in _count_image(row, labels_asked).items()}
    failed = row["status"] == "error"

    def number(value: np.ndarray) -> int | None:
        return None if failed else int(value.flat[0])

    def share(name: str) -> float | None:
        value = float(FORMULAS[name](counts)[0])
        return None if failed or math.isnan(value) else value

    return {
        "id": row["id"],
        "status": row["status"],
        "n_truth": number(counts["truth"]),
        "n_pred": number(counts["predicted"]),
        "tp": number(counts["tp"]),
        "fp": number(counts["fp"]),
        "fn": number(counts["fn"]),
        "mean_best_iou": share("mean_best_iou"),
        "f1": share("f1_50"),
    }


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


def count_images(rows: Sequence[Row], *, labels_asked: Sequence[str]) -> Counts:
    """Count what every figure needs, image by image.

    Input: n `rows`. Output: `Counts` of n, by rising id; a row with status `error` has 0 everywhere but in `images`
    and `error`.

    Raises:
        ConfigError: `labels_asked` is empty.
        DataError: two rows have one id.
    """
    _check_asked(labels_asked)
    counts = [_count_image(row, labels_asked) for row in sort_rows(rows)]
    return {
        name: np.asarray([one[name] for one in counts], dtype=np.float64).reshape(len(counts), *np.shape(example))
        for name, example in _NOTHING.items()
    }


def resample(counts: Counts, *, resamples: int, seed: int) -> Counts:
    """Add counts up over all images, and over images drawn with replacement.

    Input: `counts` of n images. Output: `Counts` of 1 + resamples sums; the first is over each image once. The same n
    and seed draw the same images, which is what pairs two runs. Of no images all sums are 0.
    """
    n = len(counts["images"])
    table = np.concatenate([values.reshape(n, math.prod(values.shape[1:])) for values in counts.values()], axis=1)
    sums = [table.sum(axis=0, keepdims=True)]
    rng = np.random.default_rng(seed)
    at_once = max(1, 4_000_000 // max(n, 1))  # 32 MB of weights; numbers drawn do not depend on it
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
        weights = rng.multinomial(n, np.full(n, 1 / n), size=size) if n else np.zeros((size, 0))
        sums.append(weights.astype(np.float64) @ table)
    added = np.concatenate(sums)
    ends = np.cumsum([math.prod(values.shape[1:]) for values in counts.values()])
    parts = np.split(added, ends[:-1], axis=1)
    return {
        name: part.reshape(len(added), *values.shape[1:])
        for (name, values), part in zip(counts.items(), parts, strict=True)
    }


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


def _figure(name: str, sums: Counts) -> Figure:
    value, low, high = interval(FORMULAS[name](sums))
    return {"value": value, "low": low, "high": high, "n": int(sums[_TAKEN_OVER.get(name, "images")][0])}


_NOTHING: dict[str, Any] = {
    **dict.fromkeys(("tp", "fp", "fn"), np.zeros(len(THRESHOLDS))),
    **dict.fromkeys(
        (
            *("images", "error", "truth", "predicted", "best_iou", "matched_iou", "count_error", "parse_failure"),
            *("off_list", "duplicates", "truncated", "empty", "correct_empty", "with_truth", "detected"),
        ),
        0.0,
    ),
}
"""The counts of an image that has nothing to count."""


def _count_image(row: Row, labels_asked: Sequence[str]) -> dict[str, Any]:
    """Count one row."""
    if row["status"] == "error":
        return {**_NOTHING, "images": 1, "error": 1}
    predicted = _boxes(row, row["boxes"])
    labels = resolve_labels(row["labels"], labels_asked)
    ignore = [bool(flag) for flag in row["truth"]["ignore"]]
    matching = match_boxes(
        _boxes(row, row["truth"]["boxes"]),
        row["truth"]["labels"],
        predicted,
        labels,
        labels_asked=labels_asked,
        ignore=ignore,
    )
    tp, fp, fn = matching.count(THRESHOLDS)
    truth = len(ignore) - sum(ignore)
    return {
        **_NOTHING,
        "tp": tp,
        "fp": fp,
        "fn": fn,
        "images": 1,
        "truth": truth,
        "predicted": len(predicted),
        **_iou_sums(matching),
        "count_error": abs(int(tp[0] + fp[0]) - truth),  # tp + fp: predictions that do not lie on an ignored box
        "parse_failure": row["status"] == "parse_failure",
        "off_list": sum(label not in labels_asked for label in labels),
        "duplicates": count_duplicates(predicted, labels),
        "truncated": bool(row["truncated"]),
        "empty": not ignore,
        "correct_empty": not ignore and not len(predicted) and row["status"] != "parse_failure",
        "with_truth": truth > 0,
        "detected": tp[0] > 0,
    }


def _iou_sums(matching: Matching) -> dict[str, float]:
    """Add IoUs up; `fsum`, because its result does not depend on the order of the boxes."""
    return {
        "best_iou": math.fsum(matching.best_iou[~np.isnan(matching.best_iou)]),
        "matched_iou": math.fsum(matching.iou[matching.iou >= THRESHOLDS[0]]),
    }


def _boxes(row: Row, values: Any) -> Boxes:
    return Boxes.from_array(values, FRACTIONS, row["width"], row["height"])


def _check_asked(labels_asked: Sequence[str]) -> None:
    if isinstance(labels_asked, str) or not labels_asked:
        raise ConfigError("no labels to score", "give the list of classes that the model was asked for")

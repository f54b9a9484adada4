"""The difference between two runs on the same images.

When: AFTER both runs were predicted; numpy only. Ahead of it runs `files.read_predictions`. Pairing takes out what
both runs have in common, the hard images above all, so a difference can be seen that two separate intervals would
hide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from vlmdet.boxes import FRACTIONS, Boxes
from vlmdet.errors import ConfigError, DataError, did_you_mean
from vlmdet.evaluation.metrics import FORMULAS, Counts, Row, count_images, interval, resample, sort_rows

LOWER_IS_BETTER = frozenset(
    {"count_error", "parse_failure_rate", "off_list_rate", "duplicate_rate", "truncation_rate", "error_rate"}
)
"""Figures that count mistakes; of the others higher is better, but for `boxes_per_image`, which is neither."""


class Difference(TypedDict):
    """A paired difference, b - a.

    `n` is the number of images that both runs have; `separable` is False where the interval covers 0, where there is
    none, and for a single image, whose resamples are all alike; `wins` and `losses` count the images on which b's figure
    is better or worse than a's, None for a figure that has no better.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    separable: bool
    wins: int | None
    losses: int | None


def paired_difference(
    rows_a: Sequence[Row],
    rows_b: Sequence[Row],
    *,
    metric: str,
    labels_asked: Sequence[str],
    resamples: int = 1000,
    seed: int = 0,
) -> Difference:
    """Tell how much higher a figure is in run b than in run a, with a paired 95 % interval.

    When: once per pair of runs and figure.

    Input: rows of two `predictions.jsonl` over the same images, in any order; `metric`, a name of `metrics.FORMULAS`.
    An image that either run has an `error` on is left out on both sides, except for `error_rate`.
    Output: `Difference`, b - a: positive where b is higher. Each resample draws the same images for both runs. An
    image on which the figure is undefined for either run is neither a win nor a loss.

    Raises:
        ConfigError: no such metric, or `labels_asked` is empty.
        DataError: an id is missing in one of the runs or double, or an image's truth differs between them.
    """
    return paired_differences(
        rows_a, rows_b, metrics=[metric], labels_asked=labels_asked, resamples=resamples, seed=seed
    )[metric]


def paired_differences(
    rows_a: Sequence[Row],
    rows_b: Sequence[Row],
    *,
    metrics: Sequence[str],
    labels_asked: Sequence[str],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Difference]:
    """Tell the difference in several figures; each is that of `paired_difference`, and boxes are matched once.

    Input, Raises: see there. Output: `{"f1_50": Difference, …}` in the order of `metrics`.
    """
    for metric in metrics:
        if metric not in FORMULAS:
            raise ConfigError(f"unknown metric '{metric}'", did_you_mean(metric, FORMULAS))
    a, b = sort_rows(rows_a), sort_rows(rows_b)
    _check_same_images(a, b)
    counts = count_images(a, labels_asked=labels_asked), count_images(b, labels_asked=labels_asked)
    answered = (counts[0]["error"] == 0) & (counts[1]["error"] == 0)
    found: dict[str, Difference] = {}
    for whole in (True, False):
        asked = [metric for metric in metrics if (metric == "error_rate") == whole]
        if asked:
            sides = [side if whole else {name: part[answered] for name, part in side.items()} for side in counts]
            found |= _differences(sides[0], sides[1], asked, resamples, seed)
    return {metric: found[metric] for metric in metrics}


def _differences(a: Counts, b: Counts, metrics: Sequence[str], resamples: int, seed: int) -> dict[str, Difference]:
    """Compare counts of the same n images."""
    n = len(a["images"])
    sums_a = resample(a, resamples=resamples, seed=seed)
    sums_b = resample(b, resamples=resamples, seed=seed)  # the same n and seed: the same images
    found: dict[str, Difference] = {}
    for metric in metrics:
        formula = FORMULAS[metric]
        value, low, high = interval(formula(sums_b) - formula(sums_a))
        better = (formula(b) - formula(a)).round(9) * (-1 if metric in LOWER_IS_BETTER else 1)
        has_better = metric != "boxes_per_image"
        found[metric] = {
            "value": value,
            "low": low,
            "high": high,
            "n": n,
            "separable": n > 1 and low is not None and high is not None and not low <= 0 <= high,
            "wins": int((better > 0).sum()) if has_better else None,
            "losses": int((better < 0).sum()) if has_better else None,
        }
    return found


def _check_same_images(a: Sequence[Row], b: Sequence[Row]) -> None:
    """Refuse runs over different images, or with another truth for the same image."""
    ids_a, ids_b = {row["id"] for row in a}, {row["id"] for row in b}
    only = [
        f"{_few(ids - other)} only in {name}"
        for name, ids, other in (("a", ids_a, ids_b), ("b", ids_b, ids_a))
        if ids - other
    ]
    if only:
        raise DataError(f"the runs are over different images: {'; '.join(only)}", "predict both on one split and limit")
    differ = {one["id"] for one, other in zip(a, b, strict=True) if not _same_truth(one, other)}
    if differ:
        raise DataError(
            f"the runs have different truth for {_few(differ)}", "predict both from one version of the data set"
        )


def _same_truth(one: Row, other: Row) -> bool:
    (boxes, names), (other_boxes, other_names) = _truth(one), _truth(other)
    return names == other_names and np.allclose(boxes, other_boxes, rtol=0, atol=1e-9)


def _truth(row: Row) -> tuple[np.ndarray, list[tuple[str, bool]]]:
    """Return true boxes (n, 4) with labels and flags, ordered by coordinates: the order in the row means nothing."""
    truth = row["truth"]
    boxes = Boxes.from_array(truth["boxes"], FRACTIONS, row["width"], row["height"]).xyxy
    names = [(label, bool(flag)) for label, flag in zip(truth["labels"], truth["ignore"], strict=True)]
    order = sorted(range(len(names)), key=lambda i: (boxes[i].round(9).tolist(), names[i]))
    return boxes[order], [names[i] for i in order]


def _few(ids: set[str]) -> str:
    """Name up to five ids: `'a', 'b', … (12 in all)`."""
    names = ", ".join(f"'{name}'" for name in sorted(ids)[:5])
    return names if len(ids) <= 5 else f"{names}, … ({len(ids)} in all)"

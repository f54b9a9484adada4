"""Figures of parts of a run: by class, by size, by boxes per picture, without objects; and which class is taken for which.

When: AFTER matching; numpy only. Every part comes from the one matching of the whole run, so that instances, hits and
misses of the parts add up to those of the whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from vlmdet.contract import Contract
from vlmdet.errors import DataError
from vlmdet.evaluation.match import Matching
from vlmdet.evaluation.metrics import BOX_FIGURES, FORMULAS, Counts, Figure, add_up, make_figure, tally
from vlmdet.evaluation.mistakes import KINDS, Explanation
from vlmdet.evaluation.table import Side, Table
from vlmdet.grounding.sizes import plan_view

SIZES = {"small": 32.0**2, "medium": 96.0**2, "large": np.inf}
"""COCO's limits, in pixels of the original picture: below the number, and not below the one before."""

PATCHES = {"<1": 1.0, "1-4": 4.0, "4-16": 16.0, ">16": np.inf}
"""Area of a box in image tokens of the resized picture, with limits like those of `SIZES`."""

NUMBERS = {"0": 1, "1": 2, "2-4": 5, "5+": np.inf}
"""True boxes of a picture, ignored ones left out."""

WITHOUT_OBJECTS = (
    "correct_empty_rate", "boxes_per_image", "parse_failure_rate", "off_list_rate", "duplicate_rate", "truncation_rate",
)  # fmt: skip


def by_class(table: Table, matching: Matching, drawn: np.ndarray) -> dict[str, Any]:
    """Return the figures of each class that was asked for or is in the truth.

    Output: `{"cup": {"images": 7, "instances": 9, "predicted": 8, "figures": {…}}}`. `images` have a true box of it; `n` of
    its figures is the number of images that have a true or a predicted one.
    """
    true = np.where(table.ignored, -1, table.truth.label)
    parts = _parts(matching, table, true, table.predicted.label, table.classes)
    found = {}
    for name, (images, counts) in zip(table.names[: table.classes], parts, strict=True):
        found[name] = {
            "images": int((counts["truth"] > 0).sum()),
            "instances": int(counts["truth"].sum()),
            "predicted": int(counts["predicted"].sum()),
            "figures": _box_figures(counts, images, drawn),
        }
    return found


def by_size(table: Table, matching: Matching, drawn: np.ndarray) -> dict[str, Any]:
    """Return figures by the size of boxes in pixels of the original picture.

    A true box belongs to the part of its size, with the prediction that found it; a false box to the part of its own. What
    lies outside of a part is ignored there, as COCO does it.
    """

    def pixels(side: Side) -> np.ndarray:
        return _area(side, table.wide, table.high)

    return _by_area(table, matching, drawn, SIZES, pixels(table.truth), pixels(table.predicted))


def by_patches(table: Table, matching: Matching, drawn: np.ndarray, contract: Contract) -> dict[str, Any]:
    """Return figures by the size of boxes in image tokens of the picture as the model sees it.

    A picture that the family refuses for its shape is in no part.
    """
    sizes: dict[tuple[int, int], tuple[float, float]] = {}
    for wide, high in {(row["width"], row["height"]) for row in table.rows}:
        try:
            limits = {"min_pixels": contract.min_pixels, "max_pixels": contract.max_pixels}
            view = plan_view(wide, high, **limits, factor=contract.size_factor)
        except DataError:
            sizes[wide, high] = np.nan, np.nan
        else:
            sizes[wide, high] = view.resized_width / contract.size_factor, view.resized_height / contract.size_factor
    seen = np.asarray([sizes[row["width"], row["height"]] for row in table.rows], dtype=np.float64).reshape(-1, 2)
    areas = [_area(side, seen[:, 0], seen[:, 1]) for side in (table.truth, table.predicted)]
    return _by_area(table, matching, drawn, PATCHES, *areas)


def by_count(counts: Counts, drawn: np.ndarray) -> dict[str, Any]:
    """Return figures by the number of true boxes of a picture; `counts` and `drawn` of the images that were scored."""
    part = np.searchsorted([float(limit) for limit in NUMBERS.values()], counts["truth"], side="right")
    return {name: _of_images(counts, drawn, part == i, tuple(FORMULAS)) for i, name in enumerate(NUMBERS)}


def without_objects(counts: Counts, drawn: np.ndarray) -> dict[str, Any]:
    """Return how the model answers for pictures without any true box; `counts` and `drawn` as in `by_count`."""
    return _of_images(counts, drawn, counts["empty"] > 0, WITHOUT_OBJECTS)


def confusion(table: Table, explained: Explanation) -> dict[str, Any]:
    """Count which class was taken for which, at IoU .5.

    Output: `{"labels": ["cup", …, "background"], "counts": [[…], …]}`: rows are the truth, columns what was predicted.
    A found box counts on the diagonal. A prediction that names another class counts beside it where its true box is not
    found otherwise. What is left is in the last row (false boxes) and the last column (missed ones). Predictions of no
    class, with no label or one that neither was asked for nor is in the truth, stand under "(off-list)", if there are any.
    Ignored boxes and predictions on them count nowhere.
    """
    off_list = (table.predicted.label < 0) | (table.predicted.label >= table.classes)
    counted = explained.kind != KINDS.index("ignored")
    labels = [*table.names[: table.classes], *(["(off-list)"] if (off_list & counted).any() else []), "background"]
    last = len(labels) - 1
    named = np.where(off_list, table.classes, table.predicted.label)
    paired = (explained.kind == KINDS.index("hit")) | ((explained.kind == KINDS.index("class")) & explained.mended)
    meant = np.full(len(named), last)
    meant[paired] = table.truth.label[explained.truth[paired]]
    left = ~table.ignored
    left[explained.truth[paired]] = False
    cells = np.concatenate(
        [(meant * len(labels) + named)[counted], table.truth.label[left] * len(labels) + last],
    )
    counts = np.bincount(cells, minlength=len(labels) ** 2).reshape(len(labels), len(labels))
    return {"labels": labels, "counts": counts.tolist()}


def _of_images(counts: Counts, drawn: np.ndarray, chosen: np.ndarray, names: tuple[str, ...]) -> dict[str, Any]:
    images = np.flatnonzero(chosen)
    sums = add_up({name: values[images] for name, values in counts.items()}, drawn, images)
    names = tuple(name for name in names if name != "error_rate")
    return {"images": len(images), "figures": {name: make_figure(name, sums) for name in names}}


def _box_figures(counts: Counts, images: np.ndarray, drawn: np.ndarray) -> dict[str, Figure]:
    sums = add_up(counts, drawn, images)
    return {name: make_figure(name, sums, n=len(images)) for name in BOX_FIGURES}


def _area(side: Side, wide: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return areas (k,), rounded so that 32 x 32 pixels are 1024 whatever the fractions were; 0 for an empty box."""
    with np.errstate(over="ignore", invalid="ignore"):
        sides = (side.xyxy[:, 2:] - side.xyxy[:, :2]).clip(min=0)
        return (sides[:, 0] * wide[side.image] * sides[:, 1] * high[side.image]).round(6)


def _by_area(
    table: Table,
    matching: Matching,
    drawn: np.ndarray,
    limits: dict[str, float],
    true_area: np.ndarray,
    predicted_area: np.ndarray,
) -> dict[str, Any]:
    edges = [limit for limit in limits.values() if np.isfinite(limit)]

    def part_of(area: np.ndarray) -> np.ndarray:
        return np.where(np.isnan(area), -1, np.searchsorted(edges, area, side="right"))

    true = np.where(table.ignored, -1, part_of(true_area))
    parts = _parts(matching, table, true, part_of(predicted_area), len(limits))
    found = {}
    for name, (images, counts) in zip(limits, parts, strict=True):
        found[name] = {"instances": int(counts["truth"].sum()), "figures": _box_figures(counts, images, drawn)}
    return found


def _parts(
    matching: Matching, table: Table, true_part: np.ndarray, predicted_part: np.ndarray, parts: int
) -> Iterator[tuple[np.ndarray, Counts]]:
    """Tally boxes by picture and part; yield, part by part, its images (k,) and their `Counts`.

    Only pictures that have a box of the part are held: a thousand classes cost no more than their boxes.
    """
    n = max(len(table.rows), 1)
    true_key = np.where(true_part < 0, -1, true_part * n + table.truth.image)
    within = (predicted_part >= 0) & (predicted_part < parts)
    predicted_key = np.where(within, predicted_part * n + table.predicted.image, -1)
    keys = np.unique(np.concatenate([true_key, predicted_key]))
    keys = keys[keys >= 0]
    true, predicted = (np.where(key < 0, -1, np.searchsorted(keys, key)) for key in (true_key, predicted_key))
    counts = tally(matching, true, predicted, len(keys))
    ends = np.searchsorted(keys, np.arange(parts + 1) * n)
    for start, end in itertools.pairwise(ends.tolist()):
        yield keys[start:end] % n, {name: values[start:end] for name, values in counts.items()}

"""Count what is in a data set: plain numbers, from which the screen, the JSON and the page are made.

When: ONCE, by `vlmdet inspect` and the first notebook; numpy only, no picture is opened. 100,000 rows take some seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from vlmdet.boxes import Boxes
from vlmdet.errors import ConfigError, DataError
from vlmdet.grounding.sizes import qwen_size
from vlmdet.records import DetectionDataset, Problem
from vlmdet.utils.text import one_line

GRID = 24
"""Rows and columns of the heatmap of centres."""

_EXACT = 300  # boxes of one picture up to which the covered area is exact


class Limits(NamedTuple):
    """How a model family resizes: area limits in pixels, and the side in pixels that becomes one image token."""

    min_pixels: int
    max_pixels: int
    factor: int


FAMILIES = {
    "tiny": Limits(16 * 28 * 28, 49 * 28 * 28, 28),
    "qwen2-vl": Limits(16 * 28 * 28, 1280 * 28 * 28, 28),
    "qwen2.5-vl": Limits(16 * 28 * 28, 1280 * 28 * 28, 28),
    "qwen3-vl": Limits(16 * 32 * 32, 1280 * 32 * 32, 32),
}
"""The limits that this tool trains each family under: 16 image tokens to 49 for the embedded base, 1,280 for the others."""


@dataclass(frozen=True)
class Histogram:
    """Counts between edges; what lies beyond the last edges is counted in the last bins.

    Attributes:
        edges: n + 1 numbers that grow.
        counts: n numbers.
    """

    edges: list[float]
    counts: list[int]


@dataclass(frozen=True)
class Summary:
    """What is in a data set, as plain numbers; `as_dict` is what `inspect --json` prints.

    Attributes:
        source: what the user named.
        images: rows of all splits.
        boxes: of all rows.
        empty: rows without a box.
        splits: split -> {"images", "boxes", "empty"}.
        classes: {"name", "boxes", "images"} of each class, the most frequent first.
        box_format: e.g. `xyxy/pixel`.
        decided_by: why that format.
        notes: what was chosen on the way.
        limits: {"min_pixels", "max_pixels", "factor"} under which the model's figures stand.
        quantiles: figure -> {"n", "min", "p5", "p50", "p95", "p99", "max"}, empty where n is 0. Per picture `tokens`
            (image tokens after the resize), `boxes_per_image`, `coverage` (share that its boxes cover together),
            `megapixels`; per box `box_side` (square root of its share of the picture), `aspect_ratio` (width / height in
            pixels), `model_side` (square root of its area in pixels of the resized picture).
        histograms: the same figures, but for `megapixels`.
        under_one_patch: share of boxes whose `model_side` is under one factor, so smaller than one image token.
        under_two_patches: under two factors, so smaller than two by two image tokens.
        centers: GRID x GRID counts of box centres, rows from top to bottom.
        picture_sizes: {"width", "height", "images"} of the 100 most frequent sizes.
        problems: kind -> action -> count.
        rows_dropped: rows that `train` would leave out.
    """

    source: str
    images: int
    boxes: int
    empty: int
    splits: dict[str, dict[str, int]]
    classes: list[dict[str, Any]]
    box_format: str
    decided_by: str
    notes: list[str]
    limits: dict[str, int]
    quantiles: dict[str, dict[str, float]]
    histograms: dict[str, Histogram]
    under_one_patch: float
    under_two_patches: float
    centers: list[list[int]]
    picture_sizes: list[dict[str, int]]
    problems: dict[str, dict[str, int]]
    rows_dropped: int

    def as_dict(self) -> dict[str, Any]:
        """Return plain lists, mappings and numbers, ready for JSON."""
        return asdict(self)


def check_limits(limits: Limits) -> Limits:
    """Return limits that can work; a command asks before it opens anything.

    Raises:
        ConfigError: they are not 0 < min_pixels <= max_pixels with a positive factor.
    """
    if not 0 < limits.min_pixels <= limits.max_pixels or limits.factor < 1:
        raise ConfigError(
            f"pixel limits {limits.min_pixels} to {limits.max_pixels} by {limits.factor}",
            "0 < --min-pixels <= --max-pixels, and --factor is 28 or 32",
        )
    return limits


def summarise(dataset: DetectionDataset, *, limits: Limits = FAMILIES["qwen2-vl"]) -> Summary:
    """Count what is in a data set.

    When: once per `inspect`; every row is visited once, and no picture is opened.

    Input: a `dataset`, whose `problems` are counted as they stand; `limits` of the model that shall see it.
    Output: a `Summary`. A row without a known size (its picture cannot be read), and one so long that the family's
    processor refuses it, count as rows, and are left out of every figure in model pixels.

    Raises:
        ConfigError: as `check_limits`.
    """
    check_limits(limits)
    splits: dict[str, dict[str, int]] = {}
    boxes_of: Counter[str] = Counter(dict.fromkeys(dataset.labels, 0))
    images_of: Counter[str] = Counter()
    sizes, resized, counts, corners, coverage = [], [], [], [], []
    planned: dict[tuple[int, int], tuple[int, int]] = {}
    for split, samples in dataset.splits.items():
        here = splits.setdefault(split, {"images": 0, "boxes": 0, "empty": 0})
        for sample in samples:
            here["images"] += 1
            here["boxes"] += len(sample.labels)
            here["empty"] += not sample.labels
            boxes_of.update(sample.labels)
            images_of.update(set(sample.labels))
            size = (sample.width, sample.height)
            if size not in planned:
                planned[size] = _resized(size, limits)
            sizes.append(size)
            resized.append(planned[size])
            counts.append(len(sample.labels))
            corners.append(sample.boxes.clip().xyxy)
            coverage.append(covered(sample.boxes))
    images, boxes = len(sizes), sum(counts)
    size_of = np.array(sizes, dtype=np.float64).reshape(-1, 2)
    seen_as = np.array(resized, dtype=np.float64).reshape(-1, 2)
    xyxy = np.concatenate([np.zeros((0, 4)), *corners])
    sides = (xyxy[:, 2:] - xyxy[:, :2]).clip(min=0)
    real, model = sides * np.repeat(size_of, counts, axis=0), sides * np.repeat(seen_as, counts, axis=0)
    drawable, seen = real.min(axis=1, initial=np.inf) > 0, model.min(axis=1, initial=np.inf) > 0
    model_side = np.sqrt(model[seen].prod(axis=1))
    figures = {
        "tokens": seen_as[seen_as[:, 0] > 0].prod(axis=1) / limits.factor**2,
        "boxes_per_image": np.array(counts, dtype=np.float64),
        "coverage": np.array(coverage, dtype=np.float64),
        "megapixels": size_of[size_of.min(axis=1, initial=np.inf) > 0].prod(axis=1) / 1e6,
        "box_side": np.sqrt(sides.prod(axis=1)),
        "aspect_ratio": real[drawable, 0] / real[drawable, 1],
        "model_side": model_side,
    }
    return Summary(
        source=dataset.source,
        images=images,
        boxes=boxes,
        empty=sum(not count for count in counts),
        splits=splits,
        classes=[{"name": name, "boxes": number, "images": images_of[name]} for name, number in boxes_of.most_common()],
        box_format=str(dataset.box_format),
        decided_by=dataset.decided_by,
        notes=list(dataset.notes),
        limits=limits._asdict(),
        quantiles={name: _quantiles(values) for name, values in figures.items()},
        histograms={name: _histogram(name, values) for name, values in figures.items() if name != "megapixels"},
        under_one_patch=_share(model_side < limits.factor),
        under_two_patches=_share(model_side < 2 * limits.factor),
        centers=_centers(xyxy),
        picture_sizes=[
            {"width": width, "height": height, "images": number}
            for (width, height), number in Counter(sizes).most_common(100)
        ],
        problems=count_problems(dataset.problems),
        rows_dropped=len({(one.file, one.row, one.id) for one in dataset.problems if one.action == "row_dropped"}),
    )


def _resized(size: tuple[int, int], limits: Limits) -> tuple[int, int]:
    """Return width and height after the resize; 0, 0 where there is no size, or the processor refuses it."""
    if min(size) < 1:
        return 0, 0
    try:
        return qwen_size(*size, min_pixels=limits.min_pixels, max_pixels=limits.max_pixels, factor=limits.factor)
    except DataError:
        return 0, 0


def covered(boxes: Boxes) -> float:
    """Return the share of a picture, 0 to 1, that lies in at least one of its boxes.

    The boxes' edges cut the picture into cells, and the boxes over each are counted; over 300 boxes are rounded to
    thousandths first, which bounds the cells.
    """
    xyxy = boxes.clip().xyxy
    if len(xyxy) > _EXACT:
        xyxy = xyxy.round(3)
    xyxy = xyxy[(xyxy[:, 2:] > xyxy[:, :2]).all(axis=1)]
    if len(xyxy) < 2:
        return float((xyxy[:, 2:] - xyxy[:, :2]).prod(axis=1).sum())
    xs, ys = np.unique(xyxy[:, [0, 2]]), np.unique(xyxy[:, [1, 3]])
    left, right = np.searchsorted(xs, xyxy[:, 0]), np.searchsorted(xs, xyxy[:, 2])
    top, bottom = np.searchsorted(ys, xyxy[:, 1]), np.searchsorted(ys, xyxy[:, 3])
    change = np.zeros((len(ys), len(xs)))
    for rows, columns, step in ((top, left, 1), (top, right, -1), (bottom, left, -1), (bottom, right, 1)):
        np.add.at(change, (rows, columns), step)
    inside = change.cumsum(axis=0).cumsum(axis=1)[:-1, :-1] > 0.5
    return float(np.diff(ys) @ inside @ np.diff(xs))


def count_problems(problems: Iterable[Problem]) -> dict[str, dict[str, int]]:
    """Count problems by kind and action, the most frequent kind first."""
    kinds: dict[str, Counter[str]] = {}
    for problem in problems:
        kinds.setdefault(problem.kind, Counter())[problem.action] += 1
    return {kind: dict(kinds[kind]) for kind in sorted(kinds, key=lambda kind: (-kinds[kind].total(), kind))}


def _quantiles(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {"n": 0}
    found = np.percentile(values, [0, 5, 50, 95, 99, 100])
    return {
        "n": len(values),
        **dict(zip(("min", "p5", "p50", "p95", "p99", "max"), found.round(6).tolist(), strict=True)),
    }


def _share(mask: np.ndarray) -> float:
    return round(float(mask.mean()), 6) if len(mask) else 0.0


def _histogram(name: str, values: np.ndarray) -> Histogram:
    top = float(values.max(initial=1))
    if name == "boxes_per_image":
        edges = np.arange(int(top) + 2) - 0.5 if top <= 40 else np.linspace(-0.5, np.ceil(top) + 0.5, 31)
    elif name in ("coverage", "box_side"):
        edges = np.linspace(0, 1, 21)
    elif name == "aspect_ratio":
        edges = 2.0 ** np.linspace(-4, 4, 25)
    elif name == "model_side":
        edges = 2.0 ** np.arange(1, 12.5, 0.5)
    else:
        low = float(values.min(initial=top))
        margin = 0.5 if low < top else 0.1 * top  # one value alone gets a bar, not a wall
        edges = np.linspace(low - margin, top + margin, max(9, min(25, int(top - low) + 2)))
    return Histogram(edges.tolist(), np.histogram(values.clip(edges[0], edges[-1]), edges)[0].tolist())


def _centers(xyxy: np.ndarray) -> list[list[int]]:
    places = (((xyxy[:, :2] + xyxy[:, 2:]) / 2) * GRID).astype(np.int64).clip(0, GRID - 1)
    grid = np.zeros((GRID, GRID), dtype=np.int64)
    np.add.at(grid, (places[:, 1], places[:, 0]), 1)
    return [[int(count) for count in row] for row in grid]


# --- the screen -------------------------------------------------------------------------------------------------------


def format_summary(summary: Summary, *, most_classes: int = 12, most_kinds: int = 12) -> str:
    """Word a summary as one screen of text.

    When: once per `inspect`. Texts of the data set are made one line without control characters.
    """
    limits, quantiles = summary.limits, summary.quantiles
    unused = sum(not one["boxes"] for one in summary.classes)
    lines = [
        f"{one_line(summary.source)}: {summary.images:,} pictures, {summary.boxes:,} boxes, "
        f"{len(summary.classes)} class{'es' if len(summary.classes) != 1 else ''}"
        + (f" ({unused} without a box)" if unused else ""),
        f"boxes read as {summary.box_format} ({one_line(summary.decided_by, 400)})",
        *(one_line(note, 400) for note in summary.notes),
        "",
    ]
    lines += _columns(
        ("split", "pictures", "without a box", "boxes"),
        [
            (one_line(name), f"{here['images']:,}", f"{here['empty']:,}", f"{here['boxes']:,}")
            for name, here in summary.splits.items()
        ],
    )
    shown = summary.classes[:most_classes]
    lines += ["", *_columns(("class", "boxes", "in pictures"), [_class_row(one) for one in shown])]
    if len(summary.classes) > len(shown):
        rest = summary.classes[most_classes:]
        lines.append(f"  and {len(rest)} more classes with {sum(one['boxes'] for one in rest):,} boxes")
    lines += [
        "",
        f"megapixels:         {_spread(quantiles['megapixels'], '.2f')}",
        f"boxes a picture:    {_spread(quantiles['boxes_per_image'], '.0f')}",
        f"image tokens:       {_spread(quantiles['tokens'], ',.0f')}",
        f"                    at {limits['min_pixels']:,} to {limits['max_pixels']:,} pixels, "
        f"{limits['factor']} x {limits['factor']} a token",
        f"small for a model:  {summary.under_one_patch:.1%} of the boxes are smaller than one image token, "
        f"{summary.under_two_patches:.1%} than two by two",
        "",
        *_problem_lines(summary, most_kinds),
    ]
    return "\n".join(lines)


def _class_row(one: dict[str, Any]) -> tuple[str, str, str]:
    return one_line(one["name"], 40), f"{one['boxes']:,}", f"{one['images']:,}"


def _spread(found: dict[str, float], form: str) -> str:
    if not found["n"]:
        return "none"
    return ", ".join(f"{name} {found[name]:{form}}" for name in ("p50", "p95", "p99", "max"))


def _problem_lines(summary: Summary, most: int) -> list[str]:
    if not summary.problems:
        return ["problems: none"]
    actions = sorted({action for counts in summary.problems.values() for action in counts})
    rows = [
        (kind, *(f"{counts.get(action, 0):,}" for action in actions))
        for kind, counts in list(summary.problems.items())[:most]
    ]
    lines = _columns(("problem", *(action.replace("_", " ") for action in actions)), rows)
    if len(summary.problems) > most:
        lines.append(f"  and {len(summary.problems) - most} more kinds")
    if summary.rows_dropped:
        lines.append(f"  {summary.rows_dropped:,} rows would be dropped by train")
    return lines


def _columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay out a table: first column to the left, numbers to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in (head, *rows)
    ]

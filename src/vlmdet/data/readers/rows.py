"""What every reader does with a row: check its boxes, guard its paths, put the splits together.

When: ONCE, by the readers of this folder.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from vlmdet.boxes import Boxes, BoxFormat
from vlmdet.errors import DataError, did_you_mean
from vlmdet.records import DetectionDataset, Problem, Sample

ROUNDING = 1e-6
"""Boxes that leave the picture by no more than this share of it are cut without a report: float32 does that."""

Report = Callable[[int | None, str, str, str], None]
"""Takes row, kind, detail, action of a problem; file and id are known."""


@dataclass
class SplitRows:
    """Samples and problems of one split while it is read."""

    samples: list[Sample] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def reporter(self, file: str, sample_id: str) -> Report:
        """Return a function that notes a problem of one row."""

        def report(row: int | None, kind: str, detail: str, action: str) -> None:
            self.problems.append(Problem(file, row, sample_id, kind, detail, action))

        return report


def check_boxes(
    values: Sequence[Any],
    labels: Sequence[str],
    box_format: BoxFormat,
    width: int,
    height: int,
    report: Report,
    row: int | None = None,
) -> tuple[Boxes, tuple[str, ...]]:
    """Keep the boxes that can be used, cut those that stick out, report each that is changed or dropped.

    Input: n `values` in `box_format` on a picture of `width` x `height` pixels, with n `labels`; `row` for the reports,
    where None stands for the number of the box, from 1.
    Output: the boxes kept, inside the picture and of positive area, and their labels.
    """
    kept: list[np.ndarray] = []
    names: list[str] = []
    for number, (value, label) in enumerate(zip(values, labels, strict=True), start=1):
        place = number if row is None else row
        numbers = _four_numbers(value)
        if numbers is None:
            report(
                place, "bad_box", f"box {number} ({label}) is not four finite numbers: {str(value)[:80]}", "box_dropped"
            )
            continue
        box = Boxes.from_array([numbers], box_format, width, height)
        x1, y1, x2, y2 = box.xyxy[0]
        said = f"box {number} ({label}): {numbers} as {box_format} on {width} x {height}"
        if x1 > x2 or y1 > y2:
            report(place, "reversed_box", f"{said} ends before it begins", "box_dropped")
        elif x1 == x2 or y1 == y2:
            report(place, "degenerate_box", f"{said} has no area", "box_dropped")
        elif x2 <= 0 or y2 <= 0 or x1 >= 1 or y1 >= 1:
            report(place, "box_outside", f"{said} lies outside the picture", "box_dropped")
        else:
            if min(x1, y1) < -ROUNDING or max(x2, y2) > 1 + ROUNDING:
                report(place, "box_outside", f"{said} sticks out of the picture", "box_clipped")
            kept.append(box.clip().xyxy[0])
            names.append(label)
    boxes = Boxes.from_array(kept, BoxFormat("xyxy", "fraction"), width, height)
    return boxes, tuple(names)


def safe_path(folder: Path, name: str, root: Path) -> Path | None:
    """Return `folder / name` where it stays below `root`; None where it does not, or can be no path at all.

    The test is made on the names, not on where links lead: links to a store are common among data sets and are the
    user's own, while `../../etc/passwd` and `/etc/passwd` come from the file.
    """
    name = name.replace("\\", "/")
    if not name or any(ord(letter) < 32 for letter in name) or PurePosixPath(name).is_absolute() or ":" in name[:2]:
        return None
    if any(len(part.encode(errors="replace")) > 255 for part in name.split("/")) or len(name) > 2000:
        return None  # longer than a file system allows
    path, base = Path(os.path.abspath(folder / name)), Path(os.path.abspath(root))
    return path if path != base and path.is_relative_to(base) else None


def assemble(
    source: str,
    splits: dict[str, SplitRows],
    labels: Iterable[str],
    box_format: BoxFormat,
    decided_by: str,
    *,
    split: str | None = None,
    notes: Sequence[str] = (),
) -> DetectionDataset:
    """Put splits together; with `split`, keep that one, its problems, and all class names.

    Raises:
        DataError: there is no such split.
    """
    if split is not None and split not in splits:
        raise DataError(f"{source} has no split '{split}'", did_you_mean(split, splits))
    wanted = {name: rows for name, rows in splits.items() if split in (None, name)}
    return DetectionDataset(
        source=source,
        splits={name: rows.samples for name, rows in wanted.items()},
        labels=tuple(labels),
        box_format=box_format,
        decided_by=decided_by,
        problems=[problem for rows in wanted.values() for problem in rows.problems],
        notes=tuple(notes),
    )


def _four_numbers(value: Any) -> list[float] | None:
    try:
        numbers = [float(number) for number in value]
    except (TypeError, ValueError, OverflowError):
        return None
    return numbers if len(numbers) == 4 and all(map(math.isfinite, numbers)) else None

"""Decide order and unit of boxes from the numbers of a whole set, or say which readings remain.

When: ONCE per data set whose format does not define how boxes are written.

There are twelve readings, four orders in three units. Under a wrong one many boxes end before they begin or leave their
picture; under the right one none does, give or take a careless annotator. So a reading is *out* where it misfits often,
it *fits* where it hardly ever does, and a format is decided where one reading fits and all others are out. The thresholds
below ask for a wide margin between the two, so that what is decided is right, and what is close is left to the user.

Two units need more. Numbers that stay below a picture's size also stay below 1000 where pictures are small, and the
other way round: then the edges tell. Objects that a picture's border cuts end exactly at it, so boxes pile up at 640
where pictures are 640 wide, and at 1000 where a thousandth is the unit. And a reading that is left over because others
are out must reach its own far borders: pixels of a picture that somebody scaled afterwards fit `per_mille` by accident.

`xyxy` and `yxyx` in fractions or thousandths forbid the same boxes, so the numbers never tell them apart; nor do pixels
of square pictures. That boxes look more natural, wide or tall, under one reading is no evidence and is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlmdet.boxes import FORMATS, BoxFormat, Unit, corners

SLACK: dict[Unit, float] = {"pixel": 1.5, "fraction": 0.002, "per_mille": 2.0}
"""A box that leaves its picture by no more is no misfit: counting from 1, and rounding, do that."""

LEAST = 8
"""Misfits without which no reading is out, however few boxes there are."""

OUT = 0.1
"""Share of the boxes that must misfit for a reading to be out."""

FITS = 0.002
"""Share of the boxes that may misfit under the reading that is right."""

PICTURES = 3
"""Misfits must lie in this many pictures, and in all there are if these are fewer: one file may be odd."""

REACH = 0.9
"""The right reading has boxes that end beyond this share of their picture's width, and of its height."""

TOUCHING = 0.01
"""Share of the boxes, and `LEAST` of them, that end at the right border, and at the lower one, for a pile-up."""


@dataclass(frozen=True)
class Reading:
    """How the boxes of a set look under one reading.

    Attributes:
        box_format: the reading.
        reversed: boxes that end before they begin.
        outside: boxes that leave their picture, or that lie whole within its first two units.
        pictures: pictures that hold a misfit.
        reaches: whether boxes come near the right and the lower border.
        piles_up: whether boxes end exactly at all four borders.
    """

    box_format: BoxFormat
    reversed: int
    outside: int
    pictures: int
    reaches: bool
    piles_up: bool

    @property
    def misfits(self) -> int:
        """Boxes that cannot be meant; one that is both reversed and outside counts as reversed."""
        return self.reversed + self.outside


@dataclass(frozen=True)
class Decision:
    """What the numbers say.

    Attributes:
        box_format: the reading that they leave, or None.
        reason: one line.
        possible: readings that they do not rule out.
        table: the evidence, lines of text.
    """

    box_format: BoxFormat | None
    reason: str
    possible: tuple[BoxFormat, ...]
    table: tuple[str, ...]


def misfits(values: np.ndarray, box_format: BoxFormat, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tell which boxes cannot be meant under a reading.

    Input: `values` (n, 4) float64, finite; `sizes` (n, 2), width and height of each box's picture in pixels, where a
    size of 0 is unknown and no limit.
    Output: two masks (n,): reversed; outside and not reversed.
    """
    read, limits, slack = corners(values, box_format.order), _limits(box_format.unit, sizes), SLACK[box_format.unit]
    is_reversed = (read[:, 2] < read[:, 0]) | (read[:, 3] < read[:, 1])
    beyond = (read < -slack).any(axis=1) | (read[:, 2:] > limits + slack).any(axis=1)
    if box_format.unit != "fraction":
        beyond |= read[:, 2:].max(axis=1) < 2  # fractions read as pixels: a speck in the corner
    return is_reversed, beyond & ~is_reversed


def _limits(unit: Unit, sizes: np.ndarray) -> np.ndarray:
    if unit == "pixel":
        return np.where(sizes > 0, sizes, np.inf)
    return np.full(sizes.shape, 1.0 if unit == "fraction" else 1000.0)


def look(values: np.ndarray, box_format: BoxFormat, sizes: np.ndarray, owners: np.ndarray) -> Reading:
    """Count what a reading forbids and what speaks for it; `owners` (n,) numbers each box's picture."""
    is_reversed, beyond = misfits(values, box_format, sizes)
    bad = is_reversed | beyond
    read, limits = corners(values, box_format.order)[~bad], _limits(box_format.unit, sizes)[~bad]
    least = max(LEAST, TOUCHING * len(values))
    slack = 0.0011 if box_format.unit == "fraction" else 1.1
    with np.errstate(invalid="ignore"):
        reaches = bool(((read[:, 2:] >= REACH * limits).sum(axis=0) >= PICTURES).all())
        at_end = (np.abs(read[:, 2:] - limits) <= slack).sum(axis=0)
    at_start = (np.abs(read[:, :2]) <= slack).sum(axis=0)
    piles_up = bool((at_end >= least).all() and (at_start >= PICTURES).all())
    return Reading(
        box_format, int(is_reversed.sum()), int(beyond.sum()), len(np.unique(owners[bad])), reaches, piles_up
    )


def decide(
    values: np.ndarray, sizes: np.ndarray, owners: np.ndarray, allowed: Sequence[BoxFormat] = FORMATS
) -> Decision:
    """Decide how boxes are written, or refuse to.

    When: once per data set, over all of its boxes.

    Input: `values` (n, 4) float64, finite, as written; `sizes` (n, 2), width and height in pixels of each box's upright
    picture; `owners` (n,), the number of its picture; `allowed`, readings that the format's own words leave open.
    Output: a `Decision`; without boxes it takes the first that is allowed.
    """
    if not len(values):
        return Decision(allowed[0], "there is no box to tell", tuple(allowed), ())
    readings = [look(values, box_format, sizes, owners) for box_format in allowed]
    best = min(reading.misfits for reading in readings)
    enough = max(LEAST, OUT * len(values), min(10 * best, 0.9 * len(values)))
    spread = min(PICTURES, len(np.unique(owners)))
    left = [one for one in readings if one.misfits < enough or one.pictures < spread]
    left = sorted(_by_border(left), key=lambda one: one.misfits)
    possible = tuple(one.box_format for one in left)
    table = _table(readings, left, values, owners)
    if len(left) != 1:
        return Decision(None, "several readings fit" if left else "no reading fits", possible, table)
    (one,) = left
    if one.misfits > FITS * len(values):
        return Decision(None, f"{one.misfits} boxes misfit even under {one.box_format}", possible, table)
    if one.box_format.unit != "fraction" and len(allowed) > 1 and not one.reaches:
        said = f"{one.box_format} is left, but no box comes near the right or lower border"
        return Decision(None, said, possible, table)
    others = [other.misfits for other in readings if other.box_format.unit == one.box_format.unit and other is not one]
    how = f"{one.misfits} of {len(values)} boxes misfit"
    rest = f", {min(others)} or more under every other order" if others else ""
    return Decision(one.box_format, f"decided by the numbers: {how}{rest}", possible, table)


def _by_border(left: list[Reading]) -> list[Reading]:
    """Keep one of the units pixel and per mille where its boxes pile up at the borders and the other's do not."""
    units = {one.box_format.unit for one in left}
    if not {"pixel", "per_mille"} <= units:
        return left
    piled = {one.box_format.unit for one in left if one.piles_up and one.misfits == 0}
    if len(piled) != 1:
        return left
    return [one for one in left if one.box_format.unit in piled]


def _table(
    readings: Sequence[Reading], left: Sequence[Reading], values: np.ndarray, owners: np.ndarray
) -> tuple[str, ...]:
    kind = "whole numbers" if (values == np.rint(values)).all() else "numbers with decimals"
    lines = [
        f"{len(values)} boxes in {len(np.unique(owners))} pictures; {kind} from {values.min():g} to {values.max():g}",
        f"{'reading':<18}{'reversed':>10}{'outside':>10}{'at borders':>12}  ",
    ]
    for one in readings:
        fate = "possible" if one in left else "out"
        borders = "yes" if one.piles_up else "no"
        lines.append(f"{one.box_format!s:<18}{one.reversed:>10}{one.outside:>10}{borders:>12}  {fate}")
    return tuple(lines)

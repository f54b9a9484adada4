"""What is odd about boxes, found for all boxes of a set at once.

When: ONCE, by `rows.Rows.finish`. Dropped: reversed, without area, outside the picture. Cut: what sticks out of it.
Kept and reported: nearly the whole picture, tiny, the same box twice.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

ROUNDING = 1e-6
"""Boxes that leave the picture by no more than this share of it are cut without a report: float32 does that."""

DUPLICATE_IOU = 0.95
"""Above this IoU two boxes of one label on one picture are reported as the same."""

TINY_SIDE = 0.005
"""A box with a side below this share of the picture's is reported: rounding to a grid of 1000 moves it by a tenth."""

WHOLE_AREA = 0.98
"""A box that covers more than this share of the picture is reported: often a missing box, written as the picture."""

LEAST_INSIDE = 0.01
"""A box of which less lies on the picture is not cut but left out: it is no object of this picture."""


class Finding(NamedTuple):
    """One oddity: `mask` (n,) tells which boxes have it, the rest are parts of their `Problem`."""

    mask: np.ndarray
    kind: str
    what: str
    action: str


def check_boxes(
    xyxy: np.ndarray, usable: np.ndarray, owners: np.ndarray, numbers: np.ndarray
) -> tuple[np.ndarray, list[Finding]]:
    """Cut boxes to their pictures and find those that are odd.

    When: once per data set.

    Input: `xyxy` (n, 4) float64, fractions, cut in place; `usable` (n,), boxes whose rows are not left out anyway;
    `owners` (n,), number of each box's picture; `numbers` (n,), of its class.
    Output: a mask (n,) of boxes that can be used, inside their picture and of positive area; what was found.
    """
    xyxy[~np.isfinite(xyxy).all(axis=1)] = (2.0, 2.0, 3.0, 3.0)  # numbers so large that their sum is infinite
    low, high = xyxy[:, :2], xyxy[:, 2:]
    is_reversed = usable & (low > high).any(axis=1)
    is_flat = usable & (low == high).any(axis=1) & ~is_reversed
    whole_boxes = usable & ~is_reversed & ~is_flat
    with np.errstate(over="ignore", under="ignore"):
        areas = (high - low).prod(axis=1)
    inside = (high.clip(0, 1) - low.clip(0, 1)).prod(axis=1)
    shares = np.divide(inside, areas, where=areas > 0, out=np.ones(len(xyxy)))
    is_outside = whole_boxes & (((high <= 0) | (low >= 1)).any(axis=1) | (shares < LEAST_INSIDE))
    keep = whole_boxes & ~is_outside
    sticks_out = ((low < -ROUNDING) | (high > 1 + ROUNDING)).any(axis=1)
    np.clip(xyxy, 0.0, 1.0, out=xyxy)
    sides = high - low
    is_lost = keep & (sides <= 0).any(axis=1)  # it touches the border by less than a float can hold
    keep &= ~is_lost
    whole, tiny = keep & (sides.prod(axis=1) > WHOLE_AREA), keep & (sides.min(axis=1, initial=1.0) < TINY_SIDE)
    twins = find_twins(xyxy, keep, owners, numbers)
    outside = "lies outside the picture, or all but a hundredth of it does"
    return keep, [
        Finding(is_reversed, "reversed_box", "ends before it begins", "box_dropped"),
        Finding(is_flat | is_lost, "degenerate_box", "has no area", "box_dropped"),
        Finding(is_outside, "box_outside", outside, "box_dropped"),
        Finding(keep & sticks_out, "box_outside", "sticks out of the picture", "box_clipped"),
        Finding(whole, "whole_image_box", f"covers more than {WHOLE_AREA:.0%} of the picture", "kept"),
        Finding(tiny, "tiny_box", f"has a side below {TINY_SIDE:.1%} of the picture's", "kept"),
        Finding(twins, "duplicate_box", f"is another box of its picture and label (IoU > {DUPLICATE_IOU})", "kept"),
    ]


def find_twins(xyxy: np.ndarray, keep: np.ndarray, owners: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Mark boxes that cover nearly what an earlier box of their picture and label covers.

    Boxes are compared along their left edges: over IoU .95 these differ by less than a twentieth of the width.

    Input: as `check_boxes`; only boxes of `keep` are compared.
    Output: a mask (n,).
    """
    order = np.flatnonzero(keep)
    order = order[np.lexsort((xyxy[order, 0], numbers[order], owners[order]))]
    is_twin = np.zeros(len(xyxy), dtype=bool)
    first, step = np.arange(len(order)), 0
    while len(first):
        step += 1
        first = first[first + step < len(order)]
        a, b = order[first], order[first + step]
        near = (owners[a] == owners[b]) & (numbers[a] == numbers[b])
        near &= xyxy[b, 0] - xyxy[a, 0] <= (1 - DUPLICATE_IOU) * (xyxy[a, 2] - xyxy[a, 0])
        first, one, other = first[near], xyxy[a[near]], xyxy[b[near]]
        sides = np.minimum(one[:, 2:], other[:, 2:]) - np.maximum(one[:, :2], other[:, :2])
        both = sides.clip(min=0).prod(axis=1)
        union = (one[:, 2:] - one[:, :2]).prod(axis=1) + (other[:, 2:] - other[:, :2]).prod(axis=1) - both
        is_twin[np.maximum(a, b)[near][both > DUPLICATE_IOU * union]] = True
        first = first[~is_twin[order[first]]]  # what equals an earlier box has been compared by it
    return is_twin

"""Parsers of known make on targets written by hand."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from vlmdet.doctor.checks.round_trip import Target, read_back

BOXES = np.asarray([[0.1, 0.2, 0.6, 0.3], [0.3, 0.5, 0.5, 0.95]])


def write(boxes: np.ndarray) -> str:
    grid = (boxes * 1000).round().astype(int)
    return "".join(f"cup<|box_start|>({a},{b}),({c},{d})<|box_end|>" for a, b, c, d in grid)


TARGETS = [
    Target("row 0", write(BOXES[:1]), 640, 480, (644, 476), BOXES[:1]),
    Target("row 1", write(BOXES), 300, 900, (308, 896), BOXES),
]
NUMBERS = re.compile(r"\((\d+),(\d+)\),\((\d+),(\d+)\)")


def every(text: str) -> list[list[int]]:
    return [[int(part) for part in found] for found in NUMBERS.findall(text)]


def pixels(text: str, width: int, height: int) -> list[list[float]]:
    return [[a * width / 1000, b * height / 1000, c * width / 1000, d * height / 1000] for a, b, c, d in every(text)]


@pytest.mark.parametrize(("parse", "space"), [(every, "per_mille"), (pixels, "pixel")])
def test_right_parsers_read_everything_back(parse: Any, space: str) -> None:
    found = read_back(parse, TARGETS)
    assert found.iou > 0.98 and str(found.space) == f"xyxy/{space}"
    assert (found.found, found.wanted, found.failure) == (3, 3, "")


def test_the_first_box_alone() -> None:
    found = read_back(lambda text: every(text)[:1], TARGETS)
    assert found.per_row == ((1, 1), (1, 2))
    assert found.worst == (TARGETS[1], "[[100.0, 200.0, 600.0, 300.0]]")
    assert (found.found, found.wanted) == (2, 3) and found.iou > 0.98  # of those that came back


def test_swapped_axes_and_a_size_for_the_far_corner() -> None:
    swapped = read_back(lambda text: [[b, a, d, c] for a, b, c, d in every(text)], TARGETS)
    assert str(swapped.space) == "yxyx/per_mille" and swapped.iou > 0.98
    sized = read_back(lambda text: [[a, b, c - a, d - b] for a, b, c, d in every(text)], TARGETS)
    assert str(sized.space) == "xywh/per_mille"


def test_the_resized_picture() -> None:
    def resized(text: str, width: int, height: int) -> list[list[float]]:
        sides = {640: (644, 476), 300: (308, 896)}[width]
        return pixels(text, *sides)

    assert str(read_back(resized, TARGETS).space) == "xyxy/resized"


def test_what_it_raises_is_told_with_its_line() -> None:
    def broken(text: str) -> list[Any]:
        raise ValueError("no box in the text")

    found = read_back(broken, TARGETS)
    assert found.found == 0 and found.iou == 0.0
    assert found.failure.startswith("ValueError: no box in the text at ") and "in broken" in found.failure

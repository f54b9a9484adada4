"""Qwen2-VL's way to write boxes: integers on a grid of 0 to 1000, whatever the size of the picture.

    <|object_ref_start|>the eyes<|object_ref_end|><|box_start|>(382,150),(578,302)<|box_end|>

Several boxes follow one another, each with its name, or several boxes after one name. The first Qwen-VL wrote
`<ref>the eyes</ref><box>(382,150),(578,302)</box>`, which is read too. Decoding with `skip_special_tokens=True` deletes the
markers and leaves `the eyes(382,150),(578,302)`; that is read as well.

Source: the Qwen2-VL model card and a maintainer's answer in QwenLM/Qwen3-VL#105.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from vlmdet.boxes import Boxes, BoxFormat
from vlmdet.grounding.codec import (
    Parsed,
    ParseProblem,
    View,
    escape_label,
    is_none_answer,
    strip_control,
    unescape_label,
)
from vlmdet.grounding.prompts import NONE_ANSWER

NAME = "qwen2_vl"
VERSION = "qwen2_vl-1"
GRID = 1000
_FORMAT = BoxFormat("xyxy", "per_mille")

# Possessive quantifiers keep this linear: no character can be given back.
_NUMBER = r"[-+]?+\d++(?:\.\d++)?+"
_POINT = rf"[(（]\s*+({_NUMBER})\s*+[,，、]\s*+({_NUMBER})\s*+[)）]"
_POINTS = re.compile(rf"{_POINT}(?:\s*+(?:[,，、]\s*+)?+{_POINT})*+")
_ONE_POINT = re.compile(_POINT)
_NAMED = re.compile(r"<\|object_ref_start\|>(.*?)<\|object_ref_end\|>|<ref>(.*?)</ref>", re.DOTALL)
_TAGS = re.compile(r"</?+(?:ref|box|quad)>")


def encode(labels: Sequence[str], boxes: Boxes, view: View) -> str:
    """Write boxes as the family does.

    When: once per row.

    Input: n `labels` and n `boxes`, in the order to be written; `view` is not needed by this family.
    Output: `<|object_ref_start|>label<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>` n times, numbers rounded
    to the grid and cut to 0..1000; `none` for no box.

    Raises:
        ValueError: labels and boxes differ in number.
    """
    grid = np.rint(boxes.xyxy * GRID).clip(0, GRID).astype(int)
    parts = [
        f"<|object_ref_start|>{escape_label(label)}<|object_ref_end|><|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"
        for label, (x1, y1, x2, y2) in zip(labels, grid, strict=True)
    ]
    return "".join(parts) or NONE_ANSWER


def parse(text: str, view: View) -> Parsed:
    """Read an answer; never raises, takes time in proportion to the length.

    When: once per answer.

    Input: `text`, with or without the control tokens, in the form of Qwen2-VL or of the first Qwen-VL; `view`.
    Output: `Parsed`. A reversed axis is swapped and reported; both reversed, or a number outside 0..1000, gives no box and
    a problem; four points give their bounding box and a problem.
    """
    rows: list[list[float]] = []
    labels: list[str | None] = []
    problems: list[ParseProblem] = []
    label: str | None = None
    end = 0
    for match in _POINTS.finditer(text):
        label = _label(text[end : match.start()], label)
        end = match.end()
        numbers = [[float(x), float(y)] for x, y in _ONE_POINT.findall(match.group())]
        row = _box(numbers, match.group(), problems)
        if row is not None:
            rows.append(row)
            labels.append(label)
    if re.search(r"<\|box_start\|>(?!.*<\|box_end\|>)|<box>(?!.*</box>)", text[end : end + 2000], re.DOTALL):
        problems.append(ParseProblem("truncated", text[end : end + 80]))
    boxes = Boxes.from_array(rows, _FORMAT, view.width, view.height)
    if rows:
        return Parsed(boxes, labels, problems, "ok")
    if is_none_answer(text):
        return Parsed(boxes, labels, problems, "none")
    problems.append(ParseProblem("no_box", text[:80]))
    return Parsed(boxes, labels, problems, "parse_failure")


def _label(between: str, last: str | None) -> str | None:
    """Read the name that stands before a box; nothing there means that the last name goes on."""
    named = None
    for named in _NAMED.finditer(between):
        pass
    if named is not None:
        return unescape_label(named[1] if named[1] is not None else named[2])
    plain = _TAGS.sub("", strip_control(between)).strip(" \t\r\n,，;；:：、.。")
    return unescape_label(plain) if plain else last


def _box(points: list[list[float]], text: str, problems: list[ParseProblem]) -> list[float] | None:
    """Make x1, y1, x2, y2 on the grid of the points of one group; None, with a problem, where that cannot be done."""
    detail = text[:80]
    if any(not 0 <= number <= GRID for point in points for number in point):
        problems.append(ParseProblem("out_of_grid", detail))
        return None
    if len(points) == 4:
        problems.append(ParseProblem("quad", detail))
        x, y = zip(*points, strict=True)
        return [min(x), min(y), max(x), max(y)]
    if len(points) != 2:
        problems.append(ParseProblem("point" if len(points) == 1 else "odd_point_count", detail))
        return None
    (x1, y1), (x2, y2) = points
    if x1 > x2 and y1 > y2:
        problems.append(ParseProblem("both_axes_reversed", detail))
        return None
    if x1 > x2 or y1 > y2:
        problems.append(ParseProblem("axis_swapped", detail))
    if x1 == x2 or y1 == y2:
        problems.append(ParseProblem("zero_area", detail))
    return [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]

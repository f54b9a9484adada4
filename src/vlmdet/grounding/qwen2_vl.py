"""Qwen2-VL's way to write boxes: integers on a grid of 0 to 1000, whatever the size of the picture.

    <|object_ref_start|>the eyes<|object_ref_end|><|box_start|>(382,150),(578,302)<|box_end|>

Several boxes follow one another, each with its name, or several boxes after one name. The first Qwen-VL wrote
`<ref>the eyes</ref><box>(382,150),(578,302)</box>`, which is read too. Decoding with `skip_special_tokens=True` deletes
the markers and leaves `the eyes(382,150),(578,302)`; that is read as well.

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
# A backslash and what it escapes are read first, as one piece: `\\(1,2)` belongs to a label.
_POINTS = re.compile(rf"\\[\\|(（]|(?P<points>{_POINT}(?:\s*+(?:[,，、]\s*+)?+{_POINT})*+)")
_NEXT_POINT = re.compile(rf"\s*+([,，、]?+)\s*+{_POINT}")
_TAGS = re.compile(r"</?+(?:ref|box|quad)>")


def encode(labels: Sequence[str], boxes: Boxes, view: View) -> str:
    """Write boxes as the family does.

    When: once per row.

    Input: n `labels` and n `boxes`, in the order to be written; `view` is not needed by this family.
    Output: `<|object_ref_start|>label<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>` n times, numbers
    rounded to the grid and cut to 0..1000; `none` for no box.

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
    Output: `Parsed`. A reversed axis is swapped and reported; both reversed, or a number outside 0..1000, gives no box
    and a problem; four points give their bounding box and a problem.
    """
    rows: list[list[float]] = []
    labels: list[str | None] = []
    problems: list[ParseProblem] = []
    label: str | None = None
    end = 0
    for match in _POINTS.finditer(text):
        run = match["points"]  # once: each look-up copies it
        if run is None:
            continue
        label = _label(text[end : match.start()], label)
        end = match.end()
        for points in _groups(run):
            row = _box(points, run, problems)
            if row is not None:
                rows.append(row)
                labels.append(label)
    if _opens(text[end:], "<|box_start|>", "<|box_end|>") or _opens(text[end:], "<box>", "</box>"):
        problems.append(ParseProblem("truncated", text[end : end + 80]))
    boxes = Boxes.from_array(rows, _FORMAT, view.width, view.height)
    if rows:
        return Parsed(boxes, labels, problems, "ok")
    if is_none_answer(text):
        return Parsed(boxes, labels, problems, "none")
    problems.append(ParseProblem("no_box", text[:80]))
    return Parsed(boxes, labels, problems, "parse_failure")


def _opens(text: str, start: str, end: str) -> bool:
    """Tell whether the last `start` of a text has no `end` after it."""
    return text.rfind(start) > text.rfind(end)


def _label(between: str, last: str | None) -> str | None:
    """Read the name that stands before a box; nothing there means that the last name goes on."""
    tags = [("<|object_ref_start|>", "<|object_ref_end|>"), ("<ref>", "</ref>")]
    # From the right, and only once for each tag: a search from the left is quadratic on a text of a million openings.
    for start_tag, end_tag in sorted(tags, key=lambda tag: -between.rfind(tag[1])):
        end = between.rfind(end_tag)
        start = between.rfind(start_tag, 0, max(end, 0))
        if end >= 0 and start >= 0:
            return unescape_label(between[start + len(start_tag) : end])
    plain = _TAGS.sub("", strip_control(between)).strip(" \t\r\n,，;；:：、.。")
    return unescape_label(plain) if plain else last


def _groups(text: str) -> list[list[list[float]]]:
    """Split a run of points into boxes.

    The corners of one box are joined by a comma. Without control tokens two boxes after one name stand side by side,
    `(1,2),(3,4)(5,6),(7,8)`: a missing comma starts the next box, unless the whole run is two points.
    """
    found = [(comma, [float(x), float(y)]) for comma, x, y in _NEXT_POINT.findall(text)]
    if len(found) == 2:
        return [[point for _, point in found]]
    groups: list[list[list[float]]] = []
    for comma, point in found:
        if comma and groups:
            groups[-1].append(point)
        else:
            groups.append([point])
    return groups


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

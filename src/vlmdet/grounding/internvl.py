"""InternVL's way to write boxes: lists on a grid of 0 to 1000, whatever the size of the picture.

    <ref>the dog</ref><box>[[221, 423, 569, 886]]</box>
    <ref>two cups</ref><box>[[10, 20, 110, 220], [300, 20, 410, 230]]</box>

The tags are control tokens of the family: decoded with `skip_special_tokens=True` the first answer is
`the dog[[221, 423, 569, 886]]`, which is read as well, up to blanks and commas at the ends of a name.

Source: OpenGVLab/InternVL#1084 and the grounding part of the family's documentation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlmdet.boxes import Boxes
from vlmdet.grounding.codec import Parsed, View, guard_label, unguard_label
from vlmdet.grounding.json_boxes import parse_json
from vlmdet.grounding.points import read_brackets
from vlmdet.grounding.prompts import NONE_ANSWER
from vlmdet.grounding.reading import Reading

NAME = "internvl"
VERSION = "internvl-1"
GRID = 1000


def encode(labels: Sequence[str], boxes: Boxes, view: View) -> str:
    """Write boxes as the family does.

    When: once per row.

    Input: n `labels` and n `boxes`, in the order to be written; `view` is not needed by this family.
    Output: `<ref>label</ref><box>[[x1, y1, x2, y2]]</box>` n times, numbers rounded to the grid; `none` for no box.

    Raises:
        ValueError: labels and boxes differ in number.
    """
    grid = np.rint(boxes.xyxy * GRID).clip(0, GRID).astype(int)
    parts = [
        f"<ref>{guard_label(label)}</ref><box>[[{x1}, {y1}, {x2}, {y2}]]</box>"
        for label, (x1, y1, x2, y2) in zip(labels, grid, strict=True)
    ]
    return "".join(parts) or NONE_ANSWER


def parse(text: str, view: View) -> Parsed:
    """Read an answer; never raises, takes time in proportion to the length.

    When: once per answer.

    Input: `text`, with or without the tags; `view`.
    Output: `Parsed`. Where the text is JSON with keys, it is read as such, with the problem `other_notation`.
    """
    reading = Reading(GRID, GRID)
    text = reading.cut(text)
    if "{" in text and "<box>" not in text:
        parsed = parse_json(text, x_limit=GRID, y_limit=GRID)
        if parsed.status == "ok":
            reading.problem("other_notation", text)
            parsed.problems.extend(reading.problems)
            return parsed
    read_brackets(text, reading, unguard_label)
    return reading.finish(text, empty=text.strip() == "[]")

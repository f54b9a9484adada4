"""Qwen2-VL's way to write boxes: integers on a grid of 0 to 1000, whatever the size of the picture.

    <|object_ref_start|>the eyes<|object_ref_end|><|box_start|>(382,150),(578,302)<|box_end|>

Several boxes follow one another, each with its name, or several boxes after one name. The first Qwen-VL wrote
`<ref>the eyes</ref><box>(382,150),(578,302)</box>`, which is read too. Decoding with `skip_special_tokens=True` deletes
the markers and leaves `the eyes(382,150),(578,302)`; that is read as well. Other answers that are read:

    nutrition-table<box>(328,133),(700,806)></box>
    <|object_ref_start|>缺封<|object_ref_end|>位于 <|box_start|>[345,279,377,314],[239,384,275,418]<|box_end|>
    <ref> Two apples</ref><box>(302,257),(582,671)</box><box>(603,252),(878,642)</box>

Source: the Qwen2-VL model card and a maintainer's answer in QwenLM/Qwen3-VL#105.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from vlmdet.boxes import Boxes
from vlmdet.grounding.codec import Parsed, View, escape_label, is_none_answer
from vlmdet.grounding.json_boxes import collect_boxes, says_nothing
from vlmdet.grounding.points import read_brackets, read_points
from vlmdet.grounding.prompts import NONE_ANSWER
from vlmdet.grounding.reading import Reading

NAME = "qwen2_vl"
VERSION = "qwen2_vl-1"
GRID = 1000

_LOOKS_LIKE_JSON = re.compile(r"[{｛]|[\"'“]\w{1,40}[\"'”]\s*+[:：]")


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
    and a problem; four points give their bounding box and a problem. Where no box stands in the family's notation, one in
    JSON or in brackets is taken from the same grid, with the problem `other_notation`.
    """
    reading = Reading(GRID, GRID)
    text = reading.cut(text)
    cut = list(reading.problems)
    read_points(text, reading)
    empty = False
    if not reading.candidates and not is_none_answer(text):
        for read in (collect_boxes, read_brackets) if _LOOKS_LIKE_JSON.search(text) else (read_brackets, collect_boxes):
            other = Reading(GRID, GRID, problems=list(cut))
            document = read(text, other)
            empty = empty or (document is not None and says_nothing(text, document))
            if other.candidates:
                other.problem("other_notation", text)
                return other.finish(text)
    return reading.finish(text, empty=empty)

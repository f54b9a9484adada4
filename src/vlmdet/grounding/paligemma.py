"""PaliGemma's way to write boxes: four location tokens, y before x, then the name.

    <loc0309><loc0240><loc0962><loc0425> table ; <loc0100><loc0512><loc0200><loc0767> cup

A number is a fraction of the side, times 1023 and rounded: 0 is the upper or left edge, 1023 the lower or right one. The
picture is squashed to a square, so fractions stay what they are. Readers that divide by 1024 differ by a thousandth at
most. Answers to "segment" carry 16 mask tokens, which are passed over and reported:

    <loc0309><loc0240><loc0962><loc0425><seg012>…<seg101> table

Location tokens are ordinary vocabulary of the family and survive `skip_special_tokens=True`.

Source: the model card and `parse_paligemma_labels` of the public cookbook.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlmdet.boxes import Boxes
from vlmdet.grounding.codec import Parsed, View, guard_label
from vlmdet.grounding.locations import has_mask, is_cut, name_of, runs
from vlmdet.grounding.prompts import NONE_ANSWER
from vlmdet.grounding.reading import Reading

NAME = "paligemma"
VERSION = "paligemma-1"
GRID = 1023


def encode(labels: Sequence[str], boxes: Boxes, view: View) -> str:
    """Write boxes as the family does.

    When: once per row.

    Input: n `labels` and n `boxes`, in the order to be written; `view` is not needed by this family.
    Output: `<locY1><locX1><locY2><locX2> label`, joined by ` ; `, numbers rounded to the grid; `none` for no box.

    Raises:
        ValueError: labels and boxes differ in number.
    """
    grid = np.rint(boxes.xyxy * GRID).clip(0, GRID).astype(int)
    parts = [
        f"<loc{y1:04d}><loc{x1:04d}><loc{y2:04d}><loc{x2:04d}> {guard_label(label)}"
        for label, (x1, y1, x2, y2) in zip(labels, grid, strict=True)
    ]
    return " ; ".join(parts) or NONE_ANSWER


def parse(text: str, view: View) -> Parsed:
    """Read an answer; never raises, takes time in proportion to the length.

    When: once per answer.

    Input: `text`; `view`.
    Output: `Parsed`. Several boxes before one name all get it.
    """
    reading = Reading(GRID, GRID)
    text = reading.cut(text)
    for run in runs(text):
        label = name_of(run.after)
        if has_mask(run.after):
            reading.problem("mask_dropped", run.detail + run.after)
        numbers = run.numbers
        if len(numbers) % 4:
            reading.problem("point" if len(numbers) == 2 else "odd_number_count", run.detail)
            continue
        for i in range(0, len(numbers), 4):
            y1, x1, y2, x2 = numbers[i : i + 4]
            reading.box([x1, y1, x2, y2], label, run.detail, run.span(i, name_after=True))
    if is_cut(text):
        reading.problem("truncated", text[-80:])
    return reading.finish(text)

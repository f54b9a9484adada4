"""Florence-2's way to write boxes: the name, then four location tokens.

    </s><s>car<loc_52><loc_333><loc_932><loc_774>door handle<loc_425><loc_504><loc_474><loc_516></s>
    a green car<loc_52><loc_332><loc_932><loc_774><loc_10><loc_20><loc_30><loc_40>

A side is cut into 1,000 bins, 0 to 999: a coordinate goes into its bin by rounding down, and a bin is read at its centre,
so that both directions are half a bin off at most. Location tokens are special tokens of the family: decoded with
`skip_special_tokens=True` an answer holds no box any more; decode with False.

Source: `Florence2PostProcessor` in transformers (`quantize`, `dequantize`), the model card.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlmdet.boxes import Boxes
from vlmdet.grounding.codec import Parsed, View, guard_label
from vlmdet.grounding.locations import has_mask, is_cut, name_of, runs
from vlmdet.grounding.prompts import NONE_ANSWER
from vlmdet.grounding.reading import Reading

NAME = "florence2"
VERSION = "florence2-1"
BINS = 1000


def encode(labels: Sequence[str], boxes: Boxes, view: View) -> str:
    """Write boxes as the family does.

    When: once per row.

    Input: n `labels` and n `boxes`, in the order to be written; `view` is not needed by this family.
    Output: `label<loc_x1><loc_y1><loc_x2><loc_y2>` n times, numbers 0 to 999, never 1000; `none` for no box.

    Raises:
        ValueError: labels and boxes differ in number.
    """
    bins = np.floor(boxes.xyxy * BINS).clip(0, BINS - 1).astype(int)
    parts = [
        guard_label(label) + "".join(f"<loc_{number}>" for number in row)
        for label, row in zip(labels, bins, strict=True)
    ]
    return "".join(parts) or NONE_ANSWER


def parse(text: str, view: View) -> Parsed:
    """Read an answer; never raises, takes time in proportion to the length.

    When: once per answer.

    Input: `text`, with or without the wrappers `<s>` and `</s>`; `view`.
    Output: `Parsed`. Several boxes after one name all get it; eight numbers that are no two boxes are a quadrangle.
    """
    reading = Reading(BINS - 1, BINS - 1)
    text = reading.cut(text)
    label: str | None = None
    for run in runs(text):
        name = name_of(run.before)
        label = label if name is None else name
        if has_mask(run.before):
            reading.problem("mask_dropped", run.before)
        numbers = run.numbers
        corners = [numbers[i : i + 2] for i in range(0, len(numbers), 2)]
        if len(numbers) == 8 and not _are_two_boxes(numbers):
            reading.points(corners, label, run.detail, (run.start, run.places[-1][1]))
        elif len(numbers) % 4:
            reading.problem("point" if len(numbers) == 2 else "odd_number_count", run.detail)
        else:
            for i in range(0, len(numbers), 4):
                reading.box(numbers[i : i + 4], label, run.detail, run.span(i, name_before=True))
    if is_cut(text):
        reading.problem("truncated", text[-80:])
    return reading.finish(text, shift=0.5)


def _are_two_boxes(numbers: Sequence[float]) -> bool:
    """Tell whether eight numbers are two boxes, each from its upper left to its lower right corner."""
    return all(numbers[i] <= numbers[i + 2] and numbers[i + 1] <= numbers[i + 3] for i in (0, 4))

"""Qwen2.5-VL's way to write boxes: JSON, in pixels of the picture as the processor resized it.

    [{"bbox_2d": [135, 114, 1016, 672], "label": "cake"}]

Answers of the model itself come in a fence, with a line for each box; fine-tuned ones often are one object or bare lists:

    ```json
    [
        {"bbox_2d": [97, 91, 406, 718], "label": "iron door"}
    ]
    ```
    {"bbox_2d": [460, 635, 513, 669]}
    [[132,48,155,80],[155,48,177,81]]

The size that the model sees decides what the numbers mean, so `View.resized_width` and `resized_height` must be those of
the real processor (`grounding.sizes`): a scale that is 5 % off alone costs .22 of the IoU of a middling box.

Source: a maintainer's answer in QwenLM/Qwen3-VL#721 and the family's `process_bbox.ipynb`.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlmdet.boxes import Boxes
from vlmdet.grounding.codec import Parsed, View
from vlmdet.grounding.json_boxes import parse_json, write_json

NAME = "qwen2_5_vl"
VERSION = "qwen2_5_vl-1"


def encode(labels: Sequence[str], boxes: Boxes, view: View) -> str:
    """Write boxes as the family does.

    When: once per row.

    Input: n `labels` and n `boxes`, in the order to be written; `view` with the resized size.
    Output: `[{"bbox_2d": [x1, y1, x2, y2], "label": "cake"}, …]` in rounded pixels of the resized picture; `[]` for none.

    Raises:
        ValueError: labels and boxes differ in number.
    """
    return write_json(labels, boxes, key="bbox_2d", x_limit=view.resized_width, y_limit=view.resized_height)


def parse(text: str, view: View) -> Parsed:
    """Read an answer; never raises, takes time in proportion to the length. See `json_boxes.parse_json`."""
    return parse_json(text, x_limit=view.resized_width, y_limit=view.resized_height)

"""Qwen3-VL's way to write boxes: the JSON of Qwen2.5-VL, on a grid of 0 to 1000 whatever the size of the picture.

    ```json
    [
        {"bbox_2d": [215, 585, 350, 665], "label": "scratch"}
    ]
    ```

Names stand under other keys where the question asks for more than one, and tools are called with a box:

    {"bbox_2d": [0, 614, 224, 825], "name_zh": "米饭", "name_en": "Rice"}
    {"label": "central bear logo", "bbox_2d": [395, 276, 618, 740], "img_idx": 0}

Source: QwenLM/Qwen3-VL#1987, #1623 and the family's cookbooks.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlmdet.boxes import Boxes
from vlmdet.grounding.codec import Parsed, View
from vlmdet.grounding.json_boxes import parse_json, write_json

NAME = "qwen3_vl"
VERSION = "qwen3_vl-1"
GRID = 1000


def encode(labels: Sequence[str], boxes: Boxes, view: View) -> str:
    """Write boxes as the family does.

    When: once per row.

    Input: n `labels` and n `boxes`, in the order to be written; `view` is not needed by this family.
    Output: `[{"bbox_2d": [215, 585, 350, 665], "label": "scratch"}, …]`, rounded to the grid; `[]` for no box.

    Raises:
        ValueError: labels and boxes differ in number.
    """
    return write_json(labels, boxes, key="bbox_2d", x_limit=GRID, y_limit=GRID)


def parse(text: str, view: View) -> Parsed:
    """Read an answer; never raises, takes time in proportion to the length. See `json_boxes.parse_json`."""
    return parse_json(text, x_limit=GRID, y_limit=GRID)

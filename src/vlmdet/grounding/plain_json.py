"""Boxes as plain JSON for a model without a notation of its own: x1, y1, x2, y2 on a grid of 0 to 1000.

    [{"bbox": [215, 585, 350, 665], "label": "scratch"}]

The grid is declared in two places: `prompts.build_native_prompt("plain_json", …)` tells it to the model, and the contract
holds the codec's name and version, which stand for it. Another grid or order is another codec.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlmdet.boxes import Boxes
from vlmdet.grounding.codec import Parsed, View
from vlmdet.grounding.json_boxes import parse_json, write_json

NAME = "plain_json"
VERSION = "plain_json-1"
GRID = 1000


def encode(labels: Sequence[str], boxes: Boxes, view: View) -> str:
    """Write boxes as plain JSON.

    When: once per row.

    Input: n `labels` and n `boxes`, in the order to be written; `view` is not needed.
    Output: `[{"bbox": [215, 585, 350, 665], "label": "scratch"}, …]`, rounded to the grid; `[]` for no box.

    Raises:
        ValueError: labels and boxes differ in number.
    """
    return write_json(labels, boxes, key="bbox", x_limit=GRID, y_limit=GRID)


def parse(text: str, view: View) -> Parsed:
    """Read an answer; never raises, takes time in proportion to the length. See `json_boxes.parse_json`."""
    return parse_json(text, x_limit=GRID, y_limit=GRID)

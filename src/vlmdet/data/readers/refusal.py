"""Refuse a data set whose box format the numbers leave open, with the readings drawn side by side.

When: ONCE, where `box_format.decide` decides nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vlmdet.boxes import Boxes, BoxFormat
from vlmdet.data.readers.box_format import Decision
from vlmdet.data.readers.lazy import Picture
from vlmdet.errors import DataError, ImageError
from vlmdet.images import open_image

PICTURES = 3
"""Rows of the drawing."""

READINGS = 6
"""Columns of it, at most."""

Shown = tuple[Picture, str, tuple[int, int], np.ndarray]
"""A picture, its id, its size as stated, and the numbers of its boxes."""


def refuse_open(source: str, decision: Decision, shown: Sequence[Shown]) -> DataError:
    """Return the error that says which readings are possible, and where they are drawn.

    When: once; writes a PNG file and the evidence into the folder for temporary files.
    """
    evidence = "; ".join(" ".join(line.split()) for line in decision.table[:1])
    if not decision.possible:
        return DataError(
            f"{source}: no known way of writing boxes fits its numbers ({evidence})",
            "if it is one of the twelve after all, name it, e.g. --box-format xyxy/pixel",
        )
    named = " or ".join(map(str, decision.possible))
    drawing = draw_readings(decision.possible, shown)
    if drawing:
        drawing.with_suffix(".txt").write_text("\n".join(decision.table) + "\n", encoding="utf-8")
        seen = f"they are drawn side by side in {drawing}, with the counts in {drawing.with_suffix('.txt').name}"
    else:
        seen = "no picture of it can be opened to draw them on"
    return DataError(
        f"{source}: its numbers do not tell how boxes are written: {decision.reason} ({evidence}); possible: {named}; {seen}",
        f"look, and name the right one, e.g. --box-format {decision.possible[0]}",
    )


def draw_readings(readings: Sequence[BoxFormat], shown: Sequence[Shown]) -> Path | None:
    """Draw some pictures under each reading, one reading a column; None where no picture can be opened.

    Output: the path of a PNG file.
    """
    from vlmdet.utils.visualization import image_grid, visualize_bbox_on_image

    columns = list(readings)[:READINGS]
    images: list[Image.Image] = []
    titles: list[str] = []
    for picture, name, (width, height), values in shown:
        if len(images) == PICTURES * len(columns):
            break
        try:
            image = open_image(picture if isinstance(picture, Path) else picture(), name=name)
        except ImageError:  # another row will do: this is a drawing, and the pre-pass reports pictures
            continue
        image.thumbnail((640, 640))
        size = (width, height) if width > 0 and height > 0 else image.size
        for reading in columns:
            boxes = Boxes.from_array(values[:30], reading, *size).clip()
            images.append(visualize_bbox_on_image(image, boxes))
            titles.append(f"{reading}  {name}")
    if not images:
        return None
    with tempfile.NamedTemporaryFile(prefix="vlmdet-box-format-", suffix=".png", delete=False) as file:
        image_grid(images, titles, len(columns)).save(file, "PNG")
    return Path(file.name)

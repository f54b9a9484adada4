"""Each family's resize rule, stated once, in pure Python.

When: ALWAYS. The default collator asserts on every batch that the processor really made the size planned here.
"""

from __future__ import annotations

import math

from vlmdet.errors import DataError
from vlmdet.grounding.codec import View

MAX_ASPECT = 200
"""Qwen2-VL's processor refuses pictures that are more than this many times as long as wide."""


def qwen_size(width: int, height: int, *, min_pixels: int, max_pixels: int, factor: int = 28) -> tuple[int, int]:
    """Return the width and height to which a Qwen-VL processor resizes a picture.

    Input: size of the upright picture and the limits, in pixels; `factor`, patch size times merge size: 28 for Qwen2-VL
    and Qwen2.5-VL, 32 for Qwen3-VL.
    Output: width, height, both multiples of `factor`, e.g. 3000 x 4000 under 1,003,520 pixels: (840, 1148).
    Source: `smart_resize` of the Qwen2-VL processor in transformers.

    Raises:
        DataError: the picture is over 200 times as long as wide.
    """
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise DataError(f"a picture of {width} x {height} pixels is over {MAX_ASPECT} times as long as wide", "crop it")
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_width, new_height


def plan_view(width: int, height: int, *, min_pixels: int, max_pixels: int, factor: int = 28) -> View:
    """Return original and resized size of a picture for a Qwen-VL model; see `qwen_size`."""
    resized = qwen_size(width, height, min_pixels=min_pixels, max_pixels=max_pixels, factor=factor)
    return View(width, height, *resized)

"""Each family's resize rule, and those of tools that train elsewhere, stated once, in pure Python.

When: ALWAYS. The default collator asserts on every batch that the processor really made the size planned here.

    Qwen2-VL, Qwen2.5-VL   `qwen_size`, multiples of 28       Qwen3-VL   `qwen_size`, multiples of 32
    PaliGemma, Florence-2  `square_size`, squashed            InternVL   none needed: tiles, and numbers relative to the picture
    ms-swift               `swift_size`                       TRL        none: it hands pictures to the processor as they are
    LLaMA-Factory          `llamafactory_size`

What a tool resizes is resized again by the family's processor: the size that the model sees is `qwen_size` of the tool's.
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


def square_size(width: int, height: int, *, side: int) -> tuple[int, int]:
    """Return the size to which PaliGemma (side 224, 448 or 896) and Florence-2 (768) squash a picture, whatever its shape.

    Source: `SiglipImageProcessor` and `CLIPImageProcessor` in transformers with `size` of the published configurations.
    """
    return side, side


def swift_size(width: int, height: int, *, max_pixels: int) -> tuple[int, int]:
    """Return the size to which ms-swift shrinks a picture that has more than `max_pixels`; no other is changed.

    Input: `max_pixels`, the tool's own `--max_pixels`; without that option it leaves pictures to the processor.
    Source: ms-swift 3, `swift/llm/template/vision_utils.py`, `rescale_image`: sides from the aspect ratio, cut to integers.
    """
    if width * height <= max_pixels:
        return width, height
    ratio = width / height
    new_height = math.sqrt(max_pixels / ratio)
    return int(new_height * ratio), int(new_height)


def llamafactory_size(width: int, height: int, *, max_pixels: int = 589_824, min_pixels: int = 1024) -> tuple[int, int]:
    """Return the size to which LLaMA-Factory's Qwen-VL plugin resizes a picture before the processor sees it.

    Input: `max_pixels` and `min_pixels`, its `image_max_pixels` and `image_min_pixels` with their defaults.
    Source: LLaMA-Factory 0.9.5, `data/mm_plugin.py`, `_preprocess_image`: both sides times the square root of the ratio, cut
    to integers; then at least 28 pixels, and a strip over 200 times as long as wide becomes 180 times.
    """
    if width * height > max_pixels:
        shrink = math.sqrt(max_pixels / (width * height))
        width, height = int(width * shrink), int(height * shrink)
    if width * height < min_pixels:
        grow = math.sqrt(min_pixels / (width * height))
        width, height = int(width * grow), int(height * grow)
    width, height = max(width, 28), max(height, 28)
    if width > 200 * height:
        return height * 180, height
    if height > 200 * width:
        return width, width * 180
    return width, height


def plan_view(width: int, height: int, *, min_pixels: int, max_pixels: int, factor: int = 28) -> View:
    """Return original and resized size of a picture for a Qwen-VL model; see `qwen_size`."""
    resized = qwen_size(width, height, min_pixels=min_pixels, max_pixels=max_pixels, factor=factor)
    return View(width, height, *resized)

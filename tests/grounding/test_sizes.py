"""The resize rule stated here is that of the installed processor."""

from __future__ import annotations

import random

import pytest
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from vlmdet.errors import DataError
from vlmdet.grounding import View
from vlmdet.grounding.sizes import plan_view, qwen_size


def test_small_cases() -> None:
    assert qwen_size(280, 280, min_pixels=3136, max_pixels=1_003_520) == (280, 280)
    assert qwen_size(1024, 768, min_pixels=3136, max_pixels=12_845_056) == (1036, 756)  # the published 999 image tokens
    assert qwen_size(10, 10, min_pixels=3136, max_pixels=1_003_520) == (56, 56)
    assert plan_view(280, 300, min_pixels=3136, max_pixels=1_003_520) == View(280, 300, 280, 308)


def test_ten_thousand_sizes_agree_with_transformers() -> None:
    rng = random.Random(0)
    for _ in range(10_000):
        width, height = (int(10 ** rng.uniform(0, 4)) for _ in range(2))
        factor = rng.choice([28, 32])
        min_pixels = factor**2 * rng.choice([1, 4, 16, 256])
        max_pixels = min_pixels * rng.choice([1, 3, 49, 1280])
        limits = {"min_pixels": min_pixels, "max_pixels": max_pixels, "factor": factor}
        try:
            expected = smart_resize(height, width, **limits)[::-1]
        except ValueError:
            with pytest.raises(DataError):
                qwen_size(width, height, **limits)
            continue
        assert qwen_size(width, height, **limits) == expected, (width, height, limits)


def test_a_very_long_picture_is_refused() -> None:
    assert qwen_size(2000, 10, min_pixels=3136, max_pixels=1_003_520)
    with pytest.raises(DataError, match="200 times"):
        qwen_size(2001, 10, min_pixels=3136, max_pixels=1_003_520)

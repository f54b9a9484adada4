"""The resize rule stated here is that of the installed processor."""

from __future__ import annotations

import random

import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from vlmdet.errors import DataError
from vlmdet.grounding import View
from vlmdet.grounding.sizes import llamafactory_size, plan_view, qwen_size, square_size, swift_size


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


def test_ten_thousand_sizes_agree_with_qwen_vl_utils() -> None:
    """ms-swift resizes Qwen's pictures by this function; it differs only where a side rounds to nothing."""
    utils = pytest.importorskip("qwen_vl_utils.vision_process")
    rng = random.Random(1)
    for _ in range(10_000):
        width, height = rng.randint(28, 8000), rng.randint(28, 6000)
        if max(width, height) > 100 * min(width, height):
            continue
        factor = rng.choice([28, 32])
        limits = {"min_pixels": 4 * factor**2, "max_pixels": rng.choice([256, 1280, 16384]) * factor**2}
        expected = utils.smart_resize(height, width, factor, **limits)[::-1]
        assert qwen_size(width, height, factor=factor, **limits) == expected


@pytest.mark.parametrize("name", ["SiglipImageProcessor", "CLIPImageProcessor"])
def test_squares_are_those_of_the_processors(name: str) -> None:
    import transformers

    processor = getattr(transformers, name)(size={"height": 56, "width": 56}, do_center_crop=False)
    for size in [(28, 90), (100, 30), (56, 56)]:
        height, width = processor(Image.new("RGB", size), return_tensors="pt")["pixel_values"].shape[2:]
        assert square_size(*size, side=56) == (width, height)


def test_peers_by_hand() -> None:
    assert swift_size(1000, 500, max_pixels=500_000) == (1000, 500)
    assert swift_size(4000, 1000, max_pixels=1_000_000) == (2000, 500)  # ratio 4, height sqrt(1e6 / 4)
    assert llamafactory_size(3000, 4000) == (665, 886)  # times sqrt(589824 / 12e6) = .2217, 665.1 x 886.8
    assert llamafactory_size(768, 768) == (768, 768)
    assert llamafactory_size(16, 16) == (32, 32)  # 256 pixels to 1,024: twice each side
    assert llamafactory_size(10, 1000) == (28, 1000)
    assert llamafactory_size(20_000, 28, max_pixels=10**9) == (180 * 28, 28)

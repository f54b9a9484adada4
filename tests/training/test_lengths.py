"""Tokens counted without a picture are those of the collator, and rows that are too long are refused, never cut."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmdet.boxes import FRACTIONS, Boxes
from vlmdet.data.collators import Qwen2VLCollatorV3
from vlmdet.data.dataset import build_rows
from vlmdet.errors import DataError
from vlmdet.grounding.sizes import qwen_size
from vlmdet.models.loader import load, make_contract
from vlmdet.records import Sample
from vlmdet.settings import AugmentSettings, Settings, TrainingSettings
from vlmdet.training.lengths import (
    RowTokens,
    context_of,
    count_tokens,
    fitting_max_pixels,
    read_lengths,
    refuse_long_rows,
)

LIMITS = {"min_pixels": 4 * 28 * 28, "max_pixels": 64 * 28 * 28}
BOXES = [[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.9, 0.8]]


def make_samples(folder: Path, sizes: list[tuple[int, int]]) -> list[Sample]:
    samples = []
    for i, (width, height) in enumerate(sizes):
        path = folder / f"{i}.png"
        Image.new("RGB", (width, height), "white").save(path)
        boxes = Boxes.from_array(BOXES[: i % 3], FRACTIONS, 1, 1) if i % 3 else Boxes.empty()
        samples.append(Sample(f"row-{i}", path, width, height, boxes, ("tasse à café",) * (i % 3)))
    return samples


def tokens_of(text: list[int], sizes: list[tuple[int, int]], image: list[int]) -> RowTokens:
    ids = tuple(f"r{i}" for i in range(len(text)))
    return RowTokens(ids, np.asarray(sizes), np.asarray(text), np.asarray(image), np.ones(len(text), dtype=np.int64))


def test_counts_are_the_collators_and_no_picture_is_opened(qwen_processor: Any, tmp_path: Path) -> None:
    sizes = [(280, 280), (50, 900), (1000, 700), (31, 33)]
    samples = make_samples(tmp_path, sizes)
    rows = build_rows(samples, labels=["tasse à café", "白血球"])
    batch = Qwen2VLCollatorV3(qwen_processor, **LIMITS)([rows[i] for i in range(len(rows))])
    for sample in samples:
        assert isinstance(sample.picture, Path)
        sample.picture.write_bytes(b"no picture any more")
    counted = count_tokens(rows.with_transform(lambda row: 1 / 0), sizes, qwen_processor, **LIMITS)
    assert counted.ids == ("row-0", "row-1", "row-2", "row-3")
    assert counted.total.tolist() == batch["attention_mask"].sum(dim=1).tolist()
    assert counted.image.tolist() == batch["mm_token_type_ids"].sum(dim=1).tolist()
    assert counted.image[0] == 8 * 8  # 280 x 280 shrunk to 224 x 224 by 64 tokens of 28 x 28
    assert counted.answer.tolist() == (batch["labels"] != -100).sum(dim=1).tolist()
    assert len(set(counted.answer.tolist())) == 3


def test_rows_and_sizes_must_agree(qwen_processor: Any, tmp_path: Path) -> None:
    rows = build_rows(make_samples(tmp_path, [(56, 56)]), labels=["tasse à café"])
    with pytest.raises(ValueError, match="1 rows, 2 sizes"):
        count_tokens(rows, [(56, 56)] * 2, qwen_processor, **LIMITS)
    with pytest.raises(DataError, match="row-0: a picture of 8000 x 30 pixels is over 200 times"):
        count_tokens(rows, [(8000, 30)], qwen_processor, **LIMITS)


def test_long_rows_are_refused_with_what_would_fit() -> None:
    # 280 x 280 pixels are 10 x 10 tokens; 60 of text leave room for 40 under 100; 6 x 6 = 36 is what a square makes of it
    tokens = tokens_of([60, 60, 20], [(280, 280), (28, 28), (280, 140)], [100, 1, 50])
    limits = {"min_pixels": 28 * 28, "max_pixels": 100 * 28 * 28}
    refuse_long_rows(tokens, limit=160, **limits)
    with pytest.raises(DataError) as caught:
        refuse_long_rows(tokens, limit=100, **limits)
    assert caught.value.message == "1 of 3 rows have more than 100 tokens: r0 (160: 100 image, 60 text)"
    pixels = fitting_max_pixels(tokens, limit=100, **limits)
    assert pixels is not None
    assert caught.value.hint == f"model.max_pixels={pixels} fits them all; nothing is ever cut"
    assert qwen_size(280, 280, min_pixels=28 * 28, max_pixels=pixels) == (6 * 28, 6 * 28)
    assert 60 + 49 > 100  # the next square
    assert qwen_size(280, 280, min_pixels=28 * 28, max_pixels=pixels + 28 * 28) == (7 * 28, 7 * 28)


def test_many_long_rows_are_counted_and_the_first_are_named() -> None:
    tokens = tokens_of([60] * 1200, [(280, 280)] * 1200, [100] * 1200)
    with pytest.raises(DataError, match=r"1,200 of 1,200 rows .* 100 tokens: r0 .*, r1 .*, r2 \(.*\), …"):
        refuse_long_rows(tokens, limit=100, min_pixels=28 * 28, max_pixels=100 * 28 * 28)


def test_what_no_max_pixels_can_fit_says_so() -> None:
    limits = {"min_pixels": 50 * 28 * 28, "max_pixels": 100 * 28 * 28}
    with pytest.raises(DataError, match=r"lower model\.min_pixels too"):
        refuse_long_rows(tokens_of([60], [(280, 280)], [100]), limit=100, **limits)
    with pytest.raises(DataError, match="the text alone is too long"):
        refuse_long_rows(tokens_of([100], [(280, 280)], [100]), limit=100, **limits)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(20, 4000), st.integers(20, 4000), st.integers(1, 300)), min_size=1, max_size=5),
    st.integers(50, 1500),
    st.sampled_from([28, 32]),
)
def test_the_max_pixels_that_is_named_fits_every_row(rows: list[tuple[int, int, int]], limit: int, factor: int) -> None:
    limits = {"min_pixels": 4 * factor**2, "max_pixels": 1280 * factor**2}

    def image(width: int, height: int, pixels: int) -> int:
        sides = qwen_size(width, height, min_pixels=limits["min_pixels"], max_pixels=pixels, factor=factor)
        return sides[0] * sides[1] // factor**2

    tokens = tokens_of(
        [text for *_, text in rows],
        [(width, height) for width, height, _ in rows],
        [image(width, height, limits["max_pixels"]) for width, height, _ in rows],
    )
    pixels = fitting_max_pixels(tokens, limit=limit, **limits, factor=factor)
    if pixels is None:
        assert any(text + image(width, height, limits["min_pixels"]) > limit for width, height, text in rows)
    else:
        assert limits["min_pixels"] <= pixels <= limits["max_pixels"]
        assert all(text + image(width, height, pixels) <= limit for width, height, text in rows)


def test_the_context_is_that_of_the_language_model(small_base: Path) -> None:
    from transformers import AutoConfig

    assert context_of(AutoConfig.from_pretrained(small_base)) == 4096


def test_rows_that_augmentation_may_enlarge_are_judged_at_twice_their_sides(small_base: Path, tmp_path: Path) -> None:
    limits = {"min_pixels": 784, "max_pixels": 64 * 784}
    base = load(str(small_base), **limits)
    contract = make_contract(
        base, labels=["cup"], codec="auto", box_order="raster", max_new_tokens=9, data_fingerprint=""
    )
    path = tmp_path / "a.png"
    Image.new("RGB", (84, 56)).save(path)
    samples = [Sample("a", path, 84, 56, Boxes.empty(), ())]
    rows = build_rows(samples, labels=["cup"])
    common = {"config": base.model.config}
    plain = read_lengths(rows, samples, base.processor, Settings(), contract, **common)
    assert plain.image.tolist() == [3 * 2]
    limit = int(plain.text[0]) + 10  # room for 6 image tokens, and not for the 24 of 168 x 112 pixels
    for shrink, refused in ((0.0, False), (0.5, True)):
        asked = Settings(training=TrainingSettings(max_tokens=limit), augment=AugmentSettings(shrink=shrink))
        with pytest.raises(DataError, match=r"24 image") if refused else nullcontext():
            read_lengths(rows, samples, base.processor, asked, contract, **common)

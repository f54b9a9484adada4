"""The one look at every picture: what is odd about it, and which are the same, told by hand-made files."""

from __future__ import annotations

import io
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlmdet.boxes import Boxes
from vlmdet.data import pictures as module
from vlmdet.data.pictures import look_over, near_pairs, open_small
from vlmdet.errors import ImageError
from vlmdet.images import open_image
from vlmdet.records import Problem, Sample


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif(tag: int) -> Image.Exif:
    block = Image.Exif()
    block[274] = tag
    return block


def noise(seed: int, width: int = 40, height: int = 20) -> Image.Image:
    """Coarse blots, which survive compression and scaling."""
    blots = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(blots).resize((width, height), Image.Resampling.BICUBIC)


PICTURE = encoded(Image.new("RGB", (40, 20)))
NOISE = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)), "JPEG")
GREY16 = encoded(Image.fromarray(np.full((20, 40), 40_000, dtype=np.uint16)))


def sample(name: str, data: bytes = PICTURE, **changes: Any) -> Sample:
    plain = Sample(name, lambda: data, 40, 20, Boxes.empty(), (), source=f"file:{name}")
    return replace(plain, **changes)


def kinds(problems: list[Problem]) -> list[tuple[str, str, str]]:
    return [(problem.kind, problem.id, problem.action) for problem in problems]


@pytest.mark.parametrize(
    ("data", "size", "found"),
    [
        (PICTURE, (40, 20), []),
        (b"", (40, 20), [("unreadable_image", "row_dropped")]),
        (b"text", (40, 20), [("unreadable_image", "row_dropped")]),
        (NOISE[: len(NOISE) // 2], (40, 20), [("truncated_image", "row_dropped")]),
        (encoded(noise(5))[:700], (40, 20), [("truncated_image", "row_dropped")]),
        (encoded(Image.new("CMYK", (40, 20)), "JPEG"), (40, 20), [("cmyk_image", "kept")]),
        (encoded(Image.new("P", (40, 20))), (40, 20), [("palette_image", "kept")]),
        (GREY16, (40, 20), [("sixteen_bit_image", "kept")]),
        (encoded(Image.new("RGB", (20, 40)), "JPEG", exif=exif(6)), (40, 20), [("exif_rotated", "kept")]),
        (encoded(Image.new("RGB", (40, 20)), "JPEG", exif=exif(3)), (40, 20), [("exif_rotated", "kept")]),
        (encoded(Image.new("RGB", (40, 20)), "JPEG", exif=exif(6)), (40, 20), [("exif_rotated", "row_dropped")]),
        (encoded(Image.new("RGB", (20, 40)), "TIFF", exif=exif(6)), (40, 20), []),
        (PICTURE, (80, 40), [("size_mismatch", "kept")]),
        (PICTURE, (13, 7), [("size_mismatch", "kept")]),
        (PICTURE, (20, 40), [("size_mismatch", "row_dropped")]),
        (PICTURE, (40, 30), [("size_mismatch", "row_dropped")]),
    ],
)
def test_what_is_odd_about_a_picture(data: bytes, size: tuple[int, int], found: list[tuple[str, str]]) -> None:
    fine = sample("fine", encoded(noise(1)))
    problems = look_over([fine, sample("odd", data, width=size[0], height=size[1])]).problems
    assert [(problem.kind, problem.action) for problem in problems] == found
    assert all((problem.id, problem.file, problem.row) == ("odd", "file:odd", None) for problem in problems)


def test_sizes_of_a_large_jpeg_are_those_of_the_file_not_of_its_quick_decoding() -> None:
    data = encoded(noise(1, 1200, 900), "JPEG")
    assert look_over([sample("a", data, width=1200, height=900)]).problems == []
    (problem,) = look_over([sample("a", data, width=1200, height=800)]).problems
    assert "stated as 1200 x 800, is 1200 x 900" in problem.detail


def test_open_small_is_upright_and_no_larger_than_asked() -> None:
    data = encoded(noise(1, 1200, 900), "JPEG", exif=exif(6), quality=95)
    small = open_small(sample("a", data, width=900, height=1200), 100)
    assert (small.mode, small.size) == ("RGB", (75, 100))
    whole = open_image(data).resize((75, 100), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(small).astype(int) - np.asarray(whole)).mean() < 3
    assert open_small(sample("a"), 100).size == (40, 20)


def test_missing_picture_file(tmp_path: Path) -> None:
    (problem,) = look_over([sample("a", picture=tmp_path / "gone.jpg")]).problems
    assert (problem.kind, problem.action) == ("unreadable_image", "row_dropped")
    assert "no such file" in problem.detail


def test_sixty_megapixels_are_reported() -> None:
    data = encoded(Image.new("1", (10_000, 6_000)))
    (problem,) = look_over([sample("a", data, width=10_000, height=6_000)]).problems
    assert (problem.kind, problem.action) == ("large_image", "kept")


def test_a_decompression_bomb_is_refused_unopened() -> None:
    bomb = bytearray(encoded(Image.new("1", (1, 1))))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    (problem,) = look_over([sample("a", bytes(bomb))]).problems
    assert (problem.kind, problem.action) == ("refused_image", "row_dropped")


def test_several_problems_of_one_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGE_PIXELS", 10)
    data = encoded(Image.new("CMYK", (20, 40)), "JPEG", exif=exif(8))
    found = [problem.kind for problem in look_over([sample("a", data)]).problems]
    assert found == ["cmyk_image", "large_image", "exif_rotated"]


JPEGS = [encoded(noise(3, 700, 500), "JPEG", progressive=progressive, quality=60) for progressive in (False, True)]


@given(st.sampled_from(JPEGS), st.floats(0.0, 1.0), st.booleans())
def test_quick_decoding_finds_the_same_broken_files(jpeg: bytes, where: float, overwrite: bool) -> None:
    place = int(where * (len(jpeg) - 2))
    data = jpeg[:place] + (b"\xff\xd9" + jpeg[place + 2 :] if overwrite else b"")
    try:
        open_image(data)
        opens = True
    except ImageError:
        opens = False
    problems = look_over([sample("a", data, width=700, height=500)]).problems
    dropped = [problem for problem in problems if problem.kind in ("truncated_image", "unreadable_image")]
    assert bool(dropped) != opens


def test_the_same_bytes_are_reported_once_for_each_later_row() -> None:
    one, other = encoded(noise(1)), encoded(noise(2))
    rows = [sample("a", one), sample("b", other), sample("c", one), sample("d", one, split="test")]
    looked = look_over(rows)
    assert kinds(looked.problems) == [("duplicate_image", "c", "kept"), ("duplicate_image", "d", "kept")]
    assert "'a' (in train too)" in looked.problems[0].detail
    assert "'a' (in train, this row in test)" in looked.problems[1].detail
    assert looked.twins == {"c": "a", "d": "a"}


def test_the_same_picture_in_another_split_is_found_though_its_bytes_differ() -> None:
    picture = noise(1, 400, 300)
    again = encoded(picture.resize((200, 150), Image.Resampling.LANCZOS), "JPEG", quality=50)
    first = sample("first", encoded(picture), width=400, height=300)
    other = sample("other", encoded(noise(2, 400, 300)), width=400, height=300)
    copy = sample("copy", again, width=200, height=150, split="test")
    looked = look_over([first, other, copy])
    assert kinds(looked.problems) == [("near_duplicate", "copy", "kept")]
    assert looked.twins == {"copy": "first"}
    assert look_over([first, other, replace(copy, split="train")]).problems == []  # e.g. frames of one film


def test_blank_pictures_of_other_colours_are_not_the_same() -> None:
    rows = [sample(name, encoded(Image.new("RGB", (40, 20), name)), split=name) for name in ("white", "black", "red")]
    assert look_over(rows).problems == []


def test_a_group_in_two_splits_is_reported_once() -> None:
    rows = [
        sample(f"{number}", encoded(noise(number)), group=group, split=split)
        for number, (group, split) in enumerate([("g", "train"), ("h", "train"), ("g", "train"), ("g", "test")])
    ]
    (problem,) = look_over(rows).problems
    assert (problem.kind, problem.id, problem.action) == ("group_overlap", "0", "kept")
    assert "'g' has rows in train (2), test (1)" in problem.detail


BASE = np.array([0x0123456789ABCDEF, 0xFEDCBA9876543210], dtype=np.uint64)


def flipped(places: list[int]) -> np.ndarray:
    """BASE with some of its 128 bits turned over."""
    bits = BASE.copy()
    for place in places:
        bits[place // 64] ^= np.uint64(1 << place % 64)
    return bits


@pytest.mark.parametrize(
    ("places", "color", "split", "found"),
    [
        ([], 0, "test", {1: (0, 0)}),
        ([3], 24, "test", {1: (0, 1)}),
        ([3], 25, "test", {}),
        ([3], 0, "train", {}),
        (list(range(12)), 0, "test", {1: (0, 12)}),
        (list(range(13)), 0, "test", {}),
        ([0, 16, 32, 48, 64, 80, 96], 0, "test", {1: (0, 7)}),
    ],
)
def test_near_pairs(places: list[int], color: int, split: str, found: dict[int, tuple[int, int]]) -> None:
    colors = np.full((2, 192), 100, dtype=np.uint8)
    colors[1] += color
    assert near_pairs(np.stack([BASE, flipped(places)]), colors, ["train", split]) == found


def test_near_pairs_takes_the_nearest() -> None:
    bits = np.stack([flipped([5, 6]), flipped([5]), BASE])
    assert near_pairs(bits, np.zeros((3, 192), dtype=np.uint8), ["train", "train", "test"]) == {2: (1, 1)}


def test_near_pairs_of_nothing() -> None:
    assert near_pairs(np.zeros((0, 2), dtype=np.uint64), np.zeros((0, 192), dtype=np.uint8), []) == {}


@given(st.sets(st.integers(0, 127), max_size=7), st.integers(0, 2**32))
def test_seven_bits_are_always_found_among_strangers(places: set[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**63, (200, 2)).astype(np.uint64)
    bits[40], bits[160] = BASE, flipped(sorted(places))
    splits = ["train"] * 100 + ["test"] * 100
    assert near_pairs(bits, np.zeros((200, 192), dtype=np.uint8), splits)[160] == (40, len(places))

"""Cached pictures give the pixels of the pictures themselves, bit for bit, whatever happens to the cache."""

from __future__ import annotations

import errno
import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessor, SiglipImageProcessor

from vlmdet.boxes import FRACTIONS, Boxes
from vlmdet.data import resized
from vlmdet.data.collators import Qwen2VLCollatorV3
from vlmdet.data.dataset import build_messages, conversation_features
from vlmdet.data.resized import ResizedCollator, ResizedPictures, undecoded
from vlmdet.errors import ConfigError, ImageError
from vlmdet.models.loader import load_processor

LIMITS = {"min_pixels": 16 * 28 * 28, "max_pixels": 49 * 28 * 28}
SIZE = {"shortest_edge": LIMITS["min_pixels"], "longest_edge": LIMITS["max_pixels"]}
PROCESSORS = {
    "qwen2_vl": Qwen2VLImageProcessor(),
    "qwen3_vl": Qwen2VLImageProcessor(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3),
}


def jpeg(width: int, height: int, *, seed: int = 0, turn: int | None = None) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (max(1, height // 7), max(1, width // 7), 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    exif = Image.Exif()
    if turn:
        exif[274] = turn
    image.save(file, "JPEG", quality=90, exif=exif)
    return file.getvalue()


def stored(data: bytes) -> dict[str, Any]:
    return {"path": None, "bytes": data}


def rows_of(*pictures: bytes) -> datasets.Dataset:
    messages = build_messages(["cup"], boxes=Boxes.from_array([[0.1, 0.2, 0.5, 0.6]], FRACTIONS, 1, 1), labels=["cup"])
    columns = {
        "id": [str(i) for i in range(len(pictures))],
        "messages": [messages] * len(pictures),
        "image": [stored(data) for data in pictures],
        "boxes": [[[0.1, 0.2, 0.5, 0.6]]] * len(pictures),
        "labels": [["cup"]] * len(pictures),
    }
    return datasets.Dataset.from_dict(columns, features=conversation_features())


def collate(rows: Sequence[dict[str, Any]], processor: Any) -> dict[str, torch.Tensor]:
    return processor([row["image"] for row in rows], size=SIZE, return_tensors="pt")


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_and_grid_are_those_of_the_direct_path_bit_for_bit(tmp_path: Path, name: str) -> None:
    processor = PROCESSORS[name]
    # larger, smaller and exactly as large as the model sees it; wide and tall; 640 x 480 stored lying, shown upright
    files = [jpeg(640, 480), jpeg(60, 40), jpeg(224, 160), jpeg(900, 130), jpeg(100, 1000), jpeg(640, 480, turn=6)]
    expected = processor([resized.open_image(data) for data in files], size=SIZE, return_tensors="pt")
    rows = undecoded(rows_of(*files))
    for time in ("first", "second"):
        collator = ResizedCollator(
            partial(collate, processor=processor), ResizedPictures(tmp_path, processor, **LIMITS)
        )
        found = collator([rows[i] for i in range(len(rows))])
        assert torch.equal(found["image_grid_thw"], expected["image_grid_thw"]), time
        assert torch.equal(found["pixel_values"], expected["pixel_values"]), time
    assert len(list(tmp_path.iterdir())) == len(files)
    assert all(file.suffix == ".npy" for file in tmp_path.iterdir())


def test_the_default_collator_makes_the_same_batch(tmp_path: Path) -> None:
    processor = load_processor("tiny", min_pixels=None, max_pixels=None)
    rows = rows_of(jpeg(640, 480), jpeg(300, 700))
    direct = Qwen2VLCollatorV3(processor, **LIMITS)
    cached = ResizedCollator(
        Qwen2VLCollatorV3(processor, **LIMITS), ResizedPictures(tmp_path, processor.image_processor, **LIMITS)
    )
    expected = direct(list(rows))
    for _ in range(2):
        found = cached(list(undecoded(rows)))
        assert set(found) == set(expected)
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), key


def test_the_second_pass_opens_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ResizedPictures(tmp_path, PROCESSORS["qwen2_vl"], **LIMITS)
    first = cache.get(stored(jpeg(640, 480)), "a")
    assert first.size == (224, 168)  # 640 x 480 under 49 x 784 pixels: both sides rounded down to multiples of 28
    monkeypatch.setattr(resized, "open_image", lambda *args, **kwargs: pytest.fail("a picture was decoded again"))
    again = cache.get(stored(jpeg(640, 480)), "a")
    assert np.array_equal(np.asarray(again), np.asarray(first))


def test_other_bytes_limits_or_settings_are_another_entry(tmp_path: Path) -> None:
    data, processor = jpeg(640, 480), PROCESSORS["qwen2_vl"]
    ResizedPictures(tmp_path, processor, **LIMITS).get(stored(data), "a")
    for other in (
        lambda: ResizedPictures(tmp_path, processor, **LIMITS).get(stored(jpeg(640, 480, seed=1)), "a"),
        lambda: ResizedPictures(tmp_path, processor, min_pixels=784, max_pixels=20_000).get(stored(data), "a"),
        lambda: ResizedPictures(tmp_path, PROCESSORS["qwen3_vl"], **LIMITS).get(stored(data), "a"),
    ):
        before = len(list(tmp_path.iterdir()))
        other()
        assert len(list(tmp_path.iterdir())) == before + 1
    ResizedPictures(tmp_path, processor, **LIMITS).get(stored(data), "a")
    assert len(list(tmp_path.iterdir())) == before + 1


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "other"])
def test_a_damaged_file_is_made_again(tmp_path: Path, damage: str) -> None:
    cache = ResizedPictures(tmp_path, PROCESSORS["qwen2_vl"], **LIMITS)
    whole = cache.get(stored(jpeg(640, 480)), "a")
    (file,) = tmp_path.iterdir()
    good = file.read_bytes()
    other = io.BytesIO()
    np.save(other, np.zeros(3))
    file.write_bytes({"cut": good[:-100], "empty": b"", "text": b"no array", "other": other.getvalue()}[damage])
    assert np.array_equal(np.asarray(cache.get(stored(jpeg(640, 480)), "a")), np.asarray(whole))
    assert file.read_bytes() == good


def test_a_full_disk_costs_speed_and_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    cache = ResizedPictures(tmp_path, PROCESSORS["qwen2_vl"], **LIMITS)
    assert cache.get(stored(jpeg(640, 480)), "a").size == (224, 168)
    assert cache.get(stored(jpeg(480, 640)), "b").size == (168, 224)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: pictures are no longer cached (No space left on device); the run goes on more slowly"
    ]
    assert list(tmp_path.iterdir()) == []  # no half-written file either


def test_a_strip_that_would_be_resized_twice_is_left_alone(tmp_path: Path) -> None:
    """50 x 9000 becomes 28 x 5040; under these limits the processor would shrink that again."""
    limits = {"min_pixels": 784, "max_pixels": 20 * 784}
    cache = ResizedPictures(tmp_path, PROCESSORS["qwen2_vl"], **limits)
    size = {"shortest_edge": limits["min_pixels"], "longest_edge": limits["max_pixels"]}
    data = jpeg(50, 9000)
    expected = PROCESSORS["qwen2_vl"]([resized.open_image(data)], size=size, return_tensors="pt")
    found = PROCESSORS["qwen2_vl"]([cache.get(stored(data), "a")], size=size, return_tensors="pt")
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(found["pixel_values"], expected["pixel_values"])


def test_a_missing_picture_names_the_row(tmp_path: Path) -> None:
    cache = ResizedPictures(tmp_path, PROCESSORS["qwen2_vl"], **LIMITS)
    with pytest.raises(ImageError, match=r"row 7: .*gone\.jpg cannot be read"):
        cache.get({"path": str(tmp_path / "gone.jpg"), "bytes": None}, "row 7")


def test_a_processor_without_patches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"SiglipImageProcessor.*training\.cache_pictures=false"):
        ResizedPictures(tmp_path, SiglipImageProcessor(), **LIMITS)

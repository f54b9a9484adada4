"""Features of a frozen vision tower from disk: the same loss and gradients as with pixels, in every Qwen-VL family."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate.utils import send_to_device
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data._utils.pin_memory import pin_memory
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmdet.boxes import FRACTIONS, Boxes
from vlmdet.data.collators import Qwen2VLCollatorV3
from vlmdet.data.dataset import build_messages, conversation_features
from vlmdet.data.resized import ResizedCollator, ResizedPictures, undecoded
from vlmdet.errors import ConfigError, TrainingError
from vlmdet.training import vision_cache
from vlmdet.training.vision_cache import FeatureCollator, FrozenFeatures

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
LIMITS = {"min_pixels": 4 * 32 * 32, "max_pixels": 12 * 32 * 32}


def rows_of(*sizes: tuple[int, int]) -> datasets.Dataset:
    columns: dict[str, list[Any]] = {name: [] for name in ("id", "messages", "image", "boxes", "labels")}
    for i, size in enumerate(sizes):
        pixels = np.random.default_rng(i).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).resize(size).save(file, "JPEG")
        boxes = [[0.1, 0.2, 0.5, 0.6]] * (i + 1)
        columns["id"].append(str(i))
        columns["messages"].append(
            build_messages(["sign"], boxes=Boxes.from_array(boxes, FRACTIONS, 1, 1), labels=["sign"] * len(boxes))
        )
        columns["image"].append({"path": None, "bytes": file.getvalue()})
        columns["boxes"].append(boxes)
        columns["labels"].append(["sign"] * len(boxes))
    return datasets.Dataset.from_dict(columns, features=conversation_features())


def frozen(folder: Path) -> tuple[Any, Any]:
    """A base of which an adapter on the language model trains, and its processor."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    adapter = LoraConfig(
        r=4, target_modules=r".*language_model\.layers\.\d+\.self_attn\.[qv]_proj", init_lora_weights=False
    )
    return get_peft_model(model, adapter).train(), AutoProcessor.from_pretrained(folder)


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_with_pixels(
    family_base: Callable[[str], Path], tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = frozen(family_base(family))
    rows = rows_of((100, 80), (64, 160), (300, 300))
    collator = Qwen2VLCollatorV3(processor, **LIMITS)
    plain = model(**collator(list(rows)))
    expected = gradients(model, plain.loss)
    assert any(gradient.abs().max() > 0 for gradient in expected.values())

    features = FrozenFeatures(model, processor, tmp_path, **LIMITS)
    filled = features.fill(model, rows, batch_size=2)
    assert (filled.rows, filled.encoded) == (3, 3)
    monkeypatch.setattr(
        type(model.get_base_model().model.visual), "forward", lambda *_, **__: pytest.fail("the tower ran again")
    )
    cached = FeatureCollator(Qwen2VLCollatorV3(processor, **LIMITS), features)
    batch = cached([undecoded(rows)[i] for i in range(3)])
    assert "pixel_values" not in batch
    found = model(**batch)
    torch.testing.assert_close(found.loss, plain.loss, rtol=0, atol=1e-5)
    for name, gradient in gradients(model, found.loss).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    assert features.fill(model, rows).encoded == 0  # nothing is computed twice


def test_features_take_the_place_of_resized_pictures(family_base: Callable[[str], Path], tmp_path: Path) -> None:
    model, processor = frozen(family_base("qwen2_vl"))
    rows = undecoded(rows_of((100, 80)))
    features = FrozenFeatures(model, processor, tmp_path / "features", **LIMITS)
    features.fill(model, rows)
    pictures = ResizedPictures(tmp_path / "pictures", processor.image_processor, **LIMITS)
    batch = FeatureCollator(ResizedCollator(Qwen2VLCollatorV3(processor, **LIMITS), pictures), features)([rows[0]])
    assert batch["mm_encoder_outputs"]["image"].pooler_output[0].shape == (12, 64)  # 4 x 3 tokens of 28 x 28 pixels
    assert list((tmp_path / "pictures").iterdir()) == []


def test_a_file_holds_the_grid_and_a_vector_for_each_token(family_base: Callable[[str], Path], tmp_path: Path) -> None:
    model, processor = frozen(family_base("qwen3_vl"))
    features = FrozenFeatures(model, processor, tmp_path, **LIMITS)
    features.fill(model, rows_of((64, 96)))
    (file,) = tmp_path.iterdir()
    stored = load_file(file)
    assert stored["grid"].tolist() == [1, 6, 4]  # 64 x 96 pixels in patches of 16
    assert {name: tuple(t.shape) for name, t in stored.items() if name != "grid"} == {
        "features": (6, 64),
        "deepstack_0": (6, 64),
    }


def test_features_follow_the_batch_to_a_device(
    family_base: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the data loader does where there is a GPU, and what accelerate does everywhere."""
    model, processor = frozen(family_base("qwen3_vl"))
    rows = undecoded(rows_of((64, 96), (64, 64)))
    features = FrozenFeatures(model, processor, tmp_path, **LIMITS)
    features.fill(model, rows)
    batch = FeatureCollator(Qwen2VLCollatorV3(processor, **LIMITS), features)([rows[0], rows[1]])
    pinned: list[tuple[int, ...]] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(tuple(self.shape)) or self)
    batch = pin_memory(batch)
    assert pinned.count((6, 64)) == 2  # of the first picture, the features and one deepstack layer
    moved = send_to_device(dict(batch), torch.device("meta"))["mm_encoder_outputs"]["image"]
    assert [tensor.device.type for tensor in [*moved.pooler_output, *moved.deepstack_features[0]]] == ["meta"] * 4


def test_a_tower_that_trains_is_refused(family_base: Callable[[str], Path], tmp_path: Path) -> None:
    model, processor = frozen(family_base("qwen2_vl"))
    next(model.get_base_model().model.visual.merger.parameters()).requires_grad_(True)
    with pytest.raises(ConfigError, match=r"frozen vision tower, but visual\.merger\..* is trained"):
        FrozenFeatures(model, processor, tmp_path, **LIMITS)


def test_another_tower_or_limit_is_another_entry(family_base: Callable[[str], Path], tmp_path: Path) -> None:
    model, processor = frozen(family_base("qwen2_vl"))
    rows = rows_of((100, 80))
    FrozenFeatures(model, processor, tmp_path, **LIMITS).fill(model, rows)
    smaller = FrozenFeatures(model, processor, tmp_path, min_pixels=784, max_pixels=4 * 784)
    assert smaller.fill(model, rows).encoded == 1
    with torch.no_grad():
        next(model.get_base_model().model.visual.parameters()).view(-1)[0] += 1
    assert FrozenFeatures(model, processor, tmp_path, **LIMITS).fill(model, rows).encoded == 1
    assert len(list(tmp_path.iterdir())) == 3


def test_a_damaged_file_is_named_in_training_and_computed_again_at_the_start(
    family_base: Callable[[str], Path], tmp_path: Path
) -> None:
    model, processor = frozen(family_base("qwen2_vl"))
    rows = rows_of((100, 80))
    features = FrozenFeatures(model, processor, tmp_path, **LIMITS)
    features.fill(model, rows)
    (file,) = tmp_path.iterdir()
    good = file.read_bytes()
    file.write_bytes(good[: len(good) // 2])
    collator = FeatureCollator(Qwen2VLCollatorV3(processor, **LIMITS), features)
    with pytest.raises(TrainingError, match=f"row 0: {file} is missing or damaged"):
        collator([undecoded(rows)[0]])
    assert features.fill(model, rows).encoded == 1
    assert file.read_bytes() == good


@pytest.mark.parametrize("when", ["before", "while"])
def test_a_full_disk_stops_the_run_with_the_way_out(
    family_base: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def full(file: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model, processor = frozen(family_base("qwen2_vl"))
    features = FrozenFeatures(model, processor, tmp_path, **LIMITS)
    if when == "before":
        usage = vision_cache.shutil.disk_usage(tmp_path)
        monkeypatch.setattr(vision_cache.shutil, "disk_usage", lambda _: usage._replace(free=100))
    else:
        monkeypatch.setattr(vision_cache, "write_whole", full)
    with pytest.raises(TrainingError, match=r"no room for the features.*training\.cache_features=false"):
        features.fill(model, rows_of((100, 80)))
    assert list(tmp_path.iterdir()) == []

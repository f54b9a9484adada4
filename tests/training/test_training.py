"""Training really moves the model; models that would not train are refused; norms are taken before clipping."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image, ImageDraw
from torch import nn

from vlmdet.boxes import Boxes
from vlmdet.config import Settings, load_settings
from vlmdet.data.augment import augment, augment_rows
from vlmdet.errors import ConfigError, ModelError, TrainingError
from vlmdet.grounding import View, get_codec
from vlmdet.models.families import resolve_targets
from vlmdet.models.loader import load
from vlmdet.models.lora import build_lora_config, refuse_untrainable, refuse_zero_adapter
from vlmdet.training.callbacks import GradNormCallback
from vlmdet.training.optim import orthogonal
from vlmdet.training.train import predict_watched, prepare, train

BOX = (24, 40, 152, 104)
ANSWER = "<|object_ref_start|>sign<|object_ref_end|><|box_start|>(120,267),(760,693)<|box_end|>"  # BOX on 200 x 150


@pytest.fixture
def one_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Pascal VOC set of one picture, 200 x 150, which stands in train and in val."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "set"
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / part).mkdir(parents=True)
    image = Image.new("RGB", (200, 150), (200, 220, 240))
    ImageDraw.Draw(image).rectangle(BOX, fill=(180, 30, 60))
    for name in ("a", "b"):
        image.save(root / "JPEGImages" / f"{name}.jpg")
        corners = "".join(
            f"<{tag}>{value}</{tag}>" for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), BOX, strict=True)
        )
        (root / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.jpg</filename><size><width>200</width><height>150</height></size>"
            f"<object><name>sign</name><bndbox>{corners}</bndbox></object></annotation>"
        )
    (root / "ImageSets/Main/train.txt").write_text("a\n")
    (root / "ImageSets/Main/val.txt").write_text("b\n")
    return root


def settings_for(source: Path, *overrides: str) -> Settings:
    return load_settings(
        None,
        [f"data.source={source}", "name=test", "training.batch_size=1", "evaluation.max_new_tokens=24", *overrides],
    )


def quiet(text: str) -> None:
    """Print nothing."""


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "train" / "log.jsonl").read_text().splitlines()]


def test_one_picture_is_learnt_by_heart_and_generated_back(one_picture: Path) -> None:
    full = ["training.method=full", "training.learning_rate=1e-3", "training.max_steps=60", "training.epochs=60"]
    settings = settings_for(one_picture, *full, "training.eval_every=30")
    prepared = prepare(settings, say=quiet)
    before = {name: weight.detach().clone() for name, weight in prepared.base.model.named_parameters()}
    folder = train(prepared, say=quiet)

    losses = [row["loss"] for row in log_of(folder) if "loss" in row]
    assert losses[0] > 1
    assert losses[-1] < 0.05
    after = dict(prepared.base.model.named_parameters())
    assert all(not torch.equal(before[name], after[name]) for name in before if "visual" in name and "weight" in name)

    tuned = load(str(folder))
    rows = predict_watched(tuned.model, prepared=prepared, samples=prepared.dataset.splits["val"])
    assert rows[0]["text"] == ANSWER
    assert not rows[0]["truncated"]

    kept = {path.name for path in (folder / "checkpoints").glob("checkpoint-*")}
    assert (folder / "checkpoints" / "last").resolve().name == "checkpoint-60"
    assert kept == {(folder / "checkpoints" / name).resolve().name for name in ("best", "last")}
    with (folder / "train" / "metrics.csv").open() as file:
        assert [float(row["step"]) for row in csv.DictReader(file)] == [30, 60]
    assert (folder / "train" / "samples" / "step_000060.png").is_file()


def test_an_adapter_is_trained_saved_and_loaded_on_its_own_base_only(
    one_picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(one_picture, "lora.rank=2", "training.max_steps=3", "training.learning_rate=1e-2")
    prepared = prepare(settings, say=quiet)
    folder = train(prepared, say=quiet)
    best = folder / "checkpoints" / "best"
    assert (best / "adapter_model.safetensors").is_file()
    assert (best / "contract.json").is_file()
    tuned, base = load(str(folder)), load("tiny")
    samples = prepared.dataset.splits["val"]
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert not torch.allclose(tuned.model(input_ids=ids).logits, base.model(input_ids=ids).logits)
    assert predict_watched(tuned.model, prepared=prepared, samples=samples)[0]["status"] != "error"

    monkeypatch.setattr("vlmdet.models.loader.fingerprint", lambda model: "0123456789abcdef")
    with pytest.raises(ModelError, match="fingerprint"):
        load(str(folder))


def test_the_same_seed_gives_the_same_losses(one_picture: Path) -> None:
    settings = settings_for(one_picture, "lora.rank=2", "training.max_steps=3", "training.epochs=3")
    first, second = (train(prepare(settings, say=quiet), say=quiet) for _ in range(2))
    assert first != second
    losses = [[row["loss"] for row in log_of(folder) if "loss" in row] for folder in (first, second)]
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]


def test_gradient_norms_are_those_before_clipping(one_picture: Path) -> None:
    limits = ["training.max_steps=2", "training.epochs=2", "training.max_grad_norm=1e-6"]
    folder = train(prepare(settings_for(one_picture, "lora.rank=2", *limits), say=quiet), say=quiet)
    rows = [row for row in log_of(folder) if "loss" in row]
    for row in rows:
        # `grad_norm` is what torch's clip_grad_norm_ returns, the norm before it clips: a second source
        assert row["grad_norm/all"] == pytest.approx(row["grad_norm"], rel=1e-3)
        assert row["grad_norm/all"] > 1e-3
        assert row["grad_norm/language"] == pytest.approx(row["grad_norm/all"])


def test_the_norm_callback_sums_several_backward_passes() -> None:
    model = nn.Linear(2, 1, bias=False)
    callback = GradNormCallback()
    callback.on_train_begin(None, None, None, model=model)  # type: ignore[arg-type]
    for _ in range(2):
        model(torch.tensor([[3.0, 4.0]])).sum().backward()  # gradient (3, 4) each time
    nn.utils.clip_grad_norm_(model.parameters(), 1e-6)
    assert callback.norms()["all"] == pytest.approx(10.0)


def test_a_frozen_model_is_refused() -> None:
    model = load("tiny").model.requires_grad_(False)
    with pytest.raises(TrainingError, match="no parameter of the model is trainable"):
        refuse_untrainable(model)


def test_a_wrapped_model_is_not_wrapped_again() -> None:
    model = load("tiny").model
    config = build_lora_config(model, rank=2, alpha=4, dropout=0.0, targets=["language.attn"])
    wrapped = get_peft_model(model, config)
    with pytest.raises(TrainingError, match="wrapped twice"):
        build_lora_config(wrapped, rank=2, alpha=4, dropout=0.0, targets=["language.attn"])
    with pytest.raises(TrainingError, match="every update of the adapter is zero"):
        refuse_zero_adapter(wrapped, "run")
    wrapped.add_adapter("second", config)
    with pytest.raises(TrainingError, match="2 adapters"):
        refuse_untrainable(wrapped)


def test_targets_become_exact_names_of_linear_layers() -> None:
    model = load("tiny").model
    assert len(resolve_targets(model, ["language.attn"])) == 4 * 4
    assert len(resolve_targets(model, ["vision.mlp", "merger"])) == 4 * 2 + 2
    with pytest.raises(ConfigError, match=r"did you mean 'language\.attn'"):
        resolve_targets(model, ["language.atn"])
    with pytest.raises(ConfigError, match="linear layers only"):
        resolve_targets(model, ["norm1$"])


def test_orthogonal_brings_singular_values_near_one() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(40, 24), iterations=5))
    assert values.min() > 0.5
    assert values.max() < 1.4


@pytest.mark.parametrize("change", ["flip_horizontal", "flip_vertical", "rotate", "crop", "shrink"])
def test_a_box_moves_with_its_picture(change: str) -> None:
    image = Image.new("RGB", (200, 150), (0, 0, 255))
    ImageDraw.Draw(image).rectangle((30, 20, 99, 69), fill=(255, 0, 0))
    boxes = Boxes(np.array([[30 / 200, 20 / 150, 100 / 200, 70 / 150]]))
    for seed in range(8):
        moved, found = augment(image, boxes, np.random.default_rng(seed), **{change: 1.0})
        red = np.asarray(moved)[..., 0] > 200
        y, x = np.nonzero(red)
        seen = np.array([[x.min(), y.min(), x.max() + 1, y.max() + 1]]) / [*moved.size, *moved.size]
        assert Boxes(seen).iou(found)[0, 0] > 0.95
        assert moved.size != image.size or not np.array_equal(np.asarray(moved), np.asarray(image))


def test_an_augmented_row_has_its_answer_written_again() -> None:
    image = Image.new("RGB", (100, 100))
    rows = {"image": [image], "boxes": [[[0.1, 0.2, 0.3, 0.4]]], "labels": [["cell"]], "messages": [None], "id": ["a"]}
    result = augment_rows(rows, chances={"flip_horizontal": 1.0}, asked=["cell"], codec="qwen2_vl", box_order="raster")
    text = result["messages"][0][-1]["content"][0]["text"]
    parsed = get_codec("qwen2_vl").parse(text, View(100, 100, 100, 100))
    np.testing.assert_allclose(parsed.boxes.xyxy, [[0.7, 0.2, 0.9, 0.4]], atol=5e-4)
    np.testing.assert_allclose(result["boxes"][0], [[0.7, 0.2, 0.9, 0.4]], atol=1e-9)
    assert SimpleNamespace(**result).id == ["a"]

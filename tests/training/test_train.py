"""An untrained model in a folder of its own learns one picture by heart, through `prepare` and `train`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from vlmdet.config import load_settings
from vlmdet.data.dataset import build_messages
from vlmdet.errors import TrainingError
from vlmdet.models.inference import run_qwen2vl_inference
from vlmdet.models.loader import load
from vlmdet.training.train import planned_steps, prepare, train


@pytest.fixture
def one_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Pascal VOC set: one picture of 112 x 84 with two signs, in train and in val."""
    monkeypatch.chdir(tmp_path)
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / "set" / part).mkdir(parents=True)
    image = Image.new("RGB", (112, 84), "white")
    objects = ""
    for x1, y1, x2, y2 in ((14, 7, 42, 28), (56, 42, 105, 77)):
        ImageDraw.Draw(image).rectangle((x1, y1, x2, y2), fill="red")
        box = f"<xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
        objects += f"<object><name>sign</name><bndbox>{box}</bndbox></object>"
    for name, split in (("a", "train"), ("b", "val")):
        image.save(tmp_path / "set" / "JPEGImages" / f"{name}.jpg")
        (tmp_path / "set" / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.jpg</filename>"
            f"<size><width>112</width><height>84</height></size>{objects}</annotation>"
        )
        (tmp_path / "set" / "ImageSets" / "Main" / f"{split}.txt").write_text(f"{name}\n")
    return tmp_path / "set"


def test_an_untrained_model_learns_a_picture_by_heart(small_base: Path, one_picture: Path) -> None:
    settings = load_settings(
        None,
        [
            f"data.source={one_picture}", f"model.name={small_base}", "model.min_pixels=3136", "model.max_pixels=12544",
            "training.method=full", "training.learning_rate=5e-3", "training.max_steps=100", "training.batch_size=1",
            "evaluation.max_new_tokens=64", "name=heart",
        ],
    )  # fmt: skip
    prepared = prepare(settings, say=lambda text: None)
    target = build_messages(
        ["sign"],
        boxes=prepared.dataset.splits["train"][0].boxes,
        labels=["sign", "sign"],
        size=(112, 84),
    )[-1]["content"][0]["text"]
    said: list[str] = []
    folder = train(prepared, say=said.append)
    losses = [row["loss"] for row in map(json.loads, (folder / "train/log.jsonl").open()) if "loss" in row]
    assert losses[0] > 5  # ln 1400 = 7.2 for a model that knows nothing
    assert losses[-1] < 0.05
    tuned = load(str(folder))
    sample = prepared.dataset.splits["train"][0]
    answer = run_qwen2vl_inference(
        tuned.model, tuned.processor, sample.image, ["sign"], min_pixels=3136, max_pixels=12544, max_new_tokens=64
    )
    assert answer == target
    assert target.count("<|box_start|>") == 2
    assert any("vision" in line and "trainable" in line for line in said)


def test_a_run_that_would_train_nothing_is_stopped_before_its_first_step(small_base: Path, one_picture: Path) -> None:
    settings = load_settings(
        None,
        [
            f"data.source={one_picture}", f"model.name={small_base}", "model.min_pixels=3136", "model.max_pixels=12544",
            "training.method=full", "training.max_steps=1", "training.batch_size=1", "name=frozen",
        ],
    )  # fmt: skip
    prepared = prepare(settings, say=lambda text: None)
    prepared.base.model.requires_grad_(False)
    with pytest.raises(TrainingError, match="no parameter of the model is trainable"):
        train(prepared, say=lambda text: None)
    assert not list((prepared.folder / "checkpoints").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation", "epochs", "steps"),
    [(10, 4, 1, 1, 3), (10, 4, 2, 1, 2), (10, 4, 2, 2.5, 5), (1, 8, 1, 0.1, 1)],
)
def test_planned_steps_round_up(rows: int, batch: int, accumulation: int, epochs: float, steps: int) -> None:
    settings = load_settings(
        None,
        [
            f"training.batch_size={batch}",
            f"training.gradient_accumulation={accumulation}",
            f"training.epochs={epochs}",
        ],
    )
    assert planned_steps(settings, rows) == steps

"""Training really moves the model, from `prepare` to a loaded checkpoint; what cannot train is stopped before it starts."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from vlmdet.config import load_settings
from vlmdet.errors import ModelError, TrainingError
from vlmdet.models.inference import run_qwen2vl_inference
from vlmdet.models.loader import load
from vlmdet.settings import Settings
from vlmdet.training.plan import plan_steps
from vlmdet.training.prepare import prepare
from vlmdet.training.train import predict_watched, train

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
        [
            f"data.source={source}",
            "name=test",
            "training.batch_size=1",
            "evaluation.max_new_tokens=24",
            "training.overfit_gate=false",
            *overrides,
        ],
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


def test_an_untrained_model_learns_a_picture_by_heart(small_base: Path, one_picture: Path) -> None:
    small = [f"model.name={small_base}", "model.min_pixels=3136", "model.max_pixels=12544"]
    full = ["training.method=full", "training.learning_rate=5e-3", "training.max_steps=100"]
    prepared = prepare(settings_for(one_picture, *small, *full), say=quiet)
    said: list[str] = []
    folder = train(prepared, say=said.append)
    losses = [row["loss"] for row in log_of(folder) if "loss" in row]
    assert losses[0] > 5  # ln 1400 = 7.2 for a model that knows nothing
    assert losses[-1] < 0.05
    tuned = load(str(folder))
    image = prepared.dataset.splits["train"][0].image
    answer = run_qwen2vl_inference(
        tuned.model, tuned.processor, image, ["sign"], min_pixels=3136, max_pixels=12544, max_new_tokens=64
    )
    assert answer == ANSWER
    assert any("vision" in line and "trainable" in line for line in said)


def test_a_run_that_would_train_nothing_is_stopped_before_its_first_step(small_base: Path, one_picture: Path) -> None:
    small = [f"model.name={small_base}", "model.min_pixels=3136", "model.max_pixels=12544"]
    prepared = prepare(settings_for(one_picture, *small, "training.method=full", "training.max_steps=1"), say=quiet)
    prepared.base.model.requires_grad_(False)
    with pytest.raises(TrainingError, match="no parameter of the model is trainable"):
        train(prepared, say=quiet)
    assert not list((prepared.folder / "checkpoints").glob("checkpoint-*"))


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
    assert plan_steps(settings.training, rows, 1)[0] == steps


def test_a_long_run_passes_the_gate_first(one_picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    long = ["training.max_steps=101", "training.epochs=101", "training.overfit_gate=true", "training.method=full"]
    prepared = prepare(settings_for(one_picture, *long, "training.learning_rate=1e-3"), say=quiet)
    before = {name: weight.clone() for name, weight in prepared.base.model.named_parameters()}
    seen: list[bool] = []

    def stop(self: object, args: object, state: object, control: object, **kwargs: object) -> None:
        now = dict(kwargs["model"].named_parameters())  # type: ignore[attr-defined]
        seen.append(all(torch.equal(before[name], now[name]) for name in before))
        raise KeyboardInterrupt

    monkeypatch.setattr("vlmdet.training.callbacks.EpochCallback.on_epoch_begin", stop)
    with pytest.raises(KeyboardInterrupt):
        train(prepared, say=lines.append)
    assert any(line.startswith("overfit gate") and "loss" in line for line in lines)
    assert seen == [True]  # the gate put every weight back before the first step


def test_the_gate_stops_a_run_that_learns_nothing(one_picture: Path) -> None:
    still = ["training.max_steps=101", "training.overfit_gate=true", "training.learning_rate=1e-12"]
    prepared = prepare(settings_for(one_picture, *still), say=quiet)
    with pytest.raises(TrainingError, match=r"overfit gate: .* not generated back .*training\.overfit_gate=false"):
        train(prepared, say=quiet)

"""Best and last checkpoints, their log, and the norm of a gradient that no clipping has touched."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import TrainerControl

from vlmdet.boxes import FRACTIONS, Boxes
from vlmdet.data.collators import Qwen2VLCollatorV3
from vlmdet.data.dataset import build_messages
from vlmdet.models.families import area_of
from vlmdet.models.loader import load
from vlmdet.training.callbacks import GradNormCallback, IoUEvalCallback

TRUE = [0.1, 0.1, 0.5, 0.5]
HALF = [0.1, 0.1, 0.5, 0.34]  # IoU .6 with it
THIRD = [0.1, 0.1, 0.5, 0.24]  # IoU .35
LIMITS = {"min_pixels": 4 * 28 * 28, "max_pixels": 16 * 28 * 28}


def row(box: list[float]) -> dict[str, Any]:
    return {
        "id": "a", "width": 100, "height": 100, "truth": {"boxes": [TRUE], "labels": ["sign"], "ignore": [False]},
        "boxes": [box], "labels": ["sign"], "scores": None, "status": "ok", "truncated": False, "problems": [],
    }  # fmt: skip


def test_best_goes_by_f1_then_iou_and_the_others_are_deleted(tmp_path: Path) -> None:
    answers = {2: HALF, 4: TRUE, 6: TRUE, 8: HALF, 9: THIRD}
    now = SimpleNamespace(step=0)
    logged: list[dict[str, float]] = []
    callback = IoUEvalCallback(
        lambda model: [row(answers[now.step])],
        labels=["sign"],
        every=2,
        metrics_csv=tmp_path / "metrics.csv",
        write_contract=lambda folder: (folder / "contract.json").touch(),
    )
    callback.log = logged.append
    checkpoints = tmp_path / "checkpoints"
    seen = []
    for now.step in range(1, 10):
        state = SimpleNamespace(global_step=now.step, max_steps=9, is_world_process_zero=True)
        args = SimpleNamespace(output_dir=checkpoints, world_size=1)
        control = TrainerControl()
        callback.on_step_end(args, state, control, model=None)  # type: ignore[arg-type]
        assert control.should_save == (now.step in answers)
        if control.should_save:
            (checkpoints / f"checkpoint-{now.step}").mkdir(parents=True)
            callback.on_save(args, state, control)  # type: ignore[arg-type]
            links = [(checkpoints / name).resolve().name.removeprefix("checkpoint-") for name in ("best", "last")]
            kept = {folder.name.removeprefix("checkpoint-") for folder in checkpoints.glob("checkpoint-*")}
            assert kept == set(links)
            seen.append(tuple(map(int, links)))
    # step 6 equals step 4 in both figures, and 8 equals it in F1@0.5 alone: the first of the best stays
    assert seen == [(2, 2), (4, 4), (4, 6), (4, 8), (4, 9)]
    assert callback.best == pytest.approx((1.0, 1.0))
    assert all((checkpoints / name / "contract.json").is_file() for name in ("best", "last"))
    with (tmp_path / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(line["step"]) for line in table] == [2, 4, 6, 8, 9]
    assert [float(line["mean_best_iou"]) for line in table] == pytest.approx([0.6, 1, 1, 0.6, 0.35])
    assert [entry["eval/f1_50"] for entry in logged] == [1, 1, 1, 1, 0]


def test_norms_by_area_are_those_of_the_whole_gradient_before_clipping(small_base: Path) -> None:
    loaded = load(str(small_base), **LIMITS)
    image = Image.new("RGB", (112, 84), "white")
    ImageDraw.Draw(image).rectangle((20, 20, 60, 50), fill="red")
    boxes = Boxes.from_array([[0.2, 0.2, 0.5, 0.6]], FRACTIONS, 112, 84)
    messages = build_messages(["sign"], boxes=boxes, labels=["sign"], size=image.size)
    batch = Qwen2VLCollatorV3(loaded.processor, **LIMITS)([{"id": "a", "messages": messages, "image": image}])
    model = loaded.model.train()
    parameters = dict(model.named_parameters())

    grads = torch.autograd.grad(model(**batch).loss, list(parameters.values()), allow_unused=True)
    squares: dict[str, float] = {}
    for name, grad in zip(parameters, grads, strict=True):
        if grad is not None:
            for area in ("all", area_of(name)):
                squares[area] = squares.get(area, 0.0) + float(grad.double().square().sum())

    callback = GradNormCallback()
    callback.on_train_begin(None, None, None, model=model)  # type: ignore[arg-type]
    for _ in range(2):  # two passes of half the loss each: the norm of their sum
        (model(**batch).loss / 2).backward()
    torch.nn.utils.clip_grad_norm_(parameters.values(), 1e-6)
    norms = callback.norms()
    assert set(norms) == {"all", "vision", "merger", "language", "embeddings"}
    assert norms == pytest.approx({area: square**0.5 for area, square in squares.items()}, rel=1e-3)
    assert norms["all"] > 1e-2
    callback.on_train_end(None, None, None)  # type: ignore[arg-type]
    model.zero_grad()
    (model(**batch).loss * 100).backward()
    assert callback.norms() == norms  # the hooks are gone

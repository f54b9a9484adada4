"""Trackers get what the log file has, and pictures; a tracker that is not there is refused by name."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from vlmdet.config import load_settings
from vlmdet.data.synthetic.packages import write_drawn_set
from vlmdet.errors import ConfigError
from vlmdet.training.callbacks import choose_trackers
from vlmdet.training.prepare import prepare
from vlmdet.training.train import train


def only(*names: str) -> Any:
    return lambda name: object() if name in names else None


def test_auto_is_tensorboard_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", only("tensorboard", "mlflow"))
    assert choose_trackers(["auto"]) == ["tensorboard"]
    assert choose_trackers(["mlflow"]) == ["mlflow"]
    assert choose_trackers(["mlflow", "auto"]) == ["mlflow", "tensorboard"]
    assert choose_trackers([]) == []
    with pytest.raises(ConfigError, match="names wandb, which is not installed; pip install wandb"):
        choose_trackers(["wandb"])
    monkeypatch.setattr(importlib.util, "find_spec", only())
    assert choose_trackers(["auto"]) == []


def test_tensorboard_gets_every_figure_of_the_log_and_the_pictures(
    small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.chdir(tmp_path)
    write_drawn_set(tmp_path / "set", train=2, val=2, test=1, seed=3)
    settings = load_settings(
        None,
        [
            f"model.name={small_base}", "model.min_pixels=3136", "model.max_pixels=12544", "data.source=set", "name=test",
            "training.max_steps=2", "training.overfit_gate=false", "evaluation.max_new_tokens=4",
        ],
    )  # fmt: skip
    prepared = prepare(settings, say=lambda text: None)
    folder = train(prepared, say=lambda text: None)

    events = accumulator.EventAccumulator(str(folder / "train" / "tensorboard"))
    events.Reload()
    log = [json.loads(line) for line in (folder / "train" / "log.jsonl").read_text().splitlines()]
    logged = [(row["step"], row["loss"]) for row in log if "loss" in row]
    assert [step for step, _ in logged] == [1, 2]
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in logged]
    assert "eval/f1_50" in {name for row in log for name in row}
    assert [event.step for event in events.Images("samples")] == [2]

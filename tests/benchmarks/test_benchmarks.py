"""The benchmarks of training run on a few rows, and what they compare is the same training."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROWS = 5


def load(name: str) -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def train_step() -> Any:
    return load("train_step")


@pytest.fixture(scope="module")
def photographs(train_step: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    train_step.photographs.draw(folder, ROWS)
    return folder


class NoTurns:
    """Stands for the turns that the sides take in processes of their own: here nobody waits."""

    def __init__(self) -> None:
        self.started, self.extra, self.epochs = 0.0, {}, 0

    def begin(self) -> None:
        pass

    def end(self) -> None:
        self.epochs += 1


@pytest.fixture(scope="module")
def losses(train_step: Any, photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Losses of two epochs of each side, a step of five rows each."""
    found = {}
    for side in ("trl", "vlmdet", "pictures", "logits", "features", "order", "c"):
        turns = NoTurns()
        found[side] = train_step.train(side, photographs, ROWS, 2, tmp_path_factory.mktemp("side"), turns)
        assert turns.epochs == 2
    return found


@pytest.mark.parametrize("side", ["vlmdet", "pictures", "logits", "features", "order"])
def test_each_step_has_the_loss_of_the_peer(losses: dict[str, list[float]], side: str) -> None:
    assert len(losses["trl"]) == 2
    assert losses[side] == pytest.approx(losses["trl"], abs=1e-4)


def test_training_lowers_the_loss(losses: dict[str, list[float]]) -> None:
    """Else equal losses would say nothing about gradients."""
    assert losses["trl"][1] < losses["trl"][0] - 1e-3


def test_length_groups_of_one_step_hold_the_same_rows(losses: dict[str, list[float]]) -> None:
    assert losses["c"][0] == pytest.approx(losses["trl"][0], abs=1e-4)


def test_the_collators_are_compared_in_one_line_of_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["collate.py", "--rows", "4", "--epochs", "2"])
    load("collate").main()
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert set(result["rows_per_second"]) == {"trl", "v3", "v3 cached"}
    assert all(value > 0 for part in result["ratio_to_trl"].values() for value in part.values())


@pytest.mark.slow
def test_sides_take_turns_in_processes_of_their_own() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "train_step.py")]
        + ["--rows", "4", "--epochs", "2", "--sides", "trl", "order", "--memory-rows"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert result["largest_loss_difference"]["order"] <= 1e-4
    assert set(result["ratio_to_trl"]["order"]) == {"first", "later", "all"}
    assert result["supervised_tokens_an_epoch"] > 4 * 2  # at least a word and an end token a row


def test_both_sides_of_the_metrics_have_the_same_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["metrics.py", "--pictures", "20", "--classes", "3", "--rounds", "1"])
    load("metrics").main()
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)["coco"]
    assert result["largest_difference"] <= 1e-6
    assert 0 < result["AP"] < 1

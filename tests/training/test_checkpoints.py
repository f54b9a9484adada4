"""A stopped run's folder is brought back to its newest whole checkpoint; what is half is never taken for whole."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from vlmdet.errors import ConfigError
from vlmdet.training.checkpoints import (
    delete_checkpoint,
    go_back,
    is_disk_full,
    point,
    refuse_other_processes,
    whole_checkpoints,
)


def checkpoint(folder: Path, step: int, *, whole: bool = True) -> Path:
    made = folder / "checkpoints" / f"checkpoint-{step}"
    made.mkdir(parents=True)
    (made / "model.safetensors").write_text("weights")
    if whole:
        (made / "contract.json").write_text("{}")
    return made


def run(tmp_path: Path, metrics: str, log: str) -> Path:
    (tmp_path / "train" / "samples").mkdir(parents=True)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "train" / "metrics.csv").write_text(metrics)
    (tmp_path / "train" / "log.jsonl").write_text(log)
    return tmp_path


def test_what_comes_after_the_newest_whole_checkpoint_is_taken_back(tmp_path: Path) -> None:
    folder = run(
        tmp_path,
        "step,f1_50,mean_best_iou\n4.0,0.5,0.6\n8.0,0.7,0.1\n12.0,0.9,0.9\n",
        '{"step": 4, "loss": 2}\n{"step": 8, "loss": 1}\n{"step": 9, "loss": 0.9}\n{"step": 12, "lo',
    )
    for step in (4, 8):
        checkpoint(folder, step)
    checkpoint(folder, 12, whole=False)
    for step in (8, 12):
        (folder / "train" / "samples" / f"step_{step:06d}.png").touch()
    point(folder / "checkpoints" / "best", "checkpoint-4")
    point(folder / "checkpoints" / "last", "checkpoint-4")  # died between the mark of checkpoint 8 and its links

    newest, rows = go_back(folder)

    assert newest == folder / "checkpoints" / "checkpoint-8"
    assert rows == [{"step": 4, "f1_50": 0.5, "mean_best_iou": 0.6}, {"step": 8, "f1_50": 0.7, "mean_best_iou": 0.1}]
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {
        "checkpoint-4",
        "checkpoint-8",
        "best",
        "last",
    }
    assert (folder / "checkpoints" / "best").resolve().name == "checkpoint-8"  # its F1 is higher
    assert (folder / "checkpoints" / "last").resolve().name == "checkpoint-8"
    assert (folder / "train" / "log.jsonl").read_text() == '{"step": 4, "loss": 2}\n{"step": 8, "loss": 1}\n'
    assert [path.name for path in (folder / "train" / "samples").iterdir()] == ["step_000008.png"]


def test_without_a_whole_checkpoint_the_run_starts_anew(tmp_path: Path) -> None:
    folder = run(tmp_path, "step,f1_50\n2.0,0.5\n", '{"step": 2, "loss": 2}\n')
    checkpoint(folder, 2, whole=False)
    assert go_back(folder) == (None, [])
    assert (folder / "train" / "log.jsonl").read_text() == ""
    assert not (folder / "train" / "metrics.csv").exists()
    assert whole_checkpoints(folder / "checkpoints") == []
    assert go_back(folder) == (None, [])  # twice is as once


def test_a_deletion_that_dies_half_way_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = checkpoint(tmp_path, 3)

    def die(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vlmdet.training.checkpoints.shutil.rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        delete_checkpoint(made)
    assert made.is_dir() and whole_checkpoints(tmp_path / "checkpoints") == []


def test_a_full_disk_is_told_from_other_errors() -> None:
    assert is_disk_full(OSError(errno.ENOSPC, "No space left on device"))
    assert is_disk_full(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert is_disk_full(
        RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed: file write failed")
    )
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"))
    assert not is_disk_full(ValueError("no such row"))


def test_another_number_of_processes_does_not_go_on(tmp_path: Path) -> None:
    alone, shared = checkpoint(tmp_path, 4), checkpoint(tmp_path, 8)
    (alone / "rng_state.pth").touch()
    for rank in (0, 1):
        (shared / f"rng_state_{rank}.pth").touch()
    refuse_other_processes(alone, 1)
    refuse_other_processes(shared, 2)
    with pytest.raises(ConfigError, match=r"trained on 2 processes, and this is a run on 1.*--num-processes 2"):
        refuse_other_processes(shared, 1)
    with pytest.raises(ConfigError, match=r"trained on 1 process, and this is a run on 4.*one process"):
        refuse_other_processes(alone, 4)

"""Runs are numbered past the highest, and found by name, number or the newest that has a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmdet.errors import DataError
from vlmdet.runs import find_run, need_run, new_run


def finish(folder: Path) -> Path:
    (folder / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    (folder / "checkpoints" / "best").symlink_to("checkpoint-5")
    return folder


def test_numbers_go_on_and_the_newest_finished_run_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = finish(new_run("cells"))
    assert first == Path("runs/cells/001")
    assert new_run("cells") == Path("runs/cells/002")  # a gap is not filled, nothing is overwritten
    assert find_run("cells") == find_run("runs/cells") == find_run("runs/cells/001") == first
    assert find_run("runs/cells/002") is None
    for number in ("999", "1000"):
        finish(Path("runs/cells") / number)
    assert find_run("cells") == Path("runs/cells/1000")
    assert new_run("cells") == Path("runs/cells/1001")


def test_a_dead_link_is_no_result_and_a_refusal_lists_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="none yet"):
        need_run("cells")
    finish(new_run("cells"))
    broken = new_run("cells")
    (broken / "checkpoints").mkdir()
    (broken / "checkpoints" / "best").symlink_to("checkpoint-9")
    assert need_run("cells").name == "001"
    with pytest.raises(DataError, match="runs/cells/001"):
        need_run("cell")

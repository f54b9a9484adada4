"""A run that is stopped, killed or out of disk goes on to the very weights of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vlmdet.config import load_settings
from vlmdet.errors import DataError, Stopped, TrainingError
from vlmdet.runs import is_done
from vlmdet.settings import Settings
from vlmdet.training.callbacks import IoUEvalCallback, JsonLogCallback
from vlmdet.training.prepare import prepare
from vlmdet.training.train import train

# Adapter with dropout, augmentation, accumulation and an evaluation half-way: everything that has a state.
OVERRIDES = (
    "data.source=set", "name=test", "model.min_pixels=3136", "model.max_pixels=12544", "lora.dropout=0.1",
    "lora.targets=[language.attn, vision.mlp]", "training.learning_rate=1e-2", "training.vision_learning_rate=5e-3",
    "training.batch_size=1", "training.gradient_accumulation=2", "training.epochs=3", "training.eval_every=4",
    "training.save_every=2", "training.sample_rows=1", "training.overfit_gate=false", "training.report_to=[]",
    "augment.crop=0.7", "augment.color=0.7", "evaluation.max_new_tokens=4",
)  # fmt: skip
STEPS = 9  # 6 rows, 2 a step, 3 epochs

CHILD = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads({threads})
from vlmdet.config import load_settings
from vlmdet.training import callbacks, train
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
def at(step, method):
    before = method
    def later(self, args, state, control, **kwargs):
        if state.global_step == step:
            die()
        return before(self, args, state, control, **kwargs)
    return later
{how}
settings = load_settings(None, {overrides!r})
train.train(train.prepare(settings, say=print), say=print)
"""


def settings_for(base: Path, *more: str) -> Settings:
    return load_settings(None, [f"model.name={base}", *OVERRIDES, *more])


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, which holds a drawn set of six training and two validation pictures."""
    from vlmdet.data.synthetic.packages import write_drawn_set

    monkeypatch.chdir(tmp_path)
    write_drawn_set(tmp_path / "set", train=6, val=2, test=1, seed=3)
    return tmp_path


def go(settings: Settings, *, new: bool = False) -> tuple[Path, list[str]]:
    lines: list[str] = []
    prepared = prepare(settings, new=new, say=lines.append)
    try:
        return train(prepared, say=lines.append), lines
    finally:
        assert prepared.lock is not None
        prepared.lock.close()


def losses(folder: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (folder / "train" / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "last" / "adapter_model.safetensors")


def assert_equal_runs(whole: Path, stopped: Path) -> None:
    assert [step for step, _ in losses(stopped)] == list(range(1, STEPS + 1))
    assert losses(stopped) == losses(whole)
    expected, found = weights(whole), weights(stopped)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert (whole / "train" / "metrics.csv").read_text().split() == (
        stopped / "train" / "metrics.csv"
    ).read_text().split()


@pytest.mark.slow
def test_killed_while_saving_and_killed_between_checkpoints(small_base: Path, pictures: Path) -> None:
    whole, _ = go(settings_for(small_base))
    assert whole.name == "001" and is_done(whole)

    kills = (
        "train.SFTTrainer._save_rng_state = die",  # the weights of checkpoint 2 are written, and nothing after them
        "callbacks.JsonLogCallback.on_log = at(6, callbacks.JsonLogCallback.on_log)",  # checkpoint 4 is whole, 5 and 6 are lost
        "callbacks.IoUEvalCallback.on_save = at(8, callbacks.IoUEvalCallback.on_save)",  # checkpoint 8 lacks its mark
    )
    overrides = [f"model.name={small_base}", *OVERRIDES]
    for how in kills:
        text = CHILD.format(how=how, overrides=overrides, threads=torch.get_num_threads())
        ended = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert not is_done(pictures / "runs/test/002")
    assert "going on from runs/test/002/checkpoints/checkpoint-4" in ended.stdout

    stopped, lines = go(settings_for(small_base))
    assert stopped == Path("runs/test/002")
    assert any("going on from runs/test/002/checkpoints/checkpoint-6" in line for line in lines)
    assert_equal_runs(whole, stopped)


def test_killed_after_the_last_checkpoint_takes_no_step_more(small_base: Path, pictures: Path) -> None:
    settings = settings_for(small_base, "training.max_steps=2", "training.save_every=0")  # the middle of the first pass
    folder, _ = go(settings)
    done, before = (folder / "done.json").read_text(), weights(folder)
    (folder / "done.json").unlink()  # it died just before it wrote that

    again, lines = go(settings)
    assert again == folder
    assert any("going on from" in line for line in lines)
    assert (folder / "done.json").read_text() == done
    assert [step for step, _ in losses(folder)] == [1, 2]
    after = weights(folder)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("step", [3, 4])  # 4 is a step after which an evaluation is due
def test_a_signal_saves_and_the_same_command_goes_on(
    step: int, small_base: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = go(settings_for(small_base, "training.save_every=0"))
    before: Callable[..., None] = JsonLogCallback.on_log

    def send(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        before(self, args, state, control, **kwargs)

    monkeypatch.setattr(JsonLogCallback, "on_log", send)
    with pytest.raises(Stopped, match=f"stopped after step {step} of 9") as caught:
        go(settings_for(small_base, "training.save_every=0"))
    assert caught.value.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.setattr(JsonLogCallback, "on_log", before)
    stopped, _ = go(settings_for(small_base, "training.save_every=0"))
    assert stopped == Path("runs/test/002")
    assert_equal_runs(whole, stopped)


def test_a_full_disk_keeps_the_last_checkpoint(
    small_base: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    before = IoUEvalCallback.on_step_end

    def shrink(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before(self, args, state, control, **kwargs)
        if state.global_step == 4:  # from here on no file may grow over 20 kB
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    monkeypatch.setattr(IoUEvalCallback, "on_step_end", shrink)
    try:
        with pytest.raises(TrainingError, match=r"is full .*checkpoint-2 is whole; free some space") as caught:
            go(settings_for(small_base))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert "checkpoints" not in str(caught.value.hint)
    kept = sorted(path.name for path in Path("runs/test/001/checkpoints").glob("checkpoint-*"))
    assert kept == ["checkpoint-2"]


def test_equal_finished_runs_are_never_overwritten_and_new_starts_another(small_base: Path, pictures: Path) -> None:
    short = settings_for(small_base, "training.max_steps=1", "training.eval_every=0")
    assert go(short)[0] == Path("runs/test/001")
    assert go(short)[0] == Path("runs/test/002")
    (Path("runs/test/002") / "done.json").unlink()
    (Path("runs/test/001") / "done.json").unlink()
    assert go(settings_for(small_base, "training.max_steps=2", "training.eval_every=0"))[0] == Path("runs/test/003")
    assert go(short)[0] == Path("runs/test/002")  # the newest that is unfinished and equal
    assert go(short, new=True)[0] == Path("runs/test/004")


def test_two_processes_do_not_train_in_one_folder(small_base: Path, pictures: Path) -> None:
    short = settings_for(small_base, "training.max_steps=1")
    prepared = prepare(short, say=lambda text: None)
    with pytest.raises(DataError, match="is being trained by another process"):
        prepare(short, say=lambda text: None)
    assert prepared.lock is not None
    prepared.lock.close()


def test_the_trainers_state_is_read_as_plain_weights_only(
    small_base: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = torch.load

    def watch(*args: Any, **kwargs: Any) -> Any:
        calls.append((str(args[0]), kwargs.get("weights_only")))
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "load", watch)
    short = settings_for(small_base, "training.max_steps=3")
    before: Callable[..., None] = JsonLogCallback.on_log

    def send(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1 and "loss" in kwargs.get("logs", {}):  # once: a second signal stops at once
            os.kill(os.getpid(), signal.SIGTERM)
        before(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(JsonLogCallback, "on_log", send)
        with pytest.raises(Stopped):
            go(short)
    assert not calls
    folder, _ = go(short)
    assert not list(folder.rglob("training_args.bin"))
    assert calls and all(weights_only is True for _, weights_only in calls)
    assert all(Path(path).resolve().is_relative_to(folder.resolve()) for path, _ in calls)

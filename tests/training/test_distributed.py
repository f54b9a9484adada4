"""Several processes on the CPU train what one process trains, and one that dies ends all with a run that goes on."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from vlmdet.cli import main
from vlmdet.data.synthetic.packages import write_drawn_set

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STEPS = 5

KILLER = """
import os, signal, sys
from vlmdet.cli import main
from vlmdet.training.callbacks import StopCallback

def die(self, args, state, control, **kwargs):
    if state.global_step == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)

StopCallback.on_step_end = die
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a drawn set of 8 training pictures, and 5 for validation: no multiple of 2 or 4."""
    folder = tmp_path_factory.mktemp("distributed")
    write_drawn_set(folder / "drawn", train=8, val=5)
    return folder


def words(name: str, batch_size: int) -> list[str]:
    return [
        *("train", "drawn", "--recipe", "lora-light", "--model", "tiny", "--name", name, "lora.dropout=0"),
        *("--rename", "nutrition-table=text block"),  # what the embedded base knows
        *(f"training.batch_size={batch_size}", "training.gradient_accumulation=1", f"training.max_steps={STEPS}"),
        *("training.learning_rate=1e-3", "training.eval_every=0", "training.save_every=2", "training.loader_workers=0"),
        *("training.overfit_gate=false", "training.report_to=[]", "training.gradient_checkpointing=false"),
        *("evaluation.max_new_tokens=40", "evaluation.batch_size=4", "model.device=cpu", "model.dtype=float32"),
    ]


def vlmdet(place: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vlmdet", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=place)


def curve(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "train" / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def scores(run: Path) -> dict[str, str]:
    with (run / "train" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))[-1]


@pytest.fixture(scope="module")
def alone(place: Path) -> Path:
    """The run of one process, four pictures a step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert main(words("alone", 4)) == 0
    return place / "runs" / "alone" / "001"


def check_same(one: Path, other: Path) -> None:
    assert len(curve(one)) == len(curve(other)) == STEPS
    assert curve(one) == pytest.approx(curve(other), abs=1e-4)
    assert curve(one)[0] > curve(one)[-1]
    assert scores(one) == scores(other)
    assert float(scores(one)["mean_best_iou"]) > 0.05  # or equal scores would show nothing


def test_four_processes_train_what_one_trains(alone: Path, place: Path) -> None:
    done = vlmdet(place, *words("four", 1), "--num-processes", "4")
    assert done.returncode == 0, done.stderr
    assert "distributed type MULTI_CPU, 4 processes" in done.stdout
    assert done.stdout.count("best checkpoint:") == 1  # one of them speaks
    check_same(alone, place / "runs" / "four" / "001")


def test_one_of_two_that_dies_ends_both_and_the_same_command_goes_on_to_the_same_end(alone: Path, place: Path) -> None:
    (place / "killer.py").write_text(KILLER)
    config = ROOT / "configs" / "accelerate" / "cpu.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "killer.py"]
    died = subprocess.run([*launcher, *words("dies", 2)], capture_output=True, text=True, check=False, cwd=place)
    assert died.returncode != 0
    run = place / "runs" / "dies" / "001"
    assert "SIGKILL" in died.stderr
    assert not (run / "done.json").exists()
    assert [path.name for path in (run / "checkpoints").glob("checkpoint-*/contract.json")] == ["contract.json"]

    done = vlmdet(place, *words("dies", 2), "--num-processes", "2")
    assert done.returncode == 0, done.stderr
    assert "going on from runs/dies/001/checkpoints/checkpoint-2" in done.stdout
    assert (run / "done.json").exists()
    check_same(alone, run)

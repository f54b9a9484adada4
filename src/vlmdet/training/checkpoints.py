"""Checkpoints that can be trusted: which are whole, which is newest and best, and going back to one.

When: PER RUN, at every save and when a stopped run goes on; no torch.

    checkpoints/checkpoint-120/    weights or adapter, processor, trainer_state.json, optimizer.pt, scheduler.pt, rng_state.pth,
                                   contract.json
    checkpoints/best -> checkpoint-80
    checkpoints/last -> checkpoint-120

`contract.json` is written last and deleted first, so a folder that has one is whole, wherever a process died.
"""

from __future__ import annotations

import csv
import errno
import json
import shutil
from pathlib import Path
from typing import Any

from vlmdet.contract import FILE_NAME
from vlmdet.errors import ConfigError
from vlmdet.files import write_whole

PREFIX = "checkpoint-"


def step_of(checkpoint: Path) -> int:
    """Return the optimiser step of a checkpoint by its name: `checkpoint-120` -> 120."""
    return int(checkpoint.name.removeprefix(PREFIX))


def whole_checkpoints(checkpoints: Path) -> list[Path]:
    """List the checkpoints that were written to their end, oldest first."""
    found = [path for path in checkpoints.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted((path for path in found if (path / FILE_NAME).is_file()), key=step_of)


def point(link: Path, target: str) -> None:
    """Make a symbolic link beside its target, replacing an older one in a single step."""
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(link)


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, its mark first: what is left of it if the process dies here is not taken for whole."""
    (folder / FILE_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder)


def delete_others(checkpoints: Path) -> None:
    """Delete the checkpoints to which neither `best` nor `last` points."""
    kept = {(checkpoints / name).resolve().name for name in ("best", "last") if (checkpoints / name).exists()}
    for folder in checkpoints.glob(f"{PREFIX}*"):
        if folder.name not in kept:
            delete_checkpoint(folder)


def refuse_other_processes(checkpoint: Path, processes: int) -> None:
    """Refuse to go on from a checkpoint that another number of processes wrote.

    When: once, before a stopped run goes on: a step would see another number of pictures, and the steps that were taken would be
    counted as others.

    Raises:
        ConfigError: the trainer has kept the random state of another number of processes beside the weights.
    """
    wrote = len(list(checkpoint.glob("rng_state_*.pth"))) or 1
    if wrote != processes:
        raise ConfigError(
            f"{checkpoint} was trained on {wrote} process{'es' * (wrote > 1)}, and this is a run on {processes}",
            f"go on with {f'--num-processes {wrote}' if wrote > 1 else 'one process'}, or start another run with --new",
        )


def rank(row: dict[str, float]) -> tuple[float, float]:
    """Order evaluations: the higher F1@0.5 is better, and among equals the higher mean best IoU."""
    return row.get("f1_50", 0.0), row.get("mean_best_iou", 0.0)


def go_back(folder: Path) -> tuple[Path | None, list[dict[str, float]]]:
    """Bring a stopped run's folder to the state of its newest whole checkpoint.

    When: once, before a stopped run goes on.

    Input: the run's `folder`.
    Output: the checkpoint to go on from, None to start anew; and the evaluations up to it, rows of `metrics.csv`. Half-written
    checkpoints are deleted, `best` and `last` point at whole ones, and what logs and metrics say of later steps is taken out,
    for those steps come again.
    """
    checkpoints = folder / "checkpoints"
    whole = whole_checkpoints(checkpoints)
    for path in checkpoints.glob(f"{PREFIX}*"):
        if path not in whole:
            delete_checkpoint(path)
    newest = whole[-1] if whole else None
    step = step_of(newest) if newest else 0
    _keep_log(folder / "train" / "log.jsonl", step)
    rows = _keep_metrics(folder / "train" / "metrics.csv", step)
    for picture in (folder / "train" / "samples").glob("step_*.png"):
        if int(picture.stem.removeprefix("step_")) > step:
            picture.unlink()
    for link in (checkpoints / "best", checkpoints / "last"):
        if link.is_symlink() and not link.exists():
            link.unlink()
    if newest is not None:
        point(checkpoints / "last", newest.name)
        scored = {row["step"]: row for row in rows}
        best = max(
            (path for path in whole if step_of(path) in scored), key=lambda p: rank(scored[step_of(p)]), default=None
        )
        if best is not None or not (checkpoints / "best").exists():
            point(checkpoints / "best", (best or newest).name)
    return newest, rows


def _keep_log(path: Path, step: int) -> None:
    if path.exists():
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of_line(line) <= step]
        write_whole(path, "".join(f"{line}\n" for line in kept))


def _step_of_line(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the process died while it wrote this line
        return float("inf")


def _keep_metrics(path: Path, step: int) -> list[dict[str, float]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))
    names, kept = (lines[0] if lines else []), []
    for line in lines[1:]:
        if len(line) == len(names) and line[0] and float(line[0]) <= step:  # the last line may be half a line
            kept.append(line)
    if not names or not kept:
        path.unlink()
        return []
    text = "".join(",".join(line) + "\n" for line in [names, *kept])
    write_whole(path, text)
    return [{name: float(cell) for name, cell in zip(names, line, strict=True) if cell} for line in kept]


def is_disk_full(error: BaseException) -> bool:
    """Tell whether an error of saving says that the disk, the quota or the allowed file size is used up.

    Python's own errors carry a number; those of safetensors and of torch's writer only a text.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    text = str(error).lower()
    return any(
        word in text for word in ("no space left", "os error 28", "os error 27", "file too large", "file write failed")
    )


def write_done(folder: Path, facts: dict[str, Any]) -> None:
    """Mark a run as finished: `done.json` in its folder, written at once or not at all."""
    write_whole(folder / "done.json", json.dumps(facts, indent=2) + "\n")

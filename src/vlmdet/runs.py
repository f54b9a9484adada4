"""Where runs lie and how a user names one.

When: ALWAYS; no torch. The layout is in the architecture: `runs/<name>/<NNN>/`, never overwritten.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from vlmdet.errors import DataError

RUNS = Path("runs")


def new_run(name: str, *, root: Path = RUNS) -> Path:
    """Make the folder of a new run, `runs/<name>/<NNN>`, numbered one past the highest there is.

    When: once, at the start of training.
    """
    parent = root / name
    taken = [int(child.name) for child in parent.iterdir() if child.name.isdigit()] if parent.is_dir() else []
    folder = parent / f"{max(taken, default=0) + 1:03d}"
    folder.mkdir(parents=True)
    return folder


def is_done(folder: Path) -> bool:
    """Tell whether the training of a run came to its end."""
    return (folder / "done.json").is_file()


def find_equal(name: str, *, config: str, fingerprints: Mapping[str, str], root: Path = RUNS) -> Path | None:
    """Find the newest run of a name that was started with the same settings, data and base.

    Input: `config`, the text of `config.yaml`; `fingerprints`, values that its `contract.json` must hold.
    Output: the folder `runs/<name>/<NNN>`, finished or not; None where there is none.
    """
    parent = root / name
    numbered = [child for child in parent.iterdir() if child.name.isdigit()] if parent.is_dir() else []
    for folder in sorted(numbered, key=lambda child: int(child.name), reverse=True):
        try:
            contract = json.loads((folder / "contract.json").read_text(encoding="utf-8"))
            same = (folder / "config.yaml").read_text(encoding="utf-8") == config
        except (OSError, ValueError):  # died before it had written them, so nothing is lost with it
            continue
        if same and all(contract.get(key) == value for key, value in fingerprints.items()):
            return folder
    return None


def lock(folder: Path) -> IO[str]:
    """Keep other processes from training in the same folder, for as long as the returned file is open.

    The operating system frees the lock when the process ends, however it ends.

    Raises:
        DataError: another process trains there.
    """
    file = (folder / ".lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise DataError(
            f"{folder} is being trained by another process", "wait for it, or start another with --new"
        ) from error
    return file


def find_run(name: str | Path) -> Path | None:
    """Find the folder of a run by what a user types: `runs/demo` (its newest finished one), `runs/demo/001` or `demo`.

    Output: the folder `runs/<name>/<NNN>`, or None where the name is no run with a checkpoint.
    """
    for folder in (Path(name), RUNS / name):
        if is_finished(folder):
            return folder
        if folder.is_dir():
            numbered = [child for child in folder.iterdir() if child.name.isdigit()]
            numbered.sort(key=lambda child: int(child.name), reverse=True)  # as text, 1000 stands before 999
            for child in numbered:
                if is_finished(child):
                    return child
    return None


def is_finished(folder: Path) -> bool:
    """Tell whether a run has a best checkpoint."""
    return (folder / "checkpoints" / "best").exists()


def need_run(name: str | Path) -> Path:
    """Find the folder of a run, or refuse.

    Raises:
        DataError: there is none; the message lists those that exist.
    """
    folder = find_run(name)
    if folder is None:
        there = sorted(str(path) for path in RUNS.glob("*/*") if is_finished(path))
        raise DataError(
            f"{name}: no finished run there", f"there is: {', '.join(there[-8:]) or 'none yet; see vlmdet train'}"
        )
    return folder

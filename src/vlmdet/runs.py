"""Where runs lie and how a user names one.

When: ALWAYS; no torch. The layout is in the architecture: `runs/<name>/<NNN>/`, never overwritten.
"""

from __future__ import annotations

from pathlib import Path

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

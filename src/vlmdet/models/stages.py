"""Which trained folders stand between a base and what a user names, read from contracts.

When: ALWAYS; no torch. Ahead of loading, merging and every check that asks what an adapter lies on.

    r3-two-stage: runs/cells-2/001  ->  runs/cells-1/001/checkpoints/best  ->  Qwen/Qwen2-VL-2B-Instruct
                  adapter               fully tuned                            base
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from vlmdet.contract import FILE_NAME, Contract
from vlmdet.errors import ModelError
from vlmdet.runs import find_run

ADAPTER_CONFIG = "adapter_config.json"
MODEL_CONFIG = "config.json"


@dataclass(frozen=True)
class Stages:
    """The way from a base to a tuned model.

    Attributes:
        base: the true first base: `tiny`, a hub id, or a folder that no run of ours wrote.
        folders: checkpoint folders, the first that was trained first; empty for a base.
    """

    base: str
    folders: tuple[Path, ...]

    @property
    def weights(self) -> str:
        """What is loaded whole: the last fully tuned stage, which replaces all before it, else the base."""
        full = [folder for folder in self.folders if not is_adapter(folder)]
        return str(full[-1]) if full else self.base

    @property
    def adapters(self) -> tuple[Path, ...]:
        """The adapters to lay on `weights`, in order."""
        count = next((i for i, folder in enumerate(reversed(self.folders)) if not is_adapter(folder)), None)
        return self.folders if count is None else self.folders[len(self.folders) - count :]


def stages_of(name: str) -> Stages:
    """Follow contracts from what a user names down to its base.

    When: once per load or merge.

    Input: `tiny`, a hub id, a folder of weights, a run (its best checkpoint), or a checkpoint folder.
    Output: `stages_of("runs/cells-2")` -> `Stages("tiny", (…/cells-1/001/checkpoints/checkpoint-40, …/cells-2/…))`. Below a
    fully tuned stage nothing need be there any more: the search ends at the name that its contract gives.

    Raises:
        ModelError: a folder that is needed is missing, holds an adapter without a contract, or is its own base.
        ContractError: a contract is broken.
    """
    folders: list[Path] = []
    wanted, asked_by = name, ""
    while (folder := checkpoint_of(wanted)) is not None:
        if folder.resolve() in [other.resolve() for other in folders]:
            way = " -> ".join(str(other) for other in [*reversed(folders), folder])
            raise ModelError(f"{name}: its contracts go in a circle: {way}", "mend base_model in one contract.json")
        folders.insert(0, folder)
        wanted, asked_by = Contract.read(folder).base_model, f", the base of {folder}"
    if not folders or is_adapter(folders[0]):
        _check_base(wanted, asked_by)
    return Stages(wanted, tuple(folders))


def checkpoint_of(name: str) -> Path | None:
    """Find the weights that a user means by the name of a run or of a checkpoint folder; None where it is neither."""
    if name == "tiny":  # always the embedded base, whatever lies in ./tiny or runs/tiny
        return None
    folder = Path(name)
    if (folder / FILE_NAME).is_file() and any((folder / file).is_file() for file in (MODEL_CONFIG, ADAPTER_CONFIG)):
        return folder
    run = find_run(name)
    return (run / "checkpoints" / "best").resolve() if run else None


def is_adapter(folder: Path) -> bool:
    """Tell an adapter's folder from one of whole weights."""
    return (folder / ADAPTER_CONFIG).is_file()


def _check_base(name: str, asked_by: str) -> None:
    """Refuse a base that is a path to nothing, or an adapter that does not say what it lies on."""
    folder = Path(name)
    if name == "tiny":
        return
    if is_adapter(folder):
        raise ModelError(
            f"{name}{asked_by}: an adapter without a {FILE_NAME}",
            "it is half written, or another tool's: merge it there, and name the result",
        )
    hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not name.startswith((".", "runs/"))
    if not folder.is_dir() and not hub_id:
        raise ModelError(
            f"{name}{asked_by}: no such folder, or no finished run in it", "name a run, a folder of weights or a hub id"
        )

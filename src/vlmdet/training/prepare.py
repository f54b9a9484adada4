"""Prepare a run: read the data, look at every picture, load the base, choose the folder, write the contract.

When: PER RUN, before `training.train.train`; a caller can score the untuned base between the two, under the very contract of the
run.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from vlmdet.config import to_yaml
from vlmdet.contract import Contract
from vlmdet.data.readers import open_dataset
from vlmdet.data.select import check_pictures, drop_rows, ensure_val, refuse_above, select, write_problems
from vlmdet.errors import DataError
from vlmdet.models.loader import Loaded, load, make_contract
from vlmdet.records import DetectionDataset
from vlmdet.runs import find_equal, is_done, lock, new_run
from vlmdet.settings import Settings
from vlmdet.training.processes import from_main, is_main, join
from vlmdet.utils.environment import describe_environment, format_environment

Say = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start: its folder holds `config.yaml`, `contract.json` and `problems.jsonl`.

    Attributes:
        lock: keeps other processes out of the folder as long as it is open; None on all but the main process.
    """

    settings: Settings
    folder: Path
    dataset: DetectionDataset
    base: Loaded
    contract: Contract
    lock: IO[str] | None = None


def read_data(settings: Settings, say: Say) -> DetectionDataset:
    """Open the data set that the settings name, with their classes, names, limit and validation split.

    When: once per run; again by `vlmdet eval` from the run's `config.yaml`.

    Raises:
        DataError: nothing there, an unknown class, or no rows left.
    """
    data = settings.data
    dataset = open_dataset(
        data.source, format=data.format, box_format=data.box_format, exif=data.exif, stream=data.stream
    )
    dataset = select(
        dataset, classes=data.classes or None, rename=data.rename or None, limit=data.limit, seed=data.seed
    )
    dataset, note = ensure_val(dataset, fraction=data.val_fraction, seed=data.seed)
    for line in dict.fromkeys([*dataset.notes, note]):
        say(line)
    counts = ", ".join(f"{name} {len(samples)}" for name, samples in dataset.splits.items())
    say(f"data: {data.source}: {counts} pictures; boxes read as {dataset.box_format} ({dataset.decided_by})")
    if not dataset.splits.get("train"):
        raise DataError(f"{data.source}: no row in the split 'train'", f"there is: {counts or 'no split at all'}")
    if not dataset.labels:
        raise DataError(f"{data.source}: no class to look for", "name one with --classes")
    return dataset


def prepare(
    settings: Settings, *, command: str = "", new: bool = False, reuse: bool = False, say: Say = print
) -> Prepared:
    """Read the data, look at every picture, load the base and write down what the run assumes.

    When: once per run, before anything is trained.

    Input: checked settings; `command`, as typed, for the record; `new`, start another run where an equal one is
    unfinished; `reuse`, take an equal one that is finished, too; `say`, where lines for the user go.
    Output: `Prepared`; in the run's folder `config.yaml`, `contract.json`, `command.txt`, `env.txt`, `problems.jsonl`. The folder
    is that of the newest run with equal settings, data and base, if that is unfinished; else a new one.

    Raises:
        DataError: too many rows are broken, see `data.max_problems`.
        ModelError: the base cannot be loaded.
    """
    dataset = read_data(settings, say)
    used = [sample for name in ("train", "val") for sample in dataset.splits.get(name, ())]
    before = sum(problem.action == "row_dropped" for problem in dataset.problems)
    total = sum(len(samples) for samples in dataset.splits.values()) + before
    dataset = drop_rows(dataset, check_pictures(used))
    problems = dataset.problems
    refuse_above(problems, total, share=settings.data.max_problems)

    base = load_base(settings)
    contract = make_contract(
        base,
        labels=dataset.labels,
        codec=settings.model.codec,
        box_order=settings.data.box_order,
        max_new_tokens=settings.evaluation.max_new_tokens,
        data_fingerprint=fingerprint_rows(dataset),
    )
    join(cpu=base.model.device.type == "cpu")
    folder = from_main(partial(_choose_folder, settings, contract, new=new, reuse=reuse))
    held = None
    if is_main():
        held = lock(folder)
        with (folder / "command.txt").open("a", encoding="utf-8") as file:
            file.write(command + "\n")
        (folder / "env.txt").write_text(format_environment(describe_environment()) + "\n", encoding="utf-8")
        write_problems(folder / "problems.jsonl", problems)
        contract.write(folder)
    kinds = Counter(f"{problem.kind} ({problem.action})" for problem in problems)
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "none"
    say(f"problems: {listed}; written to {folder / 'problems.jsonl'}")
    return Prepared(settings, folder, dataset, base, contract, held)


def load_base(settings: Settings) -> Loaded:
    """Load the base that the settings name; a tuned run or checkpoint is a base too, with its adapter merged in memory."""
    model = settings.model
    return load(
        model.name,
        dtype=model.dtype,
        device=model.device,
        attention=model.attention,
        min_pixels=model.min_pixels,
        max_pixels=model.max_pixels,
        quantization=model.quantization,
        quantize_vision=model.quantize_vision,
        as_base=True,
    )


def _choose_folder(settings: Settings, contract: Contract, *, new: bool, reuse: bool) -> Path:
    """Return the folder of an equal run that is to go on, or of a new one, whose `config.yaml` is written."""
    config = to_yaml(settings)
    prints = {key: getattr(contract, key) for key in ("data_fingerprint", "base_fingerprint")}
    equal = None if new else find_equal(settings.name, config=config, fingerprints=prints)
    if equal is not None and (reuse or not is_done(equal)):
        return equal
    folder = new_run(settings.name)
    contract.write(folder)
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    return folder


def fingerprint_rows(dataset: DetectionDataset) -> str:
    """Hash ids, splits, boxes and labels of a data set: 16 hexadecimal digits."""
    rows = [
        [sample.id, split, sample.boxes.tolist(), list(sample.labels)]
        for split, samples in sorted(dataset.splits.items())
        for sample in samples
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]

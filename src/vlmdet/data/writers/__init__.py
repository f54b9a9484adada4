"""Write a data set in another layout, for another tool or another trainer.

When: ONCE, for `vlmdet convert`. One module a target:

    coco           annotations/instances_train.json, images/
    yolo           data.yaml, images/train/, labels/train/
    voc            Annotations/, ImageSets/Main/, JPEGImages/
    jsonl          train.jsonl, images/, classes.txt: our own, nothing rounded
    parquet        data/train-00000-of-00001.parquet: the schema of openfoodfacts/nutrition-table-detection
    swift          train.jsonl, images/: training files of ms-swift
    llamafactory   train.json, dataset_info.json, images/: training files of LLaMA-Factory
    trl            data/train-00000-of-00001.parquet with prompts and completions: training files of TRL

Beside them lie `conversion.json`, which says what was assumed, rounded and renamed, and `problems.jsonl`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from vlmdet.data.select import refuse_above, write_problems
from vlmdet.data.writers import coco, jsonl, parquet, voc, yolo
from vlmdet.data.writers.files import Writing
from vlmdet.errors import ConfigError, DataError, did_you_mean
from vlmdet.records import DetectionDataset

REPORT_FILE = "conversion.json"
PROBLEMS_FILE = "problems.jsonl"


class Target(NamedTuple):
    """How a layout is written: its function, what it rounds, and whether its pictures must be stored upright."""

    write: Callable[[Writing], None]
    rounding: str
    upright: bool


TARGETS = {
    "coco": Target(coco.write, coco.ROUNDING, upright=True),
    "yolo": Target(yolo.write, yolo.ROUNDING, upright=True),
    "voc": Target(voc.write, voc.ROUNDING, upright=True),
    "jsonl": Target(jsonl.write, jsonl.ROUNDING, upright=False),
    "parquet": Target(parquet.write, parquet.ROUNDING, upright=False),
}


def write_dataset(
    dataset: DetectionDataset,
    folder: Path,
    *,
    to: str,
    link: bool = False,
    max_problems: float = 0.01,
) -> Path:
    """Write a data set in another layout.

    When: once.

    Input: `folder`, absent or empty; `to`, one of the targets in this module's docstring; `link`, link to pictures that
    are files instead of copying them; `max_problems`, the share of rows that may be dropped.
    Output: `folder`. Pictures are copied byte for byte. Only where a picture has an EXIF turn and the target's readers do
    not turn it (all but `jsonl`, `parquet` and `trl`), its pixels are written upright: a JPEG as JPEG of quality 95,
    everything else as PNG. Nothing is left in `folder` when writing fails.

    Raises:
        ConfigError: the target is unknown.
        DataError: `folder` holds something, too many rows are dropped, or the target cannot hold a class name.
    """
    if to not in TARGETS:
        raise ConfigError(f"unknown target '{to}'", did_you_mean(to, TARGETS))
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise DataError(f"{folder} exists and is not empty; nothing is overwritten", "name a new folder")
    target = TARGETS[to]
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    # written beside it first, so that a conversion that fails leaves no half of a data set
    place = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.absolute().parent))
    try:
        writing = Writing(dataset, place, upright=target.upright, link=link, problems=list(dataset.problems))
        target.write(writing)
        dropped = sum(problem.action == "row_dropped" for problem in writing.problems)
        refuse_above(writing.problems, writing.images.total() + dropped, max_problems)
        write_problems(place / PROBLEMS_FILE, writing.problems)
        text = json.dumps(_report(writing, to), ensure_ascii=False, indent=1, default=str)
        (place / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
        place.chmod(0o755)  # mkdtemp makes it private
        if folder.exists():
            folder.rmdir()
        place.rename(folder)
    except BaseException:
        shutil.rmtree(place)
        raise
    return folder


def _report(writing: Writing, to: str) -> dict[str, Any]:
    """Return what `conversion.json` says."""
    dataset = writing.dataset
    return {
        "vlmdet": metadata.version("vlmdet"),
        "source": dataset.source,
        "read_as": {"box_format": str(dataset.box_format), "decided_by": dataset.decided_by},
        "to": to,
        "rounding": TARGETS[to].rounding,
        "labels": list(dataset.labels),
        "splits": {split: {"images": writing.images[split], "boxes": writing.boxes[split]} for split in dataset.splits},
        "pictures": dict(writing.pictures),
        "ids": writing.renamed,
        "notes": [*dataset.notes, *writing.notes],
    }


__all__ = ["TARGETS", "write_dataset"]

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
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from vlmdet.data.select import refuse_above, write_problems
from vlmdet.data.writers import coco, jsonl, llamafactory, parquet, swift, trl, voc, yolo
from vlmdet.data.writers.conversation import Training
from vlmdet.data.writers.files import Writing
from vlmdet.errors import ConfigError, DataError, did_you_mean
from vlmdet.records import DetectionDataset

REPORT_FILE = "conversion.json"
PROBLEMS_FILE = "problems.jsonl"


class Target(NamedTuple):
    """How a target is written: its function, what it rounds, and whether its pictures must be stored upright."""

    write: Callable[..., Any]
    rounding: str
    upright: bool
    trains: bool = False
    """The function takes a `Training` too, and returns what `conversion.json` says about it."""


TARGETS = {
    "coco": Target(coco.write, coco.ROUNDING, upright=True),
    "yolo": Target(yolo.write, yolo.ROUNDING, upright=True),
    "voc": Target(voc.write, voc.ROUNDING, upright=True),
    "jsonl": Target(jsonl.write, jsonl.ROUNDING, upright=False),
    "parquet": Target(parquet.write, parquet.ROUNDING, upright=False),
    "swift": Target(swift.write, swift.ROUNDING, upright=True, trains=True),
    "llamafactory": Target(llamafactory.write, llamafactory.ROUNDING, upright=True, trains=True),
    "trl": Target(trl.write, trl.ROUNDING, upright=False, trains=True),
}


def write_dataset(
    dataset: DetectionDataset,
    folder: Path,
    *,
    to: str,
    link: bool = False,
    training: Training | None = None,
    max_problems: float = 0.01,
) -> Path:
    """Write a data set in another layout.

    When: once.

    Input: `folder`, absent or empty; `to`, one of the targets in this module's docstring; `link`, link to pictures that
    are files instead of copying them; `training`, what training files are written for; `max_problems`, the share of rows
    that may be dropped for their pictures.
    Output: `folder`. Pictures are copied byte for byte. Only where a picture has an EXIF turn and the target's readers do
    not turn it (all but `jsonl`, `parquet` and `trl`), its pixels are written upright: a JPEG as JPEG of quality 95,
    everything else as PNG. Nothing is left in `folder` when writing fails.

    Raises:
        ConfigError: the target is unknown, or `training` does not fit it.
        DataError: `folder` holds something, too many rows are dropped, or the target cannot hold a class name.
    """
    if to not in TARGETS:
        raise ConfigError(f"unknown target '{to}'", did_you_mean(to, TARGETS))
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise DataError(f"{folder} exists and is not empty; nothing is overwritten", "name a new folder")
    target = TARGETS[to]
    if training is not None and training != Training() and not target.trains:
        raise ConfigError(
            f"--codec, --min-pixels and --max-pixels are for training files, and {to} is none",
            f"leave them out, or name one of {', '.join(name for name, one in TARGETS.items() if one.trains)}",
        )
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    # written beside it first, so that a conversion that fails leaves no half of a data set
    place = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.absolute().parent))
    try:
        writing = Writing(dataset, place, upright=target.upright, link=link, problems=list(dataset.problems))
        assumed = target.write(writing, training or Training()) if target.trains else target.write(writing)
        found = writing.problems[len(dataset.problems) :]
        dropped = sum(problem.action == "row_dropped" for problem in found)
        refuse_above(found, writing.images.total() + dropped, max_problems)
        write_problems(place / PROBLEMS_FILE, writing.problems)
        text = json.dumps(_report(writing, to, assumed), ensure_ascii=False, indent=1, default=str)
        (place / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
        place.chmod(0o755)  # mkdtemp makes it private
        if folder.exists():
            folder.rmdir()
        place.rename(folder)
    except BaseException:
        shutil.rmtree(place)
        raise
    return folder


def _report(writing: Writing, to: str, assumed: dict[str, Any] | None) -> dict[str, Any]:
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
        "notes": list(dataset.notes),
    } | ({"training": assumed} if assumed else {})


def format_report(folder: Path) -> str:
    """Return what `conversion.json` of a folder says, some lines to print."""
    report = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
    lines = [f"read {report['source']} as {report['read_as']['box_format']} ({report['read_as']['decided_by']})"]
    lines += [
        f"{name}: {count['images']:,} images, {count['boxes']:,} boxes" for name, count in report["splits"].items()
    ]
    lines.append(f"rounding: {report['rounding']}")
    if report["pictures"]:
        lines.append(
            "pictures: " + ", ".join(f"{n:,} {how.replace('_', ' ')}" for how, n in report["pictures"].items())
        )
    if report["ids"]:
        lines.append(f"{len(report['ids']):,} ids are no file names and were changed; {REPORT_FILE} says how")
    lines += report["notes"]
    if training := report.get("training"):
        limits = [f"{key} {training[key]:,}" for key in ("min_pixels", "max_pixels") if key in training]
        lines.append(f"answers in the codec {training['codec']}; resize: {', '.join([training['resize'], *limits])}")
        lines += [f"  {line}" for line in training["use"]]
    problems = Counter(json.loads(line)["kind"] for line in (folder / PROBLEMS_FILE).open(encoding="utf-8"))
    if problems:
        kinds = ", ".join(f"{kind}: {n:,}" for kind, n in problems.most_common())
        lines.append(f"{problems.total():,} problems ({kinds}): {folder / PROBLEMS_FILE}")
    return "\n".join([*lines, f"written: {folder}"])


__all__ = ["TARGETS", "Training", "format_report", "write_dataset"]

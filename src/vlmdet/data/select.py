"""Choose from a data set and look its pictures over, before anything is built on it.

When: ONCE per command, after a reader: keep some classes, rename them, take fewer rows, make a validation split where
there is none, open every picture once and say what is odd, write `problems.jsonl`.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vlmdet.data.pictures import look_over
from vlmdet.errors import DataError, did_you_mean
from vlmdet.records import DetectionDataset, Problem, Sample


def select(
    dataset: DetectionDataset,
    *,
    classes: Sequence[str] | None = None,
    rename: Mapping[str, str] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> DetectionDataset:
    """Keep some classes, rename them, and keep some rows.

    When: once, for `--classes`, `--rename`, `--limit`.

    Input: `classes` to keep, None for all; `rename`, old name -> new, applied after the choice, where several may get
    one name; `limit`, the most rows of each split, drawn by `seed` without regard to content: a larger limit keeps the
    rows of a smaller one, and rows stay in their order.
    Output: the data set. Pictures whose boxes are all left out stay, as pictures without an object. What was done
    stands in `notes`.

    Raises:
        DataError: a class is unknown or left out by `classes`, a new name is empty, or `limit` is below 1.
    """
    chosen = tuple(dataset.labels if classes is None else classes)
    renames = dict(rename or {})
    for name in chosen:
        if name not in dataset.labels:
            raise DataError(f"{dataset.source} has no class '{name}'", _class_hint(name, dataset.labels))
    for old, new in renames.items():
        if old not in chosen:
            raise DataError(f"cannot rename '{old}': it is not among the chosen classes", _class_hint(old, chosen))
        if not new.strip():
            raise DataError(f"cannot rename '{old}' to an empty name")
    if not chosen:
        raise DataError(
            f"no class of {dataset.source} is chosen", f"there is: {', '.join(dataset.labels) or 'nothing'}"
        )
    if limit is not None and limit < 1:
        raise DataError(f"a limit of {limit} rows", "--limit takes a number from 1")

    new_names = {name: renames.get(name, name) for name in dataset.labels if name in chosen}
    notes = list(dataset.notes)
    left_out = 0
    splits: dict[str, Sequence[Sample]] = {}
    for split, samples in dataset.splits.items():
        rows = list(samples)
        if limit is not None and len(rows) > limit:
            notes.append(f"{split}: {limit} of {len(rows)} rows, drawn with seed {seed}")
            order = np.random.default_rng([seed, zlib.crc32(split.encode())]).permutation(len(rows))
            rows = [rows[number] for number in sorted(order[:limit])]
        splits[split] = [_relabel(sample, new_names) for sample in rows]
        left_out += sum(len(old.labels) - len(new.labels) for old, new in zip(rows, splits[split], strict=True))
    if left_out:
        notes.append(f"{left_out} boxes of other classes than {', '.join(chosen)} are left out; their pictures stay")
    notes += [f"'{old}' is renamed '{new}'" for old, new in renames.items()]
    labels = tuple(dict.fromkeys(new_names.values()))
    return replace(dataset, splits=splits, labels=labels, notes=tuple(notes))


def _class_hint(name: str, labels: Sequence[str]) -> str:
    """Name the nearest class, upper and lower case aside, and all that there are."""
    alike = [label for label in labels if label.lower() == name.lower()]
    near = f"did you mean '{alike[0]}'?" if alike else did_you_mean(name, labels)
    everything = f"there is: {', '.join(labels) or 'nothing'}"
    return near if near == everything else f"{near} {everything}"


def _relabel(sample: Sample, new_names: Mapping[str, str]) -> Sample:
    kept = [number for number, label in enumerate(sample.labels) if label in new_names]
    labels = tuple(new_names[sample.labels[number]] for number in kept)
    crowd = [number for number, label in enumerate(sample.crowd_labels) if label in new_names]
    return replace(
        sample,
        boxes=sample.boxes[kept],
        labels=labels,
        crowd=sample.crowd[crowd],
        crowd_labels=tuple(new_names[sample.crowd_labels[number]] for number in crowd),
    )


def ensure_val(dataset: DetectionDataset, *, fraction: float = 0.1, seed: int = 0) -> tuple[DetectionDataset, str]:
    """Make a validation split of train where there is none.

    When: once, before training, so that the test split chooses nothing.

    Input: `fraction` of the train rows, rounded, at least one; `seed`.
    Output: the data set and a line to print. Rows that share a `group` stay on one side, so a group that is larger than
    what is wanted stays in train; the choice depends on ids and groups, not on the order of the rows. A data set with a
    `val` split comes back as it is.

    Raises:
        DataError: no train split, or too few rows or groups to divide it, or `fraction` is not between 0 and 1.
    """
    if dataset.splits.get("val"):
        return dataset, f"validation: {len(dataset.splits['val'])} rows, the data set's own split"
    train = list(dataset.splits.get("train", ()))
    if not 0 < fraction < 1:
        raise DataError(f"a validation share of {fraction}", "choose one between 0 and 1")
    if not train:
        raise DataError(
            f"{dataset.source} has no train rows to make a validation split of",
            f"its splits: {', '.join(f'{name} ({len(rows)})' for name, rows in dataset.splits.items()) or 'none'}",
        )
    groups: dict[tuple[str, str], list[str]] = {}
    for sample in train:
        groups.setdefault(("group", sample.group) if sample.group else ("id", sample.id), []).append(sample.id)
    if len(groups) < 2:
        raise DataError(
            f"the {len(train)} train rows of {dataset.source} are one group and cannot be divided",
            "give the data set a val split",
        )
    wanted = min(max(round(fraction * len(train)), 1), len(train) - 1)  # at least one group stays in train
    keys = sorted(groups)
    held: set[str] = set()
    for number in np.random.default_rng(seed).permutation(len(keys)):
        if len(held) + len(groups[keys[number]]) <= wanted:
            held.update(groups[keys[number]])
    if not held:  # every group is larger than what is wanted
        held.update(min((len(groups[key]), groups[key]) for key in keys)[1])
    validation = [replace(sample, split="val") for sample in train if sample.id in held]
    rest = [sample for sample in train if sample.id not in held]
    line = (
        f"validation: {len(validation)} of {len(train)} train rows, drawn with seed {seed}, groups kept together, "
        f"since the data set has no val split"
    )
    splits = {**dataset.splits, "train": rest, "val": validation}
    return replace(dataset, splits=splits, notes=(*dataset.notes, line)), line


def check_pictures(samples: Iterable[Sample]) -> list[Problem]:
    """Open every picture once and report what is odd about it; see `pictures.look_over`.

    When: once, before training or scoring; some milliseconds a picture. `drop_rows` then leaves out the rows whose
    problem says so.
    """
    return look_over(samples).problems


def check_places(samples: Sequence[Sample]) -> tuple[list[Sample], list[Problem]]:
    """Leave out the samples whose boxes would lie elsewhere than their rows say, before a split is scored.

    When: once, before scoring. A picture that cannot be opened stays: its row of the predictions becomes an error.
    """
    misplaced = [
        problem
        for problem in check_pictures(samples)
        if problem.action == "row_dropped" and problem.kind in ("exif_rotated", "size_mismatch")
    ]
    dropped = {problem.id for problem in misplaced}
    return [sample for sample in samples if sample.id not in dropped], misplaced


def drop_rows(dataset: DetectionDataset, problems: Sequence[Problem]) -> DetectionDataset:
    """Leave out the rows that `problems` say are dropped, and add the problems to the data set's own.

    When: once, after `check_pictures`.
    """
    dropped = {problem.id for problem in problems if problem.action == "row_dropped"}
    splits: dict[str, Sequence[Sample]] = {
        name: [row for row in rows if row.id not in dropped] for name, rows in dataset.splits.items()
    }
    return replace(dataset, splits=splits, problems=[*dataset.problems, *problems])


def write_problems(path: Path, problems: Iterable[Problem]) -> Path:
    """Write `problems.jsonl`, one problem a line; the file is written even without any, to say that there were none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(problem.as_dict(), ensure_ascii=False) + "\n" for problem in problems]
    # half a surrogate, which UTF-8 cannot write, becomes its JSON escape
    path.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    return path


def refuse_above(problems: Sequence[Problem], total: int, share: float = 0.01) -> None:
    """Stop where too many rows were dropped.

    When: once, before work starts.

    Input: `problems`; `total`, rows before any was dropped; `share` of them that may be dropped.

    Raises:
        DataError: more than `share` of the rows are dropped; it names the kinds, the first file and the flag.
    """
    rows = {(problem.file, problem.row, problem.id): problem for problem in problems if problem.action == "row_dropped"}
    if len(rows) <= share * total:
        return
    kinds = Counter(problem.kind for problem in rows.values()).most_common(3)
    first = next(iter(rows.values()))
    raise DataError(
        f"{len(rows)} of {total} rows are dropped, over the limit of {share:.1%} "
        f"({', '.join(f'{kind}: {count}' for kind, count in kinds)}; first: {first.file}, {first.detail[:120]})",
        "mend them, see problems.jsonl, or allow more with --max-problems",
    )

"""Rows of an unfinished prediction on disk, and under what they were made.

When: AFTER training, row by row, by `predict`; no torch. Beside `predictions.jsonl` lie

    predictions.jsonl.part      the header, then a row a line as they came: `{"index": 3, "row": {…}}`; of several processes,
                                `.part-1` and so on too
    predictions.made.json       of the whole file, the header: `{"contract": {…}, "samples": "9f2c…", "made_with": {…}}`

A process that is killed leaves at most half of its last line, which is cut off when the next one goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmdet.contract import MUST_AGREE, Contract
from vlmdet.errors import DataError
from vlmdet.evaluation.files import read_predictions
from vlmdet.files import write_whole
from vlmdet.records import Sample

MADE = "predictions.made.json"
RESULTS = "results.json"
"""The figures of the rows: gone while there are no whole rows, or a report would show those of rows that are no more."""

Row = dict[str, Any]


def header_of(contract: Contract, samples: Sequence[Sample], made_with: Mapping[str, Any]) -> str:
    """Word everything that rows depend on, as one line of JSON.

    When: once per prediction that is stored.

    Input: the contract, of which the fields count that must agree; samples, of which id, size, truth, and size and time of the
    file count; `made_with`, JSON values.
    """
    digest = hashlib.sha256()
    for sample in samples:
        file: Any = None
        if isinstance(sample.picture, Path):
            try:
                found = sample.picture.stat()
                file = [str(sample.picture), found.st_size, found.st_mtime_ns]
            except OSError:  # its row becomes an error
                file = [str(sample.picture)]
        values = [sample.id, sample.width, sample.height, sample.boxes.tolist(), sample.labels, file]
        if sample.crowd_labels:
            values += [sample.crowd.tolist(), sample.crowd_labels]
        digest.update(json.dumps(values).encode())
    fields = dataclasses.asdict(contract)
    header = {
        "contract": {name: fields[name] for name in MUST_AGREE},
        "samples": digest.hexdigest(),
        "made_with": dict(made_with),
    }
    return json.dumps(header, sort_keys=True, allow_nan=False)


def read_finished(path: Path, header: str) -> list[Row] | None:
    """Read the rows of a whole prediction that was made under the same header; None where there is none."""
    try:
        if (path.parent / MADE).read_text(encoding="utf-8") != header + "\n":
            return None
        return read_predictions(path)
    except (OSError, DataError):
        return None


def read_made_with(path: Path) -> dict[str, Any]:
    """Read what the rows of a whole prediction were made with: `made_with` of `predict`; nothing where that is not known.

    When: once per file that is scored again. Rows that were taken away from `predictions.made.json` say less of themselves.
    """
    try:
        made = json.loads((path.parent / MADE).read_text(encoding="utf-8")).get("made_with", {})
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
    return made if path.name == "predictions.jsonl" and isinstance(made, dict) else {}


def read_parts(path: Path, header: str) -> dict[int, Row]:
    """Read the rows that broken-off processes stored under the same header, by index; parts under another are deleted."""
    rows: dict[int, Row] = {}
    for part in sorted(path.parent.glob(f"{path.name}.part*")):
        if part.name.rpartition(".part")[2].lstrip("-").isdigit() or part.name.endswith(".part"):
            lines = part.read_bytes().split(b"\n")
            if lines[0] != header.encode():
                continue
            for line in lines[1:-1]:  # behind the last line break lies nothing, or half a line
                entry = json.loads(line)
                rows[entry["index"]] = entry["row"]
    return rows


class Part:
    """The part file of one process: opened where it goes on, written line by line."""

    def __init__(self, path: Path, header: str, rank: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = _part(path, rank)
        first = header.encode() + b"\n"
        try:
            before = self.path.read_bytes()
        except FileNotFoundError:
            before = b""
        if before.startswith(first):
            before = before[: before.rindex(b"\n") + 1]
            with self.path.open("r+b") as file:
                file.truncate(len(before))
        else:
            for old in (MADE, RESULTS):  # from here on the whole file, and the figures, are of other rows
                (path.parent / old).unlink(missing_ok=True)
            write_whole(self.path, first)
        self._file = self.path.open("ab")

    def add(self, index: int, row: Row) -> None:
        """Store a row; after this it outlives the process."""
        line = json.dumps({"index": index, "row": row}, allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def finish(path: Path, header: str) -> None:
    """Write down what the whole file was made with, and delete its parts."""
    write_whole(path.parent / MADE, header + "\n")
    for part in path.parent.glob(f"{path.name}.part*"):
        part.unlink()


def _part(path: Path, rank: int) -> Path:
    return path.with_name(f"{path.name}.part" + (f"-{rank}" if rank else ""))

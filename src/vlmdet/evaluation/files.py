"""Read and write what an evaluation leaves: predictions.jsonl, results.json, results.csv, per_image.csv.

When: AFTER; no torch. `predict.py` writes predictions, everything after it reads them. One row of
`predictions.jsonl`, on one line:

    {"id": "3/1", "image": "3.png", "width": 640, "height": 480,
     "truth": {"boxes": [[0.1, 0.2, 0.5, 0.4]], "labels": ["cup"], "ignore": [false]},
     "text": "…", "boxes": [[0.1, 0.2, 0.5, 0.4]], "labels": ["cup"], "scores": null, "score_source": "none",
     "problems": [{"kind": "axis_swapped", "detail": "…"}], "status": "ok",
     "tokens": {"prompt": 90, "image": 64, "answer": 17}, "truncated": false, "ms": 41.5, "error": null}

Boxes are x1, y1, x2, y2 as fractions of the upright image.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmdet.errors import DataError

STATUSES = ("ok", "none", "parse_failure", "error")
PER_IMAGE_COLUMNS = ("id", "status", "n_truth", "n_pred", "tp", "fp", "fn", "mean_best_iou", "f1")


def write_predictions(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows of predictions, one JSON object a line; folders are made.

    When: once per run and split. The file appears when it is whole: a broken-off run leaves none.

    Raises:
        DataError: a row lacks a field or holds one that cannot be read again; names the file and the line.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        # An answer may hold half of a surrogate pair, which UTF-8 has no bytes for: the escape \udxxx is JSON for it.
        with unfinished.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            for line, row in enumerate(rows, start=1):
                _check_row(row, f"{path}:{line}")
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_predictions(path: str | Path) -> list[dict[str, Any]]:
    """Read rows of predictions as `write_predictions` wrote them.

    Output: rows in the order of the file; empty lines hold none.

    Raises:
        DataError: there is no such file, or a line is broken; names the file and the line.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})", "vlmdet eval writes predictions.jsonl") from error
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            rows.append(_read_line(line, f"{path}:{number}"))
    return rows


def write_results(
    folder: str | Path,
    figures: Mapping[str, Mapping[str, Any]],
    meta: Mapping[str, Any],
    *,
    images: Sequence[Mapping[str, Any]],
) -> None:
    """Write the figures of a run: results.json, results.csv, per_image.csv.

    When: once per run and split.

    Input: `figures` of `metrics.score_rows`; `meta`, what the figures are of (split, codec, prompt version, decoding,
    …), JSON values; `images` of `metrics.per_image`.
    Output: `results.json` is `{"meta": …, "figures": …}`. `results.csv` has one row: each entry of `meta` (a list or
    object as JSON), then `f1_50, f1_50_low, f1_50_high, f1_50_n, …`. An undefined figure is null or an empty cell.

    Raises:
        DataError: an entry of `meta` has the name of a column of figures.
    """
    folder = Path(folder)
    row = {
        key: value if isinstance(value, str | int | float | None) else json.dumps(value) for key, value in meta.items()
    }
    for name, figure in figures.items():
        columns = {name: figure["value"], **{f"{name}_{part}": figure[part] for part in ("low", "high", "n")}}
        if clash := sorted(columns.keys() & row.keys()):
            raise DataError(f"meta and figures both have '{clash[0]}'", "name the entry of meta otherwise")
        row.update(columns)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"meta": dict(meta), "figures": dict(figures)}, indent=2, allow_nan=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    _write_csv(folder / "results.csv", list(row), [row])
    _write_csv(folder / "per_image.csv", PER_IMAGE_COLUMNS, images)


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _read_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, NaN
        raise DataError(f"{where}: not a line of JSON ({error})", "delete this line, or predict again") from error
    _check_row(row, where)
    return row


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _check_row(row: Any, where: str) -> None:
    """Raise a `DataError` that names `where`, unless a row has what scoring needs."""

    def need(holds: bool, what: str) -> None:
        if not holds:
            raise DataError(f"{where}: {what}", "predict again, or mend the line")

    need(isinstance(row, Mapping), "not a JSON object")
    for key in ("id", "width", "height", "truth", "boxes", "labels", "status", "truncated"):
        need(key in row, f"'{key}' is missing")
    need(isinstance(row["id"], str), "'id' is not a text")
    need(row["status"] in STATUSES, f"'status' is none of {', '.join(STATUSES)}")
    need(isinstance(row["truncated"], bool), "'truncated' is neither true nor false")
    for side in ("width", "height"):
        need(isinstance(row[side], int) and row[side] > 0, f"'{side}' is not a positive whole number")
    need(_are_boxes(row["boxes"]), "'boxes' are not rows of four finite numbers")
    need(_are_texts(row["labels"], len(row["boxes"]), or_none=True), "'labels' are not one text or null per box")
    scores = row.get("scores")
    need(
        scores is None or (isinstance(scores, list) and len(scores) == len(row["boxes"])),
        "'scores' are not one per box",
    )
    truth = row["truth"]
    need(
        isinstance(truth, Mapping) and {"boxes", "labels", "ignore"} <= truth.keys(),
        "'truth' lacks boxes, labels or ignore",
    )
    need(_are_boxes(truth["boxes"]), "'truth.boxes' are not rows of four finite numbers")
    need(_are_texts(truth["labels"], len(truth["boxes"]), or_none=False), "'truth.labels' are not one text per box")
    flags = truth["ignore"]
    need(
        isinstance(flags, list) and len(flags) == len(truth["boxes"]) and all(isinstance(flag, bool) for flag in flags),
        "'truth.ignore' is not true or false per box",
    )


def _are_boxes(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(box, list)
        and len(box) == 4
        and all(
            isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number) for number in box
        )
        for box in values
    )


def _are_texts(values: Any, count: int, *, or_none: bool) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(value, str) or (or_none and value is None) for value in values)
    )

"""Read and write what an evaluation leaves: predictions.jsonl, results.json and what is made of it.

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
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmdet.errors import DataError
from vlmdet.evaluation.metrics import BOX_FIGURES
from vlmdet.files import write_whole

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
    lines = []
    for number, row in enumerate(rows, start=1):
        _check_row(row, f"{path}:{number}")
        lines.append(_line(row))
    write_whole(path, b"".join(lines))


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


def write_evaluation(
    folder: str | Path,
    results: Mapping[str, Any],
    *,
    images: Sequence[Mapping[str, Any]],
    matches: Iterable[Mapping[str, Any]],
) -> None:
    """Write all that was measured of a run: matches.jsonl, per_class.csv, per_image.csv, results.csv, results.json.

    When: once per run and split. Each file appears when it is whole, `results.json` last.

    Input: `results` of `results.summarise`; `images` of `metrics.per_image`; `matches` of `results.list_matches`.
    Output: `per_class.csv` has a row `all`, then one a class: `class, images, instances, predicted, f1_50, f1_50_low,
    f1_50_high, …`. `results.csv` has one row: each entry of `meta` (a list or object as JSON), then `f1_50, f1_50_low,
    f1_50_high, f1_50_n, …`. An undefined figure is null or an empty cell.

    Raises:
        DataError: an entry of `meta` has the name of a column of figures.
    """
    folder = Path(folder)
    row = _result_row(results["meta"], results["figures"])
    text = _layered(results)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "matches.jsonl", b"".join(_line(match) for match in matches))
    _write_csv(folder / "per_class.csv", _CLASS_COLUMNS, _class_rows(results))
    _write_csv(folder / "per_image.csv", PER_IMAGE_COLUMNS, images)
    _write_csv(folder / "results.csv", list(row), [row])
    write_whole(folder / "results.json", text.encode("utf-8", errors="backslashreplace"))


_CLASS_COLUMNS = (
    *("class", "images", "instances", "predicted"),
    *(f"{name}{part}" for name in BOX_FIGURES for part in ("", "_low", "_high")),
)


def _class_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Lay the figures of all classes and of each side by side."""
    classes = results["per_class"]
    with_truth = sum(part["images"] for name, part in results["by_count"].items() if name != "0")
    instances = sum(entry["instances"] for entry in classes.values())
    predicted = results["figures"]["boxes_per_image"]
    boxes = round((predicted["value"] or 0) * predicted["n"])
    everything = {"images": with_truth, "instances": instances, "predicted": boxes, "figures": results["figures"]}
    rows = []
    for name, entry in [("all", everything), *classes.items()]:
        row = {"class": name, **{key: entry[key] for key in ("images", "instances", "predicted")}}
        for figure in BOX_FIGURES:
            values = entry["figures"][figure]
            row |= {figure: values["value"], f"{figure}_low": values["low"], f"{figure}_high": values["high"]}
        rows.append(row)
    return rows


def _result_row(meta: Mapping[str, Any], figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Make the one row of results.csv."""
    row = {
        key: value if isinstance(value, str | int | float | None) else json.dumps(value) for key, value in meta.items()
    }
    for name, figure in figures.items():
        columns = {name: figure["value"], **{f"{name}_{part}": figure[part] for part in ("low", "high", "n")}}
        if clash := sorted(columns.keys() & row.keys()):
            raise DataError(f"meta and figures both have '{clash[0]}'", "name the entry of meta otherwise")
        row.update(columns)
    return row


def _layered(document: Mapping[str, Any]) -> str:
    """Write JSON with one line for each entry of each part: to be read by people, and a matrix of 1,000 classes is short."""

    def dump(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)

    parts = []
    for key, value in document.items():
        if isinstance(value, Mapping) and value:
            inner = ",\n".join(f"    {dump(name)}: {dump(entry)}" for name, entry in value.items())
            parts.append(f"  {dump(key)}: {{\n{inner}\n  }}")
        else:
            parts.append(f"  {dump(key)}: {dump(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _line(row: Mapping[str, Any]) -> bytes:
    """Write one line of JSONL."""
    # An answer may hold half of a surrogate pair, which UTF-8 has no bytes for: the escape \udxxx is JSON for it.
    return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", errors="backslashreplace")


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, file.getvalue().encode("utf-8", errors="backslashreplace"))


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
        scores is None
        or (isinstance(scores, list) and len(scores) == len(row["boxes"]) and all(map(_is_score, scores))),
        "'scores' are not one number or null per box",
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


def _is_score(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value))


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

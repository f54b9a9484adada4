"""Find and read what a run left: the files that the report shows, and nothing that computes.

When: AFTER an evaluation, by `vlmdet report`; no torch. Ahead of it `vlmdet eval` wrote:

    RUN/eval/<split>/<model>/   results.json  matches.jsonl  predictions.jsonl  and tables as CSV
    RUN/eval/<split>/comparison.json
    RUN/train/log.jsonl, metrics.csv; RUN/contract.json, config.yaml

A folder that holds a results.json itself is one model on one split. What is absent is left out of the report; a file
that is there and broken stops it, and is named.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vlmdet.errors import DataError
from vlmdet.evaluation.files import read_predictions
from vlmdet.runs import RUNS

MODELS = ("base", "base_native", "tuned")
"""In the order in which they stand side by side; others follow by name."""

_MOST_STAGES = 8


@dataclass(frozen=True)
class Scored:
    """One model on one split.

    Attributes:
        name: `tuned`, `base`, `base_native`, …
        folder: where its files are.
        results: `results.json`.
        rows: of `predictions.jsonl` by id, in the order of the file; empty where there is none.
        matches: of `matches.jsonl` by id; empty where there is none.
    """

    name: str
    folder: Path
    results: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    matches: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Split:
    """The models on one split; `comparison` is its `comparison.json`, empty where there is none."""

    name: str
    models: tuple[Scored, ...]
    comparison: dict[str, Any]

    @property
    def main(self) -> Scored:
        """The model that the report is about: the tuned one, else the last one that is no base."""
        others = [model for model in self.models if not model.name.startswith("base")]
        tuned = [model for model in others if model.name == "tuned"]
        return (tuned or others or list(self.models))[-1]

    @property
    def base(self) -> Scored | None:
        """The untuned base under the same contract, where it was scored beside another model."""
        return next((one for one in self.models if one.name == "base" and one is not self.main), None)


@dataclass(frozen=True)
class Stage:
    """The training of one stage: rows of `log.jsonl`, and of `metrics.csv` as numbers."""

    name: str
    log: list[dict[str, Any]]
    metrics: list[dict[str, float]]


@dataclass(frozen=True)
class Run:
    """What the report is made of."""

    folder: Path
    splits: tuple[Split, ...]
    stages: tuple[Stage, ...]
    contract: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


def find_scored(name: str | Path) -> Path:
    """Find the folder that a user names: a run, its newest number that was scored, or the folder of one evaluation.

    Raises:
        DataError: nothing there was scored; says with which command it is.
    """
    places = [Path(name), RUNS / name]
    for place in places:
        if _is_scored(place):
            return place
        if place.is_dir():
            numbered = [child for child in place.iterdir() if child.name.isdigit() and _is_scored(child)]
            if numbered:
                return max(numbered, key=lambda child: int(child.name))
    there = any(place.is_dir() for place in places)
    found = sorted({str(path.parents[3]) for path in RUNS.glob("*/*/eval/*/*/results.json")})
    raise DataError(
        f"{name}: no evaluation there, since no eval/<split>/<model>/results.json is found",
        f"make it: vlmdet eval {name} --base"
        if there
        else f"there is: {', '.join(found[-8:]) or 'none yet'}; make one: vlmdet eval RUN --base",
    )


def read_run(folder: Path, *, split: str | None = None) -> Run:
    """Read what a run left.

    When: once per report.

    Input: a folder of `find_scored`; `split`, the only one to read.

    Raises:
        DataError: a file is broken, or the split was not scored; names the file, or lists the splits.
    """
    if (folder / "results.json").is_file():
        one = read_scored(folder)
        name = str(one.results.get("meta", {}).get("split") or "unnamed")
        splits = [Split(name, (one,), {})]
    else:
        places = sorted({path.parents[1] for path in folder.glob("eval/*/*/results.json")})
        splits = [_read_split(place) for place in places if split in (None, place.name)]
    if split is not None:
        splits = [one for one in splits if one.name == split]
        if not splits:
            there = sorted({path.parent.parent.name for path in folder.glob("eval/*/*/results.json")})
            raise DataError(
                f"{folder}: the split '{split}' was not scored; there is: {', '.join(there) or 'none'}",
                f"score it: vlmdet eval {folder} --split {split}",
            )
    return Run(
        folder=folder,
        splits=tuple(splits),
        stages=tuple(_read_stages(folder)),
        contract=read_object(folder / "contract.json"),
        config=_read_yaml(folder / "config.yaml"),
    )


def read_scored(folder: Path) -> Scored:
    """Read one model on one split.

    Raises:
        DataError: a file is broken.
    """
    results = read_object(folder / "results.json")
    rows, matches = folder / "predictions.jsonl", folder / "matches.jsonl"
    return Scored(
        name=folder.name,
        folder=folder,
        results=results,
        rows={row["id"]: row for row in read_predictions(rows)} if rows.is_file() else {},
        matches={str(row.get("id")): row for row in read_lines(matches)},
    )


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; an absent file is an empty one.

    Raises:
        DataError: it holds something else.
    """
    if not path.is_file():
        return {}
    return _object(path.read_bytes(), str(path))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON objects, one a line; an absent file holds none.

    Raises:
        DataError: a line holds something else; names the file and the line.
    """
    if not path.is_file():
        return []
    lines = enumerate(path.read_bytes().split(b"\n"), start=1)
    return [_object(line, f"{path}:{number}") for number, line in lines if line.strip()]


def number_of(value: object) -> float | None:
    """Return a finite number, None for anything else: an undefined figure, NaN, a text."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def mapping(value: object) -> Mapping[str, Any]:
    """Return an object of a JSON file, an empty one for anything else."""
    return value if isinstance(value, Mapping) else {}


def sequence(value: object) -> list[Any]:
    """Return a list of a JSON file, an empty one for anything else."""
    return value if isinstance(value, list) else []


def _object(data: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})", "score it again: vlmdet eval RUN --base") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: not a JSON object", "score it again: vlmdet eval RUN --base")
    return value


def _is_scored(place: Path) -> bool:
    return (place / "results.json").is_file() or any(place.glob("eval/*/*/results.json"))


def _read_split(place: Path) -> Split:
    names = [path.parent.name for path in place.glob("*/results.json")]
    names.sort(key=lambda name: (MODELS.index(name) if name in MODELS else len(MODELS), name))
    comparison = read_object(place / "comparison.json")
    return Split(place.name, tuple(read_scored(place / name) for name in names), comparison)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not YAML ({error})", "restore the file") from error
    return value if isinstance(value, dict) else {}


def _read_stages(folder: Path) -> list[Stage]:
    """Read the training of a run, and of those that it went on from: a stage starts at the checkpoint of the one before."""
    stages: list[Stage] = []
    place: Path | None = folder
    seen: set[Path] = set()
    while place is not None and place.resolve() not in seen and len(stages) < _MOST_STAGES:
        seen.add(place.resolve())
        log, metrics = read_lines(place / "train" / "log.jsonl"), _read_metrics(place / "train" / "metrics.csv")
        if log or metrics:
            stages.append(Stage(place.parent.name if place.name.isdigit() else place.name, log, metrics))
        place = _stage_before(place)
    return stages[::-1]


def _stage_before(folder: Path) -> Path | None:
    start = Path(str(mapping(_read_yaml(folder / "config.yaml").get("model")).get("name") or ""))
    if "checkpoints" not in start.parts:
        return None
    relative = Path(*start.parts[: start.parts.index("checkpoints")])
    return next((root / relative for root in roots(folder) if (root / relative / "train").is_dir()), None)


def roots(folder: Path) -> list[Path]:
    """List the folders that a relative path of a run may start from: where the command runs, then those above the run."""
    return [Path.cwd(), *folder.resolve().parents]


def _read_metrics(path: Path) -> list[dict[str, float]]:
    if not path.is_file():
        return []
    rows = []
    with path.open(encoding="utf-8", newline="", errors="replace") as file:
        for row in csv.DictReader(file):
            numbers = {name: _to_number(text) for name, text in row.items() if isinstance(name, str)}
            rows.append({name: value for name, value in numbers.items() if value is not None})
    return rows


def _to_number(text: object) -> float | None:
    try:
        return number_of(float(str(text)))
    except ValueError:
        return None

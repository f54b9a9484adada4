"""Several runs, or result files of other tools, set against each other on the same pictures.

When: AFTER, by `vlmdet compare`, and by `vlmdet eval` for `comparison.json`; no torch. `compare.py` runs for each pair.

    {"runs": [{"name": "a", "metrics": {"f1_50": {"value", "low", "high", "n"}}, "coco": {"AP": 0.41, "AR100": 0.52}}],
     "pairs": [{"a": "a", "b": "b", "metric": "f1_50", "difference": {"value", "low", "high", "n"}, "separable": true}]}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from vlmdet.contract import FILE_NAME, MUST_AGREE, Contract, refuse_mismatch
from vlmdet.errors import ConfigError, ContractError, DataError
from vlmdet.evaluation.coco import (
    constant_scores,
    document_figures,
    precision_times_recall,
    refuse_constant,
    rows_to_coco,
    shuffled_figures,
)
from vlmdet.evaluation.coco_files import Results, Truth, read_results, read_truth, rows_about
from vlmdet.evaluation.compare import paired_differences
from vlmdet.evaluation.files import read_predictions
from vlmdet.evaluation.metrics import FORMULAS, Row, score_rows
from vlmdet.evaluation.scoring import format_change, format_figure
from vlmdet.files import write_whole
from vlmdet.runs import need_run

AGREE = (*MUST_AGREE, "decoding")
"""Fields of two contracts that must agree for a fair comparison."""


@dataclass(frozen=True)
class Entry:
    """One side of a comparison.

    Attributes:
        name: what it is called.
        rows: rows of `predictions.jsonl`.
        coco: document of truth and results for COCO's figures; None where boxes have no scores.
        contract: what the model was asked, None where it is not known.
        notes: what to tell the user.
    """

    name: str
    rows: Sequence[Row]
    coco: tuple[dict[str, Any], list[dict[str, Any]]] | None = None
    contract: Contract | None = None
    notes: tuple[str, ...] = field(default=())


def read_entries(
    sources: Sequence[str],
    *,
    truth: str | Path | None = None,
    split: str | None = None,
    labels_asked: Sequence[str] = (),
    image_ids: str | None = None,
    category_ids: str | None = None,
    box_format: str | None = None,
    drop_unusable: bool = False,
) -> tuple[list[Entry], tuple[str, ...]]:
    """Read what a user names to compare.

    When: once per `vlmdet compare`.

    Input: `sources`, each a run (its `tuned` predictions of `split`), a folder with or the path of a `predictions.jsonl`, or
    with `truth` a COCO result file; one run alone stands for its `base` and its `tuned`. `labels_asked` overrides the labels
    of the contracts; the others as in `coco_files.read_results`.
    Output: entries, and the labels to score.

    Raises:
        ConfigError: fewer than two sides, a result file without `truth`, or the labels are not known.
        DataError: a file cannot be read.
    """
    true = read_truth(truth, drop_unusable=drop_unusable) if truth is not None else None
    given = [(source, path) for source in sources for path in _find(source, split, alone=len(sources) == 1)]
    if len(given) < 2 and true is None:
        raise ConfigError("compare needs two sides", "name another run, or one run that has base and tuned predictions")
    entries = []
    for name, (source, path) in zip(_names([path for _, path in given]), given, strict=True):
        if path.suffix == ".jsonl":
            entries.append(_entry_of_rows(name, path, true, labels_asked))
            continue
        if true is None:
            raise ConfigError(
                f"{source} is no predictions.jsonl, and a result file needs the truth", "pass --truth GT.json"
            )
        results = read_results(
            path,
            true,
            image_ids=image_ids,
            category_ids=category_ids,
            box_format=box_format,
            drop_unusable=drop_unusable,
        )
        entries.append(_entry_of_results(name, results, true))
    labels = tuple(labels_asked) or _labels(entries, true)
    if true is not None and entries:
        first = entries[0]
        entries[0] = Entry(first.name, first.rows, first.coco, first.contract, (*_told(true), *first.notes))
    return entries, labels


def compare_entries(
    entries: Sequence[Entry],
    *,
    labels_asked: Sequence[str],
    allow: Sequence[str] = (),
    allow_constant_scores: bool = False,
    min_score: float | None = None,
    all_pairs: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Score each entry, and each pair on the same pictures.

    When: once per comparison.

    Input: `allow`, fields of contracts that may differ; `allow_constant_scores`, see `coco`; `min_score`, below it a box has
    no part in our own figures, while COCO's always take all, and so do ours of an entry without any score, such as a text
    beside a detector; `all_pairs`, else every entry against the first.
    Output: as in the module's docstring. A difference is b - a, and has `wins` and `losses` too. `coco` is None where boxes
    have no scores; with constant scores it holds means, and `coco_shuffled` minimum, mean and maximum of each over orders,
    with `precision_times_recall` beside them.

    Raises:
        ConfigError: scores are constant and not allowed.
        ContractError: two contracts differ in what makes a comparison unfair.
        DataError: entries are over different pictures or truth.
    """
    pairs = list(combinations(entries, 2)) if all_pairs else [(entries[0], other) for other in entries[1:]]
    for a, b in pairs:
        if a.contract is not None and b.contract is not None:
            try:
                refuse_mismatch(a.contract, b.contract, allow=allow, fields=AGREE)
            except ContractError as error:
                raise ContractError(f"{a.name} and {b.name}: {error.message}", error.hint) from error
    kept = {id(entry): _above(entry.rows, min_score, entry.name) for entry in entries}
    runs = []
    for entry in entries:
        metrics = score_rows(kept[id(entry)], labels_asked=labels_asked, resamples=resamples, seed=seed)
        runs.append({"name": entry.name, "metrics": metrics, **_coco(entry, labels_asked, allow_constant_scores, seed)})
    found = []
    for a, b in pairs:
        changes = paired_differences(
            kept[id(a)],
            kept[id(b)],
            metrics=list(FORMULAS),
            labels_asked=labels_asked,
            resamples=resamples,
            seed=seed,
        )
        found += [
            {"a": a.name, "b": b.name, "metric": metric, "difference": change, "separable": change["separable"]}
            for metric, change in changes.items()
        ]
    return {"runs": runs, "pairs": found}


def write_comparison(place: str | Path, *, labels_asked: Sequence[str], resamples: int = 1000, seed: int = 0) -> Path:
    """Write `comparison.json` of a split: its tuned model against the base, under one contract and in its own words.

    When: at the end of `vlmdet eval`, once base and tuned are predicted.

    Input: `place`, `runs/x/001/eval/test`. The pairs are `base` and `tuned`, and `base_native` and `tuned`. COCO's figures are
    None where scores are constant or missing: they are refused nowhere here.

    Raises:
        DataError: predictions are missing, or over different pictures.
    """
    place = Path(place)
    names = [name for name in ("base", "base_native", "tuned") if (place / name / "predictions.jsonl").is_file()]
    if "tuned" not in names or len(names) < 2:
        raise DataError(f"{place}: has not both base and tuned predictions", "run vlmdet eval RUN --base")
    rows = {name: read_predictions(place / name / "predictions.jsonl") for name in names}
    entries = {name: Entry(name, rows[name], _scored_document(rows[name], labels_asked)) for name in names}
    for name, entry in entries.items():
        if entry.coco is not None and constant_scores(entry.coco[1]):
            entries[name] = Entry(name, rows[name])
    document: dict[str, Any] = {"runs": [], "pairs": []}
    for name in names[:-1]:
        part = compare_entries(
            [entries[name], entries["tuned"]], labels_asked=labels_asked, resamples=resamples, seed=seed
        )
        known = {run["name"] for run in document["runs"]}
        document["runs"] += [run for run in part["runs"] if run["name"] not in known]
        document["pairs"] += part["pairs"]
    path = place / "comparison.json"
    write_whole(path, json.dumps(document, indent=2, allow_nan=False) + "\n")
    return path


SHOWN = (
    "f1_50",
    "f1",
    "precision_50",
    "recall_50",
    "mean_best_iou",
    "mean_matched_iou",
    "boxes_per_image",
    "count_error",
)


def format_document(document: Mapping[str, Any]) -> str:
    """Lay a comparison out for people: a table of figures, then each pair's differences."""
    runs = document["runs"]
    wide = max(26, *(len(run["name"]) + 2 for run in runs))
    lines = [f"{'':<20}" + "".join(f"{run['name']:>{wide}}" for run in runs)]
    for metric in SHOWN:
        lines.append(f"{metric:<20}" + "".join(f"{format_figure(run['metrics'][metric]):>{wide}}" for run in runs))
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100"):
        if any(run["coco"] for run in runs):
            cells = [_plain(run["coco"][name]) if run["coco"] else "-" for run in runs]
            lines.append(f"COCO {name:<15}" + "".join(f"{cell:>{wide}}" for cell in cells))
    for run in runs:
        if shuffled := run.get("coco_shuffled"):
            ap = shuffled["AP"]
            lines.append(
                f"{run['name']}: constant scores; AP over orders of the boxes {ap['minimum']:.3f} to {ap['maximum']:.3f}, "
                f"mean {ap['mean']:.3f}; precision x recall {shuffled['precision_times_recall']:.3f}"
            )
    for pair in document["pairs"]:
        if pair["metric"] in SHOWN:
            change = pair["difference"]
            score = (
                "" if change["wins"] is None else f"; better on {change['wins']}, worse on {change['losses']} pictures"
            )
            lines.append(f"{pair['b']} - {pair['a']}, {pair['metric']}: {format_change(change)}{score}")
    return "\n".join(lines)


def _plain(value: float) -> str:
    return "-" if value == -1 else f"{value:.3f}"


def _coco(entry: Entry, labels_asked: Sequence[str], allowed: bool, seed: int) -> dict[str, Any]:
    """Return the entries `coco`, and `coco_shuffled` where scores are constant."""
    if entry.coco is None:
        return {"coco": None}
    truth, results = entry.coco
    refuse_constant(results, entry.name, allowed=allowed)
    if not constant_scores(results):
        return {"coco": document_figures(truth, results)}
    shuffled: dict[str, Any] = dict(shuffled_figures(truth, results, seed=seed))
    means = {name: value["mean"] for name, value in shuffled.items()}
    shuffled["precision_times_recall"] = precision_times_recall(entry.rows, labels_asked=labels_asked)
    return {"coco": means, "coco_shuffled": shuffled}


def without_scores(rows: Sequence[Row]) -> bool:
    """Tell whether an entry has boxes and none has a score, as those of a text that was read without probabilities."""
    found = [row.get("scores") is None for row in rows if row["boxes"]]
    return bool(found) and all(found)


def _above(rows: Sequence[Row], least: float | None, name: str) -> Sequence[Row]:
    """Leave out boxes with a score below the least; a row left without any is `none`."""
    if least is None or without_scores(rows):
        return rows
    kept = []
    for row in rows:
        if not row["boxes"]:
            kept.append(row)
            continue
        if row.get("scores") is None:
            raise ConfigError(f"{name}: only some boxes have scores", "leave --min-score out, or give all a score")
        good = [i for i, score in enumerate(row["scores"]) if score >= least]
        part = {key: [row[key][i] for i in good] for key in ("boxes", "labels", "scores")}
        kept.append({**row, **part, "status": row["status"] if good or row["status"] != "ok" else "none"})
    return kept


def _find(source: str, split: str | None, *, alone: bool) -> list[Path]:
    """Find the files that a user means by a word."""
    path = Path(source)
    if path.is_file():
        return [path]
    if (path / "predictions.jsonl").is_file():
        return [path / "predictions.jsonl"]
    if path.suffix in (".json", ".jsonl"):
        raise DataError(f"{path}: there is no such file", "name a run, a predictions.jsonl or a COCO result file")
    run = need_run(source)
    splits = sorted(folder.name for folder in (run / "eval").glob("*") if folder.is_dir())
    if split is None and len(splits) > 1 and "test" not in splits:
        raise ConfigError(f"{run} has predictions of {', '.join(splits)}", f"say which with --split {splits[0]}")
    place = run / "eval" / (split or ("test" if "test" in splits else splits[0] if splits else "test"))
    wanted = ("base", "tuned") if alone else ("tuned",)
    found = [place / which / "predictions.jsonl" for which in wanted]
    if missing := [path for path in found if not path.is_file()]:
        raise DataError(f"{missing[0]}: there is no such file", f"run vlmdet eval {source}{' --base' if alone else ''}")
    return found


def _names(paths: Sequence[Path]) -> list[str]:
    """Call each file by the fewest parts of its path that tell them apart."""
    parts = [path.with_suffix("").parts if path.name != "predictions.jsonl" else path.parent.parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(part)} ({number})" for number, part in enumerate(parts, start=1)]


def _entry_of_rows(name: str, path: Path, truth: Truth | None, labels_asked: Sequence[str]) -> Entry:
    rows: Sequence[Row] = read_predictions(path)
    contract = Contract.read(path.parent) if (path.parent / FILE_NAME).is_file() else None
    if truth is None:
        labels = tuple(labels_asked) or (contract.labels if contract else ())
        return Entry(name, rows, _scored_document(rows, labels) if labels else None, contract)
    rows = rows_about(rows, truth, str(path))
    scored = _scored_document(rows, truth.labels)
    if scored is None:
        return Entry(name, rows, None, contract)
    return Entry(name, rows, scored, contract, ("COCO's sizes are those of boxes, not of segmentations",))


def _scored_document(
    rows: Sequence[Row], labels_asked: Sequence[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """Return rows as COCO documents; None where boxes have no scores, as those of a text have none."""
    if any(row["boxes"] and None in (row.get("scores") or [None]) for row in rows):
        return None
    return rows_to_coco(rows, labels_asked=labels_asked)


def _entry_of_results(name: str, results: Results, truth: Truth) -> Entry:
    notes = tuple(f"{results.path}: {note}" for note in results.notes)
    return Entry(name, results.rows, (truth.document, results.results), None, notes)


def _labels(entries: Sequence[Entry], truth: Truth | None) -> tuple[str, ...]:
    """Return the labels to score: those of the truth file, or of the first contract."""
    if truth is not None:
        return truth.labels
    known = next((entry.contract.labels for entry in entries if entry.contract is not None), ())
    if not known:
        raise ConfigError("no contract.json lies beside the predictions", "name what was asked for with --classes")
    return known


def _told(truth: Truth) -> tuple[str, ...]:
    return tuple(f"{truth.path}: {note}" for note in truth.notes)

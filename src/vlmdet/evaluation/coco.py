"""COCO's AP and AR, of rows of predictions and of COCO documents.

When: AFTER generation, on boxes that have scores; no torch. Ahead of it runs `files.read_predictions` or
`coco_files.read_results`. The evaluation itself is faster-coco-eval's, which gives the numbers of pycocotools.

A document of truth has `images`, `categories` and `annotations`; results are a list:

    {"image_id": 3, "category_id": 1, "bbox": [x, y, width, height], "score": 0.9}         in pixels of the picture

AP orders boxes by score, so it says nothing where all scores are equal: the order of the file would decide it. Where some
are equal, COCO takes pictures by rising id, and boxes of one picture and class as the file (or the row) has them; so do we,
since a file must score to the figures that pycocotools gives it. In files of results such boxes are counted and told.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from vlmdet.errors import ConfigError
from vlmdet.evaluation.metrics import match_table, tally
from vlmdet.evaluation.table import Row, lay_out, resolve_labels
from vlmdet.files import write_whole

FIGURES = {"AP": 0, "AP50": 1, "AP75": 2, "APs": 3, "APm": 4, "APl": 5, "AR1": 6, "AR10": 7, "AR100": 8}
"""Names of the figures, and their places in COCO's list of twelve."""

SHUFFLES = 100
"""Orders that equal scores are tried in."""

PIXEL_DECIMALS = 6
"""Fractions become pixels rounded to this, so that a box of a file comes back as the file has it."""

FLAG = "--allow-constant-scores"

Document = dict[str, Any]


def coco_figures(
    rows: Sequence[Row], *, labels_asked: Sequence[str], allow_constant_scores: bool = False, seed: int = 0
) -> dict[str, float]:
    """Compute COCO's figures of a run.

    When: once per run and split, where boxes have scores.

    Input: `rows` of `predictions.jsonl` with `scores`; `labels_asked`, the classes of the run. Ignored true boxes count
    as crowds. A predicted label outside of the classes belongs to no category, and has no part. Rows with status `error`
    have none either.
    Output: `{"AP": 0.41, "AP50": …, "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100"}`, -1 where undefined. Sizes are
    COCO's, 32^2 and 96^2 original pixels. With constant scores and `allow_constant_scores` the mean over shuffles.

    Raises:
        ConfigError: boxes have no scores, or all the same, or `labels_asked` is empty.
        DataError: two rows have one id.
    """
    truth, results = rows_to_coco(rows, labels_asked=labels_asked)
    if constant_scores(results):
        refuse_constant(results, "the run", allowed=allow_constant_scores)
        return {name: value["mean"] for name, value in shuffled_figures(truth, results, seed=seed).items()}
    if without := sum("score" not in entry for entry in results):
        raise ConfigError(f"{without} of {len(results)} boxes have no score", "predict again with --scores")
    return document_figures(truth, results)


def document_figures(truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Compute COCO's figures of a document of truth and a list of results with scores.

    Input: as in the module's docstring; ids of annotations are whole numbers from 1, a crowd has `iscrowd` 1.
    Output: see `coco_figures`; as `pycocotools` 2.0.11 gives them.
    """
    silent = {"print_function": lambda *_: None}
    true = COCO(
        {
            "info": {},
            "images": [dict(entry) for entry in truth["images"]],
            "categories": [dict(entry) for entry in truth["categories"]],
            "annotations": [dict(entry) for entry in truth["annotations"]],
        },
        **silent,
    )
    found = true.loadRes([dict(entry) for entry in results])
    evaluation = COCOeval_faster(true, found, iouType="bbox", **silent)
    evaluation.run()
    return {name: float(evaluation.stats[place]) for name, place in FIGURES.items()}


def constant_scores(results: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether the order of results is arbitrary: no score at all, or one for two or more."""
    scores = {entry.get("score") for entry in results}
    return scores == {None} or (len(results) > 1 and len(scores) == 1)


def refuse_constant(results: Sequence[Mapping[str, Any]], where: str, *, allowed: bool) -> None:
    """Refuse AP of boxes that no score puts in order, unless the user asked for it.

    Raises:
        ConfigError: scores are constant or missing, and not `allowed`.
    """
    if allowed or not constant_scores(results):
        return
    score = results[0].get("score")
    what = "have no score" if score is None else f"have the score {score:g}"
    raise ConfigError(
        f"{where}: all {len(results)} boxes {what}, so AP would depend on the order of the file",
        f"give each box its score, or pass {FLAG} for the least, mean and largest AP over {SHUFFLES} orders",
    )


def shuffled_figures(
    truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], *, shuffles: int = SHUFFLES, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Compute COCO's figures with the boxes in many random orders.

    When: once, for boxes with equal scores and the flag that allows them.

    Output: `{"AP": {"minimum": 0.683, "mean": 0.731, "maximum": 0.774}, …}`. The order runs across pictures.
    """
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(shuffles):
        order = rng.permutation(len(results)) + 1
        given = [{**entry, "score": float(place)} for entry, place in zip(results, order, strict=True)]
        drawn.append(document_figures(truth, given))
    return {
        name: {
            "minimum": min(one[name] for one in drawn),
            "mean": float(np.mean([one[name] for one in drawn])),
            "maximum": max(one[name] for one in drawn),
        }
        for name in FIGURES
    }


def precision_times_recall(rows: Sequence[Row], *, labels_asked: Sequence[str]) -> float:
    """Approximate AP of boxes without an order: precision times recall, mean over classes with truth and thresholds.

    A random order has about the same precision at every recall up to the last, and 0 beyond. Output: -1 without truth.
    """
    table = lay_out(rows, labels_asked=labels_asked)
    counts = tally(match_table(table), table.truth.label, table.predicted.label, len(table.names))
    true, given = counts["truth"][:, None], counts["tp"] + counts["fp"]
    product = counts["tp"] ** 2 / np.maximum(given, 1) / np.maximum(true, 1)
    return float(product[counts["truth"] > 0].mean()) if (counts["truth"] > 0).any() else -1.0


def rows_to_coco(rows: Sequence[Row], *, labels_asked: Sequence[str]) -> tuple[Document, list[Document]]:
    """Turn rows of predictions into a COCO document of truth and a list of results.

    Output: images are numbered from 1 by rising id of the row, which stands in `id_in_rows`; categories from 1 in the order
    asked for, then others of the truth by name. Boxes are in pixels. `score` is missing where a row has none.

    Raises:
        ConfigError, DataError: see `table.lay_out`.
    """
    table = lay_out(rows, labels_asked=labels_asked)
    numbers = {name: number for number, name in enumerate(table.names[: table.classes], start=1)}
    truth: Document = {
        "info": {"description": "written by vlmdet"},
        "images": [],
        "categories": [{"id": number, "name": name, "supercategory": ""} for name, number in numbers.items()],
        "annotations": [],
    }
    results: list[Document] = []
    for image, row in enumerate(table.rows, start=1):
        if row["status"] == "error":
            continue
        size = np.asarray([row["width"], row["height"]] * 2, dtype=np.float64)
        truth["images"].append(
            {
                "id": image,
                "file_name": str(row.get("image", row["id"])),
                "width": row["width"],
                "height": row["height"],
                "id_in_rows": row["id"],
            }
        )
        true = row["truth"]
        for box, label, ignored in zip(_pixels(true["boxes"], size), true["labels"], true["ignore"], strict=True):
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": image,
                    "category_id": numbers[label],
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(ignored),
                }
            )
        labels = resolve_labels(row["labels"], labels_asked)
        scores = row.get("scores") or [None] * len(labels)
        for box, name, score in zip(_pixels(row["boxes"], size), labels, scores, strict=True):
            if name in numbers:
                entry = {"image_id": image, "category_id": numbers[name], "bbox": box}
                results.append(entry if score is None else {**entry, "score": score})
    return truth, results


def write_coco_predictions(path: str | Path, rows: Sequence[Row], *, labels_asked: Sequence[str]) -> Path:
    """Write rows as a COCO result file, and their truth beside it, for any other tool.

    When: once per run and split.

    Input: `path`, e.g. `predictions.coco.json`; rows. A box without a score is written without one.
    Output: the path of the truth, `truth.coco.json` in the same folder: its ids are those of the results. Boxes of labels
    outside of the classes are not in the file: they have no category.

    Raises:
        ConfigError, DataError: see `table.lay_out`.
    """
    path = Path(path)
    truth, results = rows_to_coco(rows, labels_asked=labels_asked)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name("truth.coco.json")
    write_whole(path, json.dumps(results, allow_nan=False) + "\n")
    write_whole(beside, json.dumps(truth, allow_nan=False) + "\n")
    return beside


def _pixels(boxes: Sequence[Sequence[float]], size: np.ndarray) -> list[list[float]]:
    """Turn boxes, xyxy fractions, into x, y, width, height in pixels."""
    xyxy = np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * size
    xywh = np.concatenate([xyxy[:, :2], xyxy[:, 2:] - xyxy[:, :2]], axis=1)
    return xywh.round(PIXEL_DECIMALS).tolist()

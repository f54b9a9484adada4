"""Turn scores into probabilities that a box is right, fitted on a split that is not reported on.

When: AFTER predictions of a validation split, once per run; numpy only.

Calibration does not change the order of boxes, so AP stays what it is: it makes 0.8 mean that eight of ten such boxes are hits.
Platt scaling has two parameters, and needs that many: one alone (a temperature) keeps 0.5 where it is, and a geometric mean
of probabilities has no reason to be fair at 0.5. Isotonic regression is freer, needs a thousand boxes, and makes ties.

Source: Platt 1999, "Probabilistic outputs for support vector machines", with its smoothed targets; Guo et al. 2017, "On
calibration of modern neural networks", for the expected calibration error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlmdet.boxes import Boxes
from vlmdet.errors import ConfigError, DataError
from vlmdet.evaluation.files import read_predictions
from vlmdet.evaluation.match import match_boxes

MIN_EACH = 10
"""Hits, and misses, below which nothing is fitted: two parameters would be noise."""
_EDGE = 1e-6


@dataclass(frozen=True)
class Calibration:
    """probability = 1 / (1 + exp(-(slope * logit(score) + intercept))), and what it was fitted on.

    Attributes:
        slope: above 0, so that the order of boxes stays.
        intercept: shift of the log-odds.
        source: the `score_source` that it is for.
        split: the split that it was fitted on; never `test`.
        n: boxes that it was fitted on.
        hits: of these, right ones (same label, IoU >= 0.5).
    """

    slope: float
    intercept: float
    source: str
    split: str
    n: int
    hits: int

    def apply(self, scores: Sequence[float] | np.ndarray) -> list[float]:
        """Return calibrated scores, from 0 to 1, in the same order."""
        return [float(value) for value in _logistic(self.slope * _logit(scores) + self.intercept)]


def fit_calibration(
    scores: Sequence[float] | np.ndarray, hits: Sequence[bool] | np.ndarray, *, source: str, split: str
) -> Calibration:
    """Fit Platt scaling.

    Input: n scores from 0 to 1 and whether each box is a hit; the `score_source` and the split that they come from.
    Output: the `Calibration` with the highest likelihood of Platt's smoothed targets.

    Raises:
        ConfigError: the split is the test split, which chooses nothing.
        DataError: there are fewer than `MIN_EACH` hits or misses, or higher scores are not hits more often.
    """
    if split == "test":
        raise ConfigError("scores would be calibrated on the test split, which chooses nothing", "use the split val")
    right = np.asarray(hits, dtype=bool)
    n, good = len(right), int(right.sum())
    if min(good, n - good) < MIN_EACH:
        raise DataError(
            f"{good} hits and {n - good} misses on the split '{split}' are too few to calibrate scores: "
            f"{MIN_EACH} of each are needed",
            "leave the scores uncalibrated, or predict more pictures",
        )
    design = np.stack([_logit(scores), np.ones(n)], axis=1)
    target = np.where(right, (good + 1) / (good + 2), 1 / (n - good + 2))
    weights = np.array([1.0, 0.0])
    for _ in range(100):
        chance = _logistic(design @ weights)
        gradient = design.T @ (chance - target)
        hessian = (design * (chance * (1 - chance))[:, None]).T @ design + 1e-9 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        scale = 1.0
        while scale > 1e-6 and _loss(design @ (weights - scale * step), target) > _loss(design @ weights, target):
            scale /= 2
        weights = weights - scale * step
        if np.abs(scale * step).max() < 1e-10:
            break
    slope, intercept = (float(weight) for weight in weights)
    if slope <= 0:
        raise DataError(
            f"higher scores ('{source}') are no more often hits on the split '{split}' (slope {slope:.2f} over {n} boxes)",
            "these scores say nothing about the boxes: choose another --scores",
        )
    return Calibration(slope, intercept, source, split, n, good)


def scored_hits(rows: Sequence[Mapping[str, Any]], *, labels_asked: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Collect the scores of stored predictions, and whether each box is a hit: one to one, same label, IoU >= 0.5.

    Input: rows of `predictions.jsonl` (architecture, "Data model"); the classes of the run.
    Output: scores (n,) float64 and hits (n,) bool, of all boxes of all rows in order; rows without scores and boxes on ignored
    regions are left out.
    """
    scores: list[float] = []
    hits: list[bool] = []
    for row in rows:
        if row["scores"] is None:
            continue
        truth = row["truth"]
        matching = match_boxes(
            Boxes(np.asarray(truth["boxes"], dtype=np.float64).reshape(-1, 4)),
            truth["labels"],
            Boxes(np.asarray(row["boxes"], dtype=np.float64).reshape(-1, 4)),
            row["labels"],
            labels_asked=labels_asked,
            ignore=truth["ignore"],
        )
        hit = matching.predicted_iou >= 0.5
        counted = hit | (matching.ignored_share < 0.5)
        scores += np.asarray(row["scores"], dtype=np.float64)[counted].tolist()
        hits += hit[counted].tolist()
    return np.asarray(scores), np.asarray(hits, dtype=bool)


def fit_from_file(path: Path, *, labels_asked: Sequence[str], scored: Sequence[Mapping[str, Any]]) -> Calibration:
    """Fit on the stored predictions of another split.

    Input: a `predictions.jsonl` beside the `results.json` that names its split; the classes of the run; rows that are to be
    `scored` with the calibration: none of their pictures may be among those that it is fitted on.

    Raises:
        ConfigError: no split is named, or it is the test split.
        DataError: pictures are in both files, rows have no scores or several sources of them, or `fit_calibration` refuses.
    """
    rows = read_predictions(path)
    results = path.parent / "results.json"
    split = json.loads(results.read_text(encoding="utf-8"))["meta"].get("split") if results.is_file() else None
    if not split:
        raise ConfigError(
            f"{results} does not say which split {path.name} is of", "score it with vlmdet eval RUN --split val"
        )
    both = {(row["id"], row["image"]) for row in rows} & {(row["id"], row["image"]) for row in scored}
    if both:
        raise DataError(
            f"{path}: picture '{min(both)[0]}' is scored too, and cannot calibrate its own score", "use another split"
        )
    sources = {row["score_source"] for row in rows if row["scores"] is not None}
    if len(sources) != 1:
        raise DataError(
            f"{path}: there are {len(sources)} sources of scores, and one is needed", "predict it with --scores"
        )
    scores, hits = scored_hits(rows, labels_asked=labels_asked)
    return fit_calibration(scores, hits, source=sources.pop(), split=split)


def calibrate_rows(rows: Sequence[Mapping[str, Any]], calibration: Calibration) -> list[dict[str, Any]]:
    """Return stored predictions with calibrated scores; the rows themselves stay as they are.

    Raises:
        DataError: scores come from another source than those that it was fitted on.
    """
    changed = []
    for row in rows:
        if row["scores"] is None:
            changed.append(dict(row))
            continue
        if row["score_source"] != calibration.source:
            raise DataError(
                f"scores of picture '{row['id']}' are '{row['score_source']}', and the calibration is for '{calibration.source}'",
                "fit it on predictions with the same --scores",
            )
        changed.append({**row, "scores": calibration.apply(row["scores"])})
    return changed


def calibration_error(
    scores: Sequence[float] | np.ndarray, hits: Sequence[bool] | np.ndarray, *, bins: int = 10
) -> float:
    """Return the expected calibration error: how far scores are from the share of hits, averaged over boxes.

    Input: n scores from 0 to 1 and whether each box is a hit; the number of equally wide bins, open to the left.
    Output: 0 (each bin's mean score is its share of hits) to 1; NaN where there is no box. Few boxes make it too large.
    """
    values, right = np.asarray(scores, dtype=np.float64), np.asarray(hits, dtype=np.float64)
    if not len(values):
        return float("nan")
    place = np.clip(np.ceil(values * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(place, weights=values - right, minlength=bins)
    return float(np.abs(gaps).sum() / len(values))


def _logit(scores: Sequence[float] | np.ndarray) -> np.ndarray:
    clipped = np.asarray(scores, dtype=np.float64).reshape(-1).clip(_EDGE, 1 - _EDGE)
    return np.log(clipped / (1 - clipped))


def _logistic(values: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -values))


def _loss(values: np.ndarray, target: np.ndarray) -> float:
    return float((np.logaddexp(0.0, values) - target * values).sum())

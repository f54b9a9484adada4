"""Time of all of our own figures, with 1,000 bootstrap resamples, and of COCO's; prints one JSON line.

    python benchmarks/metrics.py                    # 5,000 pictures, about 36,000 true boxes of 80 classes, 3 rounds
    python benchmarks/metrics.py --pictures 500     # a trial

The set is drawn: a Poisson number of boxes a picture, most of them found within a few per cent, some with another label,
some far off, some twice, and false ones beside. `own` is everything of `results.json` but COCO's figures, of
`matches.jsonl` and of `per_image.csv`, from rows in memory, on one core. It has no peer, but a limit: 10 s.

`coco` is COCO's twelve figures of the same documents in memory, each side from dictionaries to figures, in turns: pycocotools
against `coco.document_figures`. The figures of both are compared before times are.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy: one core
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import contextlib
import copy
import io
import json
import statistics
import time
from typing import Any

import numpy as np

from vlmdet.evaluation.coco import FIGURES, document_figures, rows_to_coco
from vlmdet.evaluation.metrics import per_image
from vlmdet.evaluation.results import list_matches, summarise

LIMIT_SECONDS = 10.0
WIDTH, HEIGHT = 640, 480


def draw(
    pictures: int, *, boxes: float = 7.2, classes: int = 80, seed: int = 0
) -> tuple[list[dict[str, Any]], list[str]]:
    """Draw rows of `predictions.jsonl` with scores, and the list of classes."""
    rng = np.random.default_rng(seed)
    names = [f"class {number}" for number in range(classes)]
    rows = []
    for i in range(pictures):
        truth, labels = _some(rng, rng.poisson(boxes)), rng.integers(classes, size=100)
        predicted = truth + rng.normal(0, 0.06, truth.shape) * np.tile(truth[:, 2:] - truth[:, :2], 2)
        kept = rng.random(len(truth)) < 0.85
        twice = kept & (rng.random(len(truth)) < 0.03)
        false = _some(rng, rng.poisson(0.1 * boxes))
        said = np.where(rng.random(len(truth)) < 0.9, labels[: len(truth)], rng.integers(classes, size=len(truth)))
        given = np.concatenate([predicted[kept], predicted[twice] + 0.002, false])
        given_labels = np.concatenate([said[kept], said[twice], rng.integers(classes, size=len(false))])
        scores = rng.beta(np.where(np.arange(len(given)) < kept.sum(), 5, 2), 2)
        rows.append(
            {
                "id": f"{i:06}",
                "image": f"{i:06}.jpg",
                "width": WIDTH,
                "height": HEIGHT,
                "truth": {
                    "boxes": truth.tolist(),
                    "labels": [names[k] for k in labels[: len(truth)]],
                    "ignore": (rng.random(len(truth)) < 0.01).tolist(),
                },
                "text": "",
                "boxes": given.clip(0, 1).tolist(),
                "labels": [names[k] for k in given_labels],
                "scores": scores.tolist(),
                "score_source": "drawn",
                "problems": [],
                "status": "ok" if len(given) else "none",
                "tokens": {"prompt": 0, "image": 0, "answer": 0},
                "truncated": False,
                "ms": 0.0,
                "error": None,
            }
        )
    return rows, names


def _some(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw boxes (count, 4), small ones oftener than large ones, xyxy fractions."""
    size = np.exp(rng.uniform(np.log(0.03), np.log(0.6), (count, 2)))
    corner = rng.random((count, 2)) * (1 - size)
    return np.concatenate([corner, corner + size], axis=1)


def own(rows: list[dict[str, Any]], names: list[str], resamples: int) -> dict[str, Any]:
    """Measure everything of our own; returns the figures."""
    results = summarise(rows, labels_asked=names, contract=_Limits, resamples=resamples)  # type: ignore[arg-type]
    list_matches(rows, labels_asked=names)
    per_image(rows, labels_asked=names)
    return results["figures"]


class _Limits:
    """What `summarise` reads of a contract: the size at which a model saw the pictures."""

    min_pixels, max_pixels, size_factor = 3136, 1_003_520, 28


def peer(truth: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, float]:
    """Compute COCO's figures with pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        true = COCO()
        true.dataset = truth
        true.createIndex()
        evaluation = COCOeval(true, true.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(evaluation.stats[place]) for name, place in FIGURES.items()}


def coco(rows: list[dict[str, Any]], names: list[str], rounds: int) -> dict[str, Any]:
    """Time both sides in turns, on copies: pycocotools writes into what it is given."""
    truth, results = rows_to_coco(rows, labels_asked=names)
    seconds: dict[str, list[float]] = {"pycocotools": [], "vlmdet": []}
    figures: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for side, compute in (("pycocotools", peer), ("vlmdet", document_figures)):
            given = copy.deepcopy(truth), copy.deepcopy(results)
            started = time.perf_counter()
            figures[side] = compute(*given)
            seconds[side].append(time.perf_counter() - started)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    return {
        **{f"{side}_seconds": round(value, 2) for side, value in medians.items()},
        "ratio_to_pycocotools": round(medians["pycocotools"] / medians["vlmdet"], 2),
        "largest_difference": max(abs(figures["vlmdet"][name] - figures["pycocotools"][name]) for name in FIGURES),
        "AP": round(figures["vlmdet"]["AP"], 4),
    }


def main() -> None:
    """Draw, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rows, names = draw(args.pictures, classes=args.classes)
    seconds = []
    for _ in range(args.rounds):
        started = time.perf_counter()
        figures = own(rows, names, args.resamples)
        seconds.append(time.perf_counter() - started)
    result = {
        "benchmark": "metrics",
        "pictures": args.pictures,
        "boxes": sum(len(row["truth"]["boxes"]) for row in rows),
        "predictions": sum(len(row["boxes"]) for row in rows),
        "classes": args.classes,
        "resamples": args.resamples,
        "rounds": args.rounds,
        "own": {
            "seconds_min": round(min(seconds), 2),
            "seconds_median": round(statistics.median(seconds), 2),
            "limit_seconds": LIMIT_SECONDS,
            "ratio": round(LIMIT_SECONDS / statistics.median(seconds), 2),
            "f1_50": round(figures["f1_50"]["value"], 4),
        },
        "coco": coco(rows, names, args.rounds),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""Rows of predictions.jsonl, made by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest


def _make_row(
    id: str = "a",
    *,
    truth: list[list[float]] | None = None,
    truth_labels: list[str] | None = None,
    ignore: list[bool] | None = None,
    boxes: list[list[float]] | None = None,
    labels: list[str | None] | None = None,
    status: str | None = None,
    truncated: bool = False,
) -> dict[str, Any]:
    truth, boxes = truth or [], boxes or []
    return {
        "id": id,
        "image": f"{id}.png",
        "width": 200,
        "height": 100,
        "truth": {
            "boxes": truth,
            "labels": truth_labels if truth_labels is not None else ["cup"] * len(truth),
            "ignore": ignore if ignore is not None else [False] * len(truth),
        },
        "text": "",
        "boxes": boxes,
        "labels": labels if labels is not None else ["cup"] * len(boxes),
        "scores": None,
        "score_source": None,
        "problems": [],
        "status": status or ("ok" if boxes else "none"),
        "tokens": {"prompt": 0, "image": 0, "answer": 0},
        "truncated": truncated,
        "ms": 0.0,
        "error": None,
    }


@pytest.fixture(scope="session")
def make_row() -> Callable[..., dict[str, Any]]:
    """Return a function that makes a row: one class `cup`, status by the boxes, unless said otherwise."""
    return _make_row


def _random_rows(n: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with everything in them: several classes, misses, false boxes, ignored, empty, failed and truncated."""
    rng = np.random.default_rng(seed)

    def some(count: int) -> np.ndarray:
        corner, size = rng.uniform(0, 0.6, (count, 2)), rng.uniform(0.1, 0.4, (count, 2))
        return np.concatenate([corner, corner + size], axis=1)

    rows = []
    for i in range(n):
        truth = some(rng.integers(0, 4))
        boxes = np.concatenate(
            [(truth + rng.normal(0, 0.03, truth.shape))[rng.random(len(truth)) < 0.8], some(rng.integers(0, 2))]
        )
        boxes = np.concatenate([boxes, boxes[:1]]) if i % 5 == 0 else boxes
        failed = i % 7 == 3
        kept = [] if failed else boxes.tolist()
        rows.append(
            _make_row(
                f"{i:03}",
                truth=truth.tolist(),
                truth_labels=[str(label) for label in rng.choice(["cup", "dog"], len(truth), p=[0.8, 0.2])],
                ignore=[bool(flag) for flag in rng.random(len(truth)) < 0.2],
                boxes=kept,
                labels=[[None, "cup", "dog", "cat"][k] for k in rng.choice(4, len(kept), p=[0.1, 0.7, 0.1, 0.1])],
                status="parse_failure" if failed else "ok" if kept else "none",
                truncated=bool(i % 6 == 1),
            )
        )
    return rows


@pytest.fixture(scope="session")
def random_rows() -> Callable[..., list[dict[str, Any]]]:
    """Return a function that draws rows of the classes `cup` and `dog`: `random_rows(n=24, seed=0)`."""
    return _random_rows

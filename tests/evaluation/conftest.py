"""Rows of predictions.jsonl, made by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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

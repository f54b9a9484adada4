"""Metrics of known make: right ones are left alone, wrong ones are named."""

from __future__ import annotations

from typing import Any

import pytest

from vlmdet.doctor.calls import UserCodeError
from vlmdet.doctor.checks.metric_probe import EXAMPLES, figures_of, probe_metric

Boxes = list[list[float]]


def iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inner = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner
    return inner / union if union > 0 else 0.0


def counts(predictions: list[Boxes], truths: list[Boxes]) -> dict[str, float]:
    tp = fp = fn = 0
    for found, wanted in zip(predictions, truths, strict=True):
        pairs = sorted(((iou(a, b), i, j) for i, a in enumerate(found) for j, b in enumerate(wanted)), reverse=True)
        rows: set[int] = set()
        columns: set[int] = set()
        for value, i, j in pairs:
            if value >= 0.5 and i not in rows and j not in columns:
                rows.add(i)
                columns.add(j)
        tp, fp, fn = tp + len(rows), fp + len(found) - len(rows), fn + len(wanted) - len(columns)
    return {"precision": tp / max(tp + fp, 1), "recall": tp / max(tp + fn, 1), "f1": 2 * tp / max(2 * tp + fp + fn, 1)}


def precise_about_nothing(predictions: list[Boxes], truths: list[Boxes]) -> dict[str, float]:
    figures = counts(predictions, truths)
    return {**figures, "precision": figures["precision"] if any(map(len, predictions)) else 1.0}


def mean_best(predictions: list[Boxes], truths: list[Boxes]) -> float:
    best = [
        max((iou(a, b) for a in found), default=0.0)
        for found, wanted in zip(predictions, truths, strict=True)
        for b in wanted
    ]
    return sum(best) / len(best)


def f1_alone(predictions: list[Boxes], truths: list[Boxes]) -> float:
    return counts(predictions, truths)["f1"]


def recall_alone(predictions: list[Boxes], truths: list[Boxes]) -> float:
    return counts(predictions, truths)["recall"]


def with_errors(predictions: list[Boxes], truths: list[Boxes]) -> dict[str, float]:
    kept, errors = [], 0
    for found, wanted in zip(predictions, truths, strict=True):
        try:
            kept.append(counts([found], [wanted])["f1"])
        except ValueError:
            errors += 1
    return {"f1": sum(kept) / len(truths), "errors": errors}


def with_labels(predictions: list[list[dict[str, Any]]], truths: list[list[dict[str, Any]]]) -> dict[str, float]:
    total = {"precision": 0.0, "recall": 0.0}
    names = sorted({one["label"] for picture in truths for one in picture})
    for name in names:
        by_name = [
            [[one["bbox"] for one in picture if one["label"] == name] for picture in side]
            for side in (predictions, truths)
        ]
        part = counts(*by_name)
        total = {key: total[key] + part[key] / len(names) for key in total}
    return total


@pytest.mark.parametrize(
    "metric", [counts, precise_about_nothing, mean_best, f1_alone, recall_alone, with_errors, with_labels]
)
def test_right_metrics_are_left_alone(metric: Any) -> None:
    faults, told = probe_metric(metric)
    assert [one for one in faults if not one.meant] == []
    assert bool(faults) == (metric in (mean_best, recall_alone))  # neither falls with false boxes
    assert told.startswith("perfect ")


def first_only(predictions: list[Boxes], truths: list[Boxes]) -> dict[str, float]:
    values = [iou(found[0], wanted[0]) if found else 0.0 for found, wanted in zip(predictions, truths, strict=True)]
    return {"mean_iou": sum(values) / len(values)}


def swallowing(predictions: list[Boxes], truths: list[Boxes]) -> float:
    values = []
    for found, wanted in zip(predictions, truths, strict=True):
        try:
            values.append(f1_alone([found], [wanted]))
        except Exception:
            values.append(0.0)
    return sum(values) / len(values)


def failing_inside(predictions: list[Boxes], truths: list[Boxes]) -> float:
    values = []
    for found, wanted in zip(predictions, truths, strict=True):
        try:
            values.append(iou(found[0]["bbox"], wanted[0]["bbox_2d"]))  # type: ignore[call-overload]
        except Exception:
            values.append(0.0)
    return sum(values) / len(values)


def skipping(predictions: list[Boxes], truths: list[Boxes]) -> float:
    values = [f1_alone([found], [wanted]) for found, wanted in zip(predictions, truths, strict=True) if len(found)]
    return sum(values) / len(values) if values else 0.0


def many_to_one(predictions: list[Boxes], truths: list[Boxes]) -> dict[str, float]:
    hits = sum(
        iou(a, b) > 0.5 for found, wanted in zip(predictions, truths, strict=True) for a in found for b in wanted
    )
    return {"recall": hits / sum(map(len, truths))}


def precision_many_to_one(predictions: list[Boxes], truths: list[Boxes]) -> float:
    hits = [
        any(iou(a, b) > 0.5 for b in wanted) for found, wanted in zip(predictions, truths, strict=True) for a in found
    ]
    return sum(hits) / max(len(hits), 1)


def swapping(predictions: list[Boxes], truths: list[Boxes]) -> float:
    return mean_best(predictions, [[[b[1], b[0], b[3], b[2]] for b in picture] for picture in truths])


def class_blind(predictions: list[list[dict[str, Any]]], truths: list[list[dict[str, Any]]]) -> dict[str, float]:
    return counts(*[[[one["bbox"] for one in picture] for picture in side] for side in (predictions, truths)])


def corner_form(predictions: list[Boxes], truths: list[Boxes]) -> float:
    """Reads corners as x, y, width, height: equal boxes still score 1, and nothing says that it is an IoU."""
    as_corners = [
        [[[b[0], b[1], b[0] + b[2], b[1] + b[3]] for b in picture] for picture in side]
        for side in (predictions, truths)
    ]
    return mean_best(*as_corners)


@pytest.mark.parametrize(
    ("metric", "identifier"),
    [
        (first_only, "E02"),
        (swallowing, "E01"),
        (failing_inside, "E01"),
        (skipping, "E12"),
        (many_to_one, "E10"),
        (precision_many_to_one, "E10"),
        (swapping, "E09"),
        (class_blind, "E15"),
        (corner_form, "E09"),
    ],
)
def test_wrong_metrics_are_named(metric: Any, identifier: str) -> None:
    faults, _ = probe_metric(metric)
    assert faults[0].id == identifier, faults


def test_a_metric_that_cannot_be_called_is_said() -> None:
    def broken(predictions: Any, truths: Any) -> float:
        raise KeyError("scores")

    with pytest.raises(UserCodeError, match="scores"):
        probe_metric(broken)


def test_own_boxes_are_used_where_some_pictures_have_several() -> None:
    seen: list[Any] = []

    def metric(predictions: list[Boxes], truths: list[Boxes]) -> float:
        seen.append(truths)
        return f1_alone(predictions, truths)

    own = [[("a", (0.1, 0.1, 0.6, 0.2))], [("a", (0.2, 0.3, 0.9, 0.5)), ("a", (0.1, 0.6, 0.3, 0.7))]]
    assert probe_metric(metric, own)[0] == []  # type: ignore[arg-type]
    assert seen[0][0] == [[0.1, 0.1, 0.6, 0.2]]
    probe_metric(metric, own[:1])  # type: ignore[arg-type]
    assert seen[-1][0] == [list(EXAMPLES[0][0][1])]


def test_figures_of_nested_results() -> None:
    assert figures_of({"a": {"b": 1, "c": float("nan")}, "d": [0.5], "e": "text", "f": True}) == {"b": 1.0, "d[0]": 0.5}

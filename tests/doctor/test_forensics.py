"""Logs and answers whose mistake is known, made by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from vlmdet.doctor.checks.forensics import (
    constant_box_iou,
    duplicate_share,
    fit_axes,
    look_at_answers,
    look_at_log,
    mean_iou,
    same_answers,
)
from vlmdet.doctor.gather.answers import Answered


def log(loss: list[float] = [], eval_loss: list[float] = [], **more: list[float]) -> list[dict[str, Any]]:  # noqa: B006
    rows: list[dict[str, Any]] = [{"step": 10 * (i + 1), "loss": value} for i, value in enumerate(loss)]
    for name, values in {"eval_loss": eval_loss, **more}.items():
        rows += [{"step": 50 * (i + 1), name: value} for i, value in enumerate(values)]
    return rows


FALLING = [2.0, 1.4, 1.0, 0.8, 0.7, 0.6, 0.55, 0.5, 0.48, 0.45]
FLAT = [2.31, 2.28, 2.33, 2.30, 2.29, 2.32, 2.30, 2.31, 2.28, 2.30]


def ids(clues: list[Any]) -> list[str]:
    return [one.id for one in clues]


def test_a_run_that_learns_has_no_clue() -> None:
    assert look_at_log(log(FALLING, [0.9, 0.7, 0.6], eval_mean_iou=[0.3, 0.5, 0.6])) == []
    assert look_at_log([]) == []


@pytest.mark.parametrize(
    ("rows", "first"),
    [
        (log(FLAT, [2.305123, 2.305123, 2.305123]), "O10"),
        (log(FLAT, grad_norm=[0.0] * 5), "O10"),
        (log([0.0] * 6), "L02"),
        (log(FLAT, [2.3, 2.31, 2.29]), "O01"),
        (log([2.0, 1.5, math.nan, math.nan, math.nan]), "O03"),
        (log(FALLING, [0.6, 0.5, 0.9, 1.4]), "O02"),
        (log(FALLING, [0.9, 0.7, 0.5], eval_mean_iou=[0.2, 0.19, 0.1]), "O08"),
    ],
)
def test_logs(rows: list[dict[str, Any]], first: str) -> None:
    assert ids(look_at_log(rows))[0] == first


def test_a_frozen_loss_points_to_what_does_not_train() -> None:
    clues = look_at_log(log(FLAT, [2.305123] * 3))
    assert ids(clues) == ["O10", "M01"]
    assert "2.305123, 2.305123, 2.305123" in clues[0].evidence


def test_a_flat_loss_names_its_learning_rate() -> None:
    (clue,) = look_at_log(log(FLAT, learning_rate=[2e-7, 2e-7]))
    assert clue.id == "O01" and "2.0e-07" in clue.evidence and "2.307 to 2.297" in clue.evidence


def answers(change: Any, *, n: int = 24) -> list[Answered]:
    """Draw true boxes at random, and predictions made from them by `change`."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(n):
        x, y = rng.uniform(0, 0.6, 2)
        w, h = rng.uniform(0.1, 0.4, 2)
        box = np.asarray([[x, y, x + w, y + h]])
        made.append(Answered(str(i), "", np.asarray(change(box)).reshape(-1, 4), box))
    return made


def test_right_answers_have_no_clue() -> None:
    noise = np.random.default_rng(1)
    assert look_at_answers(answers(lambda box: box + noise.normal(0, 0.01, 4))) == []


@pytest.mark.parametrize(
    ("change", "first"),
    [
        (lambda box: box[:, [1, 0, 3, 2]], "D01"),
        (lambda box: box * 0.7, "D03"),
        (lambda box: box + 0.1, "E14"),
        (lambda box: [[0.1, 0.1, 0.3, 0.25]], "C08"),
        (lambda box: np.repeat(box, 4, axis=0), "E07"),
    ],
)
def test_answers(change: Any, first: str) -> None:
    assert ids(look_at_answers(answers(change)))[0] == first


def test_the_fit_gives_back_slope_and_offset() -> None:
    x, y = fit_axes(answers(lambda box: box * (0.5, 2, 0.5, 2) + (0.1, 0, 0.1, 0)))  # type: ignore[misc]
    assert (x.slope, x.offset, y.slope, y.offset) == pytest.approx((0.5, 0.1, 2, 0))
    assert fit_axes(answers(lambda box: box, n=5)) is None


def test_limit_hits() -> None:
    made = [Answered(str(i), "x", np.zeros((0, 4)), np.asarray([[0, 0, 0.9, 0.9]]), 256) for i in range(4)]
    (clue,) = look_at_answers(made, limit=256)
    assert clue.id == "E07" and "100% of the answers" in clue.evidence


def test_figures_by_hand() -> None:
    one = np.asarray([[0.0, 0, 10, 10]])
    pair = [Answered("a", "", np.asarray([[5.0, 0, 15, 10]]), one), Answered("b", "", np.zeros((0, 4)), one)]
    assert mean_iou(pair) == pytest.approx(1 / 6)
    assert math.isnan(mean_iou([]))
    assert constant_box_iou(pair) == 1.0
    assert duplicate_share([Answered("a", "", np.repeat(one, 4, axis=0), one)]) == 0.75
    assert same_answers(pair, [Answered("a", "", np.asarray([[5.0, 0, 15, 10]]), one)]) == (1.0, 1)
    assert same_answers(pair, []) == (0.0, 0)

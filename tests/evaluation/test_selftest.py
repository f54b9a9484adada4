"""The self-test passes on any rows, and sees a metric that was broken on purpose."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vlmdet.boxes import overlap
from vlmdet.errors import VlmdetError
from vlmdet.evaluation import match, metrics
from vlmdet.evaluation.selftest import self_test

BOX = [0.1, 0.2, 0.5, 0.4]


def test_it_passes_on_any_rows(random_rows):
    checks = self_test(random_rows(), labels_asked=["cup", "dog"])
    cases = {check["case"] for check in checks}
    assert cases >= {"perfect", "empty", "swapped axes", "shifted by 0.5 widths", "twice", "other label", "shuffled"}
    for check in checks:
        assert check["found"] == pytest.approx(check["expected"], abs=1e-6)


def test_values_of_one_box(make_row):
    checks = self_test([make_row(truth=[BOX])], labels_asked=["cup"])
    values = {(check["case"], check["figure"]): check["found"] for check in checks}
    # .4 x .2 swapped: they share .2 x .2 of .08 + .08 - .04
    assert values["swapped axes", "mean_best_iou"] == pytest.approx(1 / 3)
    assert values["shifted by 0.2 widths", "mean_best_iou"] == pytest.approx(0.8 / 1.2)
    assert values["shifted by 0.5 widths", "mean_best_iou"] == pytest.approx(0.5 / 1.5)
    assert values["on the threshold", "f1_50"] == 1
    assert values["twice", "precision_50"] == 0.5
    assert values["empty", "precision_50"] is None


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{}],
        [{"truth": [BOX], "ignore": [True]}],
        [{"truth": [[0.5, 0.5, 0.5, 0.5], BOX]}],  # an empty box, as BCCD has
        [{"truth": [[0, 0, 1, 1]]}],  # swapped it is itself
        [{"truth": [BOX], "status": "error"}],
        [{"truth": [BOX, BOX], "truth_labels": ["no such label", "cup"]}],
        [{"truth": [[0.1, 0.1, 0.4, 0.5]]}],
    ],
)
def test_odd_runs(make_row, rows):
    assert self_test([make_row(f"{i}", **row) for i, row in enumerate(rows)], labels_asked=["cup"])


def broken_union(first, second):
    both, union = overlap(first, second)
    return both, union + both  # forgets to take the shared part off


def broken_axes(first, second):
    return overlap(first[..., [1, 0, 3, 2]], second)


def take_all(rows, columns):
    return np.arange(len(rows))  # not one to one


def in_file_order(rows, columns, iou, allowed, *, truth, predicted):
    return np.flatnonzero(allowed)


@pytest.mark.parametrize(
    ("module", "name", "value", "case"),
    [
        (match, "overlap", broken_union, "perfect"),
        (match, "overlap", broken_axes, "perfect"),
        (match, "choose_pairs", take_all, "twice"),
        (metrics, "THRESHOLDS", np.arange(50, 100, 5) / 100 + 1e-9, "on the threshold"),
        (metrics, "THRESHOLDS", np.arange(40, 90, 5) / 100, "swapped axes|shifted by 0.2 widths"),
        (metrics, "duplicates_by_image", lambda predicted, images: np.zeros(images), "twice"),
    ],
)
def test_a_broken_metric_is_seen(make_row, monkeypatch, module, name, value, case):
    monkeypatch.setattr(module, name, value)
    rows = [make_row("a", truth=[BOX, [0.5, 0.5, 0.9, 0.9]], boxes=[BOX])]
    with pytest.raises(VlmdetError, match=f"self-test of the metrics: ({case}).*: .* must be .*, and is ") as caught:
        self_test(rows, labels_asked=["cup"])
    assert "\n" not in str(caught.value)


def test_a_figure_that_depends_on_the_order_is_seen(make_row, monkeypatch):
    monkeypatch.setattr(match, "order_pairs", in_file_order)
    # the first prediction takes the first box, of which it has half; the other then finds nothing
    rows = [
        make_row(f"{i}", truth=[[0, 0, 0.4, 1], [0.2, 0, 0.6, 1]], boxes=[[0.1, 0, 0.5, 1], [0, 0, 0.4, 1]])
        for i in range(6)
    ]
    with pytest.raises(VlmdetError, match="shuffled"):
        self_test(rows, labels_asked=["cup"])


@pytest.mark.parametrize("figure", ["f1_50", "mean_best_iou", "off_list_rate", "count_error"])
@pytest.mark.parametrize(
    "wrong", [lambda value: value + 0.01, lambda value: value * 0 + 0.5, lambda value: value * math.nan]
)
def test_each_broken_formula_is_seen(make_row, monkeypatch, figure, wrong):
    formula = metrics.FORMULAS[figure]
    monkeypatch.setitem(metrics.FORMULAS, figure, lambda counts: wrong(formula(counts)))
    with pytest.raises(VlmdetError, match=figure):
        self_test([make_row(truth=[BOX])], labels_asked=["cup"])


def test_a_metric_that_ignores_labels_is_seen(make_row, monkeypatch):
    real = metrics.match_sides

    def blind(truth, predicted, *, ignored):
        same = [match.Side(side.image, side.label * 0, side.xyxy) for side in (truth, predicted)]
        return real(*same, ignored=ignored)

    monkeypatch.setattr(metrics, "match_sides", blind)
    with pytest.raises(VlmdetError, match="other label"):
        self_test([make_row(truth=[BOX])], labels_asked=["cup"])

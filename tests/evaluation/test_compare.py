"""Paired differences."""

from __future__ import annotations

import pytest

from vlmdet.errors import ConfigError, DataError
from vlmdet.evaluation.compare import LOWER_IS_BETTER, paired_difference
from vlmdet.evaluation.metrics import FORMULAS, score_rows

LEFT, RIGHT = [0, 0, 0.4, 1], [0.5, 0, 0.9, 1]


def run(make_row, found, n=20):
    """One true box an image; it is found exactly on the images in `found`."""
    return [make_row(f"{i:03}", truth=[LEFT], boxes=[LEFT] if i in found else []) for i in range(n)]


def compare(a, b, metric="recall_50", **settings):
    return paired_difference(a, b, metric=metric, labels_asked=["cup"], **settings)


def test_b_minus_a(make_row):
    # a finds 5 of 20, b the same and 10 more: .75 - .25
    a, b = run(make_row, range(5)), run(make_row, range(15))
    forth, back = compare(a, b), compare(b, a)
    assert forth["value"] == 0.5
    assert (forth["n"], forth["wins"], forth["losses"], forth["separable"]) == (20, 10, 0, True)
    assert forth["low"] > 0
    assert back["value"] == -0.5
    assert (back["wins"], back["losses"], back["separable"]) == (0, 10, True)
    assert (back["low"], back["high"]) == pytest.approx((-forth["high"], -forth["low"]))


def test_a_run_against_itself_has_no_difference(make_row):
    rows = run(make_row, range(7))
    for metric in FORMULAS:
        result = compare(rows, rows, metric)
        if metric == "correct_empty_rate":  # no empty image: undefined
            assert (result["value"], result["separable"]) == (None, False)
        else:
            assert (result["value"], result["low"], result["high"], result["separable"]) == (0, 0, 0, False), metric


def test_an_interval_that_covers_0_is_not_separable(make_row):
    # b finds 10 others: no difference in sum
    result = compare(run(make_row, range(10)), run(make_row, range(10, 20)))
    assert result["value"] == 0
    assert result["low"] < 0 < result["high"]
    assert (result["separable"], result["wins"], result["losses"]) == (False, 10, 10)


def test_one_image_separates_nothing(make_row):
    result = paired_difference(
        run(make_row, [])[:1], run(make_row, [0])[:1], metric="recall_50", labels_asked=["cup"], resamples=50
    )
    assert (result["value"], result["n"], result["separable"]) == (1, 1, False)


def test_an_interval_that_ends_at_0_covers_it(make_row):
    # b finds one more of 20: in a third of the resamples that image is not drawn, so the low end is 0
    result = compare(run(make_row, range(10)), run(make_row, range(11)))
    assert result["value"] == pytest.approx(0.05)
    assert result["low"] == 0
    assert not result["separable"]


def test_pairing_sees_what_separate_intervals_hide(make_row):
    # b finds what a finds and 15 of 100 more: the single intervals, about ± .1 each, overlap
    a, b = run(make_row, range(40), 100), run(make_row, range(55), 100)
    single_a, single_b = (score_rows(rows, labels_asked=["cup"])["recall_50"] for rows in (a, b))
    assert single_a["high"] > single_b["low"]
    result = compare(a, b)
    assert result["separable"]
    # the difference per image is 1 on 15 of 100: percentiles 2.5 and 97.5 of Bin(100, .15) are 8 and 22
    assert (result["low"], result["high"]) == pytest.approx((0.08, 0.22), abs=0.015)


def test_fewer_mistakes_are_wins(make_row):
    a = [make_row(f"{i}", truth=[LEFT], status="parse_failure") for i in range(4)]
    b = [make_row(f"{i}", truth=[LEFT], boxes=[LEFT]) for i in range(4)]
    result = compare(a, b, "parse_failure_rate")
    assert (result["value"], result["wins"], result["losses"]) == (-1, 4, 0)
    assert set(FORMULAS) > LOWER_IS_BETTER
    result = compare(a, b, "boxes_per_image")  # more boxes are neither better nor worse
    assert (result["value"], result["wins"], result["losses"]) == (1, None, None)


def test_undefined_on_an_image_is_neither_win_nor_loss(make_row):
    a = [make_row("a", truth=[LEFT], boxes=[LEFT]), make_row("b")]
    b = [make_row("a", truth=[LEFT]), make_row("b", boxes=[LEFT])]
    result = compare(a, b, "f1_50")
    assert (result["value"], result["wins"], result["losses"]) == (-1, 0, 1)


def test_the_order_of_rows_and_true_boxes_means_nothing(make_row):
    a, b = run(make_row, range(5)), run(make_row, range(3, 9))
    a[0] = make_row("000", truth=[LEFT, RIGHT], boxes=[RIGHT])
    b[0] = make_row("000", truth=[LEFT, RIGHT], boxes=[LEFT])
    first = compare(a, b, "f1")
    b[0] = make_row("000", truth=[RIGHT, LEFT], boxes=[LEFT])
    assert compare(a[::-1], b, "f1") == first


def test_an_error_leaves_the_image_out_on_both_sides(make_row):
    a, b = run(make_row, range(5)), run(make_row, range(15))
    expected = compare(a, b)
    a.append(make_row("x", truth=[LEFT], boxes=[LEFT]))
    b.append(make_row("x", truth=[LEFT], status="error"))
    assert compare(a, b) == expected
    errors = compare(a, b, "error_rate")
    assert errors["value"] == pytest.approx(1 / 21)
    assert (errors["n"], errors["wins"], errors["losses"]) == (21, 0, 1)


def test_only_errors(make_row):
    rows = [make_row("a", truth=[LEFT], status="error")]
    assert compare(rows, rows) == {
        "value": None, "low": None, "high": None, "n": 0, "separable": False, "wins": 0, "losses": 0,
    }  # fmt: skip


def test_other_images_are_refused_by_name(make_row):
    with pytest.raises(DataError, match=r"'002', '003' only in a") as caught:
        compare(run(make_row, [], 4), run(make_row, [], 2))
    assert "only in b" not in str(caught.value)
    with pytest.raises(DataError, match=r"'002' only in b"):
        compare(run(make_row, [], 2), run(make_row, [], 3))
    with pytest.raises(DataError, match=r"\(15 in all\)"):
        compare(run(make_row, [], 20), run(make_row, [], 5))


@pytest.mark.parametrize(
    "other",
    [
        {"truth": [RIGHT]},
        {"truth": [LEFT], "truth_labels": ["dog"]},
        {"truth": [LEFT], "ignore": [True]},
        {"truth": []},
    ],
)
def test_another_truth_is_refused(make_row, other):
    with pytest.raises(DataError, match="different truth for 'a'"):
        compare([make_row("a", truth=[LEFT])], [make_row("a", **other)])


def test_unknown_metric(make_row):
    with pytest.raises(ConfigError, match="did you mean 'f1_50'"):
        compare([make_row()], [make_row()], "f1_5O")

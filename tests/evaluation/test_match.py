"""Matching: small cases with their arithmetic, then invariants."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmdet.boxes import Boxes
from vlmdet.evaluation.match import count_duplicates, match_boxes, resolve_labels

ASKED = ["cup", "dog"]


def match(truth, predicted, truth_labels=None, labels=None, asked=ASKED, ignore=None):
    return match_boxes(
        Boxes(np.array(truth, dtype=float).reshape(-1, 4)),
        truth_labels or ["cup"] * len(truth),
        Boxes(np.array(predicted, dtype=float).reshape(-1, 4)),
        labels or ["cup"] * len(predicted),
        labels_asked=asked,
        ignore=ignore,
    )


def counts(matching, threshold=0.5):
    return tuple(int(values[0]) for values in matching.count([threshold]))


def test_two_predictions_on_one_truth_are_one_hit_and_one_false():
    # truth [0, .4] x [0, 1]; IoU with [0, .3]: .3 / .4 = .75; with [0, .32]: .32 / .4 = .8, which wins
    matching = match([[0, 0, 0.4, 1]], [[0, 0, 0.3, 1], [0, 0, 0.32, 1]])
    assert counts(matching) == (1, 1, 0)
    assert matching.pairs.tolist() == [[0, 1]]
    assert matching.iou == pytest.approx([0.8])
    assert matching.best_iou == pytest.approx([0.8])
    assert matching.predicted_iou == pytest.approx([0, 0.8])


def test_one_prediction_serves_one_truth_in_pairs_and_several_in_best_iou():
    # prediction [0, 1] x [0, 1] over two halves: IoU .5 with each
    matching = match([[0, 0, 0.5, 1], [0.5, 0, 1, 1]], [[0, 0, 1, 1]])
    assert counts(matching) == (1, 0, 1)
    assert matching.best_iou.tolist() == [0.5, 0.5]


def test_the_highest_iou_goes_first():
    # On a line: A = [0, .5], B = [.1, .6]; P = [.1, .5]: IoU .4 / .5 = .8 with both; Q = [0, .5] is A exactly.
    # Q takes A at 1.0, so P is left with B: two hits, although P's tie could have taken A.
    matching = match([[0, 0, 0.5, 1], [0.1, 0, 0.6, 1]], [[0.1, 0, 0.5, 1], [0, 0, 0.5, 1]])
    assert matching.pairs.tolist() == [[0, 1], [1, 0]]
    assert matching.iou == pytest.approx([1, 0.8])
    assert counts(matching) == (2, 0, 0)


def test_a_tie_is_settled_by_coordinates_whatever_the_order():
    # A = [0, .5], B = [.1, .6]; P = [.1, .5]: IoU .4 / .5 = .8 with both; Q = [0, .3]: .6 with A, 1/3 with B.
    # A lies further left, so P takes it and Q is left with B, under .5. By row number the order would decide.
    a, b, p, q = [0, 0, 0.5, 1], [0.1, 0, 0.6, 1], [0.1, 0, 0.5, 1], [0, 0, 0.3, 1]
    for one_side in ([a, b], [b, a]):
        for other_side in ([p, q], [q, p]):
            assert counts(match(one_side, other_side)) == (1, 1, 1)
            assert counts(match(other_side, one_side)) == (1, 1, 1)  # the tie is among predictions


@pytest.mark.parametrize(
    ("right", "threshold", "hits"),
    [
        (0.5, 0.5, 1),  # IoU .5 / 1 = .5: equal counts
        (0.49, 0.5, 0),
        (0.7, 0.7, 1),  # .7 as a fraction of pixels is .7 up to the last bit
        (0.75, 0.75, 1),
        (0.75, 0.8, 0),
    ],
)
def test_a_threshold_met_exactly_counts(right, threshold, hits):
    assert counts(match([[0, 0, 1, 1]], [[0, 0, right, 1]]), threshold) == (hits, 1 - hits, 1 - hits)


@pytest.mark.parametrize("width", [3, 7, 10, 30, 333, 640, 1000, 4032])
def test_a_threshold_met_exactly_in_pixels_counts(width):
    # truth from 10 to 10 + 2k pixels, prediction from 10 to 10 + k: IoU k / 2k = .5, whatever the fractions round to
    truth = np.array([10, 20, 10 + 2 * width, 50]) / [9001, 103, 9001, 103]
    predicted = np.array([10, 20, 10 + width, 50]) / [9001, 103, 9001, 103]
    assert counts(match([truth], [predicted])) == (1, 0, 0)


def test_another_class_does_not_match():
    matching = match([[0, 0, 1, 1]], [[0, 0, 1, 1]], ["cup"], ["dog"])
    assert counts(matching) == (0, 1, 1)
    assert matching.best_iou.tolist() == [0]


def test_a_missing_label_counts_only_where_one_label_was_asked():
    assert resolve_labels(["cup", None], ["cup"]) == ["cup", "cup"]
    assert resolve_labels(["cup", None], ["cup", "dog"]) == ["cup", None]
    assert counts(match([[0, 0, 1, 1]], [[0, 0, 1, 1]], labels=[None], asked=["cup"])) == (1, 0, 0)
    assert counts(match([[0, 0, 1, 1]], [[0, 0, 1, 1]], labels=[None], asked=["cup", "dog"])) == (0, 1, 1)
    # the one label asked for is "dog": a box without a name is a dog, not a cup
    assert counts(match([[0, 0, 1, 1]], [[0, 0, 1, 1]], labels=[None], asked=["dog"])) == (0, 1, 1)


def test_no_boxes():
    assert counts(match([], [])) == (0, 0, 0)
    assert counts(match([[0, 0, 1, 1]], [])) == (0, 0, 1)
    assert counts(match([], [[0, 0, 1, 1]])) == (0, 1, 0)
    assert match([[0, 0, 1, 1]], []).best_iou.tolist() == [0]


def test_empty_boxes_never_match():
    assert counts(match([[0.5, 0.5, 0.5, 0.5]], [[0.5, 0.5, 0.5, 0.5]])) == (0, 1, 1)


def test_swapped_axes_have_the_iou_of_the_formula():
    # truth x .1-.5, y .2-.4; swapped x .2-.4, y .1-.5: both .08; they share .2 x .2 = .04; union .12; IoU 1/3
    assert match([[0.1, 0.2, 0.5, 0.4]], [[0.2, 0.1, 0.4, 0.5]]).best_iou == pytest.approx([1 / 3])


def test_an_ignored_box_takes_predictions_off_the_count():
    truth = [[0, 0, 0.4, 1], [0.5, 0, 0.9, 1]]
    # shares of them that lie on the second true box: 1, 1, 1 (its IoU is .25), .1 of .3 = 1/3
    on_ignored = [[0.5, 0, 0.9, 1], [0.5, 0, 0.88, 1], [0.5, 0, 0.6, 1], [0.8, 0, 1.1, 1]]
    matching = match(truth, on_ignored, ignore=[False, True])
    assert counts(matching) == (0, 1, 1)  # three are absorbed, the last is false, the first true box is missed
    assert counts(matching, 0.3) == (0, 0, 1)
    assert matching.ignored_share == pytest.approx([1, 1, 1, 1 / 3])
    assert np.isnan(matching.best_iou).tolist() == [False, True]
    # of another class: not absorbed
    assert counts(match(truth, on_ignored[:1], ["cup", "dog"], ignore=[False, True])) == (0, 1, 1)


def test_a_true_box_goes_before_an_ignored_one():
    # the prediction is the ignored box exactly, and has IoU .8 with the true one: still a hit
    matching = match([[0, 0, 1, 1], [0, 0, 0.8, 1]], [[0, 0, 0.8, 1]], ignore=[False, True])
    assert counts(matching) == (1, 0, 0)
    assert counts(matching, 0.9) == (0, 0, 1)  # no hit at .9, but it lies on the ignored box


def test_numbers_that_differ_are_refused():
    with pytest.raises(ValueError, match="1 true boxes, 2 labels"):
        match([[0, 0, 1, 1]], [], ["cup", "dog"])
    with pytest.raises(ValueError, match="2 labels"):
        match([], [[0, 0, 1, 1]], labels=["cup", "cup"])
    with pytest.raises(ValueError, match="2 flags"):
        match([[0, 0, 1, 1]], [], ignore=[True, False])


def test_duplicates():
    box, near, far = [0, 0, 1, 1], [0, 0, 0.95, 1], [0, 0, 0.9, 1]  # IoU .95; .9, which is not over .9; .9 / .95 = .947
    boxes = Boxes(np.array([box, near], dtype=float))
    assert count_duplicates(boxes, ["cup", "cup"]) == 1
    assert count_duplicates(boxes, ["cup", "dog"]) == 0
    assert count_duplicates(boxes, [None, None]) == 1
    assert count_duplicates(Boxes(np.array([box, far], dtype=float)), ["cup", "cup"]) == 0
    for order in ([box, near, far], [box, far, near], [near, box, far]):  # a chain: one group of three
        assert count_duplicates(Boxes(np.array(order, dtype=float)), ["cup"] * 3) == 2
    assert count_duplicates(Boxes.empty(), []) == 0
    assert count_duplicates(Boxes(np.array([box] * 7, dtype=float)), ["cup"] * 7) == 6


# a coarse grid, so that ties, equal boxes and exact thresholds are frequent
grid_box = st.tuples(*[st.integers(0, 4)] * 4).map(
    lambda v: [min(v[0], v[2]) / 5, min(v[1], v[3]) / 5, (max(v[0], v[2]) + 1) / 5, (max(v[1], v[3]) + 1) / 5]
)
labelled = st.lists(st.tuples(grid_box, st.sampled_from(ASKED), st.booleans()), max_size=6)
THRESHOLDS = [0.05, 0.25, 0.5, 0.75, 0.95]


@settings(max_examples=150, deadline=None)
@given(truth=labelled, predicted=labelled, data=st.data())
def test_order_changes_nothing(truth, predicted, data):
    def run(truth, predicted):
        return match(
            [box for box, _, _ in truth],
            [box for box, _, _ in predicted],
            [label for _, label, _ in truth],
            [label for _, label, _ in predicted],
            ignore=[flag for _, _, flag in truth],
        )

    first = run(truth, predicted)
    second = run(data.draw(st.permutations(truth)), data.draw(st.permutations(predicted)))
    for one, other in zip(first.count(THRESHOLDS), second.count(THRESHOLDS), strict=True):
        assert one.tolist() == other.tolist()
    assert first.iou.tolist() == second.iou.tolist()
    best = [sorted(np.nan_to_num(one.best_iou, nan=-1).tolist()) for one in (first, second)]
    assert best[0] == best[1]
    assert sorted(first.predicted_iou.tolist()) == sorted(second.predicted_iou.tolist())


@settings(max_examples=150, deadline=None)
@given(truth=labelled, predicted=labelled)
def test_counts_at_every_threshold_are_those_of_matching_at_it(truth, predicted):
    """Slow and plain: at one threshold, take the best pair left, again and again."""
    true_boxes = np.array([box for box, _, _ in truth]).reshape(-1, 4)
    boxes = np.array([box for box, _, _ in predicted]).reshape(-1, 4)
    matching = match(true_boxes, boxes, [label for _, label, _ in truth], [label for _, label, _ in predicted])
    iou = Boxes(true_boxes).iou(Boxes(boxes)).round(9)
    for threshold in THRESHOLDS:
        left = {
            (i, j)
            for i, (_, label, _) in enumerate(truth)
            for j, (_, other, _) in enumerate(predicted)
            if label == other and iou[i, j] >= threshold
        }
        taken = []
        while left:
            # ties by the coordinates of the true box, then of the predicted one
            best = min(left, key=lambda p: (-iou[p], truth[p[0]][0], predicted[p[1]][0]))
            taken.append(best)
            left = {(i, j) for i, j in left if i != best[0] and j != best[1]}
        expected = (len(taken), len(predicted) - len(taken), len(truth) - len(taken))
        assert counts(matching, threshold) == expected


@settings(max_examples=100, deadline=None)
@given(boxes=labelled, data=st.data())
def test_duplicates_do_not_depend_on_order(boxes, data):
    other = data.draw(st.permutations(boxes))
    figures = {
        count_duplicates(Boxes(np.array([b for b, _, _ in rows]).reshape(-1, 4)), [label for _, label, _ in rows])
        for rows in (boxes, other)
    }
    assert len(figures) == 1
    # on this grid two boxes are equal or have an IoU of at most 20/25: a duplicate is an equal box
    assert figures == {len(boxes) - len({(tuple(b), label) for b, label, _ in boxes})}

"""Every figure on cases made by hand, then relations that must hold on any rows."""

from __future__ import annotations

import copy
import math
import subprocess
import sys

import numpy as np
import pytest

from vlmdet.errors import ConfigError, DataError
from vlmdet.evaluation.metrics import THRESHOLDS, count_images, interval, per_image, resample, score_rows

NAMES = [
    "mean_best_iou", "f1_50", "f1", "precision_50", "recall_50", "mean_matched_iou", "boxes_per_image", "count_error",
    "parse_failure_rate", "off_list_rate", "duplicate_rate", "truncation_rate", "correct_empty_rate", "detection_rate",
    "error_rate",
]  # fmt: skip
LEFT, RIGHT = [0, 0, 0.4, 1], [0.5, 0, 0.9, 1]


def values(rows, asked=("cup",), **settings):
    return {name: figure["value"] for name, figure in score_rows(rows, labels_asked=asked, **settings).items()}


def test_the_names_are_exactly_these(make_row):
    figures = score_rows([make_row(truth=[LEFT], boxes=[LEFT])], labels_asked=["cup"])
    assert list(figures) == NAMES
    assert all(list(figure) == ["value", "low", "high", "n"] for figure in figures.values())
    for figure in figures.values():
        assert all(part is None or type(part) is float for part in (figure["value"], figure["low"], figure["high"]))
        assert type(figure["n"]) is int


def test_thresholds_are_decimal():
    assert THRESHOLDS.tolist() == [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]


def test_perfect_predictions(make_row):
    rows = [
        make_row("a", truth=[LEFT, RIGHT], boxes=[RIGHT, LEFT]),
        make_row("b", truth=[LEFT], boxes=[LEFT]),
        make_row("c"),
    ]
    assert values(rows) == {
        **dict.fromkeys(["mean_best_iou", "f1_50", "f1", "precision_50", "recall_50", "mean_matched_iou"], 1.0),
        **dict.fromkeys(["correct_empty_rate", "detection_rate", "boxes_per_image"], 1.0),  # 3 boxes on 3 images
        **dict.fromkeys(["count_error", "parse_failure_rate", "off_list_rate", "duplicate_rate"], 0.0),
        **dict.fromkeys(["truncation_rate", "error_rate"], 0.0),
    }
    figures = score_rows(rows, labels_asked=["cup"])
    assert (figures["f1"]["low"], figures["f1"]["high"]) == (1.0, 1.0)


def test_two_images_worked_out(make_row):
    rows = [
        # truth [0, .4]; predictions [0, .3] (IoU .3 / .4 = .75) and [0, .32] (.8): tp 1, fp 1
        make_row("a", truth=[LEFT], boxes=[[0, 0, 0.3, 1], [0, 0, 0.32, 1]]),
        # LEFT is hit exactly, RIGHT missed: tp 1, fn 1
        make_row("b", truth=[LEFT, RIGHT], boxes=[LEFT]),
    ]
    got = values(rows)
    assert got["precision_50"] == pytest.approx(2 / 3)  # tp 2, fp 1
    assert got["recall_50"] == pytest.approx(2 / 3)  # tp 2, fn 1
    assert got["f1_50"] == pytest.approx(4 / 6)  # 2 tp / (2 tp + fp + fn)
    # IoU .8 stands at .50 … .80, seven thresholds: F1 4/6. At .85, .90, .95: tp 1, fp 2, fn 2: F1 2/6
    assert got["f1"] == pytest.approx((7 * 4 / 6 + 3 * 2 / 6) / 10)
    assert got["mean_matched_iou"] == pytest.approx((0.8 + 1) / 2)
    assert got["mean_best_iou"] == pytest.approx((0.8 + 1 + 0) / 3)
    assert got["boxes_per_image"] == pytest.approx(3 / 2)
    assert got["count_error"] == pytest.approx((1 + 1) / 2)  # one too many, one too few: they do not cancel
    assert got["detection_rate"] == 1
    assert got["duplicate_rate"] == pytest.approx(1 / 3)  # .3 / .32 = .94 > .9
    assert got["correct_empty_rate"] is None
    assert got["error_rate"] == 0


def test_recall_does_not_pass_one_when_boxes_are_sprayed(make_row):
    sprayed = [[0, 0, 0.4 - i / 1000, 1] for i in range(20)]
    got = values([make_row(truth=[LEFT], boxes=sprayed)])
    assert got["recall_50"] == 1
    assert got["mean_best_iou"] == 1  # which is why it never stands alone
    assert got["precision_50"] == pytest.approx(1 / 20)
    assert got["boxes_per_image"] == 20
    assert got["count_error"] == 19


def test_one_box_over_several_serves_all_in_mean_best_iou_but_one_in_recall(make_row):
    # [0, 1] x [0, 1] over its two halves: IoU .5 with each
    got = values([make_row(truth=[[0, 0, 0.5, 1], [0.5, 0, 1, 1]], boxes=[[0, 0, 1, 1]])])
    assert got["mean_best_iou"] == 0.5
    assert got["recall_50"] == 0.5


def test_another_class_is_a_miss_and_a_false_box(make_row):
    got = values([make_row(truth=[LEFT], boxes=[LEFT], labels=["dog"])], asked=["cup", "dog"])
    assert (got["precision_50"], got["recall_50"], got["f1_50"], got["mean_best_iou"]) == (0, 0, 0, 0)
    assert got["mean_matched_iou"] is None  # no pair
    assert got["off_list_rate"] == 0
    assert got["detection_rate"] == 0


def test_off_list_counts_boxes(make_row):
    row = make_row(boxes=[LEFT, RIGHT, [0, 0, 1, 1]], labels=["cup", "cat", None])
    assert values([row], asked=["cup"])["off_list_rate"] == pytest.approx(1 / 3)  # None is the one label asked for
    assert values([row], asked=["cup", "dog"])["off_list_rate"] == pytest.approx(2 / 3)


def test_swapped_axes(make_row):
    # truth x .1-.5, y .2-.4, swapped: they share .04 of .08 + .08 - .04: IoU 1/3
    got = values([make_row(truth=[[0.1, 0.2, 0.5, 0.4]], boxes=[[0.2, 0.1, 0.4, 0.5]])])
    assert got["mean_best_iou"] == pytest.approx(1 / 3)
    assert got["f1_50"] == 0


def test_empty_images(make_row):
    rows = [
        make_row("a"),  # rightly none
        make_row("b", boxes=[LEFT]),  # a false box
        make_row("c", status="parse_failure"),  # no answer is not a right one
        make_row("d", truth=[LEFT], ignore=[True]),  # something is there that does not count: neither
        make_row("e", truth=[LEFT], boxes=[LEFT]),
    ]
    figures = score_rows(rows, labels_asked=["cup"])
    assert figures["correct_empty_rate"]["value"] == pytest.approx(1 / 3)
    assert figures["correct_empty_rate"]["n"] == 3
    assert figures["detection_rate"] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 1}
    assert figures["f1_50"]["n"] == 5
    assert figures["f1_50"]["value"] == pytest.approx(2 / 3)  # tp 1, fp 1, fn 0
    assert figures["parse_failure_rate"]["value"] == pytest.approx(1 / 5)


def test_nothing_to_find_and_nothing_found_is_undefined_not_zero(make_row):
    got = score_rows([make_row("a"), make_row("b")], labels_asked=["cup"])
    for name in ("mean_best_iou", "f1_50", "f1", "precision_50", "recall_50", "mean_matched_iou", "detection_rate"):
        assert (got[name]["value"], got[name]["low"], got[name]["high"]) == (None, None, None), name
    assert got["correct_empty_rate"]["value"] == 1
    assert got["boxes_per_image"]["value"] == 0


def test_no_rows():
    for name, figure in score_rows([], labels_asked=["cup"]).items():
        assert figure == {"value": None, "low": None, "high": None, "n": 0}, name


def test_a_model_that_says_nothing_scores_zero_where_there_is_truth(make_row):
    got = values([make_row(truth=[LEFT])])
    assert (got["f1_50"], got["recall_50"], got["mean_best_iou"], got["count_error"]) == (0, 0, 0, 1)
    assert got["precision_50"] is None


def test_ignored_boxes_count_nowhere(make_row):
    # RIGHT is ignored; one prediction on it, one on LEFT
    got = values([make_row(truth=[LEFT, RIGHT], ignore=[False, True], boxes=[LEFT, RIGHT])])
    assert (got["f1_50"], got["mean_best_iou"], got["count_error"]) == (1, 1, 0)
    assert got["boxes_per_image"] == 2
    # missing it costs nothing either
    got = values([make_row(truth=[LEFT, RIGHT], ignore=[False, True], boxes=[LEFT])])
    assert (got["f1_50"], got["mean_best_iou"], got["count_error"]) == (1, 1, 0)


def test_failures_and_truncation_are_shares_of_images(make_row):
    rows = [
        make_row("a", truth=[LEFT], status="parse_failure", truncated=True),
        make_row("b", truth=[LEFT], boxes=[LEFT], truncated=True),
        make_row("c", truth=[LEFT], boxes=[LEFT]),
        make_row("d", truth=[LEFT], boxes=[LEFT]),
    ]
    got = values(rows)
    assert got["parse_failure_rate"] == 0.25
    assert got["truncation_rate"] == 0.5
    assert got["recall_50"] == 0.75  # what could not be read found nothing
    assert got["detection_rate"] == 0.75


def test_an_error_is_no_bad_box(make_row):
    good = [make_row("a", truth=[LEFT], boxes=[LEFT]), make_row("b", truth=[LEFT, RIGHT], boxes=[LEFT]), make_row("c")]
    before = score_rows(good, labels_asked=["cup"])
    after = score_rows([*good, make_row("bb", truth=[LEFT, RIGHT], status="error")], labels_asked=["cup"])
    assert after.pop("error_rate")["value"] == 0.25
    assert before.pop("error_rate")["value"] == 0
    assert after == before  # values, intervals and n
    only = score_rows([make_row(truth=[LEFT], status="error")], labels_asked=["cup"])
    assert only["error_rate"] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 1}
    assert only["mean_best_iou"] == {"value": None, "low": None, "high": None, "n": 0}


def test_the_interval_is_that_of_drawing_images(make_row):
    # 40 of 100 images found: the bootstrap of a share is binomial; percentiles 2.5 and 97.5 of Bin(100, .4): 31 and 50
    rows = [make_row(f"{i:03}", truth=[LEFT], boxes=[LEFT] if i < 40 else []) for i in range(100)]
    figure = score_rows(rows, labels_asked=["cup"], resamples=4000)["detection_rate"]
    assert figure["value"] == 0.4
    assert figure["low"] == pytest.approx(0.31, abs=0.011)
    assert figure["high"] == pytest.approx(0.50, abs=0.011)
    assert figure["n"] == 100


def test_intervals_narrow_with_images_and_not_with_resamples(make_row):
    few = [make_row(f"{i:03}", truth=[LEFT], boxes=[LEFT] if i % 2 else []) for i in range(25)]
    many = [make_row(f"{i:03}", truth=[LEFT], boxes=[LEFT] if i % 2 else []) for i in range(400)]

    def width(rows, resamples):
        figure = score_rows(rows, labels_asked=["cup"], resamples=resamples)["recall_50"]
        return figure["high"] - figure["low"]

    assert width(many, 1000) == pytest.approx(width(few, 1000) / 4, rel=0.2)  # by the square root of 16
    assert width(few, 8000) == pytest.approx(width(few, 1000), rel=0.2)


def test_no_resamples_no_interval(make_row):
    figure = score_rows([make_row(truth=[LEFT], boxes=[LEFT])], labels_asked=["cup"], resamples=0)["f1"]
    assert figure == {"value": 1.0, "low": None, "high": None, "n": 1}


def test_resamples_draw_whole_images(random_rows, monkeypatch):
    rows = random_rows(n=9)
    counts = count_images(rows, labels_asked=["cup", "dog"])
    sums = resample(counts, resamples=50, seed=3)
    assert set(sums["images"]) == {9.0}  # each resample draws as many images as there are
    for name, added in sums.items():
        assert added[0] == pytest.approx(counts[name].sum(axis=0)), name
    assert len(np.unique(sums["tp"][:, 0])) > 1
    assert (sums["tp"] + sums["fn"] == sums["truth"][:, None]).all()  # counts of one image stay together


def test_resamples_in_blocks_draw_the_same(make_row, monkeypatch):
    counts = {"images": np.ones(1_500_000), "x": np.zeros(1_500_000)}  # two at once: 4,000,000 // 1,500,000
    counts["x"][:5] = [1, 10, 100, 1000, 10000]
    rng = np.random.default_rng(1)
    expected = [rng.multinomial(1_500_000, np.full(1_500_000, 1 / 1_500_000))[:5] @ counts["x"][:5] for _ in range(3)]
    assert resample(counts, resamples=3, seed=1)["x"][1:].tolist() == expected


def test_undefined_resamples_are_left_out():
    nan = math.nan
    assert interval(np.array([nan, 1.0])) == (None, None, None)
    assert interval(np.array([0.5, nan, nan])) == (0.5, None, None)
    assert interval(np.array([0.5, nan, 0.25, 0.25])) == (0.5, 0.25, 0.25)


def test_per_image(make_row):
    rows = [
        make_row("b", truth=[LEFT, RIGHT], boxes=[LEFT, [0, 0, 0.1, 1], [0.4, 0, 0.5, 1]]),
        make_row("a"),
        make_row("c", truth=[LEFT], status="error"),
    ]
    first, second, third = per_image(rows, labels_asked=["cup"])
    # tp 1, fp 2, fn 1: F1 2 / 5; best IoUs 1 and 0
    assert first == {
        "id": "b", "status": "ok", "n_truth": 2, "n_pred": 3, "tp": 1, "fp": 2, "fn": 1,
        "mean_best_iou": 0.5, "f1": 0.4,
    }  # fmt: skip
    assert second == {
        "id": "a", "status": "none", "n_truth": 0, "n_pred": 0, "tp": 0, "fp": 0, "fn": 0,
        "mean_best_iou": None, "f1": None,
    }  # fmt: skip
    assert third == {"id": "c", "status": "error"} | dict.fromkeys(list(first)[2:])


def test_per_image_adds_up_to_the_figures(random_rows):
    rows = random_rows()
    images = per_image(rows, labels_asked=["cup", "dog"])
    tp, fp, fn = (sum(image[name] for image in images) for name in ("tp", "fp", "fn"))
    assert tp > 5
    assert fp > 5
    assert fn > 5
    assert values(rows, asked=["cup", "dog"])["f1_50"] == pytest.approx(2 * tp / (2 * tp + fp + fn))


def test_two_rows_of_one_id_are_refused(make_row):
    with pytest.raises(DataError, match="'twice'"):
        score_rows([make_row("twice"), make_row("a"), make_row("twice")], labels_asked=["cup"])


@pytest.mark.parametrize("asked", [[], "cup"])
def test_labels_must_be_a_list(make_row, asked):
    with pytest.raises(ConfigError, match="no labels"):
        score_rows([make_row()], labels_asked=asked)
    with pytest.raises(ConfigError, match="no labels"):
        per_image([make_row()], labels_asked=asked)


def test_the_order_of_rows_and_boxes_changes_nothing(random_rows):
    rows = random_rows()
    rng = np.random.default_rng(5)
    shuffled = [copy.deepcopy(rows[i]) for i in rng.permutation(len(rows))]
    for row in shuffled:
        for side, names in ((row, ("boxes", "labels")), (row["truth"], ("boxes", "labels", "ignore"))):
            order = rng.permutation(len(side["boxes"]))
            for name in names:
                side[name] = [side[name][i] for i in order]
    assert shuffled != rows
    asked = ["cup", "dog"]
    assert score_rows(shuffled, labels_asked=asked, resamples=200) == score_rows(
        rows, labels_asked=asked, resamples=200
    )


@pytest.mark.parametrize("axis", [0, 1])
def test_mirrored_pictures_have_the_same_figures(random_rows, axis):
    rows = random_rows()
    mirrored = copy.deepcopy(rows)
    for row in mirrored:
        for side in (row, row["truth"]):
            for box in side["boxes"]:
                box[axis], box[axis + 2] = 1 - box[axis + 2], 1 - box[axis]
    before, after = values(rows, ("cup", "dog"), resamples=0), values(mirrored, ("cup", "dog"), resamples=0)
    assert after == pytest.approx(before, abs=1e-8)
    # on one side alone it does change them
    for row, original in zip(mirrored, rows, strict=True):
        row["truth"] = original["truth"]
    assert values(mirrored, ("cup", "dog"), resamples=0)["f1_50"] < before["f1_50"] - 0.1


def test_every_image_twice_has_the_same_values(random_rows):
    rows = random_rows()
    twice = rows + [{**row, "id": f"{row['id']} again"} for row in rows]
    assert values(twice, ("cup", "dog"), resamples=0) == pytest.approx(values(rows, ("cup", "dog"), resamples=0))


def test_the_seed_alone_decides_the_interval(random_rows):
    rows = random_rows()
    one, same, other = (score_rows(rows, labels_asked=["cup"], resamples=200, seed=seed)["f1"] for seed in (1, 1, 2))
    assert one == same
    assert one["value"] == other["value"]
    assert one["low"] != other["low"]


def test_scoring_needs_no_torch():
    code = (
        "import sys, vlmdet.evaluation.compare, vlmdet.evaluation.files; "
        "print([m for m in ('torch', 'transformers', 'PIL', 'supervision') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

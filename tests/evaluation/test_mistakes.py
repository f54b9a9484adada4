"""Kinds of mistakes, one hand-made picture each, and what F1 gains where one kind is mended."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmdet.evaluation.mistakes import KINDS, MISTAKES
from vlmdet.evaluation.results import list_matches, summarise

ASKED = ["cup", "dog"]
A, B, FAR = [0, 0, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9], [0.92, 0, 1, 0.1]
HALF = [0, 0, 0.4, 0.16]  # IoU .4 with A
EDGE = [0, 0, 0.4, 0.04]  # IoU .1 with A


def kinds(row):
    (line,) = list_matches([row], labels_asked=ASKED)
    return [box["kind"] for box in line["predictions"]]


def errors(rows, resamples=0):
    return summarise(rows, labels_asked=ASKED, resamples=resamples)["errors"]


def counted(rows):
    return {name: entry["count"] for name, entry in errors(rows).items() if entry["count"]}


@pytest.mark.parametrize(
    ("boxes", "labels", "expected", "count"),
    [
        ([A], ["cup"], ["hit"], {}),
        ([A], ["dog"], ["class"], {"class": 1}),
        ([A], [None], ["class"], {"class": 1}),
        ([A], ["unheard of"], ["class"], {"class": 1}),
        ([HALF], ["cup"], ["localisation"], {"localisation": 1}),
        ([EDGE], ["cup"], ["localisation"], {"localisation": 1}),  # .1 counts
        ([HALF], ["dog"], ["both"], {"both": 1, "missed": 1}),
        ([A, A], ["cup", "cup"], ["hit", "duplicate"], {"duplicate": 1}),
        ([FAR], ["cup"], ["background"], {"background": 1, "missed": 1}),
        ([[0, 0, 0.4, 0.039]], ["cup"], ["background"], {"background": 1, "missed": 1}),
        ([], [], [], {"missed": 1}),
        # it is found already: a second answer with another label mends nothing, nor does a worse place
        ([A, A], ["cup", "dog"], ["hit", "class"], {"class": 1}),
        ([A, HALF], ["cup", "cup"], ["hit", "localisation"], {"localisation": 1}),
        # two explain one missed box: it is missed by neither count
        ([A, HALF], ["dog", "cup"], ["class", "localisation"], {"class": 1, "localisation": 1}),
    ],
)
def test_one_true_cup(make_row, boxes, labels, expected, count):
    row = make_row(truth=[A], boxes=boxes, labels=labels)
    assert sorted(kinds(row)) == sorted(expected)
    assert counted([row]) == count


def test_the_truth_that_a_box_overlaps_most_decides(make_row):
    # a dog called a cup, exactly, where a cup stands near: IoU .1 of [0,0,.4,.04] with it
    row = make_row(truth=[A, [0, 0, 0.4, 0.04]], truth_labels=["dog", "cup"], boxes=[A], labels=["cup"])
    assert kinds(row) == ["class"]
    # two cups said of one, IoU 1 and .75; below it lies a dog, IoU .6 with the second
    row = make_row(
        truth=[A, [0, 0, 0.4, 0.18]], truth_labels=["cup", "dog"], boxes=[A, [0, 0, 0.4, 0.3]], labels=["cup", "cup"]
    )
    assert kinds(row) == ["hit", "duplicate"]


def test_a_prediction_between_two_cups_explains_one_of_them(make_row):
    # [.2, .6] over [0, .4] and [.4, .8]: IoU .2 / .6 = 1/3 with each
    row = make_row(truth=[[0, 0, 0.4, 1], [0.4, 0, 0.8, 1]], boxes=[[0.2, 0, 0.6, 1]])
    assert counted([row]) == {"localisation": 1, "missed": 1}
    (line,) = list_matches([row], labels_asked=ASKED)
    assert [box["prediction"] for box in line["truth"]] == [0, None]
    assert {box["kind"] for box in line["truth"]} == {"missed"}


def test_ignored_regions_make_no_mistakes(make_row):
    row = make_row(truth=[A, B], ignore=[False, True], boxes=[A, [0.6, 0.6, 0.7, 0.7], FAR])
    assert kinds(row) == ["hit", "ignored", "background"]
    assert counted([row]) == {"background": 1}
    (line,) = list_matches([row], labels_asked=ASKED)
    assert line["predictions"][1] == {"kind": "ignored", "iou": 1.0, "truth": 1}
    assert line["truth"][1] == {"kind": "ignored", "iou": 0.0, "prediction": None}


@pytest.mark.parametrize(
    ("mistake", "boxes", "labels", "gain"),
    [
        # beside it, on another picture: one cup found, one missed at FAR with nothing near.
        # before: tp 1, fp 1, fn 2: F1 2/5. Mended by label or place: tp 2, fp 0, fn 1: 4/5
        ("class", [A], ["dog"], 4 / 5 - 2 / 5),
        ("localisation", [HALF], ["cup"], 4 / 5 - 2 / 5),
        # taken away: tp 1, fp 0, fn 2: 2/4
        ("both", [HALF], ["dog"], 2 / 4 - 2 / 5),
        ("background", [B], ["cup"], 2 / 4 - 2 / 5),
        # before: tp 2, fp 1, fn 1: 4/6; taken away: 4/5
        ("duplicate", [A, A], ["cup", "cup"], 4 / 5 - 4 / 6),
    ],
)
def test_costs(make_row, mistake, boxes, labels, gain):
    rows = [make_row("a", truth=[A], boxes=boxes, labels=labels), make_row("b", truth=[A, FAR], boxes=[A])]
    found = errors(rows)
    assert found[mistake]["cost"]["value"] == pytest.approx(gain)
    assert found[mistake]["cost"]["n"] == 2
    others = {name: found[name]["count"] for name in MISTAKES if name not in (mistake, "missed")}
    assert set(others.values()) == {0}
    assert all(found[name]["cost"]["value"] == 0 for name in others)


def test_the_cost_of_missed_boxes_is_finding_them(make_row):
    # tp 1, fp 1, fn 2: 2/5; both found: tp 3, fp 1: 6/7
    rows = [make_row("a", truth=[A, B, FAR], boxes=[A, [0, 0.5, 0.1, 0.6]])]
    assert errors(rows)["missed"] == {
        "count": 2, "cost": {"value": pytest.approx(6 / 7 - 2 / 5), "low": None, "high": None, "n": 1}
    }  # fmt: skip


def test_a_class_mistake_on_a_found_box_is_taken_away(make_row):
    # tp 1, fp 1: 2/3; mended: 1
    rows = [make_row(truth=[A], boxes=[A, A], labels=["cup", "dog"])]
    assert errors(rows)["class"]["cost"]["value"] == pytest.approx(1 / 3)


def test_intervals_of_costs(make_row):
    rows = [make_row(f"{i:02}", truth=[A], boxes=[A if i % 2 else FAR]) for i in range(40)]
    cost = errors(rows, resamples=500)["background"]["cost"]
    # F1 = h / n of h hits, for tp h, fp n - h, fn n - h; without the false ones 2h / (h + n)
    assert cost["value"] == pytest.approx(2 / 3 - 1 / 2)
    assert cost["low"] < cost["value"] < cost["high"]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_kinds_are_a_partition(random_rows, seed):
    rows = random_rows(n=8, seed=seed)
    results = summarise(rows, labels_asked=ASKED, resamples=0)
    lines = list_matches(rows, labels_asked=ASKED)
    boxes = [box for line in lines for box in line["predictions"]]
    truth = [box for line in lines for box in line["truth"]]
    assert len(boxes) == sum(len(row["boxes"]) for row in rows)
    assert len(truth) == sum(len(row["truth"]["boxes"]) for row in rows)
    number = {kind: sum(box["kind"] == kind for box in boxes) for kind in KINDS}
    assert sum(number.values()) == len(boxes)
    for name in MISTAKES[:-1]:
        assert results["errors"][name]["count"] == number[name]
    found = [box for box in truth if box["kind"] == "found"]
    assert len(found) == number["hit"]
    missed = [box for box in truth if box["kind"] == "missed"]
    assert results["errors"]["missed"]["count"] == sum(box["prediction"] is None for box in missed)
    real = len(found) + len(missed)
    if real:  # without a true box there is no F1 to gain
        figure = results["figures"]["f1_50"]["value"]
        assert figure == pytest.approx(2 * len(found) / (real + len(boxes) - number["ignored"]))
        for entry in results["errors"].values():
            assert -1e-12 <= entry["cost"]["value"] <= 1 - figure + 1e-12
    for row, line in zip(rows, lines, strict=True):  # partners name one another
        for i, box in enumerate(line["truth"]):
            if box["kind"] == "found":
                assert line["predictions"][box["prediction"]] == {"kind": "hit", "iou": box["iou"], "truth": i}
            if box["kind"] == "missed" and box["prediction"] is not None:
                assert line["predictions"][box["prediction"]]["kind"] in ("class", "localisation")
        for box in line["predictions"]:
            assert box["truth"] is None or 0 <= box["truth"] < len(row["truth"]["boxes"])

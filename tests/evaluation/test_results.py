"""Every part of results.json on pictures made by hand, then relations that must hold on any rows."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmdet.contract import Contract
from vlmdet.errors import ConfigError, DataError
from vlmdet.evaluation.metrics import BOX_FIGURES, FORMULAS, score_rows
from vlmdet.evaluation.results import list_matches, summarise

ASKED = ["cup", "dog"]
LEFT, RIGHT = [0, 0, 0.4, 1], [0.5, 0, 0.9, 1]
KEYS = [
    "meta", "figures", "per_class", "by_size", "by_patches", "by_count", "without_objects", "confusion", "errors",
    "iou_histogram", "offsets", "score_curve", "coco",
]  # fmt: skip
CONTRACT = Contract(
    system_prompt="", user_prompt="", template_sha256="", codec="qwen2_vl", codec_version="qwen2_vl/1",
    min_pixels=784, max_pixels=200 * 100 * 784, size_factor=28, box_order="raster", labels=("cup",), base_model="",
    base_fingerprint="", data_fingerprint="", decoding={}, versions={},
)  # fmt: skip


def results(rows, asked=ASKED, resamples=0, **more):
    found = summarise(rows, labels_asked=asked, resamples=resamples, **more)
    json.dumps(found, allow_nan=False)
    return found


def values(part):
    return {name: figure["value"] for name, figure in part["figures"].items()}


def pixels(x, y, width, height):
    """A box in pixels of the 200 x 100 picture, as fractions."""
    return [x / 200, y / 100, (x + width) / 200, (y + height) / 100]


def test_the_parts_are_exactly_these(random_rows):
    rows = random_rows()
    found = results(rows, resamples=50, meta={"split": "val"})
    assert list(found) == KEYS
    assert found["meta"] == {"split": "val"}
    assert found["figures"] == score_rows(rows, labels_asked=ASKED, resamples=50)
    assert list(found["by_size"]) == ["small", "medium", "large"]
    assert list(found["by_count"]) == ["0", "1", "2-4", "5+"]
    assert list(found["errors"]) == ["class", "localisation", "both", "duplicate", "background", "missed"]
    assert found["by_patches"] is None
    assert found["score_curve"] is None
    assert found["coco"] is None


def test_classes(make_row):
    rows = [
        make_row("a", truth=[LEFT, RIGHT], truth_labels=["cup", "dog"], boxes=[LEFT, RIGHT], labels=["cup", "cup"]),
        make_row("b", truth=[LEFT, RIGHT], truth_labels=["cup", "cup"], boxes=[LEFT], labels=["cup"]),
        make_row("c", truth=[RIGHT], truth_labels=["cat"], boxes=[RIGHT], labels=["cow"]),  # neither was asked for
    ]
    found = results(rows)["per_class"]
    assert list(found) == ["cup", "dog", "cat"]
    cup, dog, cat = found.values()
    assert (cup["images"], cup["instances"], cup["predicted"]) == (2, 3, 3)
    assert values(cup) == pytest.approx(  # tp 2, fp 1, fn 1; the IoUs are 1, 1, 0
        {"f1_50": 2 / 3, "f1": 2 / 3, "precision_50": 2 / 3, "recall_50": 2 / 3, "mean_best_iou": 2 / 3, "mean_matched_iou": 1}
    )  # fmt: skip
    assert (dog["images"], dog["instances"], dog["predicted"]) == (1, 1, 0)
    assert values(dog) == dict.fromkeys(BOX_FIGURES, 0.0) | {"precision_50": None, "mean_matched_iou": None}
    assert (cat["images"], cat["instances"], cat["predicted"]) == (1, 1, 0)
    assert cup["figures"]["f1"]["n"] == 2
    assert dog["figures"]["f1"]["n"] == 1


def test_ignored_boxes_are_no_instances(make_row):
    rows = [make_row(truth=[LEFT, RIGHT], ignore=[False, True], boxes=[RIGHT])]
    found = results(rows)
    cup = found["per_class"]["cup"]
    assert (cup["images"], cup["instances"], cup["predicted"]) == (1, 1, 1)
    assert values(cup)["recall_50"] == 0
    assert values(cup)["precision_50"] is None  # the one prediction lies on what is ignored
    assert found["by_size"]["medium"]["instances"] == 1  # 80 x 100 pixels


def test_sizes_have_limits_of_coco_in_pixels(make_row):
    rows = [
        make_row("a", truth=[pixels(10, 10, 32, 31.9)]),
        make_row("b", truth=[pixels(10, 10, 32, 32)]),  # the limit belongs to the larger
        make_row("c", truth=[pixels(10, 2, 96, 95.9)]),
        make_row("d", truth=[pixels(10, 2, 96, 96)]),
        make_row("e", truth=[pixels(3, 0, 96, 96)]),
    ]
    assert {name: part["instances"] for name, part in results(rows)["by_size"].items()} == {
        "small": 1, "medium": 2, "large": 2
    }  # fmt: skip


def test_boxes_outside_of_a_size_are_ignored_in_it(make_row):
    # a true box of 40 x 40 found by one of 30 x 40 (1,200: medium as well) and one of 30 x 30 that finds nothing (small)
    rows = [make_row(truth=[pixels(0, 0, 40, 40)], boxes=[pixels(0, 0, 30, 40), pixels(100, 50, 30, 30)])]
    found = results(rows)["by_size"]
    assert values(found["medium"])["precision_50"] == 1
    assert (values(found["small"])["precision_50"], values(found["small"])["recall_50"]) == (0, None)
    assert values(found["large"])["f1_50"] is None
    # a true box of 33 x 33 (medium) found by one of 31 x 31 (small): a hit of medium, and nothing to small
    rows = [make_row(truth=[pixels(0, 0, 33, 33)], boxes=[pixels(1, 1, 31, 31)])]
    found = results(rows)["by_size"]
    assert values(found["medium"])["f1_50"] == 1
    assert values(found["small"])["f1_50"] is None
    # with IoU 961 / 1089 = .88 it is no hit at .9 and .95, and false in its own size: eight of ten thresholds in medium
    assert values(found["medium"])["f1"] == pytest.approx(8 / 10)


def test_patches_are_counted_in_the_picture_that_the_model_sees(make_row):
    # 200 x 100 becomes 196 x 112: 7 x 4 = 28 tokens
    share = {"<1": 0.9, "1-4": 1.0, "4-16": 4.1, ">16": 16.0}
    rows = [make_row(name, truth=[[0, 0, 1, count / 28]]) for name, count in share.items()]
    found = results(rows, contract=CONTRACT)["by_patches"]
    assert {name: part["instances"] for name, part in found.items()} == dict.fromkeys(share, 1)
    strip = {**make_row("strip", truth=[LEFT]), "width": 10_000, "height": 10}  # refused for its shape: in no part
    found = results([strip], contract=CONTRACT)
    assert {part["instances"] for part in found["by_patches"].values()} == {0}
    assert found["figures"]["recall_50"]["value"] == 0


def test_numbers_of_boxes(make_row):
    def boxes(count):
        return [[i / 10, 0, (i + 1) / 10, 1] for i in range(count)]

    rows = [make_row(f"{n}", truth=boxes(n), boxes=boxes(n // 2)) for n in (0, 1, 2, 4, 5, 9)]
    rows.append(make_row("only ignored", truth=[LEFT], ignore=[True]))
    found = results(rows)["by_count"]
    assert {name: part["images"] for name, part in found.items()} == {"0": 2, "1": 1, "2-4": 2, "5+": 2}
    assert found["1"]["figures"]["recall_50"]["value"] == 0
    assert found["2-4"]["figures"]["recall_50"]["value"] == 3 / 6
    assert found["5+"]["figures"]["recall_50"]["value"] == pytest.approx(6 / 14)
    assert found["0"]["figures"]["recall_50"]["value"] is None
    assert set(found["0"]["figures"]) == set(FORMULAS) - {"error_rate"}


def test_pictures_without_objects(make_row):
    rows = [
        make_row("a"),
        make_row("b", boxes=[LEFT, LEFT]),
        make_row("c", status="parse_failure", truncated=True),
        make_row("d", truth=[LEFT], boxes=[RIGHT, RIGHT, RIGHT]),
    ]
    found = results(rows)["without_objects"]
    assert found["images"] == 3
    assert values(found) == pytest.approx(
        {
            "correct_empty_rate": 1 / 3,
            "boxes_per_image": 2 / 3,
            "parse_failure_rate": 1 / 3,
            "off_list_rate": 0,
            "duplicate_rate": 1 / 2,
            "truncation_rate": 1 / 3,
        }
    )
    assert {figure["n"] for figure in found["figures"].values()} == {3}


def test_confusion(make_row):
    far = [0.95, 0, 1, 0.1]
    rows = [
        make_row("a", truth=[LEFT, RIGHT], truth_labels=["cup", "dog"], boxes=[LEFT, RIGHT], labels=["cup", "cup"]),
        make_row("b", truth=[LEFT], truth_labels=["dog"]),
        make_row("c", boxes=[far, LEFT, RIGHT], labels=["dog", None, "cow"]),
        # on a found box: false, and not taken for another
        make_row("d", truth=[LEFT], boxes=[LEFT, LEFT], labels=["cup", "dog"]),
        make_row("e", truth=[LEFT], boxes=[[0, 0, 0.1, 1]], labels=["cup"]),  # IoU .25
        make_row("f", truth=[LEFT], ignore=[True], boxes=[LEFT], labels=["cup"]),
    ]
    assert results(rows)["confusion"] == {
        "labels": ["cup", "dog", "(off-list)", "background"],
        "counts": [[2, 0, 0, 1], [1, 0, 0, 1], [0, 0, 0, 0], [1, 2, 2, 0]],
    }
    assert results(rows[:2])["confusion"]["labels"] == ["cup", "dog", "background"]


def test_iou_histogram(make_row):
    found = [[0, 0, share, 1] for share in (0.04, 0.5, 0.549, 0.55, 1.0)]  # IoU with the whole picture
    rows = [make_row(f"{i}", truth=[[0, 0, 1, 1]], boxes=[box]) for i, box in enumerate(found)]
    histogram = results(rows)["iou_histogram"]
    assert histogram["edges"] == pytest.approx([i / 20 for i in range(21)])
    expected = [0] * 20
    expected[0], expected[10], expected[11], expected[19] = 1, 2, 1, 1
    assert histogram["counts"] == expected


def test_offsets(make_row):
    # .4 wide and 1 high; moved by a quarter of the width to the right, and lower by a fifth of the height
    found = results([make_row(truth=[[0.1, 0, 0.5, 0.5]], boxes=[[0.2, 0, 0.6, 0.4]])])["offsets"]
    assert {name: part["median"] for name, part in found.items()} == pytest.approx(
        {"x": 0.25, "y": -0.1, "w": 0, "h": -0.2}
    )
    for name, value in (("x", 0.25), ("y", -0.1), ("w", 0), ("h", -0.2)):
        (place,) = np.flatnonzero(found[name]["counts"])
        assert found[name]["edges"][place] <= value < found[name]["edges"][place + 1]
        assert len(found[name]["edges"]) == len(found[name]["counts"]) + 1
    # four times as wide: beyond the end, and counted there; IoU .25
    found = results([make_row(truth=[[0, 0, 0.2, 1]], boxes=[[0, 0, 0.8, 1]])])["offsets"]
    assert (found["w"]["counts"][-1], found["w"]["median"]) == (1, pytest.approx(3))
    assert results([make_row()])["offsets"]["x"]["median"] is None


def test_a_shift_that_all_boxes_share_is_seen(random_rows):
    rows = random_rows()
    for row in rows:
        row["boxes"] = [
            [x1 + 0.25 * (x2 - x1), y1, x2 + 0.25 * (x2 - x1), y2] for x1, y1, x2, y2 in row["truth"]["boxes"]
        ]
        row["labels"], row["status"] = row["truth"]["labels"], "ok"
    found = results(rows)["offsets"]
    assert found["x"]["median"] == pytest.approx(0.25)
    assert found["y"]["median"] == pytest.approx(0, abs=0.02)


def scored(row, *scores):
    return {**row, "scores": list(scores), "score_source": "token_probability"}


def test_score_curve(make_row):
    rows = [
        scored(make_row("a", truth=[LEFT], boxes=[LEFT, RIGHT]), 0.9, 0.3),
        scored(make_row("b", truth=[LEFT, RIGHT], boxes=[LEFT]), 0.6),
        scored(make_row("c")),
    ]
    curve = results(rows)["score_curve"]
    assert curve["score"] == [0.3, 0.6, 0.9]
    assert curve["precision"] == pytest.approx([2 / 3, 1, 1])
    assert curve["recall"] == pytest.approx([2 / 3, 2 / 3, 1 / 3])
    assert curve["f1"] == pytest.approx([2 / 3, 4 / 5, 1 / 2])
    best = curve["best"]
    assert (best["score"], best["chosen_on"], best["f1"]["value"]) == (0.6, "this split", pytest.approx(4 / 5))
    assert best["f1"]["n"] == 3
    given_one = results(rows, score_threshold=0.7)["score_curve"]["best"]
    assert (given_one["score"], given_one["chosen_on"], given_one["f1"]["value"]) == (0.7, "given", 1 / 2)
    assert given_one["recall"]["value"] == pytest.approx(1 / 3)


def test_what_a_threshold_leaves_is_matched_again(make_row):
    # both on one box; the better one has the lower score: without it the other finds the box
    rows = [scored(make_row(truth=[LEFT], boxes=[LEFT, [0, 0, 0.3, 1]]), 0.2, 0.8)]
    curve = results(rows)["score_curve"]
    assert (curve["precision"], curve["recall"]) == ([0.5, 1], [1, 1])


@pytest.mark.parametrize("scores", [[None, 0.5], [0.7, 0.7], ["1", 0.5], [True, 0.5]])
def test_scores_that_are_none(make_row, scores):
    row = make_row(truth=[LEFT], boxes=[LEFT, RIGHT])
    assert results([{**row, "scores": scores}])["score_curve"] is None
    other = scored(make_row("b", boxes=[LEFT, RIGHT]), 0.1, 0.2)
    assert results([row, other])["score_curve"] is None  # one picture has scores, the other none


def test_a_long_curve_is_thinned(make_row):
    rng = np.random.default_rng(0)
    rows = [scored(make_row(f"{i:03}", truth=[LEFT], boxes=[LEFT, RIGHT]), *rng.random(2)) for i in range(200)]
    curve = results(rows)["score_curve"]
    every = sorted(score for row in rows for score in row["scores"])
    assert len(curve["score"]) == 101
    assert (curve["score"][0], curve["score"][-1]) == (every[0], every[-1])
    assert curve["f1"][0] == pytest.approx(results(rows)["figures"]["f1_50"]["value"])


def test_matches_of_a_picture(make_row):
    row = make_row(
        truth=[RIGHT, LEFT], truth_labels=["dog", "cup"], boxes=[[0.45, 0, 0.95, 1], LEFT], labels=["cup", "cup"]
    )
    (line,) = list_matches([row], labels_asked=ASKED)
    assert line == {
        "id": "a",
        "predictions": [
            {"kind": "class", "iou": pytest.approx(0.8), "truth": 0},
            {"kind": "hit", "iou": 1.0, "truth": 1},
        ],
        "truth": [
            {"kind": "missed", "iou": pytest.approx(0.8), "prediction": 0},
            {"kind": "found", "iou": 1.0, "prediction": 1},
        ],
        "f1": 0.5,
        "mean_best_iou": 0.5,
    }


def test_matches_come_in_the_order_of_the_rows(make_row):
    rows = [make_row("b", truth=[LEFT]), make_row("a", truth=[LEFT, RIGHT], status="error"), make_row("c")]
    lines = list_matches(rows, labels_asked=ASKED)
    assert [line["id"] for line in lines] == ["b", "a", "c"]
    assert [len(line["truth"]) for line in lines] == [1, 2, 0]
    assert {box["kind"] for box in lines[1]["truth"]} == {"ignored"}
    assert (lines[0]["f1"], lines[1]["f1"], lines[2]["f1"]) == (0, None, None)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"truth": [LEFT], "status": "error"}] * 2,
        [{}],
        [{"truth": [LEFT]}],
        [{"boxes": [LEFT]}],
        [{"truth": [[0.5, 0.5, 0.5, 0.5]], "boxes": [[0.5, 0.5, 0.5, 0.5]]}],
        [{"truth": [[0.9, 0.9, 0.1, 0.1]], "boxes": [[0.9, 0.9, 0.1, 0.1]]}],  # corners the wrong way round
        [{"truth": [[-5, -5, 5, 5]], "boxes": [[-1e300, -1e300, 1e300, 1e300]]}],
        [{"truth": [[0, 0, 5e-324, 1]], "boxes": [[0, 0, 5e-324, 1]]}],
        [{"truth": [[0, 0, 1e-300, 1]], "boxes": [[0, 0, 0.1, 1]]}],
    ],
)
@pytest.mark.filterwarnings("error")
def test_odd_runs(make_row, rows):
    made = [make_row(f"{i}", **row) for i, row in enumerate(rows)]
    for row in made:
        row["width"], row["height"] = 2**40, 2**40
    found = results(made, resamples=20, contract=CONTRACT)
    lines = list_matches(made, labels_asked=ASKED)
    json.dumps(lines, allow_nan=False)
    assert found["figures"]["f1_50"]["n"] == sum(row["status"] != "error" for row in made)
    assert set(found["per_class"]) == set(ASKED)


def test_many_classes(make_row):
    asked = [f"class {i}" for i in range(1000)]
    rows = [make_row("a", truth=[LEFT], truth_labels=["class 999"], boxes=[LEFT], labels=["class 999"])]
    found = results(rows, asked=asked, resamples=100)
    assert len(found["per_class"]) == 1000
    assert values(found["per_class"]["class 999"])["f1"] == 1
    assert values(found["per_class"]["class 0"])["f1"] is None
    assert found["confusion"]["counts"][999][999] == 1


def test_refusals(make_row):
    with pytest.raises(ConfigError, match="no labels"):
        summarise([make_row()], labels_asked=[])
    with pytest.raises(DataError, match=r"'a'.*four finite numbers"):
        summarise([make_row(boxes=[[0, 0, 1]])], labels_asked=ASKED)
    with pytest.raises(DataError, match=r"'a'.*four finite numbers"):
        summarise([make_row(truth=[[0, 0, 1, float("nan")]])], labels_asked=ASKED)
    with pytest.raises(DataError, match=r"'a'.*number"):
        summarise([make_row(boxes=[LEFT], labels=[])], labels_asked=ASKED)
    with pytest.raises(DataError, match=r"'a'.*number"):
        summarise([make_row(truth=[LEFT], ignore=[])], labels_asked=ASKED)


# Relations that hold on any rows.


def shuffled(rows, seed):
    rng = np.random.default_rng(seed)
    made = [copy.deepcopy(rows[i]) for i in rng.permutation(len(rows))]
    for row in made:
        for side, names in ((row, ("boxes", "labels", "scores")), (row["truth"], ("boxes", "labels", "ignore"))):
            order = rng.permutation(len(side["boxes"]))
            for name in names:
                side[name] = side[name] and [side[name][i] for i in order]
    return made


def with_scores(rows, seed):
    rng = np.random.default_rng(seed)
    return [{**row, "scores": rng.random(len(row["boxes"])).tolist()} for row in rows]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_order_of_rows_and_boxes_changes_nothing(random_rows, seed):
    rows = with_scores(random_rows(n=10, seed=seed), seed)
    before, after = (results(these, resamples=30, contract=CONTRACT) for these in (rows, shuffled(rows, seed)))
    assert after == before


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), axis=st.integers(0, 1))
def test_mirrored_pictures(random_rows, seed, axis):
    rows = random_rows(n=10, seed=seed)
    mirrored = copy.deepcopy(rows)
    for row in mirrored:
        for side in (row, row["truth"]):
            for box in side["boxes"]:
                box[axis], box[axis + 2] = 1 - box[axis + 2], 1 - box[axis]
    before, after = results(rows), results(mirrored)
    assert after["confusion"] == before["confusion"]
    for part in ("errors", "by_count", "without_objects", "per_class", "by_size", "figures"):
        assert flat(after[part]) == pytest.approx(flat(before[part]), abs=1e-6), part
    moved = "xy"[axis]
    if before["offsets"][moved]["median"] is not None:
        assert after["offsets"][moved]["median"] == pytest.approx(-before["offsets"][moved]["median"], abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([2, 3, 10]))
def test_scaled_pictures(random_rows, seed, scale):
    """Boxes are fractions: only sizes in pixels change, and what is small in a picture of half the size is then."""
    rows = random_rows(n=10, seed=seed)
    scaled = [{**row, "width": row["width"] * scale, "height": row["height"] * scale} for row in rows]
    before, after = results(rows), results(scaled)
    for part in KEYS:
        if part != "by_size":
            assert after[part] == before[part], part
    count = {name: part["instances"] for name, part in after["by_size"].items()}
    assert sum(count.values()) == sum(part["instances"] for part in before["by_size"].values())
    area = [
        (x2 - x1) * (y2 - y1) * 200 * 100 * scale**2
        for row in rows
        for (x1, y1, x2, y2), ignored in zip(row["truth"]["boxes"], row["truth"]["ignore"], strict=True)
        if not ignored and row["status"] != "error"
    ]
    assert count["small"] == sum(a < 1024 for a in area)
    assert count["large"] == sum(a >= 9216 for a in area)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_every_picture_twice(random_rows, seed):
    rows = random_rows(n=8, seed=seed)
    before, after = results(rows), results(rows + [{**row, "id": f"{row['id']} again"} for row in rows])
    one, two = flat(before["figures"]), flat(after["figures"])
    assert {k: v for k, v in two.items() if not k.endswith("/n")} == pytest.approx(
        {k: v for k, v in one.items() if not k.endswith("/n")}
    )
    assert (2 * np.asarray(before["confusion"]["counts"])).tolist() == after["confusion"]["counts"]
    for name, entry in before["errors"].items():
        assert after["errors"][name]["count"] == 2 * entry["count"]
        assert after["errors"][name]["cost"]["value"] == pytest.approx(entry["cost"]["value"])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_every_box_said_twice(random_rows, seed):
    """Lowers precision, and neither recall nor the best IoU; what was added is false or ignored."""
    rows = [row for row in random_rows(n=8, seed=seed) if row["boxes"]]
    said = [{**row, "boxes": row["boxes"] * 2, "labels": row["labels"] * 2} for row in rows]
    before, after = results(rows)["figures"], results(said)["figures"]
    for name in ("recall_50", "mean_best_iou"):
        # a copy may find another box that nothing found: recall never falls, and never passes 1
        assert before[name]["value"] is None or before[name]["value"] <= after[name]["value"] <= 1
    if before["precision_50"]["value"]:
        assert after["precision_50"]["value"] <= before["precision_50"]["value"] + 1e-12
    assert after["duplicate_rate"]["value"] >= 0.5


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_parts_add_up_to_the_whole(random_rows, seed):
    rows = random_rows(n=10, seed=seed)
    found = results(rows)
    true = sum(not flag for row in rows for flag in row["truth"]["ignore"])
    sizes, classes = found["by_size"], found["per_class"]
    assert sum(part["instances"] for part in sizes.values()) == true
    assert sum(part["instances"] for part in classes.values()) == true
    for parts in (sizes, classes):  # hits of the parts
        hits = sum(part["instances"] * (values(part)["recall_50"] or 0) for part in parts.values())
        assert hits == pytest.approx((found["figures"]["recall_50"]["value"] or 0) * true)
    counts = np.asarray(found["confusion"]["counts"])
    for number, part in enumerate(classes.values()):
        assert counts[number].sum() == part["instances"]
        assert counts[number, number] == pytest.approx(part["instances"] * (values(part)["recall_50"] or 0))
    assert sum(part["images"] for part in found["by_count"].values()) == len(rows)
    assert sum(found["iou_histogram"]["counts"][10:]) == np.trace(counts[:-1, :-1])


def flat(part, prefix=""):
    """Lay nested objects out by path; None becomes -1, so that undefined must stay undefined."""
    if isinstance(part, dict):
        return {key: value for name, inner in part.items() for key, value in flat(inner, f"{prefix}/{name}").items()}
    return {prefix: -1 if part is None else part}

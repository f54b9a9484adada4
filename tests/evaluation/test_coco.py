"""COCO's AP and AR: published figures, cases by hand, and pycocotools beside them."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vlmdet.errors import ConfigError
from vlmdet.evaluation.coco import (
    FIGURES,
    coco_figures,
    constant_scores,
    document_figures,
    precision_times_recall,
    rows_to_coco,
    shuffled_figures,
    write_coco_predictions,
)
from vlmdet.evaluation.coco_files import read_results, read_truth

TOLERANCE = 1e-6


def pycocotools_figures(truth: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        true = COCO()
        true.dataset = copy.deepcopy({"info": {}, **truth})
        true.createIndex()
        evaluation = COCOeval(true, true.loadRes(copy.deepcopy(results)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(evaluation.stats[place]) for name, place in FIGURES.items()}


def scene(
    truth: list[tuple], results: list[tuple], *, images: int = 2, categories: tuple[int, ...] = (1,)
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Make documents: truth (image, category, bbox, iscrowd), results (image, category, bbox, score)."""
    annotations = [
        {
            "id": i,
            "image_id": image,
            "category_id": category,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": crowd,
        }
        for i, (image, category, box, crowd) in enumerate(truth, start=1)
    ]
    document = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(1, images + 1)],
        "categories": [{"id": i, "name": f"class {i}"} for i in categories],
        "annotations": annotations,
    }
    found = [{"image_id": i, "category_id": c, "bbox": box, "score": score} for i, c, box, score in results]
    return document, found


BOX, OTHER, SMALL = [10, 10, 100, 100], [300, 200, 100, 100], [10, 10, 20, 20]


def test_a_found_and_a_missed_box_are_half() -> None:
    # precision 1 up to recall .5: 51 of the 101 recall points have precision 1
    figures = document_figures(*scene([(1, 1, BOX, 0), (1, 1, OTHER, 0)], [(1, 1, BOX, 0.9)]))
    assert figures["AP"] == pytest.approx(51 / 101)
    assert (figures["AR1"], figures["AR10"], figures["AR100"]) == (0.5, 0.5, 0.5)
    assert (figures["APs"], figures["APm"]) == (-1, -1)  # boxes of 100 x 100 are large
    assert figures["APl"] == pytest.approx(51 / 101)


def test_two_predictions_on_one_box_are_one_hit() -> None:
    figures = document_figures(*scene([(1, 1, BOX, 0)], [(1, 1, BOX, 0.9), (1, 1, BOX, 0.8)]))
    assert (figures["AP"], figures["AR100"]) == (1, 1)
    # the false one first: precision is 1/2 everywhere
    figures = document_figures(*scene([(1, 1, BOX, 0)], [(1, 1, OTHER, 0.9), (1, 1, BOX, 0.8)]))
    assert (figures["AP"], figures["AR1"], figures["AR10"]) == (pytest.approx(0.5), 0, 1)


def test_a_prediction_on_a_crowd_is_not_counted() -> None:
    inside = [320, 220, 20, 20]
    figures = document_figures(*scene([(1, 1, BOX, 0), (1, 1, OTHER, 1)], [(1, 1, inside, 0.9), (1, 1, BOX, 0.5)]))
    assert figures["AP"] == 1
    figures = document_figures(*scene([(1, 1, BOX, 0), (1, 1, OTHER, 0)], [(1, 1, inside, 0.9), (1, 1, BOX, 0.5)]))
    assert figures["AP"] < 0.5


def test_size_decides_by_area_at_the_limits() -> None:
    figures = document_figures(*scene([(1, 1, SMALL, 0), (2, 1, [5, 5, 40, 40], 0)], [(1, 1, SMALL, 0.9)]))
    assert (figures["APs"], figures["APm"], figures["APl"]) == (1, 0, -1)


def test_past_a_hundred_boxes_a_picture_the_lowest_scores_are_cut() -> None:
    false = [(1, 1, OTHER, 0.9 - i / 1000) for i in range(100)]
    assert document_figures(*scene([(1, 1, BOX, 0)], [*false, (1, 1, BOX, 0.1)]))["AR100"] == 0
    assert document_figures(*scene([(1, 1, BOX, 0)], [*false[:99], (1, 1, BOX, 0.1)]))["AR100"] == 1


def test_a_category_without_truth_has_no_part_and_one_without_results_counts_0() -> None:
    figures = document_figures(
        *scene([(1, 7, BOX, 0), (2, 3, BOX, 0)], [(1, 7, BOX, 0.9), (1, 5, OTHER, 0.8)], categories=(7, 5, 3))
    )
    assert figures["AP"] == 0.5


def test_without_truth_everything_is_undefined() -> None:
    assert set(document_figures(*scene([], [(1, 1, BOX, 0.5)])).values()) == {-1}
    assert document_figures(*scene([(1, 1, BOX, 0)], []))["AP"] == 0


@pytest.mark.parametrize("seed", range(6))
def test_equal_to_pycocotools_on_drawn_sets(seed: int) -> None:
    """Crowds, odd ids in odd order, tied scores, pictures without truth, more than a hundred boxes."""
    rng = np.random.default_rng(seed)
    categories = (40, 3, 17, 9)

    def box() -> list[float]:
        corner, size = rng.uniform(0, 300, 2), np.exp(rng.uniform(2, 5, 2))
        return [round(float(number), 2) for number in (*corner, *size)]

    truth = [
        (int(rng.integers(1, 9)), int(rng.choice(categories[:3])), box(), int(rng.random() < 0.15)) for _ in range(60)
    ]
    results = []
    for image, category, true, _ in truth:
        near = [round(number + float(rng.normal(0, 4)), 2) for number in true]
        near[2:] = [max(number, 1.0) for number in near[2:]]
        results.append((image, category, near, round(float(rng.random()), 1)))
    results += [(1, 3, box(), round(float(rng.random()), 2)) for _ in range(120)]
    results += [(10, int(rng.choice(categories)), box(), float(rng.random())) for _ in range(9)]
    document, found = scene(truth, results, images=10, categories=categories)
    ours, theirs = document_figures(document, found), pycocotools_figures(document, found)
    assert ours == pytest.approx(theirs, abs=TOLERANCE)


def test_published_figures_of_cocoapi(shared: Path) -> None:
    folder = shared / "data" / "eval"
    published = json.loads((folder / "expected.json").read_text())["cocoapi_fakebbox100"]
    truth = read_truth(folder / published["gt"])
    for name in (published["dt"], "faster_coco_eval/dataset_cocoapi_instances_val2014_fakebbox100_results.json"):
        results = read_results(folder / name, truth)
        figures = document_figures(truth.document, results.results)
        assert figures == pytest.approx({k: published["published"][k] for k in FIGURES}, abs=TOLERANCE)
        assert truth.notes == ()
        # counted by hand: pictures 715, 923, 987 and 1270 have two boxes of one class and score
        assert [note for note in results.notes if not note.startswith("4 boxes have the score of another")] == []


@pytest.mark.parametrize("name", ["dataset", "ignore_test"])
def test_files_of_faster_coco_eval(shared: Path, name: str) -> None:
    folder = shared / "data" / "eval" / "faster_coco_eval"
    true, found = folder / f"dataset_gt_{name}.json", folder / f"dataset_dt_{name}.json"
    truth = read_truth(true)
    figures = document_figures(truth.document, read_results(found, truth).results)
    raw = json.loads(true.read_text())
    for entry in raw["images"]:
        entry["id"] = int(entry["id"])  # one file has "2299" and 2299, which pycocotools takes for two pictures
    for entry in raw["annotations"]:
        entry["image_id"] = int(entry["image_id"])
    assert figures == pytest.approx(pycocotools_figures(raw, json.loads(found.read_text())), abs=TOLERANCE)


@pytest.mark.parametrize("name", ["_inputs", "_inputs2", "_inputs3"])
def test_inputs_of_torchmetrics(shared: Path, tmp_path: Path, name: str) -> None:
    folder = shared / "data" / "eval"
    both = json.loads((folder / "torchmetrics" / "inputs.json").read_text())[name]
    expected = json.loads((folder / "expected.json").read_text())["torchmetrics_inputs"]["recomputed"][name]
    targets = [entry for batch in both["target"] for entry in (batch if isinstance(batch, list) else [batch])]
    given = [entry for batch in both["preds"] for entry in (batch if isinstance(batch, list) else [batch])]
    annotations, results = [], []
    for image, (target, pred) in enumerate(zip(targets, given, strict=True)):
        for box, label in zip(target["boxes"], target["labels"], strict=True):
            x, y, right, low = box
            annotations.append({"image_id": image, "category_id": label, "bbox": [x, y, right - x, low - y]})
        for box, label, score in zip(pred["boxes"], pred["labels"], pred["scores"], strict=True):
            results.append({"image_id": image, "category_id": label, "bbox": box, "score": score})
    classes = sorted({entry["category_id"] for entry in [*annotations, *results]})
    document = {
        "images": [{"id": image} for image in range(len(targets))],
        "categories": [{"id": label, "name": str(label)} for label in classes],
        "annotations": annotations,
    }
    (tmp_path / "gt.json").write_text(json.dumps(document))
    (tmp_path / "dt.json").write_text(json.dumps(results))
    truth = read_truth(tmp_path / "gt.json")
    read = read_results(tmp_path / "dt.json", truth, box_format="xyxy/pixel")
    figures = document_figures(truth.document, read.results)
    assert figures == pytest.approx({k: expected["pycocotools"][k] for k in FIGURES}, abs=TOLERANCE)


def scored(make_row: Any, boxes: list[list[float]], scores: list[float] | None, **fields: Any) -> dict[str, Any]:
    return make_row(boxes=boxes, **fields) | {"scores": scores, "score_source": "test"}


LEFT, RIGHT = [0.0, 0.0, 0.4, 1.0], [0.5, 0.0, 0.9, 1.0]


def test_rows_are_scored_in_pixels_and_ignored_boxes_are_crowds(make_row: Any) -> None:
    rows = [scored(make_row, [RIGHT, LEFT], [0.9, 0.5], truth=[LEFT, RIGHT], ignore=[False, True])]
    figures = coco_figures(rows, labels_asked=["cup"])
    assert figures["AP"] == 1
    assert (figures["APm"], figures["APl"]) == (1, -1)  # 80 x 100 of a picture of 200 x 100
    truth, results = rows_to_coco(rows, labels_asked=["cup"])
    assert [entry["bbox"] for entry in results] == [[100, 0, 80, 100], [0, 0, 80, 100]]
    assert [entry["iscrowd"] for entry in truth["annotations"]] == [0, 1]


def test_boxes_without_a_class_that_was_asked_for_have_no_part(make_row: Any) -> None:
    rows = [scored(make_row, [LEFT, LEFT], [0.9, 0.5], truth=[LEFT], labels=["dog", "cup"])]
    assert coco_figures(rows, labels_asked=["cup"])["AP"] == 1
    rows = [scored(make_row, [LEFT], [0.9], truth=[LEFT], labels=[None])]
    assert coco_figures(rows, labels_asked=["cup"])["AP"] == 1  # only one class: it can mean no other
    assert coco_figures(rows, labels_asked=["cup", "dog"])["AP"] == 0


def test_error_rows_have_no_part(make_row: Any) -> None:
    rows = [scored(make_row, [LEFT], [0.9], truth=[LEFT]), make_row("b", truth=[LEFT], status="error")]
    assert coco_figures(rows, labels_asked=["cup"])["AP"] == 1


def test_constant_scores_are_refused_with_the_flag(make_row: Any) -> None:
    for scores, words in ([[1.0, 1.0], "the score 1"], [None, "no score"]):
        rows = [scored(make_row, [LEFT, RIGHT], scores, truth=[LEFT])]
        with pytest.raises(ConfigError, match=f"have {words}.*--allow-constant-scores"):
            coco_figures(rows, labels_asked=["cup"])
    with pytest.raises(ConfigError, match="1 of 2 boxes have no score"):
        coco_figures([scored(make_row, [LEFT, RIGHT], [None, 0.5])], labels_asked=["cup"])


def test_shuffles_have_the_best_and_the_worst_order(make_row: Any) -> None:
    # one hit, one false box, in two pictures: AP is 1 or 1/2, whichever comes first; P x R = 1/2
    rows = [
        scored(make_row, [LEFT], [1.0], id="a", truth=[LEFT]),
        scored(make_row, [LEFT], [1.0], id="b"),
    ]
    truth, results = rows_to_coco(rows, labels_asked=["cup"])
    assert constant_scores(results)
    ap = shuffled_figures(truth, results, seed=0)["AP"]
    assert (ap["minimum"], ap["maximum"]) == (pytest.approx(0.5), 1)
    assert 0.6 < ap["mean"] < 0.9
    assert shuffled_figures(truth, results, seed=0)["AP"] == ap
    assert precision_times_recall(rows, labels_asked=["cup"]) == 0.5
    assert coco_figures(rows, labels_asked=["cup"], allow_constant_scores=True)["AP"] == ap["mean"]


def test_written_predictions_score_the_same_with_pycocotools(random_rows: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows = [row | {"scores": rng.random(len(row["boxes"])).tolist()} for row in random_rows()]
    labels = ["cup", "dog"]
    truth = write_coco_predictions(tmp_path / "predictions.coco.json", rows, labels_asked=labels)
    given = json.loads((tmp_path / "predictions.coco.json").read_text())
    figures = coco_figures(rows, labels_asked=labels)
    assert figures == pytest.approx(pycocotools_figures(json.loads(truth.read_text()), given), abs=TOLERANCE)
    assert 0 < figures["AP"] < 1
    again = read_results(tmp_path / "predictions.coco.json", read_truth(truth))
    assert coco_figures(again.rows, labels_asked=labels) == pytest.approx(figures, abs=TOLERANCE)


def test_the_order_of_rows_changes_nothing(random_rows: Any) -> None:
    rng = np.random.default_rng(1)
    rows = [row | {"scores": rng.random(len(row["boxes"])).round(1).tolist()} for row in random_rows()]
    assert coco_figures(rows[::-1], labels_asked=["cup", "dog"]) == coco_figures(rows, labels_asked=["cup", "dog"])

"""Our own counts on a published set with crowds, against pycocotools' IoU and plain loops."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vlmdet.evaluation.metrics import per_image
from vlmdet.evaluation.results import list_matches, summarise


@pytest.fixture(scope="module")
def rows(shared) -> list[dict[str, Any]]:
    """100 pictures of COCO val2014 with 734 detections of the cocoapi."""
    folder = shared / "data" / "eval"
    truth = json.loads((folder / "faster_coco_eval" / "dataset_cocoapi_instances_val2014_100.json").read_text())
    found = json.loads((folder / "cocoapi" / "instances_val2014_fakebbox100_results.json").read_text())
    names = {category["id"]: category["name"] for category in truth["categories"]}
    made = {
        image["id"]: {
            "id": str(image["id"]),
            "width": image["width"],
            "height": image["height"],
            "truth": {"boxes": [], "labels": [], "ignore": []},
            "boxes": [],
            "labels": [],
            "scores": [],
            "status": "ok",
            "truncated": False,
        }
        for image in truth["images"]
    }

    def fractions(entry):
        row = made[entry["image_id"]]
        x, y, width, height = entry["bbox"]
        return [x / row["width"], y / row["height"], (x + width) / row["width"], (y + height) / row["height"]]

    for entry in truth["annotations"]:
        side = made[entry["image_id"]]["truth"]
        side["boxes"].append(fractions(entry))
        side["labels"].append(names[entry["category_id"]])
        side["ignore"].append(bool(entry["iscrowd"]))
    for entry in found:
        row = made[entry["image_id"]]
        row["boxes"].append(fractions(entry))
        row["labels"].append(names[entry["category_id"]])
        row["scores"].append(entry["score"])
    return list(made.values())


def plain(row):
    """Count hits, false and missed boxes of one picture at IoU .5, as slowly as it is written."""
    mask = pytest.importorskip("pycocotools.mask")

    def pixels(boxes):
        wide, high = row["width"], row["height"]
        return [[x1 * wide, y1 * high, (x2 - x1) * wide, (y2 - y1) * high] for x1, y1, x2, y2 in boxes]

    truth = row["truth"]
    hits = false = missed = 0
    for label in {*truth["labels"], *row["labels"]}:
        mine = [i for i, name in enumerate(truth["labels"]) if name == label]
        said = [box for box, name in zip(row["boxes"], row["labels"], strict=True) if name == label]
        crowd = [truth["ignore"][i] for i in mine]
        table = mask.iou(pixels(said), pixels([truth["boxes"][i] for i in mine]), [int(flag) for flag in crowd])
        iou = {(a, b): float(table[a][b]) for a in range(len(said)) for b in range(len(mine))} if said and mine else {}
        left = {pair: value for pair, value in iou.items() if not crowd[pair[1]] and value >= 0.5}
        taken = []
        while left:
            best = max(left, key=lambda pair: left[pair])
            taken.append(best)
            left = {pair: value for pair, value in left.items() if pair[0] != best[0] and pair[1] != best[1]}
        unmatched = set(range(len(said))) - {a for a, _ in taken}
        absorbed = {a for (a, b), value in iou.items() if crowd[b] and value >= 0.5}
        hits, false = hits + len(taken), false + len(unmatched - absorbed)
        missed += crowd.count(False) - len(taken)
    return hits, false, missed


def test_counts_are_those_of_plain_loops(rows):
    asked = sorted({label for row in rows for label in (*row["labels"], *row["truth"]["labels"])})
    assert any(flag for row in rows for flag in row["truth"]["ignore"])
    for row, image in zip(rows, per_image(rows, labels_asked=asked), strict=True):
        assert (image["tp"], image["fp"], image["fn"]) == plain(row), row["id"]


def test_the_whole_set(rows):
    asked = sorted({label for row in rows for label in (*row["labels"], *row["truth"]["labels"])})
    found = summarise(rows, labels_asked=asked, resamples=0)
    hits, false, missed = (sum(part) for part in zip(*map(plain, rows), strict=True))
    assert found["figures"]["precision_50"]["value"] == pytest.approx(hits / (hits + false))
    assert found["figures"]["recall_50"]["value"] == pytest.approx(hits / (hits + missed))
    kinds = [box["kind"] for line in list_matches(rows, labels_asked=asked) for box in line["predictions"]]
    assert kinds.count("hit") == hits
    assert len(kinds) - kinds.count("hit") - kinds.count("ignored") == false
    assert found["score_curve"]["f1"][0] == pytest.approx(found["figures"]["f1_50"]["value"])

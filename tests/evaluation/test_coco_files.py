"""COCO files as other tools write them: other names, orders and wrappings read as the same; what is unclear is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from vlmdet.errors import DataError
from vlmdet.evaluation.coco import document_figures
from vlmdet.evaluation.coco_files import Results, Truth, read_results, read_truth, rows_about

TRUTH: dict[str, Any] = {
    "images": [
        {"id": 11, "file_name": "b.jpg", "width": 200, "height": 100},
        {"id": 7, "file_name": "a.jpg", "width": 100, "height": 100},
        {"id": 12, "file_name": "empty.jpg", "width": 100, "height": 100},
    ],
    "categories": [{"id": 5, "name": "dog"}, {"id": 2, "name": "cup"}],
    "annotations": [
        {"id": 3, "image_id": 11, "category_id": 5, "bbox": [20, 10, 100, 50], "area": 5000, "iscrowd": 0},
        {"id": 9, "image_id": 7, "category_id": 2, "bbox": [0, 0, 50, 50], "area": 2500, "iscrowd": 0},
        {"id": 1, "image_id": 7, "category_id": 2, "bbox": [50, 50, 50, 50], "area": 2500, "iscrowd": 1},
    ],
}
GOOD = [
    {"image_id": 11, "category_id": 5, "bbox": [20, 10, 100, 50], "score": 0.9},
    {"image_id": 7, "category_id": 2, "bbox": [0, 0, 50, 40], "score": 0.8},
    {"image_id": 7, "category_id": 5, "bbox": [60, 60, 20, 20], "score": 0.3},
]


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def both(results: Any, truth: Any = TRUTH, *, lenient: bool = False, **ways: Any) -> tuple[Truth, Results]:
        (tmp_path / "gt.json").write_text(json.dumps(truth))
        (tmp_path / "dt.json").write_text(results if isinstance(results, str) else json.dumps(results))
        true = read_truth(tmp_path / "gt.json", drop_unusable=lenient)
        return true, read_results(tmp_path / "dt.json", true, drop_unusable=lenient, **ways)

    return both


def changed(**fields: Any) -> list[dict[str, Any]]:
    """GOOD with fields put, renamed (`score="confidence"` by a text) or made of an entry by a function."""
    entries = []
    for entry in GOOD:
        new = dict(entry)
        for key, change in fields.items():
            value = new.pop(key, None)
            if callable(change):
                new |= change(value)
        entries.append(new)
    return entries


def test_rows_have_fractions_flags_and_every_picture(read: Any) -> None:
    truth, results = read(GOOD)
    assert [(row["id"], row["status"]) for row in results.rows] == [("11", "ok"), ("7", "ok"), ("12", "none")]
    first, second, _ = results.rows
    assert first["boxes"] == [[0.1, 0.1, 0.6, 0.6]]
    assert first["truth"] == {"boxes": [[0.1, 0.1, 0.6, 0.6]], "labels": ["dog"], "ignore": [False]}
    assert (second["labels"], second["scores"]) == (["cup", "dog"], [0.8, 0.3])
    assert second["truth"]["ignore"] == [False, True]
    assert (truth.labels, truth.notes, results.notes) == (("dog", "cup"), (), ())


NAMES = {11: "b", 7: "a"}
CATEGORIES = {5: "dog", 2: "cup"}
SAME: dict[str, Any] = {
    "order": GOOD[::-1],
    "id as text": changed(image_id=lambda v: {"image_id": str(v)}),
    "id as float": changed(image_id=lambda v: {"image_id": float(v)}),
    "file": changed(image_id=lambda v: {"image_id": f"{NAMES[v]}.jpg"}),
    "path": changed(image_id=lambda v: {"image_id": f"C:\\data\\{NAMES[v]}.jpg"}),
    "stem": changed(image_id=lambda v: {"image_id": NAMES[v]}),
    "name instead of id": changed(image_id=lambda v: {"file_name": f"images/{NAMES[v]}.jpg"}),
    "class by name": changed(category_id=lambda v: {"category_id": CATEGORIES[v].title()}),
    "category_name": changed(category_id=lambda v: {"category_name": CATEGORIES[v]}),
    "label": changed(category_id=lambda v: {"label": CATEGORIES[v]}),
    "from 0": changed(category_id=lambda v: {"category_id": {2: 0, 5: 1}[v]}),
    "wrong id beside a name": changed(category_id=lambda v: {"category_id": 99, "category_name": CATEGORIES[v]}),
    "confidence": changed(score=lambda v: {"confidence": v}),
    "text": changed(
        score=lambda v: {"score": str(v)}, bbox=lambda b: {"bbox": [f"{b[0]}.0", str(b[1]), f" {b[2]} ", f"{b[3]}e0"]}
    ),
    "extra": changed(score=lambda v: {"score": v, "area": -3, "id": None, "iscrowd": 0, "segmentation": []}),
    "annotations": {"annotations": GOOD},
    "predictions": {"predictions": GOOD, "model": "x"},
    "results": {"results": GOOD},
    "detections": {"detections": GOOD},
    "own table": {
        "categories": [{"id": 0, "name": "cup"}, {"id": 1, "name": "dog"}],
        "annotations": changed(category_id=lambda v: {"category_id": {2: 0, 5: 1}[v]}),
    },
    "own tables whose ids mean others in the truth": {
        "images": [{"id": 7, "file_name": "b.jpg"}, {"id": 11, "file_name": "a.jpg"}],
        "categories": [{"id": 5, "name": "cup"}, {"id": 2, "name": "dog"}],
        "annotations": changed(
            image_id=lambda v: {"image_id": {11: 7, 7: 11}[v]}, category_id=lambda v: {"category_id": {2: 5, 5: 2}[v]}
        ),
    },
    "a picture an entry": [
        {"image_id": 11, "detections": [{k: GOOD[0][k] for k in ("category_id", "bbox", "score")}]},
        {"image_id": 7, "detections": [{k: e[k] for k in ("category_id", "bbox", "score")} for e in GOOD[1:]]},
    ],
    "segmentation": changed(
        bbox=lambda b: {"segmentation": [[b[0], b[1], b[0] + b[2], b[1], b[0] + b[2], b[1] + b[3], b[0], b[1] + b[3]]]}
    ),
}


@pytest.mark.parametrize("way", SAME)
def test_all_of_these_say_the_same(read: Any, way: str) -> None:
    expected = read(GOOD)[1]
    found = read(SAME[way])[1]

    def key(row: dict[str, Any]) -> Any:
        boxes = sorted(zip(row["boxes"], row["labels"], row["scores"], strict=True), key=str)
        return row["id"], row["status"], boxes

    assert [key(row) for row in found.rows] == [key(row) for row in expected.rows]
    figures = document_figures(read(GOOD)[0].document, found.results)
    assert figures["AP"] == pytest.approx(document_figures(read(GOOD)[0].document, expected.results)["AP"])


def test_what_was_assumed_is_told(read: Any) -> None:
    assert any("--category-ids from-0" in note for note in read(SAME["from 0"])[1].notes)
    assert any("--image-ids stem" in note for note in read(SAME["stem"])[1].notes)
    assert any("'predictions'" in note for note in read(SAME["predictions"])[1].notes)
    assert any("3 results have numbers written as text" in note for note in read(SAME["text"])[1].notes)
    tables = read(SAME["own tables whose ids mean others in the truth"])[1].notes
    assert sum("a table of its own, with other ids" in note for note in tables) == 2


def test_equal_scores_of_a_picture_and_class_are_told(read: Any) -> None:
    other = {**GOOD[0], "bbox": [20, 10, 90, 50]}
    assert any(note.startswith("1 boxes have the score of another") for note in read([*GOOD, other])[1].notes)
    assert not any("the score of another" in note for note in read([*GOOD, {**other, "score": 0.8}])[1].notes)


@pytest.mark.parametrize("start", [2**53, 1_201_905_010_001_234_000, -3])
def test_ids_that_a_float_cannot_hold(read: Any, start: int) -> None:
    # neighbours above 2**53 are one number as floats
    ids = {7: start, 11: start + 1, 12: start + 2}
    truth = {
        **TRUTH,
        "images": [{**entry, "id": ids[entry["id"]]} for entry in TRUTH["images"]],
        "annotations": [{**entry, "image_id": ids[entry["image_id"]]} for entry in TRUTH["annotations"]],
    }
    found, results = read(changed(image_id=lambda v: {"image_id": ids[v]}), truth)
    plain, expected = read(GOOD)
    assert document_figures(found.document, results.results) == document_figures(plain.document, expected.results)
    assert [row["id"] for row in results.rows] == [str(start + 1), str(start), str(start + 2)]


def test_an_annotation_with_the_id_0_counts_like_any_other(read: Any) -> None:
    # pycocotools marks a found box by the id of its annotation, and reads 0 as not found
    from_0 = [{**entry, "id": i} for i, entry in enumerate(TRUTH["annotations"])]
    found, results = read(GOOD, {**TRUTH, "annotations": from_0})
    plain, expected = read(GOOD)
    assert document_figures(found.document, results.results) == document_figures(plain.document, expected.results)
    assert any("has the id 0" in note for note in found.notes)
    assert not any("has the id 0" in note for note in plain.notes)


def test_ultralytics_writes_the_number_of_the_file(read: Any) -> None:
    truth = json.loads(json.dumps(TRUTH).replace("b.jpg", "000042.jpg").replace("a.jpg", "000043.jpg"))
    _, results = read(changed(image_id=lambda v: {"image_id": {11: 42, 7: 43}[v]}), truth)
    assert [len(row["boxes"]) for row in results.rows] == [1, 2, 0]


def test_two_readings_are_refused_until_one_is_chosen(read: Any) -> None:
    truth = {**TRUTH, "categories": [*TRUTH["categories"], {"id": 9, "name": "cat"}]}
    results = changed(category_id=lambda v: {"category_id": {2: 1, 5: 2}[v]})  # 1, 2: from 0, or from 1
    with pytest.raises(DataError, match="--category-ids from-0 or --category-ids from-1"):
        read(results, truth)
    labels = [row["labels"] for row in read(results, truth, category_ids="from-1")[1].rows]
    assert labels == [["dog"], ["cup", "dog"], []]
    crossed = changed(category_id=lambda v: {"category_id": v, "category_name": {2: "dog", 5: "cup"}[v]})
    with pytest.raises(DataError, match="'id' and as 'name'"):
        read(crossed)
    assert read(crossed, category_ids="name")[1].rows[0]["labels"] == ["cup"]


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ([*GOOD, {**GOOD[0], "image_id": 99}], "1 of images that the truth lacks, such as .*99"),
        ([*GOOD, {**GOOD[0], "category_id": 77}], "1 of categories that the truth lacks, such as .*77"),
        ([*GOOD, {**GOOD[0], "bbox": [1, 2, 3]}], "1 without four finite numbers"),
        ([*GOOD, {**GOOD[0], "bbox": [1, 2, 3, float("nan")]}], "1 without four finite numbers"),
        ([*GOOD, {k: GOOD[0][k] for k in ("image_id", "category_id", "score")}], "1 without four finite numbers"),
        ([*GOOD, {**GOOD[0], "bbox": [1, 2, "3", "nan"]}], "1 without four finite numbers"),
        ([*GOOD, {**GOOD[0], "bbox": [60, 60, -9, 5]}], "1 with a negative side"),
        ([*GOOD, {**GOOD[0], "score": "high"}], "1 with a score that is no number"),
        ([*GOOD, {**GOOD[0], "score": float("nan")}], "1 with a score that is no number"),
        ([*GOOD, {k: GOOD[0][k] for k in ("image_id", "category_id", "bbox")}], "1 with a score that is no number"),
    ],
)
def test_what_cannot_be_used_is_counted_and_never_dropped_in_silence(read: Any, results: Any, words: str) -> None:
    with pytest.raises(DataError, match=f"dt.json: 1 of 4 results cannot be used: {words}"):
        read(results)
    _, kept = read(results, lenient=True)
    assert len(kept.results) == 3
    assert any("left out" in note for note in kept.notes)


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ("", "is no JSON"),
        ('"text"', "is no list of results"),
        ({"boxes": []}, "has none of annotations"),
        ([1, 2], "is no list of results"),
        (changed(bbox=lambda b: {"bbox": [0.1, 0.1, 0.3, 0.4]}), "these are no pixels"),
        (changed(bbox=lambda b: {"bbox": [60, 60, 90, 95]}), "--box-format xyxy/pixel"),
        # one of many reaches out as corners, too: a detector that does not clip
        (
            changed(bbox=lambda b: {"bbox": [60, 60, 90, 95]}) * 10 + [{**GOOD[0], "bbox": [60, 60, 250, 90]}],
            "and 1 do not",
        ),
        (changed(bbox=lambda b: {"bbox": [60, 60, -9, 5]}), "negative side"),
    ],
)
def test_other_files_are_refused_in_one_line(read: Any, results: Any, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read(results)
    assert "\n" not in str(caught.value)


def test_a_packed_file_is_named_and_a_byte_order_mark_is_read(read: Any, tmp_path: Path) -> None:
    truth, expected = read(GOOD)
    packed, marked = tmp_path / "dt.json.gz", tmp_path / "marked.json"
    packed.write_bytes(gzip.compress(json.dumps(GOOD).encode()))
    marked.write_text(json.dumps(GOOD), encoding="utf-8-sig")
    with pytest.raises(DataError, match="packed by gzip"):
        read_results(packed, truth)
    assert read_results(marked, truth).rows == expected.rows


def test_a_mask_gives_a_missing_box(read: Any) -> None:
    # 3 high and 4 wide, by columns: 4 clear, 2 set (column 1, rows 1 and 2), 6 clear
    packed = {"size": [3, 4], "counts": "426"}
    for mask in ({"size": [3, 4], "counts": [4, 2, 6]}, packed):
        _, results = read([{"image_id": 7, "category_id": 5, "segmentation": mask, "score": 1}])
        assert results.results[0]["bbox"] == [1, 1, 1, 2]


@pytest.mark.parametrize(
    "mask",
    [
        {"size": [3, 4], "counts": "abc"},
        {"size": [3, 4], "counts": "zzzz"},
        {"size": [3, 4], "counts": [4, -2, 6]},
        {"size": [3, 4], "counts": [4, 200]},
        {"size": [3, 4], "counts": 7},
        {"size": "x", "counts": "426"},
        {"size": [10**12, 10**12], "counts": "426"},
        {"counts": "426"},
        {},
    ],
)
def test_a_broken_mask_is_refused_in_one_line(read: Any, mask: Any) -> None:
    with pytest.raises(DataError, match="1 without four finite numbers of a box"):
        read([{"image_id": 7, "category_id": 5, "segmentation": mask, "score": 1}])


def test_a_box_format_that_is_said_is_read(read: Any) -> None:
    expected = read(GOOD)[1].rows[0]["boxes"]
    corners = changed(bbox=lambda b: {"bbox": [b[0], b[1], b[0] + b[2], b[1] + b[3]]})
    assert read(corners, box_format="xyxy/pixel")[1].rows[0]["boxes"] == expected
    one = [{**GOOD[0], "bbox": [0.1, 0.1, 0.5, 0.5]}]
    assert read(one, box_format="xywh/fraction")[1].rows[0]["boxes"] == [pytest.approx(expected[0])]


def test_an_empty_file_finds_nothing(read: Any) -> None:
    truth, results = read([])
    assert {row["status"] for row in results.rows} == {"none"}
    assert document_figures(truth.document, results.results)["AP"] == 0


def test_truth_with_less_in_it(read: Any) -> None:
    bare = {
        "images": [{"id": entry["id"], "file_name": entry["file_name"]} for entry in TRUTH["images"]],
        "categories": TRUTH["categories"],
        "annotations": [
            {k: entry[k] for k in ("image_id", "category_id", "bbox")} | ({"ignore": 1} if entry["iscrowd"] else {})
            for entry in TRUTH["annotations"]
        ],
    }
    truth, results = read(GOOD, bare)
    assert (results.rows[0]["width"], results.rows[0]["height"]) == (120, 60)  # what the box 20, 10, 100, 50 needs
    text = " ".join(truth.notes)
    for words in ("3 pictures have no width", "3 annotations have no area", "ignore=1 and iscrowd=0", "ids of ann"):
        assert words in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": TRUTH["images"] + TRUTH["images"][:1]}, "images share an id: 11"),
        ({"categories": TRUTH["categories"] * 2}, "categories share an id"),
        ({"images": [{"file_name": "a.jpg"}]}, "have no id"),
        ({"images": None}, "no list 'images'"),
        ({"annotations": None}, "no list 'annotations'"),
        ({"images": TRUTH["images"][:1]}, "2 without a usable image"),
        ({"categories": TRUTH["categories"][:1]}, "2 without a usable category"),
    ],
)
def test_a_truth_that_contradicts_itself_is_refused(read: Any, change: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read(GOOD, {**TRUTH, **change})


def test_rows_of_our_own_take_the_truth_of_the_file(read: Any, make_row: Any) -> None:
    truth, _ = read(GOOD)
    rows = [
        {**make_row(f"data/{name}.jpg", boxes=[[0, 0, 0.5, 0.5]], labels=["cup"]), "image": f"data/{name}.jpg"}
        for name in ("a", "b", "empty")
    ]
    found = rows_about(rows, truth, "mine")
    assert [row["id"] for row in found] == ["11", "7", "12"]
    assert found[1]["truth"] == truth.true[1]
    with pytest.raises(DataError, match="1 of that are not in it"):
        rows_about(rows[:2], truth, "mine")

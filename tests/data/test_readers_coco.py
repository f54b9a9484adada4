"""COCO files: small ones by hand, Roboflow's layout, hostile ones, and the real sets written as COCO."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmdet.boxes import BoxFormat
from vlmdet.data.readers import open_dataset
from vlmdet.data.select import select
from vlmdet.errors import DataError
from vlmdet.records import DetectionDataset, Sample

XYWH = BoxFormat("xywh", "pixel")


def image(number: int, name: str = "", **changes: Any) -> dict[str, Any]:
    return {"id": number, "file_name": name or f"{number}.jpg", "width": 40, "height": 20, **changes}


def box(picture: Any, *numbers: Any, category: Any = 5, **changes: Any) -> dict[str, Any]:
    return {"image_id": picture, "category_id": category, "bbox": list(numbers), "iscrowd": 0, **changes}


CATEGORIES = [{"id": 90, "name": "dog"}, {"id": 5, "name": "cat"}]


def document(images: Any, annotations: Any, categories: Any = CATEGORIES) -> dict[str, Any]:
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def write(file: Path, content: Any, *, pictures: Path | None = None) -> Path:
    """Write a file, and its pictures into a folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        for row in content["images"]:
            Image.new("RGB", (row["width"], row["height"]), "gray").save(pictures / row["file_name"])
    return file


def kinds(dataset: DetectionDataset) -> list[tuple[str, str]]:
    return [(problem.kind, problem.action) for problem in dataset.problems]


def only(dataset: DetectionDataset, split: str = "train") -> Sample:
    (sample,) = dataset.splits[split]
    return sample


def test_a_small_file(tmp_path: Path) -> None:
    rows = [image(7, "b.jpg"), image(3, "sub/a.jpg"), image(1, "none.png")]
    boxes = [box(3, 4, 5, 16, 5), box(7, 0, 0, 10, 10, category=90), box(3, 20, 10, 4, 2, category=90)]
    dataset = open_dataset(write(tmp_path / "mine.json", document(rows, boxes)))
    assert (dataset.labels, str(dataset.box_format), dataset.decided_by) == (
        ("dog", "cat"),
        "xywh/pixel",
        "defined by COCO",
    )
    b, a, none = dataset.splits["train"]
    assert [(one.id, one.labels, one.meta) for one in (b, a, none)] == [
        ("b", ("dog",), {"coco_id": 7}),
        ("sub/a", ("cat", "dog"), {"coco_id": 3}),
        ("none", (), {"coco_id": 1}),
    ]
    np.testing.assert_allclose(a.boxes.xyxy, [[0.1, 0.25, 0.5, 0.5], [0.5, 0.5, 0.6, 0.6]])
    np.testing.assert_allclose(b.boxes.xyxy, [[0, 0, 0.25, 0.5]])
    assert (a.width, a.height, a.split) == (40, 20, "train")
    assert a.source == f"{tmp_path / 'mine.json'}:1"
    assert dataset.problems == []
    assert dataset.notes[0].startswith("read as COCO: ")
    assert any("3 of 3 pictures are not below" in note for note in dataset.notes)


@pytest.mark.parametrize("folder", ["train2017", "images/train2017", "images", "images/train", ".", "annotations"])
def test_the_usual_folders_of_pictures(tmp_path: Path, folder: str) -> None:
    content = document([image(1)], [box(1, 4, 5, 16, 5)])
    write(tmp_path / "annotations" / "instances_train2017.json", content, pictures=tmp_path / folder)
    sample = only(open_dataset(tmp_path))
    assert sample.image.size == (40, 20)
    assert sample.id == "1"


def test_splits_by_name_and_one_of_them(tmp_path: Path) -> None:
    for name in ("train2017", "val2017", "holdout"):
        write(
            tmp_path / "annotations" / f"instances_{name}.json",
            document([image(1, f"{name}.jpg")], []),
            pictures=tmp_path / "images",
        )
    write(tmp_path / "annotations" / "captions_train2017.json", {"annotations": []})
    assert sorted(open_dataset(tmp_path).splits) == ["holdout", "train", "val"]
    assert list(open_dataset(tmp_path, split="val").splits) == ["val"]
    with pytest.raises(DataError, match="no split 'tset'"):
        open_dataset(tmp_path, split="tset")


def test_roboflow_s_layout(tmp_path: Path) -> None:
    """Each folder counts from 0, and the project's name stands among the classes without a box."""
    categories = [
        {"id": 0, "name": "cells", "supercategory": "none"},
        {"id": 1, "name": "RBC", "supercategory": "cells"},
        {"id": 2, "name": "WBC", "supercategory": "cells"},
    ]
    for name in ("train", "valid", "test"):
        content = document([image(0, f"{name}_1.jpg")], [box(0, 4, 5, 16, 5, category=1)], categories)
        write(tmp_path / name / "_annotations.coco.json", content, pictures=tmp_path / name)
    dataset = open_dataset(tmp_path)
    assert {name: [row.id for row in rows] for name, rows in dataset.splits.items()} == {
        "test": ["test_1"],
        "train": ["train_1"],
        "val": ["valid_1"],
    }
    assert dataset.labels == ("RBC", "WBC")
    assert any("supercategory without boxes: cells" in note for note in dataset.notes)
    assert dataset.problems == []
    assert only(dataset, "val").image.size == (40, 20)
    assert only(open_dataset(tmp_path / "valid"), "val").labels == ("RBC",)


def test_one_file_name_in_two_splits_is_two_rows(tmp_path: Path) -> None:
    for name in ("train", "valid"):
        write(
            tmp_path / name / "_annotations.coco.json",
            document([image(0, "1.jpg")], [box(0, 4, 5, 16, 5)]),
            pictures=tmp_path / name,
        )
    dataset = open_dataset(tmp_path)
    assert [only(dataset, name).id for name in ("train", "val")] == ["1", "val/1"]
    assert [only(dataset, name).picture for name in ("train", "val")] == [
        tmp_path / "train" / "1.jpg",
        tmp_path / "valid" / "1.jpg",
    ]
    assert dataset.problems == []


def test_crowds_stand_in_meta(tmp_path: Path) -> None:
    mask = {"counts": [1, 2, 3], "size": [20, 40]}
    boxes = [box(1, 4, 5, 16, 5), box(1, 0, 0, 40, 10, iscrowd=1, segmentation=mask)]
    dataset = open_dataset(write(tmp_path / "a.json", document([image(1)], boxes)))
    assert only(dataset).labels == ("cat",)
    assert only(dataset).meta == {"coco_id": 1, "crowd": [{"label": "cat", "bbox": [0, 0, 40, 10]}]}
    assert [(p.kind, p.action, p.row, p.id) for p in dataset.problems] == [("crowd_box", "box_dropped", 1, "1")]
    assert any("1 regions of crowds" in note for note in dataset.notes)
    np.testing.assert_allclose(only(dataset).crowd.xyxy, [[0, 0, 1, 0.5]])
    assert only(dataset).crowd_labels == ("cat",)


def test_crowds_follow_their_picture_and_the_choice_of_classes(tmp_path: Path) -> None:
    """A picture of 40 x 20 stored pixels that is to be turned by 90 degrees; its file states no size; and one that is plain."""
    boxes = [
        box(1, 0, 0, 40, 10, iscrowd=1),
        box(1, 30, 10, 20, 20, iscrowd=1, category=90),
        box(1, 5, 5, 0, 3, iscrowd=1),
        box(2, 0, 0, 20, 20, iscrowd=1),
    ]
    file = write(tmp_path / "a.json", document([image(1, width=None, height=None), image(2)], boxes))
    tags = Image.Exif()
    tags[274] = 6  # the stored top is the right side
    Image.new("RGB", (40, 20)).save(tmp_path / "1.jpg", exif=tags)
    Image.new("RGB", (40, 20)).save(tmp_path / "2.jpg")
    turned, plain = open_dataset(file, exif="ignored").splits["train"]
    assert (turned.width, turned.height) == (20, 40)
    np.testing.assert_allclose(
        turned.crowd.xyxy, [[0.5, 0, 1, 1], [0, 0.75, 0.5, 1]]
    )  # the second is cut to the picture
    assert turned.crowd_labels == ("cat", "dog")  # one without an area covers nothing
    np.testing.assert_allclose(plain.crowd.xyxy, [[0, 0, 0.5, 1]])
    chosen = select(open_dataset(file, exif="applied"), classes=["dog"], rename={"dog": "hound"})
    upright = chosen.splits["train"][0]  # boxes were drawn on a picture 20 wide: this one lies beside it
    assert (upright.crowd_labels, len(upright.crowd)) == ((), 0)
    chosen = select(open_dataset(file, exif="ignored"), classes=["dog"], rename={"dog": "hound"})
    assert [row.crowd_labels for row in chosen.splits["train"]] == [("hound",), ()]
    np.testing.assert_allclose(chosen.splits["train"][0].crowd.xyxy, [[0, 0.75, 0.5, 1]])


def test_masks_are_passed_over_and_give_a_box_where_there_is_none(tmp_path: Path) -> None:
    boxes = [
        box(1, 4, 5, 16, 5, segmentation={"counts": "RLE<x>", "size": [20, 40]}),
        {"image_id": 1, "category_id": 5, "segmentation": [[4, 5, 20, 5, 20, 10, 4, 10], [6, 6, 30, 12, 8, 8]]},
        {"image_id": 1, "category_id": 5, "segmentation": {"counts": "RLE<x>", "size": [20, 40]}},
    ]
    dataset = open_dataset(write(tmp_path / "a.json", document([image(1)], boxes)))
    np.testing.assert_allclose(only(dataset).boxes.to_array(XYWH, 40, 20), [[4, 5, 16, 5], [4, 5, 26, 7]])
    assert sorted(kinds(dataset)) == [("bad_box", "box_dropped"), ("box_from_polygon", "kept")]


def test_a_size_that_is_not_stated_comes_from_the_picture(tmp_path: Path) -> None:
    content = document([image(1)], [box(1, 4, 5, 16, 5)])
    file = write(tmp_path / "a.json", content, pictures=tmp_path)
    del content["images"][0]["width"]
    file.write_text(json.dumps(content))
    np.testing.assert_allclose(only(open_dataset(file)).boxes.xyxy, [[0.1, 0.25, 0.5, 0.5]])
    (tmp_path / "1.jpg").write_bytes(b"no picture")
    dataset = open_dataset(file)
    assert len(dataset.splits["train"]) == 0
    assert kinds(dataset) == [("unreadable_image", "row_dropped")]


def test_pictures_stay_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.json", document([image(1)], [box(1, 4, 5, 16, 5)]), pictures=tmp_path)
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("a picture was opened"))
    assert len(only(open_dataset(file)).boxes) == 1


@pytest.mark.parametrize(("exif", "expected"), [("ignored", [0.5, 0.1, 0.75, 0.5]), ("applied", [0.1, 0.25, 0.5, 0.5])])
def test_turned_picture_on_which_boxes_were_drawn_as_stored(tmp_path: Path, exif: str, expected: list[float]) -> None:
    """Tag 6: what is stored left is shown above. With `applied` the user says that the stated size is the upright one."""
    file = write(tmp_path / "a.json", document([image(1)], [box(1, 4, 5, 16, 5)]))
    turned = Image.Exif()
    turned[274] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "1.jpg", exif=turned)
    sample = only(open_dataset(file, exif=exif))
    np.testing.assert_allclose(sample.boxes.xyxy, [expected], atol=1e-9)
    assert ((sample.width, sample.height) == sample.image.size) == (exif == "ignored")


@pytest.mark.parametrize(
    ("numbers", "kind", "action"),
    [
        ((4, 5, 0, 5), "degenerate_box", "box_dropped"),
        ((4, 5, -2, 5), "reversed_box", "box_dropped"),
        ((50, 5, 2, 2), "box_outside", "box_dropped"),
        ((30, 5, 20, 5), "box_outside", "box_clipped"),
        ((0, 0, 40, 20), "whole_image_box", "kept"),
        ((4, 5, 0.1, 5), "tiny_box", "kept"),
        ((4.1, 5, 16, 5), "duplicate_box", "kept"),
        ((4, 5, 1e308, 1e308), "box_outside", "box_dropped"),
        ((-1e308, 5, 1e308, 5), "box_outside", "box_dropped"),
        ((4, 5, 16), "bad_box", "box_dropped"),
        ((4, 5, 16, "5"), "bad_box", "box_dropped"),
        ((4, 5, 16, None), "bad_box", "box_dropped"),
        ((4, 5, 16, [5]), "bad_box", "box_dropped"),
        ((float("nan"), 5, 16, 5), "bad_box", "box_dropped"),
        ((4, 5, float("inf"), 5), "bad_box", "box_dropped"),
        ((), "bad_box", "box_dropped"),
    ],
)
def test_boxes_that_do_not_fit(tmp_path: Path, numbers: tuple[Any, ...], kind: str, action: str) -> None:
    content = document([image(1)], [box(1, 4, 5, 16, 5), box(1, 1, 1, 3, 3), box(1, *numbers)])
    dataset = open_dataset(write(tmp_path / "a.json", content))
    assert kinds(dataset) == [(kind, action)]
    assert dataset.problems[0].row == 2
    sample = only(dataset)
    assert len(sample.boxes) == (2 if action == "box_dropped" else 3)
    np.testing.assert_allclose(sample.boxes.to_array(XYWH, 40, 20)[:2], [[4, 5, 16, 5], [1, 1, 3, 3]])
    if action == "box_clipped":
        np.testing.assert_allclose(sample.boxes.to_array(XYWH, 40, 20)[2], [30, 5, 10, 5])


def test_boxes_of_another_picture_or_label_are_no_duplicates(tmp_path: Path) -> None:
    boxes = [box(1, 4, 5, 16, 5), box(2, 4, 5, 16, 5), box(1, 4, 5, 16, 5, category=90), box(1, 4, 5, 16, 6)]
    dataset = open_dataset(write(tmp_path / "a.json", document([image(1), image(2)], boxes)))
    assert kinds(dataset) == []  # the last one has an IoU of 5 / 6 with the first


@pytest.mark.parametrize(
    ("rows", "boxes", "found"),
    [
        ([image(1)], [box(1, 4, 5, 16, 5), box(9, 4, 5, 16, 5)], ("unknown_image", "box_dropped")),
        ([image(1)], [box(1, 4, 5, 16, 5), box(1, 4, 5, 16, 5, category=6)], ("unknown_category", "box_dropped")),
        ([image(1), image(1, "x.jpg")], [box(1, 4, 5, 16, 5)], ("duplicate_id", "row_dropped")),
        ([image(1), image(2, "1.jpg")], [box(1, 4, 5, 16, 5)], ("duplicate_id", "kept")),
        ([image(1), image(2, "../x.jpg")], [box(1, 4, 5, 16, 5), box(2, 4, 5, 9, 5)], ("path_outside", "row_dropped")),
        ([image(1), image(2, "/etc/x.jpg")], [box(1, 4, 5, 16, 5)], ("path_outside", "row_dropped")),
        ([image(1), image(2, "..\\x.jpg")], [box(1, 4, 5, 16, 5)], ("path_outside", "row_dropped")),
        ([image(1), image(2, "a\0.jpg")], [box(1, 4, 5, 16, 5)], ("path_outside", "row_dropped")),
        ([image(1), "2.jpg"], [box(1, 4, 5, 16, 5)], ("bad_row", "row_dropped")),
        ([image(1), {"id": 2}], [box(1, 4, 5, 16, 5)], ("bad_row", "row_dropped")),
        ([image(1), {"file_name": "2.jpg"}], [box(1, 4, 5, 16, 5)], ("bad_row", "row_dropped")),
        ([image(1)], [box(1, 4, 5, 16, 5), 7], ("bad_box", "box_dropped")),
        ([image(1)], [box(1, 4, 5, 16, 5), {"bbox": [1, 2, 3, 4]}], ("bad_box", "box_dropped")),
    ],
)
def test_records_that_do_not_fit_are_counted(tmp_path: Path, rows: Any, boxes: Any, found: tuple[str, str]) -> None:
    dataset = open_dataset(write(tmp_path / "a.json", document(rows, boxes)))
    assert kinds(dataset) == [found]
    assert "\n" not in dataset.problems[0].detail
    first = dataset.splits["train"][0]
    np.testing.assert_allclose(first.boxes.xyxy, [[0.1, 0.25, 0.5, 0.5]])
    dropped = {problem.id for problem in dataset.problems if problem.action == "row_dropped"}
    assert not dropped & {sample.id for sample in dataset.splits["train"]}


def test_nan_that_python_writes_is_read(tmp_path: Path) -> None:
    content = document([image(1)], [box(1, 4, 5, 16, 5, area=float("nan")), box(1, float("nan"), 5, 16, 5)])
    file = write(tmp_path / "a.json", content)
    assert "NaN" in file.read_text()
    dataset = open_dataset(file)
    assert len(only(dataset).boxes) == 1
    assert kinds(dataset) == [("bad_box", "box_dropped")]


def test_byte_order_mark(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", document([image(1)], []))
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert only(open_dataset(file)).id == "1"


GOOD = json.dumps(document([image(1)], [box(1, 4, 5, 16, 5)]))


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("", "empty"),
        (GOOD[:-20], "no whole JSON"),
        (GOOD.replace('"bbox"', '"bbox'), "no whole JSON"),
        ("[1, 2]", "no COCO"),
        ("null", "no COCO"),
        ("{}", "no COCO"),
        ('{"images": {}, "annotations": [], "categories": []}', "no COCO"),
        ('{"images": [NaN], "annotations": 5, "categories": []}', "no COCO"),
        ("[" * 100_000, "no COCO"),
        ('{"a":' * 100_000, "no whole JSON"),
        (GOOD.replace('"name": "cat"', '"name": " "'), "has no name"),
        (GOOD.replace('"name": "cat"', '"name": 5'), "no category"),
        (GOOD.replace('{"id": 90', '{"id": 5'), "two categories"),
    ],
)
def test_files_that_are_refused_in_one_line(tmp_path: Path, content: str, word: str) -> None:
    with pytest.raises(DataError, match=word) as caught:
        open_dataset(write(tmp_path / "a.json", content), format="coco")
    assert "\n" not in str(caught.value)
    assert "a.json" in str(caught.value)


def test_binary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(bytes(range(256)))
    with pytest.raises(DataError, match="no whole JSON"):
        open_dataset(tmp_path / "a.json")


def test_corners_in_a_coco_file_are_refused_until_they_are_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    starts = rng.uniform((0, 0), (30, 12), (40, 2))
    corners = np.concatenate([starts, starts + rng.uniform(2, (10, 8), (40, 2))], axis=1)
    content = document([image(n) for n in range(40)], [box(n, *corners[n].tolist()) for n in range(40)])
    file = write(tmp_path / "a.json", content)
    with pytest.raises(DataError, match=r"they fit as xyxy/pixel.*--box-format xyxy/pixel"):
        open_dataset(file)
    dataset = open_dataset(file, box_format="xyxy/pixel")
    np.testing.assert_allclose(dataset.splits["train"][0].boxes.xyxy[0], corners[0] / [40, 20, 40, 20])


def test_slices_and_negative_numbers(tmp_path: Path) -> None:
    samples = open_dataset(write(tmp_path / "a.json", document([image(n) for n in range(5)], []))).splits["train"]
    assert [row.id for row in samples[1:4]] == ["1", "2", "3"]
    assert [row.id for row in samples[::2][1:]] == ["2", "4"]
    assert samples[-1].id == "4"
    assert len(samples[9:]) == 0
    with pytest.raises(IndexError):
        _ = samples[5]


def coco128_rows(shared: Path) -> dict[str, tuple[tuple[int, int], list[tuple[int, list[float]]]]]:
    """Read the set without our reader: stem -> size and (class, x, y, width, height in pixels) of each line."""
    rows = {}
    for file in sorted((shared / "data/coco128/images/val2017").glob("*.jpg")):
        with Image.open(file) as picture:
            w, h = picture.size
        boxes = []
        for line in (shared / "data/coco128/labels/val2017" / f"{file.stem}.txt").read_text().splitlines():
            number, cx, cy, bw, bh = map(float, line.split())
            boxes.append((int(number), [(cx - bw / 2) * w, (cy - bh / 2) * h, bw * w, bh * h]))
        rows[file.stem] = (w, h), boxes
    return rows


def test_coco128_as_coco(tmp_path: Path, shared: Path) -> None:
    rows = coco128_rows(shared)
    numbers = {stem: number for number, stem in enumerate(rows, start=1)}
    images = [
        {"id": numbers[stem], "file_name": f"{stem}.jpg", "width": w, "height": h} for stem, ((w, h), _) in rows.items()
    ]
    boxes = [
        {"image_id": numbers[stem], "category_id": 3 * number + 7, "bbox": numbers_of}
        for stem, (_, found) in rows.items()
        for number, numbers_of in found
    ]
    categories = [{"id": 3 * number + 7, "name": f"class {number}"} for number in range(80)]
    write(tmp_path / "annotations" / "instances_val2017.json", document(images, boxes, categories))
    (tmp_path / "val2017").symlink_to(shared / "data/coco128/images/val2017")
    dataset = open_dataset(tmp_path)
    samples = dataset.splits["val"]
    assert (len(samples), sum(len(sample.boxes) for sample in samples)) == (128, 898)
    assert not [problem for problem in dataset.problems if problem.action != "kept"]
    for sample in samples:
        size, found = rows[sample.id]
        assert (sample.width, sample.height) == size
        assert sample.labels == tuple(f"class {number}" for number, _ in found)
        np.testing.assert_allclose(sample.boxes.to_array(XYWH, *size), [one for _, one in found], atol=0.01)
    assert samples[0].image.size == (samples[0].width, samples[0].height)


def test_bccd_as_coco(tmp_path: Path, shared: Path) -> None:
    import csv

    with (shared / "data/bccd/test.csv").open() as file:
        table = list(csv.DictReader(file))
    names = sorted({row["filename"] for row in table})
    numbers = {name: number for number, name in enumerate(names)}
    images = [{"id": numbers[name], "file_name": name, "width": 640, "height": 480} for name in names]
    classes = {"RBC": 1, "WBC": 20, "Platelets": 3}
    boxes = [
        {
            "image_id": numbers[row["filename"]],
            "category_id": classes[row["cell_type"]],
            "bbox": [
                int(row["xmin"]),
                int(row["ymin"]),
                int(row["xmax"]) - int(row["xmin"]),
                int(row["ymax"]) - int(row["ymin"]),
            ],
        }
        for row in table
    ]
    categories = [{"id": number, "name": name} for name, number in classes.items()]
    dataset = open_dataset(write(tmp_path / "instances_train.json", document(images, boxes, categories)))
    assert len(dataset.splits["train"]) == 364
    assert Counter(kinds(dataset)) == {("degenerate_box", "box_dropped"): 2}
    counts = Counter(label for sample in dataset.splits["train"] for label in sample.labels)
    assert sum(counts.values()) == 4886
    expected = Counter(row["cell_type"] for row in table if row["xmin"] != row["xmax"])
    assert counts == expected

"""JSON lines: our own, ms-swift's, a folder of pictures with metadata.jsonl, and hostile lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmdet.boxes import BoxFormat
from vlmdet.data.readers import open_dataset
from vlmdet.errors import DataError
from vlmdet.records import DetectionDataset, Sample


def write(file: Path, rows: Sequence[Any], pictures: Sequence[str] = ("a.jpg",)) -> Path:
    """Write lines, text as it is and all else as JSON, and grey pictures beside."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name in pictures:
        (file.parent / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 20), "gray").save(file.parent / name)
    return file


def own(**changes: Any) -> dict[str, Any]:
    row = {
        "id": "one",
        "image": "a.jpg",
        "width": 40,
        "height": 20,
        "boxes": [[0.1, 0.25, 0.5, 0.5]],
        "box_format": "xyxy/fraction",
        "labels": ["cat"],
        "split": "train",
        "group": "g",
        "meta": {"k": [1]},
    }
    return {key: value for key, value in {**row, **changes}.items() if value is not ...}


def swift(**changes: Any) -> dict[str, Any]:
    objects = {"ref": ["cat"], "bbox": [[4, 5, 20, 10]], **changes}
    messages = [
        {"role": "user", "content": "<image>find the <ref-object>"},
        {"role": "assistant", "content": "<bbox>"},
    ]
    return {"messages": messages, "images": ["a.jpg"], "objects": {k: v for k, v in objects.items() if v is not ...}}


def kinds(dataset: DetectionDataset) -> list[tuple[str, str]]:
    return [(problem.kind, problem.action) for problem in dataset.problems]


def only(dataset: DetectionDataset, split: str = "train") -> Sample:
    (sample,) = dataset.splits[split]
    return sample


def test_our_own_lines(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [own(image="images/a.jpg"), own(id="none", boxes=[], labels=[])], ["images/a.jpg"])
    write(tmp_path / "val.jsonl", [own(id=7, split=..., labels=[" Ö\n\x00"], group=...)])
    dataset = open_dataset(tmp_path)
    one, none = dataset.splits["train"]
    assert (one.id, one.labels, one.group, one.meta, one.split) == ("one", ("cat",), "g", {"k": [1]}, "train")
    assert (one.width, one.height) == one.image.size == (40, 20)
    assert one.source == f"{tmp_path / 'train.jsonl'}:1"
    np.testing.assert_array_equal(one.boxes.xyxy, [[0.1, 0.25, 0.5, 0.5]])
    assert (none.labels, len(none.boxes)) == ((), 0)
    assert (only(dataset, "val").id, only(dataset, "val").labels) == ("7", (" Ö\n\x00",))
    assert (dataset.labels, str(dataset.box_format)) == (("cat", " Ö\n\x00"), "xyxy/fraction")
    assert dataset.decided_by == "stated by its lines"
    assert dataset.problems == []


def test_class_names_keep_the_order_of_their_file(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [own(labels=["cat"]), own(id="b", labels=[2], width=..., height=...)])
    (tmp_path / "classes.txt").write_text('unused\n"a\\nb"\n"dog"\ncat\n', encoding="utf-8")
    dataset = open_dataset(tmp_path)
    assert dataset.labels == ("unused", "a\nb", '"dog"', "cat")
    assert [row.labels for row in dataset.splits["train"]] == [("cat",), ('"dog"',)]
    assert dataset.splits["train"][1].width == 40


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("xywh/pixel", [4, 5, 16, 5]),
        ("yxyx/per_mille", [250, 100, 500, 500]),
        ("cxcywh/fraction", [0.3, 0.375, 0.4, 0.25]),
    ],
)
def test_lines_may_state_any_format(tmp_path: Path, text: str, numbers: list[float]) -> None:
    for changes in ({}, {"width": ..., "height": ...}):
        file = write(tmp_path / "train.jsonl", [own(boxes=[numbers], box_format=text, **changes)])
        dataset = open_dataset(file)
        assert str(dataset.box_format) == text
        np.testing.assert_allclose(only(dataset).boxes.xyxy, [[0.1, 0.25, 0.5, 0.5]])


@pytest.mark.parametrize("rows", [[own(), own(box_format="yxyx/fraction")], [own(), own(box_format=...)]])
def test_lines_that_state_different_formats_are_refused(tmp_path: Path, rows: list[Any]) -> None:
    with pytest.raises(DataError, match="different box formats"):
        open_dataset(write(tmp_path / "train.jsonl", rows))


@pytest.mark.parametrize(
    ("changes", "text", "labels", "boxes"),
    [
        ({}, "xyxy/pixel", ("cat",), [[0.1, 0.25, 0.5, 0.5]]),
        ({"bbox_type": "real"}, "xyxy/pixel", ("cat",), [[0.1, 0.25, 0.5, 0.5]]),
        ({"bbox_type": "norm1", "bbox": [[0.1, 0.25, 0.5, 0.5]]}, "xyxy/fraction", ("cat",), [[0.1, 0.25, 0.5, 0.5]]),
        (
            {"bbox": [[4, 5, 20, 10], [0, 0, 4, 5]]},
            "xyxy/pixel",
            ("cat", "cat"),
            [[0.1, 0.25, 0.5, 0.5], [0, 0, 0.1, 0.25]],
        ),
        (
            {"ref": ["cat", "dog"], "bbox": [[4, 5, 20, 10], [0, 0, 4, 5]], "image_id": [0, 0]},
            "xyxy/pixel",
            ("cat", "dog"),
            [[0.1, 0.25, 0.5, 0.5], [0, 0, 0.1, 0.25]],
        ),
    ],
)
def test_ms_swift(tmp_path: Path, changes: dict[str, Any], text: str, labels: tuple[str, ...], boxes: Any) -> None:
    dataset = open_dataset(write(tmp_path / "swift.jsonl", [swift(**changes)]))
    assert (str(dataset.box_format), dataset.decided_by) == (text, "defined by ms-swift")
    sample = only(dataset, "swift")
    assert (sample.id, sample.labels) == ("a", labels)
    np.testing.assert_allclose(sample.boxes.xyxy, boxes)


def test_ms_swift_without_an_object(tmp_path: Path) -> None:
    dataset = open_dataset(write(tmp_path / "train.jsonl", [swift(), swift(bbox=[]), swift(ref=[], bbox=[])]))
    assert [len(row.boxes) for row in dataset.splits["train"]] == [1, 0, 0]


@pytest.mark.parametrize(
    "row",
    [
        swift(bbox_type="norm1000"),
        swift(bbox_type=["real"]),
        swift(image_id=[1]),
        swift(ref=["a", "b"]),
        swift(ref="cat"),
        swift(bbox=7),
        {**swift(), "images": []},
        {**swift(), "images": ["a.jpg", "b.jpg"]},
        {**swift(), "images": [7]},
        {"messages": [], "images": ["a.jpg"]},
    ],
)
def test_ms_swift_lines_that_are_dropped(tmp_path: Path, row: Any) -> None:
    dataset = open_dataset(write(tmp_path / "train.jsonl", [swift(), row]))
    assert kinds(dataset) == [("bad_row", "row_dropped")]
    assert dataset.problems[0].row == 2
    assert "\n" not in dataset.problems[0].detail


@pytest.mark.parametrize(
    "objects",
    [
        {"bbox": [[4, 5, 16, 5]], "categories": ["cat"]},
        {"bbox": [[4, 5, 16, 5]], "category": ["cat"], "area": [80.0], "id": [1, 2, 3]},
        {"boxes": [[4, 5, 16, 5]], "labels": ["cat"]},
        {"bboxes": [[4, 5, 16, 5]], "category_id": [9], "category_name": ["cat"]},
        [{"bbox": [4, 5, 16, 5], "label": "cat"}],
        [{"box": [4, 5, 16, 5], "class": "cat", "class_id": 3}],
    ],
)
def test_a_folder_of_pictures_with_metadata(tmp_path: Path, objects: Any) -> None:
    write(tmp_path / "train" / "metadata.jsonl", [{"file_name": "a.jpg", "objects": objects}])
    write(tmp_path / "validation" / "metadata.jsonl", [{"file_name": "a.jpg", "objects": []}])
    dataset = open_dataset(tmp_path, box_format="xywh/pixel")
    assert list(dataset.splits) == ["train", "val"]
    sample = only(dataset)
    assert sample.labels == ("cat",)
    np.testing.assert_allclose(sample.boxes.xyxy, [[0.1, 0.25, 0.5, 0.5]])
    assert sample.picture == tmp_path / "train" / "a.jpg"
    assert only(dataset, "val").picture == tmp_path / "validation" / "a.jpg"


def test_boxes_as_fields_of_the_line(tmp_path: Path) -> None:
    row = {"image_path": "a.jpg", "bboxes": [[4, 5, 16, 5]], "labels": ["cat"]}
    dataset = open_dataset(write(tmp_path / "a.jsonl", [row]), box_format="xywh/pixel")
    assert only(dataset, "a").labels == ("cat",)


def test_numbers_without_names_are_no_classes(tmp_path: Path) -> None:
    dataset = open_dataset(write(tmp_path / "train.jsonl", [own(), own(id="b", labels=[0])]))
    assert kinds(dataset) == [("unknown_category", "box_dropped")]
    assert "classes.txt" in dataset.problems[0].detail


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ("{", ("broken_json", "row_dropped")),
        ('{"a": 1}}', ("broken_json", "row_dropped")),
        ("[" * 50_000, ("broken_json", "row_dropped")),
        ("7", ("bad_row", "row_dropped")),
        ("[]", ("bad_row", "row_dropped")),
        ({}, ("bad_row", "row_dropped")),
        (own(image=...), ("bad_row", "row_dropped")),
        (own(image=7), ("bad_row", "row_dropped")),
        (own(boxes=...), ("bad_row", "row_dropped")),
        (own(boxes=None), ("bad_row", "row_dropped")),
        (own(boxes="1 2 3 4"), ("bad_row", "row_dropped")),
        (own(labels=["cat", "dog"]), ("bad_row", "row_dropped")),
        (own(box_format="xyxy"), ("bad_row", "row_dropped")),
        (own(image="../b.jpg"), ("path_outside", "row_dropped")),
        (own(image="/etc/passwd"), ("path_outside", "row_dropped")),
        (own(id="two", boxes=[[0.1, 0.25, 0.5]]), ("bad_box", "box_dropped")),
        (own(id="two", boxes=["0 0 1 1"]), ("bad_box", "box_dropped")),
        (own(id="two", boxes=[[0.1, 0.25, float("nan"), 0.5]]), ("bad_box", "box_dropped")),
        (own(id="two", boxes=[[0.1, 0.25, None, 0.5]]), ("bad_box", "box_dropped")),
        (own(id="two", boxes=[[0.5, 0.25, 0.1, 0.5]]), ("reversed_box", "box_dropped")),
        (own(id="two", labels=[None]), ("unknown_category", "box_dropped")),
        (own(), ("duplicate_id", "kept")),
    ],
)
def test_lines_that_do_not_fit_are_counted(tmp_path: Path, row: Any, found: tuple[str, str]) -> None:
    dataset = open_dataset(write(tmp_path / "train.jsonl", [own(), own(id="x"), row]))
    assert kinds(dataset) == [found]
    assert dataset.problems[0].row == 3
    assert "\n" not in dataset.problems[0].detail
    np.testing.assert_allclose(dataset.splits["train"][0].boxes.xyxy, [[0.1, 0.25, 0.5, 0.5]])
    dropped = {problem.id for problem in dataset.problems if problem.action == "row_dropped"}
    assert not dropped & {sample.id for sample in dataset.splits["train"]}


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe{\x00", b'{"id": 1'])
def test_files_without_a_line_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train.jsonl").write_bytes(content)
    with pytest.raises(DataError, match="no line that can be read") as caught:
        open_dataset(tmp_path)
    assert "\n" not in str(caught.value)


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    file = write(tmp_path / "train.jsonl", [own(), own(id="b")])
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert [row.id for row in open_dataset(file).splits["train"]] == ["one", "b"]


def test_files_of_this_tool_that_are_no_data_set_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [own()])
    write(tmp_path / "problems.jsonl", [{"file": "a"}])
    assert list(open_dataset(tmp_path).splits) == ["train"]


def test_the_numbers_decide_where_no_line_does(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    rows, truth = [], []
    for number in range(60):
        start = rng.uniform(0, 0.9, (4, 2))
        boxes = np.concatenate([start, (start + rng.uniform(0.02, 0.4, (4, 2))).clip(max=1)], axis=1)
        truth.append(boxes)
        written = boxes * [40, 20, 40, 20]
        written[:, 2:] -= written[:, :2]
        rows.append({"file_name": "a.jpg", "id": number, "objects": {"bbox": written.tolist(), "category": ["c"] * 4}})
    dataset = open_dataset(write(tmp_path / "metadata.jsonl", rows))
    assert dataset.box_format == BoxFormat("xywh", "pixel")
    for sample, boxes in zip(dataset.splits["train"], truth, strict=True):
        np.testing.assert_allclose(sample.boxes.xyxy, boxes, atol=1e-9)

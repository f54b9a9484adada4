"""CSV tables: columns by their names, headers that do not tell, hostile tables, and BCCD's own."""

from __future__ import annotations

import csv
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmdet.boxes import BoxFormat
from vlmdet.data.readers import open_dataset
from vlmdet.errors import DataError
from vlmdet.records import DetectionDataset, Sample

PIXELS = BoxFormat("xyxy", "pixel")


@pytest.fixture(autouse=True)
def _own_drawings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("drawings")))


def write(file: Path, text: str, pictures: Sequence[str] = ("a.jpg",)) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    for name in pictures:
        (file.parent / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 20), "gray").save(file.parent / name)
    return file


def kinds(dataset: DetectionDataset) -> list[tuple[str, str]]:
    return [(problem.kind, problem.action) for problem in dataset.problems]


def only(dataset: DetectionDataset, split: str = "train") -> Sample:
    (sample,) = dataset.splits[split]
    return sample


@pytest.mark.parametrize(
    ("header", "row", "text"),
    [
        ("filename,class,xmin,ymin,xmax,ymax", "a.jpg,cat,4,5,20,10", "xyxy/pixel"),
        ("filename,cell_type,xmin,xmax,ymin,ymax", "a.jpg,cat,4,20,5,10", "xyxy/pixel"),
        ("ymax,xmax,ymin,xmin,label,image", "10,20,5,4,cat,a.jpg", "xyxy/pixel"),
        ("filename,width,height,class,xmin,ymin,xmax,ymax", "a.jpg,40,20,cat,4,5,20,10", "xyxy/pixel"),
        ("ImageID,LabelName,XMin,XMax,YMin,YMax", "a.jpg,cat,0.1,0.5,0.25,0.5", "xyxy/fraction"),
        ("image_path;label;x1;y1;x2;y2", "a.jpg;cat;4;5;20;10", "xyxy/pixel"),
        ("file\tcategory\tleft\ttop\tright\tbottom", "a.jpg\tcat\t4\t5\t20\t10", "xyxy/pixel"),
        ("image,label,x,y,w,h", "a.jpg,cat,4,5,16,5", "xywh/pixel"),
        ("image,label,bbox_x,bbox_y,bbox_width,bbox_height", "a.jpg,cat,4,5,16,5", "xywh/pixel"),
        ("image,label,x_center,y_center,width,height", "a.jpg,cat,.3,.375,.4,.25", "cxcywh/fraction"),
        ("image,label,cx,cy,w,h,image_width,image_height", "a.jpg,cat,300,375,400,250,40,20", "cxcywh/per_mille"),
        ('"Image Name","Object Name","X Min","Y Min","X Max","Y Max"', '"a.jpg","cat",4,5,20,10', "xyxy/pixel"),
    ],
)
def test_columns_by_their_names(tmp_path: Path, header: str, row: str, text: str) -> None:
    dataset = open_dataset(write(tmp_path / "boxes.csv", f"{header}\n{row}\n"), box_format=text)
    sample = only(dataset)
    assert (sample.id, sample.labels, sample.source) == ("a", ("cat",), f"{tmp_path / 'boxes.csv'}:1")
    np.testing.assert_allclose(sample.boxes.xyxy, [[0.1, 0.25, 0.5, 0.5]])
    assert (sample.width, sample.height) == (40, 20)
    assert dataset.problems == []


@pytest.mark.parametrize(
    "header",
    [
        "a,b,c,d,e,f",
        "a.jpg,cat,4,5,20,10",
        "filename,label,xmin,ymin,xmax",
        "label,xmin,ymin,xmax,ymax",
        "filename,xmin,ymin,xmax,ymax",
        "filename,xmin,ymin,xmax,ymax,source,crowd",
        "filename,cell_type,tissue_type,xmin,ymin,xmax,ymax",
        "filename,label,xmin,x_min,ymin,xmax,ymax",
        "filename,label,bbox",
    ],
)
def test_a_header_that_does_not_tell_is_refused_with_what_is_there(tmp_path: Path, header: str) -> None:
    with pytest.raises(DataError) as caught:
        open_dataset(write(tmp_path / "boxes.csv", f"{header}\n" + ",".join("1" for _ in header.split(",")) + "\n"))
    assert header.replace(",", ", ") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_order_than_the_header_names_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "boxes.csv", "filename,label,xmin,ymin,xmax,ymax\na.jpg,cat,4,5,20,10\n")
    with pytest.raises(DataError, match="--box-format xyxy/pixel"):
        open_dataset(file, box_format="yxyx/pixel")


def test_one_small_table_does_not_tell_the_unit(tmp_path: Path) -> None:
    file = write(tmp_path / "boxes.csv", "filename,label,xmin,ymin,xmax,ymax\na.jpg,cat,4,5,20,10\n")
    with pytest.raises(DataError, match="xyxy/pixel"):
        open_dataset(file)


def test_rows_of_one_picture_and_pictures_without_an_object(tmp_path: Path) -> None:
    text = "filename,label,x,y,w,h\na.jpg,cat,.1,.1,.2,.2\nb.jpg,,,,,\na.jpg,dog,.5,.5,.2,.2\n\n"
    dataset = open_dataset(
        write(tmp_path / "boxes.csv", text, ["images/a.jpg", "images/b.jpg"]), box_format="xywh/fraction"
    )
    a, b = dataset.splits["train"]
    assert (a.labels, b.labels) == (("cat", "dog"), ())
    assert a.picture == tmp_path / "images" / "a.jpg"
    assert dataset.problems == []


def test_splits_by_column_and_by_file(tmp_path: Path) -> None:
    head = "filename,label,x,y,w,h"
    write(tmp_path / "one" / "boxes.csv", f"{head},split\na.jpg,cat,.1,.1,.2,.2,valid\nb.jpg,cat,.1,.1,.2,.2,\n")
    dataset = open_dataset(tmp_path / "one", box_format="xywh/fraction")
    assert {name: [row.id for row in rows] for name, rows in dataset.splits.items()} == {"val": ["a"], "train": ["b"]}
    for name in ("train_labels", "test_labels"):
        write(tmp_path / "two" / f"{name}.csv", f"{head}\n{name}.jpg,cat,.1,.1,.2,.2\n", [])
    for name in ("train", "valid"):
        write(tmp_path / "three" / name / "_annotations.csv", f"{head}\na.jpg,cat,.1,.1,.2,.2\n")
    assert list(open_dataset(tmp_path / "two", box_format="xywh/fraction").splits) == ["test", "train"]
    dataset = open_dataset(tmp_path / "three", box_format="xywh/fraction")
    assert list(dataset.splits) == ["train", "val"]
    assert only(dataset, "val").picture == tmp_path / "three" / "valid" / "a.jpg"


def test_a_picture_is_found_by_its_name_where_it_is_the_only_one(tmp_path: Path) -> None:
    text = "filename,label,x,y,w,h\na.jpg,cat,.1,.1,.2,.2\nb.jpg,cat,.1,.1,.2,.2\n"
    file = write(tmp_path / "boxes.csv", text, ["deep/er/a.jpg", "one/b.jpg", "two/b.jpg"])
    dataset = open_dataset(file, box_format="xywh/fraction")
    assert dataset.splits["train"][0].picture == tmp_path / "deep/er/a.jpg"
    assert any("1 of 2 pictures are not below" in note and "b.jpg" in note for note in dataset.notes)


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ("../a.jpg,cat,.1,.1,.2,.2", ("path_outside", "row_dropped")),
        ("/etc/passwd,cat,.1,.1,.2,.2", ("path_outside", "row_dropped")),
        (",cat,.1,.1,.2,.2", ("bad_row", "row_dropped")),
        ("a.jpg,,.1,.1,.2,.2", ("unknown_category", "box_dropped")),
        ("a.jpg,cat,.1,.1,.2", ("bad_box", "box_dropped")),
        ("a.jpg,cat,.1,.1,.2,x", ("bad_box", "box_dropped")),
        ("a.jpg,cat,nan,.1,.2,.2", ("bad_box", "box_dropped")),
        ("a.jpg,cat,.1,.1,.2,1e999", ("bad_box", "box_dropped")),
        ("a.jpg,cat,.1,.1,0,.2", ("degenerate_box", "box_dropped")),
        ("a.jpg,cat,.9,.1,.2,.2", ("box_outside", "box_clipped")),
        ("a.jpg,cat,.3,.3,.2,.2", ("duplicate_box", "kept")),
    ],
)
def test_rows_that_do_not_fit_are_counted(tmp_path: Path, row: str, found: tuple[str, str]) -> None:
    text = f"filename,label,x,y,w,h\na.jpg,cat,.3,.3,.2,.2\na.jpg,dog,.6,.6,.2,.2\n{row}\n"
    dataset = open_dataset(write(tmp_path / "boxes.csv", text), box_format="xywh/fraction")
    assert kinds(dataset) == [found]
    assert dataset.problems[0].row == 3
    np.testing.assert_allclose(only(dataset).boxes.xyxy[:2], [[0.3, 0.3, 0.5, 0.5], [0.6, 0.6, 0.8, 0.8]])


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b" \n \n", "empty"),
        (b"\xff\xfea\x00", "UTF-8"),
        (b'filename,label,x,y,w,h\n"a.jpg' + b"x" * 200_000, "no CSV table"),
        (b"\x00" * 50, "no columns"),
    ],
)
def test_tables_that_are_refused_in_one_line(tmp_path: Path, content: bytes, word: str) -> None:
    (tmp_path / "boxes.csv").write_bytes(content)
    with pytest.raises(DataError, match=word) as caught:
        open_dataset(tmp_path / "boxes.csv")
    assert "\n" not in str(caught.value)


def test_tables_of_different_orders_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "filename,label,x,y,w,h\na.jpg,cat,.1,.1,.2,.2\n")
    write(tmp_path / "val.csv", "filename,label,x1,y1,x2,y2\na.jpg,cat,.1,.1,.2,.2\n")
    with pytest.raises(DataError, match="different box orders"):
        open_dataset(tmp_path)


def test_centres_under_the_names_of_corners_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = []
    for number in range(300):
        start = rng.uniform(0, 0.8, 2)
        side = rng.uniform(0.1, 0.9, 2) * (1 - start)
        numbers = [*(start + side / 2), *side]
        lines.append(f"{number}.jpg,cat," + ",".join(f"{value:.4f}" for value in numbers))
    text = "filename,label,x,y,w,h\n" + "\n".join(lines) + "\n"
    with pytest.raises(DataError, match=r"boxes misfit even under xywh/fraction"):
        open_dataset(write(tmp_path / "boxes.csv", text))
    with pytest.raises(DataError, match=r"they fit as cxcywh/fraction"):
        open_dataset(tmp_path / "boxes.csv", box_format="xywh/fraction")


def test_bccd_s_table(shared: Path) -> None:
    """It opens with no flag: the header names the sides, xmin before xmax, and the numbers tell pixels."""
    file = shared / "data/bccd/test.csv"
    dataset = open_dataset(file)
    assert dataset.box_format == PIXELS
    assert dataset.decided_by.startswith("its header names xyxy; decided by the numbers: 0 of 4888")
    with file.open() as stream:
        table = list(csv.DictReader(stream))
    expected: dict[str, list[tuple[str, list[int]]]] = {}
    for row in table:
        sides = [int(row[name]) for name in ("xmin", "ymin", "xmax", "ymax")]
        if sides[0] != sides[2]:
            expected.setdefault(row["filename"], []).append((row["cell_type"], sides))
    samples = {Path(str(sample.picture)).name: sample for sample in dataset.splits["test"]}
    assert len(samples) == 364
    assert Counter(kinds(dataset)) == {("degenerate_box", "box_dropped"): 2}
    for name, found in expected.items():
        sample = samples[name]
        assert sample.labels == tuple(label for label, _ in found)
        np.testing.assert_allclose(sample.boxes.to_array(PIXELS, 640, 480), [sides for _, sides in found], atol=1e-9)
        assert sample.picture == shared / "data/bccd/BCCD/JPEGImages" / name

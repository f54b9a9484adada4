"""Writers: exact files of a small set, hostile names, turned pictures, and what other tools read from the files."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from vlmdet.boxes import Boxes, BoxFormat
from vlmdet.data.readers import open_dataset
from vlmdet.data.writers import TARGETS, write_dataset
from vlmdet.data.writers.files import safe_name
from vlmdet.errors import ConfigError, DataError
from vlmdet.records import DetectionDataset, Problem, Sample

PIXELS = BoxFormat("xyxy", "pixel")
LAYOUTS = ("coco", "yolo", "voc", "jsonl", "parquet")
FILES = ("coco", "yolo", "voc", "jsonl")  # pictures as files of their own


def picture(path: Path, size: tuple[int, int] = (100, 80), color: str = "navy", **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    return path


def sample(path: Path, boxes: Sequence[Sequence[float]], labels: Sequence[str], **fields: Any) -> Sample:
    """Make a sample of a picture of 100 x 80 pixels, boxes in pixels."""
    fields = {"id": path.stem, "source": str(path), "width": 100, "height": 80} | fields
    size = fields["width"], fields["height"]
    return Sample(picture=path, boxes=Boxes.from_array(boxes, PIXELS, *size), labels=tuple(labels), **fields)


def dataset(*samples: Sample, labels: Sequence[str] = ("cat", "dog"), **fields: Any) -> DetectionDataset:
    splits: dict[str, list[Sample]] = {}
    for one in samples:
        splits.setdefault(one.split, []).append(one)
    return DetectionDataset("a set", dict(splits), tuple(labels), PIXELS, "made by hand", **fields)


@pytest.fixture
def small(tmp_path: Path) -> DetectionDataset:
    """Two splits, three pictures: two boxes, none, one box."""
    first = picture(tmp_path / "src" / "a.jpg")
    second = picture(tmp_path / "src" / "b.png", color="green")
    third = picture(tmp_path / "src" / "c.jpg", color="red")
    return dataset(
        sample(first, [[10, 20, 50, 60], [0, 0, 100, 80]], ["dog", "cat"], group="g1"),
        sample(second, [], []),
        sample(third, [[25.25, 10.5, 75.75, 30]], ["dog"], split="val", meta={"note": "ok"}),
    )


# --- exact files ------------------------------------------------------------------------------------------------------


def test_coco(small: DetectionDataset, tmp_path: Path) -> None:
    folder = write_dataset(small, tmp_path / "out", to="coco")
    train = json.loads((folder / "annotations/instances_train.json").read_text(encoding="utf-8"))
    assert train["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    assert train["images"] == [
        {"id": 1, "file_name": "a.jpg", "width": 100, "height": 80, "name": "a", "group": "g1"},
        {"id": 2, "file_name": "b.png", "width": 100, "height": 80, "name": "b"},
    ]
    assert train["annotations"] == [
        {"id": 1, "image_id": 1, "category_id": 2, "bbox": [10, 20, 40, 40], "area": 1600, "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 1, "bbox": [0, 0, 100, 80], "area": 8000, "iscrowd": 0},
    ]
    val = json.loads((folder / "annotations/instances_val.json").read_text(encoding="utf-8"))
    assert val["annotations"][0]["bbox"] == [25.25, 10.5, 50.5, 19.5]
    assert (folder / "images/a.jpg").read_bytes() == (tmp_path / "src/a.jpg").read_bytes()


def test_yolo(small: DetectionDataset, tmp_path: Path) -> None:
    folder = write_dataset(small, tmp_path / "out", to="yolo")
    assert yaml.safe_load((folder / "data.yaml").read_text(encoding="utf-8")) == {
        "train": "images/train",
        "val": "images/val",
        "names": {0: "cat", 1: "dog"},
    }
    lines = (folder / "labels/train/a.txt").read_text().splitlines()
    assert lines == ["1 0.300000 0.500000 0.400000 0.500000", "0 0.500000 0.500000 1.000000 1.000000"]
    assert (folder / "labels/train/b.txt").read_bytes() == b""
    assert (folder / "labels/val/c.txt").read_text() == "1 0.505000 0.253125 0.505000 0.243750\n"
    assert sorted(path.name for path in (folder / "images/train").iterdir()) == ["a.jpg", "b.png"]


def test_voc(small: DetectionDataset, tmp_path: Path) -> None:
    folder = write_dataset(small, tmp_path / "out", to="voc")
    tree = ElementTree.parse(folder / "Annotations/a.xml")
    assert [tree.findtext(tag) for tag in ("filename", "size/width", "size/height")] == ["a.jpg", "100", "80"]
    things = [
        [thing.findtext("name")] + [thing.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
        for thing in tree.iterfind("object")
    ]
    assert things == [["dog", "10", "20", "50", "60"], ["cat", "0", "0", "100", "80"]]
    assert ElementTree.parse(folder / "Annotations/b.xml").find("object") is None
    assert (folder / "ImageSets/Main/train.txt").read_text() == "a\nb\n"
    assert (folder / "ImageSets/Main/val.txt").read_text() == "c\n"


def test_jsonl(small: DetectionDataset, tmp_path: Path) -> None:
    folder = write_dataset(small, tmp_path / "out", to="jsonl")
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[0] == {
        "id": "a",
        "image": "images/a.jpg",
        "width": 100,
        "height": 80,
        "boxes": [[0.1, 0.25, 0.5, 0.75], [0, 0, 1, 1]],
        "box_format": "xyxy/fraction",
        "labels": ["dog", "cat"],
        "split": "train",
        "group": "g1",
        "meta": {},
    }
    assert [row["boxes"] for row in rows[1:]] == [[]]
    val = json.loads((folder / "val.jsonl").read_text(encoding="utf-8"))
    assert (val["split"], val["meta"]) == ("val", {"note": "ok"})
    assert (folder / "classes.txt").read_text() == "cat\ndog\n"


def test_parquet(small: DetectionDataset, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    folder = write_dataset(small, tmp_path / "out", to="parquet")
    rows = pq.read_table(folder / "data/train-00000-of-00001.parquet").to_pylist()
    assert [row["image_id"] for row in rows] == ["a", "b"]
    assert rows[0]["image"] == {"bytes": (tmp_path / "src/a.jpg").read_bytes(), "path": "a.jpg"}
    assert rows[0]["meta"] == {"barcode": "g1", "off_image_id": "", "image_url": ""}
    assert rows[0]["objects"]["category_id"] == [1, 0]
    assert rows[0]["objects"]["category_name"] == ["dog", "cat"]
    np.testing.assert_allclose(rows[0]["objects"]["bbox"], [[0.25, 0.1, 0.75, 0.5], [0, 0, 1, 1]], atol=3e-8)
    assert rows[1]["objects"] == {"bbox": [], "category_id": [], "category_name": []}


@pytest.mark.parametrize("to", LAYOUTS)
def test_what_was_done_is_written_down(small: DetectionDataset, tmp_path: Path, to: str) -> None:
    folder = write_dataset(small, tmp_path / "out", to=to)
    report = json.loads((folder / "conversion.json").read_text(encoding="utf-8"))
    assert report["splits"] == {"train": {"images": 2, "boxes": 2}, "val": {"images": 1, "boxes": 1}}
    assert report["labels"] == ["cat", "dog"]
    assert report["rounding"] == TARGETS[to].rounding
    assert report["ids"] == {}
    assert (folder / "problems.jsonl").read_bytes() == b""
    assert report["pictures"] == ({"copied": 3} if to in FILES else {})


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("BloodImage_00001", "BloodImage_00001"),
        ("3560070278831_1", "3560070278831_1"),
        ("photo.jpg", "photo.jpg"),
        ("картинка-1", "картинка-1"),
        ("हिन्दी", "हिन्दी"),
        ("../../etc/passwd", "_.._etc_passwd"),
        ("/etc/passwd", "_etc_passwd"),
        ("C:\\a", "C__a"),
        ("a b\tc\nd\x00e", "a_b_c_d_e"),
        ("..", "unnamed"),
        ("", "unnamed"),
        (".hidden", "hidden"),
        ("-rf", "rf"),
        ("x" * 300, "x" * 120),
        ("é" * 300, "é" * 60),
    ],
)
def test_safe_name(text: str, name: str) -> None:
    assert safe_name(text) == name


@pytest.mark.parametrize("to", FILES)
def test_ids_that_collide_or_cannot_be_names_get_names_of_their_own(tmp_path: Path, to: str) -> None:
    source = picture(tmp_path / "a.jpg")
    ids = ["a/b", "a_b", "A_B", "a b", "../a_b", "a_b-1", "ﬁ", "fi", "x" * 300, "x" * 301]
    rows = [sample(source, [[10, 10, 20, 20]], ["cat"], id=name) for name in ids]
    folder = write_dataset(dataset(*rows), tmp_path / "out", to=to)
    written = sorted(path.stem for path in folder.rglob("*.jpg"))
    assert len(written) == len(ids) == len({name.casefold() for name in written})
    report = json.loads((folder / "conversion.json").read_text(encoding="utf-8"))
    assert sorted(report["ids"].get(name, name) for name in written) == sorted(ids)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jpg", "out"]


def test_two_splits_cannot_share_a_file(tmp_path: Path) -> None:
    source = picture(tmp_path / "a.jpg")
    rows = [sample(source, [], [], id=split, split=split) for split in ("a b", "a_b")]
    with pytest.raises(DataError, match="one file name"):
        write_dataset(dataset(*rows), tmp_path / "out", to="jsonl")
    with pytest.raises(DataError, match="'names'"):
        write_dataset(dataset(sample(source, [], [], split="names")), tmp_path / "out", to="yolo")
    assert not (tmp_path / "out").exists()


# --- pictures ---------------------------------------------------------------------------------------------------------


def turned_picture(path: Path, kind: str) -> Path:
    """Store 60 x 40 pixels that a viewer shows as 40 x 60 (orientation 6), red in x 10 to 30, y 12 to 24 as shown."""
    upright = Image.new("RGB", (40, 60), "white")
    upright.paste((255, 0, 0), (10, 12, 30, 24))
    exif = Image.Exif()
    exif[274] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(
        path, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {})
    )
    return path


@pytest.mark.parametrize(("kind", "suffix"), [("JPEG", ".jpg"), ("PNG", ".png")])
@pytest.mark.parametrize("to", LAYOUTS)
def test_a_turned_picture_is_upright_where_the_target_does_not_turn(
    tmp_path: Path, to: str, kind: str, suffix: str
) -> None:
    source = turned_picture(tmp_path / f"a{suffix}", kind)
    row = sample(source, [[10, 12, 30, 24]], ["cat"], width=40, height=60)
    folder = write_dataset(dataset(row), tmp_path / "out", to=to)
    (problem,) = [json.loads(line) for line in (folder / "problems.jsonl").read_text().splitlines()]
    assert (problem["kind"], problem["action"]) == ("exif_rotated", "kept")
    if to == "parquet":
        return
    (written,) = folder.rglob(f"a{suffix}")
    with Image.open(written) as image:
        turn, size, pixels = image.getexif().get(274, 1), image.size, np.asarray(image.convert("RGB")).astype(int)
    if to == "jsonl":
        assert written.read_bytes() == source.read_bytes()
        return
    assert (turn, size) == (1, (40, 60))
    red = pixels[..., 1] < 128
    rows, columns = np.nonzero(red)
    edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    np.testing.assert_allclose(edges, [10, 12, 30, 24], atol=1 if kind == "JPEG" else 0)
    assert json.loads((folder / "conversion.json").read_text())["pictures"] == {"turned_upright": 1}


def test_a_row_whose_turn_is_open_is_left_out(tmp_path: Path) -> None:
    source = turned_picture(tmp_path / "a.jpg", "JPEG")
    row = sample(source, [[10, 12, 30, 24]], ["cat"], width=40, height=60, turn_unknown=True)
    folder = write_dataset(dataset(row), tmp_path / "out", to="yolo", max_problems=1)
    problem = json.loads((folder / "problems.jsonl").read_text())
    assert (problem["kind"], problem["action"]) == ("exif_rotated", "row_dropped") and "--exif" in problem["detail"]
    assert not list((folder / "images").rglob("*.jpg"))


def test_link(small: DetectionDataset, tmp_path: Path) -> None:
    folder = write_dataset(small, tmp_path / "out", to="yolo", link=True)
    link = folder / "images/train/a.jpg"
    assert link.is_symlink() and link.resolve() == (tmp_path / "src/a.jpg").resolve()
    assert json.loads((folder / "conversion.json").read_text())["pictures"] == {"linked": 3}


def test_the_suffix_is_that_of_the_content(tmp_path: Path) -> None:
    path = tmp_path / "photo"
    Image.new("RGB", (100, 80)).save(path, "PNG")
    folder = write_dataset(dataset(sample(path, [], [])), tmp_path / "out", to="coco")
    assert [file.name for file in (folder / "images").iterdir()] == ["photo.png"]


@pytest.mark.parametrize("to", LAYOUTS)
def test_a_broken_picture_and_one_of_another_shape_are_left_out_and_reported(tmp_path: Path, to: str) -> None:
    good, wide = picture(tmp_path / "good.jpg"), picture(tmp_path / "wide.jpg", (300, 80))
    double = picture(tmp_path / "double.jpg", (200, 160))
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not a picture")
    box = [[10, 20, 50, 60]]
    rows = [sample(path, box, ["cat"]) for path in (good, wide, double, broken, tmp_path / "gone.jpg")]
    with pytest.raises(DataError, match="3 of 5 rows are dropped"):
        write_dataset(dataset(*rows), tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()
    folder = write_dataset(dataset(*rows), tmp_path / "out", to=to, max_problems=1)
    problems = [json.loads(line) for line in (folder / "problems.jsonl").read_text().splitlines()]
    assert [(problem["id"], problem["kind"], problem["action"]) for problem in problems] == [
        ("wide", "size_mismatch", "row_dropped"),
        ("double", "size_mismatch", "kept"),
        ("broken", "unreadable_image", "row_dropped"),
        ("gone", "unreadable_image", "row_dropped"),
    ]
    assert json.loads((folder / "conversion.json").read_text())["splits"] == {"train": {"images": 2, "boxes": 2}}


def test_pixels_are_those_of_the_file(tmp_path: Path) -> None:
    """The row says 100 x 80, the file has twice that: what other tools read must fit the file."""
    double = picture(tmp_path / "double.jpg", (200, 160))
    folder = write_dataset(dataset(sample(double, [[10, 20, 50, 60]], ["cat"])), tmp_path / "out", to="coco")
    document = json.loads((folder / "annotations/instances_train.json").read_text())
    assert document["annotations"][0]["bbox"] == [20, 40, 80, 80]
    assert (document["images"][0]["width"], document["images"][0]["height"]) == (200, 160)


# --- refusals and edges -----------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(small: DetectionDataset, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_dataset(small, tmp_path / "out", to="yolo")
    for path in (tmp_path / "out", picture(tmp_path / "file.jpg")):
        with pytest.raises(DataError, match="nothing is overwritten"):
            write_dataset(small, path, to="coco")
    with pytest.raises(ConfigError, match="did you mean 'yolo'"):
        write_dataset(small, tmp_path / "other", to="yollo")


@pytest.mark.parametrize(
    ("to", "box", "written"),
    [("voc", [10.6, 20.7, 10.9, 60], "10 21 11 60"), ("voc", [99.7, 20, 100, 60], "99 20 100 60")],
)
def test_a_box_too_small_for_the_grid_keeps_an_area(tmp_path: Path, to: str, box: list[float], written: str) -> None:
    row = sample(picture(tmp_path / "a.jpg"), [box], ["cat"])
    folder = write_dataset(dataset(row), tmp_path / "out", to=to)
    box_tag = ElementTree.parse(folder / "Annotations/a.xml").find("object/bndbox")
    assert box_tag is not None and " ".join(str(side.text) for side in box_tag) == written
    (problem,) = [json.loads(line) for line in (folder / "problems.jsonl").read_text().splitlines()]
    assert (problem["kind"], problem["action"]) == ("tiny_box", "kept")


def test_a_sliver_keeps_an_area_in_yolo(tmp_path: Path) -> None:
    row = sample(picture(tmp_path / "a.jpg"), [[50, 20, 50.00001, 60]], ["cat"])
    folder = write_dataset(dataset(row), tmp_path / "out", to="yolo")
    assert (folder / "labels/train/a.txt").read_text() == "0 0.500000 0.500000 0.000001 0.500000\n"
    assert json.loads((folder / "problems.jsonl").read_text())["kind"] == "tiny_box"


def test_voc_refuses_a_name_that_xml_cannot_hold(tmp_path: Path) -> None:
    row = sample(picture(tmp_path / "a.jpg"), [], [])
    with pytest.raises(DataError, match="--rename"):
        write_dataset(dataset(row, labels=["a\x1bb"]), tmp_path / "out", to="voc")


def test_the_readers_problems_are_kept(small: DetectionDataset, tmp_path: Path) -> None:
    problem = Problem("a.xml", 3, "a", "degenerate_box", "box 1 has no area", "box_dropped")
    with_problem = dataset(*small.splits["train"], problems=[problem])
    folder = write_dataset(with_problem, tmp_path / "out", to="yolo")
    assert json.loads((folder / "problems.jsonl").read_text()) == problem.as_dict()


@pytest.mark.parametrize("to", LAYOUTS)
def test_a_set_without_boxes_or_classes(tmp_path: Path, to: str) -> None:
    folder = write_dataset(dataset(sample(picture(tmp_path / "a.jpg"), [], []), labels=[]), tmp_path / "out", to=to)
    assert json.loads((folder / "conversion.json").read_text())["splits"] == {"train": {"images": 1, "boxes": 0}}


# --- other tools read the files ---------------------------------------------------------------------------------------


def expected(source: DetectionDataset, split: str) -> dict[str, list[tuple[str, list[float]]]]:
    """Return (label, corners in pixels) of every box by id."""
    return {
        row.id: [
            (label, box)
            for label, box in zip(row.labels, row.boxes.to_array(PIXELS, row.width, row.height).tolist(), strict=True)
        ]
        for row in source.splits[split]
    }


def assert_detections(found: Any, source: DetectionDataset, split: str, shift: Sequence[float] = (0, 0, 0, 0)) -> None:
    """Hold a set that supervision read against the source; `shift` is what that reader adds to corners."""
    wanted = expected(source, split)
    assert {Path(path).stem for path in found.image_paths} == set(wanted)
    for path, detections in found.annotations.items():
        boxes = wanted[Path(path).stem]
        assert [found.classes[number] for number in detections.class_id] == [label for label, _ in boxes]
        np.testing.assert_allclose(
            detections.xyxy.reshape(-1, 4), np.array([box for _, box in boxes]).reshape(-1, 4) + shift, atol=0.501
        )


@pytest.fixture(params=["small", "bccd", "coco128"])
def source(request: pytest.FixtureRequest, small: DetectionDataset) -> DetectionDataset:
    """The small set, and twenty rows of each split of real ones."""
    if request.param == "small":
        return small
    from vlmdet.data.select import select

    return select(open_dataset(request.getfixturevalue("shared") / "data" / request.param), limit=20)


def test_supervision_reads_coco_yolo_and_voc(source: DetectionDataset, tmp_path: Path) -> None:
    import supervision as sv

    coco, yolo, voc = (write_dataset(source, tmp_path / to, to=to) for to in ("coco", "yolo", "voc"))
    for split in source.splits:
        found = sv.DetectionDataset.from_coco(str(coco / "images"), str(coco / f"annotations/instances_{split}.json"))
        assert found.classes == list(source.labels)
        assert_detections(found, source, split)
        found = sv.DetectionDataset.from_yolo(
            str(yolo / "images" / split), str(yolo / "labels" / split), str(yolo / "data.yaml")
        )
        assert found.classes == list(source.labels)
        assert_detections(found, source, split)
    # it reads the devkit's way, from 1: the upper left corner moves by one pixel (see voc.py)
    found = sv.DetectionDataset.from_pascal_voc(str(voc / "JPEGImages"), str(voc / "Annotations"))
    everything = [row for rows in source.splits.values() for row in rows]
    merged = DetectionDataset("", {"all": everything}, source.labels, PIXELS, "")
    assert_detections(found, merged, "all", shift=(-1, -1, 0, 0))


def test_pycocotools_reads_coco(source: DetectionDataset, tmp_path: Path) -> None:
    from pycocotools.coco import COCO

    folder = write_dataset(source, tmp_path / "out", to="coco")
    for split in source.splits:
        coco = COCO(folder / f"annotations/instances_{split}.json")
        names = {category["id"]: category["name"] for category in coco.loadCats(coco.getCatIds())}
        for image in coco.loadImgs(coco.getImgIds()):
            wanted = expected(source, split)[image["name"]]
            annotations = coco.loadAnns(coco.getAnnIds(imgIds=image["id"]))
            assert [names[one["category_id"]] for one in annotations] == [label for label, _ in wanted]
            found = [[x, y, x + w, y + h] for x, y, w, h in (one["bbox"] for one in annotations)]
            np.testing.assert_allclose(
                np.array(found).reshape(-1, 4), np.array([box for _, box in wanted]).reshape(-1, 4), atol=0.0051
            )
        assert len(coco.getImgIds()) == len(source.splits[split])


def test_datasets_reads_parquet_and_json(source: DetectionDataset, tmp_path: Path) -> None:
    import datasets

    parquet = write_dataset(source, tmp_path / "parquet", to="parquet")
    jsonl = write_dataset(source, tmp_path / "jsonl", to="jsonl")
    split_files = {split: str(parquet / f"data/{split}-00000-of-00001.parquet") for split in source.splits}
    by_file = datasets.load_dataset("parquet", data_files=split_files, cache_dir=str(tmp_path / "cache"))
    by_folder = datasets.load_dataset(str(parquet), cache_dir=str(tmp_path / "cache"))
    rows_json = datasets.load_dataset(
        "json",
        data_files={split: str(jsonl / f"{split}.jsonl") for split in source.splits},
        cache_dir=str(tmp_path / "cache"),
    )
    for split, samples in source.splits.items():
        rows = by_file[split]
        assert rows.features["objects"]["category_id"].feature.names == list(source.labels)
        assert by_folder[split]["image_id"][:] == rows["image_id"][:]
        assert rows["image_id"][:] == rows_json[split]["id"][:] == [one.id for one in samples]
        for one, row, line in zip(samples, rows, rows_json[split], strict=True):
            assert row["image"].size == (row["width"], row["height"]) == (one.width, one.height)
            assert tuple(row["objects"]["category_name"]) == tuple(line["labels"]) == one.labels
            boxes = np.array(row["objects"]["bbox"]).reshape(-1, 4)[:, [1, 0, 3, 2]]
            np.testing.assert_allclose(boxes, one.boxes.xyxy, atol=3e-8)
            np.testing.assert_allclose(
                np.array(line["boxes"]).reshape(-1, 4), one.boxes.xyxy, atol=1e-9
            )  # as pandas reads

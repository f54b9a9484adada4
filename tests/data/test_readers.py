"""Readers: small sets written by hand, every kind of bad row, and the real set beside the checkout."""

from __future__ import annotations

import io
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmdet.boxes import BoxFormat
from vlmdet.data.dataset import NUTRITION_LABELS
from vlmdet.data.readers import hub, open_dataset, voc
from vlmdet.data.readers.values import safe_path
from vlmdet.data.synthetic.packages import write_drawn_set
from vlmdet.errors import ConfigError, DataError, ImageError
from vlmdet.records import DetectionDataset, Problem, Sample

PIXELS = BoxFormat("xyxy", "pixel")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("drawings")))  # of readings that stay open


def kinds(problems: Sequence[Problem]) -> list[tuple[str, str]]:
    return [(problem.kind, problem.action) for problem in problems]


def only(dataset: DetectionDataset, split: str = "train") -> Sample:
    (sample,) = dataset.splits[split]
    return sample


# --- Pascal VOC -------------------------------------------------------------------------------------------------------


def thing(name: str, *box: object) -> str:
    sides = "".join(
        f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<object><name>{name}</name><bndbox>{sides}</bndbox></object>"


def write_voc(
    root: Path,
    rows: Mapping[str, str],
    lists: Mapping[str, Sequence[str]] | None = None,
    size: tuple[int, int] = (40, 20),
) -> Path:
    """Write a set: `rows` gives the objects of each name, or a whole document where it begins with `<?` or `<!`."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, objects in rows.items():
        Image.new("RGB", size, "gray").save(root / "JPEGImages" / f"{name}.jpg")
        document = (
            f"<annotation><filename>{name}.jpg</filename>"
            f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>{objects}</annotation>"
        )
        text = objects if objects.startswith(("<?", "<!", "<annotation")) else document
        (root / "Annotations" / f"{name}.xml").write_text(text, encoding="utf-8")
    for split, names in (lists or {}).items():
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    return root


def test_voc_small_set(tmp_path: Path) -> None:
    rows = {"a": thing("cat", 4, 5, 20, 10) + thing("dog", 0, 0, 40, 19), "b": "", "c": thing("cat", "1.5", 2, 3, 4)}
    root = write_voc(tmp_path, rows, {"train": ["a", "b"], "val": ["c"], "trainval": ["a", "b", "c"]})
    dataset = open_dataset(root)
    assert {name: [sample.id for sample in rows] for name, rows in dataset.splits.items()} == {
        "train": ["a", "b"],
        "val": ["c"],
    }
    assert dataset.labels == ("cat", "dog")
    assert (str(dataset.box_format), dataset.decided_by) == ("xyxy/pixel", "defined by Pascal VOC")
    assert dataset.problems == []
    first, empty = dataset.splits["train"]
    np.testing.assert_allclose(first.boxes.xyxy, [[0.1, 0.25, 0.5, 0.5], [0, 0, 1, 0.95]])
    assert first.labels == ("cat", "dog")
    assert (first.width, first.height, first.split) == (40, 20, "train")
    assert first.image.size == (40, 20)
    assert first.source.endswith("a.xml")
    assert (len(empty.boxes), empty.labels) == (0, ())
    np.testing.assert_allclose(only(dataset, "val").boxes.to_array(PIXELS, 40, 20), [[1.5, 2, 3, 4]])


def test_voc_in_a_sub_folder_and_several_of_them(tmp_path: Path) -> None:
    write_voc(tmp_path / "VOC2007", {"a": ""}, {"train": ["a"]})
    assert only(open_dataset(tmp_path)).id == "a"
    write_voc(tmp_path / "VOC2012", {"a": ""}, {"train": ["a"]})
    with pytest.raises(DataError, match="2 Pascal VOC sets"):
        open_dataset(tmp_path)


def test_voc_does_not_open_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_voc(tmp_path, {"a": thing("cat", 4, 5, 20, 10)}, {"train": ["a"]})
    (root / "JPEGImages" / "a.jpg").write_bytes(b"not a picture")
    sample = only(open_dataset(root))
    assert len(sample.boxes) == 1
    with pytest.raises(ImageError):
        _ = sample.image


def test_voc_without_lists_is_train_and_says_so(tmp_path: Path) -> None:
    dataset = open_dataset(write_voc(tmp_path, {"b": "", "a": ""}))
    assert [sample.id for sample in dataset.splits["train"]] == ["a", "b"]
    assert "every annotation is in train" in dataset.notes[1]
    assert dataset.notes[0].startswith("read as Pascal VOC: ")


def test_voc_trainval_is_read_only_where_it_is_alone(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"a": "", "b": ""}, {"trainval": ["a"], "test": ["b"]})
    dataset = open_dataset(root)
    assert {name: len(rows) for name, rows in dataset.splits.items()} == {"train": 1, "test": 1}
    assert "trainval.txt is read as train" in dataset.notes[1]


def test_voc_lists_of_classes_carry_marks(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"a": "", "b": ""}, {"train": ["a  1", "b -1", ""]})
    assert [sample.id for sample in open_dataset(root).splits["train"]] == ["a", "b"]


def test_voc_rows_in_no_split_are_noted(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"a": "", "b": "", "c": ""}, {"train": ["a"]})
    assert "2 annotation files are in no split" in open_dataset(root).notes[1]


@pytest.mark.parametrize(
    ("box", "kind", "action", "kept"),
    [
        ((5, 5, 5, 5), "degenerate_box", "box_dropped", None),
        ((5, 5, 5, 9), "degenerate_box", "box_dropped", None),
        ((9, 5, 5, 9), "reversed_box", "box_dropped", None),
        ((50, 5, 60, 9), "box_outside", "box_dropped", None),
        ((40, 5, 60, 9), "box_outside", "box_dropped", None),
        ((-9, -9, 0, 9), "box_outside", "box_dropped", None),
        ((30, -2, 44, 9), "box_outside", "box_clipped", (30, 0, 40, 9)),
        (("", 5, 8, 9), "bad_box", "box_dropped", None),
        (("x", 5, 8, 9), "bad_box", "box_dropped", None),
        (("nan", 5, 8, 9), "bad_box", "box_dropped", None),
        (("1e999", 5, 8, 9), "bad_box", "box_dropped", None),
    ],
)
def test_voc_boxes_that_do_not_fit(
    tmp_path: Path, box: tuple[object, ...], kind: str, action: str, kept: tuple[int, ...] | None
) -> None:
    root = write_voc(tmp_path, {"a": thing("cat", 1, 1, 9, 9) + thing("dog", *box)}, {"train": ["a"]})
    dataset = open_dataset(root)
    assert kinds(dataset.problems) == [(kind, action)]
    assert (dataset.problems[0].row, dataset.problems[0].id) == (2, "a")
    assert "dog" in dataset.problems[0].detail
    sample = only(dataset)
    expected = [(1, 1, 9, 9)] + ([kept] if kept else [])
    np.testing.assert_allclose(sample.boxes.to_array(PIXELS, 40, 20), expected)
    assert sample.labels == ("cat", "dog")[: len(expected)]


def test_voc_whose_sides_are_mixed_up_is_refused(tmp_path: Path) -> None:
    """x and y under each other's names: from y2 = 22 on boxes leave the 20 rows, and no flag is offered."""
    boxes = "".join(thing("cat", 1, 10 + number, 9, 14 + number) for number in range(20))
    root = write_voc(tmp_path, {"a": boxes}, {"train": ["a"]})
    with pytest.raises(DataError, match=r"12 of 20 boxes .*they fit as yxyx/pixel.*mend what wrote them"):
        open_dataset(root)


BOMB = (
    '<!DOCTYPE lolz [<!ENTITY lol "lol">]>'
    "<annotation><filename>a.jpg</filename><object><name>&lol;</name></object></annotation>"
)


@pytest.mark.parametrize(
    ("document", "kind"),
    [
        ("<annotation><filename>a.jpg", "broken_xml"),
        ("<?xml version='1.0'?>", "broken_xml"),
        ("<?xml version='1.0' encoding='no-such'?><a/>", "broken_xml"),
        (BOMB, "broken_xml"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', "broken_xml"),
        ("<annotation><filename>../../etc/passwd</filename></annotation>", "path_outside"),
        ("<annotation><filename>/etc/passwd</filename></annotation>", "path_outside"),
        ("<annotation><filename>..\\..\\..\\secret.jpg</filename></annotation>", "path_outside"),
        ("<annotation><filename>C:\\secret.jpg</filename></annotation>", "path_outside"),
        (f"<annotation><filename>{'x' * 5000}.jpg</filename></annotation>", "path_outside"),
    ],
)
def test_voc_row_is_dropped_and_reported(tmp_path: Path, document: str, kind: str) -> None:
    root = write_voc(tmp_path, {"a": document, "b": ""}, {"train": ["a", "b"]})
    dataset = open_dataset(root)
    assert [sample.id for sample in dataset.splits["train"]] == ["b"]
    assert kinds(dataset.problems) == [(kind, "row_dropped")]
    assert dataset.problems[0].id == "a"
    assert "\n" not in str(dataset.problems[0].detail)


def test_voc_doctype_is_refused_in_every_encoding(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"a": ""}, {"train": ["a"]})
    (root / "Annotations" / "a.xml").write_bytes(BOMB.encode("utf-16"))
    dataset = open_dataset(root)
    assert kinds(dataset.problems) == [("broken_xml", "row_dropped")]
    assert "DOCTYPE" in dataset.problems[0].detail


def test_voc_list_that_leads_out(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "set", {"a": ""}, {"train": ["../../outside", "a", "gone"]})
    write_voc(tmp_path, {"outside": ""})
    dataset = open_dataset(root)
    assert [sample.id for sample in dataset.splits["train"]] == ["a"]
    assert kinds(dataset.problems) == [("path_outside", "row_dropped"), ("broken_xml", "row_dropped")]
    assert dataset.problems[0].row == 1


def test_voc_missing_picture(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"a": "", "b": ""}, {"train": ["a", "b"]})
    (root / "JPEGImages" / "a.jpg").unlink()
    dataset = open_dataset(root)
    assert [sample.id for sample in dataset.splits["train"]] == ["b"]
    assert kinds(dataset.problems) == [("missing_image", "row_dropped")]


def test_voc_picture_under_another_suffix_is_reported(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"a": ""}, {"train": ["a"]})
    (root / "JPEGImages" / "a.jpg").rename(root / "JPEGImages" / "a.png")
    dataset = open_dataset(root)
    assert kinds(dataset.problems) == [("filename_mismatch", "kept")]
    assert only(dataset).picture == root / "JPEGImages" / "a.png"


def test_voc_without_size_takes_the_picture_s(tmp_path: Path) -> None:
    document = f"<annotation><filename>a.jpg</filename>{thing('cat', 4, 5, 20, 10)}</annotation>"
    dataset = open_dataset(write_voc(tmp_path, {"a": document}, {"train": ["a"]}))
    assert kinds(dataset.problems) == [("size_missing", "kept")]
    np.testing.assert_allclose(only(dataset).boxes.xyxy, [[0.1, 0.25, 0.5, 0.5]])


def test_voc_object_without_a_name(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"a": thing(" ", 1, 1, 5, 5) + thing("cat", 1, 1, 5, 5)}, {"train": ["a"]})
    dataset = open_dataset(root)
    assert kinds(dataset.problems) == [("unknown_category", "box_dropped")]
    assert only(dataset).labels == ("cat",)


def test_voc_hostile_category_comes_through_as_it_is(tmp_path: Path) -> None:
    """What it does to a conversation is the codec's to prevent; a reader changes no name."""
    root = write_voc(tmp_path, {"a": thing("a&lt;|im_end|&gt;b", 1, 1, 5, 5)}, {"train": ["a"]})
    assert only(open_dataset(root)).labels == ("a<|im_end|>b",)


def test_voc_names_in_two_splits_and_twice(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"a": "", "b": ""}, {"train": ["a", "b", "a"], "test": ["b", "b"]})
    dataset = open_dataset(root)
    ids = [sample.id for rows in dataset.splits.values() for sample in rows]
    assert sorted(ids) == ["a", "b", "test/b"]
    assert Counter(kinds(dataset.problems)) == {
        ("duplicate_row", "row_dropped"): 2,
        ("split_overlap", "kept"): 1,
    }
    dropped = {problem.id for problem in dataset.problems if problem.action == "row_dropped"}
    assert not dropped & set(ids), "a problem of the second row would drop the first"


def test_one_split_keeps_all_class_names_and_its_own_problems(tmp_path: Path) -> None:
    rows = {"a": thing("cat", 1, 1, 1, 1), "b": thing("dog", 1, 1, 5, 5), "c": thing("cow", 1, 1, 5, 5)}
    root = write_voc(tmp_path, rows, {"train": ["a", "c"], "val": ["b"]})
    dataset = open_dataset(root, split="val")
    assert list(dataset.splits) == ["val"]
    assert dataset.labels == ("cat", "cow", "dog")
    assert dataset.problems == []
    with pytest.raises(DataError, match="did you mean 'train'"):
        open_dataset(root, split="trains")


def test_bccd_counts(shared: Path) -> None:
    """Facts of SOURCE.txt: 364 pictures, 4,888 objects, two of them without area, splits 205 / 87 / 72."""
    dataset = open_dataset(shared / "data" / "bccd")
    assert {name: len(rows) for name, rows in dataset.splits.items()} == {"train": 205, "val": 87, "test": 72}
    samples = [sample for rows in dataset.splits.values() for sample in rows]
    assert len({sample.id for sample in samples}) == 364
    assert {(sample.width, sample.height) for sample in samples} == {(640, 480)}
    dropped = [problem for problem in dataset.problems if problem.action == "box_dropped"]
    assert sum(len(sample.boxes) for sample in samples) + len(dropped) == 4888
    assert kinds(dataset.problems) == [("degenerate_box", "box_dropped")] * 2
    assert {problem.id for problem in dropped} == {"BloodImage_00338", "BloodImage_00343"}
    assert dataset.labels == ("Platelets", "RBC", "WBC")
    counts = Counter(label for sample in samples for label in sample.labels)
    assert counts["RBC"] + counts["WBC"] + counts["Platelets"] == 4886
    assert counts["WBC"] <= 372
    assert all(sample.picture.is_file() for sample in samples if isinstance(sample.picture, Path))


# --- Parquet ----------------------------------------------------------------------------------------------------------


def picture(size: tuple[int, int] = (40, 20), tag: int = 1, kind: str = "JPEG") -> bytes:
    block = Image.Exif()
    block[274] = tag
    file = io.BytesIO()
    image = Image.new("RGB", size, "gray")
    image.save(file, kind, **({"exif": block} if tag != 1 else {}))
    return file.getvalue()


def row(**changes: Any) -> dict[str, Any]:
    plain = {
        "image_id": "a",
        "image": {"bytes": picture(), "path": "a.jpg"},
        "width": 40,
        "height": 20,
        "meta": {"barcode": "123", "off_image_id": "1", "image_url": ""},
        "objects": {"bbox": [[0.25, 0.1, 0.5, 0.5]], "category_id": [0], "category_name": ["nutrition-table"]},
    }
    return {**plain, **changes}


def objects(
    *boxes: Sequence[float], names: Sequence[str | None] = (), ids: Sequence[int | None] = ()
) -> dict[str, Any]:
    return {
        "bbox": [list(box) for box in boxes],
        "category_id": list(ids) or [0] * len(boxes),
        "category_name": list(names) or ["nutrition-table"] * len(boxes),
    }


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def read(tmp_path: Path, *rows: Mapping[str, Any], **arguments: Any) -> DetectionDataset:
    return open_dataset(write_parquet(tmp_path / "set" / "train.parquet", rows), **arguments)


def test_parquet_row_of_the_hub_schema(tmp_path: Path) -> None:
    dataset = read(tmp_path, row())
    sample = only(dataset)
    np.testing.assert_allclose(sample.boxes.xyxy, [[0.1, 0.25, 0.5, 0.5]])
    assert (sample.id, sample.labels, sample.group) == ("a", ("nutrition-table",), "123")
    assert (sample.width, sample.height) == (40, 20)
    assert sample.image.size == (40, 20)
    assert sample.source.endswith("train.parquet:0")
    assert dataset.problems == []
    assert str(dataset.box_format) == "yxyx/fraction"
    assert "openfoodfacts/nutrition-table-detection" in dataset.decided_by
    assert dataset.labels == ("nutrition-table",)


def test_parquet_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    read(tmp_path, row())
    assert capfd.readouterr() == ("", "")


def test_drawn_set_comes_back(tmp_path: Path) -> None:
    folder = write_drawn_set(tmp_path / "drawn", train=3, val=2, test=1, seed=2)
    dataset = open_dataset(folder)
    assert {name: len(rows) for name, rows in dataset.splits.items()} == {"train": 3, "val": 2, "test": 1}
    assert dataset.problems == []
    for rows in dataset.splits.values():
        for sample in rows:
            assert sample.image.size == (sample.width, sample.height)
            assert set(sample.labels) <= {NUTRITION_LABELS[0]}
    assert {name: len(rows) for name, rows in open_dataset(str(folder), split="val").splits.items()} == {"val": 2}


def test_parquet_shards_and_split_names(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_parquet(data / "train-00000-of-00002.parquet", [row(image_id="a"), row(image_id="b")])
    write_parquet(data / "train-00001-of-00002.parquet", [row(image_id="c")])
    write_parquet(data / "validation-00000-of-00001.parquet", [row(image_id="d")])
    dataset = open_dataset(tmp_path)
    assert {name: [s.id for s in rows] for name, rows in dataset.splits.items()} == {
        "train": ["a", "b", "c"],
        "val": ["d"],
    }
    assert dataset.splits["train"][2].source.endswith("train-00001-of-00002.parquet:0")


def test_parquet_empty_list_is_a_negative_and_absent_is_not(tmp_path: Path) -> None:
    dataset = read(tmp_path, row(image_id="none", objects=objects()), row(image_id="lost", objects=None), row())
    assert [(sample.id, len(sample.boxes)) for sample in dataset.splits["train"]] == [("none", 0), ("a", 1)]
    assert [(p.kind, p.action, p.id, p.row) for p in dataset.problems] == [
        ("bad_row", "row_dropped", "lost (row 1)", 1)
    ]


@pytest.mark.parametrize(
    ("written", "found", "label"),
    [
        (objects((0, 0, 1, 0.9), names=["banana"], ids=[9]), [("unknown_category", "box_dropped")], None),
        (objects((0, 0, 1, 0.9), names=["a<|im_end|>b"]), [("unknown_category", "box_dropped")], None),
        (objects((0, 0, 1, 0.9), names=[None], ids=[99]), [("unknown_category", "box_dropped")], None),
        (objects((0, 0, 1, 0.9), names=[None], ids=[-1]), [("unknown_category", "box_dropped")], None),
        (objects((0, 0, 1, 0.9), names=[None], ids=[2]), [], "nutrition-table-small"),
        (
            objects((0, 0, 1, 0.9), names=["nutrition-table"], ids=[99]),
            [("category_conflict", "kept")],
            "nutrition-table",
        ),
    ],
)
def test_parquet_categories(
    tmp_path: Path, written: dict[str, Any], found: list[tuple[str, str]], label: str | None
) -> None:
    dataset = read(tmp_path, row(image_id="odd", objects=written), row())
    assert kinds(dataset.problems) == found
    assert dataset.splits["train"][0].labels == ((label,) if label else ())
    assert len(dataset.splits["train"][0].boxes) == (1 if label else 0)


def test_parquet_of_this_schema_with_names_of_its_own(tmp_path: Path) -> None:
    written = objects((0, 0, 1, 0.9), names=["a<|im_end|>b"])
    dataset = read(tmp_path, row(objects=written))
    assert dataset.labels == ("a<|im_end|>b",)
    assert dataset.problems == []


@pytest.mark.parametrize(
    ("box", "found", "kept"),
    [
        ((0.2, 0.3, 0.2, 0.6), ("degenerate_box", "box_dropped"), None),
        ((0.5, 0.3, 0.2, 0.6), ("reversed_box", "box_dropped"), None),
        ((0.2, 1.2, 0.4, 1.4), ("box_outside", "box_dropped"), None),
        ((-0.2, 0.3, 0.4, 1.2), ("box_outside", "box_clipped"), [0.3, 0, 1, 0.4]),
        ((0.2, 0.3, 0.4), ("bad_box", "box_dropped"), None),
        ((0.1, 0.3, float("nan"), 0.6), ("bad_box", "box_dropped"), None),
    ],
)
def test_parquet_boxes_that_do_not_fit(
    tmp_path: Path, box: tuple[float, ...], found: tuple[str, str], kept: list[float] | None
) -> None:
    dataset = read(tmp_path, row(image_id="first"), row(objects=objects((0.25, 0.1, 0.5, 0.5), box)))
    assert kinds(dataset.problems) == [found]
    assert (dataset.problems[0].row, dataset.problems[0].id) == (1, "a")
    expected = [[0.1, 0.25, 0.5, 0.5]] + ([kept] if kept else [])
    np.testing.assert_allclose(dataset.splits["train"][1].boxes.xyxy, expected)


def test_float32_rounding_over_the_edge_is_not_reported(tmp_path: Path) -> None:
    dataset = read(tmp_path, row(objects=objects((-1e-8, 0, 1 + 1e-7, 0.5))))
    assert dataset.problems == []
    assert only(dataset).boxes.tolist() == [[0, 0, 0.5, 1]]


def test_lists_of_different_length(tmp_path: Path) -> None:
    written = {"bbox": [[0, 0, 1, 1]], "category_id": [0, 0], "category_name": ["nutrition-table"]}
    dataset = read(tmp_path, row(objects=written), row(image_id="b"))
    assert kinds(dataset.problems) == [("bad_row", "row_dropped")]
    assert only(dataset).id == "b"


def test_the_same_id_twice(tmp_path: Path) -> None:
    dataset = read(tmp_path, row(), row())
    assert [sample.id for sample in dataset.splits["train"]] == ["a", "train/a"]
    assert kinds(dataset.problems) == [("duplicate_id", "kept")]


@pytest.mark.parametrize("broken", [b"", b"not a picture", picture()[:30]])
def test_parquet_picture_without_a_head_is_left_to_the_pre_pass(tmp_path: Path, broken: bytes) -> None:
    dataset = read(tmp_path, row(image={"bytes": broken, "path": "x.jpg"}, width=None), row(image_id="b"))
    first, second = dataset.splits["train"]
    assert (first.width, first.height, len(first.boxes)) == (0, 0, 1)
    with pytest.raises(ImageError):
        _ = first.image
    assert second.image.size == (40, 20)


def test_parquet_picture_by_path_stays_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(picture())
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "in.jpg").write_bytes(picture())
    paths = {"in": "in.jpg", "up": "../secret.jpg", "root": str(tmp_path / "secret.jpg"), "gone": "gone.jpg"}
    rows = [row(image_id=name, image={"bytes": None, "path": path}) for name, path in paths.items()]
    samples = {sample.id: sample for sample in read(tmp_path, *rows).splits["train"]}
    assert samples["in"].image.size == (40, 20)
    for name, word in (("up", "no path inside"), ("root", "no path inside"), ("gone", "cannot be read")):
        with pytest.raises(ImageError, match=word):
            _ = samples[name].image


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
@pytest.mark.parametrize("tag", [5, 6, 7, 8])
def test_turned_picture_whose_row_states_the_stored_size(tmp_path: Path, tag: int, kind: str) -> None:
    """The mark is drawn on the stored picture; wherever the turn takes it, the box must follow."""
    stored = Image.new("L", (40, 20), 0)
    stored.paste(255, (4, 5, 20, 10))
    block = Image.Exif()
    block[274] = tag
    file = io.BytesIO()
    stored.save(file, kind, exif=block, **({"quality": 95} if kind == "JPEG" else {}))
    written = row(image={"bytes": file.getvalue(), "path": None}, objects=objects((0.25, 0.1, 0.5, 0.5)))
    dataset = read(tmp_path, written)
    sample = only(dataset)
    assert (sample.width, sample.height) == sample.image.size == (20, 40)
    x1, y1, x2, y2 = sample.boxes.to_array(PIXELS, 20, 40)[0].round().astype(int)
    pixels = np.asarray(sample.image.convert("L")) > 127
    assert pixels[y1:y2, x1:x2].mean() > 0.9
    assert pixels.sum() == pytest.approx((y2 - y1) * (x2 - x1), rel=0.15)
    assert not sample.turn_unknown


def test_turned_picture_whose_row_states_the_upright_size(tmp_path: Path) -> None:
    data = {"bytes": picture(tag=6), "path": None}
    dataset = read(tmp_path, row(image=data, width=20, height=40))
    np.testing.assert_allclose(only(dataset).boxes.xyxy, [[0.1, 0.25, 0.5, 0.5]])
    assert (only(dataset).width, only(dataset).height) == only(dataset).image.size == (20, 40)
    assert dataset.problems == []


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (picture((30, 30), tag=6), (30, 30)),  # square: both sizes are equal
        (picture(tag=3), (40, 20)),  # upside down: both sizes are equal
        (picture(tag=6), (None, None)),  # nothing stated
    ],
)
def test_turned_picture_that_leaves_it_open_is_the_user_s_to_decide(
    tmp_path: Path, data: bytes, size: tuple[int | None, int | None]
) -> None:
    written = row(image={"bytes": data, "path": None}, width=size[0], height=size[1])
    tag = 3 if size == (40, 20) else 6
    box = [0.1, 0.25, 0.5, 0.5]
    turned = {3: [0.5, 0.5, 0.9, 0.75], 6: [0.5, 0.1, 0.75, 0.5]}[tag]
    for exif, unknown, expected in ((None, True, box), ("applied", False, box), ("ignored", False, turned)):
        sample = only(read(tmp_path, written, exif=exif))
        assert sample.turn_unknown is unknown
        np.testing.assert_allclose(sample.boxes.xyxy, [expected], atol=1e-6)
        assert (sample.width, sample.height) == sample.image.size


def test_a_wrong_word_for_turned_pictures(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'ignored'"):
        read(tmp_path, row(), exif="ignore")


@pytest.mark.parametrize("size", [(400, 200), (80, 41)])
def test_stated_size_that_is_neither_is_kept_for_the_pre_pass(tmp_path: Path, size: tuple[int, int]) -> None:
    data = {"bytes": picture(tag=6), "path": None}
    sample = only(read(tmp_path, row(image=data, width=size[0], height=size[1])))
    assert (sample.width, sample.height) == size
    assert not sample.turn_unknown


def test_parquet_that_does_not_say_its_box_format(tmp_path: Path) -> None:
    other = {"image": {"bytes": picture(), "path": None}, "objects": {"bbox": [[4.0, 5, 16, 5]], "category": ["cat"]}}
    with pytest.raises(DataError, match="--box-format") as caught:
        read(tmp_path, other)
    assert "xywh/pixel" in str(caught.value)
    assert "\n" not in str(caught.value)
    dataset = read(tmp_path, other, box_format="xywh/pixel")
    np.testing.assert_allclose(only(dataset).boxes.xyxy, [[0.1, 0.25, 0.5, 0.5]])
    assert (dataset.labels, dataset.decided_by, only(dataset).id) == (("cat",), "given by the user", "train/0")


def test_class_labels_and_lists_of_structs(tmp_path: Path) -> None:
    import datasets

    fields = {"bbox": datasets.List(datasets.Value("float32")), "category": datasets.ClassLabel(names=["cat", "dog"])}
    features = datasets.Features({"image": datasets.Image(), "objects": datasets.List(fields)})
    things = [{"bbox": [4.0, 5.0, 20.0, 10.0], "category": 1}]
    rows = {"image": [{"bytes": picture(), "path": None}], "objects": [things]}
    path = tmp_path / "train.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    dataset = open_dataset(path, box_format="xyxy/pixel")
    np.testing.assert_allclose(only(dataset).boxes.xyxy, [[0.1, 0.25, 0.5, 0.5]])
    assert only(dataset).labels == ("dog",)


@pytest.mark.parametrize(
    "columns",
    [
        {"objects": {"bbox": [[4.0, 5, 16, 5]], "category": ["cat"]}},
        {"objects": {"boxes": [[4.0, 5, 16, 5]], "labels": ["cat"]}},
        {"objects": {"bboxes": [[4.0, 5, 16, 5]], "category_id": [3], "category_name": ["cat"]}},
        {"objects": [{"bbox": [4.0, 5, 16, 5], "class_name": "cat"}]},
        {"bbox": [[4.0, 5, 16, 5]], "label": ["cat"]},
    ],
)
def test_spellings_of_objects(tmp_path: Path, columns: dict[str, Any]) -> None:
    written = {"image": {"bytes": picture(), "path": None}, **columns}
    sample = only(read(tmp_path, written, box_format="xywh/pixel"))
    assert sample.labels == ("cat",)
    np.testing.assert_allclose(sample.boxes.xyxy, [[0.1, 0.25, 0.5, 0.5]])


def test_class_labels_keep_their_order_and_those_without_a_box(tmp_path: Path) -> None:
    import datasets

    fields = {"bbox": datasets.List(datasets.Value("float32")), "label": datasets.ClassLabel(names=["z", "a", "m"])}
    features = datasets.Features({"image": datasets.Image(), "objects": datasets.List(fields)})
    things = [{"bbox": [4.0, 5.0, 16.0, 5.0], "label": 2}, {"bbox": [4.0, 5.0, 16.0, 6.0], "label": None}]
    rows = {"image": [{"bytes": picture(), "path": None}], "objects": [things]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "holdout-00000-of-00001.parquet"))
    dataset = open_dataset(tmp_path, box_format="xywh/pixel")
    assert (dataset.labels, only(dataset, "holdout").labels) == (("z", "a", "m"), ("m",))
    assert kinds(dataset.problems) == [("unknown_category", "box_dropped")]


def test_the_numbers_decide_a_parquet_set_and_pixels_need_no_stated_size(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    truth, rows = [], []
    for _ in range(40):
        start = rng.uniform(0, 0.9, (5, 2))
        boxes = np.concatenate([start, (start + rng.uniform(0.02, 0.4, (5, 2))).clip(max=1)], axis=1)
        truth.append(boxes)
        written = {"bbox": (boxes[:, [1, 0, 3, 2]] * [20, 40, 20, 40]).tolist(), "category": ["cat"] * 5}
        rows.append({"image": {"bytes": picture(), "path": None}, "objects": written})
    dataset = read(tmp_path, *rows)
    assert str(dataset.box_format) == "yxyx/pixel"
    assert any("yxyx/pixel" in note and "possible" in note for note in dataset.notes)
    for sample, boxes in zip(dataset.splits["train"], truth, strict=True):
        np.testing.assert_allclose(sample.boxes.xyxy, boxes, atol=1e-9)


def test_opening_a_parquet_set_opens_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "train.parquet", [row(), row(image_id="b")])
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("a picture was opened"))
    assert len(open_dataset(path).splits["train"]) == 2


def test_a_hub_set_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = [row(image_id=str(number), meta={**row()["meta"], "barcode": str(number)}) for number in range(9)]
    path = write_parquet(tmp_path / "x.parquet", rows)
    real = datasets.load_dataset
    asked: list[Any] = []

    def load(source: str, **arguments: Any) -> Any:
        asked.append((source, arguments))
        return real("parquet", data_files={"train": str(path)}, **arguments)

    monkeypatch.setattr(datasets, "load_dataset", load)
    dataset = open_dataset("owner/name", stream=4)
    assert asked == [("owner/name", {"streaming": True})]
    samples = dataset.splits["train"]
    assert [(sample.id, sample.group) for sample in samples] == [(str(number),) * 2 for number in range(4)]
    for _ in range(2):  # pictures can be opened again, long after the stream
        assert [sample.image.size for sample in samples] == [(40, 20)] * 4
    np.testing.assert_allclose(samples[3].boxes.xyxy, [[0.1, 0.25, 0.5, 0.5]])
    assert samples[3].source == "owner/name/train:3"
    assert any("the first 4 rows of each split" in note for note in dataset.notes)
    with pytest.raises(DataError, match="is on disk and is not streamed"):
        open_dataset(path, stream=4)


def test_pixels_in_the_fraction_schema_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"2 of 2 boxes end before they begin or leave their picture; they fit as yxyx/pixel"
    ):
        read(tmp_path, row(objects=objects((5, 4, 10, 20), (0, 0, 20, 40))))
    dataset = read(tmp_path, row(objects=objects((5, 4, 10, 20))), box_format="yxyx/pixel")
    np.testing.assert_allclose(only(dataset).boxes.xyxy, [[0.1, 0.25, 0.5, 0.5]])


# --- what is there at all ---------------------------------------------------------------------------------------------


def test_missing_source_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "bccd").mkdir()
    with pytest.raises(DataError, match=r"there is no .*bcd; .* holds bccd/"):
        open_dataset(tmp_path / "bcd")


def test_folder_that_is_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=r"holds notes\.txt; name a folder with a data\.yaml"):
        open_dataset(tmp_path)
    with pytest.raises(DataError, match=r"ends with '\.txt'"):
        open_dataset(tmp_path / "notes.txt")


def test_empty_voc_and_wrong_layouts(tmp_path: Path) -> None:
    (tmp_path / "voc" / "Annotations").mkdir(parents=True)
    with pytest.raises(DataError, match=r"no \.xml file"):
        open_dataset(tmp_path / "voc")
    with pytest.raises(DataError, match=r"holds no \.parquet"):
        open_dataset(tmp_path, format="hub")
    write_parquet(tmp_path / "pq" / "train.parquet", [row()])
    with pytest.raises(DataError, match="no Annotations/"):
        open_dataset(tmp_path / "pq", format="voc")


@pytest.mark.parametrize("data", [b"", b"not parquet", b"PAR1" * 5])
def test_broken_parquet_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "train.parquet").write_bytes(data)
    with pytest.raises(DataError, match="no whole Parquet file"):
        open_dataset(tmp_path)


def test_parquet_without_objects(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column image and objects; it has caption"):
        read(tmp_path, {"caption": "x"})


def test_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown format 'vco'; did you mean 'voc'"):
        open_dataset(tmp_path, format="vco")
    with pytest.raises(DataError, match="--box-format xyxy/pixel"):
        open_dataset(tmp_path, format="xyxy/pixel")
    with pytest.raises(ConfigError, match="unknown box order"):
        open_dataset(tmp_path, box_format="xxyy/pixel")


def test_hub_id_goes_through_load_dataset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    path = write_parquet(tmp_path / "x.parquet", [row()])
    rows = datasets.load_dataset("parquet", data_files={"validation": str(path)})
    asked: list[Any] = []

    def load(source: str, **arguments: Any) -> Any:
        asked.append((source, arguments))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    dataset = open_dataset("openfoodfacts/nutrition-table-detection")
    assert asked == [("openfoodfacts/nutrition-table-detection", {})]
    assert only(dataset, "val").labels == ("nutrition-table",)
    assert "by its name" in dataset.decided_by


def test_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(source: str, **arguments: Any) -> Any:
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError) as caught:
        open_dataset("owner/nothing")
    assert "\n" not in str(caught.value)
    assert "HF_HUB_OFFLINE" in str(caught.value)


def test_what_counts_as_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert hub.is_hub_id("owner/name")
    for source in ("runs/drawn", "./a/b", "/a/b", "a", "a/b/c", "../a"):
        assert not hub.is_hub_id(source)


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("a.jpg", True),
        ("sub/a.jpg", True),
        ("../JPEGImages/a.jpg", True),
        ("../../a.jpg", False),
        ("sub/../../../a.jpg", False),
        ("/etc/passwd", False),
        ("..\\..\\a.jpg", False),
        ("", False),
        ("a\0.jpg", False),
        ("..", False),
    ],
)
@pytest.mark.parametrize("root", [Path("."), Path("x/set"), Path("../set"), Path("/abs/set")])
def test_safe_path(root: Path, name: str, inside: bool) -> None:
    assert (safe_path(root / "JPEGImages", name, root) is not None) == inside


def test_readers_import_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, vlmdet.data.readers, vlmdet.data.select; print('torch' in sys.modules, 'datasets' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert answer.split() == ["False", "False"]


def test_voc_xml_over_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(voc, "LARGEST_XML", 50)
    root = write_voc(tmp_path, {"a": ""}, {"train": ["a"]})
    assert kinds(open_dataset(root).problems) == [("broken_xml", "row_dropped")]

"""YOLO sets: the layouts that people have, lines of every kind, hostile files, and coco128."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmdet.data.readers import open_dataset
from vlmdet.errors import DataError, ImageError
from vlmdet.records import DetectionDataset, Sample

CONFIG = "train: images/train\nval: images/val\nnames: [cat, dog]\n"


def write(root: Path, files: dict[str, str], pictures: Sequence[str] = (), size: tuple[int, int] = (40, 20)) -> Path:
    """Write text files and grey pictures; returns the root."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    for name in pictures:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, "gray").save(root / name)
    return root


def kinds(dataset: DetectionDataset) -> list[tuple[str, str]]:
    return [(problem.kind, problem.action) for problem in dataset.problems]


def only(dataset: DetectionDataset, split: str = "train") -> Sample:
    (sample,) = dataset.splits[split]
    return sample


def one(root: Path, lines: str, config: str = CONFIG) -> DetectionDataset:
    return open_dataset(
        write(root, {"data.yaml": config, "labels/train/a.txt": lines}, ["images/train/a.jpg"]), split="train"
    )


def test_a_small_set(tmp_path: Path) -> None:
    files = {
        "data.yaml": CONFIG,
        "labels/train/b.txt": "1 0.3 0.375 0.4 0.25\n0 .5 .5 .1 .1\n",
        "labels/train/empty.txt": "",
        "labels/val/c.txt": "0 5e-1 0.5 0.2 0.2",
    }
    pictures = ["images/train/b.jpg", "images/train/a.png", "images/train/empty.jpg", "images/val/c.jpg"]
    dataset = open_dataset(write(tmp_path, files, pictures))
    assert {name: [row.id for row in rows] for name, rows in dataset.splits.items()} == {
        "train": ["a", "b", "empty"],
        "val": ["c"],
    }
    a, b, empty = dataset.splits["train"]
    np.testing.assert_allclose(b.boxes.xyxy, [[0.1, 0.25, 0.5, 0.5], [0.45, 0.45, 0.55, 0.55]])
    assert b.labels == ("dog", "cat")
    assert (b.width, b.height) == b.image.size == (40, 20)
    assert (len(a.boxes), len(empty.boxes)) == (0, 0)
    assert dataset.labels == ("cat", "dog")
    assert (str(dataset.box_format), dataset.decided_by) == ("cxcywh/fraction", "defined by YOLO")
    assert any("1 pictures have no label file" in note for note in dataset.notes)
    assert dataset.problems == []


@pytest.mark.parametrize(
    ("config", "picture", "label"),
    [
        ("path: .\ntrain: images\nnames: {0: cat, 1: dog}\n", "images/a.jpg", "labels/a.txt"),
        ("path: set\ntrain: images\nnames: {0: cat}\n", "set/images/a.jpg", "set/labels/a.txt"),
        ("path: /home/somebody/set\ntrain: images\nnames: [cat]\n", "images/a.jpg", "labels/a.txt"),
        ("path: ../datasets/set\ntrain: images\nnames: [cat]\n", "images/a.jpg", "labels/a.txt"),
        ("train: ../train/images\nnames: [cat]\nnc: 1\n", "train/images/a.jpg", "train/labels/a.txt"),
        ("train: train\nnames: [cat]\n", "train/a.jpg", "train/a.txt"),
        ("train: [one, two]\nnames: [cat]\n", "two/a.jpg", "two/a.txt"),
        ("train: images/train\nnames: [cat]\n", "images/train/a.JPG", "labels/train/a.txt"),
        ("train: images/images\nnames: [cat]\n", "images/images/a.jpg", "images/labels/a.txt"),
        ("train: list.txt\nnames: [cat]\n", "images/a.jpg", "labels/a.txt"),
        ("train: .\nnames: ['cat']\n", "images/deep/a.jpg", "labels/deep/a.txt"),
    ],
)
def test_layouts(tmp_path: Path, config: str, picture: str, label: str) -> None:
    files = {"mine.yaml": config, label: "0 .5 .5 .2 .4\n", "list.txt": "./images/a.jpg\n\n"}
    dataset = open_dataset(write(tmp_path / "root", files, [picture]))
    sample = only(dataset)
    np.testing.assert_allclose(sample.boxes.xyxy, [[0.4, 0.3, 0.6, 0.7]])
    assert sample.labels == ("cat",)
    assert sample.picture == tmp_path / "root" / picture
    assert sample.id.endswith("a")
    assert dataset.problems == []
    assert only(open_dataset(tmp_path / "root" / "mine.yaml")).id == sample.id


def test_without_a_yaml_file_the_classes_come_from_a_list(tmp_path: Path) -> None:
    files = {"classes.txt": "cat\ndog\n", "labels/train/a.txt": "1 .5 .5 .2 .4\n", "labels/val/b.txt": ""}
    dataset = open_dataset(write(tmp_path, files, ["images/train/a.jpg", "images/val/b.jpg"]))
    assert only(dataset).labels == ("dog",)
    assert len(only(dataset, "val").boxes) == 0
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"no \.yaml file"):
        open_dataset(tmp_path, format="yolo")


def test_a_split_that_is_absent_is_a_note(tmp_path: Path) -> None:
    dataset = one(tmp_path, "0 .5 .5 .2 .4\n")
    assert list(dataset.splits) == ["train"]
    assert any("names the split val, but there is no picture in images/val" in note for note in dataset.notes)


def test_any_split_that_the_file_names(tmp_path: Path) -> None:
    config = "holdout: images/holdout\ntest:\nvalid: images/v\nnames: {0: cat}\n"
    files = {"data.yaml": config, "labels/holdout/a.txt": "", "labels/v/b.txt": "0 .5 .5 .2 .4"}
    dataset = open_dataset(write(tmp_path, files, ["images/holdout/a.jpg", "images/v/b.jpg"]), format="yolo")
    assert sorted(dataset.splits) == ["holdout", "val"]


def test_polygons_give_the_box_around_them(tmp_path: Path) -> None:
    dataset = one(tmp_path, "0 .1 .2 .5 .2 .3 .6\n1 .5 .5 .2 .4\n0 .1 .1 .2 .1 .2 .2 .1 .2\n")
    np.testing.assert_allclose(
        only(dataset).boxes.xyxy, [[0.1, 0.2, 0.5, 0.6], [0.4, 0.3, 0.6, 0.7], [0.1, 0.1, 0.2, 0.2]]
    )
    assert any("2 lines are polygons" in note for note in dataset.notes)
    assert dataset.problems == []


def test_key_points_follow_the_box(tmp_path: Path) -> None:
    dataset = one(tmp_path, "0 .5 .5 .2 .4 .1 .1 2 .9 .9 1\n", CONFIG + "kpt_shape: [2, 3]\n")
    np.testing.assert_allclose(only(dataset).boxes.xyxy, [[0.4, 0.3, 0.6, 0.7]])


@pytest.mark.parametrize(
    ("line", "kind", "action"),
    [
        ("7 .5 .5 .2 .4", "unknown_category", "box_dropped"),
        ("-1 .5 .5 .2 .4", "unknown_category", "box_dropped"),
        ("0.5 .5 .5 .2 .4", "bad_box", "box_dropped"),
        ("cat .5 .5 .2 .4", "bad_box", "box_dropped"),
        ("nan .5 .5 .2 .4", "bad_box", "box_dropped"),
        ("0 nan .5 .2 .4", "bad_box", "box_dropped"),
        ("0 inf .5 .2 .4", "bad_box", "box_dropped"),
        ("0 .5 .5 .2", "bad_box", "box_dropped"),
        ("0 .5 .5 .2 .4 .9", "bad_box", "box_dropped"),
        ("0", "bad_box", "box_dropped"),
        ("0,.5,.5,.2,.4", "bad_box", "box_dropped"),
        ("0 .5 .5 0 .4", "degenerate_box", "box_dropped"),
        ("0 .5 .5 -.2 .4", "reversed_box", "box_dropped"),
        ("0 .9 .5 .4 .4", "box_outside", "box_clipped"),
        ("0 2 2 .1 .1", "box_outside", "box_dropped"),
        ("0 1e6 .5 .2 .4", "box_outside", "box_dropped"),
        ("1 .5 .5 1 1", "whole_image_box", "kept"),
        ("1 .2 .3 .1 .1", "duplicate_box", "kept"),
        ("1 .2 .3 .004 .1", "tiny_box", "kept"),
    ],
)
def test_lines_that_do_not_fit(tmp_path: Path, line: str, kind: str, action: str) -> None:
    dataset = one(tmp_path, f"0 .5 .5 .2 .4\n1 .2 .3 .1 .1\n{line}\n")
    assert [(p.kind, p.action, p.row, p.id) for p in dataset.problems] == [(kind, action, 3, "a")]
    np.testing.assert_allclose(only(dataset).boxes.xyxy[:2], [[0.4, 0.3, 0.6, 0.7], [0.15, 0.25, 0.25, 0.35]])
    assert len(only(dataset).boxes) == (2 if action == "box_dropped" else 3)


def test_pixels_in_the_lines_are_refused_until_they_are_named(tmp_path: Path) -> None:
    lines = "".join(f"0 {10 + n} 8 6 4\n" for n in range(20))
    with pytest.raises(DataError, match="20 of 20 boxes end before they begin or leave their picture"):
        one(tmp_path, lines)
    dataset = open_dataset(tmp_path, box_format="cxcywh/pixel")
    np.testing.assert_allclose(only(dataset).boxes.xyxy[0], [7 / 40, 0.3, 13 / 40, 0.5])


def test_label_files_that_cannot_be_read(tmp_path: Path) -> None:
    root = write(tmp_path, {"data.yaml": CONFIG, "labels/train/b.txt": "0 .5 .5 .2 .4\n"}, ["images/train/b.jpg"])
    write(root, {}, ["images/train/a.jpg"])
    (root / "labels/train/a.txt").write_bytes(b"\xff\xfe0\x00")
    dataset = open_dataset(root)
    assert [row.id for row in dataset.splits["train"]] == ["b"]
    assert [(p.kind, p.action, p.id) for p in dataset.problems] == [("broken_labels", "row_dropped", "a")]
    assert len(dataset.splits["train"][0].boxes) == 1


def test_lists_that_lead_out_or_nowhere(tmp_path: Path) -> None:
    write(tmp_path, {"out.txt": ""}, ["out.jpg"])
    lines = "images/a.jpg\n../out.jpg\n/etc/passwd\nimages/gone.jpg\n"
    files = {"d.yaml": "train: list.txt\nnames: [cat]\n", "list.txt": lines, "labels/a.txt": "0 .5 .5 .2 .4"}
    dataset = open_dataset(write(tmp_path / "set", files, ["images/a.jpg"]))
    assert only(dataset).id == "a"
    assert [(p.kind, p.row) for p in dataset.problems] == [
        ("path_outside", 2),
        ("path_outside", 3),
        ("missing_image", 4),
    ]


def test_labels_outside_the_set_are_not_read(tmp_path: Path) -> None:
    """The folder above is named `images`, and a `labels` beside it is somebody else's."""
    write(tmp_path, {"labels/set/train/a.txt": "0 .5 .5 .2 .4\n"})
    root = write(tmp_path / "images" / "set", {"data.yaml": "train: train\nnames: [cat]\n"}, ["train/a.jpg"])
    with pytest.raises(DataError, match="none of 1 pictures has a label file"):
        open_dataset(root)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ("", "no mapping"),
        ("- a\n", "no mapping"),
        ("train: [\n", "no valid YAML"),
        ("[" * 1500, "no valid YAML"),
        ("a: !!python/object/apply:os.getcwd []\n", "no valid YAML"),
        ("a: 2020-13-45\n", "no valid YAML"),
        ("names: [cat]\n", "names no split"),
        ("train: images\n", "no class names"),
        ("train: images\nnames: []\n", "no class names"),
        ("train: images\nnames: cat\n", "no class names"),
        ("train: images\nnames: {a: cat}\n", "names holds 'a'"),
        ("train: images\nnames:\n  ? '" + "9" * 5000 + "'\n  : cat\n", "names holds '999"),
        ("train: images\nnames: [cat, cat]\n", "two classes are named 'cat'"),
        ("train: images\nnames: [[cat]]\n", "names holds 0"),
        ("train: ../../../etc\nnames: [cat]\n", "no split that it names has a picture"),
        ("path: 5\ntrain: {}\nval: 7\nnames: [cat]\n", "names no split"),
        ("train: images/train\nnames: [cat]\n", "none of 1 pictures has a label file"),
    ],
)
def test_configs_that_are_refused_in_one_line(tmp_path: Path, config: str, word: str) -> None:
    root = write(tmp_path, {"data.yaml": config}, ["images/train/a.jpg"])
    with pytest.raises(DataError, match=word) as caught:
        open_dataset(root / "data.yaml")
    assert "\n" not in str(caught.value)


def test_binary_config_and_two_configs(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_bytes(b"\xff\x00")
    with pytest.raises(DataError, match="no text in UTF-8"):
        open_dataset(tmp_path / "data.yaml")
    write(tmp_path, {"data.yaml": CONFIG, "b.yml": CONFIG})
    with pytest.raises(DataError, match="2 YOLO files"):
        open_dataset(tmp_path)


def test_a_picture_without_a_head_has_no_size_and_fails_when_opened(tmp_path: Path) -> None:
    dataset = one(tmp_path, "0 .5 .5 .2 .4\n")
    (tmp_path / "images/train/a.jpg").write_bytes(b"")
    sample = only(dataset)
    assert (sample.width, sample.height, len(sample.boxes)) == (0, 0, 1)
    with pytest.raises(ImageError):
        _ = sample.image


def test_turned_pictures_are_the_user_s_to_decide(tmp_path: Path) -> None:
    one(tmp_path, "0 .3 .375 .4 .25\n")
    block = Image.Exif()
    block[274] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "images/train/a.jpg", exif=block)
    for exif, unknown, expected in (
        (None, True, [0.1, 0.25, 0.5, 0.5]),
        ("applied", False, [0.1, 0.25, 0.5, 0.5]),
        ("ignored", False, [0.5, 0.1, 0.75, 0.5]),
    ):
        sample = only(open_dataset(tmp_path, exif=exif, split="train"))
        assert (sample.width, sample.height) == sample.image.size == (20, 40)
        assert sample.turn_unknown is unknown
        np.testing.assert_allclose(sample.boxes.xyxy, [expected], atol=1e-9)


def test_coco128(shared: Path) -> None:
    """Its config names a train folder that is not there; counts and boxes are those of its text files."""
    root = shared / "data/coco128"
    dataset = open_dataset(root)
    assert list(dataset.splits) == ["val"]
    assert any("names the split train" in note for note in dataset.notes)
    assert not [problem for problem in dataset.problems if problem.action != "kept"]
    assert len(dataset.labels) == 80
    assert (dataset.labels[0], dataset.labels[79]) == ("person", "toothbrush")
    samples = list(dataset.splits["val"])
    assert (len(samples), sum(len(sample.boxes) for sample in samples)) == (128, 898)
    assert len({label for sample in samples for label in sample.labels}) == 73
    for sample in samples:
        lines = (root / "labels/val2017" / f"{sample.id}.txt").read_text().splitlines()
        numbers = np.array([[float(word) for word in line.split()] for line in lines]).reshape(-1, 5)
        assert sample.labels == tuple(dataset.labels[int(number)] for number in numbers[:, 0])
        start, side = numbers[:, 1:3] - numbers[:, 3:] / 2, numbers[:, 3:]
        expected = np.concatenate([start, start + side], axis=1)
        np.testing.assert_allclose(sample.boxes.xyxy, expected, atol=1e-4)
        with Image.open(root / "images/val2017" / f"{sample.id}.jpg") as picture:
            assert (sample.width, sample.height) == picture.size
    assert Counter(problem.kind for problem in dataset.problems).keys() <= {
        "tiny_box",
        "whole_image_box",
        "duplicate_box",
    }

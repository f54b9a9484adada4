"""`vlmdet convert`: what it writes and prints, one JSON document on request, and one line for a mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from vlmdet.cli import build_parser, main
from vlmdet.data.readers import open_dataset
from vlmdet.data.writers import TARGETS


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """A Pascal VOC set: two train pictures of 100 x 80 with a dog each, one val picture with a cat and nothing else."""
    folder = tmp_path / "set"
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    for name, label in (("a", "dog"), ("b", "dog"), ("c", "cat")):
        Image.new("RGB", (100, 80), "navy").save(folder / "JPEGImages" / f"{name}.jpg")
        (folder / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.jpg</filename><size><width>100</width><height>80</height></size>"
            f"<object><name>{label}</name><bndbox><xmin>10</xmin><ymin>20</ymin><xmax>50</xmax><ymax>60</ymax></bndbox>"
            "</object></annotation>",
            encoding="utf-8",
        )
    (folder / "ImageSets/Main/train.txt").write_text("a\nb\n")
    (folder / "ImageSets/Main/val.txt").write_text("c\n")
    return folder


def mistake(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    assert main(["convert", *map(str, args)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("vlmdet convert: ")
    return lines[0]


@pytest.mark.parametrize("to", TARGETS)
def test_every_target(voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(voc), str(out), "--to", to]) == 0
    text = capsys.readouterr().out
    for line in ("train: 2 images, 2 boxes", "val: 1 images, 1 boxes", f"rounding: {TARGETS[to].rounding}"):
        assert line in text.splitlines()
    assert text.splitlines()[-1] == f"written: {out}"
    report = json.loads((out / "conversion.json").read_text(encoding="utf-8"))
    assert (report["to"], report["labels"]) == (to, ["cat", "dog"])
    assert (out / "problems.jsonl").read_text() == ""
    if TARGETS[to].trains:
        assert report["training"]["codec"] == "qwen2_vl" and "answers in the codec qwen2_vl" in text


def test_the_help_names_every_target() -> None:
    (verbs,) = (action for action in build_parser()._actions if action.dest == "verb")
    (to,) = (action for action in verbs.choices["convert"]._actions if action.dest == "to")  # type: ignore[call-overload,union-attr]
    assert to.help.replace("or ", "").split(", ") == list(TARGETS)


def test_json_is_one_document(voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(voc), str(tmp_path / "out"), "--to", "yolo", "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["folder"] == str(tmp_path / "out")
    assert document["splits"] == {"train": {"images": 2, "boxes": 2}, "val": {"images": 1, "boxes": 1}}
    assert "written:" in captured.err


def test_classes_rename_limit_and_link(voc: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--classes", "dog", "--rename", "dog=big dog", "--limit", "1", "--link"]
    assert main(["convert", str(voc), str(out), "--to", "coco", *flags]) == 0
    train, val = (json.loads((out / f"annotations/instances_{split}.json").read_text()) for split in ("train", "val"))
    assert train["categories"] == [{"id": 1, "name": "big dog"}]
    assert (len(train["images"]), len(train["annotations"])) == (1, 1)
    assert (len(val["images"]), len(val["annotations"])) == (1, 0)  # the cat is left out, its picture stays
    assert all(path.is_symlink() for path in (out / "images").iterdir())


def test_a_converted_set_opens_again(voc: Path, tmp_path: Path) -> None:
    assert main(["convert", str(voc), str(tmp_path / "parquet"), "--to", "parquet"]) == 0
    again = open_dataset(tmp_path / "parquet")
    assert {split: [row.id for row in rows] for split, rows in again.splits.items()} == {
        "train": ["a", "b"],
        "val": ["c"],
    }


def test_training_files_take_codec_and_pixel_limits(voc: Path, tmp_path: Path) -> None:
    flags = ["--codec", "qwen2_vl", "--min-pixels", "784", "--max-pixels", "3136"]
    assert main(["convert", str(voc), str(tmp_path / "out"), "--to", "trl", *flags]) == 0
    training = json.loads((tmp_path / "out/conversion.json").read_text())["training"]
    assert (training["min_pixels"], training["max_pixels"], training["size_factor"]) == (784, 3136, 28)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--to", "yollo"], "did you mean 'yolo'?"),
        (["--to", "coco", "--codec", "qwen2_vl", "--max-pixels", "3136"], "training files"),
        (["--to", "swift", "--max-pixels", "3136"], "MAX_PIXELS"),
        (["--to", "trl", "--codec", "qwen9"], "unknown codec"),
        (["--to", "trl", "--min-pixels", "9000", "--max-pixels", "800"], "leave no size"),
        (["--to", "voc", "--classes", "dgo"], "did you mean 'dog'?"),
    ],
)
def test_a_mistake_is_one_line(
    voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], word: str
) -> None:
    assert word in mistake(capsys, voc, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(voc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(voc.rglob("*"))
    assert "nothing is overwritten" in mistake(capsys, voc, voc, "--to", "voc")
    assert sorted(voc.rglob("*")) == before


def test_too_many_broken_rows_stop_it(voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (voc / "JPEGImages" / "b.jpg").write_bytes(b"no picture")
    out = tmp_path / "out"
    assert "--max-problems" in mistake(capsys, voc, out, "--to", "yolo")
    assert main(["convert", str(voc), str(out), "--to", "yolo", "--max-problems", "0.5"]) == 0
    (problem,) = [json.loads(line) for line in (out / "problems.jsonl").read_text().splitlines()]
    assert (problem["id"], problem["kind"], problem["action"]) == ("b", "unreadable_image", "row_dropped")
    assert "1 problems (unreadable_image: 1)" in capsys.readouterr().out

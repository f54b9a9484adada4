"""Write YOLO text files: one line a box, one file a picture.

When: ONCE, by `write_dataset(…, to="yolo")`.

    data.yaml      train: images/train, val: images/val, names: {0: cat, 1: dog}
    images/train/000001.jpg      labels/train/000001.txt: "0 0.500000 0.512500 0.250000 0.375000"

A line is the class number, from 0, and centre x, centre y, width and height as fractions with six decimals. A picture
without an object has an empty file. `data.yaml` names no `path`, so that the folder can be moved: trainers take the
file's own folder. Source: docs.ultralytics.com, "Object Detection Datasets Overview".
"""

from __future__ import annotations

import yaml

from vlmdet.boxes import BoxFormat
from vlmdet.data.writers.files import Writing
from vlmdet.errors import DataError

ROUNDING = "centres and sides within 5e-7 of the picture (six decimals)"
_RESERVED = ("path", "names", "nc", "download")
_STEP = 1e-6
_FORMAT = BoxFormat("cxcywh", "fraction")


def write(writing: Writing) -> None:
    """Write every split and `data.yaml`.

    Raises:
        DataError: a split has the name of a key of `data.yaml`.
    """
    numbers = {label: number for number, label in enumerate(writing.dataset.labels)}
    document: dict[str, object] = {}
    for split in writing.dataset.splits:
        name = writing.split_file(split)
        if name in _RESERVED:
            raise DataError(f"a split cannot be named '{name}' in a data.yaml, where that key means something else")
        document[name] = f"images/{name}"
        labels = writing.root / "labels" / name
        labels.mkdir(parents=True)
        for row in writing.rows(split, f"images/{name}"):
            boxes = row.sample.boxes.to_array(_FORMAT, row.width, row.height)
            lines = []
            for number, (label, (x, y, width, height)) in enumerate(
                zip(row.sample.labels, boxes.tolist(), strict=True), start=1
            ):
                if 0 < min(width, height) < _STEP / 2:
                    said = f"box {number} ({label}) has sides of {width:.1e} and {height:.1e}: widened to {_STEP}"
                    writing.report(row.sample, "tiny_box", said, "kept")
                    width, height = max(width, _STEP), max(height, _STEP)
                lines.append(f"{numbers[label]} {x:.6f} {y:.6f} {width:.6f} {height:.6f}\n")
            (labels / f"{row.stem}.txt").write_text("".join(lines), encoding="ascii")
    document["names"] = {number: label for label, number in numbers.items()}
    text = yaml.safe_dump(document, allow_unicode=True, sort_keys=False, width=1_000_000)
    (writing.root / "data.yaml").write_text(text, encoding="utf-8")

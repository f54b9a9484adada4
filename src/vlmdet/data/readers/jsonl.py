"""Read JSON lines: one picture a line.

When: ONCE, by `open_dataset`. A set is a file, or a folder with `train.jsonl`, `val.jsonl`, … beside its pictures. Three
kinds of lines, told apart by their fields. This tool's own, which `convert --to jsonl` writes:

    {"id": "000001", "image": "images/000001.jpg", "width": 640, "height": 480,
     "boxes": [[0.1, 0.2, 0.5, 0.9]], "box_format": "xyxy/fraction", "labels": ["cat"], "split": "train", "group": ""}

ms-swift's, whose boxes are x1, y1, x2, y2: pixels where `bbox_type` is `real` or absent, fractions where it is `norm1`
(swift.readthedocs.io, "Custom dataset"); one `ref` for several boxes names them all:

    {"messages": […], "images": ["cat.jpg"], "objects": {"ref": ["cat"], "bbox": [[64, 96, 320, 432]]}}

and the `metadata.jsonl` of a folder of pictures, with `file_name` and `objects`, whose box format the numbers decide:

    {"file_name": "0001.png", "objects": {"bbox": [[302.0, 109.0, 73.0, 52.0]], "categories": [0]}}

Class names come in the order of `classes.txt` beside the file (one a line), else in order of appearance; a class that is
a number needs `classes.txt`. Lines are counted from 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from vlmdet.boxes import BoxFormat
from vlmdet.data.readers.locate import Finder
from vlmdet.data.readers.objects import Thing, box_field, read_objects
from vlmdet.data.readers.rows import Rows
from vlmdet.data.readers.values import SPLIT_NAMES, read_text, side, split_name
from vlmdet.errors import ConfigError, DataError
from vlmdet.records import DetectionDataset

OTHERS = ("problems", "predictions", "log")
"""Files of this tool that end with .jsonl and hold no data set."""

LONGEST_LINE = 64_000_000
"""Bytes of a line above which it is refused."""

_IMAGE = ("image", "file_name", "image_path", "filename", "path", "image_file", "img", "img_path")
_SWIFT = {"real": BoxFormat("xyxy", "pixel"), "norm1": BoxFormat("xyxy", "fraction")}


class _Line(NamedTuple):
    """What a line says: its picture, its objects, its box format and who says so."""

    image: str
    things: list[Thing]
    stated: BoxFormat | None
    why: str


class _BadLineError(ValueError):
    """A line that is dropped, as kind and detail."""


def find_files(path: Path) -> list[Path]:
    """Return the files of a set: `path` itself, or those in it, else in the folders in it."""
    if path.is_file():
        return [path] if path.suffix.lower() in (".jsonl", ".ndjson") else []
    found = sorted(path.glob("*.jsonl")) or sorted(path.glob("*/*.jsonl"))
    return [file for file in found if file.stem not in OTHERS]


def read_jsonl(
    path: Path, *, box_format: BoxFormat | None = None, exif: str | None = None, split: str | None = None
) -> DetectionDataset:
    """Read JSON lines.

    Input: `path`, a file or a folder; `box_format`, for lines that do not state one; `exif` and `split` as
    `open_dataset`.

    Raises:
        DataError: no such file, no usable line, lines that state different box formats, numbers that do not tell.
    """
    files = find_files(path)
    if not files:
        raise DataError(f"{path} holds no .jsonl file", "name the folder above train.jsonl, or one file")
    root = path if path.is_dir() else path.parent
    rows = Rows(str(path), split=split, exif=exif)
    names = _class_names(files, root)
    for name in names:
        rows.label_number(name)
    formats: dict[BoxFormat | None, tuple[str, str]] = {}
    lines = 0
    for file in files:
        is_named = split_name(file.stem, "") or file.parent == root
        default = split_name(file.stem, _plain_split(file.stem)) if is_named else split_name(file.parent.name)
        rows.add_split(default)
        finder = Finder(root, [file.parent, root, file.parent / "images", root / "images"])
        for number, line in _lines(file):
            lines += 1
            _read_line(rows, str(file), number, line, default, names, finder, formats)
        rows.notes += finder.note()
    if not len(rows):
        raise DataError(f"{path} holds no line that can be read ({lines} lines)", _first_problem(rows))
    if len(formats) > 1:
        said = "; ".join(f"{where}: {one or 'none'}" for one, (_, where) in formats.items())
        raise DataError(f"{path}: its lines state different box formats ({said})", "write them in one")
    stated, (why, _) = next(iter(formats.items()), (None, ("", "")))
    return rows.finish(stated=stated, why=why, given=box_format)


def _plain_split(stem: str) -> str:
    """Return the split of a file whose name is no known one: `metadata` is no split, `holdout` is."""
    return "train" if stem in ("metadata", "data", "dataset", "annotations") else stem


def _first_problem(rows: Rows) -> str:
    problems = rows.problems
    return f"the first: {problems[0].detail[:200]}" if problems else "write one JSON object a line"


def _class_names(files: Sequence[Path], root: Path) -> list[str]:
    """Read `classes.txt` where it lies beside; a name with a line break in it is written as a JSON string."""
    for folder in dict.fromkeys([root, *(file.parent for file in files)]):
        if (folder / "classes.txt").is_file():
            names = []
            for line in read_text(folder / "classes.txt").split("\n"):
                try:
                    name = json.loads(line) if line.startswith('"') else line
                except ValueError:
                    name = line
                names.append(name if isinstance(name, str) and len(name.splitlines()) > 1 else line.rstrip("\r"))
            return [name for name in names if name.strip()]
    return []


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yield line number and line; empty lines are passed over."""
    try:
        with file.open("rb") as stream:
            number = 0
            while line := stream.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    raise DataError(f"{file}:{number} has over {LONGEST_LINE:,} bytes", "write one picture a line")
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield number, line
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror})") from error


def _read_line(
    rows: Rows,
    file: str,
    number: int,
    line: bytes,
    default: str,
    names: Sequence[str],
    finder: Finder,
    formats: dict[BoxFormat | None, tuple[str, str]],
) -> None:
    """Add a line's row and boxes, or report why it is dropped."""
    split, sample_id = default, f"{file}:{number}"
    try:
        row = _decode(line)
        written = row.get("split")
        if isinstance(written, str) and written.strip():
            split = SPLIT_NAMES.get(written, written)
        said = _understand(row)
    except _BadLineError as error:
        kind, _, detail = str(error).partition(": ")
        rows.report(split, file, number, sample_id, kind, detail, "row_dropped")
        return
    picture = finder.find(said.image)
    if picture is None:
        detail = f"image '{said.image[:200]}' is no path inside {finder.root}"
        rows.report(split, file, number, sample_id, "path_outside", detail, "row_dropped")
        return
    written_id = next((row[key] for key in ("id", "image_id") if isinstance(row.get(key), str | int)), None)
    meta = row.get("meta")
    place = rows.add(
        str(written_id) if written_id not in (None, "") else said.image.rpartition(".")[0] or said.image,
        split,
        picture,
        file=file,
        place=number,
        width=side(row.get("width")),
        height=side(row.get("height")),
        group=str(row.get("group") or "") if isinstance(row.get("group"), str | int) else "",
        meta=dict(meta) if isinstance(meta, Mapping) else None,
    )
    if said.things:
        formats.setdefault(said.stated, (said.why, f"{file}:{number}"))
    for count, thing in enumerate(said.things, start=1):
        label = thing.name
        if not label and thing.number is not None and 0 <= thing.number < len(names):
            label = names[thing.number]
        if not label:
            detail = f"object {count} has no class name, number {thing.number}; names stand in classes.txt, one a line"
            rows.report_row(place, "unknown_category", detail, "box_dropped")
            continue
        rows.add_box(place, thing.box, label, number)


def _decode(line: bytes) -> Mapping[str, Any]:
    """Decode a line; the standard library's decoder takes NaN, which Python writes and JSON has not."""
    try:
        row = msgspec.json.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise _BadLineError(f"broken_json: it is no JSON ({error})") from None
    if not isinstance(row, Mapping):
        raise _BadLineError(f"bad_row: it is a {type(row).__name__}, not an object")
    return row


def _understand(row: Mapping[str, Any]) -> _Line:
    image = next((row[key] for key in _IMAGE if isinstance(row.get(key), str) and row[key]), None)
    images = row.get("images")
    if image is None and isinstance(images, Sequence) and not isinstance(images, str):
        if len(images) != 1:
            raise _BadLineError(f"bad_row: it has {len(images)} pictures; one is wanted")
        image = images[0].get("path") if isinstance(images[0], Mapping) else images[0]
    if isinstance(image, Mapping):
        image = image.get("path")
    if not isinstance(image, str) or not image:
        raise _BadLineError(f"bad_row: it names no picture; its fields: {', '.join(map(str, row))[:200]}")
    objects = row.get("objects", row if box_field(row) else None)
    if objects is None:
        raise _BadLineError(f"bad_row: it has no objects and no boxes; its fields: {', '.join(map(str, row))[:200]}")
    stated, why = None, ""
    if isinstance(objects, Mapping) and "objects" in row and ("ref" in objects or "bbox_type" in objects):
        objects, stated = _swift(objects)
        why = "defined by ms-swift"
    written = row.get("box_format")
    if written is not None:
        try:
            stated, why = BoxFormat.parse(str(written)), "stated by its lines"
        except ConfigError as error:
            raise _BadLineError(f"bad_row: {error}") from error
    things = read_objects(objects)
    if things is None:
        raise _BadLineError("bad_row: its boxes are no list, or its lists differ in length")
    return _Line(image, things, stated, why)


def _swift(objects: Mapping[str, Any]) -> tuple[dict[str, Any], BoxFormat]:
    """Return objects with a `ref` for every box, and their format."""
    kind = objects.get("bbox_type", "real") or "real"
    if not isinstance(kind, str) or kind not in _SWIFT:
        raise _BadLineError(f"bad_row: bbox_type '{str(kind)[:50]}' is unknown; there is: {', '.join(_SWIFT)}")
    refs, boxes = objects.get("ref") or [], objects.get("bbox") or []
    pictures = objects.get("image_id")
    if isinstance(pictures, Sequence) and any(number not in (0, None) for number in pictures):
        raise _BadLineError("bad_row: its boxes are on several pictures")
    if not isinstance(refs, list) or not isinstance(boxes, list):
        raise _BadLineError("bad_row: ref and bbox are no lists")
    if len(refs) == 1 < len(boxes):
        refs = refs * len(boxes)
    if not boxes:
        refs = []  # asked for and not there
    return {"bbox": boxes, "ref": refs}, _SWIFT[kind]

"""Read YOLO text files: one line a box, one file a picture.

When: ONCE, by `open_dataset`. A set is a `data.yaml`, or a folder that holds it under any name:

    path: .                       train: images/train      val: images/val      names: {0: person, 1: bicycle}
    images/train/1.jpg            labels/train/1.txt: "0 0.5 0.51 0.25 0.38"

A line is the class number, from 0, then centre x, centre y, width and height as fractions. `train`, `val`, `test` and
any other key that names one are a folder of pictures, a list of them, or a .txt file with a picture a line. The label
file is where the last `images` of the picture's path is `labels`, else beside the picture; a picture with an empty one
or none has no object. A line of more numbers is a polygon, and gives the box around it; where the file states
`kpt_shape`, key points follow the box. Without a .yaml file, `classes.txt` or `obj.names` must name the classes.
Source: docs.ultralytics.com, "Object Detection Datasets Overview".

Everything lies below the folder of the .yaml file: a `path` or a split that leads out of it is looked for inside, by the
same name without the way out (`../train/images` is common where files were moved), and else refused. A size is read from
a picture's head, when the sample is built.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from vlmdet.boxes import BoxFormat
from vlmdet.data.readers.locate import SUFFIXES
from vlmdet.data.readers.rows import Rows
from vlmdet.data.readers.values import SPLIT_NAMES, read_text, safe_path
from vlmdet.errors import DataError
from vlmdet.records import DetectionDataset

BOX_FORMAT = BoxFormat("cxcywh", "fraction")
LARGEST_YAML = 1_000_000
"""Bytes above which a .yaml file is refused."""

_NO_SPLIT = ("path", "names", "nc", "download", "kpt_shape", "flip_idx", "roboflow", "yaml_file", "channels")


class _Config(NamedTuple):
    """What the .yaml file says: `splits`, name -> folders, files and lists as written."""

    file: Path
    root: Path
    splits: dict[str, list[str]]
    names: dict[int, str]
    has_points: bool


def find_config(path: Path) -> list[Path]:
    """Return the .yaml file of a set: `path` itself, or the one in it that names classes and a split."""
    if path.is_file():
        return [path] if path.suffix.lower() in (".yaml", ".yml") else []
    return [file for file in sorted(path.glob("*.y*ml")) if _is_config(file)]


def _is_config(file: Path) -> bool:
    try:
        document = _parse(file)
    except DataError:  # some other file that happens to lie there; a named one is refused with its reason
        return False
    return "names" in document and bool({"train", "val", "valid", "test"} & set(document))


def find_plain(path: Path) -> list[Path]:
    """Return the file of class names of a folder of pictures and labels that has no .yaml file."""
    if not path.is_dir() or not (path / "labels").is_dir():
        return []
    return [file for name in ("classes.txt", "obj.names") if (file := path / name).is_file()]


def read_yolo(
    path: Path, *, box_format: BoxFormat | None = None, exif: str | None = None, split: str | None = None
) -> DetectionDataset:
    """Read a YOLO set.

    Input: `path`, a .yaml file or a folder; `box_format` where the lines hold something else; `exif` and `split` as
    `open_dataset`.
    Output: a `DetectionDataset` with every class that the file names, in its order.

    Raises:
        DataError: no or a broken .yaml file, no class names, no split that is there, no label file at all, most boxes
            misfit, or no such split.
    """
    files = find_config(path)
    if path.is_file() and not files:
        raise DataError(f"{path} is no .yaml file", "name a data.yaml, or the folder that holds it")
    if len(files) > 1:
        raise DataError(f"{path} holds {len(files)} YOLO files", f"name one: {', '.join(map(str, files))}")
    rows = Rows(str(path), split=split, exif=exif)
    config = _read_config(files[0]) if files else _plain_config(path)
    for name in config.names.values():
        rows.label_number(name)
    pictures = {name: list(_pictures(rows, config, name, given)) for name, given in config.splits.items()}
    absent = {name: " and ".join(config.splits[name]) for name, found in pictures.items() if not found}
    if len(absent) == len(pictures):
        said = ", ".join(f"{name}: {given}" for name, given in absent.items())
        raise DataError(
            f"{config.file}: no split that it names has a picture ({said})", f"they are looked for in {config.root}"
        )
    for name, given in absent.items():
        rows.notes.append(f"{config.file} names the split {name}, but there is no picture in {given}")
    counts: Counter[str] = Counter()
    for name, found in pictures.items():
        if found:
            rows.add_split(name)
            _read_split(rows, config, name, found, counts)
    if counts["files"] == 0:
        raise DataError(
            f"{path}: none of {len(rows)} pictures has a label file", "put them into labels/, or beside the pictures"
        )
    if counts["absent"]:
        rows.notes.append(f"{counts['absent']} pictures have no label file and are taken to have no object")
    if counts["polygons"]:
        rows.notes.append(f"{counts['polygons']} lines are polygons; the box around each is taken")
    return rows.finish(stated=BOX_FORMAT, why="defined by YOLO", given=box_format)


def _parse(file: Path) -> Mapping[str, Any]:
    text = read_text(file, LARGEST_YAML)
    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        detail = " ".join(str(error).split())[:200]  # PyYAML answers some texts with errors of Python's own
        raise DataError(f"{file} is no valid YAML ({detail})", "check indentation and quotes") from error
    if not isinstance(document, Mapping):
        raise DataError(f"{file} is no mapping", "a YOLO file has path, train, val and names")
    return document


def _read_config(file: Path) -> _Config:
    document = _parse(file)
    root = file.parent
    where = document.get("path")
    if isinstance(where, str) and where:
        folder = _inside(root, root, where)
        root = folder if folder is not None and folder.is_dir() else root
    splits: dict[str, list[str]] = {}
    for key, value in document.items():
        given = [value] if isinstance(value, str) else value
        if key in _NO_SPLIT or not isinstance(key, str) or not isinstance(given, list):
            continue
        if key in ("train", "val", "test", *SPLIT_NAMES) or any(isinstance(one, str) and "/" in one for one in given):
            splits.setdefault(SPLIT_NAMES.get(key, key), []).extend(str(one) for one in given if one)
    if not splits:
        raise DataError(f"{file} names no split; it has {', '.join(map(str, document))[:200]}", "it needs train or val")
    names = document.get("names")
    pairs = list(enumerate(names) if isinstance(names, list) else names.items() if isinstance(names, Mapping) else [])
    known: dict[int, str] = {}
    for number, name in pairs:
        if isinstance(number, str) and number.isdecimal() and len(number) < 10:
            number = int(number)
        if not isinstance(number, int) or isinstance(name, list | Mapping) or not str(name).strip():
            raise DataError(
                f"{file}: names holds {number!r}: {name!r}"[:300], "write a number and a name for each class"
            )
        known[number] = str(name)
    if not known:
        raise DataError(f"{file} has no class names", "write them below names, as a list or as number: name")
    if len(set(known.values())) < len(known):
        twice = [name for name, count in Counter(known.values()).items() if count > 1]
        raise DataError(f"{file}: two classes are named '{twice[0][:80]}'", "give each a name of its own")
    return _Config(file, root, splits, known, "kpt_shape" in document)


def _plain_config(path: Path) -> _Config:
    files = find_plain(path)
    if not files:
        raise DataError(f"{path} holds no .yaml file with names and train or val", "name it, or add classes.txt")
    names = [line.strip() for line in read_text(files[0]).splitlines() if line.strip()]
    pictures = path / "images" if (path / "images").is_dir() else path
    parts = [name for name in ("train", "val", "valid", "test") if (pictures / name).is_dir()]
    folders = {SPLIT_NAMES.get(name, name): [str((pictures / name).relative_to(path))] for name in parts}
    folders = folders or {"train": [str(pictures.relative_to(path))]}
    return _Config(files[0], path, folders, dict(enumerate(names)), False)


def _inside(root: Path, folder: Path, name: str) -> Path | None:
    """Return the path that is meant below `root`; where `name` leads out, the same without its way out."""
    if os.path.normpath(os.path.join(folder, name)) == os.path.normpath(root):
        return root
    path = safe_path(folder, name, root)
    if path is None:
        parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
        path = safe_path(folder, "/".join(parts), root) if parts else None
    return path


def _pictures(rows: Rows, config: _Config, split: str, given: list[str]) -> Iterator[tuple[Path, str]]:
    """Yield the pictures of a split and their ids, in the order of their names or of the list."""
    for name in given:
        path = _inside(config.file.parent, config.root, name)
        if path is None or not path.exists():
            path = _inside(config.file.parent, config.file.parent, name)
        if path is None:
            rows.report(
                split, str(config.file), None, "", "path_outside", f"{split}: '{name[:200]}' is refused", "row_dropped"
            )
        elif path.is_dir():
            for folder, folders, files in os.walk(path):
                folders.sort()
                below = os.path.relpath(folder, path)
                start = "" if below == "." else f"{below}/"
                for file in sorted(files):
                    if file.lower().endswith(SUFFIXES):
                        yield Path(folder, file), start + file.rpartition(".")[0]
        elif path.is_file() and path.suffix.lower() == ".txt":
            yield from _listed(rows, config, split, path)
        elif path.is_file() and path.suffix.lower() in SUFFIXES:
            yield path, path.stem


def _listed(rows: Rows, config: _Config, split: str, file: Path) -> Iterator[tuple[Path, str]]:
    """Yield the pictures that a list names, below the list's folder or the root."""
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        name = line.strip()
        if not name:
            continue
        folders = (file.parent, config.root, config.file.parent)
        paths = [path for folder in folders if (path := safe_path(folder, name, config.file.parent))]
        if not paths:
            said = f"'{name[:200]}' is no path inside {config.file.parent}"
            rows.report(split, str(file), number, f"{file.name}:{number}", "path_outside", said, "row_dropped")
            continue
        there = next((path for path in paths if path.is_file()), None)
        if there is None:
            said = f"'{name[:200]}' is not there"
            rows.report(split, str(file), number, f"{file.name}:{number}", "missing_image", said, "row_dropped")
        else:
            yield there, there.stem


def _read_split(
    rows: Rows, config: _Config, split: str, pictures: list[tuple[Path, str]], counts: Counter[str]
) -> None:
    known = [rows.label_number(name) for name in config.names.values()]
    numbers = dict(zip(config.names, known, strict=True))
    listings: dict[str, set[str]] = {}
    for picture, sample_id in pictures:
        file = _label_file(picture, config, listings)
        row = rows.add(sample_id, split, str(picture), file=str(file or picture), is_file_name=True)
        if file is None:
            counts["absent"] += 1
            continue
        counts["files"] += 1
        try:
            text = read_text(file)
        except DataError as error:
            rows.drop(row, "broken_labels", error.message)
            continue
        for place, line in enumerate(text.splitlines(), start=1):
            words = line.split()
            if not words:
                continue
            found = _understand(words, has_points=config.has_points)
            if isinstance(found, str):
                rows.report_row(row, "bad_box", f"line {place}: {found}: {line[:80]}", "box_dropped", place)
                continue
            number, box = found
            if number not in numbers:
                said = f"line {place} is of the class {number}, which {config.file.name} does not name"
                rows.report_row(row, "unknown_category", said, "box_dropped", place)
                continue
            counts["polygons"] += len(words) > 5 and not config.has_points
            rows.add_numbers(row, box, numbers[number], place)


def _label_file(picture: Path, config: _Config, listings: dict[str, set[str]]) -> Path | None:
    """Return the label file of a picture, where there is one; a folder is listed once."""
    parts = list(picture.parent.parts)
    folders = [picture.parent]
    for at in range(len(parts) - 1, len(config.file.parent.parts) - 1, -1):
        if parts[at] == "images":
            folders.insert(0, Path(*parts[:at], "labels", *parts[at + 1 :]))
            break
    folders.append(config.root / "labels")
    for folder in folders:
        key = str(folder)
        if key not in listings:
            listings[key] = set(os.listdir(folder)) if folder.is_dir() else set()
        if f"{picture.stem}.txt" in listings[key]:
            return folder / f"{picture.stem}.txt"
    return None


def _understand(words: list[str], *, has_points: bool) -> tuple[int, list[float]] | str:
    """Return class number and box of a line, or what is wrong with it."""
    try:
        number, values = float(words[0]), [float(word) for word in words[1:]]
    except ValueError:
        return "it is not all numbers"
    if not number.is_integer() or not all(map(math.isfinite, values)):
        return "it is not all finite numbers"
    if len(values) == 4 or (has_points and len(values) > 4):
        return int(number), values[:4]
    if len(values) < 6 or len(values) % 2:
        return f"it has {len(words)} numbers, and is neither a box (5) nor a polygon (7, 9, …)"
    xs, ys = values[0::2], values[1::2]
    width, height = max(xs) - min(xs), max(ys) - min(ys)
    return int(number), [min(xs) + width / 2, min(ys) + height / 2, width, height]

"""Read COCO detection JSON, and Roboflow's layout of it.

When: ONCE, by `open_dataset`. A set is a file, or a folder with one of

    annotations/instances_train2017.json, instances_val2017.json     pictures in train2017/, images/train2017/, images/
    train/_annotations.coco.json, valid/…, test/…                    pictures beside the file (Roboflow)
    any other .json file with images, annotations and categories

    {"images": [{"id": 139, "file_name": "000000000139.jpg", "width": 640, "height": 426}],
     "annotations": [{"id": 1, "image_id": 139, "category_id": 64, "bbox": [236.98, 142.51, 24.7, 69.5], "iscrowd": 0}],
     "categories": [{"id": 64, "name": "potted plant"}]}

Boxes are `xywh/pixel`. Category ids need not be contiguous; names keep their order, and those without a box too, except
the supercategory that Roboflow lists among the classes. Regions of a crowd (`iscrowd`) are no boxes of one object: they
are reported, stand as they are written in the sample's `meta["crowd"]`, and in its `crowd`, on which scoring counts no
prediction as false. Masks are passed over, polygons and RLE alike, since the box stands beside them; where it does not,
polygons give it. A picture's id is its file name without the suffix, or its field `name`; the file's own number stands
in `meta["coco_id"]`. Source: cocodataset.org, "Data format".

A file is decoded record by record into typed structs, and a record into columns at once: plain `json` makes a
dictionary of each annotation and takes six times the memory.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from vlmdet.boxes import BoxFormat
from vlmdet.data.readers.locate import Finder
from vlmdet.data.readers.rows import Rows
from vlmdet.data.readers.values import side, split_name
from vlmdet.errors import DataError
from vlmdet.records import DetectionDataset

BOX_FORMAT = BoxFormat("xywh", "pixel")
ROBOFLOW = "_annotations.coco.json"


class _Image(msgspec.Struct, gc=False):
    id: int | str
    file_name: str
    width: int | float | str | None = None
    height: int | float | str | None = None
    name: str | None = None
    group: str | None = None


class _Annotation(msgspec.Struct, gc=False):
    image_id: int | str
    category_id: int | str
    bbox: tuple[float, float, float, float] | None = None
    iscrowd: int | bool | None = None


class _Polygons(msgspec.Struct, gc=False):
    segmentation: list[list[float]]


class _Category(msgspec.Struct, gc=False):
    id: int | str
    name: str
    supercategory: str | None = None


class _Document(msgspec.Struct, gc=False):
    images: list[msgspec.Raw]
    annotations: list[msgspec.Raw]
    categories: list[msgspec.Raw]


class _Records(NamedTuple):
    """The records of a file, and how one is made a struct of a type."""

    images: list[Any]
    annotations: list[Any]
    categories: list[Any]
    as_type: Callable[[Any], Callable[[Any], Any]]


def find_files(path: Path) -> list[Path]:
    """Return the annotation files of a set: `path` itself where it is one, else those in the usual places."""
    if path.is_file():
        return [path] if path.suffix.lower() == ".json" else []
    for pattern in ("annotations/instances_*.json", f"*/{ROBOFLOW}", ROBOFLOW, "instances_*.json"):
        if found := sorted(path.glob(pattern)):
            return found
    return [file for file in sorted([*path.glob("*.json"), *path.glob("annotations/*.json")]) if _is_coco(file)]


def _is_coco(file: Path, most: int = 1 << 20) -> bool:
    """Tell whether a file without a telling name is COCO, by the names in its first or last bytes."""
    try:
        with file.open("rb") as stream:
            head = stream.read(most)
            stream.seek(max(0, file.stat().st_size - most))
            text = head + stream.read(most)
    except OSError:
        return False
    return all(re.search(rb'"%s"\s*:\s*\[' % word, text) for word in (b"images", b"annotations", b"categories"))


def read_coco(
    path: Path, *, box_format: BoxFormat | None = None, exif: str | None = None, split: str | None = None
) -> DetectionDataset:
    """Read COCO files.

    Input: `path`, a file or a folder; `box_format` where the files hold something else than COCO's; `exif` and `split`
    as `open_dataset`.
    Output: a `DetectionDataset`, each file a split, by its name or that of its folder.

    Raises:
        DataError: no such file, one that is no COCO, most boxes misfit, or no such split.
    """
    files = find_files(path)
    if not files:
        raise DataError(f"{path} holds no COCO file", "name the .json file, or the folder above annotations/")
    root = path if path.is_dir() else path.parent.parent if path.parent.name == "annotations" else path.parent
    rows = Rows(str(path), split=split, exif=exif)
    numbers: list[int | str] = []
    supers: set[str] = set()
    for file in files:
        if len(files) > 1:
            rows.notes.append(f"{file} is the split {_split_of(file)}")
        _read_file(rows, file, root, numbers, supers)
    rows.extra["coco_id"] = numbers
    used = rows.used_labels()
    unused = [name for name in rows.labels if name in supers and name not in used]
    if unused and used:
        rows.notes.append(f"left out of the classes, as a supercategory without boxes: {', '.join(unused)}")
    labels = [name for name in rows.labels if not (used and name in unused)]
    return rows.finish(stated=BOX_FORMAT, why="defined by COCO", given=box_format, labels=labels)


def _split_of(file: Path) -> str:
    if file.name == ROBOFLOW:
        return split_name(file.parent.name)
    if file.stem.startswith("instances_"):
        own = re.sub(r"(?<=[A-Za-z])\d{4}$", "", file.stem.removeprefix("instances_"))
        return split_name(own, own or "train") if re.fullmatch(r"[A-Za-z]+", own) else own
    return split_name(file.stem)


def _read_file(rows: Rows, file: Path, root: Path, numbers: list[int | str], supers: set[str]) -> None:
    split, name = _split_of(file), str(file)
    records = _decode(file)
    rows.add_split(split)
    categories = _categories(rows, records, file, supers)

    folders = [file.parent / part for part in ("", "..", "images", "../images", f"../{split}", f"../images/{split}")]
    stem = file.stem.removeprefix("instances_")
    folders += [file.parent / f"../{stem}", file.parent / f"../images/{stem}", root / "JPEGImages", root]
    finder = Finder(root, [folder.resolve() if ".." in folder.parts else folder for folder in folders])
    by_id: dict[int | str, int] = {}
    decode = records.as_type(_Image)
    for place, record in enumerate(records.images):
        try:
            image = decode(record)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            rows.report(split, name, place, f"images[{place}]", "bad_row", f"images[{place}]: {error}", "row_dropped")
            continue
        if image.id in by_id:
            said = (
                f"images[{place}] has the id {image.id} of an earlier one, so its boxes cannot be told from that one's"
            )
            rows.report(split, name, place, f"images[{place}]", "duplicate_id", said, "row_dropped")
            continue
        picture = finder.find(image.file_name)
        if picture is None:
            said = f"file_name '{image.file_name[:200]}' is no path inside {finder.root}"
            rows.report(split, name, place, f"images[{place}]", "path_outside", said, "row_dropped")
            by_id[image.id] = -1
            continue
        by_id[image.id] = rows.add(
            image.name or image.file_name.rpartition(".")[0] or image.file_name,
            split,
            picture,
            file=name,
            place=place,
            width=side(image.width),
            height=side(image.height),
            group=image.group or "",
            is_file_name=image.name is None,
        )
        numbers.append(image.id)
    rows.notes += finder.note()
    _read_boxes(rows, records, by_id, categories, split, name)


def _categories(rows: Rows, records: _Records, file: Path, supers: set[str]) -> dict[int | str, int]:
    """Return category id -> number of its name."""
    decode = records.as_type(_Category)
    numbers: dict[int | str, int] = {}
    for place, record in enumerate(records.categories):
        try:
            category = decode(record)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise DataError(f"{file}: categories[{place}] is no category ({error})", "it needs id and name") from error
        if category.id in numbers:
            raise DataError(f"{file}: two categories have the id {category.id}", "give each its own")
        if not category.name.strip():
            raise DataError(f"{file}: the category {category.id} has no name")
        numbers[category.id] = rows.label_number(category.name)
        if category.supercategory and category.supercategory != category.name:
            supers.add(category.supercategory)
    return numbers


def _read_boxes(
    rows: Rows,
    records: _Records,
    by_id: Mapping[int | str, int],
    categories: Mapping[int | str, int],
    split: str,
    name: str,
) -> None:
    """Add the boxes; an annotation that cannot be used is reported by its place in the list."""
    decode, crowds = records.as_type(_Annotation), 0
    add, finite, labels = rows.add_numbers, math.isfinite, list(rows.labels)
    for place, record in enumerate(records.annotations):
        try:
            annotation = decode(record)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            detail = f"annotations[{place}]: {error}"
            rows.report(split, name, place, "", "bad_box", detail, "box_dropped")
            continue
        row = by_id.get(annotation.image_id)
        number = categories.get(annotation.category_id)
        box = annotation.bbox or _box_of_polygons(record, records)
        if row == -1:
            continue  # of a picture that was dropped and reported
        if row is None:
            detail = f"annotations[{place}] is on the picture {annotation.image_id}, which is not in images"
            rows.report(split, name, place, "", "unknown_image", detail, "box_dropped")
        elif number is None:
            detail = f"annotations[{place}] is of the category {annotation.category_id}, which is not in categories"
            rows.report_row(row, "unknown_category", detail, "box_dropped", place)
        elif box is None:
            detail = f"annotations[{place}] has neither a bbox nor polygons"
            rows.report_row(row, "bad_box", detail, "box_dropped", place)
        elif not (finite(box[0]) and finite(box[1]) and finite(box[2]) and finite(box[3])):
            detail = f"annotations[{place}] is not four finite numbers: {box}"
            rows.report_row(row, "bad_box", detail, "box_dropped", place)
        elif annotation.iscrowd:
            crowds += 1
            rows.meta_of(row).setdefault("crowd", []).append({"label": labels[number], "bbox": list(box)})
            detail = f"annotations[{place}] ({labels[number][:80]}) is a crowd's region, and stands in meta"
            rows.report_row(row, "crowd_box", detail, "box_dropped", place)
        else:
            if annotation.bbox is None:
                detail = f"annotations[{place}] has no bbox; it is that of its polygons"
                rows.report_row(row, "box_from_polygon", detail, "kept", place)
            add(row, box, number, place)
    if crowds:
        what = "are no boxes to learn; scoring counts nothing on them as false"
        rows.notes.append(f"{name}: {crowds} regions of crowds (iscrowd) {what}; they stand in meta['crowd']")


def _box_of_polygons(record: Any, records: _Records) -> tuple[float, float, float, float] | None:
    """Return x, y, width, height around the polygons of an annotation; None where it has none (RLE, or nothing)."""
    try:
        polygons = records.as_type(_Polygons)(record).segmentation
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    xs = [x for polygon in polygons for x in polygon[0::2]]
    ys = [y for polygon in polygons for y in polygon[1::2]]
    if len(xs) < 2 or len(xs) != len(ys):
        return None
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)


def _decode(file: Path) -> _Records:
    """Divide a file into its records.

    The fast way leaves each record as the bytes it is. A file that is no JSON to a strict reader may still be one to
    Python, which writes NaN and Infinity.
    """
    data = _read(file)
    try:
        document = msgspec.json.decode(data, type=_Document)
        return _Records(document.images, document.annotations, document.categories, _from_json)
    except msgspec.ValidationError as error:
        raise _not_coco(file, error) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        try:
            plain = json.loads(data.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            raise DataError(f"{file} is no whole JSON file ({error})", "write or download it again") from error
    if not isinstance(plain, dict):
        raise _not_coco(file, f"it is a {type(plain).__name__}")
    images, annotations, categories = (plain.get(key) for key in ("images", "annotations", "categories"))
    if not (isinstance(images, list) and isinstance(annotations, list) and isinstance(categories, list)):
        raise _not_coco(file, "images, annotations or categories is no list")
    return _Records(images, annotations, categories, _from_plain)


def _from_json(kind: Any) -> Callable[[Any], Any]:
    return msgspec.json.Decoder(kind).decode


def _from_plain(kind: Any) -> Callable[[Any], Any]:
    return lambda record: msgspec.convert(record, kind)


def _not_coco(file: Path, error: object) -> DataError:
    return DataError(f"{file} is no COCO detection file ({error})", "it needs images, annotations and categories")


def _read(file: Path) -> bytes:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror})") from error
    if not data:
        raise DataError(f"{file} is empty (0 bytes)", "write or download it again")
    return data

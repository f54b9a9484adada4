"""Read the rows of a Hugging Face data set: Parquet files on disk, or an id on the hub.

When: ONCE, by `open_dataset`. A row needs `image` and `objects`; this is one of
openfoodfacts/nutrition-table-detection:

    {"image_id": "3560070278831_1", "image": {"bytes": b"\\xff\\xd8…", "path": …}, "width": 900, "height": 1600,
     "meta": {"barcode": "3560070278831", "off_image_id": "1", "image_url": "https://…"},
     "objects": {"bbox": [[0.06, 0.39, 0.49, 0.84]], "category_id": [0], "category_name": ["nutrition-table"]}}

That set writes `yxyx/fraction`, and so does every set with its columns. Of any other the box format must be named: four
numbers do not tell. Rows are counted from 0. Pictures stay in the file until they are asked for; only their first bytes
are read here, since a picture that its EXIF tag turns has two sizes, and the one that the row states says which way up
its boxes are.
"""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, TiffImagePlugin

from vlmdet.boxes import BoxFormat
from vlmdet.data.readers.rows import SplitRows, assemble, check_boxes, safe_path
from vlmdet.data.synthetic.packages import CATEGORIES
from vlmdet.errors import DataError, ImageError
from vlmdet.images import BROKEN, orientation
from vlmdet.records import DetectionDataset, Sample

NUTRITION_TABLES = "openfoodfacts/nutrition-table-detection"
_YXYX = BoxFormat("yxyx", "fraction")
_SPLIT_NAMES = {"validation": "val", "valid": "val", "dev": "val"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class _OutsideError(ImageError):
    """A row names a picture that does not lie with the data set."""


class _Names(NamedTuple):
    """How objects are named: `by_id` holds names by number, `known`, where not None, every name that is allowed."""

    by_id: Sequence[str]
    known: Sequence[str] | None


def is_hub_id(source: str) -> bool:
    """Tell whether a name can only be an id on the hub: `owner/name`, while there is no folder `owner` here."""
    return _HUB_ID.fullmatch(source) is not None and not Path(source).parent.exists()


def parquet_files(path: Path) -> dict[str, list[Path]]:
    """Return Parquet files by split: `val-00000-of-00001.parquet` is of `val`, a name without a split of `train`."""
    if path.is_file():
        found = [path] if path.suffix == ".parquet" else []
    else:
        found = sorted(path.glob("*.parquet")) or sorted((path / "data").glob("*.parquet"))
    files: dict[str, list[Path]] = {}
    for file in found:
        head = re.match(r"(train|validation|valid|val|dev|test)(?![A-Za-z0-9])", file.stem)
        shard = re.fullmatch(r"(\w+)-\d{5}-of-\d{5}", file.stem)
        name = head[1] if head else shard[1] if shard else "train"
        files.setdefault(_SPLIT_NAMES.get(name, name), []).append(file)
    return files


def read_parquet(path: Path, *, box_format: BoxFormat | None = None, split: str | None = None) -> DetectionDataset:
    """Read Parquet files with a column `objects`.

    Input: `path`, a file or a folder; `box_format` where the columns do not tell; `split` keeps one split.
    Output: a `DetectionDataset`.

    Raises:
        DataError: no Parquet file, a broken one, missing columns, an unknown box format, or no such split.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = parquet_files(path)
    if not files:
        raise DataError(f"{path} holds no .parquet file", "name the folder above data/*.parquet, or one file")
    places: dict[str, list[tuple[str, int]]] = {}
    for name, paths in files.items():
        for file in paths:
            try:
                rows = pq.read_metadata(file).num_rows
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{file} is no whole Parquet file ({error})", "write or download it again") from error
            places.setdefault(name, []).extend((str(file), number) for number in range(rows))
    loaded = _load("parquet", data_files={name: [str(file) for file in paths] for name, paths in files.items()})
    root = path.parent if path.is_file() else path
    return _read(str(path), loaded, places, [root], box_format, split)


def read_hub(source: str, *, box_format: BoxFormat | None = None, split: str | None = None) -> DetectionDataset:
    """Read a data set of the Hugging Face hub, from the local cache where it is there.

    Input: `source`, `owner/name`; else as `read_parquet`.

    Raises:
        DataError: the set cannot be fetched; else as `read_parquet`.
    """
    import datasets

    loaded = {_SPLIT_NAMES.get(name, name): rows for name, rows in _load(source).items()}
    places = {name: [(f"{source}/{name}", row) for row in range(len(rows))] for name, rows in loaded.items()}
    roots = [Path(datasets.config.HF_DATASETS_CACHE), Path(datasets.config.HF_CACHE_HOME)]
    return _read(source, loaded, places, roots, box_format, split)


def _load(source: str, **arguments: Any) -> dict[str, Any]:
    """Call `datasets.load_dataset` without its progress bars, its code from the hub, or its many kinds of errors."""
    import datasets

    silent = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return dict(datasets.load_dataset(source, **arguments))
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        # what the library raises: no connection, no such set, a private one, a file that its metadata does not fit
        where = ", ".join(file for files in arguments.get("data_files", {}).values() for file in files) or source
        raise DataError(
            f"{where} cannot be loaded ({str(error).strip()[:300]})",
            "check the name, the connection (HF_HUB_OFFLINE) and the access, or name a local folder",
        ) from error
    finally:
        if not silent:
            datasets.enable_progress_bars()


def _read(
    source: str,
    loaded: Mapping[str, Any],
    places: Mapping[str, Sequence[tuple[str, int]]],
    roots: Sequence[Path],
    box_format: BoxFormat | None,
    split: str | None,
) -> DetectionDataset:
    """Make samples of loaded splits; `places` gives file and row of each, `roots` where pictures by path may lie."""
    import datasets

    features = next(iter(loaded.values())).features
    missing = {"image", "objects"} - set(features)
    if missing:
        raise DataError(
            f"{source} has no column {' and '.join(sorted(missing))}; it has {', '.join(features)}",
            "an object detection set needs image, and objects with bbox",
        )
    chosen, decided_by, is_nutrition = _decide(source, features, box_format)
    rows_by_split = {name: rows.remove_columns("image") for name, rows in loaded.items()}
    names = _names(features, rows_by_split, is_nutrition)
    splits: dict[str, SplitRows] = {}
    ids: set[str] = set()
    beyond = total = 0
    for name, rows in rows_by_split.items():
        kept = splits.setdefault(name, SplitRows())
        pictures = loaded[name].select_columns("image").cast_column("image", datasets.Image(decode=False))
        for number, row in enumerate(rows):
            file, place = places[name][number]
            written_id = sample_id = _text(row.get("image_id")) or f"{name}/{number}"
            if written_id in ids:
                sample_id = f"{written_id}#{name}/{number}"
            ids.add(sample_id)
            row_report = kept.reporter(file, sample_id)
            report = functools.partial(row_report, place)
            if sample_id != written_id:
                report("duplicate_id", f"'{written_id}' is used before; this row is now '{sample_id}'", "kept")
            picture = functools.partial(_picture_bytes, pictures, number, tuple(roots), f"{file}:{place}")
            objects = _objects(row["objects"])
            if objects is None:
                report("bad_row", "objects is absent or its lists differ in length", "row_dropped")
                continue
            frame = _frame(picture, row, report)
            if frame is None:
                continue
            values, labels = _named(objects, names, report)
            total += len(values)
            beyond += sum(_is_beyond(value) for value in values) if chosen.unit == "fraction" else 0
            boxes, kept_labels = check_boxes(values, labels, chosen, frame.width, frame.height, row_report, row=place)
            meta = dict(row.get("meta") or {}) if isinstance(row.get("meta"), Mapping) else {}
            kept.samples.append(
                Sample(
                    id=sample_id,
                    picture=picture,
                    width=frame.upright[0],
                    height=frame.upright[1],
                    boxes=boxes.turned(frame.turn),
                    labels=kept_labels,
                    split=name,
                    group=_text(meta.get("barcode")),
                    source=f"{file}:{place}",
                    meta=meta,
                )
            )
    if beyond * 2 > total:
        raise DataError(
            f"{source} is read as {chosen} ({decided_by}), but {beyond} of {total} boxes have numbers over 1.5",
            "name the format that fits, e.g. --format yxyx/pixel",
        )
    seen = {label for rows in splits.values() for sample in rows.samples for label in sample.labels}
    order = list(names.by_id) + sorted(seen - set(names.by_id))
    labels = [label for label in order if label in seen] or list(names.by_id)
    return assemble(source, splits, labels, chosen, decided_by, split=split)


def _decide(source: str, features: Mapping[str, Any], given: BoxFormat | None) -> tuple[BoxFormat, str, bool]:
    """Return the box format, the reason for it, and whether the columns are those of the nutrition tables."""
    meta = features.get("meta")
    objects = _children(features["objects"])
    columns = {"image_id", "width", "height", "meta"} <= set(features) and {"bbox", "category_name"} <= set(objects)
    alike = columns and isinstance(meta, Mapping) and {"barcode", "off_image_id", "image_url"} <= set(meta)
    if "bbox" not in objects:
        raise DataError(f"{source}: objects has no bbox; it has {', '.join(objects) or 'no fields'}")
    is_nutrition = source == NUTRITION_TABLES or alike
    if given is not None:
        return given, "given by the user", is_nutrition
    if is_nutrition:
        how = "by its name" if source == NUTRITION_TABLES else "by its columns"
        return _YXYX, f"known {how}: {NUTRITION_TABLES} writes y_min, x_min, y_max, x_max as fractions", True
    raise DataError(
        f"{source} does not say how it writes boxes, and four numbers do not tell",
        "name it, e.g. --format xywh/pixel (COCO) or xyxy/pixel (Pascal VOC)",
    )


def _children(feature: Any) -> Mapping[str, Any]:
    """Return the fields of `objects`, which is a struct of lists or a list of structs."""
    inner = getattr(feature, "feature", feature)
    return inner if isinstance(inner, Mapping) else {}


def _names(features: Mapping[str, Any], rows_by_split: Mapping[str, Any], is_nutrition: bool) -> _Names:
    """Find the class names: those of a ClassLabel, or the four of the nutrition tables where one of them occurs."""
    for feature in _children(features["objects"]).values():
        names = getattr(getattr(feature, "feature", feature), "names", None)
        if names:
            return _Names(tuple(names), tuple(names))
    if is_nutrition:
        written = {
            name
            for rows in rows_by_split.values()
            for objects in rows.select_columns("objects")["objects"]
            for _, _, name in _objects(objects) or []
            if name
        }
        if not written or written & set(CATEGORIES):
            return _Names(CATEGORIES, CATEGORIES)
    return _Names((), None)


def _objects(objects: Any) -> list[tuple[Any, int | None, str]] | None:
    """Return (box, id, name) of every object; None where there is no such list."""
    if isinstance(objects, Mapping):
        lists = {key: values for key, values in objects.items() if isinstance(values, Sequence)}
        boxes = lists.get("bbox")
        if boxes is None or any(len(values) != len(boxes) for values in lists.values()):
            return None
        objects = [{key: values[number] for key, values in lists.items()} for number in range(len(boxes))]
    if not isinstance(objects, Sequence) or not all(isinstance(thing, Mapping) for thing in objects):
        return None
    found = []
    for thing in objects:
        number = next(
            (value for key in ("category_id", "category", "label") if isinstance(value := thing.get(key), int)), None
        )
        name = next(
            (value for key in ("category_name", "category", "label") if isinstance(value := thing.get(key), str)), ""
        )
        found.append((thing.get("bbox"), number, name.strip()))
    return found


def _named(
    objects: Sequence[tuple[Any, int | None, str]], names: _Names, report: functools.partial[None]
) -> tuple[list[Any], list[str]]:
    """Return boxes and names of the objects whose category is known; report the others."""
    values, labels = [], []
    for place, (value, number, name) in enumerate(objects, start=1):
        label = name
        if not label and number is not None and 0 <= number < len(names.by_id):
            label = names.by_id[number]
        if not label or (names.known is not None and label not in names.known):
            said = f"object {place} is of '{name[:80]}', id {number}"
            report("unknown_category", f"{said}; there is: {', '.join(names.by_id) or 'no name'}", "box_dropped")
            continue
        if name and names.by_id and number is not None and not 0 <= number < len(names.by_id):
            report(
                "category_conflict", f"object {place} is named '{name[:80]}', but its id {number} is unknown", "kept"
            )
        values.append(value)
        labels.append(label)
    return values, labels


class _Frame(NamedTuple):
    """`width` and `height` of the picture that the boxes are on, the `turn` that makes it `upright`, and that size."""

    width: int
    height: int
    turn: int
    upright: tuple[int, int]


def _frame(picture: functools.partial[bytes], row: Mapping[str, Any], report: functools.partial[None]) -> _Frame | None:
    """Decide which way up the boxes of a row are; None, with a problem, where the picture has no readable head."""
    try:
        raw, tag = _head(picture(), picture.args[-1])
    except ImageError as error:
        kind = "path_outside" if isinstance(error, _OutsideError) else "unreadable_image"
        report(kind, error.message, "row_dropped")
        return None
    upright = (raw[1], raw[0]) if tag >= 5 else raw
    width, height = row.get("width"), row.get("height")
    if not (isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0):
        if tag != 1:
            report("exif_rotated", f"EXIF orientation {tag} and no stated size: boxes are taken as upright", "kept")
        return _Frame(*upright, 1, upright)
    stated = (width, height)
    if tag == 1:
        if stated != raw:
            report("size_mismatch", f"stated as {width} x {height}, is {raw[0]} x {raw[1]}", "kept")
        return _Frame(*stated, 1, upright)
    if stated == raw != upright:
        said = f"EXIF orientation {tag}; boxes were written on the stored {width} x {height} and are turned upright"
        report("exif_rotated", said, "kept")
        return _Frame(*stated, tag, upright)
    if stated == upright != raw:
        return _Frame(*stated, 1, upright)
    if stated == upright:
        report("exif_rotated", f"EXIF orientation {tag} keeps {width} x {height}: boxes are taken as upright", "kept")
    else:
        said = f"stated as {width} x {height}, is {upright[0]} x {upright[1]} upright (EXIF orientation {tag})"
        report("size_mismatch", f"{said}: boxes are taken as upright", "kept")
    return _Frame(*stated, 1, upright)


def _head(data: bytes, name: str) -> tuple[tuple[int, int], int]:
    """Read size and EXIF orientation from a picture file's first bytes, without decoding it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                tag = orientation(image)
                # Pillow turns a TIFF itself: its size is already the upright one
                turned = isinstance(image, TiffImagePlugin.TiffImageFile) and tag >= 5
                return ((image.height, image.width) if turned else image.size), tag
    except (*BROKEN, Image.DecompressionBombError) as error:
        raise ImageError(f"{name}: not a picture that can be read ({len(data)} bytes)") from error


def _picture_bytes(pictures: Any, number: int, roots: tuple[Path, ...], name: str) -> bytes:
    """Return the file of one picture, from the row or from a path below one of `roots`."""
    stored = pictures[number]["image"] or {}
    if stored.get("bytes") is not None:
        return bytes(stored["bytes"])
    written = stored.get("path") or ""
    for root in roots:
        path = safe_path(root, written, root)
        if path is None and Path(written).is_absolute() and Path(written).is_relative_to(root.absolute()):
            path = safe_path(root, str(Path(written).relative_to(root.absolute())), root)
        if path is not None:
            try:
                return path.read_bytes()
            except OSError as error:
                raise ImageError(f"{name}: {path} cannot be read ({error.strerror})") from error
    raise _OutsideError(f"{name}: the picture '{written[:200]}' is no path inside {roots[0]}")


def _is_beyond(value: Any) -> bool:
    return isinstance(value, Sequence) and any(isinstance(number, float | int) and number > 1.5 for number in value)


def _text(value: Any) -> str:
    return "" if value is None else str(value)

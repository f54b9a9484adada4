"""Read the rows of a Hugging Face data set: Parquet files on disk, or an id on the hub.

When: ONCE, by `open_dataset`. A row needs `image` and objects; this is one of
openfoodfacts/nutrition-table-detection:

    {"image_id": "3560070278831_1", "image": {"bytes": b"\\xff\\xd8…", "path": …}, "width": 900, "height": 1600,
     "meta": {"barcode": "3560070278831", "off_image_id": "1", "image_url": "https://…"},
     "objects": {"bbox": [[0.06, 0.39, 0.49, 0.84]], "category_id": [0], "category_name": ["nutrition-table"]}}

That set writes `yxyx/fraction`, and so does every set with its columns. Of any other the numbers decide, or the user.
Other spellings of objects are in `objects.py`; their lists may also be columns of their own. Rows are counted from 0.

Pictures stay in the file until they are asked for. A sample's own picture is in its row, so its head is read when the
sample is built: a picture that its EXIF tag turns has two sizes, and the one that the row states says which way up its
boxes are.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlmdet.boxes import BoxFormat
from vlmdet.data.dataset import NUTRITION_LABELS, NUTRITION_TABLES
from vlmdet.data.readers.objects import CLASS, Thing, box_field, read_objects
from vlmdet.data.readers.rows import Rows
from vlmdet.data.readers.values import SPLIT_NAMES, safe_path, side
from vlmdet.errors import DataError, ImageError
from vlmdet.records import DetectionDataset

_YXYX = BoxFormat("yxyx", "fraction")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_AT_ONCE = 1000


class _Names(NamedTuple):
    """How objects are named: `by_id` holds names by number, `known`, where not None, every name that is allowed."""

    by_id: Sequence[str]
    known: Sequence[str] | None


class _Split(NamedTuple):
    """One split: its rows without pictures, and where a picture and a row come from."""

    rows: Iterable[Mapping[str, Any]]
    picture: Any
    place: Any


def is_hub_id(source: str) -> bool:
    """Tell whether a name can only be an id on the hub: `owner/name`, while there is no folder `owner` here."""
    return _HUB_ID.fullmatch(source) is not None and not Path(source).parent.exists()


def find_files(path: Path) -> list[Path]:
    """Return the Parquet files of a set: `path` itself, those in it, else those in its `data/`."""
    if path.is_file():
        return [path] if path.suffix == ".parquet" else []
    return sorted(path.glob("*.parquet")) or sorted((path / "data").glob("*.parquet"))


def files_by_split(path: Path) -> dict[str, list[Path]]:
    """Return Parquet files by split: `val-00000-of-00001.parquet` is of `val`, a name without a split of `train`."""
    files: dict[str, list[Path]] = {}
    for file in find_files(path):
        head = re.match(r"(train|validation|valid|val|dev|test)(?![A-Za-z0-9])", file.stem)
        shard = re.fullmatch(r"(.+)-\d{5}-of-\d{5}", file.stem)
        name = shard[1] if shard else head[1] if head else "train"
        files.setdefault(SPLIT_NAMES.get(name, name), []).append(file)
    return files


def read_parquet(
    path: Path, *, box_format: BoxFormat | None = None, exif: str | None = None, split: str | None = None
) -> DetectionDataset:
    """Read Parquet files with objects.

    Input: `path`, a file or a folder; `box_format`, `exif` and `split` as `open_dataset`.
    Output: a `DetectionDataset`.

    Raises:
        DataError: no Parquet file, a broken one, missing columns, numbers that do not tell, or no such split.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = files_by_split(path)
    if not files:
        raise DataError(f"{path} holds no .parquet file", "name the folder above data/*.parquet, or one file")
    counts: dict[str, list[tuple[str, int]]] = {}
    for name, paths in files.items():
        for file in paths:
            try:
                counts.setdefault(name, []).append((str(file), pq.read_metadata(file).num_rows))
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{file} is no whole Parquet file ({error})", "write or download it again") from error
    # one name a split is safe whatever its letters are: the library refuses some names
    keys = {f"split{number}": name for number, name in enumerate(files)}
    loaded = _load("parquet", data_files={key: [str(file) for file in files[name]] for key, name in keys.items()})
    tables = {keys[key]: rows for key, rows in loaded.items()}
    places = {name: functools.partial(_place_in, shards) for name, shards in counts.items()}
    return _read(str(path), tables, places, [path.parent if path.is_file() else path], box_format, exif, split)


def read_hub(
    source: str,
    *,
    box_format: BoxFormat | None = None,
    exif: str | None = None,
    split: str | None = None,
    stream: int | None = None,
) -> DetectionDataset:
    """Read a data set of the Hugging Face hub, from the local cache where it is there.

    Input: `source`, `owner/name`; `stream`, fetch so many rows of each split, and keep their pictures in memory, instead
    of downloading the set; else as `read_parquet`.

    Raises:
        DataError: the set cannot be fetched; else as `read_parquet`.
    """
    import datasets

    loaded = _load(source, **({} if stream is None else {"streaming": True}))
    tables = {SPLIT_NAMES.get(name, name): rows for name, rows in loaded.items()}
    places = {name: functools.partial(_place_on_hub, f"{source}/{name}") for name in tables}
    roots = [Path(datasets.config.HF_DATASETS_CACHE), Path(datasets.config.HF_CACHE_HOME)]
    return _read(source, tables, places, roots, box_format, exif, split, stream=stream)


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
    tables: Mapping[str, Any],
    places: Mapping[str, functools.partial[tuple[str, int]]],
    roots: Sequence[Path],
    box_format: BoxFormat | None,
    exif: str | None,
    split: str | None,
    stream: int | None = None,
) -> DetectionDataset:
    """Make the data set of loaded splits; `places` gives file and row, `roots` where pictures by path may lie."""
    features = next(iter(tables.values())).features
    if features is None:  # a stream of files without a schema
        features = dict.fromkeys(next(iter(next(iter(tables.values()))), {}))
    objects = "objects" if "objects" in features or box_field(features) is None else ""
    missing = {"image", *([objects] if objects else [])} - set(features)
    if missing:
        raise DataError(
            f"{source} has no column {' and '.join(sorted(missing))}; it has {', '.join(features)}",
            "an object detection set needs image, and objects with bbox",
        )
    stated, why, is_nutrition = _known_format(source, features, objects)
    rows = Rows(source, split=split, exif=exif)
    opened = {name: _open(table, places[name], tuple(roots), stream) for name, table in tables.items()}
    names = _names(features, opened, objects, is_nutrition=is_nutrition)
    if stream is not None:
        rows.notes.append(f"streamed: the first {stream} rows of each split, pictures kept in memory")
    for name, part in opened.items():
        rows.add_split(name)
        for number, row in enumerate(part.rows):
            file, place = part.place(number)
            _read_row(rows, name, file, place, row, objects, part.picture(number), names)
    seen = [name for name in names.by_id if name in rows.labels]
    declared = seen if seen and names.by_id is NUTRITION_LABELS else names.by_id  # that set seldom has all of its four
    labels = [*declared, *sorted(set(rows.labels) - set(names.by_id))]
    return rows.finish(stated=stated, why=why, given=box_format, labels=labels, reads_heads=True)


def _open(table: Any, place: functools.partial[tuple[str, int]], roots: tuple[Path, ...], stream: int | None) -> _Split:
    """Divide a split into what is read now and pictures that are read later."""
    import datasets

    raw = table.cast_column("image", datasets.Image(decode=False)) if _is_picture(table) else table
    if stream is not None:
        kept = list(itertools.islice(raw, stream))
        pictures = [row.pop("image") for row in kept]
        return _Split(
            kept, lambda number: functools.partial(_bytes, pictures[number], roots, _name(place, number)), place
        )
    column = raw.select_columns("image")

    def picture(number: int) -> functools.partial[bytes]:
        return functools.partial(_picture_bytes, column, number, roots, _name(place, number))

    return _Split(_Again(table.remove_columns("image")), picture, place)


def _is_picture(table: Any) -> bool:
    return table.features is not None and type(table.features["image"]).__name__ == "Image"


class _Again:
    """Rows that can be walked more than once, fetched some at a time."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for batch in self._rows.iter(batch_size=_AT_ONCE):
            keys = list(batch)
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(keys, values, strict=True))


def _read_row(
    rows: Rows,
    split: str,
    file: str,
    place: int,
    row: Mapping[str, Any],
    objects: str,
    picture: functools.partial[bytes],
    names: _Names,
) -> None:
    sample_id = _text(row.get("image_id")) or f"{split}/{place}"
    things = read_objects(row.get(objects) if objects else row)
    if things is None:
        said = "objects is absent or its lists differ in length"
        rows.report(split, file, place, f"{sample_id} (row {place})", "bad_row", said, "row_dropped")
        return
    meta = dict(row.get("meta") or {}) if isinstance(row.get("meta"), Mapping) else {}
    number = rows.add(
        sample_id,
        split,
        picture,
        file=file,
        place=place,
        width=side(row.get("width")),
        height=side(row.get("height")),
        group=_text(meta.get("barcode")),
        meta=meta,
    )
    for count, thing in enumerate(things, start=1):
        label = _label(thing, names)
        if label is None:
            said = f"object {count} is of '{thing.name[:80]}', id {thing.number}"
            said += f"; there is: {', '.join(names.by_id)[:500] or 'no name'}"
            rows.report_row(number, "unknown_category", said, "box_dropped")
            continue
        if thing.name and names.by_id and thing.number is not None and not 0 <= thing.number < len(names.by_id):
            said = f"object {count} is named '{thing.name[:80]}', but its id {thing.number} is unknown"
            rows.report_row(number, "category_conflict", said, "kept")
        rows.add_box(number, thing.box, label, place)


def _known_format(source: str, features: Mapping[str, Any], objects: str) -> tuple[BoxFormat | None, str, bool]:
    """Return the box format where the set is known, why, and whether its columns are those of the nutrition tables."""
    fields = _children(features[objects]) if objects else features
    if box_field(fields) is None and fields:
        raise DataError(f"{source}: objects has no bbox; it has {', '.join(fields)}")
    meta = features.get("meta")
    columns = {"image_id", "width", "height", "meta"} <= set(features) and {"bbox", "category_name"} <= set(fields)
    alike = columns and isinstance(meta, Mapping) and {"barcode", "off_image_id", "image_url"} <= set(meta)
    if source != NUTRITION_TABLES and not alike:
        return None, "", False
    how = "by its name" if source == NUTRITION_TABLES else "by its columns"
    return _YXYX, f"known {how}: {NUTRITION_TABLES} writes y_min, x_min, y_max, x_max as fractions", True


def _children(feature: Any) -> Mapping[str, Any]:
    """Return the fields of `objects`, which is a struct of lists or a list of structs."""
    inner = getattr(feature, "feature", feature)
    return inner if isinstance(inner, Mapping) else {}


def _names(features: Mapping[str, Any], opened: Mapping[str, _Split], objects: str, *, is_nutrition: bool) -> _Names:
    """Find the class names: those of a ClassLabel, or the four of the nutrition tables where one of them occurs."""
    fields = _children(features[objects]) if objects else features
    for key in CLASS:
        feature = fields.get(key)
        names = getattr(getattr(feature, "feature", feature), "names", None)
        if names:
            return _Names(tuple(names), tuple(names))
    if is_nutrition:
        written = {
            thing.name
            for part in opened.values()
            for row in part.rows
            for thing in read_objects(row.get("objects")) or []
            if thing.name
        }
        if not written or written & set(NUTRITION_LABELS):
            return _Names(NUTRITION_LABELS, NUTRITION_LABELS)
    return _Names((), None)


def _label(thing: Thing, names: _Names) -> str | None:
    """Return the class name of an object; None where it is unknown."""
    label = thing.name
    if not label and thing.number is not None and 0 <= thing.number < len(names.by_id):
        label = names.by_id[thing.number]
    return label if label and (names.known is None or label in names.known) else None


def _place_in(shards: Sequence[tuple[str, int]], number: int) -> tuple[str, int]:
    """Return the file and the row in it of a split's row."""
    for file, count in shards:
        if number < count:
            return file, number
        number -= count
    return shards[-1][0], number


def _place_on_hub(name: str, number: int) -> tuple[str, int]:
    return name, number


def _name(place: functools.partial[tuple[str, int]], number: int) -> str:
    file, row = place(number)
    return f"{file}:{row}"


def _picture_bytes(pictures: Any, number: int, roots: tuple[Path, ...], name: str) -> bytes:
    """Return the file of one picture, from the row or from a path below one of `roots`."""
    return _bytes(pictures[number]["image"], roots, name)


def _bytes(stored: Any, roots: tuple[Path, ...], name: str) -> bytes:
    if isinstance(stored, bytes):
        return stored
    said = stored if isinstance(stored, Mapping) else {"path": stored}
    if said.get("bytes") is not None:
        return bytes(said["bytes"])
    written = _text(said.get("path"))
    for root in roots:
        path = safe_path(root, written, root)
        if path is not None:
            try:
                return path.read_bytes()
            except OSError as error:
                raise ImageError(f"{name}: {path} cannot be read ({error.strerror})") from error
    raise ImageError(f"{name}: the picture '{written[:200]}' is no path inside {roots[0]}")


def _text(value: Any) -> str:
    return "" if value is None else str(value)

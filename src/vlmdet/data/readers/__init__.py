"""Read a data set, whatever its layout, into one `DetectionDataset`.

When: ONCE per command. `open_dataset` looks at what is named and calls the reader of its layout:

    data.yaml with names and train or val                 yolo.py        YOLO
    a folder with Annotations/ and JPEGImages/            voc.py         Pascal VOC
    instances_*.json, _annotations.coco.json              coco.py        COCO, and Roboflow's layout of it
    train.jsonl, metadata.jsonl                           jsonl.py       JSON lines
    a .parquet file, or a folder with *.parquet in it     hub.py         the rows of a Hugging Face data set, on disk
    a .csv file beside pictures                           csv_table.py   one row a box
    owner/name                                            hub.py         a data set on the Hugging Face hub

Pictures stay closed; a reader reads annotations, and heads of pictures where boxes are in pixels and no size is stated.
Samples are built when they are asked for (`lazy.py`), so that 100,000 rows open in seconds and stay small.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from vlmdet.boxes import BoxFormat
from vlmdet.data.readers import coco, csv_table, hub, jsonl, voc, yolo
from vlmdet.errors import DataError, did_you_mean
from vlmdet.records import DetectionDataset


class _Layout(NamedTuple):
    """A layout: its name for people, what of a path speaks for it ("" for nothing), and its reader."""

    title: str
    sign: Callable[[Path], str]
    read: Callable[..., DetectionDataset]


def _sign_of_voc(path: Path) -> str:
    root = voc.find_root(path)
    return f"{root / 'Annotations'} is there" if root else ""


def _sign_of_files(find: Callable[[Path], list[Path]]) -> Callable[[Path], str]:
    def sign(path: Path) -> str:
        found = find(path)
        return f"{found[0]} is there" if found else ""

    return sign


LAYOUTS = {
    "yolo": _Layout(
        "YOLO", _sign_of_files(lambda path: yolo.find_config(path) or yolo.find_plain(path)), yolo.read_yolo
    ),
    "voc": _Layout("Pascal VOC", _sign_of_voc, voc.read_voc),
    "coco": _Layout("COCO", _sign_of_files(coco.find_files), coco.read_coco),
    "jsonl": _Layout("JSON lines", _sign_of_files(jsonl.find_files), jsonl.read_jsonl),
    "hub": _Layout("Parquet", _sign_of_files(hub.find_files), hub.read_parquet),
    "csv": _Layout("CSV", _sign_of_files(csv_table.find_files), csv_table.read_csv),
}
"""In the order in which `auto` asks for them."""

FORMATS = ("auto", *LAYOUTS)


def open_dataset(
    source: str | Path,
    *,
    format: str = "auto",
    box_format: str | BoxFormat | None = None,
    exif: str | None = None,
    split: str | None = None,
    stream: int | None = None,
) -> DetectionDataset:
    """Open a data set by path or by hub id.

    When: once per command; prints nothing.

    Input: `source`, a folder, a file or `owner/name`; `format`, a layout, one of `FORMATS`; `box_format` such as
    `xywh/pixel`, for a set whose layout does not define one and whose numbers do not tell; `exif`, `applied` or `ignored`,
    for turned pictures whose rows do not tell which way up their boxes are; `split` keeps one split; `stream`, of a hub
    data set, fetches so many rows of each split instead of all.
    Output: a `DetectionDataset`; its `decided_by` says why the box format is what it is, its `notes` which reader was
    chosen and why, `problems` what was dropped, cut or odd.

    Raises:
        DataError: there is no such source, its layout is not recognised, it cannot be read, how it writes boxes cannot be
            told, or it has no such split.
        ConfigError: `box_format` or `exif` is unknown.
    """
    if format not in FORMATS:
        hint = f"a box format goes to --box-format {format}" if "/" in format else did_you_mean(format, FORMATS)
        raise DataError(f"unknown format '{format}'", hint)
    given = BoxFormat.parse(box_format) if isinstance(box_format, str) else box_format
    path = Path(source)
    if not path.exists():
        if format in ("auto", "hub") and isinstance(source, str) and hub.is_hub_id(source):
            return hub.read_hub(source, box_format=given, exif=exif, split=split, stream=stream)
        raise _missing(path)
    if stream is not None:
        raise DataError(f"{path} is on disk and is not streamed", "leave data.stream out, or take --limit")
    if format != "auto":
        return LAYOUTS[format].read(path, box_format=given, exif=exif, split=split)
    signs = {name: sign for name, layout in LAYOUTS.items() if (sign := layout.sign(path))}
    if not signs:
        raise DataError(
            f"{path} is no data set that can be read: it holds {_listing(path)}",
            "name a folder with a data.yaml (YOLO), Annotations/ (Pascal VOC), instances_*.json (COCO), *.jsonl, "
            "*.parquet or *.csv, or one such file",
        )
    name, *others = signs
    layout = LAYOUTS[name]
    note = f"read as {layout.title}: {signs[name]}"
    if others:
        note += "; also there: " + ", ".join(f"{LAYOUTS[other].title} (--format {other})" for other in others)
    dataset = layout.read(path, box_format=given, exif=exif, split=split)
    return replace(dataset, notes=(note, *dataset.notes))


def _missing(path: Path) -> DataError:
    """Say which part of a path exists and what lies there."""
    known = path.absolute().parent
    while not known.exists():
        known = known.parent
    return DataError(f"there is no {path}; {known} holds {_listing(known)}", "check the path")


def _listing(path: Path, most: int = 8) -> str:
    if path.is_file():
        return f"{path.stat().st_size:,} bytes and ends with '{path.suffix}'"
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in path.iterdir())
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) + more) or "nothing"

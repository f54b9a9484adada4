"""Read a data set, whatever its layout, into one `DetectionDataset`.

When: ONCE per command. `open_dataset` looks at what is named and calls the reader of its layout:

    a folder with Annotations/ and JPEGImages/            voc.py   Pascal VOC
    a .parquet file, or a folder with *.parquet in it     hub.py   the rows of a Hugging Face data set, on disk
    owner/name                                            hub.py   a data set on the Hugging Face hub

Pictures stay closed; a reader reads annotations, and a Parquet picture's first bytes where its turn decides on the
boxes.
"""

from __future__ import annotations

from pathlib import Path

from vlmdet.boxes import BoxFormat
from vlmdet.data.readers import hub, voc
from vlmdet.errors import DataError, did_you_mean
from vlmdet.records import DetectionDataset

LAYOUTS = ("auto", "voc", "hub")


def open_dataset(source: str | Path, *, format: str = "auto", split: str | None = None) -> DetectionDataset:
    """Open a data set by path or by hub id.

    When: once per command; prints nothing.

    Input: `source`, a folder, a Parquet file or `owner/name`; `format`, a layout (`voc`, `hub`) or, for a Parquet set
    that does not say how it writes boxes, a box format such as `xywh/pixel`; `split` keeps one split.
    Output: a `DetectionDataset`; its `decided_by` says why the box format is what it is, `problems` what was dropped.

    Raises:
        DataError: there is no such source, its layout is not recognised, or it has no such split.
        ConfigError: `format` names an unknown order or unit.
    """
    box_format = BoxFormat.parse(format) if "/" in format else None
    layout = "hub" if box_format else format
    if layout not in LAYOUTS:
        raise DataError(f"unknown format '{format}'", did_you_mean(format, (*LAYOUTS, "yxyx/fraction")))
    path = Path(source)
    if not path.exists():
        if layout != "voc" and isinstance(source, str) and hub.is_hub_id(source):
            return hub.read_hub(source, box_format=box_format, split=split)
        raise _missing(path)
    if layout == "voc" or (layout == "auto" and voc.find_root(path) is not None):
        return voc.read_voc(path, split=split)
    if layout == "hub" or hub.parquet_files(path):
        return hub.read_parquet(path, box_format=box_format, split=split)
    raise DataError(
        f"{path} is no data set that can be read: it holds {_listing(path)}",
        "name a folder with Annotations/ and JPEGImages/ (Pascal VOC), or with *.parquet files",
    )


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

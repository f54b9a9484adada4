"""Read CSV tables beside pictures: one row a box, columns found by their names, never by their place.

When: ONCE, by `open_dataset`. A set is a file, or a folder with one or several, each a split by its name:

    filename,cell_type,xmin,xmax,ymin,ymax
    BloodImage_00000.jpg,WBC,260,491,177,376

Names of sides tell the order: xmin ymin xmax ymax, x1 y1 x2 y2, left top right bottom; x y w h; cx cy w h; in any case
and with or without `bbox_`. The unit no name tells: the numbers decide it, or `--box-format`. `width` and `height` are
the picture's, where the sides are named otherwise. A row whose four sides are empty is a picture without an object; so is
no picture that no row names, for the table does not say that it was looked at. Rows are counted from 1, the header is 0.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from vlmdet.boxes import FORMATS, BoxFormat, Order
from vlmdet.data.readers.locate import Finder
from vlmdet.data.readers.rows import Rows
from vlmdet.data.readers.values import SPLIT_NAMES, read_text, side, split_name
from vlmdet.errors import DataError
from vlmdet.records import DetectionDataset

LARGEST = 4_000_000_000
"""Bytes above which a table is refused."""

IMAGE = (
    "filename", "file", "image", "imagepath", "imagefile", "imagename", "imagefilename", "path", "filepath", "img",
    "imgpath", "imgname", "imageid", "imgid", "name",
)  # fmt: skip
LABEL = (
    "label", "class", "category", "classname", "labelname", "categoryname", "object", "objectname", "name", "cls",
)  # fmt: skip
LABEL_WORDS = ("class", "label", "category", "type", "species", "object", "kind")
"""A single column with one of these words in its name holds the class: `cell_type`."""

WIDTH = ("imagewidth", "imgwidth", "imagew", "imgw", "width")
HEIGHT = ("imageheight", "imgheight", "imageh", "imgh", "height")
SPLIT = ("split", "set", "subset", "fold")

_SIDES: tuple[tuple[Order, tuple[str, str, str, str]], ...] = (
    ("xyxy", ("xmin", "ymin", "xmax", "ymax")),
    ("xyxy", ("x1", "y1", "x2", "y2")),
    ("xyxy", ("x0", "y0", "x1", "y1")),
    ("xyxy", ("left", "top", "right", "bottom")),
    ("xyxy", ("xtl", "ytl", "xbr", "ybr")),
    ("xyxy", ("minx", "miny", "maxx", "maxy")),
    ("xywh", ("xmin", "ymin", "w", "h")),
    ("xywh", ("left", "top", "w", "h")),
    ("xywh", ("left", "top", "width", "height")),
    ("cxcywh", ("cx", "cy", "w", "h")),
    ("cxcywh", ("xcenter", "ycenter", "w", "h")),
    ("cxcywh", ("centerx", "centery", "w", "h")),
    ("cxcywh", ("xcenter", "ycenter", "width", "height")),
    ("cxcywh", ("centerx", "centery", "width", "height")),
    ("cxcywh", ("cx", "cy", "width", "height")),
    ("xywh", ("x", "y", "w", "h")),
    ("xywh", ("x", "y", "width", "height")),
)
"""Names of four sides, in the order of the numbers; the first whose names are all there is taken."""


class _Columns(NamedTuple):
    """Which columns of a table hold what; None where there is no such column."""

    order: Order
    sides: tuple[str, str, str, str]
    image: str
    label: str
    width: str | None
    height: str | None
    split: str | None


def find_files(path: Path) -> list[Path]:
    """Return the tables of a set: `path` itself, those in it, else those in the folders in it."""
    if path.is_file():
        return [path] if path.suffix.lower() in (".csv", ".tsv") else []
    return sorted(path.glob("*.csv")) or sorted(path.glob("*/*.csv"))


def read_csv(
    path: Path, *, box_format: BoxFormat | None = None, exif: str | None = None, split: str | None = None
) -> DetectionDataset:
    """Read CSV tables.

    Input: `path`, a file or a folder; `box_format`, of the order that the header names, to tell the unit; `exif` and
    `split` as `open_dataset`.
    Output: a `DetectionDataset`; class names are sorted.

    Raises:
        DataError: no table, a header that does not tell what is what, tables with different headers, numbers that do not
            tell the unit, or no such split.
    """
    files = find_files(path)
    if not files:
        raise DataError(f"{path} holds no .csv file", "name the table, or the folder above it and its pictures")
    root = path if path.is_dir() else path.parent
    rows = Rows(str(path), split=split, exif=exif)
    orders: dict[Order, Path] = {}
    for file in files:
        orders.setdefault(_read_table(rows, file, root), file)
    if len(orders) > 1:
        said = "; ".join(f"{file}: {order}" for order, file in orders.items())
        raise DataError(f"{path}: its tables name different box orders ({said})", "read one at a time")
    (order,) = orders
    if box_format is not None and box_format.order != order:
        raise DataError(
            f"the header of {files[0]} names its sides in the order {order}, not {box_format.order}",
            f"give the unit with it, e.g. --box-format {order}/{box_format.unit}",
        )
    allowed = [one for one in FORMATS if one.order == order]
    return rows.finish(given=box_format, why=f"its header names {order}", allowed=allowed, labels=sorted(rows.labels))


def _read_table(rows: Rows, file: Path, root: Path) -> Order:
    """Add the rows of a table; returns the order that its header names."""
    text = read_text(file, LARGEST)
    if not text.strip():
        raise DataError(f"{file} is empty", "write a header and one row a box")
    first = text.lstrip().split("\n", 1)[0]
    mark = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text), delimiter=mark, strict=False)
    try:
        header = [name.strip() for name in next(reader)]
        columns = _understand(header, file)
        at = {name: number for number, name in enumerate(header)}
        own = split_name(file.stem, "") or (split_name(file.parent.name, "") if file.parent != root else "")
        finder = Finder(root, [file.parent, root, file.parent / "images", root / "images", root / "JPEGImages"])
        taken: dict[tuple[str, str], int] = {}
        if own:
            rows.add_split(own)
        for place, cells in enumerate(reader, start=1):
            if any(cell.strip() for cell in cells):
                _read_row(rows, str(file), place, cells, columns, at, own or "train", finder, taken)
    except csv.Error as error:
        raise DataError(f"{file} is no CSV table ({error})", "save it again, with commas") from error
    rows.notes += [f"{file}: {_told(columns)}", *finder.note()]
    return columns.order


def _told(columns: _Columns) -> str:
    return f"picture in '{columns.image}', class in '{columns.label}', sides in {', '.join(columns.sides)}"


def _plain(name: str) -> str:
    """Reduce a column's name to what is compared: `bbox_XMin` to `xmin`."""
    letters = re.sub(r"[^a-z0-9]", "", name.lower())
    for start in ("bbox", "box", "bndbox"):
        rest = letters.removeprefix(start)
        if rest != letters and rest:
            return rest
    return letters


def _understand(header: Sequence[str], file: Path) -> _Columns:
    """Find the columns of a table by their names.

    Raises:
        DataError: two columns have one name, or a column is not there or not clear.
    """
    names: dict[str, str] = {}
    for name in header:
        if not name:
            continue
        if _plain(name) in names:
            raise DataError(f"{file}: two columns are named '{_plain(name)}': {', '.join(header)[:300]}", "rename one")
        names[_plain(name)] = name
    there = f"it has {', '.join(header)[:300]}"
    found = next(((order, sides) for order, sides in _SIDES if set(sides) <= set(names)), None)
    if found is None:
        raise DataError(
            f"{file}: no columns of its header are the sides of a box; {there}", "name them xmin, ymin, xmax, ymax"
        )
    order, sides = found
    image = next((names[name] for name in IMAGE if name in names), None)
    if image is None:
        raise DataError(f"{file}: no column of its header is the picture; {there}", "name it filename")
    rest = {name: said for name, said in names.items() if name not in sides and said != image}
    width = next((rest[name] for name in WIDTH if name in rest), None)
    height = next((rest[name] for name in HEIGHT if name in rest), None)
    label = next((rest[name] for name in LABEL if name in rest), None)
    if label is None:
        like = [
            said for name, said in rest.items() if any(word in name for word in LABEL_WORDS) and not name.endswith("id")
        ]
        if len(like) != 1:
            raise DataError(f"{file}: no column of its header is the class; {there}", "name it label")
        label = like[0]
    split = next((rest[name] for name in SPLIT if name in rest and rest[name] != label), None)
    sized = width is not None and height is not None
    taken = (names[sides[0]], names[sides[1]], names[sides[2]], names[sides[3]])
    return _Columns(order, taken, image, label, width if sized else None, height if sized else None, split)


def _read_row(
    rows: Rows,
    file: str,
    place: int,
    cells: Sequence[str],
    columns: _Columns,
    at: Mapping[str, int],
    own: str,
    finder: Finder,
    taken: dict[tuple[str, str], int],
) -> None:
    def cell(name: str | None) -> str:
        return cells[at[name]].strip() if name is not None and at[name] < len(cells) else ""

    written = cell(columns.split).lower()
    split = SPLIT_NAMES.get(written, written) or own
    image = cell(columns.image)
    key = (split, image)
    if key not in taken:
        picture = finder.find(image) if image else None
        if picture is None:
            said = f"'{image[:200]}' is no path inside {finder.root}" if image else "it names no picture"
            kind = "path_outside" if image else "bad_row"
            rows.report(split, file, place, f"{file}:{place}", kind, said, "row_dropped")
            return
        taken[key] = rows.add(
            image.rpartition(".")[0] or image,
            split,
            picture,
            file=file,
            place=place,
            width=side(cell(columns.width)),
            height=side(cell(columns.height)),
            is_file_name=True,
        )
    row = taken[key]
    sides = [cell(name) for name in columns.sides]
    label = cell(columns.label)
    if not any(sides):
        return
    if not label:
        rows.report_row(row, "unknown_category", f"row {place} has no class", "box_dropped", place)
    else:
        rows.add_box(row, sides, label, place)

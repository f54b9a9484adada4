"""Small copies of the pictures that predictions name.

When: AFTER, by the report; no torch. A name is a file, or `file.parquet:row` of a packed data set. A picture that
cannot be had is no error of the report: its place says why.
"""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from vlmdet.boxes import Boxes
from vlmdet.data.pictures import open_small
from vlmdet.errors import ImageError
from vlmdet.records import Sample
from vlmdet.report.reading import roots

_PACKED = re.compile(r"(?s)(.+\.parquet):(\d{1,12})")
_QUALITIES = ((1.0, 72), (1.0, 50), (0.8, 45), (0.6, 40))
"""Share of the side and WebP quality, tried in this order until a thumbnail is small enough."""


def open_pictures(names: Iterable[str], *, folder: Path, side: int) -> Iterator[tuple[str, Image.Image | str]]:
    """Open pictures upright, in RGB, no larger than `side`.

    When: once per report; a packed file is read once, some rows at a time.

    Input: names as in `predictions.jsonl`; `folder`, the run's. Output: each name with its picture, or with the reason
    why there is none; plain files in the order of `names`, then those of packed files.
    """
    packed: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for name in dict.fromkeys(names):
        found = _PACKED.fullmatch(name)
        if found:
            packed[found[1]].append((int(found[2]), name))
            continue
        path = _find(name, folder)
        yield name, f"{Path(name).name or 'picture'}: no such file here" if path is None else _open(path, name, side)
    for file, wanted in packed.items():
        path = _find(file, folder)
        if path is None:
            yield from ((name, f"{Path(file).name}: no such file here") for _, name in wanted)
        else:
            yield from _unpack(path, wanted, side)


def shrink(image: Image.Image, *, most: int) -> bytes:
    """Encode a picture as WebP of at most `most` bytes where a smaller side and quality allow it."""
    data = b""
    for share, quality in _QUALITIES:
        size = max(1, round(share * image.width)), max(1, round(share * image.height))
        small = image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)
        file = io.BytesIO()
        small.save(file, "WEBP", quality=quality, method=4)
        data = file.getvalue()
        if len(data) <= most:
            break
    return data


def _find(name: str, folder: Path) -> Path | None:
    if "\0" in name:
        return None
    for root in roots(folder):
        try:
            if (root / name).is_file():  # neither a folder, nor a pipe or a device that would never end
                return root / name
        except OSError:  # a name too long for a file
            return None
    return None


def _open(picture: Any, name: str, side: int) -> Image.Image | str:
    sample = Sample(name, picture, 1, 1, Boxes.empty(), (), source=Path(name).name)
    try:
        return open_small(sample, side)
    except ImageError as error:
        return error.message


def _unpack(path: Path, wanted: list[tuple[int, str]], side: int) -> Iterator[tuple[str, Image.Image | str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    left = defaultdict(list)
    for row, name in wanted:
        left[row].append(name)
    try:
        with pq.ParquetFile(path) as file:
            column = next((one.name for one in file.schema_arrow if pa.types.is_struct(one.type)
                           and one.type.get_field_index("bytes") >= 0), None)  # fmt: skip
            start = 0
            for group in range(file.metadata.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                rows = sorted(row for row in left if start <= row < start + count)
                if rows and column is not None:
                    cells = file.read_row_group(group, columns=[column]).column(0)
                    for row in rows:
                        data = cells[row - start].as_py()
                        for name in left.pop(row):
                            content = (data or {}).get("bytes")
                            picture = _open(lambda content=content: content, name, side) if content else "no picture"
                            yield name, picture
                start += count
    except (pa.ArrowException, OSError) as error:
        reason = f"{path.name}: cannot be read ({type(error).__name__})"
        yield from ((name, reason) for names in left.values() for name in names)
        return
    yield from ((name, f"{path.name}: no such row") for names in left.values() for name in names)

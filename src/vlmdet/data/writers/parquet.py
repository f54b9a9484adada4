"""Write Parquet in the schema of the hub data set `openfoodfacts/nutrition-table-detection`.

When: ONCE, by `write_dataset(…, to="parquet")` and for drawn sets. One file a split, `data/train-00000-of-00001.parquet`,
one row a picture:

    {"image_id": "000001", "image": {"bytes": b"\\xff\\xd8…", "path": "000001.jpg"}, "width": 640, "height": 480,
     "meta": {"barcode": "", "off_image_id": "", "image_url": ""},
     "objects": {"bbox": [[0.2, 0.1, 0.9, 0.5]], "category_id": [0], "category_name": ["cat"]}}

`bbox` is y_min, x_min, y_max, x_max as fractions of the upright picture, in float32. The file's metadata names the
features, so that `datasets` decodes pictures and knows the classes in their order. `meta` has the three fields of that
set; `barcode` is the group of the row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmdet.boxes import BoxFormat
from vlmdet.data.writers.files import Row, Writing

if TYPE_CHECKING:
    import datasets

ROUNDING = "boxes within 3e-8 of the picture (float32)"
BOX_FORMAT = BoxFormat("yxyx", "fraction")
META = ("barcode", "off_image_id", "image_url")
ROWS_PER_GROUP = 100
"""Rows of one Parquet row group at most, so that a set of any size is written in little memory."""

BYTES_PER_GROUP = 64_000_000
"""Bytes of pictures after which a row group ends."""


def write(writing: Writing) -> None:
    """Write every split."""
    numbers = {label: number for number, label in enumerate(writing.dataset.labels)}
    for split in writing.dataset.splits:
        rows = (hub_row(row, numbers) for row in writing.rows(split, None))
        write_rows(split_path(writing, split), rows, hub_features(numbers))


def split_path(writing: Writing, split: str) -> Path:
    """Return the file of a split; its folder is made."""
    folder = writing.root / "data"
    folder.mkdir(exist_ok=True)
    return folder / f"{writing.split_file(split)}-00000-of-00001.parquet"


def hub_features(labels: Iterable[str] = ()) -> datasets.Features:
    """Return the columns of the schema; with class names, `category_id` carries them."""
    import datasets

    names = list(labels)
    return datasets.Features(
        {
            "image_id": datasets.Value("string"),
            "image": datasets.Image(),
            "width": datasets.Value("int64"),
            "height": datasets.Value("int64"),
            "meta": {key: datasets.Value("string") for key in META},
            "objects": {
                "bbox": datasets.List(datasets.List(datasets.Value("float32"))),
                "category_id": datasets.List(datasets.ClassLabel(names=names) if names else datasets.Value("int64")),
                "category_name": datasets.List(datasets.Value("string")),
            },
        }
    )


def hub_row(row: Row, numbers: Mapping[str, int]) -> dict[str, Any]:
    """Return a row of the schema; `numbers` are the categories' ids."""
    sample = row.sample
    meta = {key: str(sample.meta.get(key) or "") for key in META}
    return {
        "image_id": sample.id,
        "image": {"bytes": row.data, "path": row.file},
        "width": row.width,
        "height": row.height,
        "meta": meta | ({"barcode": sample.group} if sample.group else {}),
        "objects": {
            "bbox": sample.boxes.to_array(BOX_FORMAT, 1, 1).tolist(),
            "category_id": [numbers[label] for label in sample.labels],
            "category_name": list(sample.labels),
        },
    }


def write_rows(path: Path, rows: Iterable[dict[str, Any]], features: datasets.Features) -> None:
    """Write rows to one file, a group of them at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = features.arrow_schema
    with pq.ParquetWriter(path, schema) as writer:
        for group in _groups(rows):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


def _groups(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        group.append(row)
        size += len(row["image"]["bytes"])
        if len(group) >= ROWS_PER_GROUP or size >= BYTES_PER_GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group

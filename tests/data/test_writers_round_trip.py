"""Any reader -> any writer -> reader: boxes within the target's own rounding, labels, splits and ids as they were."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmdet.boxes import FRACTIONS, Boxes, BoxFormat
from vlmdet.data.readers import open_dataset
from vlmdet.data.select import select
from vlmdet.data.writers import write_dataset
from vlmdet.records import DetectionDataset, Sample

PIXELS = BoxFormat("xyxy", "pixel")
SIZES = ((640, 480), (333, 517), (64, 64))
LAYOUTS = ("coco", "voc", "yolo", "jsonl", "parquet")
LABELS = (
    "white blood cell",
    "a: b",
    "- c",
    "'quoted' \"twice\"",
    "<script>alert(1)</script>",
    "two\nlines",
    "tab\there",
    "carriage\rreturn",
    "null",
    "0",
    "1.5",
    "true",
    "#hash",
    "&amp;",
    "]]>",
    "人, 表",
    "emoji 🙂",
    "a\u2028b",
    "back\\slash",
    "{}",
)
IDS = (
    "../../etc/passwd",
    "a/b",
    "a_b",
    "A_B",
    "a b",
    "C:\\x",
    "..",
    ".",
    "-rf",
    "x" * 300,
    "é" * 200,
    "tab\t",
    "e\u0301",
)


def allowed(to: str, width: int, height: int) -> np.ndarray:
    """Return the largest error of x1, y1, x2, y2 as fractions, as the writers state it."""
    size = np.tile([width, height], 2)
    return {
        "coco": 0.005 / size + 1e-12,
        "voc": 0.5 / size + 1e-12,
        "yolo": np.full(4, 0.75e-6),  # half a step of the centre and half a step of half the side
        "jsonl": np.full(4, 0.0),
        "parquet": np.full(4, 3.1e-8),
    }[to]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a picture of each size."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate(SIZES):
        Image.new("L", size, 40 * number).save(folder / f"{number}.png")
    return folder


def assert_kept(source: DetectionDataset, folder: Path, to: str) -> None:
    """Read a written set and hold it against its source."""
    again = open_dataset(folder)
    ids = json.loads((folder / "conversion.json").read_text(encoding="utf-8"))["ids"] if to in ("voc", "yolo") else {}
    assert set(again.splits) == set(source.splits)
    used = {label for rows in source.splits.values() for row in rows for label in row.labels}
    order = sorted(used) if to == "voc" else [label for label in source.labels if label in used]
    assert [label for label in again.labels if label in used] == order
    assert not [problem for problem in again.problems if problem.action != "kept"]
    for split, rows in source.splits.items():
        found = {ids.get(row.id, row.id): row for row in again.splits[split]}
        assert set(found) == {row.id for row in rows} and len(again.splits[split]) == len(rows)
        for row in rows:
            other = found[row.id]
            assert other.labels == row.labels
            assert (other.width, other.height) == (row.width, row.height)
            difference = np.abs(other.boxes.xyxy - row.boxes.xyxy)
            assert (difference <= allowed(to, row.width, row.height)).all(), difference.max()


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cn"]), min_size=1, max_size=12)
labels = st.one_of(st.sampled_from(LABELS), texts.map(str.strip).filter(bool))
ids = st.one_of(st.sampled_from(IDS), texts.filter(lambda text: text.strip() != ""))


@st.composite
def boxes(draw: st.DrawFn) -> list[float]:
    """Corners in thousandths of the picture, at least 25 of them apart: over a pixel on the smallest picture."""
    x1, y1 = draw(st.integers(0, 975_000)), draw(st.integers(0, 975_000))
    x2, y2 = draw(st.integers(x1 + 25_000, 1_000_000)), draw(st.integers(y1 + 25_000, 1_000_000))
    return [x1 / 1e6, y1 / 1e6, x2 / 1e6, y2 / 1e6]


@st.composite
def sets(draw: st.DrawFn) -> DetectionDataset:
    """One to six rows, at least one in every split, each with none to five boxes of one to four classes."""
    names = draw(st.lists(labels, min_size=1, max_size=4, unique_by=str.strip))
    splits = draw(st.lists(st.sampled_from(["train", "val", "test"]), min_size=1, max_size=3, unique=True))
    row_ids = draw(st.lists(ids, min_size=len(splits), max_size=6, unique=True))
    rows: dict[str, list[Sample]] = {}
    for number, row_id in enumerate(row_ids):
        split = splits[number] if number < len(splits) else draw(st.sampled_from(splits))
        picture = draw(st.integers(0, len(SIZES) - 1))
        things = draw(st.lists(st.tuples(boxes(), st.sampled_from(names)), max_size=5))
        rows.setdefault(split, []).append(
            Sample(
                row_id,
                Path(f"{picture}.png"),
                *SIZES[picture],
                Boxes.from_array([box for box, _ in things], FRACTIONS, *SIZES[picture]),
                tuple(label for _, label in things),
                split=split,
                source=f"row {row_id}",
            )
        )
    return DetectionDataset("drawn", dict(rows), tuple(names), PIXELS, "drawn")


@pytest.mark.parametrize("to", LAYOUTS)
@settings(max_examples=25, deadline=None)
@given(source=sets())
def test_small_sets(pictures: Path, to: str, source: DetectionDataset) -> None:
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(pictures):
        assert_kept(source, write_dataset(source, Path(place) / "out", to=to, link=True), to)


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("name", ["bccd", "coco128"])
def test_real_sets(shared: Path, tmp_path: Path, name: str, to: str) -> None:
    source = select(open_dataset(shared / "data" / name), limit=12)
    assert_kept(source, write_dataset(source, tmp_path / "out", to=to, link=True), to)


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
def test_from_every_layout_to_every_layout(shared: Path, tmp_path: Path, first: str, second: str) -> None:
    source = select(open_dataset(shared / "data" / "bccd"), limit=3)
    middle = open_dataset(write_dataset(source, tmp_path / "first", to=first))
    assert_kept(middle, write_dataset(middle, tmp_path / "second", to=second), second)

"""The drawn data set: geometry that can be measured in the pixels, the schema, and that a seed says everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmdet.boxes import BoxFormat
from vlmdet.data.dataset import NUTRITION_LABELS
from vlmdet.data.synthetic import packages, shapes
from vlmdet.data.synthetic.packages import LABEL, DrawnPackage, draw_package, write_drawn_set
from vlmdet.errors import DataError

PIXELS = BoxFormat("xyxy", "pixel")


@pytest.fixture(scope="module")
def drawn() -> list[DrawnPackage]:
    return [draw_package(np.random.default_rng([7, number])) for number in range(150)]


def test_pictures_and_boxes_are_well_formed(drawn: list[DrawnPackage]) -> None:
    for package in drawn:
        width, height = package.image.size
        assert package.image.mode == "RGB"
        assert 330 <= min(width, height) <= max(width, height) <= 520
        assert package.labels == (LABEL,) * len(package.boxes)
        assert (package.boxes.xyxy >= 0).all()
        assert (package.boxes.xyxy <= 1).all()
        box_sides = np.diff(package.boxes.to_array(PIXELS, width, height).reshape(-1, 2, 2), axis=1)[:, 0]
        longer = box_sides.max(axis=1, initial=0) / min(width, height)
        # a table's own longer side is 25 to 75 %; turned by 6 degrees its box grows by at most a tenth
        assert ((longer > 0.245) & (longer < 0.75 * 1.1 + 0.005)).all()


def test_tables_do_not_overlap(drawn: list[DrawnPackage]) -> None:
    several = [package for package in drawn if len(package.boxes) > 1]
    assert several
    for package in several:
        overlap = package.boxes.iou(package.boxes)
        assert (overlap[~np.eye(len(overlap), dtype=bool)] == 0).all()


def test_how_many_tables(drawn: list[DrawnPackage]) -> None:
    counts = np.bincount([len(package.boxes) for package in drawn], minlength=4)
    assert len(counts) == 4
    assert 0.6 * len(drawn) < counts[1] < 0.9 * len(drawn)
    assert (counts > 0).all()


def test_kinds_vary(drawn: list[DrawnPackage]) -> None:
    shape = [package.image.width < package.image.height for package in drawn]
    assert 0.5 < np.mean(shape) < 0.95
    ratios = [w / h for p in drawn for w, h in p.boxes.to_array(BoxFormat("xywh", "pixel"), *p.image.size)[:, 2:]]
    assert min(ratios) < 0.6
    assert max(ratios) > 1.7


@pytest.mark.parametrize("degrees", [0, 3, -6])
def test_the_box_is_tight_around_the_turned_table(degrees: float) -> None:
    """A white tile on black, laid as a table is: its pixels end where the box ends, to within a pixel."""
    image = Image.new("RGB", (300, 260), "black")
    sides, center, angle = (140, 80), (150.0, 130.0), float(np.radians(degrees))
    packages._lay(image, Image.new("RGB", sides, "white"), center, angle)
    rows, columns = np.nonzero(np.asarray(image)[..., 0] > 127)
    seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    np.testing.assert_allclose(packages._upright(sides, center, angle), seen, atol=1.0)
    if degrees == 0:
        assert packages._upright(sides, center, angle) == (80, 90, 220, 170)


def test_the_direction_of_a_turn() -> None:
    """A positive angle is clockwise to the eye: the right end of a wide bar lies lower than its left end."""
    image = Image.new("RGB", (300, 260), "black")
    packages._lay(image, Image.new("RGB", (200, 10), "white"), (150.0, 130.0), float(np.radians(6)))
    rows, columns = np.nonzero(np.asarray(image)[..., 0] > 127)
    assert rows[columns > 230].mean() > 135
    assert rows[columns < 70].mean() < 125


def test_lift_is_the_reverse_of_lay() -> None:
    rng = np.random.default_rng(0)
    tile = Image.fromarray(rng.integers(0, 256, (12, 20, 3), dtype=np.uint8)).resize((120, 72))
    image = Image.new("RGB", (300, 260))
    packages._lay(image, tile, (150.0, 130.0), 0.1)
    again = packages._lift(image, tile.size, (150.0, 130.0), 0.1)
    inside = (slice(3, -3), slice(3, -3))
    difference = np.abs(np.asarray(again, dtype=int)[inside] - np.asarray(tile, dtype=int)[inside])
    assert difference.mean() < 4


def test_nothing_is_painted_over_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every table becomes a flat magenta tile, and there is no noise: its middle must then be magenta alone."""
    monkeypatch.setattr(packages, "add_noise", lambda rng, image, sigma: image)

    def flat(rng: object, tile: Image.Image, ink: object, paper: object, *, framed: bool) -> None:
        tile.paste((255, 0, 255), (0, 0, *tile.size))

    monkeypatch.setattr(packages, "_draw_table", flat)
    tables = 0
    for number in range(40):
        package = draw_package(np.random.default_rng([3, number]))
        pixels = np.asarray(package.image)
        for x1, y1, x2, y2 in package.boxes.to_array(PIXELS, *package.image.size):
            inset_x, inset_y = 0.15 * (x2 - x1) + 2, 0.15 * (y2 - y1) + 2  # what the turn leaves free in the corners
            middle = pixels[round(y1 + inset_y) : round(y2 - inset_y), round(x1 + inset_x) : round(x2 - inset_x)]
            assert (middle == (255, 0, 255)).all()
            tables += 1
    assert tables > 30


def test_decoys_stay_off_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the table has no paper of its own and a decoy under it would shine through."""
    placed: list[tuple[tuple[int, int], tuple[int, int]]] = []
    monkeypatch.setattr(
        packages, "_paint_decoy", lambda rng, image, kind, corner, sides: placed.append((corner, sides))
    )
    seen = 0
    for number in range(40):
        placed.clear()
        package = draw_package(np.random.default_rng([3, number]))
        seen += len(placed)
        for x1, y1, x2, y2 in package.boxes.to_array(PIXELS, *package.image.size):
            for (left, top), (width, height) in placed:
                assert left >= x2 or left + width <= x1 or top >= y2 or top + height <= y1
    assert seen > 120


def test_a_table_can_be_seen() -> None:
    """In every table there is contrast within the noise: some pixels differ clearly from the commonest shade."""
    for number in range(60):
        package = draw_package(np.random.default_rng([11, number]))
        grey = np.asarray(package.image.convert("L"), dtype=float)
        for x1, y1, x2, y2 in package.boxes.to_array(PIXELS, *package.image.size).round().astype(int):
            crop = grey[y1:y2, x1:x2]
            assert (np.abs(crop - np.median(crop)) > 40).mean() > 0.02


def test_the_same_seed_draws_the_same_pixels() -> None:
    first, again, other = (draw_package(np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert first.image.tobytes() == again.image.tobytes()
    assert first.boxes.tolist() == again.boxes.tolist()
    assert first.image.tobytes() != other.image.tobytes()


def test_the_bases_pictures_hold_no_table() -> None:
    assert not any("table" in shape or "grid" in shape for shape in shapes.SHAPES)
    assert "packages" not in Path(shapes.__file__).read_text(encoding="utf-8").replace("`packages.py`", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drawn_set(tmp_path_factory.mktemp("set"), train=5, val=3, seed=4)


def test_files_have_the_hub_schema(folder: Path, tmp_path: Path) -> None:
    import datasets

    names = sorted(path.name for path in (folder / "data").iterdir())
    assert names == ["train-00000-of-00001.parquet", "val-00000-of-00001.parquet"]
    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path))
    assert {name: len(rows) for name, rows in loaded.items()} == {"train": 5, "val": 3}
    features = loaded["train"].features
    assert isinstance(features["image"], datasets.Image)
    assert list(features) == ["image_id", "image", "width", "height", "meta", "objects"]
    assert list(features["meta"]) == ["barcode", "off_image_id", "image_url"]
    assert list(features["objects"]) == ["bbox", "category_id", "category_name"]
    for rows in loaded.values():
        for row in rows:
            assert row["image"].size == (row["width"], row["height"])
            assert len(row["meta"]["barcode"]) == 13
            objects = row["objects"]
            assert objects["category_name"] == [LABEL] * len(objects["bbox"])
            assert objects["category_id"] == [NUTRITION_LABELS.index(LABEL)] * len(objects["bbox"])
            for y1, x1, y2, x2 in objects["bbox"]:
                assert 0 <= y1 < y2 <= 1
                assert 0 <= x1 < x2 <= 1


def test_boxes_in_the_file_are_those_that_were_drawn(folder: Path) -> None:
    import pyarrow.parquet as pq

    seeds = np.random.SeedSequence(4).spawn(3)[0].spawn(5)
    rows: list[dict[str, Any]] = pq.read_table(folder / "data" / "train-00000-of-00001.parquet").to_pylist()
    for seed, row in zip(seeds, rows, strict=True):
        package = draw_package(np.random.default_rng(seed))
        written = np.array(row["objects"]["bbox"]).reshape(-1, 4)
        np.testing.assert_allclose(written[:, [1, 0, 3, 2]], package.boxes.xyxy, atol=1e-6)


def _rows(folder: Path, split: str) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(folder / "data" / f"{split}-00000-of-00001.parquet").to_pylist()
    return rows


def test_a_seed_gives_the_same_bytes_and_another_seed_others(folder: Path, tmp_path: Path) -> None:
    again = write_drawn_set(tmp_path / "again", train=5, val=3, seed=4)
    other = write_drawn_set(tmp_path / "other", train=5, val=3, seed=5)
    name = "data/train-00000-of-00001.parquet"
    assert (again / name).read_bytes() == (folder / name).read_bytes()
    assert (other / name).read_bytes() != (folder / name).read_bytes()


def test_a_longer_set_begins_with_the_shorter_one_and_splits_differ(folder: Path, tmp_path: Path) -> None:
    longer = write_drawn_set(tmp_path / "longer", train=7, val=3, test=2, seed=4)
    assert _rows(longer, "train")[:5] == _rows(folder, "train")
    assert _rows(longer, "val") == _rows(folder, "val")
    pictures = [row["image"]["bytes"] for split in ("train", "val", "test") for row in _rows(longer, split)]
    assert len(set(pictures)) == len(pictures) == 12


def test_what_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one row"):
        write_drawn_set(tmp_path, train=0, val=0)
    with pytest.raises(DataError, match="at least one row"):
        write_drawn_set(tmp_path, train=-1, val=2)
    with pytest.raises(DataError, match="already holds val-00000-of-00001"):
        write_drawn_set(folder, train=2, val=0)

"""The numbers decide the box format or leave it open, and never decide it wrongly: real sets, drawn sets, hostile sets."""

from __future__ import annotations

import functools
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmdet.boxes import FORMATS, FRACTIONS, Boxes, BoxFormat
from vlmdet.data.readers import box_format as module
from vlmdet.data.readers import open_dataset
from vlmdet.data.readers.box_format import Decision, decide, look, misfits
from vlmdet.data.readers.refusal import draw_readings, refuse_open
from vlmdet.errors import DataError

Set = list[tuple[int, int, np.ndarray]]
"""Width, height and boxes (xyxy fractions) of each picture."""

DECIDED = {f"{order}/pixel" for order in ("xyxy", "yxyx", "xywh", "cxcywh")} | {
    f"{order}/{unit}" for order in ("xywh", "cxcywh") for unit in ("fraction", "per_mille")
}
"""The readings that must be told on a whole set of photographs of different shapes, or of one shape that is no square."""

STEPS = {"pixel": 0, "per_mille": 0, "fraction": 4}
"""Decimals of a set that is written rounded."""


def bccd(shared: Path) -> Set:
    """Read the XML files without our reader."""
    rows = []
    for file in sorted((shared / "data/bccd/BCCD/Annotations").glob("*.xml")):
        tree = ElementTree.parse(file)
        width, height = (int(tree.findtext(f"size/{name}") or 0) for name in ("width", "height"))
        boxes = [
            [float(thing.findtext(f"bndbox/{name}") or 0) for name in ("xmin", "ymin", "xmax", "ymax")]
            for thing in tree.iter("object")
        ]
        rows.append((width, height, np.array(boxes) / [width, height, width, height]))
    return rows


def coco128(shared: Path) -> Set:
    """Read the text files without our reader."""
    rows = []
    for file in sorted((shared / "data/coco128/images/val2017").glob("*.jpg")):
        lines = (shared / "data/coco128/labels/val2017" / f"{file.stem}.txt").read_text().splitlines()
        x, y, w, h = np.array([[float(word) for word in line.split()[1:]] for line in lines]).reshape(-1, 4).T
        with Image.open(file) as image:
            rows.append((*image.size, np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], axis=1)))
    return rows


SETS = {"bccd": functools.cache(bccd), "coco128": functools.cache(coco128)}


def written(rows: Set, box_format: BoxFormat, decimals: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Write a set in a format, as `decide` takes it: numbers, size of each box's picture, number of its picture."""
    values = [Boxes.from_array(boxes, FRACTIONS, 1, 1).to_array(box_format, w, h) for w, h, boxes in rows]
    counts = [len(boxes) for *_, boxes in rows]
    sizes = np.repeat([(w, h) for w, h, _ in rows], counts, axis=0)
    numbers = np.concatenate(values)
    return numbers if decimals is None else numbers.round(decimals), sizes, np.repeat(np.arange(len(rows)), counts)


def decisions(rows: Set) -> dict[str, str]:
    """Decide all twelve readings of a set, exact and rounded; returns those that were decided, by what was written."""
    found = {}
    for box_format in FORMATS:
        for decimals in (None, STEPS[box_format.unit]):
            decision = decide(*written(rows, box_format, decimals))
            if decision.box_format is not None:
                found[f"{box_format}{'' if decimals is None else ' rounded'}"] = str(decision.box_format)
    return found


def assert_never_wrong(rows: Set) -> dict[str, str]:
    found = decisions(rows)
    wrong = {key: value for key, value in found.items() if key.split()[0] != value}
    assert not wrong
    return found


@pytest.mark.parametrize("name", SETS)
def test_whole_sets(name: str, shared: Path) -> None:
    found = assert_never_wrong(SETS[name](shared))
    assert set(found) == DECIDED | {f"{key} rounded" for key in DECIDED}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("seed", range(5))
def test_samples_of_twenty_rows(name: str, seed: int, shared: Path) -> None:
    rows = SETS[name](shared)
    rng = np.random.default_rng(seed)
    pictures = [rows[number] for number in rng.choice(len(rows), 20, replace=False)]
    assert_never_wrong(pictures)
    with_boxes = [row for row in pictures if len(row[2])]
    assert_never_wrong([(w, h, boxes[rng.integers(len(boxes))][None]) for w, h, boxes in with_boxes])  # a row a box


@pytest.mark.parametrize("name", SETS)
def test_small_sets_of_few_pictures(name: str, shared: Path) -> None:
    rows = SETS[name](shared)
    for start in range(0, 36, 3):
        assert_never_wrong(rows[start : start + 3])
        assert_never_wrong(rows[start : start + 1])


def drawn(kind: str, sizes: Sequence[tuple[int, int]], per_picture: int, rng: np.random.Generator) -> Set:
    """Draw a set: how its objects lie, the sizes of its pictures, boxes on each."""
    fixed = rng.uniform(0.2, 0.8, 2), rng.uniform(0.1, 0.9, 2)
    rows = []
    for size in sizes:
        shape = (per_picture, 2)
        centre, side = {
            "centred": lambda shape=shape: (rng.normal(0.5, 0.03, shape), rng.uniform(0.3, 0.95, shape)),
            "spread": lambda shape=shape: (rng.uniform(0, 1, shape), rng.uniform(0.02, 0.5, shape)),
            "tiny": lambda shape=shape: (rng.uniform(0, 1, shape), rng.uniform(0.002, 0.02, shape)),
            "corner": lambda shape=shape: (rng.uniform(0, 0.3, shape), rng.uniform(0.02, 0.3, shape)),
            "right": lambda shape=shape: (rng.uniform(0.6, 1, shape), rng.uniform(0.02, 0.6, shape)),
            "quarters": lambda shape=shape: ((rng.integers(0, 4, shape) + 0.5) / 4, np.full(shape, 0.25)),
            "whole": lambda shape=shape: (np.full(shape, 0.5), np.ones(shape)),
            "the same": lambda shape=shape: (np.tile(fixed[0], (shape[0], 1)), np.tile(fixed[1], (shape[0], 1))),
        }[kind]()
        boxes = np.concatenate([centre - side / 2, centre + side / 2], axis=1).clip(0, 1)
        rows.append((*size, boxes[(boxes[:, 2:] - boxes[:, :2] > 1e-3).all(axis=1)]))
    return rows


SIZES = {
    "squares": lambda rng: (640, 640),
    "squares of a thousand": lambda rng: (1000, 1000),
    "one shape": lambda rng: (640, 480),
    "upright": lambda rng: (480, 640),
    "large": lambda rng: (4000, 3000),
    "near a thousand": lambda rng: (1000, 998),
    "many shapes": lambda rng: tuple(rng.integers(80, 3000, 2).tolist()),
    "many squares": lambda rng: (int(rng.integers(80, 3000)),) * 2,
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", ["centred", "spread", "tiny", "corner", "right", "quarters", "whole", "the same"])
def test_drawn_sets_are_never_decided_wrongly(kind: str, sizes: str) -> None:
    rng = np.random.default_rng(0)
    for pictures, per_picture in ((1, 1), (20, 8), (120, 3)):
        rows = drawn(kind, [SIZES[sizes](rng) for _ in range(pictures)], per_picture, rng)
        if any(len(boxes) for *_, boxes in rows):
            assert_never_wrong(rows)


@settings(deadline=None, max_examples=30)
@given(
    kind=st.sampled_from(["centred", "spread", "tiny", "corner", "right", "quarters", "whole", "the same"]),
    size=st.tuples(st.integers(50, 4000), st.integers(50, 4000)) | st.integers(50, 4000).map(lambda one: (one, one)),
    pictures=st.integers(1, 60),
    per_picture=st.integers(1, 6),
    seed=st.integers(0, 2**20),
)
def test_any_drawn_set_is_never_decided_wrongly(
    kind: str, size: tuple[int, int], pictures: int, per_picture: int, seed: int
) -> None:
    rows = drawn(kind, [size] * pictures, per_picture, np.random.default_rng(seed))
    if any(len(boxes) for *_, boxes in rows):
        assert_never_wrong(rows)


def test_large_single_objects_leave_the_order_open() -> None:
    """x 10, y 10, width 80, height 80 of a hundred pixels: as corners they end at 80, as a width they end at 90."""
    values = np.tile([[10.0, 10.0, 80.0, 80.0]], (100, 1))
    decision = decide(values, np.tile([[100, 100]], (100, 1)), np.arange(100))
    assert decision.box_format is None
    assert {"xyxy/pixel", "xywh/pixel"} <= {str(one) for one in decision.possible}


def test_squares_leave_x_and_y_open(shared: Path) -> None:
    rows = [(500, 500, boxes) for *_, boxes in SETS["bccd"](shared)]
    assert set(assert_never_wrong(rows)) == {
        f"{order}/{unit}{how}" for order in ("xywh", "cxcywh") for unit in STEPS for how in ("", " rounded")
    }


@pytest.mark.parametrize("name", SETS)
def test_a_few_careless_boxes_do_not_mislead(name: str, shared: Path) -> None:
    rng = np.random.default_rng(1)
    for box_format in FORMATS:
        values, sizes, owners = written(SETS[name](shared), box_format)
        for share in (0.001, 0.01, 0.05, 0.3):
            spoilt = values.copy()
            spoilt[rng.random(len(spoilt)) < share] *= rng.uniform(1, 1.4)
            assert decide(spoilt, sizes, owners).box_format in (None, box_format)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("scale", [0.25, 0.5, 0.8, 1.25, 2.0, 4.0])
def test_pixels_of_pictures_that_were_scaled_afterwards_are_refused(name: str, scale: float, shared: Path) -> None:
    for order in ("xyxy", "yxyx", "xywh", "cxcywh"):
        values, sizes, owners = written(SETS[name](shared), BoxFormat(order, "pixel"))
        assert decide(values, np.rint(sizes * scale).astype(int), owners).box_format is None


@pytest.mark.parametrize("name", SETS)
def test_what_is_none_of_the_twelve_is_refused(name: str, shared: Path) -> None:
    values, sizes, owners = written(SETS[name](shared), BoxFormat("xyxy", "pixel"))
    assert decide(values[:, [0, 2, 1, 3]], sizes, owners).box_format is None, "x1 x2 y1 y2"
    assert decide(values[:, [2, 3, 0, 1]], sizes, owners).box_format is None, "ends first"
    thousandths, _, _ = written(SETS[name](shared), BoxFormat("yxyx", "per_mille"))
    assert decide(thousandths * 1.023, sizes, owners).box_format is None, "a grid of 1024"
    assert decide(values * 16, sizes, owners).box_format is None


def test_reading_counts_by_hand() -> None:
    """Five boxes on a picture of 100 x 50, read as corners in pixels."""
    values = np.array(
        [
            [10, 10, 20, 20],  # fits
            [20, 10, 10, 20],  # ends before it begins
            [10, 10, 20, 60],  # below the picture
            [10, 10, 101, 51],  # over by one pixel: rounding
            [0.1, 0.1, 0.5, 0.5],  # a speck in the corner
        ]
    )
    sizes, owners = np.tile([[100, 50]], (5, 1)), np.array([0, 0, 1, 2, 2])
    is_reversed, beyond = misfits(values, BoxFormat("xyxy", "pixel"), sizes)
    assert is_reversed.tolist() == [False, True, False, False, False]
    assert beyond.tolist() == [False, False, True, False, True]
    reading = look(values, BoxFormat("xyxy", "pixel"), sizes, owners)
    assert (reading.reversed, reading.outside, reading.misfits, reading.pictures) == (1, 2, 3, 3)
    assert not reading.reaches
    assert look(values, BoxFormat("xyxy", "fraction"), sizes, owners).outside == 3  # all but the speck, one is reversed


def test_a_size_that_is_unknown_is_no_limit() -> None:
    values = np.array([[10.0, 10, 20, 2000]])
    assert not np.any(misfits(values, BoxFormat("xyxy", "pixel"), np.zeros((1, 2))))


def test_no_box_tells_nothing_and_needs_nothing() -> None:
    decision = decide(np.zeros((0, 4)), np.zeros((0, 2)), np.zeros(0), FORMATS[:1])
    assert (decision.box_format, decision.reason) == (FORMATS[0], "there is no box to tell")


def test_one_order_that_a_header_names_leaves_the_unit_to_the_numbers(shared: Path) -> None:
    rows = SETS["bccd"](shared)
    for order in ("xyxy", "yxyx", "xywh", "cxcywh"):
        allowed = [one for one in FORMATS if one.order == order]
        for box_format in allowed:
            assert decide(*written(rows, box_format), allowed).box_format == box_format


def test_the_table_shows_the_evidence(shared: Path) -> None:
    decision = decide(*written(SETS["coco128"](shared), BoxFormat("xywh", "fraction")))
    head, columns, *lines = decision.table
    assert head.startswith("898 boxes in ")
    assert "numbers with decimals from " in head
    assert columns.split()[:3] == ["reading", "reversed", "outside"]
    assert len(lines) == 12
    fates = {line.split()[0]: line.split()[-1] for line in lines}
    assert {key for key, fate in fates.items() if fate == "possible"} == {"xywh/fraction"}


def test_thresholds_ask_for_a_wide_margin(shared: Path) -> None:
    """On both real sets a wrong order misfits at least twice as often as would rule it out."""
    for name in SETS:
        rows = SETS[name](shared)
        for order in ("xywh", "cxcywh"):
            values, sizes, owners = written(rows, BoxFormat(order, "fraction"))
            for other in FORMATS:
                wrong = look(values, other, sizes, owners).misfits
                assert wrong == 0 if str(other) == f"{order}/fraction" else wrong >= 2 * module.OUT * len(values)


# --- what a user sees -------------------------------------------------------------------------------------------------


def write_lines(root: Path, rows: Set, box_format: BoxFormat) -> Path:
    """Write a `metadata.jsonl` that does not say how its boxes are written."""
    import json

    root.mkdir(parents=True, exist_ok=True)
    with (root / "metadata.jsonl").open("w") as file:
        for number, (w, h, boxes) in enumerate(rows):
            Image.new("RGB", (w, h), "gray").save(root / f"{number}.jpg")
            things = {"bbox": Boxes(boxes).to_array(box_format, w, h).tolist(), "categories": ["a"] * len(boxes)}
            file.write(json.dumps({"file_name": f"{number}.jpg", "objects": things}) + "\n")
    return root


def test_an_open_set_is_refused_with_a_drawing_and_the_flag(tmp_path: Path) -> None:
    rows = drawn("spread", [(64, 48)] * 12, 4, np.random.default_rng(0))
    root = write_lines(tmp_path / "set", rows, BoxFormat("yxyx", "fraction"))
    with pytest.raises(DataError) as caught:
        open_dataset(root)
    message = str(caught.value)
    assert "\n" not in message
    assert "xyxy/fraction or yxyx/fraction" in message
    assert "--box-format " in message
    drawing = Path(message.partition("side by side in ")[2].split(", with")[0])
    with Image.open(drawing) as image:
        assert image.format == "PNG"
        assert image.width > image.height / 2
    table = drawing.with_suffix(".txt").read_text().splitlines()
    assert len(table) == 2 + 12
    drawing.unlink()
    drawing.with_suffix(".txt").unlink()
    dataset = open_dataset(root, box_format="yxyx/fraction")
    assert dataset.decided_by == "given by the user"
    for sample, (*_, boxes) in zip(dataset.splits["train"], rows, strict=True):
        np.testing.assert_allclose(sample.boxes.xyxy, boxes, atol=1e-9)


def test_a_clear_set_opens_and_shows_its_evidence(tmp_path: Path) -> None:
    rows = drawn("spread", [(64, 48)] * 60, 4, np.random.default_rng(0))
    dataset = open_dataset(write_lines(tmp_path / "set", rows, BoxFormat("cxcywh", "pixel")))
    assert str(dataset.box_format) == "cxcywh/pixel"
    assert dataset.decided_by.startswith("decided by the numbers: 0 of ")
    assert any("cxcywh/pixel" in note and "possible" in note for note in dataset.notes)
    for sample, (*_, boxes) in zip(dataset.splits["train"], rows, strict=True):
        np.testing.assert_allclose(sample.boxes.xyxy, boxes, atol=1e-9)


def test_a_format_that_the_user_names_wrongly_is_refused(tmp_path: Path) -> None:
    rows = drawn("spread", [(64, 48)] * 12, 4, np.random.default_rng(0))
    root = write_lines(tmp_path / "set", rows, BoxFormat("xywh", "fraction"))
    with pytest.raises(DataError, match=r"48 of 48 boxes end before they begin or leave .* xywh/fraction"):
        open_dataset(root, box_format="xywh/per_mille")


def test_drawing_shows_each_reading_where_it_lies(tmp_path: Path) -> None:
    """One box at the left edge under the first reading and at the upper edge under the second."""
    Image.new("RGB", (200, 200), "white").save(tmp_path / "a.png")
    readings = (BoxFormat("xyxy", "fraction"), BoxFormat("yxyx", "fraction"))
    shown = [(tmp_path / "a.png", "a", (200, 200), np.array([[0.0, 0.4, 0.1, 0.6]]))]
    drawing = draw_readings(readings, shown)
    assert drawing is not None
    pixels = np.asarray(Image.open(drawing)).astype(int)
    red = (pixels[..., 0] > 180) & (pixels[..., 1] < 90)
    left, right = np.split(red, [red.shape[1] // 2], axis=1)
    (rows_left, columns_left), (rows_right, columns_right) = np.nonzero(left), np.nonzero(right)
    assert np.ptp(rows_left) > np.ptp(columns_left)  # a tenth wide, a fifth high
    assert np.ptp(rows_right) < np.ptp(columns_right)
    drawing.unlink()


def test_a_refusal_without_pictures_says_so(tmp_path: Path) -> None:
    values = np.tile([[0.1, 0.1, 0.3, 0.3]], (5, 1))
    decision = decide(values, np.zeros((5, 2)), np.arange(5))
    shown = [(tmp_path / "gone.jpg", "a", (0, 0), values[:1])]
    assert "no picture of it can be opened" in str(refuse_open("set", decision, shown))
    nothing = Decision(None, "no reading fits", (), ("5 boxes",))
    assert "no known way of writing boxes fits" in str(refuse_open("set", nothing, shown))

"""Checks of many boxes at once against the plain definition, and columns against what was put in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmdet.boxes import FRACTIONS, Boxes, BoxFormat
from vlmdet.data.readers.checks import DUPLICATE_IOU, check_boxes, find_twins
from vlmdet.data.readers.locate import GIVE_UP, Finder
from vlmdet.data.readers.rows import Rows
from vlmdet.data.readers.values import side, split_name
from vlmdet.errors import DataError

ALL = np.ones(1, dtype=bool)
ZERO = np.zeros(1, dtype=np.int64)


def kinds(box: list[float]) -> tuple[bool, list[str], list[float]]:
    xyxy = np.array([box])
    keep, findings = check_boxes(xyxy, ALL, ZERO, ZERO)
    return bool(keep[0]), [f"{one.kind} {one.action}" for one in findings if one.mask[0]], xyxy[0].tolist()


@pytest.mark.parametrize(
    ("box", "keep", "found", "after"),
    [
        ([0.1, 0.2, 0.3, 0.4], True, [], [0.1, 0.2, 0.3, 0.4]),
        ([0.3, 0.2, 0.1, 0.4], False, ["reversed_box box_dropped"], None),
        ([0.1, 0.4, 0.3, 0.2], False, ["reversed_box box_dropped"], None),
        ([0.1, 0.2, 0.1, 0.4], False, ["degenerate_box box_dropped"], None),
        ([1.0, 0.2, 1.1, 0.4], False, ["box_outside box_dropped"], None),
        ([-0.1, 0.2, 0.0, 0.4], False, ["box_outside box_dropped"], None),
        ([0.5, 0.5, 90.0, 90.0], False, ["box_outside box_dropped"], None),  # a thirty-thousandth of it is inside
        ([0.5, 0.5, 5.0, 5.0], True, ["box_outside box_clipped"], [0.5, 0.5, 1.0, 1.0]),  # 1/81 is inside
        ([np.inf, 0.5, np.inf, 0.6], False, ["box_outside box_dropped"], None),
        ([-1e-7, 0.2, 0.5, 1 + 1e-7], True, [], [0.0, 0.2, 0.5, 1.0]),
        ([0.0, 0.0, 1.0, 0.97], True, [], [0.0, 0.0, 1.0, 0.97]),
        ([0.0, 0.0, 1.0, 0.99], True, ["whole_image_box kept"], [0.0, 0.0, 1.0, 0.99]),
        ([0.1, 0.2, 0.104, 0.4], True, ["tiny_box kept"], [0.1, 0.2, 0.104, 0.4]),
    ],
)
def test_one_box(box: list[float], keep: bool, found: list[str], after: list[float] | None) -> None:
    kept, said, cut = kinds(box)
    assert (kept, said) == (keep, found)
    if after is not None:
        assert cut == after


@settings(deadline=None)
@given(
    starts=st.lists(
        st.tuples(st.sampled_from([0.1, 0.1001, 0.102, 0.3]), st.sampled_from([0.1, 0.101, 0.2])), max_size=14
    ),
    seed=st.integers(0, 99),
)
def test_twins_are_those_of_the_plain_definition(starts: list[tuple[float, float]], seed: int) -> None:
    """A box is marked where one before it, which is not marked for the same reason, covers it to over .95."""
    rng = np.random.default_rng(seed)
    count = len(starts)
    xyxy = np.array([(x, y, x + 0.2, y + 0.2) for x, y in starts]).reshape(-1, 4)
    owners, numbers = rng.integers(0, 2, count), rng.integers(0, 2, count)
    found = find_twins(xyxy, np.ones(count, dtype=bool), owners, numbers)
    ious = Boxes(xyxy).iou(Boxes(xyxy))
    alike = (ious > DUPLICATE_IOU) & (owners[:, None] == owners) & (numbers[:, None] == numbers)
    for number in range(count):
        if found[number]:
            assert alike[number, :number].any()
        assert not (alike[number, :number] & ~found[:number]).any() or found[number]


def test_a_thousand_equal_boxes_are_one_and_its_twins() -> None:
    xyxy = np.tile([[0.1, 0.1, 0.3, 0.3]], (1000, 1))
    zeros = np.zeros(1000, dtype=np.int64)
    assert find_twins(xyxy, np.ones(1000, dtype=bool), zeros, zeros).tolist() == [False] + [True] * 999


def test_boxes_in_any_order_come_back_by_picture() -> None:
    """As COCO files have them: annotations of one picture need not stand together."""
    rows = Rows("set")
    for name in ("a", "b", "c"):
        rows.add(name, "train", f"{name}.jpg", file="f", width=10, height=10)
    for row, start, label in ((2, 0.1, "x"), (0, 0.2, "y"), (2, 0.3, "y"), (0, 0.4, "x")):
        rows.add_box(row, [start, 0.0, start + 0.1, 0.5], label, 0)
    dataset = rows.finish(stated=FRACTIONS, why="by hand")
    found = {
        one.id: list(zip(one.labels, one.boxes.xyxy[:, 0].tolist(), strict=True)) for one in dataset.splits["train"]
    }
    assert found == {"a": [("y", 0.2), ("x", 0.4)], "b": [], "c": [("x", 0.1), ("y", 0.3)]}
    assert dataset.labels == ("x", "y")


def test_a_set_without_a_box_or_a_row() -> None:
    empty = Rows("set")
    empty.add_split("train")
    dataset = empty.finish(stated=FRACTIONS, why="by hand")
    assert (len(dataset.splits["train"]), dataset.labels) == (0, ())
    one = Rows("set")
    one.add("a", "val", "a.jpg", file="f")
    dataset = one.finish()
    assert len(dataset.splits["val"][0].boxes) == 0
    with pytest.raises(DataError, match="no split 'x'"):
        Rows("set", split="x").finish(stated=FRACTIONS, why="by hand")


def test_boxes_of_a_sample_cannot_change_those_of_the_set() -> None:
    rows = Rows("set")
    rows.add_box(rows.add("a", "train", "a.jpg", file="f", width=10, height=10), [0, 0, 5, 5], "x", 0)
    sample = rows.finish(stated=BoxFormat("xyxy", "pixel"), why="by hand").splits["train"][0]
    with pytest.raises(ValueError, match="read-only"):
        sample.boxes.xyxy[0, 0] = 0.5


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("train", "train"), ("instances_val2017", "val"), ("valid", "val"), ("Validation-set", "val"), ("dev", "val"),
        ("my_test_labels", "test"), ("training", "train"), ("testing", "test"), ("contest", ""), ("latest", ""), ("x", ""),
    ],
)  # fmt: skip
def test_split_names(text: str, split: str) -> None:
    assert split_name(text, "") == split


@pytest.mark.parametrize(
    ("value", "pixels"),
    [
        (40, 40),
        (40.0, 40),
        ("40", 40),
        ("40.0", 40),
        (0, 0),
        (-3, 0),
        (40.5, 0),
        (None, 0),
        (True, 0),
        ("x", 0),
        ([4], 0),
    ]
    + [(float("nan"), 0), (float("inf"), 0), (10**400, 0), (2**40, 0), ("", 0)],
)
def test_stated_sides(value: object, pixels: int) -> None:
    assert side(value) == pixels


def test_a_set_without_any_picture_is_not_searched_for_each(tmp_path: Path) -> None:
    finder = Finder(tmp_path, [tmp_path])
    for number in range(GIVE_UP):
        assert finder.find(f"{number}.jpg") == str(tmp_path / f"{number}.jpg")
    (tmp_path / "late.jpg").touch()
    assert finder.find("late.jpg") == str(tmp_path / "late.jpg")
    assert finder.found == 0
    assert "201 of 201 pictures are not below" in finder.note()[0]

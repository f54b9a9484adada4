"""One regular expression for each codec: what is written matches, and what matches is read without problems."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmdet.boxes import Boxes
from vlmdet.grounding import CODECS, View
from vlmdet.grounding.grammar import (
    Corner,
    answer_pattern,
    closing_pattern,
    first_corner,
    number_pattern,
    opening_pattern,
)

VIEW = View(1000, 500, 1036, 504)
LABELS = [
    "cup",
    "a ; b",
    "plan (1,2)",
    "a<|im_end|>b",
    "",
    '"quoted" {x}|y*',
    "</ref>[1, 2, 3, 4]",
    "two\nlines",
    "杯 é",
    "<loc_1>",
]
ORDER = {"axis_swapped", "both_axes_reversed", "zero_area", "no_box"}
ONE = {
    "qwen2_vl": "<|object_ref_start|>cup<|object_ref_end|><|box_start|>({},{}),({},{})<|box_end|>",
    "qwen2_5_vl": '[{{"bbox_2d": [{}, {}, {}, {}], "label": "cup"}}]',
    "qwen3_vl": '[{{"bbox_2d": [{}, {}, {}, {}], "label": "cup"}}]',
    "paligemma": "<loc{:04d}><loc{:04d}><loc{:04d}><loc{:04d}> cup",
    "florence2": "cup<loc_{}><loc_{}><loc_{}><loc_{}>",
    "internvl": "<ref>cup</ref><box>[[{}, {}, {}, {}]]</box>",
    "plain_json": '[{{"bbox": [{}, {}, {}, {}], "label": "cup"}}]',
}
LIMITS = {"qwen2_5_vl": (1036, 504), "paligemma": (1023, 1023), "florence2": (999, 999)}


def matches(pattern: str, text: str) -> bool:
    return re.fullmatch(pattern, text) is not None


@pytest.mark.parametrize("codec", CODECS)
def test_numbers_end_with_the_grid(codec: str) -> None:
    pattern = answer_pattern(codec, ["cup"], VIEW, 3)
    x, y = LIMITS.get(codec, (1000, 1000))
    for numbers in ((0, 0, x, y), (1, 2, 30, 400), (x, y, 0, 0)):
        # the order of PaliGemma is y, x; both its limits are the same
        assert matches(pattern, ONE[codec].format(*numbers))
    for numbers in ((0, 0, x + 1, y), (0, 0, x, y + 1), (0, y + 1, 1, 1)):
        assert not matches(pattern, ONE[codec].format(*numbers))
    if codec != "paligemma":
        assert not matches(pattern, ONE[codec].format("01", 2, 30, 400))
        assert not matches(pattern, ONE[codec].format("1.0", 2, 30, 400))


@pytest.mark.parametrize("codec", CODECS)
def test_labels_and_number_of_boxes(codec: str) -> None:
    pattern = answer_pattern(codec, ["cup", "dog"], VIEW, 3)
    boxes = Boxes(np.array([[0.1, 0.2, 0.3, 0.4]] * 4))
    for labels in (["cup"], ["dog", "cup"], ["cup", "cup", "dog"], []):
        assert matches(pattern, CODECS[codec].encode(labels, boxes[: len(labels)], VIEW))
    for labels in (["cups"], ["cup", "cat"], [""], ["cup"] * 4):
        assert not matches(pattern, CODECS[codec].encode(labels, boxes[: len(labels)], VIEW))
    assert not matches(pattern, "") and not matches(pattern, CODECS[codec].encode(["cup"], boxes[:1], VIEW) + " ")
    with pytest.raises(ValueError):
        answer_pattern(codec, [], VIEW, 3)
    with pytest.raises(ValueError):
        answer_pattern(codec, ["cup"], VIEW, 0)


@given(low=st.integers(0, 2100), more=st.integers(0, 2100), width=st.sampled_from([0, 4]))
@settings(deadline=None, max_examples=60)
def test_exactly_the_numbers_of_a_range(low: int, more: int, width: int) -> None:
    pattern = re.compile(number_pattern(low, low + more, width=width))
    found = [number for number in range(4300) if pattern.fullmatch(str(number).zfill(width))]
    assert found == list(range(low, low + more + 1))


def test_a_number_by_hand() -> None:
    assert number_pattern(0, 9) == "(?:[0-9])"
    assert number_pattern(0, 1000) == "(?:[0-9]|[1-9][0-9]|[1-9][0-9]{2}|1000)"
    assert number_pattern(0, 1023, width=4) == "(?:0[0-9]{3}|10[0-1][0-9]|102[0-3])"


corners = st.tuples(*[st.floats(0, 1)] * 4).map(
    lambda c: (min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3]))
)


@pytest.mark.parametrize("codec", CODECS)
@given(rows=st.lists(st.tuples(corners, st.sampled_from(LABELS)), max_size=8))
@settings(deadline=None, max_examples=30)
def test_what_is_written_matches(codec: str, rows: list[tuple[Any, str]]) -> None:
    boxes = Boxes(np.array([box for box, _ in rows], dtype=np.float64).reshape(-1, 4))
    text = CODECS[codec].encode([label for _, label in rows], boxes, VIEW)
    assert matches(answer_pattern(codec, LABELS, VIEW, 8), text)


@pytest.mark.parametrize("codec", CODECS)
@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_what_matches_is_read(codec: str, data: st.DataObject) -> None:
    text = data.draw(st.from_regex(answer_pattern(codec, LABELS, VIEW, 4), fullmatch=True))
    parsed = CODECS[codec].parse(text, VIEW)
    kinds = {problem.kind for problem in parsed.problems}
    assert kinds <= ORDER
    assert set(parsed.labels) <= set(LABELS)
    if "both_axes_reversed" not in kinds:
        assert parsed.status == ("none" if text in ("none", "[]") else "ok")


def test_a_first_corner_by_hand() -> None:
    start = "<|object_ref_start|>cup<|object_ref_end|><|box_start|>(1,23"
    assert first_corner("qwen2_vl", start) is None  # the number may go on
    assert first_corner("qwen2_vl", start + "),") is None
    assert first_corner("qwen2_vl", start + "),(") == Corner(1, 23)
    assert first_corner("qwen2_vl", start + "),(4") is None
    assert first_corner("qwen3_vl", '[{"bbox_2d": [1, 23,') == Corner(1, 23)
    assert first_corner("qwen3_vl", '[{"bbox_2d": [1, 23, 4, 5], "label": "[1, 23,') is None
    assert first_corner("paligemma", "<loc0023><loc0001>") == Corner(1, 23)
    assert first_corner("paligemma", "<loc0023><loc0001><loc0002><loc0002>") is None
    assert first_corner("florence2", "a><loc_1><loc_23>") == Corner(1, 23)
    assert first_corner("florence2", "a><loc_1><loc_23><loc_4>") is None
    assert first_corner("internvl", "<ref>cup</ref><box>[[1, 23,") == Corner(1, 23)


@pytest.mark.parametrize("codec", CODECS)
@given(data=st.data(), count=st.integers(1, 3))
@settings(deadline=None, max_examples=25)
def test_piece_by_piece_no_axis_is_reversed(codec: str, data: st.DataObject, count: int) -> None:
    text = data.draw(st.from_regex(opening_pattern(codec, LABELS, VIEW), fullmatch=True))
    begun = 0
    while (corner := first_corner(codec, text)) is not None:
        begun += 1
        text += data.draw(
            st.from_regex(closing_pattern(codec, LABELS, VIEW, corner, last=begun == count), fullmatch=True)
        )
    parsed = CODECS[codec].parse(text, VIEW)
    assert len(parsed.boxes) == begun <= count
    assert parsed.status == ("ok" if begun else "none")
    assert {problem.kind for problem in parsed.problems} <= {"zero_area"}
    assert matches(answer_pattern(codec, LABELS, VIEW, count), text)


@pytest.mark.parametrize("codec", CODECS)
@given(rows=st.lists(st.tuples(corners, st.sampled_from(LABELS)), min_size=1, max_size=3))
@settings(deadline=None, max_examples=20)
def test_the_pieces_let_through_what_is_written(codec: str, rows: list[tuple[Any, str]]) -> None:
    text = CODECS[codec].encode([label for _, label in rows], Boxes(np.array([box for box, _ in rows])), VIEW)
    ends = [end for end in range(len(text)) if first_corner(codec, text[:end]) is not None]
    assert len(ends) == len(rows)
    assert matches(opening_pattern(codec, LABELS, VIEW), text[: ends[0]])
    for i, (start, end) in enumerate(zip(ends, [*ends[1:], len(text)], strict=True)):
        corner = first_corner(codec, text[:start])
        assert corner is not None
        assert matches(closing_pattern(codec, LABELS, VIEW, corner, last=i + 1 == len(rows)), text[start:end])

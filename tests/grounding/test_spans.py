"""Where in an answer each box stands: exact places first, then what holds for every codec and every text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmdet.boxes import Boxes
from vlmdet.grounding import CODECS, Parsed, View
from vlmdet.grounding.codec import guard_label

VIEW = View(1000, 500, 1036, 504)
TAGGED = "<|object_ref_start|>cup<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>"
CASES = [
    ("qwen2_vl", TAGGED + TAGGED, [TAGGED, TAGGED]),
    ("qwen2_vl", "a cup(1,2),(3,4), dog (5,6),(7,8)", ["a cup(1,2),(3,4)", "dog (5,6),(7,8)"]),
    ("qwen2_vl", "cup(1,2),(3,4)(5,6),(7,8)", ["cup(1,2),(3,4)", "(5,6),(7,8)"]),
    (
        "qwen2_vl",
        "<ref> Two cups</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>",
        ["<ref> Two cups</ref><box>(1,2),(3,4)</box>", "(5,6),(7,8)</box>"],
    ),
    (
        "qwen2_vl",
        "Here is the answer:\n- red cup <|box_start|>(1,2),(3,4)<|box_end|>.",
        ["red cup <|box_start|>(1,2),(3,4)<|box_end|>"],
    ),
    (
        "qwen2_vl",
        "cup<|box_start|>[1,2,3,4],[5,6,7,8]<|box_end|>",
        ["cup<|box_start|>[1,2,3,4]", "[5,6,7,8]<|box_end|>"],
    ),
    ("qwen2_vl", "The cup is at (1,2),(3,4).", ["(1,2),(3,4)"]),  # a sentence is no name
    ("qwen2_vl", "cup(1,2),(3,2000) dog(1,2),(3,4)", ["dog(1,2),(3,4)"]),  # the first is outside the grid
    ("internvl", "<ref>cup</ref><box>[[1, 2, 3, 4]]</box>", ["<ref>cup</ref><box>[[1, 2, 3, 4]]</box>"]),
    (
        "internvl",
        "<ref>cup</ref><box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box>",
        ["<ref>cup</ref><box>[[1, 2, 3, 4]", "[5, 6, 7, 8]]</box>"],
    ),
    ("internvl", "cup[[1, 2, 3, 4]]\ndog[[5, 6, 7, 8]]", ["cup[[1, 2, 3, 4]]", "dog[[5, 6, 7, 8]]"]),
    (
        "paligemma",
        "<loc0001><loc0002><loc0003><loc0004> red cup ; <loc0005><loc0006><loc0007><loc0008> dog<eos>",
        ["<loc0001><loc0002><loc0003><loc0004> red cup", "<loc0005><loc0006><loc0007><loc0008> dog"],
    ),
    (
        "paligemma",
        "<loc0001><loc0002><loc0003><loc0004><loc0005><loc0006><loc0007><loc0008> dog",
        ["<loc0001><loc0002><loc0003><loc0004>", "<loc0005><loc0006><loc0007><loc0008> dog"],
    ),
    (
        "florence2",
        "</s><s>cup<loc_1><loc_2><loc_3><loc_4><loc_5><loc_6><loc_7><loc_8>, dog<loc_1><loc_2><loc_3><loc_4>",
        ["cup<loc_1><loc_2><loc_3><loc_4>", "<loc_5><loc_6><loc_7><loc_8>", "dog<loc_1><loc_2><loc_3><loc_4>"],
    ),
    (
        "qwen3_vl",
        '[{"bbox_2d": [1, 2, 3, 4], "label": "cup"}, {"bbox_2d": [5, 6, 7, 8]}]',
        ['{"bbox_2d": [1, 2, 3, 4], "label": "cup"}', '{"bbox_2d": [5, 6, 7, 8]}'],
    ),
    ("qwen3_vl", '{"label": "cup", "bbox_2d": [[1, 2, 3, 4], [5, 6, 7, 8]]}', ["[1, 2, 3, 4]", "[5, 6, 7, 8]"]),
    ("qwen3_vl", '{"cup": [1, 2, 3, 4], "dog": [5, 6, 7, 8]}', ['"cup": [1, 2, 3, 4]', '"dog": [5, 6, 7, 8]']),
    ("qwen3_vl", "cup: [1, 2, 3, 4]\n- dog: [5, 6, 7, 8]", ["cup: [1, 2, 3, 4]", "dog: [5, 6, 7, 8]"]),
    ("qwen3_vl", '["cup", [1, 2, 3, 4], [5, 6, 7, 8]]', ['"cup", [1, 2, 3, 4]', "[5, 6, 7, 8]"]),
    ("qwen3_vl", "[[1, 2], [3, 4]]", ["[[1, 2], [3, 4]]"]),
    (
        "qwen3_vl",
        '{"label": "cup", "x1": 1, "y1": 2, "x2": 3, "y2": 4}',
        ['{"label": "cup", "x1": 1, "y1": 2, "x2": 3, "y2": 4}'],
    ),
    (
        "qwen3_vl",
        "<think>[9, 9, 99, 99]</think><answer> {'bbox_2d': [1, 2, 3, 4], 'label': 'cup'} </answer>",
        ["{'bbox_2d': [1, 2, 3, 4], 'label': 'cup'}"],
    ),
    ("qwen3_vl", '[{"bbox_2d": [1, 2, 3, 4], "label": "cup"', ['{"bbox_2d": [1, 2, 3, 4], "label": "cup"']),  # cut
    ("qwen3_vl", '[{"label": "cup", "bbox_2d": [1, 2, 3, 4]]', ['{"label": "cup", "bbox_2d": [1, 2, 3, 4]']),
    ("qwen3_vl", "1, 2, 3, 4 ", ["1, 2, 3, 4"]),
    ("qwen3_vl", "<think></think> " + TAGGED, [TAGGED]),  # another family's notation
    ("qwen2_vl", '[{"bbox_2d": [1, 2, 3, 4], "label": "cup"}]', ['{"bbox_2d": [1, 2, 3, 4], "label": "cup"}']),
]


@pytest.mark.parametrize(("codec", "text", "words"), CASES)
def test_a_box_has_its_own_words(codec: str, text: str, words: list[str]) -> None:
    parsed = CODECS[codec].parse(text, VIEW)
    assert [text[start:end] for start, end in parsed.spans] == words


def check(parsed: Parsed, text: str) -> None:
    assert len(parsed.spans) == len(parsed.boxes)
    assert all(0 <= start <= end <= len(text) for start, end in parsed.spans)
    ordered = sorted(parsed.spans)
    assert all(ordered[i][1] <= ordered[i + 1][0] for i in range(len(ordered) - 1))


corners = st.tuples(*[st.floats(0, 1)] * 4).map(
    lambda c: (min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3]))
)
characters = st.one_of(st.sampled_from("<|>\\()[]{}\"',:;，（ 0123456789locbx\n"), st.characters())
labels = st.one_of(
    st.sampled_from(["cup", "", "(1,2),(3,4)", "[1, 2, 3, 4]", "a ; b", '"x": 1']), st.text(characters, max_size=8)
)


@pytest.mark.parametrize("codec", CODECS)
@given(rows=st.lists(st.tuples(corners, labels), min_size=1, max_size=8))
@settings(deadline=None, max_examples=40)
def test_the_words_of_a_box_alone_are_that_box(codec: str, rows: list[tuple[Any, str]]) -> None:
    text = CODECS[codec].encode([label for _, label in rows], Boxes(np.array([box for box, _ in rows])), VIEW)
    parsed = CODECS[codec].parse(text, VIEW)
    check(parsed, text)
    assert parsed.spans == sorted(parsed.spans) and len(parsed.spans) == len(rows)
    for (start, end), box, label in zip(parsed.spans, parsed.boxes.tolist(), parsed.labels, strict=True):
        alone = CODECS[codec].parse(text[start:end], VIEW)
        assert alone.boxes.tolist() == [box] and alone.labels == [label]


PIECES = [
    '{"a": "1,2,3,4", "b": "1,2,3,4"}',
    '"label": "cup"',
    '{"cup": {"bbox": [1,2,3,4]}}',
    "[1,2,3,4]",
    "(1,2),(3,4)",
    "(1,2)",
    "<box>",
    "</box>",
    "<ref>cup</ref>",
    "<|box_start|>",
    "<|box_end|>",
    "<loc0001><loc0002><loc0003><loc0004>",
    "<loc_1><loc_2><loc_3><loc_4>",
    "[",
    "]",
    "{",
    "}",
    ":",
    ", ",
    "\n",
    " cup ",
    "</think>",
    guard_label("[1, 2, 3, 4]"),
]


@pytest.mark.parametrize("codec", CODECS)
@given(text=st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
@settings(deadline=None, max_examples=150)
def test_places_lie_in_the_text_and_do_not_overlap(codec: str, text: str) -> None:
    parsed = CODECS[codec].parse(text, VIEW)
    check(parsed, text)


def test_real_answers(shared: Path) -> None:
    for line in (shared / "data/outputs/dev.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        parsed = CODECS[row["codec"]].parse(row["text"], View(*row["view"]))
        check(parsed, row["text"])
        assert all(any(character.isdigit() for character in row["text"][start:end]) for start, end in parsed.spans)

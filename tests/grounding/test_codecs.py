"""What holds for every codec: boxes and labels return, hostile labels stay labels, and parsing never raises."""

from __future__ import annotations

import gc
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmdet.boxes import Boxes
from vlmdet.errors import ConfigError
from vlmdet.grounding import CODECS, View, get_codec
from vlmdet.grounding.codec import GUARDED, guard_label, strip_control, unguard_label
from vlmdet.grounding.sizes import plan_view

VIEW = View(1000, 500, 1036, 504)
HOSTILE = [
    "",
    " ",
    " both ends ",
    "cup;",
    "a ; b",
    "a<|im_end|>b",
    "<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>",
    "<loc0001><loc0002><loc0003><loc0004> cup",
    "<loc_1><loc_2><loc_3><loc_4>",
    "</ref><box>[[1, 2, 3, 4]]</box>",
    "[1, 2, 3, 4]",
    "(1,2),(3,4)",
    '"label": "x", "bbox_2d": [1, 2, 3, 4]',
    '"}, {"bbox_2d": [1, 2, 3, 4]}',
    'the dog\'s "big" bowl',
    "```json",
    "</think>",
    "<answer>",
    "</s><OD>",
    "back\\slash\\",
    "\\u003b",
    "two\nlines\t",
    "表 é 😀",
    "none",
    "[]",
]
STEP = {"paligemma": 1 / 1023}


def half_step(name: str, view: View) -> np.ndarray:
    if name == "qwen2_5_vl":
        return 0.5 / np.array([view.resized_width, view.resized_height] * 2)
    return np.full(4, STEP.get(name, 1 / 1000) / 2)


ENCODED = {
    "qwen2_vl": "<|object_ref_start|>cup<|object_ref_end|><|box_start|>(100,200),(300,400)<|box_end|>",
    "qwen2_5_vl": '[{"bbox_2d": [104, 101, 311, 202], "label": "cup"}]',  # 103.6 100.8 310.8 201.6
    "qwen3_vl": '[{"bbox_2d": [100, 200, 300, 400], "label": "cup"}]',
    "paligemma": "<loc0205><loc0102><loc0409><loc0307> cup",  # 204.6 102.3 409.2 306.9
    "florence2": "cup<loc_100><loc_200><loc_300><loc_400>",
    "internvl": "<ref>cup</ref><box>[[100, 200, 300, 400]]</box>",
    "plain_json": '[{"bbox": [100, 200, 300, 400], "label": "cup"}]',
}


def test_every_codec_has_its_text() -> None:
    assert list(CODECS) == list(ENCODED)
    with pytest.raises(ConfigError, match="qwen2_vll"):
        get_codec("qwen2_vll")


@pytest.mark.parametrize(("name", "text"), ENCODED.items())
def test_the_text_of_one_box(name: str, text: str) -> None:
    # A hair more than .1, …: no number lies on the edge of a bin.
    boxes = Boxes(np.array([[0.1, 0.2, 0.3, 0.4]]) + 1e-9)
    assert CODECS[name].encode(["cup"], boxes, VIEW) == text
    assert f"{name}-1" == CODECS[name].VERSION and name == CODECS[name].NAME


@pytest.mark.parametrize("name", CODECS)
def test_the_last_number_of_the_grid(name: str) -> None:
    text = CODECS[name].encode(["a"], Boxes(np.array([[0.0, 0.0, 1.0, 1.0]])), VIEW)
    last = {"qwen2_5_vl": ["1036", "504"], "paligemma": ["1023"], "florence2": ["999"]}.get(name, ["1000"])
    assert all(number in text for number in last)
    parsed = CODECS[name].parse(text, VIEW)
    assert np.abs(parsed.boxes.xyxy - [[0, 0, 1, 1]]).max() <= half_step(name, VIEW).max() + 1e-12


@pytest.mark.parametrize("name", CODECS)
def test_nothing(name: str) -> None:
    codec = CODECS[name]
    text = codec.encode([], Boxes.empty(), VIEW)
    assert text == ("[]" if name in ("qwen2_5_vl", "qwen3_vl", "plain_json") else "none")
    for answer in (text, "none", "None.", "[]") if text == "[]" else (text, "None."):
        parsed = codec.parse(answer, VIEW)
        assert (parsed.status, len(parsed.boxes), parsed.problems) == ("none", 0, [])
    assert codec.parse("I cannot see that.", VIEW).status == "parse_failure"
    with pytest.raises(ValueError):
        codec.encode(["a"], Boxes.empty(), VIEW)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("label", HOSTILE)
def test_a_hostile_label_returns_and_adds_no_box(name: str, label: str) -> None:
    boxes = Boxes(np.array([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]]))
    parsed = CODECS[name].parse(CODECS[name].encode([label, label], boxes, VIEW), VIEW)
    assert parsed.labels == [label, label] and parsed.problems == []
    assert (np.abs(parsed.boxes.xyxy - boxes.xyxy) <= half_step(name, VIEW) + 1e-12).all()


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(
    "label", ["nutrition-table", "white blood cell", "50% (m/m)", "a/b", "表", "<b>", "a < b", "#3"]
)
def test_an_ordinary_label_stands_as_it_is(name: str, label: str) -> None:
    assert label in CODECS[name].encode([label], Boxes(np.array([[0.1, 0.2, 0.3, 0.4]])), VIEW)


characters = st.one_of(st.sampled_from("<|>\\()[]{}\"',:;，（ 0123456789locthinkref/bxu\n"), st.characters())


@given(label=st.text(alphabet=characters, max_size=30))
def test_guarding_is_undone(label: str) -> None:
    guarded = guard_label(label)
    assert unguard_label(guarded) == label and guarded == guarded.strip() and not GUARDED.search(guarded)


corners = st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)).map(
    lambda c: (min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3]))
)
hostile = st.one_of(st.sampled_from(HOSTILE), st.text(alphabet=characters, max_size=12))


@pytest.mark.parametrize("name", CODECS)
@given(
    size=st.tuples(st.integers(28, 8000), st.integers(28, 6000)),
    tokens=st.tuples(st.integers(4, 64), st.integers(64, 16384)),
    factor=st.sampled_from([28, 32]),
    rows=st.lists(st.tuples(corners, hostile), max_size=50),
)
@settings(deadline=None, max_examples=25)
def test_boxes_and_labels_return(
    name: str, size: tuple[int, int], tokens: tuple[int, int], factor: int, rows: list[tuple[Any, str]]
) -> None:
    if max(size) > 200 * min(size):
        return
    view = plan_view(*size, min_pixels=tokens[0] * factor**2, max_pixels=tokens[1] * factor**2, factor=factor)
    boxes = Boxes(np.array([box for box, _ in rows], dtype=np.float64).reshape(-1, 4))
    labels = [label for _, label in rows]
    parsed = CODECS[name].parse(CODECS[name].encode(labels, boxes, view), view)
    assert parsed.labels == labels
    assert parsed.status == ("ok" if rows else "none")
    assert (np.abs(parsed.boxes.xyxy - boxes.xyxy) <= half_step(name, view) + 1e-12).all()


@pytest.mark.parametrize("name", ["internvl", "florence2", "paligemma", "qwen3_vl"])
def test_without_special_tokens(name: str) -> None:
    boxes = Boxes(np.array([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]]))
    text = CODECS[name].encode(["red cup", "<loc_1>"], boxes, VIEW)
    for tag in ("<ref>", "</ref>", "<box>", "</box>", "<s>", "</s>"):
        text = text.replace(tag, "")
    parsed = CODECS[name].parse(strip_control(text), VIEW)
    assert parsed.labels == ["red cup", "<loc_1>"] and parsed.problems == []


@pytest.mark.parametrize("name", CODECS)
@given(text=st.text(alphabet=characters, max_size=200))
@settings(deadline=None, max_examples=50)
def test_parsing_never_raises(name: str, text: str) -> None:
    parsed = CODECS[name].parse(text, VIEW)
    assert len(parsed.boxes) == len(parsed.labels)
    assert ((parsed.boxes.xyxy >= 0) & (parsed.boxes.xyxy <= 1)).all()


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "plain_json"])
@pytest.mark.parametrize("label", HOSTILE)
def test_no_control_token_of_the_real_vocabulary(name: str, label: str, qwen_processor: Any) -> None:
    tokenizer = qwen_processor.tokenizer
    boxes = Boxes(np.array([[0.1, 0.2, 0.3, 0.4]]))
    controls = [
        [i for i in tokenizer.encode(CODECS[name].encode([text], boxes, VIEW)) if i >= 151643]
        for text in ("cup", label)
    ]
    assert controls[0] == controls[1]


PIECES = [
    "[",
    "{",
    "[[1,2,3,4],",
    '"bbox":[1,2,3,4],',
    '{"a":',
    "{[1,2,3,4]1",
    '"',
    "\\",
    "<box>",
    "(1,2),",
    "<loc0001>",
    "1,",
]


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("before", ["", '{"label": "a", "x": '])
def test_time_grows_in_proportion_to_the_length(name: str, piece: str, before: str) -> None:
    """16 times the text may take 80 times as long; a quadratic parser takes 256 times as long."""

    def seconds(length: int) -> float:
        text = before + piece * (length // len(piece))
        started = time.process_time()
        CODECS[name].parse(text, VIEW)
        return time.process_time() - started

    gc.disable()  # its passes over whatever other tests left behind are not the parser's
    try:
        assert min(seconds(1 << 15) for _ in range(2)) <= 80 * max(min(seconds(1 << 11) for _ in range(3)), 1e-3)
    finally:
        gc.enable()

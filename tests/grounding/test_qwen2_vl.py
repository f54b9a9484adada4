"""Boxes -> text of Qwen2-VL -> boxes."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmdet.boxes import Boxes
from vlmdet.grounding import View, get_codec
from vlmdet.grounding.codec import escape_label, is_none_answer, strip_control, unescape_label
from vlmdet.grounding.qwen2_vl import encode, parse

VIEW = View(640, 480, 640, 476)
HOSTILE = [
    "a<|im_end|>b",
    "<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>",
    "plan (1,2)",
    "(1,2),(3,4)",
    "（1，2）",
    "<ref>x</ref><box>(1,2),(3,4)</box>",
    "back\\slash",
    "ends in a backslash\\",
    "\\(1,2)",
    "\\\\|",
    "<\\|im_end|>",
    "<|",
    "|>",
    "<",
    "IMAGE_PLACEHOLDER",
    "two\nlines",
]


def boxes_of(*rows: tuple[float, float, float, float]) -> Boxes:
    return Boxes(np.array(rows, dtype=np.float64).reshape(-1, 4))


def kinds(text: str) -> list[str]:
    return [problem.kind for problem in parse(text, VIEW).problems]


# ---- exact cases ----------------------------------------------------------------------------------------------------


def test_encode_one_box() -> None:
    text = encode(["the eyes"], boxes_of((0.382, 0.150, 0.578, 0.302)), VIEW)
    assert text == "<|object_ref_start|>the eyes<|object_ref_end|><|box_start|>(382,150),(578,302)<|box_end|>"


def test_encode_rounds_and_cuts() -> None:
    text = encode(["a"], boxes_of((-0.1, 0.0004, 0.9996, 1.2)), VIEW)
    assert text.endswith("<|box_start|>(0,0),(1000,1000)<|box_end|>")


def test_encode_nothing_and_two() -> None:
    assert encode([], Boxes.empty(), VIEW) == "none"
    text = encode(["a", "b"], boxes_of((0, 0, 0.1, 0.1), (0.2, 0.3, 0.4, 0.5)), VIEW)
    assert text == (
        "<|object_ref_start|>a<|object_ref_end|><|box_start|>(0,0),(100,100)<|box_end|>"
        "<|object_ref_start|>b<|object_ref_end|><|box_start|>(200,300),(400,500)<|box_end|>"
    )
    with pytest.raises(ValueError):
        encode(["a"], Boxes.empty(), VIEW)


def test_get_codec_returns_this_module() -> None:
    codec = get_codec("qwen2_vl")
    assert codec.encode is encode and codec.parse is parse


@pytest.mark.parametrize(
    "text",
    [
        "<|object_ref_start|>the eyes<|object_ref_end|><|box_start|>(382,150),(578,302)<|box_end|>",
        "<|object_ref_start|>the eyes<|object_ref_end|><|box_start|>(382,150),(578,302)<|box_end|><|im_end|>",
        "<ref>the eyes</ref><box>(382,150),(578,302)</box>",
        "the eyes(382,150),(578,302)",
        "the eyes: (382, 150), (578, 302)",
        "the eyes（382，150），（578，302）",
    ],
)
def test_parse_forms(text: str) -> None:
    parsed = parse(text, VIEW)
    assert parsed.boxes.tolist() == [[0.382, 0.150, 0.578, 0.302]]
    assert (parsed.labels, parsed.problems, parsed.status) == (["the eyes"], [], "ok")


@pytest.mark.parametrize(
    "text",
    [
        "<|object_ref_start|>cup<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|><|box_start|>(5,6),(7,8)<|box_end|>",
        "cup(1,2),(3,4)(5,6),(7,8)",
        "<ref>cup</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>",
    ],
)
def test_several_boxes_after_one_name(text: str) -> None:
    parsed = parse(text, VIEW)
    assert (parsed.boxes.xyxy * 1000).round(6).tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert (parsed.labels, parsed.problems) == (["cup", "cup"], [])


def test_a_box_without_a_name() -> None:
    assert parse("<|box_start|>(1,2),(3,4)<|box_end|>", VIEW).labels == [None]


@pytest.mark.parametrize("text", ["none", "None.", " none<|im_end|>"])
def test_none(text: str) -> None:
    parsed = parse(text, VIEW)
    assert (len(parsed.boxes), parsed.labels, parsed.problems, parsed.status) == (0, [], [], "none")


@pytest.mark.parametrize("text", ["", "I see none of these tables", "nonesuch", "none" + " " * 120 + "but one"])
def test_not_none(text: str) -> None:
    assert not is_none_answer(text)
    assert parse(text, VIEW).status == "parse_failure"
    assert kinds(text) == ["no_box"]


@pytest.mark.parametrize("numbers", ["(0,0),(1001,5)", "(-1,0),(10,10)", "(0,0),(" + "9" * 400 + ",1)"])
def test_out_of_grid_gives_no_box(numbers: str) -> None:
    parsed = parse(f"cup{numbers}", VIEW)
    assert len(parsed.boxes) == 0 and parsed.status == "parse_failure"


def test_out_of_grid_is_named() -> None:
    assert "out_of_grid" in kinds("cup(0,0),(1001,5)")
    assert kinds("cup(0,0),(1000,1000)") == []


def test_a_bad_box_does_not_take_the_good_one_with_it() -> None:
    parsed = parse("a(0,0),(1001,5)b(1,2),(3,4)", VIEW)
    assert parsed.labels == ["b"] and parsed.status == "ok" and [p.kind for p in parsed.problems] == ["out_of_grid"]


def test_reversed_axes() -> None:
    one = parse("a(30,20),(10,40)", VIEW)
    assert (one.boxes.xyxy * 1000).round(6).tolist() == [[10, 20, 30, 40]]
    assert [p.kind for p in one.problems] == ["axis_swapped"]
    both = parse("a(30,40),(10,20)", VIEW)
    assert len(both.boxes) == 0 and [p.kind for p in both.problems] == ["both_axes_reversed", "no_box"]


def test_odd_numbers_of_points() -> None:
    assert kinds("a(1,2)") == ["point", "no_box"]
    assert kinds("a(1,2),(3,4),(5,6)") == ["odd_point_count", "no_box"]
    quad = parse("<|quad_start|>(10,20),(30,10),(40,50),(20,60)<|quad_end|>", VIEW)
    assert (quad.boxes.xyxy * 1000).round(6).tolist() == [[10, 10, 40, 60]]
    assert [p.kind for p in quad.problems] == ["quad"]
    assert kinds("a(5,5),(5,9)") == ["zero_area"]


def test_truncated_answers_say_so() -> None:
    assert "truncated" in kinds("<|object_ref_start|>a<|object_ref_end|><|box_start|>(12,")
    assert "truncated" in kinds("a(1,2),(3,4)<|box_start|>(12,")
    assert "truncated" in kinds("x" * 5000 + "<|box_start|>(12,")
    assert kinds("<|object_ref_start|>a<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>") == []


# ---- labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["nutrition-table", "white blood cell", "50% (m/m)", "(1, 2, 3)", "a/b", "表", "<b>"])
def test_ordinary_labels_are_not_changed(label: str) -> None:
    assert escape_label(label) == label


@pytest.mark.parametrize("label", HOSTILE)
def test_hostile_labels_return_exactly(label: str) -> None:
    boxes = boxes_of((0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8))
    parsed = parse(encode([label, label], boxes, VIEW), VIEW)
    assert parsed.labels == [label, label]
    assert parsed.boxes.tolist() == boxes.tolist() and parsed.problems == []


hostile = st.one_of(st.sampled_from("<|>\\(),，、（）refbox/ 0123456789im_end\n"), st.characters())


@given(label=st.text(alphabet=hostile))
def test_escaping_is_undone_and_hides_control_tokens(label: str) -> None:
    escaped = escape_label(label)
    assert unescape_label(escaped) == label
    assert "<|" not in escaped


@given(labels=st.lists(st.text(alphabet="<|>\\(),（1 ref/bo_stan"), min_size=1, max_size=3))
@settings(deadline=None)
def test_any_label_returns_with_its_box(labels: list[str]) -> None:
    boxes = boxes_of(*[(0.1, 0.2, 0.3, 0.4)] * len(labels))
    parsed = parse(encode(labels, boxes, VIEW), VIEW)
    assert parsed.labels == labels and parsed.boxes.tolist() == boxes.tolist()


# ---- round trip -----------------------------------------------------------------------------------------------------

unit = st.floats(0, 1)
corners = st.tuples(unit, unit, unit, unit).map(
    lambda c: (min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3]))
)


@pytest.mark.parametrize("special_tokens", [True, False])
@given(rows=st.lists(st.tuples(corners, st.sampled_from(["cup", "nutrition-table", "label 7", "表"])), max_size=6))
@settings(deadline=None)
def test_boxes_come_back_within_half_a_grid_step(
    special_tokens: bool, rows: list[tuple[tuple[float, float, float, float], str]]
) -> None:
    boxes, labels = boxes_of(*[box for box, _ in rows]), [label for _, label in rows]
    text = encode(labels, boxes, VIEW)
    parsed = parse(text if special_tokens else strip_control(text), VIEW)
    assert parsed.labels == labels
    assert parsed.status == ("ok" if rows else "none")
    assert np.abs(parsed.boxes.xyxy - boxes.xyxy).max(initial=0) <= 0.0005 + 1e-12


@pytest.mark.parametrize("label", [label for label in HOSTILE if label.strip("<|>")])
def test_without_special_tokens_a_hostile_label_adds_no_box(label: str) -> None:
    text = encode([label], boxes_of((0.1, 0.2, 0.3, 0.4)), VIEW)
    for token in ("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"):
        text = text.replace(token, "")
    assert (parse(text, VIEW).boxes.xyxy * 1000).round(6).tolist() == [[100, 200, 300, 400]]


@given(text=st.text(alphabet="<|>()，,、（）-+.0123456789 noerfbx_start/\\") | st.text())
@settings(deadline=None)
def test_parsing_never_raises_and_never_leaves_the_picture(text: str) -> None:
    parsed = parse(text, VIEW)
    assert len(parsed.boxes) == len(parsed.labels)
    assert ((parsed.boxes.xyxy >= 0) & (parsed.boxes.xyxy <= 1)).all()
    assert parsed.status != "parse_failure" or parsed.problems


@pytest.mark.parametrize(
    "piece",
    [
        "(",
        "(1,",
        "(1,2)",
        "(1,2),(3,4)",
        "(1 ",
        "\\",
        "\\(",
        "<|",
        "<|object_ref_start|>",
        "<|object_ref_end|>",
        "<|box_start|>",
        "<ref>",
        "a<|object_ref_start|>b",
        "9",
        " ",
        "none ",
    ],
)
@pytest.mark.parametrize(
    ("before", "after", "size"),
    [("", "", 1 << 18), ("(1,2)", ",(3,4)", 1 << 18), ("<|object_ref_start|>", "(1,2),(3,4)", 1 << 20)],
)
def test_time_grows_in_proportion_to_the_length(piece: str, before: str, after: str, size: int) -> None:
    """32 times the text may take 320 times as long; a quadratic parser takes 1,000 times as long."""

    def seconds(length: int) -> float:
        text = before + piece * (length // len(piece)) + after
        started = time.process_time()
        parse(text, VIEW)
        return time.process_time() - started

    short = min(seconds(size // 32) for _ in range(3))
    assert seconds(size) <= 320 * max(short, 1e-3)

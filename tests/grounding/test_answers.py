"""Real answers, and answers like them: what is read, and what is named as a problem.

The readings were decided before any parser ran on the texts.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlmdet.boxes import Boxes
from vlmdet.grounding import CODECS, View
from vlmdet.grounding.reading import LONGEST, final_answer

FILE = Path(os.environ.get("VLMDET_SHARED", Path(__file__).parents[3] / "shared")) / "data/outputs/dev.jsonl"
ROWS = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()] if FILE.is_file() else []
VIEW = View(2000, 2000, 1000, 1000)
Reading = list[tuple[str | None, list[float]]]


def read(codec: str, text: str, view: View = VIEW) -> tuple[Reading, list[str], str]:
    """Return names with numbers of the text's own grid, kinds of problems, status."""
    parsed = CODECS[codec].parse(text, view)
    width, height, shift = 1000.0, 1000.0, 0.0
    if codec == "qwen2_5_vl":
        width, height = view.resized_width, view.resized_height
    elif codec == "paligemma":
        width = height = 1023.0
    elif codec == "florence2":
        shift = 0.5
    rows = (parsed.boxes.xyxy * [width, height, width, height] - shift).round(6).tolist()
    return list(zip(parsed.labels, rows, strict=True)), [problem.kind for problem in parsed.problems], parsed.status


@pytest.mark.skipif(not ROWS, reason=f"no {FILE}; set VLMDET_SHARED")
@pytest.mark.parametrize("row", ROWS or [{}], ids=range(max(1, len(ROWS))))
def test_real_answers(row: dict[str, Any]) -> None:
    found, problems, status = read(row["codec"], row["text"], View(*row["view"]))
    allowed = [[(box["label"], box["bbox"]) for box in reading] for reading in row["accept"]]
    if row["label_optional"]:
        found = [(None, box) for _, box in found]
        allowed = [[(None, box) for _, box in reading] for reading in allowed]
    assert found in allowed
    assert (status == "ok") == bool(found) and (status != "parse_failure" or problems)


A, B = [1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]
JSON = [
    # text, reading, kinds of problems (`no_box` left out)
    ('```json\n[\n\t{"bbox_2d": [1, 2, 3, 4], "label": "cup"},\n]\n```', [("cup", A)], []),
    ('Sure! Here you go:\n[{"bbox": [1, 2, 3, 4], "label": "cup"}]\nHope it helps.', [("cup", A)], []),
    ("{'box_2d': [1, 2, 3, 4], 'label': 'the dog's bowl'}", [("the dog's bowl", A)], []),
    ("[{'bbox_2d': (1, 2, 3, 4), 'label': 'cup', 'visible': True, 'score': None}]", [("cup", A)], []),
    ('{"bbox_2d": ["1", "2", "3", "4"], "label": "cup"}', [("cup", A)], ["number_as_text"]),
    ('{"bbox_2d": "1, 2, 3, 4", "label": "cup"}', [("cup", A)], ["number_as_text"]),
    ('{"bbox_2d": [1.0, 2.0, 3.0, 4.0], "label": "cup"}', [("cup", A)], []),
    ('{"bbox_2d": [1, 2, 3, 4, "label": "cup"}', [("cup", A)], ["bracket"]),
    ('{"bbox_2d": 1, 2, 3, 4, "label": "cup"}', [("cup", A)], ["bracket"]),
    ('[{"bbox_2d": [1, 2, 3, 4}, {"bbox_2d": [5, 6, 7, 8]}]', [(None, A), (None, B)], ["bracket"]),
    ('"bbox_2d": [1, 2, 3, 4], "label": "cup"', [("cup", A)], []),
    ("{bbox_2d: [1, 2, 3, 4], label: red cup}", [("red cup", A)], []),
    ("{“bbox_2d”：［1，2，3，4］，“label”：“杯子”}", [("杯子", A)], []),
    ('{\\"bbox_2d\\": [1, 2, 3, 4], \\"label\\": \\"cup\\"}', [("cup", A)], []),
    ('[{"bbox_2d": [1, 2, 3, 4], // left\n "label": "cup"}]', [("cup", A)], []),
    ('{"label": "\\u00e9t\\u00e9", "bbox_2d": [1, 2, 3, 4]}', [("été", A)], []),
    ('{"label": "cup, "bbox_2d": [1, 2, 3, 4]}', [("cup", A)], ["quote"]),
    ('{"label": "19" rack", "bbox_2d": [1, 2, 3, 4]}', [('19" rack', A)], []),
    ('[{"bbox_2d": [1, 2, 3, 4], "label": "cup"}, {"bbox_2d": [5, 6, 7', [("cup", A)], ["truncated"]),
    ('[{"bbox_2d": [1, 2, 3, 4], "label": "cup"}, {"bbox_2d": [5, 6, 7, 8], "la', [("cup", A), (None, B)], None),
    ('[{"bbox_2d": [1, 2, 3, 4], "label": "cup"}', [("cup", A)], ["truncated"]),
    ("[[1, 2, 3, 4], [5, 6, 7, 8]]", [(None, A), (None, B)], []),
    ('{"cup": [1, 2, 3, 4], "dog": [[5, 6, 7, 8]]}', [("cup", A), ("dog", B)], []),
    ('{"objects": [{"name": "cup", "bbox": [1, 2, 3, 4]}]}', [("cup", A)], []),
    ('{"label": "cup", "bboxes": [[1, 2, 3, 4], [5, 6, 7, 8]]}', [("cup", A), ("cup", B)], []),
    ('[["cup", 1, 2, 3, 4], ["dog", [5, 6, 7, 8]]]', [("cup", A), ("dog", B)], []),
    ("cup: [1, 2, 3, 4]\ndog: [5, 6, 7, 8]", [("cup", A), ("dog", B)], []),
    ("The bounding box of the cup is [1, 2, 3, 4].", [(None, A)], []),
    ('{"label": "cup", "x1": 1, "y1": 2, "x2": 3, "y2": 4}', [("cup", A)], []),
    ('{"label": "cup", "bbox": {"xmin": 1, "ymin": 2, "xmax": 3, "ymax": 4}}', [("cup", A)], []),
    ('{"label": "cup", "x": 1, "y": 2, "width": 2, "height": 2}', [("cup", A)], ["xywh"]),
    ('{"bbox_2d": [[1, 2], [3, 4]], "label": "cup"}', [("cup", A)], []),
    ('{"quad": [1, 2, 3, 2, 3, 4, 1, 4], "label": "cup"}', [("cup", A)], ["quad"]),
    ('{"bbox_2d": [1, 2, 3, 4], "bbox_2d": [5, 6, 7, 8], "label": "cup"}', [("cup", A), ("cup", B)], ["duplicate_key"]),
    ('{"bbox_2d": [1, 2, 3, 4], "text_content": "SALE"}', [("SALE", A)], []),
    ('{"point_2d": [1, 2], "label": "cup"}', [], ["point"]),
    ('{"bbox_2d": [NaN, 2, 3, 4], "label": "cup"}', [], ["out_of_grid"]),
    ('{"bbox_2d": [1, 2, Infinity, 4], "label": "cup"}', [], ["out_of_grid"]),
    ('{"bbox_2d": [1, 2, 3, 1001], "label": "cup"}', [], ["out_of_grid"]),
    ('{"bbox_2d": [3, 2, 1, 4], "label": "cup"}', [("cup", A)], ["axis_swapped"]),
    ('{"bbox_2d": [3, 4, 1, 2], "label": "cup"}', [], ["both_axes_reversed"]),
    ('{"bbox_2d": [1, 2, 3], "label": "cup"}', [], ["odd_number_count"]),
    ('{"bbox_2d": [0.1, 0.2, 0.3, 0.4], "label": "cup"}', [], ["fractions"]),
    ('{"bbox_2d": ["10%", "20%", "30%", "40%"], "label": "cup"}', [], ["percent"]),
    ("<think>[5, 6, 7, 8]?</think>\n[1, 2, 3, 4]", [(None, A)], []),
    ("1, 2, 3, 4", [(None, A)], ["bracket"]),
    ("<ref>cup</ref><box>(1,2),(3,4)</box>", [("cup", A)], ["other_notation"]),
    ('{"invoice": "123", "total": "8.00<all>"}', [], []),
]


@pytest.mark.parametrize("codec", ["qwen2_5_vl", "qwen3_vl", "plain_json"])
@pytest.mark.parametrize(("text", "reading", "kinds"), JSON)
def test_json(codec: str, text: str, reading: Reading, kinds: list[str] | None) -> None:
    found, problems, status = read(codec, text)
    assert found == reading and status == ("ok" if reading else "parse_failure")
    if kinds is not None:
        assert [kind for kind in problems if kind != "no_box"] == kinds


OTHERS = [
    ("qwen2_vl", '[{"bbox_2d": [1, 2, 3, 4], "label": "cup"}]', [("cup", A)], ["other_notation"]),
    ("qwen2_vl", "cup[1, 2, 3, 4]", [("cup", A)], ["other_notation"]),
    ("qwen2_vl", "<ref>cup</ref><box>1,2,3,4</box>", [("cup", A)], ["bracket", "other_notation"]),
    ("qwen2_vl", "<|object_ref_start|>cup<|object_ref_end|><|box_start|>(1,2,3,4)<|box_end|>", [("cup", A)], ["brackets"]),
    ("qwen2_vl", "<|box_start|>(1,2),(3,4<|box_end|>", [(None, A)], ["bracket"]),
    ("qwen2_vl", "- cup: (1,2),(3,4)\n- dog: (5,6),(7,8)", [("cup", A), ("dog", B)], []),
    ("qwen2_vl", "a cup(1,2),(3,4) and a dog(5,6),(7,8)", [("a cup", A), ("a dog", B)], []),
    ("qwen2_vl", "The cup is located at (1,2),(3,4).", [(None, A)], []),
    ("qwen2_vl", "[]", [], []),
    ("paligemma", "<loc0002><loc0001><loc0004><loc0003> cup ; <loc0006><loc0005><loc0008><loc0007> dog<eos>",
     [("cup", A), ("dog", B)], []),
    ("paligemma", "<loc0002><loc0001><loc0004><loc0003><loc0006><loc0005><loc0008><loc0007> cup", [("cup", A), ("cup", B)], []),
    ("paligemma", "<loc0002><loc0001><loc0004><loc0003><seg001><seg002> cup", [("cup", A)], ["mask_dropped"]),
    ("paligemma", "<loc0002><loc0001><loc0004><loc0003>", [(None, A)], []),
    ("paligemma", "<loc0002><loc0001><loc0004> cup", [], ["odd_number_count"]),
    ("paligemma", "<loc0002><loc0001><loc0004><loc1024> cup", [], ["out_of_grid"]),
    ("paligemma", "<loc0002><loc0001><loc0004><loc0003> cup ; <loc0006><loc00", [("cup", A)], ["odd_number_count", "truncated"]),
    ("florence2", "</s><s>cup<loc_1><loc_2><loc_3><loc_4>dog<loc_5><loc_6><loc_7><loc_8></s>", [("cup", A), ("dog", B)], []),
    ("florence2", "<s>cup<loc_1><loc_2><loc_3><loc_4><loc_5><loc_6><loc_7><loc_8></s><pad>", [("cup", A), ("cup", B)], []),
    ("florence2", "<OD>cup<loc_1><loc_2><loc_3><loc_4>", [("cup", A)], []),
    ("florence2", "SALE<loc_1><loc_2><loc_3><loc_2><loc_3><loc_4><loc_1><loc_4>", [("SALE", A)], ["quad"]),
    ("florence2", "cup<loc_1><loc_2><loc_3><loc_1000>", [], ["out_of_grid"]),
    ("florence2", "<loc_1><loc_2><loc_3><loc_4>", [(None, A)], []),
    ("internvl", "<ref>cup</ref><box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box>", [("cup", A), ("cup", B)], []),
    ("internvl", "cup[[1, 2, 3, 4]]\ndog[[5, 6, 7, 8]]", [("cup", A), ("dog", B)], []),
    ("internvl", "<ref>cup</ref><box>[[1, 2, 3, 4]]</box>, <ref>dog</ref><box>[[5, 6, 7, 8", [("cup", A)], ["truncated"]),
    ("internvl", "<box>[[1, 2, 3, 4]]</box>", [(None, A)], []),
    ("internvl", '{"label": "cup", "bbox": [1, 2, 3, 4]}', [("cup", A)], ["other_notation"]),
]  # fmt: skip


@pytest.mark.parametrize(("codec", "text", "reading", "kinds"), OTHERS)
def test_other_families(codec: str, text: str, reading: Reading, kinds: list[str]) -> None:
    found, problems, status = read(codec, text)
    assert found == reading and status == ("ok" if reading else "none" if text == "[]" else "parse_failure")
    assert [kind for kind in problems if kind != "no_box"] == kinds


@pytest.mark.parametrize("codec", ["qwen2_5_vl", "qwen3_vl", "plain_json"])
@pytest.mark.parametrize(
    "text",
    ["[]", "```json\n[]\n```", "json\n[]\n", '{"objects": []}', '[{"bbox_2d": [], "label": "cup"}]', "none", "None."],
)
def test_explicitly_nothing(codec: str, text: str) -> None:
    assert read(codec, text)[0::2] == ([], "none")


def test_reasoning_is_no_answer() -> None:
    assert final_answer("<think>a</think>b") == "b"
    assert final_answer("<think>a</think><answer>b</answer>c") == "b"
    assert final_answer("<think>a") == ""
    assert final_answer("a") == "a"


@pytest.mark.parametrize("name", CODECS)
def test_what_is_not_read_of_an_endless_answer_is_named(name: str) -> None:
    view = View(640, 480, 644, 476)
    one = CODECS[name].encode(["cup"], Boxes(np.array([[0.1, 0.2, 0.5, 0.6]])), view)
    parsed = CODECS[name].parse(one + " " * LONGEST + one, view)
    assert parsed.labels == ["cup"]
    assert [problem.kind for problem in parsed.problems].count("too_long") == 1
    assert "too_long" not in [problem.kind for problem in CODECS[name].parse(one, view).problems]

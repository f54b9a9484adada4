"""Order policies, and absolute pixels of the picture that the model sees."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmdet.boxes import Boxes
from vlmdet.data.dataset import build_messages, build_rows
from vlmdet.errors import ConfigError
from vlmdet.grounding.sizes import plan_view
from vlmdet.records import Sample

SMALL_LOW, LARGE_HIGH, SMALL_HIGH = [0.0, 0.8, 0.1, 0.9], [0.5, 0.0, 0.9, 0.4], [0.1, 0.0, 0.2, 0.1]
BOXES = Boxes(np.array([SMALL_LOW, LARGE_HIGH, SMALL_HIGH]))


def order(box_order: str, rows: tuple[int, ...] = (0, 1, 2)) -> str:
    names = [list("abc")[i] for i in rows]
    text = build_messages(["a", "b", "c"], boxes=BOXES[list(rows)], labels=names, box_order=box_order)[-1]
    answer = text["content"][0]["text"]
    return "".join(sorted("abc", key=lambda name: answer.index(f"start|>{name}<")))


def test_policies() -> None:
    assert order("as_given") == "abc"
    assert order("raster") == "cba"  # both upper ones first, the left one of them first
    assert order("large_first") == "bca"  # equal areas in raster order
    assert order("shuffle") == order("shuffle", (2, 0, 1)) == order("shuffle", (1, 2, 0))
    with pytest.raises(ConfigError, match="box order"):
        order("smallest")


def test_shuffled_rows_differ_from_each_other() -> None:
    orders = set()
    for i in range(12):
        boxes = Boxes(BOXES.xyxy * (1 - i / 100))
        text = build_messages(["a"], boxes=boxes, labels=list("abc"), box_order="shuffle")[-1]["content"][0]["text"]
        orders.add(tuple(sorted("abc", key=lambda name: text.index(f"start|>{name}<"))))
    assert len(orders) > 2


def test_pixels_are_those_of_the_resized_picture(tmp_path: Path) -> None:
    Image.new("RGB", (1000, 500)).save(tmp_path / "a.png")
    sample = Sample("a", tmp_path / "a.png", 1000, 500, Boxes(np.array([[0.1, 0.2, 0.3, 0.4]])), ("cup",), "a.png:1")
    view_of = partial(plan_view, min_pixels=3136, max_pixels=28 * 28 * 100)
    # 1000 x 500 under 78,400 pixels: times .396, 396 x 198, down to 392 x 196
    rows = build_rows([sample], labels=["cup"], codec="qwen2_5_vl", view_of=view_of)
    answer = rows[0]["messages"][-1]["content"][0]["text"]
    assert answer == '[{"bbox_2d": [39, 39, 118, 78], "label": "cup"}]'  # 39.2 39.2 117.6 78.4
    with pytest.raises(ConfigError, match="which size"):
        build_rows([sample], labels=["cup"], codec="qwen2_5_vl")

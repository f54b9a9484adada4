"""Boxes: exact small cases, every format there and back, and turns against Pillow's own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from vlmdet.boxes import FORMATS, FRACTIONS, Boxes, BoxFormat, many_to_fractions
from vlmdet.errors import ConfigError, DataError

sides = st.integers(1, 5000)
corners = st.lists(st.tuples(*[st.floats(-0.5, 1.5)] * 4), max_size=5)


def test_there_are_twelve_formats() -> None:
    assert len({str(box_format) for box_format in FORMATS}) == 12


@pytest.mark.parametrize(
    ("text", "values"),
    [  # x from 20 to 60 and y from 10 to 40, in a picture of 200 x 100
        ("xyxy/pixel", [20, 10, 60, 40]),
        ("yxyx/pixel", [10, 20, 40, 60]),
        ("xywh/pixel", [20, 10, 40, 30]),
        ("cxcywh/pixel", [40, 25, 40, 30]),
        ("xyxy/fraction", [0.1, 0.1, 0.3, 0.4]),
        ("yxyx/fraction", [0.1, 0.1, 0.4, 0.3]),
        ("xywh/fraction", [0.1, 0.1, 0.2, 0.3]),
        ("cxcywh/fraction", [0.2, 0.25, 0.2, 0.3]),
        ("xyxy/per_mille", [100, 100, 300, 400]),
        ("yxyx/per_mille", [100, 100, 400, 300]),
        ("xywh/per_mille", [100, 100, 200, 300]),
        ("cxcywh/per_mille", [200, 250, 200, 300]),
    ],
)
def test_one_box_in_every_format(text: str, values: list[float]) -> None:
    box_format = BoxFormat.parse(text)
    boxes = Boxes.from_array([values], box_format, 200, 100)
    np.testing.assert_allclose(boxes.xyxy, [[0.1, 0.1, 0.3, 0.4]], atol=1e-12)
    np.testing.assert_allclose(boxes.to_array(box_format, 200, 100), [values], atol=1e-9)
    assert str(box_format) == text


@given(rows=corners, width=sides, height=sides, box_format=st.sampled_from(FORMATS))
def test_every_format_there_and_back(
    rows: list[tuple[float, ...]], width: int, height: int, box_format: BoxFormat
) -> None:
    boxes = Boxes.from_array(rows, FRACTIONS, width, height)
    again = Boxes.from_array(boxes.to_array(box_format, width, height), box_format, width, height)
    np.testing.assert_allclose(again.xyxy, boxes.xyxy, atol=1e-9)
    assert again.xyxy.shape == (len(rows), 4)
    assert again.xyxy.dtype == np.float64


@pytest.mark.parametrize("text", ["xxyy/pixel", "xyxy/pixels", "xyxy", "", "xyxy/pixel/pixel"])
def test_unknown_format_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        BoxFormat.parse(text)


@pytest.mark.parametrize(
    "values", [[[1, 2, 3]], [[1, 2, 3, float("nan")]], [[1, 2, 3, float("inf")]], [["a", 0, 0, 0]], [[1, 2, 3, None]]]
)
def test_what_is_not_four_finite_numbers_is_refused(values: list[list[object]]) -> None:
    with pytest.raises(DataError):
        Boxes.from_array(values, FRACTIONS, 10, 10)


@pytest.mark.parametrize("size", [(0, 10), (10, 0), (-1, 10)])
def test_a_picture_without_sides_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(DataError):
        Boxes.from_array([[0, 0, 1, 1]], FRACTIONS, *size)


def test_no_boxes() -> None:
    for values in ([], np.zeros((0, 4))):
        boxes = Boxes.from_array(values, FRACTIONS, 10, 10)
        assert boxes.xyxy.shape == (0, 4)
        assert boxes.tolist() == []
        assert boxes.iou(boxes).shape == (0, 0)
        assert boxes.turned(6).xyxy.shape == (0, 4)
    assert len(Boxes.empty()) == 0


def test_iou_area_and_clip_of_known_boxes() -> None:
    first = Boxes.from_array([[0, 0, 0.5, 0.5], [0.5, 0.5, 0.5, 0.9]], FRACTIONS, 1, 1)
    second = Boxes.from_array([[0.25, 0, 0.75, 0.5], [0, 0, 0.5, 0.5], [0.6, 0.6, 0.9, 0.9]], FRACTIONS, 1, 1)
    np.testing.assert_allclose(first.iou(second), [[1 / 3, 1, 0], [0, 0, 0]], atol=1e-12)
    np.testing.assert_allclose(first.area(), [0.25, 0])
    out = Boxes.from_array([[-0.5, 0.2, 0.4, 1.7]], FRACTIONS, 1, 1)
    assert out.clip().tolist() == [[0.0, 0.2, 0.4, 1.0]]
    assert out.tolist() == [[-0.5, 0.2, 0.4, 1.7]]


def test_iou_of_two_boxes_without_area_is_zero() -> None:
    point = Boxes.from_array([[0.5, 0.5, 0.5, 0.5]], FRACTIONS, 1, 1)
    assert point.iou(point).tolist() == [[0.0]]


@given(first=corners, second=corners)
def test_iou_is_symmetric_and_within_one(first: list[tuple[float, ...]], second: list[tuple[float, ...]]) -> None:
    a, b = (Boxes.from_array(rows, FRACTIONS, 1, 1) for rows in (first, second))
    forward = a.iou(b)
    np.testing.assert_allclose(forward, b.iou(a).T)
    assert ((forward >= 0) & (forward <= 1 + 1e-12)).all()


def test_raster_order_goes_down_then_right() -> None:
    boxes = Boxes.from_array([[0.5, 0.5, 1, 1], [0.6, 0.1, 1, 1], [0.2, 0.1, 1, 1]], FRACTIONS, 1, 1)
    assert boxes.raster_order().tolist() == [2, 1, 0]


def _extent(image: Image.Image) -> list[int]:
    rows, columns = np.nonzero(np.asarray(image) > 0)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_follows_the_picture(orientation: int) -> None:
    """A rectangle away from every axis of symmetry; Pillow turns the pixels, we turn the box."""
    stored = Image.new("L", (40, 24), 0)
    stored.paste(255, (3, 5, 21, 11))
    stored.getexif()[274] = orientation
    upright = ImageOps.exif_transpose(stored)
    boxes = Boxes.from_array([[3, 5, 21, 11]], BoxFormat("xyxy", "pixel"), *stored.size).turned(orientation)
    np.testing.assert_allclose(boxes.to_array(BoxFormat("xyxy", "pixel"), *upright.size), [_extent(upright)], atol=1e-9)
    assert upright.size == ((40, 24) if orientation < 5 else (24, 40))


@given(rows=corners, orientation=st.integers(1, 8))
def test_turning_back_gives_the_same_boxes(rows: list[tuple[float, ...]], orientation: int) -> None:
    boxes = Boxes.from_array(rows, FRACTIONS, 1, 1)
    back = {6: 8, 8: 6}.get(orientation, orientation)
    np.testing.assert_allclose(boxes.turned(orientation).turned(back).xyxy, boxes.xyxy, atol=1e-12)


@given(
    rows=st.lists(st.tuples(*[st.floats(-1e6, 1e6)] * 4), min_size=1, max_size=5), box_format=st.sampled_from(FORMATS)
)
def test_boxes_of_many_pictures_are_those_of_each(rows: list[tuple[float, ...]], box_format: BoxFormat) -> None:
    sizes = np.array([(7 + number, 900 - number) for number in range(len(rows))])
    together = many_to_fractions(np.array(rows), box_format, sizes)
    each = [
        Boxes.from_array([row], box_format, int(w), int(h)).xyxy[0] for row, (w, h) in zip(rows, sizes, strict=True)
    ]
    np.testing.assert_array_equal(together, each)

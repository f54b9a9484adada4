"""All changes at once: every box still lies on its own object, and the picture without a box passes too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from vlmdet.boxes import Boxes
from vlmdet.data.augment import augment, augment_rows
from vlmdet.grounding import View, get_codec

PLACES = {"red sign": (0, 10, 60, 50), "green sign": (90, 70, 201, 120)}  # pixel edges; two touch the border
COLORS = {"red sign": (255, 0, 0), "green sign": (0, 255, 0)}
GEOMETRY = dict.fromkeys(("flip_horizontal", "flip_vertical", "rotate", "crop", "shrink"), 0.7)
SIZE = (201, 150)


def picture() -> Image.Image:
    image = Image.new("RGB", SIZE, (0, 0, 255))
    for name, (x1, y1, x2, y2) in PLACES.items():
        ImageDraw.Draw(image).rectangle((x1, y1, x2 - 1, y2 - 1), fill=COLORS[name])
    return image


def edges(image: Image.Image, color: tuple[int, int, int]) -> list[int]:
    y, x = np.nonzero((np.asarray(image) == color).all(axis=2))
    return [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]


@pytest.mark.parametrize("seed", range(20))
def test_text_boxes_and_pixels_agree_after_any_mixture(seed: int) -> None:
    boxes = [[x / side for x, side in zip(place, SIZE * 2, strict=True)] for place in PLACES.values()]
    rows = {"id": ["a"], "image": [picture()], "boxes": [boxes], "labels": [list(PLACES)], "messages": [None]}
    out = augment_rows(
        rows, chances=GEOMETRY, asked=list(PLACES), codec="qwen2_vl", box_order="raster", seed=seed, epoch=lambda: 0
    )
    moved = out["image"][0]
    for name, box in zip(PLACES, out["boxes"][0], strict=True):
        np.testing.assert_allclose(np.multiply(box, moved.size * 2), edges(moved, COLORS[name]), atol=1e-6)
    parsed = get_codec("qwen2_vl").parse(out["messages"][0][-1]["content"][0]["text"], View(*moved.size, *moved.size))
    assert not parsed.problems
    assert sorted(parsed.labels) == sorted(PLACES)
    wanted = [out["boxes"][0][list(PLACES).index(str(label))] for label in parsed.labels]
    np.testing.assert_allclose(parsed.boxes.xyxy, wanted, atol=5.1e-4)
    assert list(parsed.boxes.raster_order()) == [0, 1]


@pytest.mark.parametrize("change", GEOMETRY)
def test_each_change_moves_the_box_with_its_picture(change: str) -> None:
    boxes = Boxes(np.array([[x / side for x, side in zip(PLACES["red sign"], SIZE * 2, strict=True)]]))
    for seed in range(8):
        moved, found = augment(picture(), boxes, np.random.default_rng(seed), **{change: 1.0})
        assert moved.size != SIZE or not np.array_equal(np.asarray(moved), np.asarray(picture()))
        np.testing.assert_allclose(
            found.xyxy[0] * (*moved.size, *moved.size), edges(moved, COLORS["red sign"]), atol=1e-6
        )


def test_chances_of_zero_change_nothing_and_color_moves_nothing() -> None:
    image, boxes = picture(), Boxes(np.array([[0.1, 0.2, 0.6, 0.8]]))
    same, kept = augment(image, boxes, np.random.default_rng(0))
    np.testing.assert_array_equal(np.asarray(same), np.asarray(image))
    np.testing.assert_allclose(kept.xyxy, boxes.xyxy)
    other, kept = augment(image, boxes, np.random.default_rng(0), color=1.0)
    assert other.size == image.size
    assert not np.array_equal(np.asarray(other), np.asarray(image))
    np.testing.assert_allclose(kept.xyxy, boxes.xyxy)


@pytest.mark.parametrize("seed", range(5))
def test_a_picture_without_boxes_stays_without(seed: int) -> None:
    rows = {"id": ["a"], "image": [picture()], "boxes": [[]], "labels": [[]], "messages": [None]}
    chances = dict.fromkeys([*GEOMETRY, "color"], 1.0)
    out = augment_rows(
        rows, chances=chances, asked=["red sign"], codec="qwen2_vl", box_order="raster", seed=seed, epoch=lambda: 0
    )
    assert out["boxes"] == [[]]
    assert out["messages"][0][-1]["content"][0]["text"] == "none"
    assert min(out["image"][0].size) > 0


def test_a_row_is_changed_by_seed_epoch_and_id_alone() -> None:
    def moved(row_id: str, seed: int, epoch: int) -> list[list[float]]:
        rows = {"id": [row_id], "image": [picture()], "boxes": [[[0.2, 0.2, 0.5, 0.6]]], "labels": [["red sign"]]}
        torch.rand(3)  # whatever the global generator does
        chances = {"crop": 1.0, "shrink": 1.0}
        out = augment_rows(
            rows,
            chances=chances,
            asked=["red sign"],
            codec="qwen2_vl",
            box_order="raster",
            seed=seed,
            epoch=lambda: epoch,
        )
        return out["boxes"][0]

    first = moved("a", 0, 0)
    assert moved("a", 0, 0) == first
    assert first not in (moved("a", 0, 1), moved("a", 1, 0), moved("b", 0, 0))

"""Boxes drawn on pictures, ground truth beside prediction, and grids of pictures.

When: whenever somebody should look: `predict`, sample pictures during training, the report. Boxes are drawn by
`supervision`, which falls back on numpy and Pillow where there is no OpenCV. Two things it cannot do: it has no
dashed box, so a dashed one is made of its filled rectangles; and its label annotators put text without tall letters
("sun") below its plate and leave accents to a font without any, so text is drawn with Pillow in DejaVu Sans, which
comes with matplotlib, a dependency of supervision.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from vlmdet.boxes import FRACTIONS, Boxes
from vlmdet.errors import DataError
from vlmdet.images import to_upright_rgb
from vlmdet.utils.text import one_line

with warnings.catch_warnings():
    # Without OpenCV supervision asks for it on every import; the fallback draws the few shapes used here as well.
    warnings.filterwarnings("ignore", message="OpenCV", category=UserWarning)
    import supervision as sv

TRUTH_COLOR = "#00d020"
PREDICTION_COLOR = "#ff0000"

CLASS_COLORS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
"""Colours that people with any colour vision tell apart (Okabe and Ito, 2008)."""

OTHER_COLOR = "#ff00ff"
"""Of classes beyond those colours."""


class _Scale(NamedTuple):
    """Sizes in pixels that suit a picture: half the line's width, the text, the room around it."""

    half_line: int
    text: int
    padding: int


def _scale_for(width: int, height: int) -> _Scale:
    """Scale with the longer side, so that a picture scaled down to a thumbnail looks the same whatever its size."""
    side = max(width, height)
    text = max(11, round(0.04 * side))
    return _Scale(
        half_line=round(0.003 * side) if side > 350 else int(side >= 100), text=text, padding=max(1, text // 6)
    )


def visualize_bbox_on_image(
    image: Image.Image,
    boxes: Boxes | Sequence[Sequence[float]],
    labels: Sequence[str | None] | None = None,
    *,
    color: str = "red",
    dashed: bool = False,
) -> Image.Image:
    """Draw boxes and their labels on a copy of a picture.

    When: once per picture that is shown.

    Input: `image`, made upright RGB first; n `boxes`, `Boxes` or rows x1, y1, x2, y2 as fractions of the upright
    picture, cut to it; n `labels`, of any text, None or "" for no label; `color`, a name or `#rrggbb`. Width of lines
    and size of text follow the longer side.
    Output: a new RGB image of the upright size; the input is unchanged.

    Raises:
        DataError: boxes are not rows of four finite numbers.
        ValueError: labels differ from boxes in number, or the colour is unknown.
    """
    canvas = to_upright_rgb(image)
    rectangles = _pixels(_as_boxes(boxes), canvas)
    canvas = _draw_boxes(canvas, rectangles, color, dashed=dashed)
    if labels is not None:
        _draw_labels(canvas, rectangles, labels, color)
    return canvas


def class_colors(labels: Sequence[str]) -> dict[str, str]:
    """Give each label a colour: the first seven their own, the others one in common."""
    return {
        label: CLASS_COLORS[number] if number < len(CLASS_COLORS) else OTHER_COLOR
        for number, label in enumerate(dict.fromkeys(labels))
    }


def draw_classes(
    image: Image.Image,
    boxes: Boxes | Sequence[Sequence[float]],
    labels: Sequence[str],
    colors: Mapping[str, str],
    *,
    most_named: int = 4,
) -> Image.Image:
    """Draw boxes in the colours of their labels; the labels are written where there are few.

    When: once per picture of a mosaic, whose caption names the classes and their colours.

    Input: as `visualize_bbox_on_image`, with a colour for each label (`class_colors`); `most_named`, boxes up to which
    their labels are written.
    Output: a new RGB image of the upright size.

    Raises:
        DataError: boxes are not rows of four finite numbers.
        ValueError: labels differ from boxes in number.
    """
    canvas = to_upright_rgb(image)
    rectangles = _pixels(_as_boxes(boxes), canvas)
    if len(labels) != len(rectangles):
        raise ValueError(f"{len(rectangles)} boxes, {len(labels)} labels")
    names = np.asarray(labels, dtype=object)
    for label in dict.fromkeys(labels):
        canvas = _draw_boxes(canvas, rectangles[names == label], colors[label], dashed=False)
    if len(labels) <= most_named:
        taken: list[tuple[int, int, int, int]] = []
        for rectangle, label in zip(rectangles, labels, strict=True):
            _draw_labels(canvas, rectangle[None], [label], colors[label], taken)
    return canvas


def draw_truth_and_prediction(
    image: Image.Image,
    truth: Boxes | Sequence[Sequence[float]],
    prediction: Boxes | Sequence[Sequence[float]],
    truth_labels: Sequence[str] | None = None,
    prediction_labels: Sequence[str | None] | None = None,
    *,
    with_labels: bool | None = None,
) -> Image.Image:
    """Draw ground truth dashed and green, predictions solid and red, each with its IoU written on it.

    When: once per picture of a gallery or a training sample.

    Input: boxes as in `visualize_bbox_on_image`; labels of both sides, or of neither where there is one class only.
    `with_labels` writes the label before the IoU; None does so where the picture has more than one.
    Output: a new image. The IoU is that with the best true box of the same label, 0.00 where there is none; "IoU"
    stands before it where the box is wide enough. A prediction without a label is held against every true box, its
    label is written `?`. Green lies on red, so that a prediction that hits exactly shows both.

    Raises:
        DataError: boxes are not rows of four finite numbers.
        ValueError: labels are given for one side only, or differ from boxes in number.
    """
    true, predicted = _as_boxes(truth), _as_boxes(prediction)
    if (truth_labels is None) != (prediction_labels is None):
        raise ValueError("give the labels of both sides or of neither")
    true_names = [""] * len(true) if truth_labels is None else list(truth_labels)
    names = [""] * len(predicted) if prediction_labels is None else list(prediction_labels)
    if len(true_names) != len(true) or len(names) != len(predicted):
        raise ValueError(f"{len(true)} and {len(predicted)} boxes, {len(true_names)} and {len(names)} labels")
    same = np.asarray([[name in (None, true_name) for name in names] for true_name in true_names], dtype=bool)
    best = np.where(same.reshape(len(true), len(predicted)), true.iou(predicted), 0.0).max(axis=0, initial=0.0)
    named = len({*true_names, *names} - {None}) > 1 if with_labels is None else with_labels

    canvas = to_upright_rgb(image)
    rectangles = _pixels(predicted, canvas)
    font = _font(_scale_for(*canvas.size).text)
    texts = []
    for name, iou, (x1, _, x2, _) in zip(names, best, rectangles.tolist(), strict=True):
        lead = one_line(name or "?") if named else "IoU" if font.getlength("IoU 0.00") < x2 - x1 else ""
        texts.append(f"{lead} {iou:.2f}")
    canvas = _draw_boxes(canvas, rectangles, PREDICTION_COLOR, dashed=False)
    canvas = _draw_boxes(canvas, _pixels(true, canvas), TRUTH_COLOR, dashed=True)
    _draw_labels(canvas, rectangles, texts, PREDICTION_COLOR)
    return canvas


def image_grid(
    images: Sequence[Image.Image],
    titles: Sequence[str],
    columns: int,
    *,
    cell: tuple[int, int] = (320, 320),
) -> Image.Image:
    """Lay pictures out in rows, each scaled whole into a white cell with its title above.

    When: once per gallery.

    Input: n `images` and n `titles`, a title is cut to the width of its cell; `columns` per row; `cell`, width and
    height in pixels of the room for one picture.
    Output: an RGB image; fewer than `columns` pictures make a narrower one.

    Raises:
        DataError: there are no pictures.
        ValueError: titles differ from pictures in number, or columns or a side of the cell is not positive.
    """
    if not images:
        raise DataError("there are no pictures to lay out")
    if columns < 1 or min(cell) < 1 or len(titles) != len(images):
        raise ValueError(f"{len(images)} pictures, {len(titles)} titles, {columns} columns, cells of {cell}")
    width, height = cell
    font = _font(max(11, round(0.05 * min(cell))))
    title_height = sum(font.getmetrics()) + 4
    margin = max(4, round(0.03 * min(cell)))
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    step_x, step_y = width + margin, title_height + height + margin
    grid = Image.new("RGB", (margin + columns * step_x, margin + rows * step_y), "white")
    draw = ImageDraw.Draw(grid)
    for number, (image, title) in enumerate(zip(images, titles, strict=True)):
        left, top = margin + number % columns * step_x, margin + number // columns * step_y
        draw.text(
            (left, top + font.getmetrics()[0]),
            _fit(one_line(title), font, width),
            fill="black",
            font=font,
            anchor="ls",
        )
        upright = to_upright_rgb(image)
        scale = min(width / upright.width, height / upright.height)
        # not ImageOps.contain: it leaves nothing of a picture of 7 x 900
        size = max(1, round(scale * upright.width)), max(1, round(scale * upright.height))
        small = upright.resize(size, Image.Resampling.LANCZOS)
        grid.paste(small, (left + (width - small.width) // 2, top + title_height + (height - small.height) // 2))
    return grid


def _as_boxes(boxes: Boxes | Sequence[Sequence[float]]) -> Boxes:
    return boxes if isinstance(boxes, Boxes) else Boxes.from_array(boxes, FRACTIONS, 1, 1)


def _pixels(boxes: Boxes, canvas: Image.Image) -> np.ndarray:
    """Return corners (n, 4) int64, x1 <= x2 and y1 <= y2, such that the whole width of a line lies on the picture."""
    half = _scale_for(*canvas.size).half_line
    size = np.array([canvas.width, canvas.height] * 2)
    corners = np.rint(boxes.clip().xyxy * size)
    corners = np.concatenate(
        [np.minimum(corners[:, :2], corners[:, 2:]), np.maximum(corners[:, :2], corners[:, 2:])], axis=1
    )
    return corners.clip(half, np.maximum(size - 1 - half, half)).astype(np.int64)


def _draw_boxes(canvas: Image.Image, rectangles: np.ndarray, color: str, *, dashed: bool) -> Image.Image:
    """Return a new picture with outlines on it; the given one may be the user's and stays as it is."""
    half = _scale_for(*canvas.size).half_line
    paint = sv.Color.from_rgb_tuple(ImageColor.getrgb(color)[:3])
    scene = sv.pillow_to_cv2(canvas)
    for x1, y1, x2, y2 in rectangles.tolist():
        if dashed:
            for start, end in _dashes(x1 - half, x2 + half, 2 * half + 1):
                for y in (y1, y2):
                    _fill(scene, start, y - half, end, y + half, paint)
            for start, end in _dashes(y1 - half, y2 + half, 2 * half + 1):
                for x in (x1, x2):
                    _fill(scene, x - half, start, x + half, end, paint)
        else:  # supervision draws 2 * half + 1 pixels at this thickness
            box = sv.Rect.from_xyxy((x1, y1, x2, y2))
            sv.draw_rectangle(scene, box, color=paint, thickness=max(1, 2 * half))
    return sv.cv2_to_pillow(scene)


def _fill(scene: np.ndarray, x1: int, y1: int, x2: int, y2: int, paint: sv.Color) -> None:
    """Fill a rectangle, its last row and column included.

    supervision makes a mask of the whole scene for each shape; it gets the part that the shape lies in, or a photograph
    with some hundred dashes would take seconds.
    """
    part = scene[max(y1, 0) : y2 + 1, max(x1, 0) : x2 + 1]
    if part.size:
        height, width = part.shape[:2]
        sv.draw_filled_rectangle(part, sv.Rect(x=0, y=0, width=width - 1, height=height - 1), color=paint)


def _dashes(start: int, end: int, width: int) -> list[tuple[int, int]]:
    """Cut a side into dashes: first and last pixel of each, from corner to corner, gaps as long as dashes.

    A dash is four line widths, shorter on a short side so that there is a gap on it; under three line widths it stays
    whole.
    """
    length = end - start + 1
    if length < 3 * width:
        return [(start, end)]
    count = max(2, round((length / (4 * width) + 1) / 2))
    edges = [start + round(length * i / (2 * count - 1)) for i in range(2 * count)]
    return [(edges[i], edges[i + 1] - 1) for i in range(0, 2 * count, 2)]


def _draw_labels(
    canvas: Image.Image,
    rectangles: np.ndarray,
    labels: Sequence[str | None],
    color: str,
    taken: list[tuple[int, int, int, int]] | None = None,
) -> None:
    """Write labels on plates of a colour: above the box, else below or inside, where they hide each other least.

    `taken` are the plates that are there already; the new ones are added.
    """
    scale = _scale_for(*canvas.size)
    font = _font(scale.text)
    ascent, descent = font.getmetrics()
    height = ascent + descent + scale.padding
    fill = ImageColor.getrgb(color)[:3]
    ink = "black" if 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2] > 140 else "white"
    draw = ImageDraw.Draw(canvas)
    taken = [] if taken is None else taken
    for (x1, y1, x2, y2), label in zip(rectangles.tolist(), labels, strict=True):
        text = _fit(one_line(label or ""), font, canvas.width - 2 * scale.padding)
        if not text:
            continue
        width = int(font.getlength(text)) + 1 + 2 * scale.padding
        half = scale.half_line
        plates = [
            _shift_inside(x, y, width, height, canvas)
            for y in (y1 - half - height, y2 + half + 1, y1 + half + 1, y2 - half - height)
            for x in (x1 - half, x2 + half + 1 - width)
        ]
        plate = min(plates, key=lambda one: sum(_overlap(one, other) for other in taken))
        taken.append(plate)
        draw.rectangle((plate[0], plate[1], plate[2] - 1, plate[3] - 1), fill=fill)
        at = (plate[0] + scale.padding, plate[1] + scale.padding // 2 + ascent)
        draw.text(at, text, fill=ink, font=font, anchor="ls")


def _shift_inside(x: int, y: int, width: int, height: int, canvas: Image.Image) -> tuple[int, int, int, int]:
    """Move a plate into the picture; one that is larger keeps to the upper left."""
    x, y = max(min(x, canvas.width - width), 0), max(min(y, canvas.height - height), 0)
    return x, y, x + width, y + height


def _overlap(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> int:
    """Return how many pixels two plates share."""
    width, height = min(one[2], other[2]) - max(one[0], other[0]), min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0) * max(height, 0)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans; cached, since opening it costs a millisecond. Pillow's own font lacks even é."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _fit(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Cut a text, with an ellipsis, to a width in pixels; "" where not even that has room."""
    if font.getlength(text) <= width:
        return text
    for end in range(len(text) - 1, -1, -1):
        if font.getlength(text[:end].rstrip() + "…") <= width:
            return text[:end].rstrip() + "…"
    return ""

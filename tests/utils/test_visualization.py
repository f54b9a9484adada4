"""What is drawn, told by its pixels."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vlmdet.boxes import Boxes
from vlmdet.errors import DataError
from vlmdet.utils import visualization
from vlmdet.utils.visualization import (
    class_colors,
    draw_classes,
    draw_truth_and_prediction,
    image_grid,
    visualize_bbox_on_image,
)

BOX = [[0.25, 0.25, 0.75, 0.75]]
GREY = (120, 120, 120)


def grey(width=400, height=200):
    return Image.new("RGB", (width, height), GREY)


def is_red(pixels):
    return (pixels[..., 0] > 200) & (pixels[..., 1] < 60) & (pixels[..., 2] < 60)


def is_green(pixels):
    return (pixels[..., 1] > 150) & (pixels[..., 0] < 80) & (pixels[..., 2] < 80)


def is_untouched(pixels):
    return (pixels == GREY).all(axis=-1)


def sides(image):
    """Pixels along the four sides of BOX, its corners included: top, bottom, left, right."""
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    x, y = slice(width // 4, width * 3 // 4 + 1), slice(height // 4, height * 3 // 4 + 1)
    return [pixels[y.start, x], pixels[y.stop - 1, x], pixels[y, x.start], pixels[y, x.stop - 1]]


def runs(mask):
    """Lengths of the runs of equal values, as (value, length)."""
    edges = np.flatnonzero(np.diff(mask.astype(int))) + 1
    return [(bool(part[0]), len(part)) for part in np.split(mask, edges)]


@pytest.mark.parametrize("size", [(200, 160), (400, 200), (2000, 1500), (300, 900)])
def test_a_solid_box_is_red_all_along(size):
    drawn = visualize_bbox_on_image(grey(*size), BOX)
    for side in sides(drawn):
        assert is_red(side).all()
    inside = np.asarray(drawn)[size[1] * 3 // 8 : size[1] * 5 // 8, size[0] * 3 // 8 : size[0] * 5 // 8]
    assert is_untouched(inside).all()


@pytest.mark.parametrize("size", [(200, 160), (400, 200), (2000, 1500), (300, 900)])
def test_a_dashed_box_is_green_with_gaps(size):
    drawn = draw_truth_and_prediction(grey(*size), BOX, [])
    for side in sides(drawn):
        dashes = is_green(side)
        assert (dashes | is_untouched(side)).all()  # nothing but green and gaps
        parts = runs(dashes)
        assert parts[0][0]  # corners are drawn
        assert parts[-1][0]
        gaps = [length for value, length in parts if not value]
        assert len(gaps) >= 2
        assert 0.3 < dashes.mean() < 0.8
        assert max(gaps) - min(gaps) <= 1
    assert not is_red(np.asarray(drawn)).any()


def test_a_short_side_still_has_a_gap():
    drawn = visualize_bbox_on_image(grey(400, 400), [[0.5, 0.5, 0.53, 0.53]], color="#00d020", dashed=True)  # 12 pixels
    assert [value for value, _ in runs(is_green(np.asarray(drawn)[200, 199:214]))].count(False) >= 1


def test_the_input_is_unchanged():
    image = grey()
    before = image.tobytes()
    for drawn in (
        visualize_bbox_on_image(image, BOX, ["cup"]),
        visualize_bbox_on_image(image, []),
        draw_truth_and_prediction(image, BOX, BOX),
        image_grid([image], ["a"], 1, cell=image.size),
    ):
        assert drawn is not image
    assert image.tobytes() == before
    assert visualize_bbox_on_image(image, []).tobytes() == before  # nothing to draw, nothing drawn


def test_boxes_and_rows_of_fractions_draw_the_same():
    assert (
        visualize_bbox_on_image(grey(), BOX).tobytes()
        == visualize_bbox_on_image(grey(), Boxes(np.array(BOX))).tobytes()
    )
    with pytest.raises(DataError, match="four numbers"):
        visualize_bbox_on_image(grey(), [[0.1, 0.2, 0.3]])
    with pytest.raises(DataError, match="finite"):
        visualize_bbox_on_image(grey(), [[0.1, 0.2, 0.3, float("nan")]])


def test_x_comes_first():
    # x from 0 to 1/4, y from 1/2 to 1: lower left, nothing in the upper right
    pixels = np.asarray(visualize_bbox_on_image(grey(), [[0, 0.5, 0.25, 1]]))
    assert is_red(pixels[110:, :90]).any()
    assert is_untouched(pixels[:90]).all()
    assert is_untouched(pixels[:, 110:]).all()


@pytest.mark.parametrize("color", ["red", "#1060ff", "yellow"])
def test_the_colour_is_the_one_asked_for(color):
    expected = Image.new("RGB", (1, 1), color).getpixel((0, 0))
    assert (sides(visualize_bbox_on_image(grey(), BOX, color=color))[0] == expected).all()
    with pytest.raises(ValueError, match="unknown color"):
        visualize_bbox_on_image(grey(), BOX, color="no colour")


def test_a_box_as_large_as_the_picture_is_seen_whole():
    pixels = np.asarray(visualize_bbox_on_image(grey(), [[0, 0, 1, 1]]))
    for side in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert is_red(side[2:-2]).all()  # supervision rounds the corners
    # beyond the picture it is cut to it
    assert (
        visualize_bbox_on_image(grey(), [[-3, -1, 2, 5]]).tobytes()
        == visualize_bbox_on_image(grey(), [[0, 0, 1, 1]]).tobytes()
    )


@pytest.mark.parametrize("side", [50, 400, 2000])
def test_a_line_at_the_border_is_as_wide_as_any(side):
    pixels = np.asarray(visualize_bbox_on_image(grey(side, side), [[0, 0, 1, 1]]))[side // 2]
    width = line_width(side)
    assert width >= 1
    assert np.flatnonzero(is_red(pixels)).tolist() == [*range(width), *range(side - width, side)]


def line_width(side):
    drawn = np.asarray(visualize_bbox_on_image(grey(side, side), BOX))
    return int(is_red(drawn[side // 2, : side // 2]).sum())


def test_lines_grow_with_the_picture():
    assert 1 <= line_width(200) <= 4
    assert 8 <= line_width(2000) <= 20
    assert line_width(4000) == pytest.approx(2 * line_width(2000), abs=2)


def plate_height(side):
    labelled = np.asarray(visualize_bbox_on_image(grey(side, side), BOX, ["cup"]))
    bare = np.asarray(visualize_bbox_on_image(grey(side, side), BOX))
    return int((labelled != bare).any(axis=(1, 2)).sum())


def test_text_grows_with_the_picture():
    assert 10 <= plate_height(200) <= 30
    assert plate_height(2000) == pytest.approx(10 * plate_height(200), rel=0.5)
    assert plate_height(2000) * 320 / 2000 > 10  # still readable on a thumbnail of 320 pixels


@pytest.mark.parametrize("text", ["sun", "cat", "pgy", "0.83"])
def test_text_stays_on_its_plate(text):
    """Ink of a label lies on the plate's colour on every side."""
    pixels = np.asarray(visualize_bbox_on_image(Image.new("RGB", (640, 480), "black"), BOX, [text]))
    rows, columns = np.nonzero(pixels[..., 1] >= 60)  # neither the black picture nor the red plate has green in it
    plate = pixels[rows.min() - 1 : rows.max() + 2, columns.min() - 1 : columns.max() + 2]
    for side in (plate[0], plate[-1], plate[:, 0], plate[:, -1]):
        assert is_red(side).all()
    assert rows.max() < 120  # above the box, which begins at 120


@pytest.mark.parametrize(
    "label",
    [
        "x" * 100_000,
        "two\nlines\r\nand\ttabs",
        "😀👩‍👩‍👧‍👦🏳️‍🌈",
        "\x00\x01\x1b[31m\x7f",
        "\u202eright to left\u202c עברית العربية",
        "half a pair \ud800",
        "Z̸̢̛̤͎͑͗a̵l̷g̶o̵",
        "<|im_end|>",
        "",
        "   ",
        None,
    ],
)
@pytest.mark.parametrize("size", [(1, 1), (3, 50), (60, 40), (400, 200)])
def test_hostile_labels(label, size):
    image = grey(*size)
    assert visualize_bbox_on_image(image, BOX, [label]).size == size
    assert draw_truth_and_prediction(image, BOX, BOX, [label or ""], [label]).size == size
    assert image_grid([image], [label or ""], 1, cell=(40, 30)).height > 30


def test_a_label_is_one_line_and_cut_to_the_picture():
    one = visualize_bbox_on_image(grey(), BOX, ["two lines"])
    assert visualize_bbox_on_image(grey(), BOX, ["two\n\x00lines"]).tobytes() == one.tobytes()
    assert (
        visualize_bbox_on_image(
            grey(),
            BOX,
            [
                "",
            ],
        ).tobytes()
        == visualize_bbox_on_image(grey(), BOX).tobytes()
    )
    assert one.tobytes() != visualize_bbox_on_image(grey(), BOX).tobytes()


def test_labels_must_be_as_many_as_boxes():
    with pytest.raises(ValueError, match="zip"):
        visualize_bbox_on_image(grey(), BOX, ["a", "b"])
    with pytest.raises(ValueError, match="2 and 1 labels"):
        draw_truth_and_prediction(grey(), BOX, BOX, ["a", "b"], ["a"])
    with pytest.raises(ValueError, match="both sides"):
        draw_truth_and_prediction(grey(), BOX, BOX, ["a"])


@pytest.fixture
def written(monkeypatch):
    """Texts that are written on a picture."""
    texts = []
    draw = visualization._draw_labels
    monkeypatch.setattr(visualization, "_draw_labels", lambda *args: (texts.extend(args[2]), draw(*args)))
    return texts


def test_the_iou_is_written_on_each_prediction(written):
    # truth [0, .5] x [0, 1]; [0, .4]: .4 / .5 = .8; [.5, 1]: 0
    draw_truth_and_prediction(grey(), [[0, 0, 0.5, 1]], [[0, 0, 0.4, 1], [0.5, 0, 1, 1]])
    assert written == ["IoU 0.80", "IoU 0.00"]


def test_the_iou_is_that_with_the_same_label(written):
    truth = [[0, 0, 0.5, 1], [0, 0, 0.4, 1]]
    # .4 / .5 = .8 with the cup although it is the dog exactly; without a label the best of all, marked
    draw_truth_and_prediction(grey(), truth, [truth[1], truth[1], truth[1]], ["cup", "dog"], ["cup", "cat", None])
    assert written == ["cup 0.80", "cat 0.00", "? 1.00"]


def test_a_narrow_box_has_the_number_alone(written):
    draw_truth_and_prediction(grey(), BOX, [[0.5, 0.5, 0.52, 0.6]])
    assert written[0].strip().replace(".", "").isdigit()
    written.clear()
    draw_truth_and_prediction(grey(), BOX, BOX, ["cup"], ["cup"])
    draw_truth_and_prediction(grey(), BOX, BOX, ["cup"], ["cup"], with_labels=True)
    assert written == ["IoU 1.00", "cup 1.00"]


def test_an_exact_hit_shows_both_colours():
    pixels = sides(draw_truth_and_prediction(grey(), BOX, BOX))[1]  # the lower side: no label on it
    assert is_green(pixels).any()
    assert is_red(pixels).any()
    assert (is_green(pixels) | is_red(pixels)).all()


def test_labels_do_not_hide_each_other(written):
    boxes = [[0.3, 0.3, 0.7, 0.7]] * 4
    drawn = np.asarray(visualize_bbox_on_image(Image.new("RGB", (600, 600), "black"), boxes, ["0.11"] * 4))
    alone = np.asarray(visualize_bbox_on_image(Image.new("RGB", (600, 600), "black"), boxes[:1], ["0.11"]))
    ink = (alone > 200).all(axis=-1).sum()
    assert (drawn > 200).all(axis=-1).sum() == 4 * ink


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16", "LA"])
def test_any_mode_becomes_rgb(mode):
    image = Image.new(mode, (400, 200))
    drawn = visualize_bbox_on_image(image, BOX)
    assert (image.mode, drawn.mode, drawn.size) == (mode, "RGB", (400, 200))
    assert is_red(sides(drawn)[0]).all()


def test_a_turned_picture_is_made_upright(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    grey(400, 200).save(tmp_path / "turned.jpg", exif=exif)
    with Image.open(tmp_path / "turned.jpg") as image:
        assert visualize_bbox_on_image(image, BOX).size == (200, 400)


def color_image(color, size):
    return Image.new("RGB", size, color)


def test_a_grid_holds_each_picture_whole_in_its_cell():
    colors = ["#ff0000", "#00ff00", "#0000ff", "#ff00ff", "#00ffff"]
    sizes = [(300, 100), (100, 300), (50, 50), (2000, 1000), (7, 900)]
    grid = image_grid([color_image(c, s) for c, s in zip(colors, sizes, strict=True)], list("abcde"), 3, cell=(90, 60))
    pixels = np.asarray(grid).astype(int)
    spans = []
    for color, (width, height) in zip(colors, sizes, strict=True):
        expected = np.array(Image.new("RGB", (1, 1), color).getpixel((0, 0)))
        rows, columns = np.nonzero((np.abs(pixels - expected) < 8).all(axis=-1))
        span = (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1)
        assert (span[1] - span[0]) * (span[3] - span[2]) == len(rows)  # one whole rectangle
        scale = min(90 / width, 60 / height)
        assert span[3] - span[2] == pytest.approx(max(1, width * scale), abs=1)
        assert span[1] - span[0] == pytest.approx(height * scale, abs=1)
        spans.append(span)
    assert spans[0][1] < spans[3][0]  # the fourth is in the second row
    assert spans[0][3] <= spans[1][2]  # side by side
    assert spans[1][3] <= spans[2][2]
    assert (pixels[0] == 255).all()  # white around


def test_titles_lie_above_their_pictures_and_in_their_cell():
    black = [color_image("#0000ff", (100, 100))] * 4
    without = np.asarray(image_grid(black, [""] * 4, 2, cell=(100, 100))).astype(int)
    grid = np.asarray(image_grid(black, ["W" * 500] * 4, 2, cell=(100, 100))).astype(int)
    assert grid.shape == without.shape
    changed = (grid != without).any(axis=-1)
    blue = (without == (0, 0, 255)).all(axis=-1)
    assert changed.any()
    assert not (changed & blue).any()  # no title on a picture
    left = np.flatnonzero(blue.any(axis=0))
    assert set(np.flatnonzero(changed.any(axis=0))) <= set(left)  # none beyond the width of its cell
    for value, length in runs(changed.any(axis=1)):
        assert not value or length < 30  # one line


def test_a_grid_of_one_picture_is_no_wider_than_it():
    assert image_grid([grey(50, 50)], ["a"], 5, cell=(100, 80)).width < 150
    with pytest.raises(DataError, match="no pictures"):
        image_grid([], [], 3)
    with pytest.raises(ValueError, match="2 titles"):
        image_grid([grey()], ["a", "b"], 3)
    with pytest.raises(ValueError, match="0 columns"):
        image_grid([grey()], ["a"], 0)


def test_classes_have_their_own_colors_and_the_rest_one_in_common():
    colors = class_colors([f"class {number}" for number in range(9)] + ["class 0"])
    assert len(colors) == 9
    assert len(set(colors.values())) == 8
    assert colors["class 7"] == colors["class 8"] == visualization.OTHER_COLOR


def test_boxes_are_drawn_in_the_colors_of_their_classes():
    boxes, colors = [[0.1, 0.1, 0.4, 0.9], [0.6, 0.1, 0.9, 0.9]], {"a": "#ff0000", "b": "#00d020"}
    pixels = np.asarray(draw_classes(grey(), boxes, ["a", "b"], colors, most_named=0))
    assert is_red(pixels[20:181, 40]).all()  # 400 x 200: x from 40 to 160, y from 20 to 180
    assert is_green(pixels[20:181, 240]).all()
    assert not is_green(pixels[:, :200]).any()
    assert not is_red(pixels[:, 200:]).any()


def test_labels_of_classes_are_written_where_there_are_few():
    boxes, colors = [[0.3, 0.3, 0.6, 0.9]] * 2, {"cup": "#ff0000"}
    silent = np.asarray(draw_classes(grey(), boxes, ["cup", "cup"], colors, most_named=1))
    named = np.asarray(draw_classes(grey(), boxes, ["cup", "cup"], colors, most_named=2))
    assert is_untouched(silent[:55]).all()  # the boxes begin at 60
    assert is_red(named[:55]).any()
    one = np.asarray(draw_classes(grey(), boxes[:1], ["cup"], colors, most_named=2))
    assert (named != one).any()  # two labels of one box stand beside each other
    with pytest.raises(ValueError, match="2 boxes, 1 labels"):
        draw_classes(grey(), boxes, ["cup"], colors)


def test_importing_is_silent_and_brings_neither_opencv_nor_torch():
    code = "import sys, vlmdet.utils.visualization; print([m for m in ('torch', 'cv2') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")

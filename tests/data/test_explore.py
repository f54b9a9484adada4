"""What is in a data set, counted: hand-made sets with figures worked out by hand; and what stands on the page."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlmdet.boxes import FRACTIONS, Boxes
from vlmdet.data.explore import FAMILIES, Limits, format_summary, summarise
from vlmdet.data.explore.charts import CHARTS, chart_uris, draw_chart
from vlmdet.data.explore.page import choose_pictures, worst_problems, write_page
from vlmdet.data.explore.summary import covered
from vlmdet.errors import ConfigError
from vlmdet.records import DetectionDataset, Problem, Sample

LIMITS = Limits(28 * 28, 100 * 28 * 28, 28)


def picture(color: str = "grey", size: tuple[int, int] = (280, 140)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


PLAIN = picture()


def sample(
    name: str, boxes: Sequence[Sequence[float]] = (), labels: Sequence[str] = (), *, split: str = "train"
) -> Sample:
    array = Boxes.from_array(boxes, FRACTIONS, 280, 140)
    return Sample(name, lambda: PLAIN, 280, 140, array, tuple(labels), split=split, source=f"file:{name}")


def dataset(*samples: Sample, problems: Sequence[Problem] = ()) -> DetectionDataset:
    splits: dict[str, Sequence[Sample]] = {}
    for one in samples:
        splits[one.split] = [*splits.get(one.split, ()), one]
    labels = tuple(sorted({label for one in samples for label in one.labels}))
    return DetectionDataset("set", splits, labels, FRACTIONS, "by hand", list(problems), ("a note",))


SMALL = dataset(
    sample("a", [[0, 0, 0.5, 0.5], [0.25, 0.25, 0.75, 0.75]], ["cup", "sun"]),
    sample("b", [[0, 0, 0.05, 0.1]], ["cup"]),
    sample("c", split="test"),
    problems=[
        Problem("f", 1, "a", "tiny_box", "", "kept"),
        Problem("f", 2, "b", "tiny_box", "", "box_dropped"),
        Problem("f", 3, "x", "truncated_image", "", "row_dropped"),
        Problem("f", 3, "x", "size_mismatch", "", "row_dropped"),
    ],
)


def test_counts() -> None:
    found = summarise(SMALL, limits=LIMITS)
    assert (found.images, found.boxes, found.empty) == (3, 3, 1)
    assert found.splits == {
        "train": {"images": 2, "boxes": 3, "empty": 0},
        "test": {"images": 1, "boxes": 0, "empty": 1},
    }
    assert found.classes == [{"name": "cup", "boxes": 2, "images": 2}, {"name": "sun", "boxes": 1, "images": 1}]
    assert (found.box_format, found.decided_by, found.notes) == ("xyxy/fraction", "by hand", ["a note"])
    assert found.problems == {
        "tiny_box": {"kept": 1, "box_dropped": 1},
        "size_mismatch": {"row_dropped": 1},
        "truncated_image": {"row_dropped": 1},
    }
    assert found.rows_dropped == 1
    assert found.picture_sizes == [{"width": 280, "height": 140, "images": 3}]


def test_figures_in_pixels() -> None:
    """280 x 140 pixels are 10 x 5 tokens of 28; the boxes are 140 x 70 twice, and 14 x 14."""
    found = summarise(SMALL, limits=LIMITS)
    quantiles = found.quantiles
    assert quantiles["tokens"] == {"n": 3, "min": 50, "p5": 50, "p50": 50, "p95": 50, "p99": 50, "max": 50}
    assert (quantiles["boxes_per_image"]["p50"], quantiles["boxes_per_image"]["max"]) == (1, 2)
    assert (quantiles["megapixels"]["max"], quantiles["aspect_ratio"]["min"]) == (0.0392, 1)
    assert (quantiles["aspect_ratio"]["p50"], quantiles["aspect_ratio"]["max"]) == (2, 2)
    assert quantiles["model_side"]["min"] == 14
    assert quantiles["model_side"]["max"] == pytest.approx(np.sqrt(140 * 70), abs=1e-6)
    assert quantiles["box_side"]["max"] == 0.5
    assert quantiles["coverage"]["max"] == 0.4375  # 2 x 1/4 less the 1/16 that they share
    assert found.under_one_patch == pytest.approx(1 / 3, abs=1e-6)
    assert found.under_two_patches == pytest.approx(1 / 3, abs=1e-6)
    histogram = found.histograms["boxes_per_image"]
    assert (histogram.edges, histogram.counts) == ([-0.5, 0.5, 1.5, 2.5], [1, 1, 1])


def test_small_boxes_follow_the_limits() -> None:
    """At most 18 tokens make 168 x 84 of it: the boxes of 140 x 70 become 84 x 42, under two by two tokens of 32."""
    found = summarise(SMALL, limits=Limits(28 * 28, 18 * 28 * 28, 28))
    assert found.quantiles["tokens"]["max"] == 18
    assert found.quantiles["model_side"]["max"] == pytest.approx(np.sqrt(84 * 42), abs=1e-6)
    assert found.under_two_patches == pytest.approx(1 / 3, abs=1e-6)
    tiny = summarise(SMALL, limits=Limits(28 * 28, 4 * 28 * 28, 28))  # 56 x 28: the boxes are 28 x 14
    assert tiny.under_one_patch == 1


def test_centers_lie_where_the_boxes_are() -> None:
    grid = np.array(summarise(SMALL, limits=LIMITS).centers)
    assert grid.shape == (24, 24)
    assert {(int(row), int(column)): int(grid[row, column]) for row, column in zip(*grid.nonzero(), strict=True)} == {
        (6, 6): 1,
        (12, 12): 1,
        (1, 0): 1,  # the centre (.025, .05)
    }


def test_a_row_of_unknown_size_counts_as_a_row_only() -> None:
    rows = dataset(sample("a", [[0, 0, 0.5, 0.5]], ["cup"]), replace(sample("b"), width=0, height=0))
    found = summarise(rows, limits=LIMITS)
    assert found.images == 2
    assert (found.quantiles["tokens"]["n"], found.quantiles["megapixels"]["n"]) == (1, 1)


def test_a_picture_that_the_model_refuses_has_no_tokens() -> None:
    long = replace(sample("a", [[0, 0, 0.5, 0.5]], ["cup"]), width=2010, height=10)
    found = summarise(dataset(long), limits=LIMITS)
    assert (found.quantiles["tokens"], found.quantiles["model_side"]) == ({"n": 0}, {"n": 0})
    assert found.quantiles["aspect_ratio"]["max"] == 201


def test_nothing_at_all(tmp_path: Path) -> None:
    empty = DetectionDataset("set", {"train": []}, (), FRACTIONS, "by hand")
    found = summarise(empty)
    assert (found.images, found.boxes, found.under_one_patch) == (0, 0, 0)
    assert "0 pictures, 0 boxes, 0 classes" in format_summary(found)
    assert write_page(tmp_path / "page.html", found, empty).is_file()


@pytest.mark.parametrize("limits", [Limits(0, 1, 28), Limits(2, 1, 28), Limits(1, 2, 0)])
def test_odd_limits_are_refused(limits: Limits) -> None:
    with pytest.raises(ConfigError, match="--min-pixels"):
        summarise(SMALL, limits=limits)


def test_the_tiny_family_has_the_limits_of_the_embedded_base() -> None:
    from vlmdet.models.tiny import TINY_MAX_PIXELS, TINY_MIN_PIXELS

    assert FAMILIES["tiny"] == (TINY_MIN_PIXELS, TINY_MAX_PIXELS, 28)


def test_the_summary_is_json() -> None:
    found = summarise(SMALL).as_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_screen_of_text() -> None:
    hostile = "\x1b[31mred\n" + "x" * 100
    text = format_summary(summarise(dataset(sample("a", [[0, 0, 1, 1]], [hostile])), limits=LIMITS))
    assert "\x1b" not in text
    assert max(len(line) for line in text.splitlines()) <= 130
    text = format_summary(summarise(SMALL, limits=LIMITS))
    lines = text.splitlines()
    assert lines[0] == "set: 3 pictures, 3 boxes, 2 classes"
    assert lines[1] == "boxes read as xyxy/fraction (by hand)"
    assert ["train", "2", "0", "3"] in [line.split() for line in lines]
    assert ["cup", "2", "2"] in [line.split() for line in lines]
    assert ["tiny_box", "1", "1", "0"] in [line.split() for line in lines]
    assert "image tokens:       p50 50, p95 50, p99 50, max 50" in text
    assert "33.3% of the boxes are smaller than one image token, 33.3% than two by two" in text
    assert "1 rows would be dropped by train" in text
    assert len(lines) < 40


@pytest.mark.parametrize(
    ("boxes", "share"),
    [
        ([], 0),
        ([[0, 0, 0.5, 0.5]], 0.25),
        ([[0, 0, 0.5, 0.5]] * 3, 0.25),
        ([[0, 0, 0.5, 1], [0.5, 0, 1, 1]], 1),
        ([[0, 0, 1, 1], [0.4, 0.4, 0.5, 0.5]], 1),
        ([[-1, -1, 0.5, 0.5], [0.75, 0.75, 2, 2]], 0.3125),
        ([[0.5, 0.5, 0.5, 0.9]], 0),
        ([[0, 0, 0.5, 0.5], [0.2, 0.2, 0.2, 0.9]], 0.25),
    ],
)
def test_covered(boxes: list[list[float]], share: float) -> None:
    assert covered(Boxes.from_array(boxes, FRACTIONS, 1, 1)) == pytest.approx(share, abs=1e-12)


@given(st.lists(st.tuples(*[st.integers(0, 20)] * 4), max_size=400))
def test_covered_agrees_with_painting(corners: list[tuple[int, int, int, int]]) -> None:
    canvas = np.zeros((20, 20), dtype=bool)
    boxes = []
    for a, b, c, d in corners:
        x1, x2, y1, y2 = min(a, c), max(a, c), min(b, d), max(b, d)
        canvas[y1:y2, x1:x2] = True
        boxes.append([x1 / 20, y1 / 20, x2 / 20, y2 / 20])
    assert covered(Boxes.from_array(boxes, FRACTIONS, 1, 1)) == pytest.approx(canvas.mean(), abs=1e-9)


def test_ten_thousand_boxes_are_covered_in_little_memory() -> None:
    corners = np.random.default_rng(0).uniform(0, 1, (10_000, 2, 2))
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    assert covered(Boxes.from_array(boxes, FRACTIONS, 1, 1)) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", list(CHARTS))
def test_every_chart_draws_and_says_what_it_shows(name: str) -> None:
    found = summarise(SMALL, limits=LIMITS)
    assert draw_chart(found, name).axes
    assert CHARTS[name].words(found)
    assert chart_uris(found, name) == chart_uris(found, name)
    light, dark = chart_uris(found, name)
    assert light != dark
    assert light.startswith("data:image/svg+xml;base64,")


def test_rare_classes_come_first_into_the_mosaic() -> None:
    common = [sample(f"{number:03}", [[0, 0, 1, 1]], ["cup"]) for number in range(100)]
    rows = dataset(*common, sample("rare", [[0, 0, 1, 1]], ["sun"]), sample("empty"))
    for seed in range(5):
        chosen = [one.id for one in choose_pictures(rows, count=6, seed=seed)]
        assert len(chosen) == len(set(chosen)) == 6
        assert {"rare", "empty"} <= set(chosen)
        assert chosen[:-2] == sorted(chosen[:-2])


def test_the_worst_problems_are_those_that_lose_most() -> None:
    def problems(kind: str, action: str, count: int) -> list[Problem]:
        return [Problem("f", number, "", kind, "", action) for number in range(count)]

    given_problems = (
        problems("tiny_box", "kept", 9)
        + problems("box_outside", "box_clipped", 9)
        + problems("degenerate_box", "box_dropped", 1)
        + problems("size_mismatch", "row_dropped", 9)
        + problems("truncated_image", "row_dropped", 2)
    )
    chosen = worst_problems(given_problems, count=10)
    assert [one.kind for one in chosen] == (
        ["truncated_image"] * 2 + ["size_mismatch"] * 4 + ["degenerate_box"] + ["box_outside"] * 3
    )


class Reader(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.images: list[dict[str, str | None]] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_with_a_hostile_data_set(tmp_path: Path) -> None:
    label = "<script>alert('$x^2$ {{ 1 }}')</script>"
    rows = [
        sample("<b>one</b>", [[0, 0, 0.5, 0.5]], [label]),
        replace(sample("gone"), picture=tmp_path / "gone.png"),
        sample("again", split="test"),
    ]
    problems = [
        Problem("<i>f</i>", 3, "gone", "unreadable_image", label, "row_dropped"),
        Problem("f", None, "again", "duplicate_image", "the same bytes", "kept"),
        Problem("f", None, "unknown", "missing_image", "there is none", "row_dropped"),
    ]
    hostile = dataset(*rows, problems=problems)
    path = write_page(tmp_path / "page.html", summarise(hostile), hostile, twins={"again": "<b>one</b>"})
    page = Reader(path.read_text(encoding="utf-8"))
    assert not page.tags & {"script", "link"}
    assert label in page.text
    assert "<b>one</b>" in page.text
    assert "<i>f</i>, row 3" in page.text
    assert page.text.count("no picture to show") == 2
    # two pictures that open, eight charts, and the pair of the duplicate
    assert len(page.images) == 2 + len(CHARTS) + 2
    assert all(one["alt"] and (one["src"] or "").startswith("data:image/") for one in page.images)
    assert any(label in (one["alt"] or "") for one in page.images)


def test_page_of_real_photographs(tmp_path: Path, shared: Path) -> None:
    from vlmdet.data.pictures import look_over
    from vlmdet.data.readers import open_dataset

    bccd = open_dataset(shared / "data" / "bccd", format="voc")
    looked = look_over([one for samples in bccd.splits.values() for one in samples])
    # one scene of BCCD was photographed twice, at another focus, and the two are in train and in val
    assert [(one.kind, one.id) for one in looked.problems] == [("near_duplicate", "BloodImage_00037")]
    assert looked.twins == {"BloodImage_00037": "BloodImage_00038"}
    bccd = replace(bccd, problems=[*bccd.problems, *looked.problems])
    found = summarise(bccd)
    assert (found.images, found.boxes) == (364, 4886)
    assert found.problems["degenerate_box"] == {"box_dropped": 2}
    assert found.quantiles["tokens"]["max"] == 391  # 640 x 480 -> 644 x 476, 23 x 17 tokens
    path = write_page(tmp_path / "page.html", found, bccd, twins=looked.twins, pictures=4)
    assert path.stat().st_size < 5_000_000
    assert "BloodImage_00037" in path.read_text(encoding="utf-8")

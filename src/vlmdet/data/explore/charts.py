"""Charts of a summary, by matplotlib: numbers only, so that no text of a data set can disturb them.

When: ONCE, for the page of `vlmdet inspect` and in the first notebook.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vlmdet.data.explore.summary import Summary
from vlmdet.utils.html import data_uri

INK, DARK_INK = "#1b1f24", "#e8eaed"
"""Colours of text and axes on light and on dark paper."""

_BAR, _LIMIT = "#3b7dd8", "#d1495b"


@dataclass(frozen=True)
class Chart:
    """One chart: its title, how it is drawn on axes, and what it shows in words (for who cannot see it)."""

    title: str
    draw: Callable[[Summary, Axes], None]
    words: Callable[[Summary], str]


def draw_chart(summary: Summary, name: str) -> Figure:
    """Draw one of `CHARTS`.

    When: once per chart; in a notebook the figure shows itself.

    Output: a figure of 4.4 x 2.9 inches on a transparent ground.
    """
    figure = Figure(figsize=(4.4, 2.9), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    CHARTS[name].draw(summary, axes)
    for text in (axes.xaxis.label, axes.yaxis.label, *axes.texts):
        text.set_color(INK)
    axes.tick_params(colors=INK, which="both", labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    return figure


def chart_uris(summary: Summary, name: str) -> tuple[str, str]:
    """Draw a chart as data URIs of two SVGs, for light and for dark paper; equal summaries give equal bytes."""
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        draw_chart(summary, name).savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()  # drawn once: laying it out is what takes the time
    return data_uri(svg, "image/svg+xml"), data_uri(svg.replace(INK.encode(), DARK_INK.encode()), "image/svg+xml")


def _bars(figure: str, label: str, what: str, *, log: bool = False) -> Callable[[Summary, Axes], None]:
    """Return how to draw the histogram of a figure."""

    def draw(summary: Summary, axes: Axes) -> None:
        found = summary.histograms[figure]
        axes.stairs(found.counts, found.edges, fill=True, color=_BAR, linewidth=0)
        axes.set_xlabel(label)
        axes.set_ylabel(what)
        axes.set_xlim(found.edges[0], found.edges[-1])
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        if figure in ("boxes_per_image", "tokens"):
            axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        if log:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}" if value >= 1 else f"1/{1 / value:g}")
            axes.tick_params(which="minor", bottom=False)

    return draw


def _model_side(summary: Summary, axes: Axes) -> None:
    _bars("model_side", "square root of a box's area, model pixels", "boxes", log=True)(summary, axes)
    factor = summary.limits["factor"]
    for tokens, line in ((1, "-"), (2, "--")):
        axes.axvline(tokens * factor, color=_LIMIT, linestyle=line, linewidth=1.5)
        side = "right" if tokens == 1 else "left"
        axes.text(
            tokens * factor * (0.94 if tokens == 1 else 1.06),
            0.99,
            f"{tokens} x {tokens} token{'s' if tokens > 1 else ''}",
            transform=axes.get_xaxis_transform(),
            ha=side,
            va="top",
            fontsize=8,
        )
    axes.set_ylim(top=1.2 * max(1, *summary.histograms["model_side"].counts))


def _centers(summary: Summary, axes: Axes) -> None:
    image = axes.imshow(np.array(summary.centers), extent=(0, 1, 1, 0), cmap="viridis", vmin=0, aspect="equal")
    axes.set_xlabel("from left to right, share of the width")
    axes.set_ylabel("from top to bottom")
    color_bar = axes.figure.colorbar(image, ax=axes, shrink=0.9, ticks=MaxNLocator(5, integer=True))
    color_bar.outline.set_visible(False)
    color_bar.ax.tick_params(labelsize=8, colors="#808080")


def _picture_sizes(summary: Summary, axes: Axes) -> None:
    widths, heights, counts = (
        np.array([size[key] for size in summary.picture_sizes]) for key in ("width", "height", "images")
    )
    axes.scatter(widths, heights, s=8 + 120 * np.sqrt(counts / max(1, summary.images)), color=_BAR, alpha=0.6)
    axes.set_xlabel("width, pixels")
    axes.set_ylabel("height, pixels")
    axes.set_xlim(0, 1.12 * widths.max(initial=1))
    axes.set_ylim(0, 1.12 * heights.max(initial=1))


def _spread(figure: str, what: str, form: str = "g") -> Callable[[Summary], str]:
    """Return how to word a figure's quantiles."""

    def words(summary: Summary) -> str:
        found = summary.quantiles[figure]
        if not found["n"]:
            return f"{what}: there is none"
        if found["min"] == found["max"]:
            return f"{what}: all have {found['max']:{form}}"
        middle, low, high, most = (format(found[key], form) for key in ("p50", "p5", "p95", "max"))
        return f"{what}: half have {middle} or less; nine of ten lie between {low} and {high}; the most is {most}"

    return words


def _center_words(summary: Summary) -> str:
    grid = np.array(summary.centers)
    if not grid.sum():
        return "there is no box"
    third = len(grid) // 3
    share = grid[third:-third, third:-third].sum() / grid.sum()
    return f"where the centres of boxes lie: {share:.0%} in the middle ninth of the picture (evenly spread: 11%)"


def _size_words(summary: Summary) -> str:
    first = summary.picture_sizes[0] if summary.picture_sizes else {"width": 0, "height": 0, "images": 0}
    share = first["images"] / max(1, summary.images)
    return f"the most frequent size, {first['width']} x {first['height']}, is that of {share:.0%} of the pictures"


CHARTS: dict[str, Chart] = {
    "boxes_per_image": Chart(
        "Boxes per picture",
        _bars("boxes_per_image", "boxes", "pictures"),
        _spread("boxes_per_image", "boxes a picture", ".0f"),
    ),
    "box_side": Chart(
        "Box sizes",
        _bars("box_side", "square root of a box's share of the picture", "boxes"),
        _spread("box_side", "side of a square of the box's area, as a share of the picture's", ".2f"),
    ),
    "aspect_ratio": Chart(
        "Aspect ratios of boxes",
        _bars("aspect_ratio", "width / height", "boxes", log=True),
        _spread("aspect_ratio", "width / height", ".2f"),
    ),
    "coverage": Chart(
        "Coverage",
        _bars("coverage", "share of the picture inside a box", "pictures"),
        _spread("coverage", "share of a picture inside at least one box", ".2f"),
    ),
    "centers": Chart("Centres of boxes", _centers, _center_words),
    "picture_sizes": Chart("Picture sizes", _picture_sizes, _size_words),
    "model_side": Chart(
        "Boxes in model pixels",
        _model_side,
        _spread("model_side", "square root of a box's area after the resize, in pixels", ".0f"),
    ),
    "tokens": Chart(
        "Image tokens per picture",
        _bars("tokens", "image tokens after the resize", "pictures"),
        _spread("tokens", "image tokens a picture", ".0f"),
    ),
}
"""Every chart, by name."""

"""Small charts as inline SVG, each with its values as a table beneath.

When: AFTER, by the report; standard library only. They take the colours of the page, so that they suit light and dark
paper, and are 360 units wide, so that their text is readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from vlmdet.utils import html

_WIDTH, _HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 36
_LONGEST_TABLE = 200

_FRAME = """<figure class="chart"><h4>{{ title }}</h4>
<svg viewBox="0 0 360 220" role="img" aria-label="{{ title }}: {{ what }}">
<g class="axis">{% for place, text in across %}
<text x="{{ place }}" y="200" text-anchor="middle">{{ text }}</text>{% endfor %}
{% for place, text in up %}<path d="M46 {{ place }}H348"/>
<text x="41" y="{{ place }}" dy=".32em" text-anchor="end">{{ text }}</text>{% endfor %}
<text x="197" y="216" text-anchor="middle">{{ across_name }}</text></g>
{{ marks }}
</svg>
{% if legend %}<p class="legend">{% for style, name in legend %}<span class="key">
<svg viewBox="0 0 28 8" aria-hidden="true"><path class="line s{{ style }}" d="M0 4H28"/></svg> {{ name }}</span>
{% endfor %}</p>{% endif %}
{% if note %}<p class="faint">{{ note }}</p>{% endif %}
<details><summary>Values</summary>{{ values }}</details></figure>
"""

_BAR = """{% for x, y, width, height, text in bars %}<rect class="mark" x="{{ x }}" y="{{ y }}" width="{{ width }}"
 height="{{ height }}"><title>{{ text }}</title></rect>{% endfor %}
{% if at is not none %}<path class="zero" d="M{{ at }} 12V184"/>{% endif %}"""

_LINE = """{% for style, path, dots in lines %}<path class="line s{{ style }}" d="{{ path }}"/>
{% for x, y in dots %}<circle class="dot s{{ style }}" cx="{{ x }}" cy="{{ y }}" r="3"/>{% endfor %}{% endfor %}"""


@dataclass(frozen=True)
class Line:
    """One line of a chart: its name, and points by rising x; None breaks it."""

    name: str
    points: Sequence[tuple[float, float | None]]


def bars(
    title: str, edges: Sequence[float], counts: Sequence[float], *, across_name: str, note: str = "", zero: bool = False
) -> Markup:
    """Return a histogram.

    Input: n + 1 `edges` and n `counts`; `zero` draws a line at 0. Output: a figure with a table of the counts.

    Raises:
        ValueError: there are not as many counts as the edges bound.
    """
    if len(edges) != len(counts) + 1 or not counts:
        raise ValueError(f"{len(edges)} edges, {len(counts)} counts")
    low, high = edges[0], edges[-1]
    top = max(max(counts), 1)
    ticks = [tick for tick in _ticks(0, top) if tick == int(tick)]
    drawn = []
    for left, right, count in zip(edges, edges[1:], counts, strict=False):
        x, y = _x(left, low, high), _y(count, 0, top)
        text = f"{left:g} to {right:g}: {count:g}"
        drawn.append((x + 0.5, y, max(1.0, round(_x(right, low, high) - x - 1, 1)), round(_y(0, 0, top) - y, 1), text))
    rows = [(f"{a:g} to {b:g}", f"{count:g}") for a, b, count in zip(edges, edges[1:], counts, strict=False)]
    biggest = max(range(len(counts)), key=lambda i: counts[i])
    return html.render(
        _FRAME,
        title=title,
        what=f"a histogram of {sum(counts):g} over {across_name}; most, {counts[biggest]:g}, in {rows[biggest][0]}",
        across=[(_x(tick, low, high), f"{tick:g}") for tick in _ticks(low, high)],
        up=[(_y(tick, 0, top), f"{tick:g}") for tick in ticks],
        across_name=across_name,
        marks=html.render(_BAR, bars=drawn, at=_x(0, low, high) if zero and low < 0 < high else None),
        legend=[],
        note=note,
        values=html.table((across_name, "number"), rows, numbers=(1,)),
    )


def lines(
    title: str, series: Sequence[Line], *, across_name: str, low: float | None = None, high: float | None = None
) -> Markup:
    """Return a line chart; each line has its own colour and its own dashes.

    Input: at least one line with a point; `low` and `high`, ends of the upright axis, else those of the data.

    Raises:
        ValueError: no line has a point.
    """
    points = [(x, y) for line in series for x, y in line.points if y is not None]
    if not points:
        raise ValueError(f"{title}: nothing to draw")
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    bottom = min(y for _, y in points) if low is None else low
    top = max(y for _, y in points) if high is None else high
    if low is None and bottom > 0 and bottom < 0.6 * top:
        bottom = 0.0
    if bottom == top:
        bottom, top = (0.0, top) if top > 0 else (bottom - 1, top + 1)
    ticks = _ticks(left, right)
    if left == right:
        left, right = left - 1, right + 1
    drawn = []
    for style, line in enumerate(series):
        path, dots, joined = [], [], False
        for x, y in line.points:
            if y is None:
                joined = False
                continue
            place = _x(x, left, right), _y(min(max(y, bottom), top), bottom, top)
            path.append(f"{'L' if joined else 'M'}{place[0]:g} {place[1]:g}")
            joined = True
            if len(line.points) <= 12:
                dots.append(place)
        drawn.append((style % 6, "".join(path), dots))
    return html.render(
        _FRAME,
        title=title,
        what="; ".join(_tell(line) for line in series),
        across=[(_x(tick, left, right), _short(tick)) for tick in ticks],
        up=[(_y(tick, bottom, top), _short(tick)) for tick in _ticks(bottom, top)],
        across_name=across_name,
        marks=html.render(_LINE, lines=drawn),
        legend=[(style % 6, line.name) for style, line in enumerate(series)],
        note="",
        values=_values(series, across_name),
    )


def _tell(line: Line) -> str:
    known = [(x, y) for x, y in line.points if y is not None]
    if not known:
        return f"{line.name}, no value"
    return f"{line.name}, from {_short(known[0][1])} at {_short(known[0][0])} to {_short(known[-1][1])} at {_short(known[-1][0])}"


def _values(series: Sequence[Line], across_name: str) -> Markup:
    places = sorted({x for line in series for x, _ in line.points})
    shown = places
    if len(places) > _LONGEST_TABLE:
        shown = [places[i * (len(places) - 1) // (_LONGEST_TABLE - 1)] for i in range(_LONGEST_TABLE)]
    known = [{x: y for x, y in line.points if y is not None} for line in series]
    rows = [(f"{x:g}", *(_short(one[x]) if x in one else "" for one in known)) for x in shown]
    note = f"{len(shown)} of {len(places)} places" if len(shown) < len(places) else ""
    table = html.table((across_name, *(line.name for line in series)), rows, numbers=range(len(series) + 1))
    return html.paragraph(note, style="faint") + table if note else table


def _x(value: float, low: float, high: float) -> float:
    return round(_LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT), 1)


def _y(value: float, low: float, high: float) -> float:
    return round(_HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM), 1)


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 or abs(value) >= 1e6 else f"{value:.0f}"


def _ticks(low: float, high: float) -> list[float]:
    """Choose four to six round numbers between two ends: steps of 1, 2, 2.5 or 5 times a power of ten."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]

"""Write what is in a data set as one HTML page: pictures with their boxes, charts, and the worst problems.

When: ONCE, by `vlmdet inspect`. The page is one file without scripts; every text of the data set is escaped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from markupsafe import Markup
from PIL import Image

from vlmdet.data.explore.charts import CHARTS, chart_uris
from vlmdet.data.explore.summary import Summary
from vlmdet.data.pictures import open_small
from vlmdet.errors import ImageError
from vlmdet.records import DetectionDataset, Problem, Sample
from vlmdet.utils import html
from vlmdet.utils.visualization import class_colors, draw_classes

PICTURE_SIDE = 360
"""Longer side of a picture on the page, in pixels."""

_SEVERITY = {"row_dropped": 0, "box_dropped": 1, "box_clipped": 2}
_CLASSES = 20  # that are shown at once; the others are folded
_POOL = 2000  # rows among which the mosaic is chosen


def write_page(
    path: Path,
    summary: Summary,
    dataset: DetectionDataset,
    *,
    twins: Mapping[str, str] | None = None,
    pictures: int = 24,
    worst: int = 24,
) -> Path:
    """Write the page of `vlmdet inspect`.

    When: once; opens the pictures that it shows, some dozens.

    Input: `summary` of `dataset`; `twins`, id -> id of the picture that it is like, from `pictures.look_over`; the most
    `pictures` of the mosaic and of the `worst` problems.
    Output: `path`, one file of about a megabyte.
    """
    colors = class_colors([one["name"] for one in summary.classes])
    shown = choose_pictures(dataset, count=pictures)
    body = [
        html.paragraph(f"Boxes are read as {summary.box_format}: {summary.decided_by}."),
        *(html.paragraph(note, style="faint") for note in summary.notes),
        html.tiles(_tiles(summary)),
        _splits(summary),
        html.section(
            "Ground truth",
            html.paragraph("Drawn as training will see it: turned upright, boxes cut to the picture.", style="faint"),
            html.grid([figure for sample in shown if (figure := _figure(sample, colors))], least="14rem"),
        ),
        _classes(summary, colors),
        html.section(
            "Distributions", html.grid((_chart(summary, name) for name in CHARTS), least="22rem"), _legend(summary)
        ),
        _problems(summary, dataset, colors, twins or {}, worst),
    ]
    return html.write_page(path, f"{summary.source}: {summary.images:,} pictures, {summary.boxes:,} boxes", body)


def choose_pictures(dataset: DetectionDataset, *, count: int, seed: int = 0) -> list[Sample]:
    """Choose samples that show the data set: rare classes first, a picture without a box, then by chance.

    When: once per page; looks at up to 2,000 rows drawn by `seed`.

    Output: up to `count` samples, in the order of splits and rows.
    """
    places = [(split, row) for split, samples in dataset.splits.items() for row in range(len(samples))]
    order = np.random.default_rng(seed).permutation(len(places))[:_POOL].tolist()
    pool = {number: dataset.splits[places[number][0]][places[number][1]] for number in order}
    rarity = Counter(label for sample in pool.values() for label in set(sample.labels))
    chosen: list[int] = []
    missing = set(rarity)
    for label, _ in sorted(rarity.items(), key=lambda item: (item[1], item[0])):
        if label in missing and len(chosen) < count // 2:
            found = next(number for number in order if label in pool[number].labels)
            chosen.append(found)
            missing -= set(pool[found].labels)
    chosen += [number for number in order if not pool[number].labels][:1]
    chosen += [number for number in order if number not in set(chosen)]
    return [pool[number] for number in sorted(dict.fromkeys(chosen[:count]))]


def worst_problems(problems: Iterable[Problem], *, count: int, of_a_kind: int = 4) -> list[Problem]:
    """Choose problems to show: what loses rows before what loses boxes, rare kinds before frequent ones.

    Output: up to `count`, at most `of_a_kind` of each kind and action.
    """
    groups: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        groups.setdefault((problem.action, problem.kind), []).append(problem)
    ranked = sorted(groups, key=lambda group: (_SEVERITY.get(group[0], 3), len(groups[group]), group))
    return [problem for group in ranked for problem in groups[group][:of_a_kind]][:count]


def _tiles(summary: Summary) -> list[tuple[str, str]]:
    tokens = summary.quantiles["tokens"]
    share = summary.rows_dropped / max(1, summary.images)
    return [
        (f"{summary.images:,}", "pictures"),
        (f"{summary.empty:,}", "pictures without a box"),
        (f"{summary.boxes:,}", "boxes"),
        (f"{len(summary.classes):,}", "classes"),
        (f"{tokens.get('p50', 0):,.0f}", f"image tokens a picture, half of them; p95 {tokens.get('p95', 0):,.0f}"),
        (f"{summary.under_one_patch:.1%}", "boxes smaller than one image token"),
        (f"{summary.under_two_patches:.1%}", "boxes smaller than 2 x 2 image tokens"),
        (f"{summary.rows_dropped:,}", f"rows that train would leave out ({share:.1%})"),
    ]


def _splits(summary: Summary) -> Markup:
    rows = [
        (name, f"{here['images']:,}", f"{here['empty']:,}", f"{here['boxes']:,}")
        for name, here in summary.splits.items()
    ]
    return html.section("Splits", html.table(("split", "pictures", "without a box", "boxes"), rows, numbers=(1, 2, 3)))


def _classes(summary: Summary, colors: Mapping[str, str]) -> Markup:
    most = max((one["boxes"] for one in summary.classes), default=1) or 1
    rows = [
        (_swatch(colors[one["name"]], one["name"]), f"{one['boxes']:,}", f"{one['images']:,}")
        for one in summary.classes
    ]
    bars = [one["boxes"] / most for one in summary.classes]

    def table(part: slice) -> Markup:
        return html.table(("class", "boxes", "in pictures"), rows[part], numbers=(1, 2), bars=bars[part])

    parts = [table(slice(_CLASSES))]
    if len(rows) > _CLASSES:
        parts.append(html.folded(f"{len(rows) - _CLASSES} more classes", table(slice(_CLASSES, None))))
    return html.section("Instances per class", *parts)


def _swatch(color: str, text: str) -> Markup:
    return html.render(
        '<span class="swatch" style="background: {{ color }}"></span> {{ text }}', color=color, text=text
    )


def _chart(summary: Summary, name: str) -> Markup:
    chart = CHARTS[name]
    words = chart.words(summary)
    light, dark = chart_uris(summary, name)
    return html.figure(light, f"{chart.title}. {words}", title=chart.title, caption=words, dark=dark)


def _legend(summary: Summary) -> Markup:
    limits = summary.limits
    return html.paragraph(
        f"Model pixels: after the resize to {limits['min_pixels']:,} to {limits['max_pixels']:,} pixels, both sides "
        f"multiples of {limits['factor']}. One image token stands for {limits['factor']} x {limits['factor']} of them; a "
        "box counts as smaller than n x n tokens where the square root of its area is under n times that side.",
        style="faint",
    )


def _problems(
    summary: Summary,
    dataset: DetectionDataset,
    colors: Mapping[str, str],
    twins: Mapping[str, str],
    worst: int,
) -> Markup:
    if not summary.problems:
        return html.section("Problems", html.paragraph("None."))
    rows = [
        (kind.replace("_", " "), action.replace("_", " "), f"{count:,}")
        for kind, counts in summary.problems.items()
        for action, count in counts.items()
    ]
    chosen = worst_problems(dataset.problems, count=worst)
    wanted = {one.id for one in chosen} | {twins[one.id] for one in chosen if one.id in twins}
    by_id = {sample.id: sample for samples in dataset.splits.values() for sample in samples if sample.id in wanted}
    figures = [_problem_figure(problem, by_id, colors, twins) for problem in chosen]
    return html.section(
        "Problems",
        html.table(("kind", "what was done", "how often"), rows, numbers=(2,)),
        html.paragraph(
            f"The worst {len(chosen)} of {len(dataset.problems):,}, at most 4 of a kind; boxes as they were read, "
            "without those that were dropped.",
            style="faint",
        ),
        html.grid(figures, least="18rem"),
    )


def _problem_figure(
    problem: Problem, by_id: Mapping[str, Sample], colors: Mapping[str, str], twins: Mapping[str, str]
) -> Markup:
    ids = [problem.id] + ([twins[problem.id]] if problem.id in twins and "duplicate" in problem.kind else [])
    pictures = [
        (html.picture_uri(drawn), f"{name}, with its boxes")
        for name in ids
        if name in by_id and (drawn := _drawn(by_id[name], colors)) is not None
    ]
    where = problem.file if problem.row is None else f"{problem.file}, row {problem.row}"
    return html.render(
        """<figure><h3>{{ kind }} <span class="faint">({{ action }})</span></h3>
{% if pictures %}<div class="{{ 'pair' if pictures|length > 1 else '' }}">
{% for uri, alt in pictures %}<img src="{{ uri }}" alt="{{ alt }}" loading="lazy">{% endfor %}</div>
{% else %}<p class="alarm">no picture to show</p>{% endif %}
<figcaption>{{ detail }}<br>{{ where }}</figcaption></figure>
""",
        kind=problem.kind.replace("_", " "),
        action=problem.action.replace("_", " "),
        pictures=pictures,
        detail=problem.detail[:400],
        where=where[-200:],
    )


def _figure(sample: Sample, colors: Mapping[str, str]) -> Markup | None:
    """Return a picture of the mosaic; None where it cannot be opened, which the problems say."""
    drawn = _drawn(sample, colors)
    if drawn is None:
        return None
    counts = Counter(sample.labels).most_common()
    said = ", ".join(f"{count} {label[:80]}" for label, count in counts[:12]) or "no object"
    parts = [_swatch(colors[label], f"{count} {label[:80]}") for label, count in counts[:12]]
    names = Markup(", ").join(parts) if parts else Markup("no object")
    caption = html.render("{{ split }}: {{ id }}<br>{{ names }}", split=sample.split, id=sample.id[-80:], names=names)
    return html.figure(html.picture_uri(drawn), f"{sample.split}, {sample.id[-80:]}: {said}", caption=caption)


def _drawn(sample: Sample, colors: Mapping[str, str]) -> Image.Image | None:
    try:
        small = open_small(sample, PICTURE_SIDE)
    except ImageError:
        return None
    return draw_classes(small, sample.boxes, sample.labels, colors)

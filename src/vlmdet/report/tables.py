"""The figures of results.json as tables: by model, class, size and kind of error, and the confusion matrix.

When: AFTER, by the report. What is absent or null in the file is left out; an undefined figure is a dash.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from vlmdet.report.reading import Scored, Split, mapping, number_of, sequence
from vlmdet.report.verdict import METRICS, Pair, called, find_pairs, plain, signed, span
from vlmdet.utils import html

_OF_CLASS = ("precision_50", "recall_50", "f1_50", "f1", "mean_best_iou", "mean_matched_iou")
_ERRORS = {
    "class": ("wrong class", "right place, wrong label"),
    "localisation": ("badly placed", "right label, IoU below 0.5"),
    "both": ("wrong class and place", "near an object, wrong label"),
    "duplicate": ("duplicate", "the object was found already"),
    "background": ("false", "nothing is there"),
    "missed": ("missed", "no prediction explains the object"),
}
_MOST_CLASSES = 30  # of a confusion matrix: a wider one is no longer read
_VALUE = "{{ value }}{% if span %}<small>{{ span }}</small>{% endif %}"


def part(title: str, *parts: Markup) -> Markup:
    """Return a heading of the third level and what stands under it."""
    return html.render(
        "<section><h3>{{ title }}</h3>\n{{ body }}</section>", title=title, body=Markup("\n").join(parts)
    )


def cell(figure: object) -> Markup:
    """Return a figure with its interval beneath."""
    one = mapping(figure)
    return html.render(_VALUE, value=plain(one.get("value")), span=span(one))


def models_table(split: Split) -> Markup:
    """Return every figure of every model, and the paired difference of tuned and base."""
    figures = [mapping(model.results.get("figures")) for model in split.models]
    names = [name for name in METRICS if any(name in one for one in figures)]
    pairs = find_pairs(split, split.base.name, split.main.name) if split.base else {}
    head = ["figure", *(called(model) for model in split.models)]
    if pairs:
        head += [f"{called(split.main)} − base", "separable", "pictures better / worse"]
    rows = []
    for name in names:
        row: list[Any] = [METRICS[name], *(cell(one.get(name)) for one in figures)]
        if pairs:
            row += _difference(pairs[name]) if name in pairs else ["–", "", ""]
        rows.append(row)
    return html.table(
        head, rows, numbers=range(1, len(head)), row_heads=True,
        caption=f"Figures of each model on {split.name}",
    )  # fmt: skip


def _difference(pair: Pair) -> list[str | Markup]:
    one = pair.difference
    value = html.render("<b>{{ value }}</b><small>{{ span }}</small>", value=signed(one.get("value")), span=span(one))
    counted = one.get("wins") is not None and one.get("losses") is not None
    return [value, "yes" if pair.separable else "no", f"{one['wins']} / {one['losses']}" if counted else "–"]


def classes_table(split: Split, model: Scored) -> Markup | None:
    """Return the figures of every class, that of all of them first."""
    classes = mapping(model.results.get("per_class"))
    if not classes:
        return None
    whole = mapping(model.results.get("figures"))
    images = mapping(model.results.get("meta")).get("n", mapping(whole.get("f1_50")).get("n"))
    entries = [mapping(one) for one in classes.values()]
    counts = [sum(int(number_of(one.get(key)) or 0) for one in entries) for key in ("instances", "predicted")]
    rows: list[list[Any]] = [["all", images, *counts, *(cell(whole.get(name)) for name in _OF_CLASS)]]
    for label, one in zip(classes, entries, strict=True):
        figures = mapping(one.get("figures"))
        rows.append(
            [label, *(one.get(key, "–") for key in ("images", "instances", "predicted"))]
            + [cell(figures.get(name)) for name in _OF_CLASS]
        )
    head = ["class", "pictures", "instances", "predicted", *(METRICS[name] for name in _OF_CLASS)]
    caption = f"Classes, {called(model)} on {split.name}"
    return html.table(head, rows, numbers=range(1, len(head)), row_heads=True, caption=caption)


def errors_table(split: Split, model: Scored) -> Markup | None:
    """Return how often each kind of error occurs, and what it costs."""
    errors = mapping(model.results.get("errors"))
    rows: list[list[Any]] = []
    costs = []
    for kind, (name, meaning) in _ERRORS.items():
        one = mapping(errors.get(kind))
        if one:
            cost = mapping(one.get("cost"))
            costs.append(max(0.0, number_of(cost.get("value")) or 0.0))
            rows.append([name, meaning, one.get("count", "–"), cell(cost)])
    if not rows:
        return None
    most = max(costs) or 1.0
    return html.table(
        ("kind", "what it is", "boxes", "F1@0.5 lost to it"), rows, numbers=(2, 3), row_heads=True,
        bars=[cost / most for cost in costs], caption=f"Errors by kind, {called(model)} on {split.name}",
    )  # fmt: skip


def sizes_tables(split: Split, model: Scored) -> list[Markup]:
    """Return the figures by size of box, by its area in image tokens, by boxes per picture, and without objects."""
    results = model.results
    kinds = (
        ("by_size", "box on the original picture", "instances"),
        ("by_patches", "box area in image tokens", "instances"),
        ("by_count", "true boxes in a picture", "images"),
    )
    names = ("f1_50", "f1", "precision_50", "recall_50", "mean_best_iou")
    made = []
    for key, what, count in kinds:
        groups = mapping(results.get(key))
        rows = []
        for name, one in groups.items():
            one = mapping(one)
            rows.append(
                [_LIMITS.get(name, name), one.get(count, "–")]
                + [cell(mapping(one.get("figures")).get(figure)) for figure in names]
            )
        if rows:
            head = [what, "pictures" if count == "images" else count, *(METRICS[figure] for figure in names)]
            caption = f"By {what}, {called(model)} on {split.name}"
            made.append(html.table(head, rows, numbers=range(1, len(head)), row_heads=True, caption=caption))
    empty = mapping(results.get("without_objects"))
    if empty:
        figures = mapping(empty.get("figures"))
        known = [name for name in METRICS if name in figures]
        made.append(
            html.table(
                ("figure", called(model)), [(METRICS[name], cell(figures[name])) for name in known], numbers=(1,),
                row_heads=True, caption=f"On {empty.get('images', '–')} pictures without objects",
            )
        )  # fmt: skip
    return made


_LIMITS = {
    "small": "small, below 32² pixels",
    "medium": "medium, 32² to 96² pixels",
    "large": "large, 96² pixels and over",
}


def coco_table(split: Split) -> Markup | None:
    """Return COCO's figures of the models that have scores."""
    scored = [(called(model), mapping(model.results.get("coco"))) for model in split.models]
    scored = [(name, one) for name, one in scored if one]
    if not scored:
        return None
    names = list(dict.fromkeys(key for _, one in scored for key, value in one.items() if _coco_value(value)))
    rows = [[key, *(_coco_value(one.get(key)) for _, one in scored)] for key in names]
    caption = f"COCO average precision and recall on {split.name}"
    head = ("figure", *(name for name, _ in scored))
    return html.table(head, rows, numbers=range(1, len(head)), row_heads=True, caption=caption)


def _coco_value(value: object) -> str | Markup:
    if isinstance(value, Mapping) and "value" in value:
        return cell(value)
    number = number_of(value)
    return "" if number is None else "undefined" if number == -1 else plain(number)


_CONFUSION = """<div class="scroll" role="region" tabindex="0" aria-label="{{ caption }}"><table class="confusion">
<caption>{{ caption }}</caption>
<thead><tr><th scope="col">true \\ predicted</th>{% for name in columns %}<th scope="col">{{ name }}</th>{% endfor -%}
</tr></thead>
<tbody>{% for name, cells in rows %}<tr><th scope="row">{{ name }}</th>
{%- for count, share, right in cells %}<td class="number{% if right %} right{% endif %}"
 style="--share: {{ share }}%">{{ count }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
"""


def confusion_table(split: Split, model: Scored) -> Markup | None:
    """Return the confusion matrix, shaded by the share of each row; the largest classes where there are many."""
    confusion = mapping(model.results.get("confusion"))
    labels = [str(label) for label in sequence(confusion.get("labels"))]
    counts = [sequence(row) for row in sequence(confusion.get("counts"))]
    if not labels or [len(row) for row in counts] != [len(labels)] * len(labels):
        return None
    numbers = [[int(number_of(value) or 0) for value in row] for row in counts]
    size = {i: sum(numbers[i]) + sum(row[i] for row in numbers) for i in range(len(labels))}
    chosen = sorted(range(len(labels) - 1), key=lambda i: -size[i])[:_MOST_CLASSES]
    kept = [*sorted(chosen), len(labels) - 1]
    last = len(labels) - 1
    rows = []
    for i in kept:
        total = sum(numbers[i]) or 1
        cells = [
            ("" if i == j == last else numbers[i][j], round(100 * numbers[i][j] / total), i == j != last) for j in kept
        ]
        rows.append((labels[i], cells))
    caption = (
        f"Confusion, {called(model)} on {split.name}: rows are true, columns predicted; the last of each is background"
    )
    if len(kept) < len(labels):
        caption += f"; the {len(kept) - 1} largest of {len(labels) - 1} classes"
    return html.render(_CONFUSION, caption=caption, columns=[labels[i] for i in kept], rows=rows)

"""The pictures of a split with true and predicted boxes: one card each, the models side by side.

When: AFTER, by the report. Boxes are an SVG laid over a thumbnail, so that they stay sharp at any size. What became of
each box stands in matches.jsonl. Cards carry what `report.js` filters and sorts by; without a script all are shown, the
worst first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from markupsafe import Markup

from vlmdet.report.reading import Scored, Split, mapping, number_of, sequence
from vlmdet.report.verdict import called
from vlmdet.utils import html

FILTERS = (
    ("all", "all"),
    ("missed", "missed"),
    ("background", "false"),
    ("class", "wrong class"),
    ("localisation", "badly placed"),
    ("duplicate", "duplicates"),
    ("parse_failure", "parse failures"),
    ("error", "errors"),
    ("truncated", "truncated"),
    ("flawless", "no mistake"),
)
"""What may be shown: the kind that a picture must have, and how it is called."""

_WORDS = {
    "hit": "found an object",
    "class": "wrong class",
    "localisation": "badly placed",
    "both": "wrong class and place",
    "duplicate": "duplicate",
    "background": "false",
    "ignored": "in an ignored region",
    "found": "found",
    "missed": "missed",
}
_LONGEST_TEXT = 1200
_SHORT_TEXT = 400
_MOST_BOXES = 200  # that are drawn of a list: an answer that repeats itself may have thousands
_MOST_WORDS = 8  # "missed" written at more boxes than this would hide the picture
_SIDE = 300.0  # longer side of the overlay, in its own units

_SPECIAL = re.compile(r"<\|[^<>|]{1,40}\|>|</?(?:s|ref|box|bos|eos|pad|img|image)>|<loc_?\d{1,4}>|<unk>")
"""Tokens that models write around words and numbers; shown as they are, and marked."""


@dataclass(frozen=True)
class Card:
    """One picture: HTML with a gap for the thumbnail in each panel.

    Attributes:
        id: of the row.
        image: what the row names as its picture.
        pieces: HTML before, between and after the gaps.
        size: bytes of these.
    """

    id: str
    image: str
    pieces: tuple[Markup, ...]
    size: int


def order_ids(split: Split) -> list[str]:
    """Return the ids of all pictures, the worst of the main model first: by F1, then by mean best IoU.

    A row with an error comes first; a picture whose figures are undefined comes last.
    """
    ids = list(dict.fromkeys(key for model in (split.main, *split.models) for key in model.rows))

    def badness(key: str) -> tuple[int, float, float]:
        row, match = split.main.rows.get(key), mapping(split.main.matches.get(key))
        if row is None or row["status"] == "error":
            return 0, 0.0, 0.0
        f1, iou = number_of(match.get("f1")), number_of(match.get("mean_best_iou"))
        if f1 is None and iou is None:
            return 2, 0.0, 0.0
        return 1, f1 if f1 is not None else 1.0, iou if iou is not None else 1.0

    return sorted(ids, key=badness)


def make_card(split: Split, key: str, *, number: int, labels: Mapping[str, int]) -> Card:
    """Write the card of a picture.

    Input: `number`, its place in the file; `labels`, label -> number, for the filter by class.
    """
    rows = [(model, model.rows[key]) for model in split.models if key in model.rows]
    first = rows[0][1]
    names = {label for _, row in rows for label in (*row["truth"]["labels"], *row["labels"]) if label is not None}
    head = html.render(
        '<article class="card" data-number="{{ number }}" data-labels=" {{ labels }} " aria-label="{{ key }}">'
        '<h3>{{ key }}</h3><p class="faint">{{ width }} × {{ height }} pixels · true: {{ truth }}</p>'
        '<div class="panels">\n',
        number=number,
        key=key,
        labels=" ".join(str(labels[name]) for name in sorted(names) if name in labels),
        width=first["width"],
        height=first["height"],
        truth=_tally([str(label) for label in first["truth"]["labels"]]) or "no object",
    )
    pieces, open_piece = [], head
    for model, row in rows:
        before, after = _panel(model, row, mapping(model.matches.get(key)), main=model is split.main)
        pieces.append(open_piece + before)
        open_piece = after
    pieces.append(open_piece + Markup("</div></article>\n"))
    size = sum(len(piece.encode("utf-8", "replace")) for piece in pieces)
    return Card(key, str(first.get("image") or ""), tuple(pieces), size)


_PANEL = """<figure class="panel{{ ' main' if main }}" data-model="{{ model }}" data-kinds=" {{ kinds }} "
 data-f1="{{ f1 }}" data-iou="{{ iou }}"><figcaption><b>{{ name }}</b> {{ figures }}</figcaption>
<div class="shot" style="--ratio: {{ ratio }}">"""

_AFTER = """{{ overlay }}</div>
<p class="chips">{% for kind, text in chips %}<span class="chip {{ kind }}">{{ text }}</span> {% endfor %}</p>
{% if error %}<p class="alarm">{{ error }}</p>{% endif %}
{% if folded %}<details><summary>Answer, {{ length }} characters</summary>{{ text }}</details>{% else %}{{ text }}{% endif %}
{% if problems %}<ul class="faint">{% for line in problems %}<li>{{ line }}</li>{% endfor %}</ul>{% endif %}
{% if boxes %}<details><summary>{{ count }}</summary>
<ol>{% for line in boxes %}<li>{{ line }}</li>{% endfor %}</ol></details>{% endif %}
</figure>
"""


def _panel(model: Scored, row: Mapping[str, Any], match: Mapping[str, Any], *, main: bool) -> tuple[Markup, Markup]:
    """Return what stands before and after the thumbnail of one model."""
    predicted = [mapping(one) for one in sequence(match.get("predictions"))]
    truth = [mapping(one) for one in sequence(match.get("truth"))]
    count: dict[str, int] = {}
    for one in (*predicted, *truth):
        count[str(one.get("kind"))] = count.get(str(one.get("kind")), 0) + 1
    count = {kind: number for kind, number in count.items() if kind in _WORDS}
    flaws = [kind for kind in _WORDS if kind in count and kind not in ("hit", "found", "ignored")]
    kinds = [*flaws, *(["class"] if "both" in flaws and "class" not in flaws else [])]
    status, text = str(row["status"]), str(row.get("text") or "")
    chips = [(kind, f"{_WORDS[kind]} × {count[kind]}" if count[kind] > 1 else _WORDS[kind]) for kind in flaws]
    if status in ("parse_failure", "error"):
        kinds.append(status)
        chips.insert(0, (status, "parse failure" if status == "parse_failure" else "error"))
    if row["truncated"]:
        kinds.append("truncated")
        chips.insert(0, ("truncated", "truncated"))
    if match and not kinds:
        kinds.append("flawless")
        chips.append(("flawless", "no mistake"))
    f1, iou = number_of(match.get("f1")), number_of(match.get("mean_best_iou"))
    figures = [f"F1 {f1:.2f}"] if f1 is not None else []
    figures += [f"mean best IoU {iou:.2f}"] if iou is not None else []
    before = html.render(
        _PANEL,
        main=main,
        model=model.name,
        name=called(model),
        kinds=" ".join(kinds),
        f1="" if f1 is None else f"{f1:.4f}",
        iou="" if iou is None else f"{iou:.4f}",
        figures=", ".join(figures) or ("not matched" if status != "error" else "no answer"),
        ratio=f"{row['width']} / {row['height']}",
    )
    scores = row.get("scores") or [None] * len(row["boxes"])
    problems = [f"{one.get('kind')}: {one.get('detail')}" for one in map(mapping, sequence(row.get("problems")))]
    after = html.render(
        _AFTER,
        overlay=_overlay(row, predicted, truth),
        chips=chips,
        error=row.get("error") if status == "error" else "",
        text=_answer(text),
        folded=len(text) > _SHORT_TEXT,
        length=f"{len(text):,}",
        problems=_first(problems, 10),
        count=f"Boxes: {len(row['boxes'])} predicted, {len(row['truth']['boxes'])} true",
        boxes=_tell_boxes(row, predicted, truth, scores),
    )
    return before, after


_OVERLAY = """<svg class="boxes" viewBox="0 0 {{ width }} {{ height }}" role="img" aria-label="{{ what }}">
<path class="case" d="{{ case }}"/>{% for kind, paths in groups %}<g class="{{ kind }}">
{%- for path in paths %}<path d="{{ path }}"/>{% endfor %}</g>{% endfor %}
{% for kind, texts in tags %}<g class="{{ kind }}">{% for x, y, text in texts %}<text x="{{ x }}" y="{{ y }}">
{{- text }}</text>{% endfor %}</g>{% endfor %}
</svg>"""


def _overlay(
    row: Mapping[str, Any], predicted: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]]
) -> Markup:
    """Return boxes as paths, in the order of the list beneath: the script gives each its line of it to show."""
    scale = _SIDE / max(row["width"], row["height"])
    width, height = max(1.0, scale * row["width"]), max(1.0, scale * row["height"])
    groups: list[tuple[str, list[str]]] = [("p", [])]
    ious, misses = [], []
    for i, box in enumerate(row["boxes"][:_MOST_BOXES]):
        x, y, w, h = _place(box, width, height)
        groups[-1][1].append(_outline(x, y, w, h))
        iou = number_of(predicted[i].get("iou")) if i < len(predicted) else None
        if iou is not None:
            ious.append((f"{min(x + 3, width - 22):.0f}", f"{max(y + 12, 12):.0f}", f"{iou:.2f}"))
    for i, box in enumerate(row["truth"]["boxes"][:_MOST_BOXES]):
        x, y, w, h = _place(box, width, height)
        kind = "g" if row["truth"]["ignore"][i] else "t"
        if groups[-1][0] != kind:
            groups.append((kind, []))
        groups[-1][1].append(_outline(x, y, w, h))
        if i < len(truth) and truth[i].get("kind") == "missed":
            left, base = max(0.0, min(x + 3, width - 40)), max(10.0, min(y + h - 4, height - 3))
            misses.append((f"{left:.0f}", f"{base:.0f}", "missed"))
    what = f"{len(row['truth']['boxes'])} true and {len(row['boxes'])} predicted boxes"
    return html.render(
        _OVERLAY,
        width=f"{width:.1f}",
        height=f"{height:.1f}",
        what=what,
        case="".join(path for _, paths in groups for path in paths),
        groups=groups,
        tags=[("tp", ious), ("tt", misses if len(misses) <= _MOST_WORDS else [])],
    )


def _outline(x: float, y: float, w: float, h: float) -> str:
    return f"M{x:g} {y:g}h{w:g}v{h:g}h{-w:g}z"


def _place(box: Sequence[float], width: float, height: float) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (min(max(float(value), -1.0), 2.0) for value in box)
    x, y = round(width * x1, 1), round(height * y1, 1)
    return x, y, round(max(0.0, width * (x2 - x1)), 1), round(max(0.0, height * (y2 - y1)), 1)


def _tell_predicted(label: object, one: Mapping[str, Any], score: object) -> str:
    parts = [f"predicted {_label(label)}"]
    if one.get("kind") in _WORDS:
        parts.append(_WORDS[str(one["kind"])])
    iou, sure = number_of(one.get("iou")), number_of(score)
    parts += [f"IoU {iou:.2f}"] if iou is not None else []
    parts += [f"score {sure:.2f}"] if sure is not None else []
    return ", ".join(parts)


def _tell_true(label: object, one: Mapping[str, Any], ignored: bool) -> str:
    parts = [f"true {_label(label)}"]
    if ignored:
        parts.append("ignored")
    elif one.get("kind") in _WORDS:
        parts.append(_WORDS[str(one["kind"])])
    iou = number_of(one.get("iou"))
    return ", ".join(parts + ([f"IoU {iou:.2f}"] if iou is not None and not ignored else []))


def _tell_boxes(
    row: Mapping[str, Any],
    predicted: Sequence[Mapping[str, Any]],
    truth: Sequence[Mapping[str, Any]],
    scores: Sequence[Any],
) -> list[str]:
    """Say what each box is: of the predicted ones, then of the true ones, those that are drawn."""
    lines = [
        _tell_predicted(label, predicted[i] if i < len(predicted) else {}, scores[i])
        for i, label in enumerate(row["labels"][:_MOST_BOXES])
    ]
    marks = zip(row["truth"]["labels"], row["truth"]["ignore"], strict=True)
    for i, (label, ignored) in enumerate(islice(marks, _MOST_BOXES)):
        lines.append(_tell_true(label, truth[i] if i < len(truth) else {}, ignored))
    left = len(row["labels"]) + len(row["truth"]["labels"]) - len(lines)
    return [*lines, f"… {left} more in predictions.jsonl"] if left else lines


def _label(label: object) -> str:
    text = "without a label" if label is None else str(label)
    return text if len(text) <= 120 else text[:119] + "…"


def _tally(labels: Sequence[str]) -> str:
    count: dict[str, int] = {}
    for label in labels:
        count[label] = count.get(label, 0) + 1
    return ", ".join(f"{number} {_label(label)}" for label, number in list(count.items())[:8])


def _first(lines: list[str], most: int) -> list[str]:
    return lines if len(lines) <= most else [*lines[:most], f"… {len(lines) - most} more in predictions.jsonl"]


def _answer(text: str) -> Markup:
    """Return the raw answer with special tokens marked; control characters become pictures of themselves."""
    if not text:
        return Markup('<p class="faint">The answer is empty.</p>')
    shown, rest = text[:_LONGEST_TEXT], len(text) - _LONGEST_TEXT
    runs, end = [], 0
    for found in _SPECIAL.finditer(shown):
        runs += [(False, shown[end : found.start()]), (True, found[0])]
        end = found.end()
    runs.append((False, shown[end:]))
    return html.render(
        '<pre class="answer">{% for special, part in runs %}{% if special %}<mark>{{ part }}</mark>{% else %}{{ part }}'
        "{% endif %}{% endfor %}{% if rest > 0 %}<i> … {{ rest }} more characters in predictions.jsonl</i>{% endif %}</pre>",
        runs=[(special, _visible(part)) for special, part in runs if part],
        rest=rest,
    )


def _visible(text: str) -> str:
    return "".join(
        chr(0x2400 + ord(char)) if ord(char) < 32 and char not in "\n\t" else char if char != "\x7f" else "␡"
        for char in text
    )

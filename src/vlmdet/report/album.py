"""The galleries of a split: as many cards as fit on the report's page, and the rest on further pages beside it.

When: AFTER, by the report. A card is `gallery.make_card`'s; here cards are chosen, divided among pages, and get their
thumbnails.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from vlmdet.report.gallery import FILTERS, Card, make_card, order_ids
from vlmdet.report.pictures import open_pictures, shrink
from vlmdet.report.reading import Split, mapping
from vlmdet.report.verdict import called
from vlmdet.utils import html

MAIN_PAGE = "report.html"
FURTHER_PAGE = "report_pictures_{}.html"
"""Names of the report's page, and of those beside it, numbered from 2."""

PAGE_BYTES = 14_000_000
CARD_BYTES = 10_000_000
"""Of a page's cards and thumbnails, and of the cards alone; thumbnails that go over it are files beside the page."""

_SIDES = ((150, 480), (400, 400), (0, 320))
"""Longer side of a thumbnail, for at most that many pictures on a page."""


@dataclass(frozen=True)
class Gallery:
    """The pictures of a split on one page.

    Attributes:
        page: name of that page's file.
        content: HTML.
        pictures: how many.
        size: bytes.
    """

    page: str
    content: Markup
    pictures: int
    size: int


_GALLERY = """<div class="gallery" style="--card-width: {{ width }}">
<p class="boxkey"><span><svg viewBox="0 0 34 20" aria-hidden="true"><rect class="t" x="3" y="3" width="28" height="14"
 fill="none"/></svg>ground truth: dashed, green</span>
<span><svg viewBox="0 0 34 20" aria-hidden="true"><rect class="p" x="3" y="3" width="28" height="14"
 fill="none"/></svg>prediction: solid, red, with its IoU</span></p>
{% if elsewhere %}<p>{{ count }} of {{ all }} pictures are on this page, and the filters are for these; {{ others }}:
{% for name, number in elsewhere %}<a href="{{ name }}{{ place if name == main_page }}">{{ name }}</a> ({{ number }}
{%- if name == main_page %}, the worst and the best{% endif %}){% if not loop.last %}, {% endif %}{% endfor %}.</p>{% endif %}
{% if note %}<p>{{ note }}</p>{% endif %}
<form hidden aria-label="Filter and sort the pictures of {{ split }}">
<fieldset><legend>Show</legend><div class="pills">{% for value, name in filters %}<label><input type="radio" name="kind"
 value="{{ value }}"{% if loop.first %} checked{% endif %}><span>{{ name }} <b></b></span></label>
{% endfor %}</div></fieldset>
<label class="field">Sort<select name="order"><option value="worst">worst first</option><option value="best">best first</option>
{% if has_base %}<option value="gained">gained most over the base</option>
<option value="lost">lost most to the base</option>{% endif %}
<option value="file">as in the file</option></select></label>
<label class="field">Judged by<select name="model">{% for value, name in models %}<option value="{{ value }}"
{%- if value == main %} selected{% endif %}>{{ name }}</option>{% endfor %}</select></label>
<label class="field">Class<select name="label"><option value="">any</option>{% for name in labels %}
<option value="{{ loop.index0 }}">{{ name }}</option>{% endfor %}</select></label>
<label class="field">Find<input type="search" name="words" placeholder="id, label or answer"></label>
<button type="reset">Reset</button>
</form>
<noscript><p class="faint">Filters need the page's script. All pictures are shown, the worst first.</p></noscript>
<p class="status" role="status" aria-live="polite">{{ count }} pictures, the worst first</p>
<div class="cards">
"""


def make_galleries(
    split: Split, number: int, *, folder: Path, most: int, room: int, next_page: int, beside: dict[str, bytes]
) -> list[Gallery]:
    """Return the gallery for the report's page, then those for the pages beside it.

    When: once per split and report.

    Input: `number` of the split; `folder` of the run; `most` pictures in all; `room`, bytes on the report's page; `next_page`,
    number of the first page beside it; thumbnails that fit on no page go to `beside`, name -> content.
    Output: at least one gallery. On the report's page are the worst pictures and the best, on the last one those between;
    on each page the worst come first.
    """
    ids, labels = order_ids(split), _labels(split)
    places = {key: place for place, key in enumerate(next(model.rows for model in split.models if model.rows))}
    made = (make_card(split, key, number=places.get(key, len(places)), labels=labels) for key in _spread(ids, most))
    sheets = _divide(made, first=min(CARD_BYTES, room), further=CARD_BYTES)
    pages = [MAIN_PAGE, *(FURTHER_PAGE.format(next_page + i) for i in range(len(sheets) - 1))]
    counts = {page: f"{len(cards):,}" for page, cards in zip(pages, sheets, strict=True)}
    shown, rank = sum(map(len, sheets)), {key: place for place, key in enumerate(ids)}
    left = len(ids) - shown
    note = (
        f"{left:,} of {len(ids):,} pictures, neither among the worst nor the best, are left out; "
        f"vlmdet report RUN --pictures {len(ids)} shows all." if left else ""
    )  # fmt: skip
    names = [(model.name, called(model)) for model in split.models]
    galleries = []
    for sheet, (page, cards) in enumerate(zip(pages, sheets, strict=True)):
        cards = sorted(cards, key=lambda card: rank[card.id])
        used = sum(card.size for card in cards)
        space = (room if page == MAIN_PAGE else PAGE_BYTES) - used
        content, spent = _fill(cards, f"{number}-{sheet}", folder=folder, room=space, beside=beside)
        head = html.render(
            _GALLERY, width=f"{18 * len(names) if len(names) > 1 else 20}rem", split=split.name, filters=FILTERS,
            models=names, main=split.main.name, has_base=split.base is not None, labels=list(labels), count=counts[page],
            all=f"{shown:,}", elsewhere=[(name, count) for name, count in counts.items() if name != page],
            others="the others are on" if page == MAIN_PAGE else "more are on", main_page=MAIN_PAGE,
            place=f"#pictures-{number}", note=note,
        )  # fmt: skip
        galleries.append(Gallery(page, head + content + Markup("</div></div>"), len(cards), used + spent))
    return galleries


def _divide(cards: Iterable[Card], *, first: int, further: int) -> list[list[Card]]:
    """Divide cards among pages of so many bytes, in their order; each page has at least one card, if there is any."""
    sheets: list[list[Card]] = [[]]
    used = 0
    for card in cards:
        if sheets[-1] and used + card.size > (first if len(sheets) == 1 else further):
            sheets.append([])
            used = 0
        sheets[-1].append(card)
        used += card.size
    return sheets


def _fill(
    cards: Sequence[Card], prefix: str, *, folder: Path, room: int, beside: dict[str, bytes]
) -> tuple[Markup, int]:
    """Lay thumbnails into the gaps of cards; returns HTML and the bytes of the thumbnails."""
    thumbnails, spent = _thumbnails(cards, prefix, folder=folder, room=room, beside=beside)
    pieces, laid = [], set()
    for card in cards:
        first, again = thumbnails[card.image] if card.image in thumbnails else (_gone("no picture is named"),) * 2
        if card.image in laid:  # two rows may be about one picture
            first = again
        laid.add(card.image)
        filled = [card.pieces[0]]
        for panel, piece in enumerate(card.pieces[1:]):
            filled += [first if panel == 0 else again, piece]
        pieces.append(Markup("").join(filled))
    return Markup("").join(pieces), spent


def _spread(ids: list[str], most: int) -> list[str]:
    """Choose pictures where there are more than `most`: three of the worst for each of the best, in this order."""
    chosen: list[str] = []
    low, high = 0, len(ids) - 1
    while low <= high and len(chosen) < most:
        if len(chosen) % 4 == 3:
            chosen.append(ids[high])
            high -= 1
        else:
            chosen.append(ids[low])
            low += 1
    return chosen


def _labels(split: Split) -> dict[str, int]:
    names: dict[str, None] = {}
    for model in split.models:
        names |= dict.fromkeys(mapping(model.results.get("per_class")))
    for row in split.main.rows.values():
        names |= dict.fromkeys(row["truth"]["labels"])
    return {name: place for place, name in enumerate(sorted(names))}


def _thumbnails(
    cards: Sequence[Card], prefix: str, *, folder: Path, room: int, beside: dict[str, bytes]
) -> tuple[dict[str, tuple[Markup, Markup]], int]:
    """Return for each picture what is laid into the first panel and into the others, and the bytes that they take."""
    names = list(dict.fromkeys(card.image for card in cards if card.image))
    side = next(side for most, side in _SIDES if len(names) <= most or most == 0)
    each = max(2000, min(60_000, int(0.72 * room / max(1, len(names)))))  # base64 takes a third more
    made: dict[str, tuple[Markup, Markup]] = {}
    spent = 0
    for name, picture in open_pictures(names, folder=folder, side=side):
        place = f"{prefix}-{len(made)}"
        if isinstance(picture, str):
            made[name] = (_gone(picture),) * 2
            continue
        data = shrink(picture, most=each)
        uri = html.data_uri(data, "image/webp")
        if spent + len(uri) > room:
            beside[f"{place}.webp"] = data
            lazy = html.render(
                '<img src="{{ source }}" alt="" loading="lazy" decoding="async">', source=f"report_files/{place}.webp"
            )
            made[name] = lazy, lazy
            continue
        spent += len(uri)
        made[name] = html.render(_FIRST, place=place, uri=uri), html.render(_AGAIN, place=place)
    return made, spent


# The second panel shows the first one's picture again without a second copy of its bytes.
_FIRST = """<svg viewBox="0 0 1 1" preserveAspectRatio="none" aria-hidden="true"><image id="picture-{{ place }}"
 href="{{ uri }}" width="1" height="1" preserveAspectRatio="none"/></svg>"""
_AGAIN = (
    """<svg viewBox="0 0 1 1" preserveAspectRatio="none" aria-hidden="true"><use href="#picture-{{ place }}"/></svg>"""
)


def _gone(reason: str) -> Markup:
    return html.render('<p class="gone">{{ reason }}</p>', reason=f"No picture: {reason}")

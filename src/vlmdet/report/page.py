"""Put the report of a run together and write it.

When: AFTER an evaluation, by `vlmdet report`; no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup

from vlmdet.files import write_whole
from vlmdet.report import charts, tables
from vlmdet.report.gallery import FILTERS, Card, make_card, order_ids
from vlmdet.report.pictures import open_pictures, shrink
from vlmdet.report.reading import Run, Scored, Split, Stage, mapping, number_of, read_run, sequence
from vlmdet.report.verdict import METRICS, called, conditions, native_note, tone, verdict
from vlmdet.utils import html

PICTURES = 1000
"""Pictures of a split that are shown unless asked otherwise."""

_CARD_BYTES = 10_000_000
_PAGE_BYTES = 14_000_000
"""Of cards, and of cards and thumbnails; what goes over it is left out of the page, or lies beside it."""

_SIDES = ((150, 480), (400, 400), (0, 320))
"""Longer side of a thumbnail, for at most that many pictures."""

_FILES = ("results.json", "results.csv", "per_class.csv", "per_image.csv", "predictions.jsonl", "matches.jsonl",
          "predictions.coco.json")  # fmt: skip


def write_report(
    folder: Path, *, split: str | None = None, pictures: int = PICTURES, say: Callable[[str], None]
) -> Path:
    """Write `report.html` of a run.

    When: once, after evaluation; again after each further one.

    Input: `folder` of `reading.find_scored`; `split`, the only one to show; `pictures`, the most of a split that are shown;
    `say` prints where the page is.
    Output: the page. It is under 15 MB; thumbnails that do not fit lie beside it in `report_files/`.

    Raises:
        DataError: a file is broken, or the split was not scored.
    """
    run = read_run(folder, split=split)
    name = f"{folder.parent.name}/{folder.name}" if folder.name.isdigit() else folder.resolve().name
    contents = [("Verdict", "verdict")]
    body = [_verdict(run)]
    for number, one in enumerate(run.splits):
        contents.append((f"Figures on {one.name}", f"figures-{number}"))
        body.append(html.section(f"Figures on {one.name}", *_figures(one), place=f"figures-{number}"))
    if run.stages:
        contents.append(("Training", "training"))
        body.append(html.section("Training", *(_training(run)), place="training"))
    beside: dict[str, bytes] = {}
    spare = _PAGE_BYTES - sum(len(part) for part in body)
    for number, one in enumerate(run.splits):
        if not any(model.rows for model in one.models):
            continue
        share = spare // (len(run.splits) - number)
        gallery, used = _gallery(one, number, folder=folder, most=pictures, room=share, beside=beside)
        spare -= used
        contents.append((f"Pictures of {one.name}", f"pictures-{number}"))
        body.append(html.section(f"Pictures of {one.name}", *gallery, place=f"pictures-{number}"))
    contents.append(("Files", "files"))
    body.append(html.section("Files", *_files(run), place="files"))

    here = Path(__file__).parent
    page = html.page(
        f"Report of {name}", body, contents=contents, pictures_beside=bool(beside),
        style=(here / "report.css").read_text(encoding="utf-8"),
        script=(here / "report.js").read_text(encoding="utf-8"),
    )  # fmt: skip
    _write_beside(folder / "report_files", beside)
    path = folder / "report.html"
    data = page.encode("utf-8", errors="replace")
    write_whole(path, data)
    more = f", and {len(beside)} thumbnails in {folder / 'report_files'}" if beside else ""
    say(f"report: {path} ({len(data) / 1e6:.1f} MB{more})")
    return path


def _verdict(run: Run) -> Markup:
    parts = []
    for split in run.splits:
        parts.append(
            html.render(
                '<p class="verdict {{ tone }}">{{ text }}</p>', tone=tone(split), text=verdict(split, str(run.folder))
            )
        )
        if note := native_note(split):
            parts.append(html.paragraph(note))
    for split in run.splits:
        template = (
            '<h3>What the figures on {{ name }} are of</h3><dl class="conditions">{% for name, value in items %}<div>'
            "<dt>{{ name }}</dt><dd>{{ value }}</dd></div>{% endfor %}</dl>"
        )
        parts.append(html.render(template, name=split.name, items=list(conditions(run, split))))
    return html.section("Verdict", *parts, place="verdict")


def _figures(split: Split) -> Iterator[Markup]:
    yield tables.part("Models, with 95 % intervals over pictures", tables.models_table(split))
    if coco := tables.coco_table(split):
        yield tables.part("Average precision", coco)
    yield from _tables(split, split.main)
    yield from _charts(split)
    for model in split.models:
        if model is not split.main and (parts := list(_tables(split, model))):
            yield html.folded(f"Classes, errors, confusion and sizes of: {called(model)}", *parts)


def _tables(split: Split, model: Scored) -> Iterator[Markup]:
    name = called(model)
    if classes := tables.classes_table(split, model):
        yield tables.part(f"Classes: {name}", classes)
    if errors := tables.errors_table(split, model):
        yield tables.part(f"Errors by kind: {name}", errors)
    if confusion := tables.confusion_table(split, model):
        yield tables.part(f"Confusion: {name}", confusion)
    if sizes := tables.sizes_tables(split, model):
        yield tables.part(f"Sizes and numbers: {name}", *sizes)


def _charts(split: Split) -> Iterator[Markup]:
    made = [_histogram(f"{called(model)}: IoU", model.results.get("iou_histogram"), "IoU") for model in split.models]
    if drawn := [one for one in made if one]:
        yield tables.part("How well boxes fit", html.grid(drawn, least="23rem"))
    curves = [_score_curve(model) for model in split.models]
    if drawn := [one for one in curves if one]:
        yield tables.part("Precision, recall and F1 against score", html.grid(drawn, least="23rem"))
    offsets = mapping(split.main.results.get("offsets"))
    sides = {"x": "centre, across", "y": "centre, down", "w": "width", "h": "height"}
    made = [
        _histogram(f"{called(split.main)}: {what}", offsets.get(key), "error / side of the true box", zero=True)
        for key, what in sides.items()
    ]
    if drawn := [one for one in made if one]:
        note = "Matched pairs: positive is too far right, too far down, too wide, too high."
        yield tables.part("Where boxes miss", html.paragraph(note, style="faint"), html.grid(drawn, least="23rem"))


def _histogram(title: str, value: object, across_name: str, *, zero: bool = False) -> Markup | None:
    histogram = mapping(value)
    edges = [number_of(edge) for edge in sequence(histogram.get("edges"))]
    counts = [number_of(count) for count in sequence(histogram.get("counts"))]
    known_edges, known = [edge for edge in edges if edge is not None], [one for one in counts if one is not None]
    if not any(known) or len(known_edges) != len(known) + 1 or known_edges != sorted(set(known_edges)):
        return None
    median = number_of(histogram.get("median"))
    note = "" if median is None else f"median {median:+.3f}".replace("-", "−")
    return charts.bars(title, known_edges, known, across_name=across_name, note=note, zero=zero)


def _score_curve(model: Scored) -> Markup | None:
    curve = mapping(model.results.get("score_curve"))
    scores = [number_of(score) for score in sequence(curve.get("score"))]
    series = []
    for name in ("precision", "recall", "f1"):
        values = sequence(curve.get(name))
        points = [(x, number_of(y)) for x, y in zip(scores, values, strict=False) if x is not None]
        if any(y is not None for _, y in points):
            series.append(charts.Line("F1" if name == "f1" else name, points))
    if not series:
        return None
    best = mapping(curve.get("best"))
    score, f1 = number_of(best.get("score")), number_of(mapping(best.get("f1")).get("value"))
    title = f"{called(model)}: at IoU 0.5"
    chart = charts.lines(title, series, across_name="score kept from", low=0.0, high=1.0)
    if score is None or f1 is None:
        return chart
    chosen = "chosen on this split, which flatters it" if best.get("chosen_on") == "this split" else "chosen elsewhere"
    return html.render(
        "<div>{{ chart }}{{ note }}</div>",
        chart=chart,
        note=html.paragraph(f"F1 {f1:.3f} at score {score:.3f}, {chosen}.", style="faint"),
    )


_CURVES = (
    ("Loss", {"loss": "training", "eval_loss": "validation"}),
    ("Token accuracy", {"mean_token_accuracy": "training", "eval_mean_token_accuracy": "validation"}),
    ("Learning rate", {"learning_rate": "learning rate"}),
    ("Gradient norm", {"grad_norm": "all", "grad_norm/language": "language", "grad_norm/merger": "merger",
                       "grad_norm/vision": "vision"}),
)  # fmt: skip


def _training(run: Run) -> Iterator[Markup]:
    for number, stage in enumerate(run.stages, start=1):
        drawn = list(_stage_charts(stage))
        if drawn:
            title = f"Stage {number}: {stage.name}" if len(run.stages) > 1 else "Curves"
            yield tables.part(title, html.grid(drawn, least="23rem"))


def _stage_charts(stage: Stage) -> Iterator[Markup]:
    for title, names in _CURVES:
        series = [charts.Line(shown, points) for key, shown in names.items() if (points := _points(stage.log, key))]
        if series:
            yield charts.lines(title, series, across_name="step")
    names = {key: METRICS[key] for key in ("f1_50", "f1", "mean_best_iou")}
    rows: list[dict[str, float]] = stage.metrics
    series = [charts.Line(shown, points) for key, shown in names.items() if (points := _points(rows, key))]
    if series:
        yield charts.lines("Scores during training", series, across_name="step", low=0.0, high=1.0)


def _points(rows: list[dict[str, float]], key: str) -> list[tuple[float, float | None]]:
    """Return step and value of every row that has both, by rising step; NaN and infinity break the line."""
    found = {}
    for row in rows:
        step = number_of(row.get("step"))
        if step is not None and key in row:
            found[step] = number_of(row[key])
    points = sorted(found.items())
    return points if any(value is not None for _, value in points) else []


_GALLERY = """<div class="gallery" style="--card-width: {{ width }}">
<p class="boxkey"><span><svg viewBox="0 0 34 20" aria-hidden="true"><rect class="t" x="3" y="3" width="28" height="14"
 fill="none"/></svg>ground truth: dashed, green</span>
<span><svg viewBox="0 0 34 20" aria-hidden="true"><rect class="p" x="3" y="3" width="28" height="14"
 fill="none"/></svg>prediction: solid, red, with its IoU</span></p>
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


def _gallery(
    split: Split, number: int, *, folder: Path, most: int, room: int, beside: dict[str, bytes]
) -> tuple[list[Markup], int]:
    """Return the gallery of a split and its bytes; thumbnails over `room` go to `beside`, name -> content."""
    ids = order_ids(split)
    labels = _labels(split)
    places = {key: place for place, key in enumerate(next(model.rows for model in split.models if model.rows))}
    cards: list[Card] = []
    used = 0
    for key in _spread(ids, most):
        card = make_card(split, key, number=places.get(key, len(places)), labels=labels)
        if cards and used + card.size > min(_CARD_BYTES, room):
            break
        cards.append(card)
        used += card.size
    shown = {card.id: card for card in cards}
    cards = [shown[key] for key in ids if key in shown]
    thumbnails, spent = _thumbnails(cards, number, folder=folder, room=room - used, beside=beside)
    pieces = []
    for card in cards:
        first, again = thumbnails[card.image] if card.image in thumbnails else (_gone("no picture is named"),) * 2
        filled = [card.pieces[0]]
        for panel, piece in enumerate(card.pieces[1:]):
            filled += [first if panel == 0 else again, piece]
        pieces.append(Markup("").join(filled))
    left = len(ids) - len(cards)
    names = [(model.name, called(model)) for model in split.models]
    head = html.render(
        _GALLERY, width=f"{18 * len(names) if len(names) > 1 else 20}rem", split=split.name, filters=FILTERS, models=names,
        main=split.main.name, has_base=split.base is not None, labels=list(labels), count=f"{len(cards):,}",
        note=f"{left:,} of {len(ids):,} pictures, neither among the worst nor the best, are left out; their rows are in "
        "predictions.jsonl and per_image.csv." if left else "",
    )  # fmt: skip
    return [head + Markup("").join(pieces) + Markup("</div></div>")], used + spent


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
    cards: list[Card], number: int, *, folder: Path, room: int, beside: dict[str, bytes]
) -> tuple[dict[str, tuple[Markup, Markup]], int]:
    """Return for each picture what is laid into the first panel and into the others, and the bytes that they take."""
    names = list(dict.fromkeys(card.image for card in cards if card.image))
    side = next(side for most, side in _SIDES if len(names) <= most or most == 0)
    each = max(2000, min(60_000, int(0.72 * room / max(1, len(names)))))  # base64 takes a third more
    made: dict[str, tuple[Markup, Markup]] = {}
    spent = 0
    for name, picture in open_pictures(names, folder=folder, side=side):
        place = f"{number}-{len(made)}"
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


def _files(run: Run) -> Iterator[Markup]:
    yield html.paragraph("In the folder of the run, beside this page:", style="faint")
    paths = [model.folder / name for split in run.splits for model in split.models for name in _FILES]
    paths += [split.models[0].folder.parent / "comparison.json" for split in run.splits if split.comparison]
    paths += [run.folder / name for name in ("contract.json", "config.yaml", "train/log.jsonl", "train/metrics.csv")]
    links = [
        (path.relative_to(run.folder).as_posix(), quote(path.relative_to(run.folder).as_posix()))
        for path in dict.fromkeys(paths)
        if path.is_file()
    ]
    template = '<ul>{% for name, link in links %}<li><a href="{{ link }}">{{ name }}</a></li>{% endfor %}</ul>'
    yield html.render(template, links=links)


def _write_beside(folder: Path, files: dict[str, bytes]) -> None:
    """Write the thumbnails that did not fit, and take away those of an earlier report."""
    if folder.is_dir():
        for old in folder.glob("*.webp"):
            if old.name not in files:
                old.unlink()
        if not files and not any(folder.iterdir()):
            folder.rmdir()
    if files:
        folder.mkdir(exist_ok=True)
        for name, data in files.items():
            write_whole(folder / name, data)

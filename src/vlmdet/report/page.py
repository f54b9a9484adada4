"""Put the report of a run together and write it.

When: AFTER an evaluation, by `vlmdet report`; no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from vlmdet.files import write_whole
from vlmdet.report import album, charts, tables
from vlmdet.report.album import Gallery
from vlmdet.report.reading import Run, Scored, Split, Stage, mapping, number_of, read_run, sequence
from vlmdet.report.verdict import METRICS, called, conditions, native_note, tone, verdict
from vlmdet.utils import html

PICTURES = 1000
"""Pictures of a split that are shown unless asked otherwise."""

_FILES = ("results.json", "results.csv", "per_class.csv", "per_image.csv", "predictions.jsonl", "matches.jsonl",
          "predictions.coco.json")  # fmt: skip


def write_report(
    folder: Path, *, split: str | None = None, pictures: int = PICTURES, say: Callable[[str], None]
) -> Path:
    """Write `report.html` of a run.

    When: once, after evaluation; again after each further one.

    Input: `folder` of `reading.find_scored`; `split`, the only one to show; `pictures`, the most of a split that are shown;
    `say` prints where the page is.
    Output: the page. It is under 15 MB; pictures that do not fit are on further pages beside it, `report_pictures_2.html` and so
    on, to which it leads, and thumbnails that do not fit in `report_files/`.

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
    further: list[tuple[Split, int, Gallery]] = []
    spare = album.PAGE_BYTES - sum(len(part) for part in body)
    for number, one in enumerate(run.splits):
        if not any(model.rows for model in one.models):
            continue
        room, next_page = spare // (len(run.splits) - number), len(further) + 2
        first, *rest = album.make_galleries(
            one, number, folder=folder, most=pictures, room=room, next_page=next_page, beside=beside
        )
        spare -= first.size
        further += [(one, number, gallery) for gallery in rest]
        contents.append((f"Pictures of {one.name}", f"pictures-{number}"))
        body.append(html.section(f"Pictures of {one.name}", first.content, place=f"pictures-{number}"))
    contents.append(("Files", "files"))
    body.append(html.section("Files", *_files(run), place="files"))

    _write_beside(folder / "report_files", beside)
    for old in folder.glob(album.FURTHER_PAGE.format("[0-9]*")):  # of an earlier report
        old.unlink()
    for one, number, gallery in further:
        title = f"Pictures of {one.name}: more of the report of {name}"
        back = html.render(_BACK, page=album.MAIN_PAGE, number=number, name=name)
        part = html.section(f"{gallery.pictures:,} pictures of {one.name}", gallery.content)
        _write_page(folder / gallery.page, title, [back, part], pictures_beside=bool(beside))
    path = folder / album.MAIN_PAGE
    size = _write_page(path, f"Report of {name}", body, contents=contents, pictures_beside=bool(beside))
    more = "".join(f", {gallery.pictures:,} more pictures in {folder / gallery.page}" for _, _, gallery in further)
    more += f", and {len(beside)} thumbnails in {folder / 'report_files'}" if beside else ""
    say(f"report: {path} ({size / 1e6:.1f} MB{more})")
    return path


_BACK = '<p><a href="{{ page }}#pictures-{{ number }}">Back to the report of {{ name }}</a></p>'


def _write_page(path: Path, title: str, body: list[Markup], **options: Any) -> int:
    """Write one page with the report's style and script; returns its bytes."""
    here = Path(__file__).parent
    style = (here / "report.css").read_text(encoding="utf-8")
    script = (here / "report.js").read_text(encoding="utf-8")
    data = html.page(title, body, style=style, script=script, **options).encode("utf-8", errors="replace")
    write_whole(path, data)
    return len(data)


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

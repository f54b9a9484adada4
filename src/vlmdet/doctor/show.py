"""Tell a report: on a terminal, and as a page with pictures.

When: by `vlmdet doctor` and `vlmdet demo`, after an examination. Every text of a user's data is escaped: rich markup on
the terminal
is not read, and `utils.html` escapes on the page.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from markupsafe import Markup

from vlmdet.doctor.findings import Finding, Report
from vlmdet.utils import html

WEIGHTS = {4: "silent and fatal", 3: "silent and harmful", 2: "loud or partial", 1: "minor"}
_PAGE_STYLE = "td:first-child { overflow-wrap: normal; } pre { white-space: pre-wrap; }"
"""Ids stay whole; decoded text wraps."""
_STYLES = {4: "bold red", 3: "bold yellow", 2: "yellow", 1: "dim"}


def print_report(report: Report, stream: TextIO, *, width: int | None = None) -> None:
    """Print a report: each finding as a paragraph, consequences and what was not run as lines, what was checked with figures."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    console = Console(file=stream, width=width, highlight=False, soft_wrap=False)
    causes = [one for one in report.findings if one.consequence_of is None]
    for one in causes:
        text = Text()
        for name, value in _lines(one):
            text.append(f"{name:<9}", style="bold")
            text.append(value.replace("\n", "\n" + " " * 9) + "\n")
        for other in report.findings:
            if other.consequence_of == one.id:
                text.append("explains ", style="bold")
                text.append(f"{other.id} {other.title}: {_first_line(other.evidence)}\n")
        title = Text(f"{one.id}  {one.title}  (severity {one.severity}, {WEIGHTS[one.severity]}; {one.stage})")
        console.print(Panel(text, title=title, title_align="left", border_style=_STYLES[one.severity]))
    for one in report.further:
        console.print(Text(f"also: {one.id} {one.title} ({one.where}): {_first_line(one.evidence)}"))
    if not report.findings:
        console.print(Text(f"Nothing found. {len(report.checked)} checks ran:", style="bold green"))
    elif report.checked:
        console.print(Text(f"Fine ({len(report.checked)}):", style="bold"))
    for figures, ids in _grouped((one.figures or "ran", one.id) for one in report.checked):
        console.print(Text(f"  {', '.join(ids)}: {figures}"))
    if report.not_run:
        console.print(Text(f"Not run ({len(report.not_run)}), and what each needs:", style="bold"))
        for needs, ids in _by_needs(report):
            console.print(Text(f"  {', '.join(ids)}: {needs}", style="dim"))
    console.print(Text(f"{len(causes)} findings in {report.seconds:.1f} s; ran in a {report.isolation}", style="dim"))


def _lines(one: Finding) -> Iterator[tuple[str, str]]:
    yield "where", one.where
    yield "evidence", one.evidence
    yield "cause", one.cause + ("" if one.certainty >= 0.8 else f" (certainty {one.certainty:.0%})")
    if one.effect:
        yield "effect", one.effect
    yield "fix", one.fix
    yield "see", one.reference


def _first_line(text: str) -> str:
    return text.split("\n", 1)[0][:160]


def _by_needs(report: Report) -> list[tuple[str, list[str]]]:
    return _grouped((one.needs, one.id) for one in report.not_run)


def _grouped(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Group ids by the text that they share, in order."""
    groups: dict[str, list[str]] = {}
    for text, identifier in pairs:
        groups.setdefault(text, []).append(identifier)
    return list(groups.items())


def write_report(path: Path, report: Report, *, title: str = "Doctor") -> Path:
    """Write a report as one page that opens from disk: findings with their pictures, then what was checked and not run."""
    causes = [one for one in report.findings if one.consequence_of is None]
    body = [
        html.tiles(
            [
                (str(len(causes)), "findings"),
                (str(len(report.findings) - len(causes)), "consequences"),
                (str(len(report.checked)), "checked and fine"),
                (str(len(report.not_run)), "not run"),
                (f"{report.seconds:.1f} s", report.isolation.split(" ")[0]),
            ]
        )
    ]
    for one in causes:
        body.append(_section(one, [other for other in report.findings if other.consequence_of == one.id]))
    if report.further:
        rows = [[one.id, one.title, one.where, _first_line(one.evidence)] for one in report.further]
        body.append(html.section("Also", html.table(["id", "what", "where", "evidence"], rows)))
    if report.checked:
        rows = [[one.id, one.title, one.figures] for one in report.checked]
        body.append(html.section("No sign of", html.table(["id", "what", "what was looked at"], rows)))
    if report.not_run:
        rows = [[", ".join(ids), needs] for needs, ids in _by_needs(report)]
        body.append(html.section("Not run", html.table(["ids", "needs"], rows)))
    return html.write_page(path, title, body, style=_PAGE_STYLE)


def _section(one: Finding, consequences: list[Finding]) -> Markup:
    evidence = html.render("<pre>{{ text }}</pre>", text=one.evidence)
    parts = [
        html.paragraph(
            f"Severity {one.severity} ({WEIGHTS[one.severity]}), stage {one.stage}, certainty {one.certainty:.0%}; {one.where}"
        ),
        evidence,
        html.grid([html.figure(uri, f"boxes of {one.id}") for uri in one.pictures], least="20rem")
        if one.pictures
        else Markup(""),
        html.table(
            ["", ""], [[name, text] for name, text in _lines(one) if name not in ("where", "evidence")], row_heads=True
        ),
    ]
    if consequences:
        rows = [[other.id, other.title, _first_line(other.evidence)] for other in consequences]
        parts.append(html.table(["explains", "what", "evidence"], rows))
    return html.section(f"{one.id}: {one.title}", *parts, place=one.id)

"""One page template and the few parts that go on it; everything from data is escaped.

When: whenever a command writes a page: `inspect`, the report, the doctor. A page is one file that opens from disk: no
network, pictures as data URIs, light or dark as the reader's system is, and narrow enough for a phone. Its content
security policy forbids requests, and every script but the one that `page` was given, so that a hole in a caller's
escaping stays harmless.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup
from PIL import Image

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --card: #f4f5f7; --ink: #1b1f24; --faint: #5b636d; --line: #d5d9de;
  --bar: #3b7dd8; --alarm: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --card: #1f2428; --ink: #e8eaed; --faint: #a0a8b1;
  --line: #3a4047; --bar: #5b97e8; --alarm: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1600px; padding: 1rem clamp(.75rem, 3vw, 2.5rem) 3rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p { max-width: 75ch; margin: .5rem 0; }
.faint, figcaption, .tile span { color: var(--faint); font-size: .875rem; }
.alarm { color: var(--alarm); }
.tiles, .grid { display: grid; gap: .75rem; margin: 1rem 0; }
.tiles { grid-template-columns: repeat(auto-fill, minmax(min(100%, 9.5rem), 1fr)); }
.tile { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.25rem; line-height: 1.3; }
.grid { grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--least, 15rem)), 1fr)); align-items: start; }
figure { margin: 0; background: var(--card); border-radius: .5rem; padding: .6rem; min-width: 0; }
figure img { display: block; width: 100%; height: auto; max-height: 24rem; object-fit: contain; }
figure .pair { display: grid; grid-template-columns: 1fr 1fr; gap: .4rem; }
figure h3 { font-size: 1rem; margin: 0 0 .25rem; }
figcaption { margin-top: .4rem; }
figcaption, td { unicode-bidi: plaintext; }
.scroll { overflow-x: auto; }
summary { cursor: pointer; padding: .5rem 0; }
table { border-collapse: collapse; min-width: min(100%, 30rem); font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem .25rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; }
caption { text-align: left; color: var(--faint); font-size: .875rem; padding-bottom: .25rem; }
a { color: inherit; }
:focus-visible { outline: 3px solid var(--bar); outline-offset: 2px; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1rem; list-style: none; padding: 0; margin: .5rem 0; }
.skip { position: absolute; left: -100vw; }
.skip:focus { left: .5rem; top: .5rem; padding: .5rem .75rem; background: var(--card); z-index: 1; }
.number { text-align: right; white-space: nowrap; }
.bar { width: 40%; min-width: 5rem; }
.bar i { display: block; height: .8rem; margin-top: .35rem; border-radius: .2rem; background: var(--bar); }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: .15em; border: 1px solid var(--faint); }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
{% if contents %}<a class="skip" href="#main">Skip to the content</a>{% endif %}
<header><h1>{{ title }}</h1>
{% if contents %}
<nav aria-label="Contents"><ul>
{%- for name, place in contents %}<li><a href="#{{ place }}">{{ name }}</a></li>{% endfor %}</ul></nav>{% endif %}
</header>
<main id="main" tabindex="-1">
{{ body }}
</main>
{% if script %}<script>{{ script }}</script>{% endif %}
</body>
</html>
"""

_FIGURE = """<figure>{% if title %}<h3>{{ title }}</h3>{% endif -%}
<picture>{% if dark %}<source srcset="{{ dark }}" media="(prefers-color-scheme: dark)">{% endif -%}
<img src="{{ uri }}" alt="{{ alt }}" loading="lazy"></picture>
{%- if caption %}<figcaption>{{ caption }}</figcaption>{% endif %}</figure>
"""

_TABLE = """<div class="scroll"
{%- if caption %} role="region" tabindex="0" aria-label="{{ caption }}"{% endif %}><table>
{% if caption %}<caption>{{ caption }}</caption>{% endif %}
<thead><tr>{% for name in head %}<th scope="col"
{%- if loop.index0 in numbers %} class="number"{% endif %}>{{ name }}</th>{% endfor -%}
{% if bars %}<td class="bar"></td>{% endif %}</tr></thead>
<tbody>{% for row in rows %}
<tr>{% for cell in row %}{% if loop.first and row_heads %}<th scope="row">{{ cell }}</th>{% else -%}
<td{% if loop.index0 in numbers %} class="number"{% endif %}>{{ cell }}</td>{% endif %}{% endfor -%}
{% if bars %}<td class="bar"><i style="width: {{ '%.1f' | format(100 * bars[loop.index0]) }}%"></i></td>{% endif %}</tr>
{%- endfor %}
</tbody></table></div>
"""

_TOKENS = (
    '<pre style="white-space: pre-wrap">{% for text, marked, count in runs %}{% if marked %}<mark>{{ text }}</mark>'
    "{% else %}<span>{{ text }}</span>{% endif %}{% if count > 1 %}<i>×{{ count }}</i>{% endif %}<wbr>{% endfor %}</pre>"
)


@functools.cache
def _environment() -> Environment:
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)


@functools.cache
def _compiled(template: str) -> Template:
    return _environment().from_string(template)


def render(template: str, **values: Any) -> Markup:
    """Fill a Jinja template of ours; every value is escaped, unless it is `Markup` already.

    When: for each part of a page. The template is code, never data.

    Raises:
        jinja2.UndefinedError: a value is missing.
    """
    return Markup(_compiled(template).render(**values))


def page(
    title: str,
    body: Iterable[Markup],
    *,
    style: str = "",
    script: str = "",
    contents: Sequence[tuple[str, str]] = (),
    pictures_beside: bool = False,
) -> str:
    """Return a whole document.

    When: once per page, last.

    Input: `title`, any text; `body`, parts made by `render` and the functions below; `style` and `script`, code of ours
    and never data, laid over the page's style and run at its end; `contents`, names of sections and the ids they have;
    `pictures_beside`, some pictures are files beside the page.
    Output: HTML. Its policy allows that one script, by its hash, and no other.

    Raises:
        ValueError: a `</` in the script or the style would end it early.
    """
    if "</" in script + style:
        raise ValueError("a script or a style holds '</', which ends it")
    policy = "default-src 'none'; img-src data:" + (" 'self' file:" if pictures_beside else "")
    policy += "; style-src 'unsafe-inline'"
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
    policy += "; base-uri 'none'; form-action 'none'"
    return str(
        render(
            _PAGE,
            title=title,
            style=Markup(_STYLE + style),
            script=Markup(script),
            policy=policy,
            contents=list(contents),
            body=Markup("\n").join(body),
        )
    )


def write_page(path: Path, title: str, body: Iterable[Markup], *, style: str = "") -> Path:
    """Write a whole document, its folder made where absent; half a surrogate, which UTF-8 cannot write, becomes `?`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(title, body, style=style), encoding="utf-8", errors="replace")
    return path


def section(title: str, *parts: Markup, place: str = "") -> Markup:
    """Return a heading and what stands under it; `place` is the id that a table of contents leads to."""
    template = '<section{% if place %} id="{{ place }}"{% endif %}><h2>{{ title }}</h2>\n{{ body }}</section>'
    return render(template, title=title, body=Markup("\n").join(parts), place=place)


def paragraph(text: str, *, style: str = "") -> Markup:
    """Return a paragraph; `style` is a class of the page: `faint`, `alarm`."""
    return render('<p{% if style %} class="{{ style }}"{% endif %}>{{ text }}</p>', text=text, style=style)


def tiles(values: Iterable[tuple[str, str]]) -> Markup:
    """Return a row of figures, each with what it counts: `[("364", "pictures")]`."""
    tile = '<div class="tile"><b>{{ value }}</b><span>{{ what }}</span></div>'
    template = f'<div class="tiles">{{% for value, what in values %}}{tile}{{% endfor %}}</div>'
    return render(template, values=list(values))


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    numbers: Iterable[int] = (),
    bars: Sequence[float] = (),
    caption: str = "",
    row_heads: bool = False,
) -> Markup:
    """Return a table that scrolls sideways where it is too wide.

    Input: n names in `head`, rows of n cells, which may be `Markup`; `numbers`, the columns to align to the right, from
    0; `bars`, for each row the length of a bar behind it, 0 to 1; `caption`, what the table shows, which also lets a
    keyboard scroll it; `row_heads`, the first cell of a row names it.

    Raises:
        ValueError: a row has more or fewer cells than `head`, or bars differ from rows in number.
    """
    cells = [list(row) for row in rows]
    if any(len(row) != len(head) for row in cells) or (bars and len(bars) != len(cells)):
        raise ValueError(
            f"{len(head)} columns, {len(cells)} rows of {sorted({len(row) for row in cells})}, {len(bars)} bars"
        )
    return render(
        _TABLE,
        head=list(head),
        rows=cells,
        numbers=set(numbers),
        bars=list(bars),
        caption=caption,
        row_heads=row_heads,
    )


def folded(title: str, *parts: Markup) -> Markup:
    """Return parts that show when their title is pressed; no script is needed for it."""
    template = "<details><summary>{{ title }}</summary>\n{{ body }}</details>"
    return render(template, title=title, body=Markup("\n").join(parts))


def grid(parts: Iterable[Markup], *, least: str = "15rem") -> Markup:
    """Return parts side by side, as many as fit at a width of `least` each."""
    return render(
        '<div class="grid" style="--least: {{ least }}">{{ body }}</div>', least=least, body=Markup("").join(parts)
    )


def figure(uri: str, alt: str, *, title: str = "", caption: str | Markup = "", dark: str = "") -> Markup:
    """Return a picture with its caption; `dark` is the URI of the picture to show on dark paper."""
    return render(_FIGURE, uri=uri, alt=alt, title=title, caption=caption, dark=dark)


def tokens(texts: Sequence[str], learnt: Sequence[bool]) -> Markup:
    """Return a tokenised text with the tokens that carry loss marked.

    When: for the label mask of a row: in the notebook on preprocessing, and wherever a first batch is shown.

    Input: n `texts`, one token each; n `learnt`. Repeated tokens are written once, with their number.
    Output: a `<pre>` in which `<mark>` stands around each learnt token, so that it shows without the page's style.

    Raises:
        ValueError: there are more or fewer `learnt` than `texts`.
    """
    runs = [(text, marked, len(list(run))) for (text, marked), run in groupby(zip(texts, learnt, strict=True))]
    return render(_TOKENS, runs=[(text.replace("\n", "⏎\n"), marked, count) for text, marked, count in runs])


def picture_uri(image: Image.Image, *, quality: int = 80) -> str:
    """Return a picture as the data URI of a JPEG."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=quality)
    return data_uri(file.getvalue(), "image/jpeg")


def data_uri(data: bytes, kind: str) -> str:
    """Return bytes of a media type, such as `image/svg+xml`, as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"

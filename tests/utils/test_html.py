"""The page template: what comes from data stays text, and a page needs nothing but itself."""

from __future__ import annotations

import base64
import hashlib
import io
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import UndefinedError
from markupsafe import Markup
from PIL import Image

from vlmdet.utils import html

HOSTILE = """<script>alert(1)</script>"'><img src=x onerror=alert(1)>&lt;{{ 7 * 7 }}"""


class Reader(HTMLParser):
    """Collects the tags, the attributes and the text of a document, as a browser would."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def parts(text: str) -> list[Markup]:
    """Every part that takes text, with one text everywhere."""
    return [
        html.section(text, html.paragraph(text, style="faint")),
        html.tiles([(text, text)]),
        html.table((text, "n"), [(text, text)], numbers=(1,), bars=[0.5]),
        html.folded(text, html.grid([html.figure("data:,", text, title=text, caption=text, dark="data:,")])),
    ]


def test_hostile_text_stays_text() -> None:
    document = Reader(html.page(HOSTILE, parts(HOSTILE)))
    assert "script" not in document.tags
    assert "onerror" not in {name for name, _ in document.attributes}
    assert document.text.count(HOSTILE) == 12  # title and heading, section, paragraph, 2 of a tile, 3 cells, and so on
    assert ("alt", HOSTILE) in document.attributes


@given(st.text(st.characters(exclude_characters="\r\x00", exclude_categories=["Cs"])))
def test_no_text_changes_the_document(text: str) -> None:
    plain, given_text = Reader(html.page("", parts("x"))), Reader(html.page("", parts(text)))
    # a figure without a title or a caption has fewer tags
    assert given_text.tags == plain.tags or not text
    assert ("alt", text) in given_text.attributes


def test_a_page_asks_for_nothing_and_forbids_scripts() -> None:
    document = Reader(html.page("title", parts("x")))
    assert not {"script", "link", "iframe", "object"} & set(document.tags)
    assert all((value or "").startswith("data:") for name, value in document.attributes if name in ("src", "srcset"))
    policy = next(value for name, value in document.attributes if name == "content" and "default-src" in (value or ""))
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")
    assert ("lang", "en") in document.attributes
    assert ("charset", "utf-8") in document.attributes


def test_markup_is_not_escaped_twice() -> None:
    assert html.render("<p>{{ x }}</p>", x=html.render("<b>{{ y }}</b>", y="a & b")) == "<p><b>a &amp; b</b></p>"


def test_a_missing_value_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        html.render("{{ nothing }}")


def test_a_table_aligns_numbers_and_draws_bars() -> None:
    text = html.table(("name", "count"), [("a", 3), ("b", 1)], numbers=(1,), bars=[1.0, 1 / 3])
    assert text.count('<td class="number">') == 2
    assert text.count('<th scope="col" class="number">') == 1
    assert "width: 100.0%" in text
    assert "width: 33.3%" in text


@pytest.mark.parametrize(("rows", "bars"), [([("a",)], []), ([("a", "b")], [0.5, 0.5])])
def test_a_crooked_table_is_refused(rows: list[tuple[str, ...]], bars: list[float]) -> None:
    with pytest.raises(ValueError, match="2 columns, 1 rows"):
        html.table(("one", "two"), rows, bars=bars)


def test_tokens_mark_what_is_learnt_and_count_what_repeats() -> None:
    text = html.tokens(["<b>", "pad", "pad", "pad", "a", "a", "end\n"], [False, False, False, False, False, True, True])
    assert "<span>&lt;b&gt;</span>" in text
    assert "<span>pad</span><i>×3</i>" in text
    assert "<span>a</span><wbr><mark>a</mark>" in text
    assert "<mark>end⏎\n</mark>" in text
    with pytest.raises(ValueError):
        html.tokens(["a"], [])


def test_half_a_surrogate_is_written_as_a_question_mark(tmp_path: Path) -> None:
    path = html.write_page(tmp_path / "new" / "page.html", "a\ud800b", [html.paragraph("ü")])
    text = path.read_text(encoding="utf-8")
    assert "<h1>a?b</h1>" in text
    assert "<p>ü</p>" in text


def test_picture_uri_is_a_jpeg() -> None:
    uri = html.picture_uri(Image.new("RGBA", (8, 6), "red"))
    head, data = uri.split(",")
    assert head == "data:image/jpeg;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (image.format, image.size) == ("JPEG", (8, 6))


def test_a_page_allows_the_script_that_it_was_given_and_no_other() -> None:
    script = 'document.title = "a < b && c";\n'
    text = html.page("title", parts(HOSTILE), script=script, contents=[("first", "one")])
    document = Reader(text)
    assert f"<script>{script}</script>" in text
    assert document.tags.count("script") == 1
    policy = next(
        value or "" for name, value in document.attributes if name == "content" and "default" in (value or "")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"; script-src 'sha256-{digest}'" in policy
    assert "img-src data:;" in policy
    assert ("href", "#one") in document.attributes
    with pytest.raises(ValueError, match="ends it"):
        html.page("title", [], script="'</script>'")


def test_a_table_with_a_caption_names_its_rows() -> None:
    text = html.table((HOSTILE, "n"), [(HOSTILE, 1)], numbers=(1,), caption=HOSTILE, row_heads=True)
    document = Reader(text)
    assert document.tags.count("caption") == 1
    assert ("aria-label", HOSTILE) in document.attributes
    assert [value for name, value in document.attributes if name == "scope"] == ["col", "col", "row"]
    assert "script" not in document.tags

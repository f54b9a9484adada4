"""The report in a real browser: filters by mouse and keyboard, nothing fetched, no error, no overflow."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vlmdet.report import write_report

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)

PATIENCE = 300_000
"""Milliseconds that anything may take: on a machine that is busy with the rest of the suite, Playwright's 30 seconds pass."""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with sync_api.sync_playwright() as play:
        # a container's root has no sandbox
        found = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=PATIENCE)
        yield found
        found.close()


def opened(browser: Any, folder: Path, **options: Any) -> tuple[Any, list[str]]:
    """Open the report of a run; the page, and what it complained of or asked for beyond itself."""
    path = write_report(folder, say=lambda text: None)
    page = browser.new_page(**options)
    page.set_default_timeout(PATIENCE)
    trouble: list[str] = []
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda request: trouble.append(request.url) if request.url[:5] != "data:" else None)
    page.goto(path.as_uri())
    trouble.remove(path.as_uri())
    return page, trouble


_PLACE = """(panel) => { const shot = panel.querySelector(".shot").getBoundingClientRect();
  const path = panel.querySelector(".t path"), box = path.getBBox(), to = path.getScreenCTM();
  return [(to.a * box.x + to.e - shot.x) / shot.width, (to.d * box.y + to.f - shot.y) / shot.height,
    to.a * box.width / shot.width, to.d * box.height / shot.height]; }"""


def shown(page: Any) -> list[str]:
    """Headings of the cards that are visible, in their order."""
    return page.locator(
        ".card:not([hidden]) h3"
    ).all_text_contents()  # inner text is empty where a card is off the screen


def test_filters_and_sorting_by_mouse(browser: Any, scored: Path) -> None:
    page, trouble = opened(browser, scored)
    status = page.get_by_role("status")
    assert shown(page) == ["broken", "bad", "mute", "half", "good"]
    page.get_by_text("wrong class 1", exact=True).click()
    assert shown(page) == ["bad"]
    assert status.inner_text() == "1 of 5 pictures are shown"
    for words, left in (("parse failures 1", ["mute"]), ("errors 1", ["broken"]), ("duplicates 1", ["half"]),
                        ("missed 2", ["bad", "mute"]), ("no mistake 1", ["good"]), ("false 0", [])):  # fmt: skip
        page.get_by_text(words, exact=True).click()
        assert shown(page) == left
    page.get_by_role("button", name="Reset").click()
    page.locator(".card:not([hidden])").nth(4).wait_for(state="attached")
    page.locator("select[name=order]").select_option("best first")
    assert shown(page) == ["good", "half", "bad", "mute", "broken"]
    page.locator("select[name=order]").select_option("as in the file")
    assert shown(page) == ["good", "half", "bad", "mute", "broken"]
    page.locator("select[name=label]").select_option("cup")
    assert len(shown(page)) == 5
    page.get_by_role("searchbox", name="Find").fill("i cannot")
    assert shown(page) == ["mute"]
    assert trouble == []
    assert page.title() == "Report of mine/001"
    page.close()


def test_filters_by_keyboard(browser: Any, scored: Path) -> None:
    page, trouble = opened(browser, scored)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.get_by_role("radio", name="all").focus()
    page.keyboard.press("ArrowRight")
    assert shown(page) == ["bad", "mute"]
    assert page.evaluate("getComputedStyle(document.activeElement.nextElementSibling).outlineStyle") == "solid"
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.value") == "best"
    assert trouble == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 1600])
def test_it_fits_the_screen_and_follows_the_scheme(browser: Any, scored: Path, width: int, scheme: str) -> None:
    page, trouble = opened(browser, scored, viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 26)"}[scheme]
    assert trouble == []
    page.close()


def test_without_a_script_everything_is_there(browser: Any, scored: Path) -> None:
    page, _ = opened(browser, scored, java_script_enabled=False)
    assert shown(page) == ["broken", "bad", "mute", "half", "good"]
    assert not page.locator("select[name=order]").is_visible()
    page.close()


def test_boxes_lie_where_they_should(browser: Any, scored: Path) -> None:
    page, _ = opened(browser, scored)
    card = page.locator(".card", has=page.get_by_role("heading", name="good", exact=True))
    card.scroll_into_view_if_needed()
    panel = card.locator(".panel[data-model=tuned]")
    assert panel.evaluate(_PLACE) == pytest.approx([0.1, 0.1, 0.4, 0.4], abs=0.005)
    assert panel.locator(".t path").evaluate("(node) => getComputedStyle(node).strokeDasharray") == "7px, 5px"
    assert panel.locator(".p path").evaluate("(node) => getComputedStyle(node).strokeDasharray") == "none"
    assert panel.locator(".tp text").text_content() == "0.88"
    panel.locator(".p path").dispatch_event("pointerover")
    assert panel.locator(".p path title").text_content() == "predicted cup, found an object, IoU 0.88"
    assert panel.locator(".t path title").text_content() == "true cup, found, IoU 0.88"
    page.close()


def test_every_control_and_picture_has_a_name(browser: Any, scored: Path) -> None:
    page, _ = opened(browser, scored)
    assert page.locator("main, header, nav").count() == 3
    for control in page.locator("form select, form input").all():
        assert control.evaluate("(node) => node.labels.length") == 1
    assert page.locator("svg[role=img]:not([aria-label])").count() == 0
    assert page.locator("th:not([scope])").count() == 0
    page.close()


def test_a_page_beside_opens_from_the_report_and_filters(
    browser: Any, scored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmdet.report.album.CARD_BYTES", 1)  # one card a page
    page, trouble = opened(browser, scored)
    page.get_by_role("link", name="report_pictures_3.html").click()
    page.wait_for_url("**/report_pictures_3.html")
    assert shown(page) == ["mute"]
    page.get_by_text("parse failures 1", exact=True).click()
    assert page.get_by_role("status").inner_text() == "1 of 1 pictures are shown"
    page.get_by_role("link", name="Back to the report").click()
    page.wait_for_url("**/report.html#pictures-0")
    assert [url for url in trouble if "/report" not in url] == []
    page.close()

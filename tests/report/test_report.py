"""The report as a file: what it says, what it leaves out, and that nothing from data becomes markup."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from vlmdet.errors import DataError
from vlmdet.report import write_report
from vlmdet.report.album import _spread
from vlmdet.report.gallery import Card, make_card
from vlmdet.report.reading import find_scored, read_run


class Reader(HTMLParser):
    """Collects tags, attributes and text of a page, as a browser would."""

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


def said(folder: Path, **options: object) -> tuple[Reader, str]:
    """Write a report; the page as read, and its verdict."""
    page = Reader(write_report(folder, say=lambda text: None, **options).read_text(encoding="utf-8"))
    verdict = page.text.split("Verdict", 2)[2].split("What the figures")[0].replace("\u00a0", " ").strip()
    return page, verdict


def cards_of(folder: Path) -> list[Card]:
    """Make all cards of a run's only split."""
    (split,) = read_run(folder).splits
    return [make_card(split, key, number=0, labels={}) for key in split.main.rows]


def test_the_verdict_is_one_sentence_with_intervals(scored: Path) -> None:
    page, verdict = said(scored)
    assert verdict == (
        "On 4 pictures of the split test, the tuned model finds objects better than its untuned base: F1@0.5 is 0.750 "
        "(95 % interval 0.650 to 0.850) against 0.250 (0.150 to 0.350); the paired difference is +0.500 (0.400 to 0.600), "
        "and separable from 0."
    )
    for words in (
        "qwen2_vl-1",
        "Detect every cup.",
        "You find objects.",
        "float32",
        "do_sample False",
        "boxes have no scores",
    ):
        assert words in page.text


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(-0.1, 0.9, "not separable from its untuned base"), (-0.7, -0.4, "finds objects worse than")],
)
def test_a_verdict_follows_the_interval(
    scored: Path, made: SimpleNamespace, low: float, high: float, words: str
) -> None:
    comparison = scored / "eval" / "test" / "comparison.json"
    comparison.write_text(json.dumps(made.pair((low + high) / 2, low, high)))
    assert words in said(scored)[1]


def test_without_a_comparison_the_verdict_says_what_is_not_known(scored: Path) -> None:
    (scored / "eval" / "test" / "comparison.json").unlink()
    assert "not known" in said(scored)[1]


def test_nothing_from_data_becomes_markup(scored: Path, made: SimpleNamespace) -> None:
    page, _ = said(scored)
    assert page.tags.count("script") == 1
    assert "onerror" not in {name for name, _ in page.attributes}
    assert page.text.count(made.HOSTILE) >= 6  # classes, confusion, answer, problems, boxes, filter
    assert {value for name, value in page.attributes if name == "href" and not (value or "").startswith(("#", "data:"))} == {
        *(f"eval/test/{model}/{name}" for model in ("base", "tuned")
          for name in ("results.json", "predictions.jsonl", "matches.jsonl")),
        "eval/test/comparison.json", "contract.json", "train/log.jsonl", "train/metrics.csv",
    }  # fmt: skip


def test_every_part_is_there(scored: Path) -> None:
    page, _ = said(scored)
    for title in ("Classes: tuned", "Errors by kind: tuned", "Confusion: tuned", "Sizes and numbers: tuned", "tuned: IoU",
                  "tuned: at IoU 0.5", "chosen on this split, which flatters it", "tuned: centre, across", "median −0.125",
                  "Average precision", "undefined", "Loss", "Scores during training", "no answer in 60 s"):  # fmt: skip
        assert title in page.text
    levels = [int(tag[1]) for tag in page.tags if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_cards_stand_worst_first_and_say_what_happened(scored: Path) -> None:
    page, _ = said(scored)
    panels = [value for name, value in page.attributes if name == "data-number"]
    assert panels == ["4", "2", "3", "1", "0"]  # the error, two of F1 0, then by F1
    kinds = [value for name, value in page.attributes if name == "data-kinds"]
    assert kinds[1::2] == [" error ", " class missed ", " missed parse_failure ", " duplicate ", " flawless "]


def test_a_picture_that_is_missing_leaves_its_place_and_the_reason(scored: Path) -> None:
    page, _ = said(scored)
    assert "No picture: broken.png: no such file here" in page.text
    assert page.text.count("No picture:") == 4  # two pictures, in two panels each


def test_one_model_alone(tmp_path: Path, made: SimpleNamespace) -> None:
    folder = tmp_path / "weights"
    made.write_scored(folder / "eval" / "val" / "tuned", 0.5, ("good",))
    page, verdict = said(folder)
    assert verdict.startswith("On 4 pictures of the split val, the model tuned was scored alone: F1@0.5 is 0.500")
    assert "vlmdet eval" in verdict
    assert "Curves" not in page.text


def test_a_folder_of_one_evaluation(tmp_path: Path, made: SimpleNamespace) -> None:
    made.write_scored(tmp_path / "scores", 0.5)
    (tmp_path / "scores" / "predictions.jsonl").unlink()
    page, verdict = said(find_scored(tmp_path / "scores"))
    assert "the model scores was scored alone" in verdict
    assert "card" not in {value for name, value in page.attributes if name == "class"}


def test_several_splits_and_stages(scored: Path, made: SimpleNamespace) -> None:
    made.write_scored(scored / "eval" / "val" / "tuned", 0.5)
    before = scored.parent.parent / "mine-1" / "001"
    (before / "train").mkdir(parents=True)
    (before / "train" / "log.jsonl").write_text('{"step": 1, "loss": 9.0}\n')
    (scored / "config.yaml").write_text("model: {name: runs/mine-1/001/checkpoints/best}\n")
    page, _ = said(scored)
    assert "Figures on test" in page.text
    assert "Figures on val" in page.text
    assert page.text.index("Stage 1: mine-1") < page.text.index("Stage 2: mine")
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    page, _ = said(scored, split="val")
    assert "Figures on test" not in page.text


def test_thumbnails_that_do_not_fit_lie_beside(scored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = write_report(scored, say=lambda text: None).read_text(encoding="utf-8")
    assert full.count('href="data:image/webp') == 3
    monkeypatch.setattr("vlmdet.report.album.PAGE_BYTES", 1)
    monkeypatch.setattr("vlmdet.report.album.CARD_BYTES", 10**6)
    monkeypatch.setattr("vlmdet.report.album._spread", lambda ids, most: ["good"])
    page, _ = said(scored)
    sources = [value for name, value in page.attributes if name == "src"]
    assert len(sources) == 2
    assert sources[0] == sources[1]
    with Image.open(scored / str(sources[0])) as image:
        assert image.size == (80, 60)
    assert ("loading", "lazy") in page.attributes
    assert "4 of 5 pictures" in page.text
    monkeypatch.undo()
    write_report(scored, say=lambda text: None)
    assert not (scored / "report_files").exists()


def test_cards_that_do_not_fit_are_on_pages_beside(scored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cards a page: five pictures take three, and all of them are there once, the worst and the best on the first."""
    from vlmdet.report import album

    sizes = [card.size for card in cards_of(scored)]
    monkeypatch.setattr(album, "CARD_BYTES", 2 * max(sizes))
    lines: list[str] = []
    page = Reader(write_report(scored, say=lines.append).read_text(encoding="utf-8"))
    names = ["report.html", "report_pictures_2.html", "report_pictures_3.html"]
    assert sorted(path.name for path in scored.glob("*.html")) == names
    pages = [page, *(Reader((scored / name).read_text(encoding="utf-8")) for name in names[1:])]
    numbers = [[value for name, value in one.attributes if name == "data-number"] for one in pages]
    assert sorted(number for some in numbers for number in some) == ["0", "1", "2", "3", "4"]
    assert numbers[0] == ["4", "2"]  # the worst; the best is the fourth that is chosen
    counts = [len(some) for some in numbers]
    assert f"{counts[0]} of 5 pictures are on this page" in page.text
    for name, count in zip(names[1:], counts[1:], strict=True):
        assert ("href", name) in page.attributes and f"{name} ({count})" in page.text
        assert f"{count} more pictures in {scored / name}" in lines[0]
    for other in pages[1:]:
        assert ("href", "report.html#pictures-0") in other.attributes
        assert other.tags.count("script") == 1
    monkeypatch.undo()
    write_report(scored, say=lambda text: None)
    assert [path.name for path in scored.glob("*.html")] == ["report.html"]


def test_a_picture_of_several_rows_is_on_a_page_once(scored: Path, made: SimpleNamespace) -> None:
    rows = [made.row(key, image="good.png") for key in ("good", "half", "bad")]
    for model in ("base", "tuned"):
        path = scored / "eval" / "test" / model / "predictions.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    page, _ = said(scored)
    links = [value or "" for name, value in page.attributes if name == "href"]
    assert sum(link.startswith("data:image/webp") for link in links) == 1
    assert links.count("#picture-0-0-0") == 5
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_of_many_pictures_the_worst_and_the_best_are_shown() -> None:
    assert _spread(list("abcdefghij"), 5) == ["a", "b", "c", "j", "d"]
    assert sorted(_spread(list("abc"), 9)) == ["a", "b", "c"]


def test_a_packed_picture_is_shown(scored: Path, made: SimpleNamespace) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pictures = [{"bytes": (scored.parents[2] / "good.png").read_bytes(), "path": None}, {"bytes": b"no", "path": None}]
    pq.write_table(pa.table({"image": pictures}), scored.parents[2] / "test.parquet")
    rows = [made.row(key, image=f"test.parquet:{i}") for i, key in enumerate(("good", "half", "bad"))]
    for model in ("base", "tuned"):
        path = scored / "eval" / "test" / model / "predictions.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    page, _ = said(scored)
    assert sum((value or "").startswith("data:image/webp") for name, value in page.attributes if name == "href") == 1
    assert "not a picture in any format" in page.text
    assert "test.parquet: no such row" in page.text


@pytest.mark.parametrize(
    ("name", "text"),
    [("results.json", "[]"), ("results.json", "{"), ("matches.jsonl", "{}\nx\n"), ("predictions.jsonl", "x")],
)
def test_a_broken_file_is_named(scored: Path, name: str, text: str) -> None:
    (scored / "eval" / "test" / "tuned" / name).write_text(text)
    with pytest.raises(DataError, match=name):
        write_report(scored, say=lambda text: None)


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ({"score_source": "first_token", "score_calibrated": False}, "first_token, not calibrated"),
        (
            {"score_source": "first_token", "score_calibrated": {"split": "val"}},
            "first_token, calibrated on the split val",
        ),
        ({"prompt_version": "detect-7"}, "prompt versiondetect-7"),
        ({"allow": {"labels": {"trained": ["a"], "now": ["<b>"]}}}, "--allow labelstrained: ['a']; now: ['<b>']"),
    ],
)
def test_conditions_say_what_the_record_says(scored: Path, meta: dict[str, object], words: str) -> None:
    file = scored / "eval" / "test" / "tuned" / "results.json"
    results = json.loads(file.read_text())
    file.write_text(json.dumps(results | {"meta": results["meta"] | meta}))
    assert words in said(scored)[0].text.replace("\n", "")


def test_the_newest_scored_number_is_taken(scored: Path) -> None:
    (scored.parent / "002").mkdir()
    assert find_scored(scored.parent) == scored
    with pytest.raises(DataError, match="vlmdet eval"):
        find_scored(scored.parent / "002")


def test_the_command_says_where_and_needs_an_evaluation(scored: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vlmdet", "report"]
    done = subprocess.run([*command, str(scored.parent), "--json"], capture_output=True, text=True, check=False)
    assert json.loads(done.stdout) == {
        "report": str(scored / "report.html"), "bytes": (scored / "report.html").stat().st_size
    }  # fmt: skip
    assert str(scored / "report.html") in done.stderr
    failed = subprocess.run([*command, str(tmp_path / "none")], capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
    assert "vlmdet eval RUN --base" in failed.stderr
    failed = subprocess.run([*command, str(scored), "--split", "tset"], capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert "there is: test" in failed.stderr

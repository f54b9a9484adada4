"""A report on a terminal and as a page: everything is told, and nothing of a user's data is read as markup."""

from __future__ import annotations

import io
from pathlib import Path

from vlmdet.doctor import Checked, Finding, NotRun, Report
from vlmdet.doctor.show import print_report, write_report

CAUSE = Finding(
    "L01",
    "The end token is not learnt",
    4,
    "labels",
    "train[3]",
    "tokens: [bold]<|box_end|>\nsecond line",
    "the mask ends early",
    "include it",
    "trl PR#5988",
    effect="repeats",
    pictures=("data:image/jpeg;base64,AAAA",),
)
EFFECT = Finding(
    "E07", "Answers repeat boxes", 3, "evaluation", "run", "31 % <script>", "c", "f", "r", consequence_of="L01"
)
REPORT = Report(
    (CAUSE, EFFECT),
    (NotRun("M01", "Nothing is trainable", "build_trainer"), NotRun("M02", "Another model", "build_trainer")),
    (Checked("D05", "Odd boxes", "44 boxes"), Checked("D06", "EXIF", "44 boxes")),
    1.25,
    "fork",
)


def printed(report: Report) -> str:
    stream = io.StringIO()
    print_report(report, stream, width=100)
    return stream.getvalue()


def test_on_a_terminal() -> None:
    text = printed(REPORT)
    for part in (
        "L01",
        "severity 4",
        "[bold]<|box_end|>",
        "second line",
        "the mask ends early",
        "include it",
        "trl PR#5988",
    ):
        assert part in text
    assert "explains E07 Answers repeat boxes: 31 % <script>" in text
    assert "D05, D06: 44 boxes" in text
    assert "M01, M02: build_trainer" in text
    assert "1 findings in 1.2 s" in text


def test_a_clean_bill() -> None:
    text = printed(Report((), (), REPORT.checked, 0.5))
    assert "Nothing found. 2 checks ran" in text and "44 boxes" in text


def test_as_a_page(tmp_path: Path) -> None:
    page = write_report(tmp_path / "doctor.html", REPORT).read_text(encoding="utf-8")
    assert "<script>" not in page and "&lt;script&gt;" in page
    for part in ("data:image/jpeg;base64,AAAA", "second line", "build_trainer", "44 boxes"):
        assert part in page


def test_worst_severity() -> None:
    assert REPORT.worst == 4 and Report((), (), (), 0).worst == 0

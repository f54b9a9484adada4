"""One pass: ranking, what is not run, isolation from user code that raises, hangs, exits or eats memory."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.doctor.drawn import SETTINGS, draw_rows, make_convert
from vlmdet.doctor import Finding, Subject, examine
from vlmdet.doctor.calls import UserCodeError
from vlmdet.doctor.catalogue import ENTRIES, STAGE_OF
from vlmdet.doctor.checks import STAGES, Check, check, looked
from vlmdet.doctor.evidence import Evidence
from vlmdet.doctor.examine import run_check
from vlmdet.doctor.findings import CONSEQUENCES, rank
from vlmdet.errors import ConfigError


def finding(identifier: str, severity: int = 4, certainty: float = 1.0) -> Finding:
    return Finding(identifier, "t", severity, "labels", "w", "e", "c", "f", "r", certainty=certainty)


def test_the_catalogue_is_whole() -> None:
    counts = {"D": 18, "C": 10, "T": 10, "L": 12, "V": 12, "M": 15, "O": 11, "E": 17, "S": 11}
    assert list(ENTRIES) == [f"{letter}{i:02d}" for letter, count in counts.items() for i in range(1, count + 1)]
    assert tuple(STAGE_OF.values()) == STAGES
    for entry in ENTRIES.values():
        assert 1 <= entry.severity <= 4 and entry.title and entry.symptom and entry.fix and entry.reference


def test_consequences_name_what_is_in_the_catalogue() -> None:
    for cause, effects in CONSEQUENCES.items():
        assert cause in ENTRIES and set(effects) <= set(ENTRIES) and cause not in effects


def test_causes_come_first_and_a_consequence_names_its_cause() -> None:
    shown, further = rank([finding("E07", 3), finding("D10", 3), finding("L01", 4, 0.9), finding("E06", 3)])
    assert [(one.id, one.consequence_of) for one in shown] == [
        ("L01", None),
        ("D10", None),
        ("E06", "L01"),
        ("E07", "L01"),
    ]
    assert further == ()


def test_hints_of_little_weight_are_told_after_consequences() -> None:
    shown, _ = rank([finding("L06", 1, 0.4), finding("C08", 2), finding("D15", 3)])
    assert [(one.id, one.consequence_of) for one in shown] == [("D15", None), ("C08", "D15"), ("L06", None)]


def test_a_collator_that_raises_on_made_rows_alone_is_no_finding() -> None:
    evidence = Evidence(Subject(rows=[PLAIN] * 2, collate=_refuses_made_rows))
    with pytest.raises(UserCodeError) as own:
        evidence.collate([evidence.examples()[0].raw], "row 0", ["train[0]"], [("a",)])
    with pytest.raises(UserCodeError) as made:
        evidence.collate([dict(PLAIN)], "made", ["train[0], changed"], [("a",)])
    assert (own.value.made, made.value.made) == (False, True)

    def check_of(raised: UserCodeError) -> Check:
        def run(_: Evidence) -> Iterator[Any]:
            raise raised
            yield

        return Check(("C05",), (), run)

    assert next(kind for kind, _ in run_check(check_of(own.value), evidence)) == "finding"
    assert [kind for kind, _ in run_check(check_of(made.value), evidence)] == ["not_run"]


PLAIN = {"messages": [{"role": "user", "content": "Find it."}, {"role": "assistant", "content": "a"}]}


def _refuses_made_rows(examples: list[Any]) -> Any:
    raise ValueError("a form that it does not know")


def test_a_doubtful_cause_explains_nothing_certain() -> None:
    shown, _ = rank([finding("E07", 3), finding("L01", 4, 0.3)])
    assert [(one.id, one.consequence_of) for one in shown] == [("E07", None), ("L01", None)]


def test_a_chain_leads_to_the_first_cause_and_two_that_explain_each_other_are_not_lost() -> None:
    shown, _ = rank([finding("L02"), finding("T09"), finding("L11", 3)])
    assert [(one.id, one.consequence_of) for one in shown] == [("T09", None), ("L02", "T09"), ("L11", "T09")]
    shown, _ = rank([finding("L04"), finding("L05", 3)])
    assert [(one.id, one.consequence_of) for one in shown] == [("L04", None), ("L05", "L04")]


def test_at_most_five_are_shown_apart_from_consequences() -> None:
    found = [finding(one, 3) for one in ("D10", "D13", "C10", "V04", "O06", "S08", "E15")]
    shown, further = rank(found)
    assert len(shown) == 5 and len(further) == 2
    assert {one.id for one in (*shown, *further)} == {one.id for one in found}


def test_nothing_is_silently_left_out() -> None:
    report = examine(Subject())
    told = [one.id for one in (*report.findings, *report.not_run, *report.checked)]
    assert set(told) == set(ENTRIES)
    assert len(told) == len(set(told))


def test_stages_and_ids_are_chosen_and_misspellings_are_told() -> None:
    report = examine(Subject(rows=draw_rows(8)), only=["d07"])
    assert [one.id for one in report.checked] == ["D07"] and not report.not_run and not report.findings
    assert {ENTRIES[one.id].stage for one in examine(Subject(), stages=["data"]).not_run} == {"data"}
    with pytest.raises(ConfigError, match="labels"):
        examine(Subject(), stages=["lables"])
    with pytest.raises(ConfigError, match="unknown id 'D99'"):
        examine(Subject(), only=["D99"])


def test_as_json() -> None:
    values = json.loads(
        json.dumps(examine(Subject(rows=draw_rows(8, "yxyx/pixel"), box_format="xyxy/pixel")).as_dict())
    )
    assert values["findings"][0]["id"] == "D01"
    assert set(values["findings"][0]) >= {
        "id",
        "title",
        "severity",
        "stage",
        "where",
        "evidence",
        "cause",
        "fix",
        "reference",
    }
    assert values["not_run"] and set(values["not_run"][0]) == {"id", "title", "needs"}


def raising(row: Any) -> Any:
    raise ValueError("a broken converter")


def hanging(row: Any) -> Any:
    while True:
        time.sleep(0.01)


def leaving(row: Any) -> Any:
    sys.exit(3)


def dying(row: Any) -> Any:
    os._exit(9)


def eating(row: Any) -> Any:
    return bytearray(64 * 2**30)


@pytest.mark.parametrize(
    ("convert", "text"),
    [(raising, "ValueError: a broken converter"), (leaving, "SystemExit: 3"), (eating, "MemoryError")],
)
def test_user_code_that_raises_is_a_finding_at_its_own_line(convert: Any, text: str) -> None:
    report = examine(Subject(rows=draw_rows(8), convert=convert, settings=SETTINGS), stages=["data"])
    assert report.findings[0].id == "D15" and report.isolation.startswith("fork")
    assert text in report.findings[0].evidence
    assert report.findings[0].where.startswith(f"{__file__}:")


def test_user_code_that_hangs_is_stopped_and_the_rest_runs() -> None:
    report = examine(Subject(rows=draw_rows(8), convert=hanging, settings=SETTINGS), stages=["data"], timeout=3)
    assert any("more time" in one.needs for one in report.not_run)
    assert set(ENTRIES) >= {one.id for one in report.checked}
    assert len(report.not_run) + len(report.checked) + len(report.findings) == 18


def test_user_code_that_ends_the_process_loses_its_own_check_only() -> None:
    report = examine(Subject(rows=draw_rows(8), convert=dying, settings=SETTINGS), stages=["data"])
    assert any("it ended with code 9" in one.needs for one in report.not_run)
    assert len(report.not_run) + len(report.checked) + len(report.findings) == 18


def test_the_parent_is_untouched() -> None:
    rows = draw_rows(8)
    kept: list[int] = []

    def convert(row: Any) -> Any:
        kept.append(1)
        return make_convert()(row)

    examine(Subject(rows=rows, convert=convert, settings=SETTINGS), stages=["data"])
    assert kept == []


def test_a_fork_after_torch_has_worked_in_the_parent_does_not_hang() -> None:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        weights = torch.randn(400, 400, requires_grad=True)
        (weights @ weights).sum().backward()

        def convert(row: Any) -> Any:
            again = torch.randn(400, 400, requires_grad=True)
            (again @ again).sum().backward()
            return make_convert()(row)

        report = examine(Subject(rows=draw_rows(8), convert=convert, settings=SETTINGS), only=["D12"], timeout=30)
    finally:
        torch.set_num_threads(before)
    assert [one.id for one in report.checked] == ["D12"]


def test_a_check_that_is_broken_is_told_and_hides_nothing() -> None:
    @check("D13", "D14", needs=())
    def broken(evidence: Evidence) -> Any:
        yield looked("D13", "3 rows")
        raise ZeroDivisionError("oops")

    results = list(run_check(broken, Evidence(Subject())))
    assert [(kind, fields["id"]) for kind, fields in results] == [("checked", "D13"), ("not_run", "D14")]
    assert "the check 'broken' itself failed: ZeroDivisionError: oops" in results[1][1]["needs"]

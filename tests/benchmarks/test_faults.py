"""The injected faults: enough of them, each buildable, and the tables of the runner by hand."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.faults.__main__ import table, verdict
from benchmarks.faults.pictures import scenes
from benchmarks.faults.registry import STAGES, Case, read_all

FAULTS, HEALTHY = read_all()


def test_there_are_enough_faults_of_every_stage_in_both_halves() -> None:
    assert len(FAULTS) >= 100
    assert len(HEALTHY) >= 20
    assert {case.stage for case in FAULTS} == set(STAGES)
    halves = Counter(case.half for case in FAULTS)
    assert halves[1] >= 55
    assert halves[2] >= 40
    names = Counter(case.name for case in [*FAULTS, *HEALTHY])
    assert not [name for name, count in names.items() if count > 1]
    assert all(re.fullmatch("[DCTLVMOES][01][0-9]", id) for case in FAULTS for id in (case.id, *case.also))


@pytest.mark.parametrize(
    "case", [c for c in FAULTS if c.name.startswith("o") or c.stage == "evaluation"][:6], ids=lambda c: c.name
)
def test_a_subject_is_built(case: Case, tmp_path: Path) -> None:
    subject = case.subject(tmp_path)
    assert any(value is not None for value in vars(subject).values())


def test_objects_lie_in_their_pictures_and_apart() -> None:
    for scene in scenes(24, 7):
        for number, (a, b, c, d) in enumerate(scene.boxes):
            assert 0 <= a < c <= scene.width
            assert 0 <= b < d <= scene.height
            for e, f, g, h in scene.boxes[:number]:
                assert c <= e or g <= a or d <= f or h <= b
        assert scene.boxes == sorted(scene.boxes, key=lambda box: (box[1], box[0]))


def test_verdicts_and_the_table_by_hand() -> None:
    case = Case("L01", "labels", 1, "x", lambda: None, also=("T08",))

    def found(*ids: str) -> dict[str, list[dict[str, str]]]:
        return {"findings": [{"id": id} for id in ids]}

    assert verdict(case, found("D13", "L01")) == "named"
    assert verdict(case, found("T08")) == "named"
    assert verdict(case, found("D13", "D14", "L01")) == "detected"
    assert verdict(case, found("D13")) == "missed"
    assert verdict(case, {"error": "ended"}) == "missed"
    lines = table([(case, found("L01")), (case, found("A", "B", "L01")), (case, found())]).splitlines()
    labels = next(line for line in lines if line.startswith("labels"))
    assert re.findall(r"\d+", labels) == ["3", "1", "2", "1", "0", "0", "0", "0"]
    assert re.findall(r"\d+", lines[-1]) == ["3", "1", "2", "1", "0", "0", "0", "0"]

"""docs/doctor.md has every row of the catalogue, as the checks are now."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from vlmdet.doctor.catalogue import ENTRIES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_doctor_page", ROOT / "scripts" / "write_doctor_page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_up_to_date(script: ModuleType) -> None:
    text = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    assert script.table() in text, "run scripts/write_doctor_page.py"


def test_every_row_is_checked_or_says_why_not(script: ModuleType) -> None:
    told = script.evidence_of()
    assert all(lines and all(lines) for lines in told.values())
    open_rows = {entry.id: entry.unchecked for entry in ENTRIES.values() if entry.id not in told}
    assert all(open_rows.values()), open_rows
    assert len(ENTRIES) == 116
    assert len(told) >= 90

"""A stage that names the one before it, by hand-made files."""

from __future__ import annotations

import json
from pathlib import Path

from vlmdet.doctor.checks.stages import CHECKS
from vlmdet.doctor.evidence import Evidence
from vlmdet.doctor.examine import run_check
from vlmdet.doctor.subject import Subject


def found(tmp_path: Path, base: Path) -> list[str]:
    earlier, adapter = tmp_path / "stage1-merged", tmp_path / "adapter"
    for folder in (earlier, adapter):
        folder.mkdir(exist_ok=True)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    evidence = Evidence(Subject(artefacts={"previous_stage": earlier, "adapter": adapter}))
    return [values["id"] for kind, values in run_check(CHECKS[0], evidence) if kind == "finding"]


def test_a_stage_that_says_what_it_continues(tmp_path: Path) -> None:
    assert found(tmp_path, tmp_path / "raw") == ["O09"]
    assert found(tmp_path, tmp_path / "stage1-merged") == []

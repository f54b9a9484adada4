"""The benchmark of metrics runs on a few pictures, and draws what it says."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from vlmdet.evaluation.selftest import self_test


@pytest.fixture(scope="module")
def benchmark() -> Any:
    path = Path(__file__).parents[2] / "benchmarks" / "metrics.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_metrics", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_line_of_json(benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["metrics.py", "--pictures", "20", "--rounds", "1", "--resamples", "20"])
    benchmark.main()
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert (result["pictures"], result["classes"]) == (20, 80)
    assert result["own"]["limit_seconds"] == 10
    assert 0.5 < result["own"]["f1_50"] < 1


def test_the_set_has_what_a_run_has(benchmark: Any) -> None:
    rows, names = benchmark.draw(300, classes=5)
    found = benchmark.summarise(rows, labels_asked=names, resamples=0)
    assert sum(len(row["truth"]["boxes"]) for row in rows) / 300 == pytest.approx(7.2, rel=0.1)
    assert all(entry["count"] > 0 for entry in found["errors"].values())
    assert found["score_curve"] is not None
    assert self_test(rows, labels_asked=names)

"""The benchmark of prediction runs on a few pictures: both sides find the same boxes, and one line says how fast."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_engine_and_generate_are_compared_in_one_line_of_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    predict = importlib.import_module("predict")
    monkeypatch.setattr(predict, "MAX_NEW_TOKENS", 40)
    monkeypatch.setattr(sys, "argv", ["predict.py", "--rows", "5", "--turns", "1", "--batch-size", "3"])
    predict.main()
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert result["rows"] == 5 and result["peer_rows"] == 1 and result["boxes"] >= 5
    assert all(value > 0 for value in result["pictures_per_second"].values())


def test_other_boxes_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    predict = importlib.import_module("predict")
    monkeypatch.setattr(predict, "generate_one_by_one", lambda loaded, contract, samples: [[] for _ in samples])
    monkeypatch.setattr(predict, "MAX_NEW_TOKENS", 40)
    monkeypatch.setattr(sys, "argv", ["predict.py", "--rows", "2", "--turns", "1"])
    with pytest.raises(AssertionError, match="other boxes on"):
        predict.main()

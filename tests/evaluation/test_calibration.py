"""Calibration: the error by hand, and parameters that come back from scores made with them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlmdet.cli import main
from vlmdet.errors import ConfigError, DataError
from vlmdet.evaluation.calibration import (
    MIN_EACH,
    Calibration,
    calibrate_rows,
    calibration_error,
    fit_calibration,
    scored_hits,
)


def test_the_error_by_hand() -> None:
    # Bin (.8, .9]: two boxes, mean .85, one hit: gap .35. Bin (.1, .2]: two boxes, mean .15, no hit: gap .15. Mean of all: .25.
    assert calibration_error([0.81, 0.89, 0.11, 0.19], [True, False, False, False]) == pytest.approx(0.25)
    assert calibration_error([1.0, 0.0], [True, False]) == 0
    assert calibration_error([1.0, 0.0], [False, True]) == 1
    assert math.isnan(calibration_error([], []))


def test_a_gap_above_and_one_below_in_one_bin_cancel() -> None:
    assert calibration_error([0.5, 0.5], [True, False]) == 0


def test_apply_by_hand() -> None:
    made = Calibration(slope=2.0, intercept=math.log(3), source="first_token", split="val", n=40, hits=20)
    # logit .5 = 0: the odds are 3. logit .8 = log 4: the odds are 4 * 4 * 3.
    assert made.apply([0.5, 0.8]) == pytest.approx([0.75, 48 / 49])
    assert 0 <= made.apply([0.0])[0] < 1e-6 and 1 - 1e-6 < made.apply([1.0])[0] <= 1


def test_parameters_return_and_the_error_falls() -> None:
    generator = np.random.default_rng(0)
    scores = generator.uniform(0.3, 0.99, 20_000)
    truth = 1 / (1 + np.exp(-(0.5 * np.log(scores / (1 - scores)) - 1)))
    hits = generator.uniform(size=scores.size) < truth
    made = fit_calibration(scores, hits, source="token_probability", split="val")
    assert made.slope == pytest.approx(0.5, abs=0.05) and made.intercept == pytest.approx(-1, abs=0.05)
    assert (made.n, made.hits, made.split, made.source) == (20_000, int(hits.sum()), "val", "token_probability")
    assert calibration_error(scores, hits) > 0.2 and calibration_error(made.apply(scores), hits) < 0.02
    assert np.argsort(made.apply(scores[:50])).tolist() == np.argsort(scores[:50]).tolist()


def test_the_mean_of_what_was_fitted_is_the_share_of_hits() -> None:
    """The gradient of the intercept is 0 there; Platt's smoothing moves the share a little towards a half."""
    hits = np.array([True] * 30 + [False] * 20)
    scores = np.concatenate([np.linspace(0.4, 0.9, 30), np.linspace(0.2, 0.7, 20)])
    made = fit_calibration(scores, hits, source="first_token", split="val")
    assert np.mean(made.apply(scores)) == pytest.approx((30 * 31 / 32 + 20 * 1 / 22) / 50, abs=1e-6)


def test_scores_that_part_hits_from_misses_have_an_answer() -> None:
    scores = np.array([0.0] * MIN_EACH + [1.0] * MIN_EACH)
    made = fit_calibration(scores, scores == 1, source="consistency", split="val")
    assert made.apply([0.0, 1.0]) == pytest.approx([1 / (MIN_EACH + 2), (MIN_EACH + 1) / (MIN_EACH + 2)], abs=1e-3)


def test_what_is_refused() -> None:
    scores, hits = np.linspace(0.1, 0.9, 40), np.arange(40) >= 20
    with pytest.raises(ConfigError, match="test split"):
        fit_calibration(scores, hits, source="first_token", split="test")
    with pytest.raises(DataError, match="9 hits and 31 misses"):
        fit_calibration(scores, np.arange(40) >= 31, source="first_token", split="val")
    with pytest.raises(DataError, match="no more often hits"):
        fit_calibration(scores, ~hits, source="first_token", split="val")


ROWS = [
    {
        "id": "a",
        "truth": {"boxes": [[0, 0, 0.2, 0.2], [0.5, 0.5, 1, 1]], "labels": ["cup", "cup"], "ignore": [False, True]},
        # a hit, its duplicate, one of another class, one on the ignored region
        "boxes": [[0, 0, 0.2, 0.2], [0, 0, 0.2, 0.1], [0, 0, 0.2, 0.2], [0.5, 0.5, 1, 1]],
        "labels": ["cup", "cup", "dog", "cup"],
        "scores": [0.9, 0.8, 0.7, 0.6],
        "score_source": "first_token",
    },
    {
        "id": "b",
        "truth": {"boxes": [], "labels": [], "ignore": []},
        "boxes": [],
        "labels": [],
        "scores": None,
        "score_source": None,
    },
    {
        "id": "c",
        "truth": {"boxes": [], "labels": [], "ignore": []},
        "boxes": [[0, 0, 1, 1]],
        "labels": ["dog"],
        "scores": [0.5],
        "score_source": "first_token",
    },
]


def test_hits_of_stored_rows_by_hand() -> None:
    scores, hits = scored_hits(ROWS, labels_asked=["cup", "dog"])
    assert scores.tolist() == [0.9, 0.8, 0.7, 0.5]
    assert hits.tolist() == [True, False, False, False]
    assert [len(part) for part in scored_hits(ROWS[1:2], labels_asked=["cup"])] == [0, 0]


def test_stored_rows_are_calibrated_beside_what_was_stored() -> None:
    made = Calibration(slope=1.0, intercept=math.log(3), source="first_token", split="val", n=40, hits=20)
    changed = calibrate_rows(ROWS, made)
    assert changed[0]["scores"] == pytest.approx([27 / 28, 12 / 13, 7 / 8, 9 / 11])
    assert changed[1] == ROWS[1] and changed[2]["scores"] == pytest.approx([0.75])
    assert ROWS[0]["scores"] == [0.9, 0.8, 0.7, 0.6] and changed[0]["boxes"] == ROWS[0]["boxes"]
    other = Calibration(slope=1.0, intercept=0.0, source="consistency", split="val", n=40, hits=20)
    with pytest.raises(DataError, match="first_token"):
        calibrate_rows(ROWS, other)


def stored(folder: Path, split: str, *, start: int, hits: int, misses: int) -> tuple[Path, list[dict[str, Any]]]:
    """Write predictions of one box a picture: hits with a score of .6, misses with .4."""
    box = [0.0, 0.0, 0.5, 0.5]
    rows = [
        {
            "id": str(start + i), "image": f"{start + i}.png", "width": 100, "height": 100, "text": "", "status": "ok",
            "truth": {"boxes": [box] * right, "labels": ["cup"] * right, "ignore": [False] * right}, "problems": [],
            "boxes": [box], "labels": ["cup"], "scores": [0.6 if right else 0.4], "score_source": "first_token",
            "tokens": {"prompt": 1, "image": 1, "answer": 1}, "truncated": False, "ms": 1.0, "error": None,
        }
        for i, right in enumerate([1] * hits + [0] * misses)
    ]  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "results.json").write_text(json.dumps({"meta": {"split": split}}))
    return folder / "predictions.jsonl", rows


def test_eval_calibrates_on_another_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    val, _ = stored(tmp_path / "val", "val", start=0, hits=98, misses=98)
    test, _ = stored(tmp_path / "test", "test", start=1000, hits=30, misses=10)
    words = ["eval", "--from", str(test), "--classes", "cup", "--out", str(tmp_path / "out"), "--json"]
    assert main(words) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["meta"]["score_calibrated"] is False
    assert main([*words, "--calibrate-on", str(val)]) == 0
    said = json.loads((tmp_path / "out" / "results.json").read_text())["meta"]["score_calibrated"]
    assert (said["method"], said["split"], said["n"], said["hits"], said["source"]) == (
        "platt",
        "val",
        196,
        98,
        "first_token",
    )
    # Scores of .6 and .4 become 99/100 and 1/100, Platt's targets of 98 hits and 98 misses: off by .01 instead of .4.
    assert said["error_before"] == pytest.approx(0.4) and said["error_after"] == pytest.approx(0.01, abs=1e-4)
    capsys.readouterr()
    other, _ = stored(tmp_path / "other", "test", start=2000, hits=30, misses=10)
    nameless, _ = stored(tmp_path / "nameless", "", start=2000, hits=30, misses=10)
    for on, why in (
        (other, "test split"),
        (test, "cannot calibrate its own score"),
        (nameless, "does not say which split"),
    ):
        assert main([*words, "--calibrate-on", str(on)]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and why in error

"""A scored run made by hand: two classes, every kind of mistake, labels that would break a page that trusted them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

HOSTILE = "</script><script>document.title='owned'</script>\u2028\"'><img src=x onerror=document.title='owned'>"

CONTRACT = {
    "codec": "qwen2_vl",
    "codec_version": "qwen2_vl-1",
    "system_prompt": "You find objects.",
    "user_prompt": "Detect every cup.",
    "max_pixels": 1000,
    "base_model": "tiny",
    "decoding": {"do_sample": False},
}


def figure(value: float | None, n: int = 4) -> dict[str, Any]:
    """A figure with an interval of .1 on each side."""
    low, high = (None, None) if value is None else (value - 0.1, value + 0.1)
    return {"value": value, "low": low, "high": high, "n": n}


def row(key: str, **changes: Any) -> dict[str, Any]:
    """A row of predictions.jsonl: one true cup, found."""
    plain = {
        "id": key,
        "image": f"{key}.png",
        "width": 80,
        "height": 60,
        "truth": {"boxes": [[0.1, 0.1, 0.5, 0.5]], "labels": ["cup"], "ignore": [False]},
        "text": "<|object_ref_start|>cup<|object_ref_end|><|box_start|>(100,100),(500,500)<|box_end|>",
        "boxes": [[0.1, 0.1, 0.5, 0.5]],
        "labels": ["cup"],
        "scores": None,
        "score_source": None,
        "problems": [],
        "status": "ok",
        "tokens": {"prompt": 9, "image": 4, "answer": 17},
        "truncated": False,
        "ms": 1.0,
        "error": None,
    }
    return plain | changes


def match(key: str, predictions: list[str], truth: list[str], f1: float | None, iou: float | None) -> dict[str, Any]:
    """A row of matches.jsonl."""
    return {
        "id": key,
        "predictions": [{"kind": kind, "iou": iou, "truth": None} for kind in predictions],
        "truth": [{"kind": kind, "iou": iou, "prediction": None} for kind in truth],
        "f1": f1,
        "mean_best_iou": iou,
    }


ROWS = {
    "good": (row("good"), match("good", ["hit"], ["found"], 1.0, 0.875)),
    "half": (row("half"), match("half", ["hit", "duplicate"], ["found"], 0.6667, 0.625)),
    "bad": (
        row("bad", labels=[HOSTILE], text=HOSTILE, problems=[{"kind": "off_list", "detail": HOSTILE}]),
        match("bad", ["class"], ["missed"], 0.0, 0.0),
    ),
    "mute": (
        row("mute", boxes=[], labels=[], text="I cannot", status="parse_failure", image=f"{HOSTILE[:9]}.png"),
        match("mute", [], ["missed"], 0.0, 0.0),
    ),
    "broken": (row("broken", boxes=[], labels=[], text="", status="error", error="no answer in 60 s"), None),
}


def results(value: float, name: str) -> dict[str, Any]:
    """A results.json whose F1@0.5 is `value`."""
    names = ("mean_best_iou", "f1_50", "f1", "precision_50", "recall_50", "mean_matched_iou")
    figures = {key: figure(value) for key in names}
    histogram = {"edges": [0.0, 0.5, 1.0], "counts": [1, 3]}
    offsets = {key: {"edges": [-1.0, 0.0, 1.0], "counts": [2, 1], "median": -0.125} for key in "xywh"}
    return {
        "meta": {"name": name, "split": "test", "n": 4, "codec": "qwen2_vl-1", "dtype": "float32", "resamples": 100},
        "figures": figures,
        "per_class": {
            key: {"images": 4, "instances": 5, "predicted": 3, "figures": figures} for key in ("cup", HOSTILE)
        },
        "by_size": {"small": {"instances": 0, "figures": {"f1_50": figure(None)}}},
        "by_patches": None,
        "by_count": {"1": {"images": 4, "figures": figures}},
        "without_objects": {"images": 0, "figures": {"correct_empty_rate": figure(None)}},
        "confusion": {"labels": ["cup", HOSTILE, "background"], "counts": [[3, 1, 2], [0, 0, 0], [1, 0, 0]]},
        "errors": {"class": {"count": 1, "cost": figure(0.25)}, "missed": {"count": 2, "cost": figure(0.125)}},
        "iou_histogram": histogram,
        "offsets": offsets,
        "score_curve": {
            "score": [0.1, 0.9],
            "precision": [0.5, 1.0],
            "recall": [0.8, 0.2],
            "f1": [0.6, 0.3],
            "best": {"score": 0.1, "chosen_on": "this split", "f1": figure(0.6)},
        },
        "coco": {"AP": 0.5, "APs": -1},
    }


def write_scored(folder: Path, value: float, keys: tuple[str, ...] = tuple(ROWS)) -> None:
    """Write one model on one split."""
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results(value, folder.name)))
    rows, matches = [ROWS[key][0] for key in keys], [ROWS[key][1] for key in keys if ROWS[key][1]]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    (folder / "matches.jsonl").write_text("".join(json.dumps(one) + "\n" for one in matches))


def pair(value: float, low: float, high: float) -> dict[str, Any]:
    """A comparison.json with one pair."""
    difference = {"value": value, "low": low, "high": high, "n": 4, "wins": 3, "losses": 1}
    one = {"a": "base", "b": "tuned", "metric": "f1_50", "difference": difference, "separable": low > 0 or high < 0}
    return {"runs": [], "pairs": [one]}


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """The folder of a run with base and tuned, a comparison and a training log; pictures lie above it."""
    folder = tmp_path / "runs" / "mine" / "001"
    write_scored(folder / "eval" / "test" / "tuned", 0.75)
    write_scored(folder / "eval" / "test" / "base", 0.25)
    (folder / "eval" / "test" / "comparison.json").write_text(json.dumps(pair(0.5, 0.4, 0.6)))
    (folder / "contract.json").write_text(json.dumps(CONTRACT))
    (folder / "train").mkdir()
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 1.0, "eval_loss": 1.5}]
    (folder / "train" / "log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in log))
    (folder / "train" / "metrics.csv").write_text("step,f1_50\n3.0,0.5\n")
    for key in ("good", "half", "bad"):
        Image.new("RGB", (80, 60), "orange").save(folder / f"{key}.png")
        (folder / f"{key}.png").rename(tmp_path / f"{key}.png")
    return folder


@pytest.fixture(scope="session")
def made() -> SimpleNamespace:
    """What the tests of a folder cannot import: the parts that runs are made of."""
    return SimpleNamespace(HOSTILE=HOSTILE, pair=pair, row=row, match=match, write_scored=write_scored)

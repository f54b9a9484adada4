"""Checks of the stage evaluation, on subjects made by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmdet.doctor.checks.evaluation import CHECKS
from vlmdet.doctor.evidence import Evidence
from vlmdet.doctor.examine import run_check
from vlmdet.doctor.subject import Subject


@pytest.fixture(scope="module")
def tiny_processor() -> Any:
    """The embedded base's processor."""
    from vlmdet.models.loader import load

    return load("tiny").processor


NUMBERS = re.compile(r"\((\d+),(\d+)\),\((\d+),(\d+)\)")


def rows() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    made = []
    for i in range(12):
        width, height = int(rng.integers(200, 400)), int(rng.integers(200, 400))
        boxes = []
        for j in range(1 + i % 3):
            x, y = rng.uniform(0, 0.2) * width, (0.05 + 0.3 * j) * height
            boxes.append([round(x, 1), round(y, 1), round(x + 0.6 * width, 1), round(y + 0.15 * height, 1)])
        picture = Image.new("RGB", (width, height), (i * 10, 90, 60))
        made.append({"image": picture, "objects": {"bbox": boxes, "category": ["cup"] * len(boxes)}})
    return made


def convert(row: dict[str, Any]) -> dict[str, Any]:
    width, height = row["image"].size
    scale = (width, height, width, height)
    parts = []
    for box in row["objects"]["bbox"]:
        a, b, c, d = (round(1000 * one / side) for one, side in zip(box, scale, strict=True))
        parts.append(f"cup<|box_start|>({a},{b}),({c},{d})<|box_end|>")
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Find every cup."}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "".join(parts)}]}
    return {"messages": [user, answer], "image": row["image"]}


def every(text: str) -> list[list[int]]:
    return [[int(one) for one in found] for found in NUMBERS.findall(text)]


def look(**fields: Any) -> dict[str, list[dict[str, Any]]]:
    """Run the module's checks; returns what was said, by kind."""
    evidence = Evidence(Subject(**fields))
    said: dict[str, list[dict[str, Any]]] = {"finding": [], "checked": [], "not_run": []}
    for check in CHECKS:
        for kind, values in run_check(check, evidence):
            said[kind].append(values)
    return said


def names(said: dict[str, list[dict[str, Any]]]) -> list[str]:
    return [one["id"] for one in said["finding"]]


WAY = {"rows": rows(), "box_format": "xyxy/pixel", "convert": convert}


def test_a_right_parser_has_a_clean_bill() -> None:
    said = look(**WAY, parse=every)
    assert names(said) == []
    told = {one["id"]: one["figures"] for one in said["checked"]}
    assert {"E03", "E04", "E14", "E17"} <= told.keys()
    assert "24 of 24 boxes of 12 targets read back, as xyxy/per_mille" in told["E03"]
    assert {one["id"]: one["needs"] for one in said["not_run"]}["E01"] == "metric"


def pixels_of(width_of: Any) -> Any:
    def parse(text: str, width: int, height: int) -> list[list[float]]:
        width, height = width_of(width, height)
        return [
            [a * width / 1000, b * height / 1000, c * width / 1000, d * height / 1000] for a, b, c, d in every(text)
        ]

    return parse


@pytest.mark.parametrize(
    ("parse", "identifier"),
    [
        (lambda text: every(text)[:1], "E04"),
        (lambda text: [], "E03"),
        (lambda text: every(text) if "<box>" in text else [], "E03"),
        (lambda text: [[b, a, d, c] for a, b, c, d in every(text)], "E17"),
        (lambda text: [[a, b, c - a, d - b] for a, b, c, d in every(text)], "E17"),
        (pixels_of(lambda width, height: (0.8 * width, 0.9 * height)), "E14"),
        (lambda text: every(text)[0]["bbox"], "E03"),  # type: ignore[call-overload]  raises TypeError
    ],
)
def test_wrong_parsers_are_named(parse: Any, identifier: str) -> None:
    said = look(**WAY, parse=parse)
    assert names(said)[0] == identifier
    assert "target   cup<|box_start|>(" in said["finding"][0]["evidence"]


def test_pixels_of_the_resized_picture() -> None:
    resized = pixels_of(lambda width, height: (round(width / 28) * 28, round(height / 28) * 28))
    assert names(look(**WAY, parse=resized)) == ["E14"]
    assert names(look(**WAY, parse=pixels_of(lambda width, height: (width, height)))) == []


def test_a_decode_that_deletes_what_the_parser_needs(tiny_processor: Any) -> None:
    tokenizer = tiny_processor.tokenizer

    def parse(text: str) -> list[list[int]]:
        inside = re.findall(r"<\|box_start\|>(.*?)<\|box_end\|>", text)
        return [box for one in inside for box in every(one)]

    whole = {**WAY, "processor": tiny_processor, "parse": parse}
    good = look(**whole, decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False))
    assert names(good) == []
    bad = look(**whole, decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
    assert names(bad) == ["E03", "E05"]
    assert "decoded  cup(" in bad["finding"][0]["evidence"]
    assert names(look(**whole, settings={"serve": {"skip_special_tokens": True}})) == ["E05"]


def test_room_for_answers(tiny_processor: Any) -> None:
    common = {**WAY, "processor": tiny_processor}
    assert names(look(**common, settings={"max_new_tokens": 20})) == ["E06"]
    assert names(look(**common, settings={"max_new_tokens": 400})) == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"do_sample": True}, ["E13"]),
        ({"temperature": 0.7}, ["E13"]),
        ({"do_sample": False, "temperature": 0.7}, []),
        ({"base_max_pixels": 50176, "max_pixels": 1003520}, ["E08"]),
        ({"base": {"user_prompt": "Where?"}, "eval": {"user_prompt": "Find every cup."}}, ["E08"]),
        ({"base_max_pixels": 50176, "max_pixels": 50176}, []),
    ],
)
def test_settings(settings: dict[str, Any], expected: list[str]) -> None:
    assert names(look(settings=settings)) == expected


def write_run(folder: Path, log: list[dict[str, Any]], **predictions: Any) -> Path:
    checkpoint = folder / "checkpoint-100"
    checkpoint.mkdir(parents=True)
    state = {"global_step": 100, "max_steps": 100, "save_steps": 50, "eval_steps": 50, "log_history": log}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    for name, change in predictions.items():
        rng = np.random.default_rng(1)
        lines = []
        for i in range(30):
            x, y, w, h = *rng.uniform(0, 500, 2), *rng.uniform(100, 400, 2)
            box = np.asarray([x, y, x + w, y + h])
            text = "; ".join(str([round(float(one)) for one in found]) for found in change(box))
            lines.append(json.dumps({"id": i, "text": text, "gt_boxes": [box.tolist()], "width": 1000, "height": 1000}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


LEARNS = [{"step": 10 * i, "loss": 2.0 / i, "grad_norm": 1.0} for i in range(1, 11)]
LEARNS += [{"step": 50, "eval_loss": 0.6}, {"step": 100, "eval_loss": 0.4}]


def test_a_run_that_is_fine(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    run = write_run(
        tmp_path, LEARNS, tuned=lambda box: [box + rng.normal(0, 8, 4)], base=lambda box: [box + rng.normal(0, 70, 4)]
    )
    said = look(run_dir=run)
    assert names(said) == []
    told = {one["id"]: one["figures"] for one in said["checked"]}
    assert "10 training losses from 2.000 to 0.200" in told["O01"]
    assert "mean best IoU" in told["D01"]


@pytest.mark.parametrize(
    ("change", "identifier"),
    [
        (lambda box: [box[[1, 0, 3, 2]]], "D01"),
        (lambda box: [box * 0.6], "D03"),
        (lambda box: [box] * 5, "E07"),
    ],
)
def test_what_answers_show(tmp_path: Path, change: Any, identifier: str) -> None:
    assert names(look(run_dir=write_run(tmp_path, LEARNS, predictions=change)))[0] == identifier


def test_two_models_that_are_one(tmp_path: Path) -> None:
    run = write_run(tmp_path, LEARNS, base=lambda box: [box + 30], tuned=lambda box: [box + 30])
    assert "E16" in names(look(run_dir=run))


def test_a_frozen_run(tmp_path: Path) -> None:
    frozen = [{"step": 50 * i, "eval_loss": 1.234567} for i in range(1, 5)] + [
        {"step": i, "loss": 1.2} for i in range(9)
    ]
    assert names(look(run_dir=write_run(tmp_path, frozen)))[:2] == ["O10", "M01"]


def test_manifests_that_differ(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    for name, pixels in (("base", 50176), ("tuned", 1003520)):
        write_run(tmp_path / name, LEARNS, predictions=lambda box: [box + rng.normal(0, 60, 4)])
        manifest = {"max_pixels": pixels, "prompt": "Find.", "model": name, "mean_iou": 0.2}
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
    said = look(run_dir=tmp_path)
    assert names(said)[0] == "E08"
    assert said["finding"][0]["evidence"] == "max_pixels: base/predictions 50176, tuned/predictions 1003520"


def test_few_pictures_tell_nothing_apart(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    run = write_run(
        tmp_path, LEARNS, a=lambda box: [box + rng.normal(0, 40, 4)], b=lambda box: [box + rng.normal(0, 45, 4)]
    )
    said = look(run_dir=run)
    assert names(said) == ["E11"]
    assert "30 pictures, mean best IoU" in said["finding"][0]["evidence"]

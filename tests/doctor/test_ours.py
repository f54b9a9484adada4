"""Our own pipeline as a subject: on drawn packages it gets a clean bill, and a misread file does not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vlmdet.boxes import Boxes
from vlmdet.config import find_recipe, load_settings
from vlmdet.data.readers import open_dataset
from vlmdet.data.synthetic.packages import write_drawn_set
from vlmdet.doctor import Finding, Report, ours
from vlmdet.doctor.ours import examine_before, load_object, our_metric
from vlmdet.errors import ConfigError
from vlmdet.models.loader import load_processor
from vlmdet.records import DetectionDataset


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> DetectionDataset:
    return open_dataset(str(write_drawn_set(tmp_path_factory.mktemp("drawn") / "set", train=40, val=8, test=8, seed=0)))


def examined(dataset: DetectionDataset) -> Any:
    processor = load_processor("tiny", min_pixels=None, max_pixels=None)
    return examine_before(dataset, load_settings(find_recipe("tiny")), processor, model_type="qwen2_vl", timeout=60)


def test_a_clean_bill(drawn: DetectionDataset) -> None:
    report = examined(drawn)
    assert [one for one in report.findings if one.severity > 1] == []
    assert {"D01", "D09", "D12", "C02", "T03", "L01", "L10", "V05"} <= {one.id for one in report.checked}
    assert not [one for one in report.not_run if "itself failed" in one.needs]


def test_boxes_on_the_wrong_axes(drawn: DetectionDataset) -> None:
    turned = {
        name: [replace(one, boxes=Boxes(one.boxes.xyxy[:, [1, 0, 3, 2]])) for one in samples]
        for name, samples in drawn.splits.items()
    }
    report = examined(replace(drawn, splits=turned))
    assert report.findings[0].id == "D01" and report.worst == 4


def test_our_metric_on_boxes_and_dicts() -> None:
    truths = [[[0, 0, 10, 10], [20, 20, 40, 40]]]
    assert our_metric(truths, truths)["f1_50"] == 1.0
    assert our_metric([[[0, 0, 10, 10]]], truths)["f1_50"] == pytest.approx(2 / 3)
    named = [[{"bbox": [0, 0, 10, 10], "label": "a"}]]
    assert our_metric([[{"bbox": [0, 0, 10, 10], "label": "b"}]], named)["f1_50"] == 0.0


def test_user_code_that_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "raises.py").write_text("1 / 0")
    for text in ("train.py", "no.py:f", f"{tmp_path / 'raises.py'}:f"):
        with pytest.raises(ConfigError, match="--convert"):
            load_object(text, "--convert")


@pytest.mark.parametrize(("severity", "certainty", "refused"), [(4, 1.0, True), (4, 0.4, False), (3, 1.0, False)])
def test_what_is_silent_and_fatal_is_refused_before_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, severity: int, certainty: float, refused: bool
) -> None:
    one = Finding("D01", "swapped", severity, "data", "rows", "two\nlines", "cause", "fix", "see", certainty=certainty)
    monkeypatch.setattr(ours, "examine_before", lambda *_, **__: Report((one,), (), (), 0.1))
    told: list[str] = []

    def check(force: bool) -> Report:
        parts: Any = (None, None, None)
        return ours.check_before(*parts, model_type="qwen2_vl", folder=tmp_path, force=force, say=told.append)

    if refused:
        with pytest.raises(ConfigError, match=r"silent and fatal: D01 swapped.*--force"):
            check(force=False)
    else:
        check(force=False)
    assert check(force=True).findings == (one,)
    assert f"doctor: D01 swapped (severity {severity}): two lines" in told
    assert json.loads((tmp_path / "doctor.json").read_text())["findings"][0]["id"] == "D01"

"""`vlmdet compare` as a user types it: one document on stdout, no torch, one line for a mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vlmdet.cli import main


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    truth = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 200, "height": 100} for i in (1, 2)],
        "categories": [{"id": 1, "name": "cup"}],
        "annotations": [{"id": i, "image_id": i, "category_id": 1, "bbox": [0, 0, 80, 100]} for i in (1, 2)],
    }
    found = [{"image_id": i, "category_id": 1, "bbox": [0, 0, 80, 100], "score": i / 10} for i in (1, 2)]
    contents: dict[str, Any] = {"gt": truth, "both": found, "one": found[:1], "other": [{**found[0], "image_id": 9}]}
    contents["constant"] = [{**entry, "score": 1.0} for entry in found]
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return {name: str(tmp_path / f"{name}.json") for name in contents}


def test_json_is_one_document_and_no_torch_is_loaded(files: dict[str, str]) -> None:
    code = "import sys; from vlmdet.cli import main; code = main(sys.argv[1:]); print('torch' in sys.modules, file=sys.stderr)"
    arguments = ["compare", "--truth", files["gt"], files["both"], files["one"], "--json", "--resamples", "50"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    document = json.loads(done.stdout)
    assert done.stderr.splitlines()[-1] == "False"
    assert [run["name"] for run in document["runs"]] == ["both", "one"]
    assert list(document["runs"][0]["coco"]) == ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100"]
    assert document["runs"][0]["coco"]["AP"] == 1
    assert document["runs"][0]["coco"]["APs"] == -1
    recall = next(pair for pair in document["pairs"] if pair["metric"] == "recall_50")
    assert recall["difference"]["value"] == -0.5
    assert set(document["runs"][0]["metrics"]["f1_50"]) == {"value", "low", "high", "n"}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["both", "other"], "1 of 1 results cannot be used: 1 of images that the truth lacks"),
        (["both", "constant"], "--allow-constant-scores"),
    ],
)
def test_a_mistake_is_one_line(
    files: dict[str, str], capsys: pytest.CaptureFixture[str], names: list[str], words: str
) -> None:
    assert main(["compare", "--truth", files["gt"], *(files[name] for name in names)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1
    assert words in lines[0]


def test_flags_let_through_what_is_said(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", "--truth", files["gt"], files["constant"], files["other"], "--resamples", "50"]
    assert main([*arguments, "--allow-constant-scores", "--drop-unusable"]) == 0
    out = capsys.readouterr().out
    assert "left out (--drop-unusable)" in out
    assert "constant: 2 boxes in 100 orders" in out
    assert "constant scores; AP over orders of the boxes 1.000 to 1.000" in out


def test_a_result_file_needs_the_truth(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", files["both"], files["one"]]) == 2
    assert "--truth" in capsys.readouterr().err

"""`vlmdet doctor`: on a data set with our own pipeline, on the user's own code, on a run of any Trainer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.doctor.drawn import draw_rows
from vlmdet.cli import main

CODE = """
def convert(row):
    from PIL import Image
    image = Image.open(row["image"])
    width, height = image.size
    texts = []
    for a, b, c, d in row["objects"]["bbox"]:
        x1, y1, x2, y2 = (round(v * 1000 / s) for v, s in zip((a, b, c, d), (width, height, width, height)))
        texts.append(f"<|object_ref_start|>logo<|object_ref_end|><|box_start|>({FIRST}),({SECOND})<|box_end|>")
    answer = "".join(texts) or "none"
    return {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Find every logo."}]},
                         {"role": "assistant", "content": [{"type": "text", "text": answer}]}], "image": image}

def broken(row):
    return row["nothing"]
"""


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    lines = []
    for i, row in enumerate(draw_rows(16)):
        row["image"].save(tmp_path / f"{i}.png")
        lines.append(json.dumps({**row, "image": str(tmp_path / f"{i}.png")}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    good = CODE.replace("{FIRST}", "{x1},{y1}").replace("{SECOND}", "{x2},{y2}")
    bad = CODE.replace("{FIRST}", "{y1},{x1}").replace("{SECOND}", "{y2},{x2}")
    (tmp_path / "good.py").write_text(good)
    (tmp_path / "bad.py").write_text(bad)
    return tmp_path / "rows.jsonl"


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, list[dict[str, str]]]]:
    try:
        code = main(["doctor", *argv, "--json"])
    except SystemExit as stopped:
        code = int(str(stopped.code))
    return code, json.loads(capsys.readouterr().out)


def test_the_users_own_converter(rows: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = ("--box-format", "xyxy/pixel", "--stage", "data")
    page = ("--html", str(tmp_path / "page.html"))
    code, report = run(capsys, str(rows), "--convert", f"{tmp_path / 'bad.py'}:convert", *flags, *page)
    assert code == 1 and report["findings"][0]["id"] == "D01"
    assert "D01" in (tmp_path / "page.html").read_text()
    code, report = run(capsys, str(rows), "--convert", f"{tmp_path / 'good.py'}:convert", *flags, "--only", "D01,D09")
    assert code == 0 and report["findings"] == [] and [one["id"] for one in report["checked"]] == ["D01", "D09"]
    code, report = run(capsys, str(rows), "--convert", f"{tmp_path / 'good.py'}:broken", *flags)
    assert code == 1 and report["findings"][0]["id"] == "D15"
    assert "good.py" in report["findings"][0]["where"] and "KeyError" in report["findings"][0]["evidence"]


def test_a_name_that_is_not_there_is_one_line(rows: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", str(rows), "--convert", f"{tmp_path / 'good.py'}:conver"]) == 2
    assert "did you mean 'convert'?" in capsys.readouterr().err
    assert main(["doctor", str(rows), "--convert", "nowhere.py:f"]) == 2
    assert main(["doctor"]) == 2
    assert "nothing to examine" in capsys.readouterr().err


def test_logs_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = [{"step": 10 * i, "epoch": i, "loss": 2.0 - 0.001 * (i % 2)} for i in range(1, 9)]
    log += [{"step": 10 * i, "epoch": i, "eval_loss": 1.2345678} for i in range(1, 9)]
    state = json.dumps({"global_step": 80, "max_steps": 80, "log_history": log})
    (tmp_path / "checkpoint-80").mkdir()
    (tmp_path / "checkpoint-80" / "trainer_state.json").write_text(state)
    code, report = run(capsys, "--run", str(tmp_path))
    assert code == 1
    assert {one["id"] for one in report["findings"]} & {"O10", "M01"}


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing\n", encoding="utf-8")
    assert main(["doctor", "--run", str(tmp_path)]) == 2

"""`vlmdet eval` on a run made by hand: what it writes, what it does not do twice, and how stored rows are scored again."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vlmdet.cli import main
from vlmdet.config import load_settings, to_yaml
from vlmdet.data.synthetic.packages import write_drawn_set
from vlmdet.models.loader import load, make_contract

LIMITS = {"min_pixels": 4 * 28 * 28, "max_pixels": 16 * 28 * 28}
NO_TORCH = """
import sys
for name in ("torch", "transformers", "accelerate", "datasets", "trl", "peft"):
    sys.modules[name] = None  # importing it fails
from vlmdet.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def place(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run: five drawn test pictures, and a checkpoint that is the untrained base itself, as if fully tuned."""
    place = tmp_path_factory.mktemp("eval")
    write_drawn_set(place / "drawn", train=2, val=2, test=5)
    run = place / "runs" / "mine" / "001"
    best = run / "checkpoints" / "best"
    shutil.copytree(small_base, best)
    loaded = load(str(small_base), **LIMITS)
    contract = make_contract(
        loaded, labels=["nutrition-table"], codec="auto", box_order="raster", max_new_tokens=24, data_fingerprint="0"
    )
    contract.write(best)
    contract.write(run)
    settings = [f"data.source={place / 'drawn'}", "evaluation.max_new_tokens=24", "evaluation.batch_size=3"]
    settings += ["evaluation.resamples=50", "evaluation.max_errors=0.25"]
    (run / "config.yaml").write_text(to_yaml(load_settings(None, settings)))
    return place


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def rows_of(which: str) -> list[dict[str, Any]]:
    file = Path("runs/mine/001/eval/test") / which / "predictions.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def scored(place: Path) -> dict[str, Any]:
    """Run it once: the base under the contract and in its own words, and the tuned model."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.chdir(place)
        assert main(["eval", "runs/mine", "--base", "--json"]) == 0
    result: dict[str, Any] = json.loads(out.getvalue())
    return result


def test_base_native_and_tuned_are_scored(scored: dict[str, Any]) -> None:
    assert list(scored) == ["base", "base_native", "tuned", "difference", "difference_to_native"]
    for which in ("base", "base_native", "tuned"):
        folder = Path("runs/mine/001/eval/test") / which
        names = {path.name for path in folder.iterdir()}
        assert {"contract.json", "predictions.jsonl", "results.json", "per_class.csv", "matches.jsonl"} <= names
        results = json.loads((folder / "results.json").read_text())
        assert results["figures"] == scored[which]
        assert results["meta"]["n"] == 5 and results["meta"]["split"] == "test"
        assert results["meta"]["scores"] == "token_probability" and results["meta"]["self_test"]
        assert results["meta"]["prompt_version"] == {"base_native": "native-1"}.get(which, "detect-1")
    asked = {
        which: json.loads((Path("runs/mine/001/eval/test") / which / "contract.json").read_text())
        for which in ("base", "base_native", "tuned")
    }
    assert asked["base"] == asked["tuned"]
    assert asked["base_native"]["user_prompt"] == "Detect the bounding box of every nutrition-table in this image."
    assert asked["base_native"]["max_pixels"] == asked["base"]["max_pixels"]
    assert rows_of("base") == [  # the same weights and the same question: the same answers, but for the clock
        {**row, "ms": other["ms"]} for row, other in zip(rows_of("tuned"), rows_of("base"), strict=True)
    ]


def test_the_comparison_of_the_split_is_of_what_is_there(scored: dict[str, Any], place: Path, tmp_path: Path) -> None:
    file = Path("runs/mine/001/eval/test/comparison.json")
    pairs = json.loads(file.read_text())["pairs"]
    assert {(pair["a"], pair["b"]) for pair in pairs} == {("base", "tuned"), ("base_native", "tuned")}
    copy = tmp_path / "copy"
    shutil.copytree("runs/mine/001", copy, symlinks=True)
    assert main(["eval", str(copy), "--limit", "3"]) == 0  # fewer pictures than the base was scored on
    assert not (copy / "eval" / "test" / "comparison.json").exists()


def test_the_same_command_asks_nothing_twice_unless_told(
    scored: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vlmdet.models import inference

    calls = []
    real = inference.decode

    def decode(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(inference, "decode", decode)
    assert main(["eval", "runs/mine", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tuned"] == scored["tuned"]
    assert not calls
    assert main(["eval", "runs/mine", "--json", "--new", "--batch-size", "4"]) == 0
    assert json.loads(capsys.readouterr().out)["tuned"] == scored["tuned"]
    assert len(calls) == 2  # five pictures, four at once


def test_stored_rows_are_scored_again_without_torch(scored: dict[str, Any], tmp_path: Path) -> None:
    file = Path("runs/mine/001/eval/test/tuned/predictions.jsonl")
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, "eval", "--from", str(file), "--out", str(tmp_path / "again"), "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)
    assert {name: figure["value"] for name, figure in again.items()} == {
        name: figure["value"] for name, figure in scored["tuned"].items()
    }
    meta, before = (
        json.loads((folder / "results.json").read_text())["meta"] for folder in (tmp_path / "again", file.parent)
    )
    assert {key: meta[key] for key in before if key not in ("name", "resamples")} == {
        key: before[key] for key in before if key not in ("name", "resamples")
    }
    assert (meta["name"], meta["scored_from"], meta["resamples"]) == ("again", str(file), 1000)


def test_what_cannot_be_done_is_said_in_a_line(
    scored: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lonely = tmp_path / "predictions.jsonl"
    shutil.copy("runs/mine/001/eval/test/tuned/predictions.jsonl", lonely)
    for words, said in (
        (["--from", str(lonely)], "--classes"),
        ([], "eval needs a RUN"),
        (["runs/mine", "--from", str(lonely)], "not both"),
        (["runs/mine", "--engine", "openai"], "--served-name"),
        (["runs/mine", "--limit", "-1"], "--limit -1"),
        (["runs/mine", "--allow", "template"], "did you mean 'template_sha256'?"),
        (["--from", str(lonely), "--allow", "labels"], "--allow is for a RUN"),
        (["runs/mine", "--max-errors", "1.5"], "evaluation.max_errors"),
    ):
        assert main(["eval", *words]) == 2
        error = capsys.readouterr().err
        assert said in error and len(error.splitlines()) == 1
    assert main(["eval", "--from", str(lonely), "--classes", "nutrition-table"]) == 0


def test_constrained_answers_lie_beside_the_plain_ones(
    scored: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = rows_of("tuned")
    assert main(["eval", "runs/mine", "--constrain", "--scores", "none", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result) == ["tuned_constrained"]
    assert rows_of("tuned") == plain
    for row in rows_of("tuned_constrained"):
        assert row["scores"] is None and not row["truncated"]
        assert row["status"] in ("ok", "none") and not row["problems"]
        assert set(row["labels"]) <= {"nutrition-table"}


def test_predict_scores_boxes_by_drawn_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    pictures = []
    for number in range(4):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (90, 60), "white").save(path)
        pictures.append(str(path))
    words = ["predict", *pictures, "--model", "runs/mine", "--out", str(tmp_path / "drawn"), "--scores", "consistency"]
    assert main([*words, "--samples", "1"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 4
    for row in rows:
        assert row["score_source"] == "consistency" and len(row["scores"]) == len(row["boxes"])
        assert set(row["scores"]) <= {0.0, 1.0}


def test_a_field_of_the_contract_that_may_differ_is_named_told_and_recorded(
    scored: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree("runs/mine/001", copy, symlinks=True)
    own = json.loads((copy / "contract.json").read_text())
    for folder in (copy, copy / "checkpoints" / "best"):
        (folder / "contract.json").write_text(json.dumps(own | {"codec_version": "qwen2_vl-0", "user_prompt": "Old?"}))
    assert main(["eval", str(copy), "--allow", "codec_version"]) == 2
    error = capsys.readouterr().err
    assert "user_prompt was 'Old?'" in error and "codec_version was" not in error
    named = error.split("or pass ")[1].split()  # what the refusal says is what the command takes
    assert main(["eval", str(copy), "--allow", "codec_version", *named, "--limit", "2"]) == 0
    assert "tuned: --allow codec_version: was 'qwen2_vl-0', now 'qwen2_vl-1'" in capsys.readouterr().out
    meta = json.loads((copy / "eval/test/tuned/results.json").read_text())["meta"]
    assert meta["allow"] == {
        "codec_version": {"trained": "qwen2_vl-0", "now": "qwen2_vl-1"},
        "user_prompt": {"trained": "Old?", "now": own["user_prompt"]},
    }
    assert (meta["codec"], meta["user_prompt"]) == ("qwen2_vl-1", own["user_prompt"])
    asked = json.loads((copy / "eval/test/tuned/contract.json").read_text())
    assert asked["user_prompt"] == own["user_prompt"]


def test_predict_looks_for_other_classes_where_that_is_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    Image.new("RGB", (90, 60), "white").save(tmp_path / "0.png")
    words = ["predict", str(tmp_path / "0.png"), "--model", "runs/mine", "--out", str(tmp_path), "--classes", "cup"]
    assert main(words) == 2
    named = capsys.readouterr().err.split("or pass ")[1].split()
    assert named == ["--allow", "user_prompt", "--allow", "labels"]
    assert main([*words, *named]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["allow"]["labels"] == {"trained": ["nutrition-table"], "now": ["cup"]}
    assert "--allow labels: was ['nutrition-table'], now ['cup']" in shown.err

"""Runs and result files against each other: what is paired, what is refused, what is written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from vlmdet.contract import Contract
from vlmdet.errors import ConfigError, ContractError, DataError
from vlmdet.evaluation.compare import paired_difference
from vlmdet.evaluation.comparison import compare_entries, format_document, read_entries, write_comparison
from vlmdet.evaluation.files import write_predictions
from vlmdet.evaluation.metrics import FORMULAS

BOX = [0.0, 0.0, 0.4, 1.0]
CONTRACT = Contract(
    system_prompt="", user_prompt="find", template_sha256="t", codec="qwen2_vl", codec_version="1", min_pixels=784,
    max_pixels=50176, size_factor=28, box_order="raster", labels=("cup",), base_model="tiny", base_fingerprint="b",
    data_fingerprint="d", decoding={"max_new_tokens": 256}, versions={},
)  # fmt: skip


def side(folder: Path, make_row: Any, found: Any, contract: Contract | None = CONTRACT, **fields: Any) -> str:
    """Write a run of 12 pictures with one true box each; it is found on those in `found`."""
    rows = [make_row(f"{i:02}", truth=[BOX], boxes=[BOX] if i in found else []) | fields for i in range(12)]
    write_predictions(folder / "predictions.jsonl", rows)
    if contract:
        contract.write(folder)
    return str(folder)


def compare(sources: list[str], truth: Path | None = None, **settings: Any) -> dict[str, Any]:
    entries, labels = read_entries(sources, truth=truth)
    return compare_entries(entries, labels_asked=labels, resamples=200, **settings)


def test_all_against_the_first_or_all_pairs(make_row: Any, tmp_path: Path) -> None:
    sources = [side(tmp_path / name, make_row, range(k)) for name, k in (("a", 3), ("b", 9), ("c", 9))]
    document = compare(sources)
    assert [run["name"] for run in document["runs"]] == ["a", "b", "c"]
    assert {(pair["a"], pair["b"]) for pair in document["pairs"]} == {("a", "b"), ("a", "c")}
    of = {(pair["b"], pair["metric"]): pair for pair in document["pairs"]}
    assert {metric for _, metric in of} == set(FORMULAS)
    assert of["b", "recall_50"]["difference"]["value"] == 0.5
    assert of["b", "recall_50"]["separable"]
    document = compare(sources, all_pairs=True)
    last = next(p for p in document["pairs"] if (p["a"], p["b"], p["metric"]) == ("b", "c", "f1_50"))
    assert (last["difference"]["value"], last["separable"]) == (0, False)
    assert "not separable" in format_document(document)
    json.dumps(document, allow_nan=False)


def test_several_figures_at_once_are_those_one_by_one(random_rows: Any) -> None:
    from vlmdet.evaluation.compare import paired_differences

    a, b = random_rows(seed=1), random_rows(seed=1)
    b[2] |= {"boxes": [], "labels": [], "status": "none"}
    b[5] |= {"boxes": [], "labels": [], "status": "error"}
    together = paired_differences(a, b, metrics=list(FORMULAS), labels_asked=["cup"], resamples=50)
    for metric in FORMULAS:
        assert together[metric] == paired_difference(a, b, metric=metric, labels_asked=["cup"], resamples=50)


def test_unfair_contracts_are_refused_by_field_and_flag(make_row: Any, tmp_path: Path) -> None:
    a = side(tmp_path / "a", make_row, range(3))
    b = side(tmp_path / "b", make_row, range(3), dataclasses.replace(CONTRACT, max_pixels=99_999))
    with pytest.raises(ContractError, match=r"a and b: .*max_pixels was 50176, now 99999.*--allow max_pixels"):
        compare([a, b])
    assert compare([a, b], allow=["max_pixels"])["pairs"]
    c = side(tmp_path / "c", make_row, range(3), dataclasses.replace(CONTRACT, decoding={"max_new_tokens": 8}))
    with pytest.raises(ContractError, match="decoding"):
        compare([a, c])


def test_other_pictures_are_refused(make_row: Any, tmp_path: Path) -> None:
    a = side(tmp_path / "a", make_row, range(3))
    write_predictions(tmp_path / "b" / "predictions.jsonl", [make_row("other", truth=[BOX])])
    with pytest.raises(DataError, match="different images"):
        compare([a, str(tmp_path / "b")])


def test_without_a_contract_the_classes_must_be_named(make_row: Any, tmp_path: Path) -> None:
    a, b = (side(tmp_path / name, make_row, range(3), None) for name in "ab")
    with pytest.raises(ConfigError, match="--classes"):
        read_entries([a, b])
    assert read_entries([a, b], labels_asked=["cup"])[1] == ("cup",)


def test_one_side_is_no_comparison(make_row: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two sides"):
        read_entries([side(tmp_path / "a", make_row, range(3))])
    with pytest.raises(DataError, match="no such file"):
        read_entries([str(tmp_path / "none.json")] * 2, labels_asked=["cup"])


def documents(folder: Path, scores: list[float]) -> tuple[Path, list[str]]:
    """Write a truth of 12 pictures with one box each, and two result files: all found, and half of them."""
    images = [{"id": i, "file_name": f"{i:02}.png", "width": 200, "height": 100} for i in range(12)]
    truth = {
        "images": images,
        "categories": [{"id": 1, "name": "cup"}],
        "annotations": [{"id": i + 1, "image_id": i, "category_id": 1, "bbox": [0, 0, 80, 100]} for i in range(12)],
    }
    (folder / "gt.json").write_text(json.dumps(truth))
    paths = []
    for name, count in (("whole", 12), ("half", 6)):
        found = [
            {"image_id": i, "category_id": 1, "bbox": [0, 0, 80, 100], "score": scores[i % len(scores)]}
            for i in range(count)
        ]
        (folder / f"{name}.json").write_text(json.dumps(found))
        paths.append(str(folder / f"{name}.json"))
    return folder / "gt.json", paths


def test_result_files_about_a_truth(make_row: Any, tmp_path: Path) -> None:
    truth, paths = documents(tmp_path, [0.9, 0.2])
    own = side(tmp_path / "own", make_row, range(3), scores=None)
    document = compare([*paths, own], truth)
    whole, half, mine = document["runs"]
    assert (whole["coco"]["AP"], mine["coco"]) == (1, None)
    assert half["coco"]["AP"] == pytest.approx(51 / 101)
    assert [run["metrics"]["recall_50"]["value"] for run in (whole, half, mine)] == [1, 0.5, 0.25]
    lower = compare(paths, truth, min_score=0.5)
    assert [run["metrics"]["recall_50"]["value"] for run in lower["runs"]] == [0.5, 0.25]
    assert lower["runs"][0]["coco"]["AP"] == 1  # COCO's figures take every box
    # a text without scores keeps its boxes beside a detector with a threshold
    beside = compare([*paths, own], truth, min_score=0.5)
    assert [run["metrics"]["recall_50"]["value"] for run in beside["runs"]] == [0.5, 0.25, 0.25]
    mixed = side(tmp_path / "mixed", make_row, range(3), scores=None)
    file = Path(mixed) / "predictions.jsonl"
    file.write_text(file.read_text().replace('"scores": null', '"scores": [0.9]', 1))
    with pytest.raises(ConfigError, match="only some boxes have scores"):
        compare([*paths, mixed], truth, min_score=0.5)
    with pytest.raises(ConfigError, match="--truth"):
        read_entries(paths)


def test_constant_scores_need_the_flag(tmp_path: Path) -> None:
    truth, paths = documents(tmp_path, [1.0])
    with pytest.raises(ConfigError, match=r"whole: all 12 boxes have the score 1.*--allow-constant-scores"):
        compare(paths, truth)
    _, half = compare(paths, truth, allow_constant_scores=True)["runs"]
    assert half["coco_shuffled"]["AP"] == {key: pytest.approx(51 / 101) for key in ("minimum", "mean", "maximum")}
    assert half["coco"]["AP"] == pytest.approx(51 / 101)
    assert half["coco_shuffled"]["precision_times_recall"] == 0.5


def test_comparison_of_a_split(make_row: Any, tmp_path: Path) -> None:
    for name, k in (("base", 2), ("base_native", 4), ("tuned", 10)):
        side(tmp_path / name, make_row, range(k))
    document = json.loads(write_comparison(tmp_path, labels_asked=["cup"], resamples=100).read_text())
    assert [run["name"] for run in document["runs"]] == ["base", "tuned", "base_native"]
    assert {(pair["a"], pair["b"]) for pair in document["pairs"]} == {("base", "tuned"), ("base_native", "tuned")}
    (tmp_path / "tuned" / "predictions.jsonl").unlink()
    with pytest.raises(DataError, match="not both base and tuned"):
        write_comparison(tmp_path, labels_asked=["cup"])

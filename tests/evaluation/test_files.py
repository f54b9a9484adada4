"""Files of an evaluation: there and back, and every broken line with its place."""

from __future__ import annotations

import csv
import json

import pytest

from vlmdet.errors import DataError
from vlmdet.evaluation.files import read_predictions, write_evaluation, write_predictions
from vlmdet.evaluation.metrics import per_image
from vlmdet.evaluation.results import list_matches, summarise

LEFT = [0.0, 0.0, 0.4, 1.0]


def test_there_and_back(tmp_path, make_row):
    rows = [
        make_row("a", truth=[LEFT], boxes=[LEFT, [0.1, 1 / 3, 0.7, 0.9]], labels=["cup", None]),
        make_row("é 水 \n\t\"'\\ \u2028 \x00 😀", truth=[LEFT], truth_labels=["<|im_end|>"], status="parse_failure"),
        {**make_row("c", status="error"), "error": "broken", "text": "half a pair: \ud800"},
    ]
    path = tmp_path / "deep" / "er" / "predictions.jsonl"
    write_predictions(path, rows)
    assert read_predictions(path) == rows
    assert path.read_bytes().count(b"\n") == 3  # one line a row
    assert "水".encode() in path.read_bytes()  # readable
    assert [file.name for file in path.parent.iterdir()] == ["predictions.jsonl"]


def test_a_generator_and_no_rows(tmp_path, make_row):
    write_predictions(tmp_path / "a.jsonl", (make_row(id) for id in "xyz"))
    assert [row["id"] for row in read_predictions(tmp_path / "a.jsonl")] == ["x", "y", "z"]
    write_predictions(tmp_path / "b.jsonl", [])
    assert read_predictions(tmp_path / "b.jsonl") == []


def test_a_broken_off_run_leaves_the_old_file(tmp_path, make_row):
    path = tmp_path / "p.jsonl"
    write_predictions(path, [make_row("old")])

    def rows():
        yield make_row("new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_predictions(path, rows())
    assert [row["id"] for row in read_predictions(path)] == ["old"]
    assert [file.name for file in tmp_path.iterdir()] == ["p.jsonl"]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"id": "b", "wid', "not a line of JSON"),
        (b"\xff\xfe", "not a line of JSON"),
        (b"[1, 2]", "not a JSON object"),
        (b"[" * 100_000, "not a line of JSON"),
    ],
)
def test_a_line_that_is_no_row(tmp_path, make_row, line, what):
    path = tmp_path / "p.jsonl"
    write_predictions(path, [make_row("a")])
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(DataError, match=what) as caught:
        read_predictions(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        *[
            ({key: ...}, f"'{key}' is missing")
            for key in ("id", "width", "height", "truth", "boxes", "labels", "status", "truncated")
        ],
        ({"id": 7}, "'id'"),
        ({"status": "fine"}, "'status'"),
        ({"status": ["ok"]}, "'status'"),
        ({"width": 0}, "'width'"),
        ({"height": "9"}, "'height'"),
        ({"truncated": 0}, "'truncated'"),
        ({"boxes": [[0, 0, 1]], "labels": ["cup"]}, "'boxes'"),
        ({"boxes": [[0, 0, 1, "1"]], "labels": ["cup"]}, "'boxes'"),
        ({"boxes": None}, "'boxes'"),
        ({"labels": ["cup"]}, "'labels'"),
        ({"boxes": [LEFT], "labels": [3]}, "'labels'"),
        ({"scores": [0.5]}, "'scores'"),
        ({"boxes": [LEFT], "labels": ["cup"], "scores": ["0.5"]}, "'scores'"),
        ({"boxes": [LEFT], "labels": ["cup"], "scores": [True]}, "'scores'"),
        ({"truth": {"boxes": [], "labels": []}}, "'truth'"),
        ({"truth": {"boxes": [[1]], "labels": ["cup"], "ignore": [False]}}, "'truth.boxes'"),
        ({"truth": {"boxes": [LEFT], "labels": [None], "ignore": [False]}}, "'truth.labels'"),
        ({"truth": {"boxes": [LEFT], "labels": ["cup"], "ignore": []}}, "'truth.ignore'"),
        ({"truth": {"boxes": [LEFT], "labels": ["cup"], "ignore": [0]}}, "'truth.ignore'"),
    ],
)
def test_a_row_that_cannot_be_scored(tmp_path, make_row, change, what):
    broken = {key: value for key, value in {**make_row("b"), **change}.items() if value is not ...}
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(make_row("a")) + "\n\n" + json.dumps(broken) + "\n")  # an empty line counts as a line
    with pytest.raises(DataError) as caught:
        read_predictions(path)
    assert str(caught.value).startswith(f"{path}:3: {what}")
    with pytest.raises(DataError, match=what):  # and it is not written either
        write_predictions(tmp_path / "q.jsonl", [broken])
    assert not (tmp_path / "q.jsonl").exists()


def test_nan_is_no_number(tmp_path, make_row):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(make_row("a", boxes=[[0, 0, 1, float("nan")]])) + "\n")
    with pytest.raises(DataError, match="NaN is not a number"):
        read_predictions(path)
    path.write_text(json.dumps(make_row("a", boxes=[[0, 0, 1, 1]])).replace("[0, 0, 1, 1]", "[0, 0, 1, 1e999]") + "\n")
    with pytest.raises(DataError, match="finite"):
        read_predictions(path)


def test_no_file(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_predictions(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="directory"):
        read_predictions(tmp_path)


def write_all(folder, rows, meta, asked=("cup",)):
    results = summarise(rows, labels_asked=asked, resamples=100, meta=meta)
    images, matches = per_image(rows, labels_asked=asked), list_matches(rows, labels_asked=asked)
    write_evaluation(folder, results, images=images, matches=matches)
    return results


def test_an_evaluation(tmp_path, make_row):
    rows = [make_row("a,1", truth=[LEFT], boxes=[LEFT]), make_row('b"2', truth=[LEFT])]
    meta = {"split": "val", "max_pixels": 50176, "labels": ["cup"], "dtype": None}
    folder = tmp_path / "val" / "base"
    results = write_all(folder, rows, meta)
    names = ["matches.jsonl", "per_class.csv", "per_image.csv", "results.csv", "results.json"]
    assert sorted(file.name for file in folder.iterdir()) == names

    assert json.loads((folder / "results.json").read_text()) == results
    figures = results["figures"]
    assert (folder / "results.json").read_text().count('\n    "') == sum(
        len(part) for part in results.values() if isinstance(part, dict)
    )  # one line an entry

    with (folder / "results.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert list(row)[:4] == list(meta)
    assert (row["split"], row["max_pixels"], row["labels"], row["dtype"]) == ("val", "50176", '["cup"]', "")
    assert float(row["recall_50"]) == 0.5  # one of two
    assert (row["recall_50_n"], row["correct_empty_rate"], row["correct_empty_rate_n"]) == ("2", "", "0")
    assert float(row["recall_50_high"]) == figures["recall_50"]["high"]
    assert len(row) == len(meta) + 4 * len(figures)

    with (folder / "per_image.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert first == {
        "id": "a,1", "status": "ok", "n_truth": "1", "n_pred": "1", "tp": "1", "fp": "0", "fn": "0",
        "mean_best_iou": "1.0", "f1": "1.0",
    }  # fmt: skip
    assert (second["id"], second["fn"], second["f1"]) == ('b"2', "1", "0.0")

    lines = [json.loads(line) for line in (folder / "matches.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["a,1", 'b"2']
    assert lines[0]["predictions"] == [{"kind": "hit", "iou": 1.0, "truth": 0}]


def test_classes(tmp_path, make_row):
    rows = [
        make_row("a", truth=[LEFT], truth_labels=["=cup,\n"], boxes=[LEFT, LEFT], labels=["=cup,\n", "never asked"]),
        make_row("b", truth=[LEFT], truth_labels=["dog \ud800"]),
        make_row("c"),
    ]
    write_all(tmp_path, rows, {}, asked=["=cup,\n", "dog \ud800"])
    with (tmp_path / "per_class.csv").open(newline="") as file:
        everything, cup, dog = csv.DictReader(file)
    assert (everything["class"], cup["class"], dog["class"]) == ("all", "=cup,\n", "dog \\ud800")
    found = [tuple(row[name] for name in ("images", "instances", "predicted")) for row in (everything, cup, dog)]
    assert found == [("2", "2", "2"), ("1", "1", "1"), ("1", "1", "0")]
    assert [float(row["recall_50"]) for row in (everything, cup, dog)] == [0.5, 1, 0]
    assert (float(cup["f1"]), float(cup["f1_low"]), float(cup["f1_high"])) == (1, 1, 1)
    assert dog["precision_50"] == ""


def test_no_rows(tmp_path):
    assert write_all(tmp_path, [], {})["figures"]["f1"]["value"] is None
    assert (tmp_path / "matches.jsonl").read_text() == ""
    assert json.loads((tmp_path / "results.json").read_text())["per_class"]["cup"]["instances"] == 0


def test_meta_may_not_hide_a_figure(tmp_path, make_row):
    with pytest.raises(DataError, match="'f1_n'"):
        write_all(tmp_path / "x", [make_row()], {"f1_n": 3})
    assert list(tmp_path.iterdir()) == []

"""Predictions keep the order of the samples; a picture that cannot be run is a row, and too many stop the run."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmdet.boxes import FRACTIONS, Boxes
from vlmdet.contract import Contract
from vlmdet.data.readers import open_dataset
from vlmdet.errors import DataError, ModelError
from vlmdet.evaluation.files import read_predictions
from vlmdet.evaluation.parts import header_of
from vlmdet.evaluation.predict import predict
from vlmdet.evaluation.results import summarise
from vlmdet.models.answers import Answer, Ask, RowError
from vlmdet.models.loader import load, make_contract
from vlmdet.records import Sample

TEXT = "<|object_ref_start|>sign<|object_ref_end|><|box_start|>(100,250),(500,{y2})<|box_end|>"


@pytest.fixture
def contract(small_base: Path) -> Contract:
    loaded = load(str(small_base), min_pixels=4 * 28 * 28, max_pixels=16 * 28 * 28)
    return make_contract(
        loaded, labels=["sign"], codec="qwen2_vl", box_order="raster", max_new_tokens=8, data_fingerprint="0"
    )


def engine(asks: Sequence[Ask]) -> Iterator[tuple[int, Answer | RowError]]:
    """Stand for a model whose answer states the picture's own width, and which takes the pictures from last to first."""
    for ask in reversed(asks):
        try:
            width = ask.sample.image.width
        except DataError as error:
            yield ask.index, RowError(str(error))
        else:
            yield ask.index, Answer(TEXT.format(y2=width), 20, 4, 9, False, 1.5)


def make(folder: Path, number: int, width: int = 0, height: int = 60) -> Sample:
    width = width or 300 + 10 * (number * 7 % 20)
    path = folder / f"{number}.png"
    Image.new("RGB", (width, height)).save(path)
    boxes = Boxes.from_array([[0.1, 0.2, 0.3, 0.4]], FRACTIONS, width, height)
    return Sample(str(number), path, width, height, boxes, ("sign",))


def test_each_row_is_of_its_own_picture_and_a_broken_one_is_an_error_row(tmp_path: Path, contract: Contract) -> None:
    samples = [make(tmp_path, number) for number in range(40)]
    samples[5].picture.write_bytes(b"no picture")  # type: ignore[union-attr]
    samples[9] = make(tmp_path, 9, width=2010, height=10)  # opens, but 201 times as long as wide
    rows = predict(engine, samples, contract=contract)
    assert [row["id"] for row in rows] == [sample.id for sample in samples]
    assert [row["id"] for row in rows if row["status"] == "error"] == ["5", "9"]
    assert rows[5]["boxes"] == [] and "5.png" in rows[5]["image"] and rows[5]["error"]
    assert "200 times" in rows[9]["error"]
    for sample, row in zip(samples, rows, strict=True):
        if row["status"] != "error":
            assert row["boxes"] == [pytest.approx([0.1, 0.25, 0.5, sample.width / 1000])]
            assert row["labels"] == ["sign"] and row["tokens"] == {"prompt": 20, "image": 4, "answer": 9}

    samples[6].picture.unlink()  # type: ignore[union-attr]
    with pytest.raises(DataError, match="3 of 40 pictures could not be run"):
        predict(engine, samples, contract=contract)


WRITER = """
import json, os, signal, sys
from pathlib import Path
from vlmdet.boxes import FRACTIONS, Boxes
from vlmdet.contract import Contract
from vlmdet.evaluation.parts import header_of
from vlmdet.evaluation.predict import predict
from vlmdet.evaluation.results import summarise
from vlmdet.models.answers import Answer
from vlmdet.records import Sample

folder, die_after = Path(sys.argv[1]), int(sys.argv[2])
samples = []
for number in range(12):
    boxes = Boxes.from_array([[0.1, 0.2, 0.3, 0.4]], FRACTIONS, 300, 60)
    samples.append(Sample(str(number), folder / f"{number}.png", 300 + number, 60, boxes, ("sign",)))

def engine(asks):
    print(*[ask.index for ask in asks])
    for done, ask in enumerate(asks):
        if done == die_after:
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        yield ask.index, Answer(f"text {ask.index}", 1, 1, 1, False, 1.0)

path, made_with = folder / "out" / "predictions.jsonl", json.loads(sys.argv[3])
predict(engine, samples, contract=Contract.read(folder), path=path, made_with=made_with)
"""


def write(folder: Path, die_after: int, made_with: str = "{}") -> tuple[int, list[int]]:
    """Predict 12 pictures in a process of its own; returns its exit code, and which pictures were asked about."""
    done = subprocess.run(
        [sys.executable, "-c", WRITER, str(folder), str(die_after), made_with],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode, [int(word) for word in done.stdout.split()]


def test_a_killed_prediction_goes_on_and_neither_repeats_nor_loses_a_row(tmp_path: Path, contract: Contract) -> None:
    contract.write(tmp_path)
    file = tmp_path / "out" / "predictions.jsonl"
    part = tmp_path / "out" / "predictions.jsonl.part"
    assert write(tmp_path, 5) == (-signal.SIGKILL, list(range(12)))
    assert not file.exists()
    with part.open("ab") as torn:
        torn.write(b'{"index": 5, "row": {"id": "5", "wid')  # what a process leaves that dies while it writes
    assert write(tmp_path, 4) == (-signal.SIGKILL, [5, 6, 7, 8, 9, 10, 11])
    assert write(tmp_path, 99) == (0, [9, 10, 11])
    assert not part.exists()
    assert [row["text"] for row in read_predictions(file)] == [f"text {number}" for number in range(12)]
    assert write(tmp_path, 99) == (0, [])  # all there already
    assert write(tmp_path, 99, '{"weights": "others"}') == (0, list(range(12)))  # not of these weights


def test_rows_of_another_contract_or_of_other_data_are_not_gone_on_with(tmp_path: Path, contract: Contract) -> None:
    samples = [make(tmp_path, number) for number in range(6)]
    path = tmp_path / "predictions.jsonl"
    asked: list[int] = []

    def stops(asks: Sequence[Ask]) -> Iterator[tuple[int, Answer | RowError]]:
        for number, result in enumerate(engine(asks)):
            if number == 3:
                raise ModelError("the server is gone")
            yield result

    def counts(asks: Sequence[Ask]) -> Iterator[tuple[int, Answer | RowError]]:
        asked.extend(ask.index for ask in asks)
        yield from engine(asks)

    with pytest.raises(ModelError):
        predict(stops, samples, contract=contract, path=path)
    figures = tmp_path / "results.json"
    figures.touch()
    predict(counts, samples, contract=contract, path=path)
    assert asked == [0, 1, 2]  # the engine takes them from last to first
    assert figures.exists()
    with pytest.raises(ModelError):  # under another contract the figures are of rows that are gone
        predict(stops, samples, contract=dataclasses.replace(contract, user_prompt="What?"), path=path)
    assert not figures.exists()
    other = dataclasses.replace(contract, user_prompt="Where?")
    asked.clear()
    predict(counts, samples, contract=other, path=path)
    assert asked == [0, 1, 2, 3, 4, 5]
    asked.clear()
    Image.new("RGB", (samples[0].width, 60), "red").save(tmp_path / "0.png")
    predict(counts, samples, contract=other, path=path)
    assert asked == [0, 1, 2, 3, 4, 5]


def test_rows_that_failed_are_asked_again_and_these_alone(tmp_path: Path, contract: Contract) -> None:
    samples = [make(tmp_path, number) for number in range(6)]
    path = tmp_path / "predictions.jsonl"
    asked: list[int] = []

    def odd_fail(asks: Sequence[Ask]) -> Iterator[tuple[int, Answer | RowError]]:
        for index, answer in engine(asks):
            yield index, answer if index % 2 == 0 else RowError("no answer in 120 s")

    def counts(asks: Sequence[Ask]) -> Iterator[tuple[int, Answer | RowError]]:
        asked.extend(ask.index for ask in asks)
        yield from engine(asks)

    with pytest.raises(DataError, match="3 of 6 pictures could not be run, 40% may; the first: no answer in 120 s"):
        predict(odd_fail, samples, contract=contract, path=path, max_errors=0.4)
    assert not path.exists()
    rows = predict(counts, samples, contract=contract, path=path)
    assert asked == [1, 3, 5]
    assert [row["status"] for row in rows] == ["ok"] * 6
    allowed = predict(odd_fail, samples, contract=contract, max_errors=0.5)
    assert [row["status"] for row in allowed] == ["ok", "error"] * 3
    assert allowed[1]["error"] == "no answer in 120 s" and allowed[1]["boxes"] == []


def test_processes_share_the_rows_and_each_gets_all(
    tmp_path: Path, contract: Contract, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes as threads: what they gather is exchanged at a barrier."""
    samples = [make(tmp_path, number) for number in range(7)]
    alone = predict(engine, samples, contract=contract)
    barrier, given, asked = threading.Barrier(2, timeout=60), [None, None], [[], []]
    environ = threading.local()
    monkeypatch.setattr("vlmdet.evaluation.predict.process", lambda: (environ.rank, 2))

    def gather(value: Any) -> list[Any]:
        given[environ.rank] = value
        barrier.wait()
        values = list(given)
        barrier.wait()
        return values

    def run(rank: int) -> list[dict[str, Any]]:
        environ.rank = rank

        def counts(asks: Sequence[Ask]) -> Iterator[tuple[int, Answer | RowError]]:
            asked[rank] += [ask.index for ask in asks]
            yield from engine(asks)

        return predict(counts, samples, contract=contract, path=tmp_path / "predictions.jsonl", gather=gather)

    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(run, range(2)))
    assert asked == [[0, 2, 4, 6], [1, 3, 5]]
    assert rows == [alone, alone]
    assert read_predictions(tmp_path / "predictions.jsonl") == alone
    assert sorted(path.name for path in tmp_path.glob("predictions*")) == ["predictions.jsonl", "predictions.made.json"]


def test_what_is_predicted_on_a_crowd_of_a_coco_set_is_no_mistake(tmp_path: Path, contract: Contract) -> None:
    """The engine finds (30, y) to (150, 45) on 300 x 60 pixels: inside of the first picture's crowd, on nothing of the second."""
    crowd = {"category_id": 1, "bbox": [0, 0, 180, 60], "iscrowd": 1}
    boxes = [{**crowd, "image_id": 1}, {"category_id": 1, "image_id": 2, "bbox": [200, 0, 60, 60], "iscrowd": 0}]
    images = [{"id": number, "file_name": f"{number}.png", "width": 300, "height": 60} for number in (1, 2)]
    document = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "sign"}]}
    (tmp_path / "set.json").write_text(json.dumps(document))
    for number in (1, 2):
        make(tmp_path, number, width=300)
    samples = list(open_dataset(tmp_path / "set.json").splits["train"])
    rows = predict(engine, samples, contract=contract, path=tmp_path / "out" / "predictions.jsonl")
    assert rows[0]["truth"] == {"boxes": [pytest.approx([0, 0, 0.6, 1])], "labels": ["sign"], "ignore": [True]}
    assert rows[1]["truth"]["ignore"] == [False]
    results = summarise(rows, labels_asked=["sign"], resamples=10)
    assert results["errors"]["background"]["count"] == 1  # of the second picture alone
    assert results["figures"]["precision_50"]["value"] == 0 and results["figures"]["precision_50"]["n"] == 2
    alone = summarise(rows[:1], labels_asked=["sign"], resamples=10)
    assert sum(error["count"] for error in alone["errors"].values()) == 0
    # the crowd counts in what stored rows are compared by
    other = [replace(samples[0], crowd=samples[0].crowd[:0], crowd_labels=()), samples[1]]
    assert header_of(contract, samples, {}) != header_of(contract, other, {})

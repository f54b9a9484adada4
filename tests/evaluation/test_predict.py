"""Predictions keep the order of the samples; a picture that cannot be run is a row, and too many stop the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from PIL import Image

from vlmdet.boxes import FRACTIONS, Boxes
from vlmdet.contract import Contract
from vlmdet.errors import DataError
from vlmdet.evaluation.predict import predict
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

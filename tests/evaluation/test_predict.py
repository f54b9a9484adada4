"""Predictions keep the order of the samples; a picture that cannot be run is a row, and too many stop the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmdet.boxes import FRACTIONS, Boxes
from vlmdet.errors import DataError
from vlmdet.evaluation.predict import predict
from vlmdet.models.inference import Answer
from vlmdet.models.loader import load, make_contract
from vlmdet.records import Sample

TEXT = "<|object_ref_start|>sign<|object_ref_end|><|box_start|>(100,250),(500,{y2})<|box_end|>"


@pytest.fixture
def run(small_base: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`predict` on a stand-in model whose answer states the picture's own width."""
    loaded = load(str(small_base), min_pixels=4 * 28 * 28, max_pixels=16 * 28 * 28)
    contract = make_contract(
        loaded, labels=["sign"], codec="qwen2_vl", box_order="raster", max_new_tokens=8, data_fingerprint="0"
    )

    def generate(model: Any, processor: Any, messages: Any, images: Any, **kwargs: Any) -> list[Answer]:
        return [Answer(TEXT.format(y2=image.width), 20, 4, 9, False, 1.5) for image in images]

    monkeypatch.setattr("vlmdet.evaluation.predict.generate_answers", generate)
    return lambda samples: predict(loaded.model, loaded.processor, samples, contract=contract, batch_size=4)


def make(folder: Path, number: int, width: int = 0, height: int = 60) -> Sample:
    width = width or 300 + 10 * (number * 7 % 20)
    path = folder / f"{number}.png"
    Image.new("RGB", (width, height)).save(path)
    boxes = Boxes.from_array([[0.1, 0.2, 0.3, 0.4]], FRACTIONS, width, height)
    return Sample(str(number), path, width, height, boxes, ("sign",))


def test_each_row_is_of_its_own_picture_and_a_broken_one_is_an_error_row(tmp_path: Path, run: Any) -> None:
    samples = [make(tmp_path, number) for number in range(40)]
    samples[5].picture.write_bytes(b"no picture")  # type: ignore[union-attr]
    samples[9] = make(tmp_path, 9, width=2010, height=10)  # opens, but 201 times as long as wide
    rows = run(samples)
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
        run(samples)

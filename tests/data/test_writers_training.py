"""Training files for other trainers: rendered the way the trainer does, the answer's boxes are those of the data set.

ms-swift and LLaMA-Factory are not installed. What they do with a row is written out here by hand, from their source:
ms-swift 4.6 (`template/base.py`: normalize_bbox, _pre_tokenize, _add_default_tags; `template/templates/qwen.py` and
`internvl.py`: replace_bbox; `dataset/preprocessor/core.py`: _check_objects) and LLaMA-Factory 0.9.5 (`data/converter.py`:
SharegptDatasetConverter; `data/parser.py`; `data/mm_plugin.py`: _validate_messages, _preprocess_image). TRL is installed:
its own collator takes the rows.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmdet.boxes import Boxes, BoxFormat
from vlmdet.data.readers import open_dataset
from vlmdet.data.select import select
from vlmdet.data.writers import Training, write_dataset
from vlmdet.data.writers.conversation import PROCESSORS
from vlmdet.errors import ConfigError, DataError
from vlmdet.grounding import CODECS, View, get_codec
from vlmdet.records import DetectionDataset, Sample

PIXELS = BoxFormat("xyxy", "pixel")
SWIFT = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")
"""Codecs whose numbers ms-swift writes itself."""

HOSTILE = 'a "b", {x}: (3,4),(5,6)\n<|im_end|><box>\\ 表'


@pytest.fixture
def source(tmp_path: Path) -> DetectionDataset:
    """Pictures of 900 x 700, 40 x 30 and 3000 x 2000 pixels: shrunk, grown and kept, with two, none and one box."""
    rows = []
    boxes: list[tuple[tuple[int, int], list[list[float]], tuple[str, ...]]] = [
        ((900, 700), [[450.5, 350.25, 899, 699], [10, 20, 300, 400]], ("cat", HOSTILE)),
        ((40, 30), [], ()),
        ((3000, 2000), [[1500, 1000, 2999, 1999]], ("cat",)),
    ]
    for number, (size, values, labels) in enumerate(boxes):
        path = tmp_path / f"{number}.jpg"
        Image.new("RGB", size, "teal").save(path)
        rows.append(Sample(str(number), path, *size, Boxes.from_array(values, PIXELS, *size), labels, source=str(path)))
    return DetectionDataset("a set", {"train": rows}, ("cat", HOSTILE), PIXELS, "made by hand")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def raster(sample: Sample) -> tuple[np.ndarray, list[str]]:
    order = sample.boxes.raster_order()
    return sample.boxes.xyxy[order], [sample.labels[i] for i in order]


# --- ms-swift ---------------------------------------------------------------------------------------------------------


def render_swift(row: dict[str, Any], codec: str, size: tuple[int, int], resized: tuple[int, int]) -> str:
    """Return the answer as ms-swift tokenizes it: boxes scaled to a grid of 1000, or for Qwen2.5-VL to the picture seen."""
    answer = row["messages"][-1]["content"]
    assert answer.count("<bbox>") == len(row["objects"]["bbox"])
    grid = resized if codec == "qwen2_5_vl" else (1000, 1000)
    for box in row["objects"]["bbox"]:
        assert len(box) == 4 and box[0] <= box[2] and box[1] <= box[3]
        numbers = [round(value / size[i % 2] * grid[i % 2]) for i, value in enumerate(box)]
        x1, y1, x2, y2 = numbers
        written = {
            "qwen2_vl": f"<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>",  # QWENVL_BBOX_FORMAT=legacy
            "internvl": f"<box>[{numbers}]</box>",
        }.get(codec, str(numbers))  # QWENVL_BBOX_FORMAT=new
        answer = answer.replace("<bbox>", written, 1)
    return answer


@pytest.mark.parametrize("codec", SWIFT)
def test_swift_rows_render_to_the_codecs_text(source: DetectionDataset, tmp_path: Path, codec: str) -> None:
    folder = write_dataset(source, tmp_path / "out", to="swift", training=Training(codec))
    rows = lines(folder / "train.jsonl")
    for row, sample in zip(rows, source.splits["train"], strict=True):
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        assert sum(message["content"].count("<image>") for message in row["messages"]) == len(row["images"]) == 1
        assert (folder / row["images"][0]).is_file() and not Path(row["images"][0]).is_absolute()
        assert set(row["objects"]) == {"ref", "bbox", "bbox_type"} and row["objects"]["bbox_type"] == "real"
        wanted, labels = raster(sample)
        assert row["objects"]["ref"] == labels
        size = (sample.width, sample.height)
        np.testing.assert_allclose(
            np.array(row["objects"]["bbox"]).reshape(-1, 4), wanted * np.tile(size, 2), atol=0.0051
        )
        resized = (round(size[0] / 28) * 28, round(size[1] / 28) * 28)
        text = render_swift(row, codec, size, resized)
        parsed = get_codec(codec).parse(text, View(*size, *resized))
        # InternVL's parser names its notation on every answer
        assert [one for one in parsed.problems if one.kind != "brackets"] == [] and parsed.labels == labels
        steps = np.tile(resized, 2) if codec == "qwen2_5_vl" else 1000
        assert (np.abs(parsed.boxes.xyxy - wanted) * steps <= 0.51).all()
        assert parsed.status == ("ok" if labels else "none")
    use = json.loads((folder / "conversion.json").read_text())["training"]["use"]
    assert any("ROOT_IMAGE_DIR" in line for line in use)


def test_swift_rows_of_other_families_carry_the_codecs_text(source: DetectionDataset, tmp_path: Path) -> None:
    for codec in sorted(set(CODECS) - set(SWIFT)):
        folder = write_dataset(source, tmp_path / codec, to="swift", training=Training(codec))
        for row, sample in zip(lines(folder / "train.jsonl"), source.splits["train"], strict=True):
            size = (sample.width, sample.height)
            parsed = get_codec(codec).parse(row["messages"][-1]["content"], View(*size, *size))
            wanted, labels = raster(sample)
            assert parsed.labels == labels
            np.testing.assert_allclose(parsed.boxes.xyxy, wanted, atol=0.0011)


def test_swift_files_open_again(source: DetectionDataset, tmp_path: Path) -> None:
    folder = write_dataset(source, tmp_path / "out", to="swift")
    again = open_dataset(folder).splits["train"]
    for row, sample in zip(again, source.splits["train"], strict=True):
        wanted, labels = raster(sample)
        assert (row.id, list(row.labels)) == (sample.id, labels)
        np.testing.assert_allclose(row.boxes.xyxy, wanted, atol=2e-4)


# --- LLaMA-Factory ----------------------------------------------------------------------------------------------------


def llamafactory_resize(image: Image.Image, low: int, high: int) -> tuple[int, int]:
    """What its Qwen2-VL plugin does to a picture before the processor sees it."""
    width, height = image.size
    if width * height > high:
        factor = math.sqrt(high / (width * height))
        width, height = int(width * factor), int(height * factor)
    if width * height < low:
        factor = math.sqrt(low / (width * height))
        width, height = int(width * factor), int(height * factor)
    return max(width, 28), max(height, 28)


@pytest.mark.parametrize("codec", sorted(PROCESSORS))
def test_llamafactory_numbers_are_those_of_the_picture_after_both_resizes(
    source: DetectionDataset, tmp_path: Path, codec: str
) -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    folder = write_dataset(source, tmp_path / "out", to="llamafactory", training=Training(codec))
    info = json.loads((folder / "dataset_info.json").read_text(encoding="ascii"))
    assert list(info) == ["vlmdet_train"]
    entry = info["vlmdet_train"]
    rows = json.loads((folder / entry["file_name"]).read_text(encoding="utf-8"))
    assert entry["formatting"] == "sharegpt"
    assert entry["columns"] == {"messages": "messages", "images": "images"}
    tags = entry["tags"]
    roles = [tags["system_tag"], tags["user_tag"], tags["assistant_tag"]]
    factor, low, high = PROCESSORS[codec]
    for row, sample in zip(rows, source.splits["train"], strict=True):
        assert [message[tags["role_tag"]] for message in row["messages"]] == roles
        texts = [message[tags["content_tag"]] for message in row["messages"]]
        assert [text.count("<image>") for text in texts] == [0, 1, 0] and len(row["images"]) == 1
        with Image.open(folder / row["images"][0]) as image:
            first = llamafactory_resize(image, 32 * 32, 768 * 768)
        height, width = smart_resize(first[1], first[0], factor=factor, min_pixels=low, max_pixels=high)
        parsed = get_codec(codec).parse(texts[2], View(sample.width, sample.height, width, height))
        wanted, labels = raster(sample)
        assert parsed.labels == labels and parsed.problems == []
        steps = np.tile((width, height), 2) if codec == "qwen2_5_vl" else 1000
        assert (np.abs(parsed.boxes.xyxy - wanted) * steps <= 0.5 + 1e-6).all()
    training = json.loads((folder / "conversion.json").read_text())["training"]
    assert (training["min_pixels"], training["max_pixels"]) == (1024, 589_824)


def test_llamafactory_pixel_limits_are_those_it_is_told(source: DetectionDataset, tmp_path: Path) -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    limits = {"min_pixels": 10_000, "max_pixels": 100_000}
    folder = write_dataset(source, tmp_path / "out", to="llamafactory", training=Training("qwen2_5_vl", **limits))
    row = json.loads((folder / "train.json").read_text(encoding="utf-8"))[2]
    first = llamafactory_resize(Image.new("RGB", (3000, 2000)), 10_000, 100_000)
    height, width = smart_resize(first[1], first[0], factor=28, min_pixels=3136, max_pixels=12_845_056)
    numbers = json.loads(row["messages"][2]["content"])[0]["bbox_2d"]
    assert numbers == [round(width / 2), round(height / 2), round(2999 / 3000 * width), round(1999 / 2000 * height)]


@pytest.mark.parametrize(("to", "file"), [("swift", "train.jsonl"), ("llamafactory", "train.json")])
def test_datasets_loads_the_files_as_both_trainers_do(
    source: DetectionDataset, tmp_path: Path, to: str, file: str
) -> None:
    import datasets

    folder = write_dataset(source, tmp_path / "out", to=to)
    rows = datasets.load_dataset("json", data_files=str(folder / file), cache_dir=str(tmp_path / "cache"))["train"]
    assert rows["id"][:] == ["0", "1", "2"]
    assert [[message["role"] for message in row["messages"]] for row in rows] == [["system", "user", "assistant"]] * 3


# --- TRL --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", sorted(PROCESSORS))
def test_trl_numbers_are_those_of_the_processors_picture(source: DetectionDataset, tmp_path: Path, codec: str) -> None:
    import pyarrow.parquet as pq
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    limits = {"min_pixels": 3136, "max_pixels": 200_704}
    folder = write_dataset(source, tmp_path / "out", to="trl", training=Training(codec, **limits))
    rows = pq.read_table(folder / "data/train-00000-of-00001.parquet").to_pylist()
    for row, sample in zip(rows, source.splits["train"], strict=True):
        height, width = smart_resize(sample.height, sample.width, factor=PROCESSORS[codec].factor, **limits)
        parsed = get_codec(codec).parse(
            row["completion"][0]["content"], View(sample.width, sample.height, width, height)
        )
        wanted, labels = raster(sample)
        assert parsed.labels == labels and parsed.problems == []
        steps = np.tile((width, height), 2) if codec == "qwen2_5_vl" else 1000
        assert (np.abs(parsed.boxes.xyxy - wanted) * steps <= 0.5 + 1e-6).all()


def test_trl_itself_takes_the_file(source: DetectionDataset, tmp_path: Path) -> None:
    """Its collator, the tiny base's processor: loss lies on the answer alone, and the picture's tokens are there."""
    import datasets
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    from vlmdet.models.loader import load_processor

    folder = write_dataset(source, tmp_path / "out", to="trl", training=Training("qwen2_vl", 3136, 50_176))
    rows = datasets.load_dataset("parquet", data_dir=str(folder / "data"), cache_dir=str(tmp_path / "cache"))["train"]
    processor = load_processor("tiny", min_pixels=3136, max_pixels=50_176)
    collator = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    batch = collator([dict(row) for row in rows])
    grids = batch["image_grid_thw"].tolist()
    for row, ids, labels, grid in zip(rows, batch["input_ids"], batch["labels"], grids, strict=True):
        learnt = processor.tokenizer.decode(labels[labels != -100])
        assert learnt.strip().removesuffix("<|im_end|>") == row["completion"][0]["content"]
        pictures = (ids == processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")).sum().item()
        assert pictures == math.prod(grid) // 4


def test_a_picture_that_the_processor_refuses_is_left_out_and_reported(tmp_path: Path) -> None:
    rows = []
    for name, size in (("good", (56, 56)), ("strip", (6000, 20))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
        rows.append(Sample(name, tmp_path / f"{name}.png", *size, Boxes.empty(), ()))
    both = DetectionDataset("a set", {"train": rows}, ("cat",), PIXELS, "")
    folder = write_dataset(both, tmp_path / "out", to="trl", max_problems=1)
    (problem,) = lines(folder / "problems.jsonl")
    assert (problem["id"], problem["kind"], problem["action"]) == ("strip", "too_long_image", "row_dropped")
    assert json.loads((folder / "conversion.json").read_text())["splits"] == {"train": {"images": 1, "boxes": 0}}


def test_trl_files_open_again(source: DetectionDataset, tmp_path: Path) -> None:
    folder = write_dataset(source, tmp_path / "out", to="trl")
    for row, sample in zip(open_dataset(folder).splits["train"], source.splits["train"], strict=True):
        assert (row.id, row.labels) == (sample.id, sample.labels)
        np.testing.assert_allclose(row.boxes.xyxy, sample.boxes.xyxy, atol=1e-7)


@pytest.mark.parametrize("to", ["swift", "llamafactory", "trl"])
@pytest.mark.parametrize("name", ["bccd", "coco128"])
def test_real_sets_keep_every_row_and_box(shared: Path, tmp_path: Path, name: str, to: str) -> None:
    import pyarrow.parquet as pq

    real = select(open_dataset(shared / "data" / name), limit=8)
    folder = write_dataset(real, tmp_path / "out", to=to)
    for split, samples in real.splits.items():
        if to == "swift":
            found = lines(folder / f"{split}.jsonl")
        elif to == "llamafactory":
            found = json.loads((folder / f"{split}.json").read_text(encoding="utf-8"))
        else:
            found = pq.read_table(folder / f"data/{split}-00000-of-00001.parquet").to_pylist()
        assert len(found) == len(samples)
        for row, sample in zip(found, samples, strict=True):
            boxes = len(sample.boxes)
            if to == "swift":
                assert row["messages"][2]["content"].count("<bbox>") == len(row["objects"]["bbox"]) == boxes
                continue
            answer = row["completion"][0]["content"] if to == "trl" else row["messages"][2]["content"]
            size = (sample.width, sample.height)
            assert len(get_codec("qwen2_vl").parse(answer, View(*size, *size)).boxes) == boxes


# --- what none of them can hold ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["swift", "llamafactory", "trl"])
@pytest.mark.parametrize("label", ["an <image>", "<bbox>", "<ref-object>", "<video>"])
def test_a_class_name_that_holds_a_trainers_tag_is_refused(tmp_path: Path, to: str, label: str) -> None:
    path = tmp_path / "a.jpg"
    Image.new("RGB", (56, 56)).save(path)
    rows = [Sample("a", path, 56, 56, Boxes.empty(), ())]
    one = DetectionDataset("a set", {"train": rows}, (label,), PIXELS, "")
    with pytest.raises(DataError, match="--rename"):
        write_dataset(one, tmp_path / "out", to=to)
    with pytest.raises(DataError, match="nothing to ask for"):
        write_dataset(DetectionDataset("a set", {"train": rows}, (), PIXELS, ""), tmp_path / "out", to=to)


def test_limits_for_a_layout_and_for_swift_are_refused(source: DetectionDataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="training files"):
        write_dataset(source, tmp_path / "out", to="coco", training=Training("qwen2_5_vl"))
    with pytest.raises(ConfigError, match="MAX_PIXELS"):
        write_dataset(source, tmp_path / "out", to="swift", training=Training(max_pixels=3136))

"""Raw rows and samples -> training rows -> Arrow and back."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from vlmdet.boxes import Boxes
from vlmdet.data.collators import restore_images_in_conversations
from vlmdet.data.dataset import (
    IMAGE_PLACEHOLDER,
    _has_image,
    build_messages,
    build_row,
    build_rows,
    conversation_features,
    convert_to_conversation_format,
    has_image,
    load_nutrition_tables,
)
from vlmdet.errors import ConfigError, DataError, ImageError
from vlmdet.records import Problem, Sample

ORIENTATION = 274


def picture_bytes(size: tuple[int, int] = (40, 20), *, turn: int | None = None, color: str = "red") -> bytes:
    buffer = io.BytesIO()
    exif = Image.Exif()
    if turn is not None:
        exif[ORIENTATION] = turn
    Image.new("RGB", size, color).save(buffer, format="JPEG", exif=exif)
    return buffer.getvalue()


def raw_row(
    *boxes: list[float], names: list[str] | None = None, image: Any = None, size: tuple[int, int] | None = None
) -> dict[str, Any]:
    row = {
        "image_id": "7",
        "image": Image.new("RGB", (40, 20)) if image is None else image,
        "objects": {
            "bbox": list(boxes),
            "category_id": [0] * len(boxes),
            "category_name": names or ["nutrition-table"] * len(boxes),
        },
    }
    return row if size is None else row | {"width": size[0], "height": size[1]}


def answer_of(row: dict[str, Any]) -> str:
    return row["messages"][-1]["content"][0]["text"]


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_three_boxes_in_raster_order_and_as_given() -> None:
    low, right, left = [0.6, 0.1, 0.9, 0.4], [0.1, 0.5, 0.3, 0.9], [0.1, 0.0, 0.3, 0.4]
    names = ["nutrition-table", "nutrition-table-text", "nutrition-table-small"]
    row = convert_to_conversation_format(raw_row(low, right, left, names=names))
    assert row["boxes"] == [[0.0, 0.1, 0.4, 0.3], [0.5, 0.1, 0.9, 0.3], [0.1, 0.6, 0.4, 0.9]]
    assert row["labels"] == ["nutrition-table-small", "nutrition-table-text", "nutrition-table"]
    assert answer_of(row) == (
        "<|object_ref_start|>nutrition-table-small<|object_ref_end|><|box_start|>(0,100),(400,300)<|box_end|>"
        "<|object_ref_start|>nutrition-table-text<|object_ref_end|><|box_start|>(500,100),(900,300)<|box_end|>"
        "<|object_ref_start|>nutrition-table<|object_ref_end|><|box_start|>(100,600),(400,900)<|box_end|>"
    )
    given = convert_to_conversation_format(raw_row(low, right, left, names=names), box_order="as_given")
    assert given["labels"] == names and given["boxes"][0] == [0.1, 0.6, 0.4, 0.9]
    with pytest.raises(ConfigError, match="did you mean 'raster'"):
        convert_to_conversation_format(raw_row(low), box_order="rastr")  # type: ignore[arg-type]


def test_no_box_is_answered_none() -> None:
    row = convert_to_conversation_format(raw_row())
    assert (answer_of(row), row["boxes"], row["labels"]) == ("none", [], [])


def test_unknown_category() -> None:
    with pytest.raises(DataError, match=r"row 7: unknown category 'nutrition-tabel'; did you mean 'nutrition-table'"):
        convert_to_conversation_format(raw_row([0, 0, 1, 1], names=["nutrition-tabel"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objects": None}, "must hold 'bbox'"),
        ({"objects": {"bbox": [[0, 0, 1, 1]], "category_name": []}}, "1 boxes but 0 category names"),
        ({"objects": {"bbox": [[0, 0, 1]], "category_name": ["nutrition-table"]}}, "rows of four numbers"),
        ({"objects": {"bbox": [[0, 0, 1, float("nan")]], "category_name": ["nutrition-table"]}}, "finite"),
        ({"objects": {"bbox": [[10, 20, 300, 400]], "category_name": ["nutrition-table"]}}, "fractions"),
        ({"image": None}, "no picture"),
        ({"image": {"path": None, "bytes": b""}}, "no picture"),
        ({"image": 5}, "is a int"),
    ],
)
def test_odd_rows_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        convert_to_conversation_format(raw_row([0, 0, 1, 1]) | change)
    assert str(caught.value).startswith("row 7: ") and "\n" not in str(caught.value)


def test_broken_pictures_are_named() -> None:
    for data in (picture_bytes((400, 400))[:-200], b"not a picture"):
        with pytest.raises(ImageError, match="row 7"):
            convert_to_conversation_format(raw_row([0, 0, 1, 1], image={"path": None, "bytes": data}))


def test_boxes_are_mended_aloud(caplog: pytest.LogCaptureFixture) -> None:
    flat, outside, good = [0.5, 0.5, 0.5, 0.9], [-0.1, 0.2, 0.4, 1.2], [0.5, 0.1, 0.9, 0.4]
    problems: list[Problem] = []
    row = convert_to_conversation_format(raw_row(flat, outside, good), problems=problems)
    assert row["boxes"] == [[0.2, 0.0, 1.0, 0.4], [0.1, 0.5, 0.4, 0.9]]
    assert [(p.kind, p.action) for p in problems] == [
        ("degenerate_box", "box_dropped"),
        ("box_outside", "box_clipped"),
    ]
    with caplog.at_level(logging.WARNING):
        convert_to_conversation_format(raw_row(flat, good))
    assert "row 7: degenerate_box, box_dropped" in caplog.text


def test_a_row_of_flat_boxes_does_not_become_a_row_without_objects() -> None:
    with pytest.raises(DataError, match="no box has an area"):
        convert_to_conversation_format(raw_row([0.5, 0.5, 0.5, 0.9]))


def test_has_image() -> None:
    assert has_image({"image": Image.new("RGB", (2, 2))})
    assert has_image({"image": {"path": "a.jpg", "bytes": None}})
    assert has_image({"images": [Image.new("RGB", (2, 2))] * 2})
    assert not has_image({"image": None})
    assert not has_image({})
    assert not has_image({"image": {"path": None, "bytes": None}})
    assert not has_image({"images": [Image.new("RGB", (2, 2)), None]})
    assert _has_image is has_image


# ---- EXIF -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", [1, 2, 3, 4, 5, 6, 7, 8])
def test_boxes_of_a_turned_picture_lie_on_what_they_marked(turn: int) -> None:
    """A white patch marked on the stored picture is under the box on the upright one, whatever the turn."""
    stored = np.zeros((80, 160, 3), dtype=np.uint8)
    stored[8:24, 32:80] = 255  # y 0.1 to 0.3, x 0.2 to 0.5 of the stored picture
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    buffer = io.BytesIO()
    Image.fromarray(stored).save(buffer, format="PNG", exif=exif)
    size = (160, 80) if turn >= 5 else None
    raw = {"path": None, "bytes": buffer.getvalue()}
    row = convert_to_conversation_format(raw_row([0.1, 0.2, 0.3, 0.5], image=raw, size=size))
    (messages,) = restore_images_in_conversations([row["messages"]], [row["image"]])
    upright = np.asarray(messages[1]["content"][0]["image"])
    height, width = upright.shape[:2]
    x1, y1, x2, y2 = np.rint(np.array(row["boxes"][0]) * [width, height, width, height]).astype(int)
    if turn >= 5:  # width and height say that the box belongs to the stored picture
        assert (height, width) == (160, 80)
        assert upright[y1:y2, x1:x2].min() == 255 and (upright == 255).sum() == 3 * (y2 - y1) * (x2 - x1)
    else:  # nothing says so: boxes are taken as upright
        assert row["boxes"] == [[0.2, 0.1, 0.5, 0.3]]


def test_boxes_stay_where_width_and_height_are_upright() -> None:
    raw = {"path": None, "bytes": picture_bytes((40, 20), turn=6)}
    row = convert_to_conversation_format(raw_row([0.1, 0.2, 0.3, 0.5], image=raw, size=(20, 40)))
    assert row["boxes"] == [[0.2, 0.1, 0.5, 0.3]]


def test_swapped_sides_without_a_turn_are_refused() -> None:
    with pytest.raises(DataError, match="has no EXIF turn"):
        convert_to_conversation_format(raw_row([0, 0, 1, 1], size=(20, 40)))


def test_an_opened_picture_is_turned_before_arrow_forgets_its_tag() -> None:
    opened = Image.open(io.BytesIO(picture_bytes((40, 20), turn=6)))
    row = convert_to_conversation_format(raw_row([0, 0, 1, 1], image=opened))
    assert row["image"].size == (20, 40)
    stored = datasets.Dataset.from_list([{"image": row["image"]}])
    assert stored[0]["image"].size == (20, 40)


# ---- Arrow ----------------------------------------------------------------------------------------------------------


def raw_dataset(count: int = 3) -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [
            raw_row(*[[0.1, 0.2, 0.5, 0.9]] * i, image={"path": None, "bytes": picture_bytes()})
            | {"image_id": str(i), "width": 40, "height": 20}
            for i in range(count)
        ]
    ).cast_column("image", datasets.Image())


def render(processor: Any, row: dict[str, Any]) -> str:
    messages_list = restore_images_in_conversations([row["messages"]], [row["image"]])
    return processor.apply_chat_template(messages_list, tokenize=False)[0]


@pytest.mark.parametrize("stated", [True, False], ids=["stated types", "guessed types"])
def test_rows_survive_map_and_a_save(qwen_processor: Any, tmp_path: Path, stated: bool) -> None:
    """With stated types every part of a message gets all keys; guessed ones differ between versions of `datasets`."""
    raw = raw_dataset()
    before = [convert_to_conversation_format(row) for row in raw]
    features = conversation_features() if stated else None
    mapped = raw.map(convert_to_conversation_format, remove_columns=raw.column_names, features=features)
    mapped.save_to_disk(tmp_path / "rows")
    loaded = datasets.load_from_disk(tmp_path / "rows")
    if stated:
        assert loaded[1]["messages"][1]["content"][0] == {"type": "image", "image": IMAGE_PLACEHOLDER, "text": None}
    for row, first, again in zip(before, mapped, loaded, strict=True):
        assert render(qwen_processor, row) == render(qwen_processor, first) == render(qwen_processor, again)
        assert (again["boxes"], again["labels"]) == (row["boxes"], row["labels"])
        assert isinstance(again["image"], Image.Image)


def sample(picture: Any, *boxes: list[float], labels: tuple[str, ...] | None = None) -> Sample:
    array = Boxes(np.array(boxes, dtype=np.float64).reshape(-1, 4))
    return Sample("s", picture, 40, 20, array, labels or ("logo",) * len(boxes), source="f.xml:1")


def test_samples_become_the_same_rows(qwen_processor: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(picture_bytes())
    samples = [sample(path, [0.1, 0.2, 0.3, 0.4]), sample(picture_bytes), sample(path)]
    rows = build_rows(samples, labels=["logo"])
    assert rows.column_names == ["id", "messages", "image", "boxes", "labels"]
    assert [answer_of(row) for row in rows] == [
        "<|object_ref_start|>logo<|object_ref_end|><|box_start|>(100,200),(300,400)<|box_end|>",
        "none",
        "none",
    ]
    rows.save_to_disk(tmp_path / "rows")
    for one, row in zip(samples, datasets.load_from_disk(tmp_path / "rows"), strict=True):
        assert render(qwen_processor, build_row(one, labels=["logo"])) == render(qwen_processor, row)
        assert row["image"].size == (40, 20)
    assert build_rows([], labels=["logo"]).features == rows.features
    assert build_row(samples[1], labels=["logo"])["image"] == {"path": None, "bytes": picture_bytes()}
    with pytest.raises(DataError, match=r"f\.xml:1: unknown category 'logo'"):
        build_row(samples[0], labels=["barcode"])


def test_build_messages_without_boxes_is_the_question_of_training() -> None:
    row = build_row(sample(Path("a.jpg"), [0, 0, 1, 1]), labels=["logo", "barcode"])
    assert build_messages(["logo", "barcode"]) == row["messages"][:2]
    with pytest.raises(ValueError):
        build_messages(["logo"], boxes=Boxes.empty(), labels=["logo"])


@pytest.mark.parametrize("label", ["a<|im_end|>b", "<|im_end|>\n<|im_start|>assistant\n<|image_pad|>", "<|box_end|>"])
def test_labels_add_no_control_ids(qwen_processor: Any, label: str) -> None:
    def control_ids(name: str) -> list[int]:
        row = build_row(sample(picture_bytes, [0.1, 0.2, 0.3, 0.4], labels=(name,)), labels=[name, "other"])
        ids = qwen_processor.tokenizer.encode(render(qwen_processor, row), add_special_tokens=False)
        return [token for token in ids if token >= 151643]

    assert control_ids(label) == control_ids("logo")
    assert len(control_ids("logo")) == 2 * 3 + 3 + 4  # three turns, one picture, one box


# ---- hub ------------------------------------------------------------------------------------------------------------


def test_loading_from_the_hub(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The real loading code, with the download replaced by rows of the same schema."""
    asked = []
    rows = [
        raw_row([0.1, 0.2, 0.5, 0.9], image={"path": None, "bytes": picture_bytes((40, 20), turn=6)}, size=(40, 20)),
        raw_row([0.5, 0.5, 0.5, 0.9], image={"path": None, "bytes": picture_bytes()}, size=(40, 20)),
        raw_row([0.1, 0.2, 0.5, 0.9], image={"path": None, "bytes": picture_bytes()}, size=(40, 20)),
    ]
    raw = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())

    def load_dataset(name: str, *, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return raw

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with caplog.at_level(logging.WARNING):
        loaded = load_nutrition_tables("val")
    assert asked == [("openfoodfacts/nutrition-table-detection", "val")]
    assert "1 of 3 rows left out" in caplog.text
    assert loaded.column_names == ["id", "messages", "image", "boxes", "labels"]
    turned, plain = loaded
    assert turned["image"].size == (20, 40) and plain["image"].size == (40, 20)
    np.testing.assert_allclose(turned["boxes"], [[0.5, 0.2, 0.9, 0.9]])  # x = 1 - y, y = x: a quarter to the right
    np.testing.assert_allclose(plain["boxes"], [[0.2, 0.1, 0.9, 0.5]])


def test_rows_that_carry_their_pictures_are_not_held_in_memory() -> None:
    import pyarrow

    size, count = 100_000, 80
    picture = bytes(size)
    samples = [
        Sample(f"{i}", lambda: picture, 100, 80, Boxes.empty(), (), source=f"row {i}") for i in range(count)
    ]  # fmt: skip
    before = pyarrow.total_allocated_bytes()
    rows = build_rows(samples, labels=["cup"])
    assert pyarrow.total_allocated_bytes() - before < size * 4  # of 8 MB
    assert len(rows) == count
    assert rows.with_format("arrow")[79]["image"][0]["bytes"].as_py() == picture
    empty = build_rows([], labels=["cup"])
    assert len(empty) == 0 and empty.column_names == rows.column_names

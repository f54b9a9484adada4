"""Every check of the rows: a fault is named, and its healthy twin is not."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.doctor.drawn import SETTINGS, SIZES, Row, answer_of, draw_rows, make_convert, talk
from vlmdet.doctor import Report, Subject, examine


def report_of(rows: Any = None, **fields: Any) -> Report:
    fields.setdefault("settings", SETTINGS)
    report = examine(Subject(rows=rows, **fields), stages=["data"], isolate=False)
    assert not [one for one in report.not_run if "itself failed" in one.needs]
    return report


def ids(report: Report) -> list[str]:
    """Ids of causes of severity 2 and more, in order."""
    return [one.id for one in report.findings if one.consequence_of is None and one.severity >= 2]


def healthy(**fields: Any) -> Report:
    given = {"box_format": "xyxy/pixel", "convert": make_convert(), **fields}
    return report_of(given.pop("rows", None) or draw_rows(), **given)


def test_a_healthy_set_gets_a_clean_bill_with_figures() -> None:
    report = healthy()
    assert report.findings == ()
    assert {one.id: one for one in report.checked}["D05"].figures.startswith("44 boxes within their pictures")
    assert {one.id for one in report.checked} == {f"D{i:02d}" for i in range(1, 18)} - {"D10"}
    assert {one.id for one in report.not_run} == {"D10", "D18"}


@pytest.mark.parametrize(
    ("declared", "stored", "named"),
    [
        ("xyxy/pixel", "yxyx/pixel", "D01"),
        ("xyxy/fraction", "yxyx/fraction", "D01"),
        ("yxyx/fraction", "xyxy/fraction", "D01"),
        ("xyxy/pixel", "xywh/pixel", "D02"),
        ("xyxy/fraction", "cxcywh/fraction", "D02"),
        ("xywh/pixel", "xyxy/pixel", "D02"),
        ("xyxy/pixel", "xyxy/fraction", "D03"),
        ("xyxy/fraction", "xyxy/pixel", "D03"),
    ],
)
def test_boxes_that_are_not_as_declared(declared: str, stored: str, named: str) -> None:
    report = report_of(draw_rows(box_format=stored), box_format=declared)
    assert ids(report)[0] == named
    assert report.findings[0].pictures and report.findings[0].pictures[0].startswith("data:image/jpeg;base64,")
    assert named not in ids(report_of(draw_rows(box_format=stored), box_format=stored))


def swapped(boxes: list[tuple[float, ...]], row: Row) -> Any:
    width, height = row["image"].size
    return [
        (b[1] / height * width, b[0] / width * height, b[3] / height * width, b[2] / width * height) for b in boxes
    ], (1000 / width, 1000 / height)


def as_sizes(boxes: list[tuple[float, ...]], row: Row) -> Any:
    return [(a, b, c - a, d - b) for a, b, c, d in boxes], (1000 / row["width"], 1000 / row["height"])


def pixels(boxes: list[tuple[float, ...]], row: Row) -> Any:
    return boxes, (1.0, 1.0)


def resized(boxes: list[tuple[float, ...]], row: Row) -> Any:
    """Pixels of the picture as Qwen2.5-VL sees it under 112,896 pixels: sides by hand, multiples of 28."""
    sizes = {(640, 480): (364, 280), (480, 640): (280, 364), (800, 400): (448, 224)}
    width, height = sizes[(row["width"], row["height"])]
    return boxes, (width / row["width"], height / row["height"])


def constant(boxes: list[tuple[float, ...]], row: Row) -> Any:
    return boxes, (1.7, 1.7)


@pytest.mark.parametrize(
    ("change", "named"), [(swapped, "D01"), (as_sizes, "D02"), (pixels, "D03"), (constant, "D03"), (resized, "D04")]
)
def test_targets_in_another_order_or_space_than_the_family_writes(change: Any, named: str) -> None:
    settings = {**SETTINGS, "max_pixels": 112_896}
    assert ids(healthy(convert=make_convert(change), settings=settings))[0] == named
    assert ids(healthy(settings=settings)) == []


def test_pixels_of_the_resized_picture_are_right_for_qwen2_5() -> None:
    settings = {"model_name": "Qwen/Qwen2.5-VL-3B-Instruct", "max_pixels": 112_896, "min_pixels": 3136}
    assert ids(healthy(convert=make_convert(resized), settings=settings)) == []
    assert ids(healthy(settings=settings))[0] == "D04"


def test_rows_with_y_first_and_a_converter_that_knows_are_healthy_even_undeclared() -> None:
    def turn(boxes: list[tuple[float, ...]], row: Row) -> Any:
        width, height = row["image"].size
        return [(b[1] * width, b[0] * height, b[3] * width, b[2] * height) for b in boxes], (
            1000 / width,
            1000 / height,
        )

    rows = draw_rows(box_format="yxyx/fraction")
    assert ids(report_of(rows, convert=make_convert(turn))) == []

    def careless(boxes: list[tuple[float, ...]], row: Row) -> Any:
        width, height = row["image"].size
        return [(b[0] * width, b[1] * height, b[2] * width, b[3] * height) for b in boxes], (
            1000 / width,
            1000 / height,
        )

    assert ids(report_of(rows, convert=make_convert(careless)))[0] == "D01"


def test_odd_boxes() -> None:
    rows = draw_rows()
    rows[0]["objects"]["bbox"][0] = [10, 10, 10, 60]
    rows[1]["objects"]["bbox"] = [[-40, 5, 90, 80], [100, 100, 200, 200], [100, 100, 200, 201]]
    rows[1]["objects"]["category"] = ["logo"] * 3
    report = report_of(rows, box_format="xyxy/pixel")
    assert ids(report) == ["D05"]
    assert "1 without area" in report.findings[0].evidence
    assert "1 outside the picture" in report.findings[0].evidence
    assert "1 twice in one picture" in report.findings[0].evidence


def test_numbers_that_are_cut_and_not_rounded() -> None:
    def convert(row: Row) -> Row:
        width, height = row["image"].size
        texts = [
            f"<|box_start|>({int(a * 1000 / width)},{int(b * 1000 / height)}),"
            f"({int(c * 1000 / width)},{int(d * 1000 / height)})<|box_end|>"
            for a, b, c, d in row["objects"]["bbox"]
        ]
        return talk("Find every logo.", "".join(texts) or "none", row["image"])

    rows = draw_rows(40, most=1)
    report = report_of(rows, box_format="xyxy/pixel", convert=convert)
    assert ids(report) == ["D05"]
    assert "cut and not rounded" in report.findings[0].evidence


def turned_rows(*, annotated: str) -> list[Row]:
    """Rows whose files are turned by EXIF tag 6; boxes and sizes on the upright or on the stored picture."""
    rows = draw_rows(16)
    for row in rows:
        upright = row["image"]
        stored = upright.transpose(
            Image.Transpose.ROTATE_90
        )  # shown turned by 90 degrees clockwise, it is upright again
        tag = Image.Exif()
        tag[274] = 6
        file = io.BytesIO()
        stored.save(file, "JPEG", exif=tag, quality=95)
        row["image"] = {"bytes": file.getvalue(), "path": None}
        if annotated == "stored":
            row["width"], row["height"] = stored.size
            row["objects"]["bbox"] = [
                [b, upright.width - c, d, upright.width - a] for a, b, c, d in row["objects"]["bbox"]
            ]
    return rows


def converting(opened: Any) -> Any:
    def convert(row: Row) -> Row:
        image = opened(Image.open(io.BytesIO(row["image"]["bytes"])))
        boxes = [tuple(box) for box in row["objects"]["bbox"]]
        return talk("Find every logo.", answer_of(boxes, (1000 / row["width"], 1000 / row["height"])), image)

    return convert


@pytest.mark.parametrize(("annotated", "opened", "named"), [
    ("upright", lambda image: image.convert("RGB"), True),
    ("stored", ImageOps.exif_transpose, True),
    ("upright", ImageOps.exif_transpose, False),
])  # fmt: skip
def test_pictures_turned_by_exif(annotated: str, opened: Any, named: bool) -> None:
    report = report_of(turned_rows(annotated=annotated), box_format="xyxy/pixel", convert=converting(opened))
    assert ("D06" in ids(report)) is named


def test_other_modes() -> None:
    rows = draw_rows()
    for row in rows[::3]:
        row["image"] = row["image"].convert("RGBA")
    assert ids(report_of(rows, box_format="xyxy/pixel")) == ["D07"]
    spoilt = healthy(rows=rows)
    assert ids(spoilt) == ["D07"]
    assert "stay RGBA" in spoilt.findings[0].evidence

    def rgb(row: Row) -> Row:
        return {**make_convert()(row), "image": row["image"].convert("RGB")}

    assert ids(healthy(rows=rows, convert=rgb)) == []


def test_transparency_laid_on_black() -> None:
    rows = draw_rows()
    for row in rows:
        layer = row["image"].convert("RGBA")
        pixels_of = np.array(layer)
        pixels_of[(pixels_of[..., :3] > 200).all(axis=2)] = 0  # paper becomes transparent black
        row["image"] = Image.fromarray(pixels_of)
    report = healthy(rows=rows, convert=lambda row: {**make_convert()(row), "image": row["image"].convert("RGB")})
    assert "D07" in ids(report)


def test_stored_sizes_that_are_not_the_files() -> None:
    rows = draw_rows()
    for row in rows[::2]:
        row["width"], row["height"] = row["width"] * 2, row["height"] * 2
    assert ids(report_of(rows, box_format="xyxy/pixel")) == ["D08"]


def flipped(row: Row) -> Row:
    return {**make_convert()(row), "image": ImageOps.mirror(row["image"])}


def flipped_rightly(row: Row) -> Row:
    width = row["image"].width
    boxes = [[width - c, b, width - a, d] for a, b, c, d in row["objects"]["bbox"]]
    return make_convert()({**row, "image": ImageOps.mirror(row["image"]), "objects": {**row["objects"], "bbox": boxes}})


def cropped(row: Row) -> Row:
    image = row["image"].crop((0, 0, int(row["image"].width * 0.95), int(row["image"].height * 0.7)))
    return {**make_convert()(row), "image": image.resize(row["image"].size)}


@pytest.mark.parametrize(("convert", "named"), [(flipped, True), (cropped, True), (flipped_rightly, False)])
def test_pictures_that_are_changed_without_their_boxes(convert: Any, named: bool) -> None:
    assert ("D09" in ids(healthy(convert=convert))[:1]) is named


def test_splits_that_share_pictures() -> None:
    rows, others = draw_rows(16), draw_rows(16, seed=1)
    report = report_of(splits={"train": rows, "val": [*others[:10], *rows[:3]]}, box_format="xyxy/pixel")
    assert ids(report) == ["D10"]
    assert "3 have the same picture" in report.findings[0].evidence
    assert ids(report_of(splits={"train": rows, "val": others}, box_format="xyxy/pixel")) == []


def test_splits_that_share_groups() -> None:
    rows, others = draw_rows(16), draw_rows(16, seed=1)
    for i, row in enumerate(rows):
        row["barcode"] = f"40{i // 2}"
    for i, row in enumerate(others):
        row["barcode"] = f"4{i // 2}" if i < 8 else f"99{i}"
    assert ids(report_of(splits={"train": rows, "val": others}, box_format="xyxy/pixel")) == []
    for row in others[:6]:
        row["barcode"] = "401"
    assert ids(report_of(splits={"train": rows, "val": others}, box_format="xyxy/pixel")) == ["D10"]


def test_classes_of_question_and_target() -> None:
    rows = draw_rows()
    for i, row in enumerate(rows):
        row["objects"]["category"] = ["logo" if (i + k) % 2 else "barcode" for k in range(len(row["objects"]["bbox"]))]

    def mixed(row: Row) -> Row:
        width, height = row["image"].size
        scale = (1000 / width, 1000 / height)
        texts = [answer_of([tuple(b)], scale, label) for b, label in zip(*row["objects"].values(), strict=True)]
        return talk("Find every logo.", "".join(texts) or "none", row["image"])

    assert ids(report_of(rows, box_format="xyxy/pixel", convert=mixed)) == ["D11"]
    rows[3]["objects"]["category"] = ["Logo"] * len(rows[3]["objects"]["bbox"])
    report = report_of(rows, box_format="xyxy/pixel")
    assert ids(report) == ["D11"] and "'Logo'" in report.findings[0].evidence


def test_boxes_left_out_of_the_target() -> None:
    report = healthy(convert=make_convert(lambda boxes, row: (boxes[:1], (1000 / row["width"], 1000 / row["height"]))))
    assert ids(report) == ["D12"]


def test_boxes_in_no_order() -> None:
    rows = draw_rows(40, most=4)
    chance = np.random.default_rng(0)
    for row in rows:
        chance.shuffle(row["objects"]["bbox"])
    assert ids(healthy(rows=rows)) == ["D13"]


def test_rows_without_objects() -> None:
    def silent(row: Row) -> Row:
        made = make_convert()(row)
        answer = made["messages"][1]["content"][0]
        answer["text"] = "" if answer["text"] == "none" else answer["text"]
        return made

    assert ids(healthy(convert=silent)) == ["D14"]
    some = [row for row in draw_rows(30) if row["objects"]["bbox"]]
    assert [(one.id, one.severity) for one in healthy(rows=some).findings] == [("D14", 1)]


def test_a_field_that_is_not_there() -> None:
    def convert(row: Row) -> Row:
        return talk("Find every logo.", str(row["object"]["bbox"]), row["image"])

    report = healthy(convert=convert)
    assert ids(report)[0] == "D15"
    assert "KeyError: 'object'" in report.findings[0].evidence and "nearest: 'objects'" in report.findings[0].evidence
    assert report.findings[0].where.startswith(f"{__file__}:")


def test_a_field_that_is_silently_empty() -> None:
    report = healthy(
        convert=lambda row: talk("Find every logo.", answer_of(row.get("boxes", []), (1, 1)), row["image"])
    )
    assert ids(report)[0] == "D15"


def test_a_split_that_is_not_there() -> None:
    splits = {"train": draw_rows(16), "val": draw_rows(16, seed=1)}
    settings = {**SETTINGS, "eval_split": "validation"}
    assert ids(report_of(splits=splits, box_format="xyxy/pixel", settings=settings)) == ["D15"]


def test_objects_under_one_image_token_and_pictures_that_are_refused() -> None:
    report = healthy(settings={**SETTINGS, "max_pixels": 12_544})
    assert "D16" in ids(report)
    rows = draw_rows()
    rows[0]["image"], rows[0]["width"], rows[0]["height"] = Image.new("RGB", (4300, 20)), 4300, 20
    rows[0]["objects"] = {"bbox": [[0, 0, 20, 18]], "category": ["logo"]}
    assert "D17" in ids(report_of(rows, box_format="xyxy/pixel"))


def test_stale_rows(tmp_path: Path) -> None:
    rows = draw_rows()
    lines = [
        json.dumps({"id": row["id"], "messages": make_convert(question="Old question")(row)["messages"]})
        for row in rows
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    settings = {**SETTINGS, "cached_rows": str(tmp_path / "rows.jsonl")}
    report = healthy(rows=rows, settings=settings)
    assert ids(report) == ["D18"]
    assert "Old question" in report.findings[0].evidence and "Find every logo." in report.findings[0].evidence


def test_sizes_of_the_drawn_rows_are_as_the_tests_say() -> None:
    assert {row["image"].size for row in draw_rows()} == set(SIZES)


def test_a_converter_that_resizes_and_writes_pixels_of_what_it_gives() -> None:
    def convert(row: Row) -> Row:
        width, height = row["image"].size
        small = row["image"].resize((width * 3 // 4 // 28 * 28, height * 3 // 4 // 28 * 28))
        scale = (small.width / width, small.height / height)
        return talk("Find every logo.", answer_of([tuple(b) for b in row["objects"]["bbox"]], scale), small)

    settings = {"model_name": "Qwen/Qwen2.5-VL-3B-Instruct", "max_pixels": 1_003_520}
    assert ids(healthy(convert=convert, settings=settings)) == []
    assert ids(healthy(convert=convert))[0] == "D03"


def test_fractions_taken_for_the_other_axis_before_they_are_multiplied() -> None:
    def crossed(boxes: list[tuple[float, ...]], row: Row) -> Any:
        """Take y for x of a y-first fraction: y times the width stands first."""
        width, height = row["image"].size
        turned = [(b[1] / height, b[0] / width, b[3] / height, b[2] / width) for b in boxes]
        return [(a * width, b * height, c * width, d * height) for a, b, c, d in turned], (1.0, 1.0)

    settings = {"model_name": "Qwen/Qwen2.5-VL-3B-Instruct", "max_pixels": 112_896, "min_pixels": 3136}
    assert ids(healthy(convert=make_convert(crossed), settings=settings))[0] == "D01"


@pytest.mark.parametrize(("y_first", "named"), [(True, False), (False, True)])
def test_location_tokens_of_a_family_that_writes_y_first(y_first: bool, named: bool) -> None:
    def convert(row: Row) -> Any:
        width, height = row["image"].size
        places = [(b[0] / width, b[1] / height, b[2] / width, b[3] / height) for b in row["objects"]["bbox"]]
        numbers = [[min(1023, round(v * 1024)) for v in one] for one in places]
        written = [(b, a, d, c) if y_first else (a, b, c, d) for a, b, c, d in numbers]
        text = " ; ".join("".join(f"<loc{v:04d}>" for v in one) + " logo" for one in written)
        return talk("detect logo", text or "none", row["image"])

    report = healthy(convert=convert, settings={"model_name": "google/paligemma-3b-pt-224"})
    assert ("D01" in ids(report)) is named


def test_noise_is_told_as_noise_and_not_as_another_unit() -> None:
    rows = draw_rows(30)
    for i, row in enumerate(rows):
        boxes = row["objects"]["bbox"]
        if boxes and i % 3 == 0:
            boxes[0] = [-9, *boxes[0][1:]]
        elif boxes and i % 3 == 1:
            boxes[0] = [boxes[0][0], boxes[0][1], boxes[0][0], boxes[0][3]]
    assert ids(report_of(rows, box_format="xyxy/pixel"))[:1] == ["D05"]


def test_boxes_in_an_earlier_turn_are_not_left_out() -> None:
    plain = make_convert()

    def convert(row: Row) -> Any:
        example = plain(row)
        more = talk("And how many?", str(len(row["objects"]["bbox"])), None)["messages"][1:]
        asked = {"role": "user", "content": [{"type": "text", "text": "And how many?"}]}
        return {**example, "messages": [*example["messages"], asked, *more]}

    report = healthy(convert=convert)
    assert report.worst == 0
    assert {one.id for one in report.checked} >= {"D01", "D12", "D13"}


@pytest.mark.parametrize(
    ("question", "named"),
    [
        ("Detect every cup in this image.", True),
        ("Detect every cup and plate in this image.", False),
        ("Detect all objects, such as a cup.", False),
        ('Detect all objects. Answer like [{"bbox_2d": [1, 2, 3, 4], "label": "cup"}]', False),
    ],
)
def test_classes_stored_as_numbers_are_known_by_the_names_that_targets_write(question: str, named: bool) -> None:
    rows = draw_rows()
    for row in rows:
        row["objects"]["category"] = [i % 2 for i in range(len(row["objects"]["bbox"]))]

    def convert(row: Row) -> Any:
        width, height = row["image"].size
        found = zip(row["objects"]["bbox"], row["objects"]["category"], strict=True)
        texts = [answer_of([box], (1000 / width, 1000 / height), ("cup", "plate")[kind]) for box, kind in found]
        return talk(question, "".join(texts) or "none", row["image"])

    assert ("D11" in ids(healthy(rows=rows, convert=convert))) is named

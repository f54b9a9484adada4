"""Faults of annotations and of the functions that turn them into answers."""

from __future__ import annotations

import io
import json
from typing import Any

from PIL import Image

from benchmarks.faults.homes import coco3, cookbook, gemma, llava, team
from benchmarks.faults.pictures import scenes
from benchmarks.faults.registry import fault, subject


@fault("D01", stage="data")
def rows_and_first_boxes_of_a_csv_swapped() -> Any:
    """Stored as y1, x1, y2, x2 in pixels; the notebook declares and reads x1, y1, x2, y2."""
    rows = cookbook.dataset(18, 11)
    for row in rows:
        row["objects"]["bbox"] = [[y1, x1, y2, x2] for x1, y1, x2, y2 in row["objects"]["bbox"]]
    return subject(cookbook.fields(), rows=rows)


@fault("D01", stage="data")
def open_food_facts_fractions_unpacked_the_wrong_way() -> Any:
    """The declaration is right, the converter unpacks the fractions as x first."""

    def to_chat(row: dict[str, Any]) -> dict[str, Any]:
        w, h = team.seen(*row["image"].size)
        found = []
        for box, label in zip(row["bboxes"], row["labels"], strict=True):
            x_min, y_min, x_max, y_max = box
            bbox = [int(x_min * w + 0.5), int(y_min * h + 0.5), int(x_max * w + 0.5), int(y_max * h + 0.5)]
            found.append({"bbox_2d": bbox, "label": label})
        answer = {"role": "assistant", "content": [{"type": "text", "text": json.dumps(found)}]}
        return {"messages": team.question(row) + [answer], "images": [row["image"]]}

    return subject(team.fields(), convert=to_chat)


@fault("D02", stage="data")
def coco_boxes_declared_as_corners() -> Any:
    rows = cookbook.dataset(18, 12)
    for row in rows:
        row["objects"]["bbox"] = [[a, b, c - a, d - b] for a, b, c, d in row["objects"]["bbox"]]
    return subject(cookbook.fields(), rows=rows)


@fault("D02", stage="data")
def coco_width_and_height_written_as_the_second_corner() -> Any:
    """Declared as they are; the converter scales x, y, w, h and calls them a box."""

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        w, h = row["image"].size
        objs = []
        for ann in row["annotations"]:
            x, y, bw, bh = ann["bbox"]
            objs.append(
                {
                    "bbox_2d": [round(1000 * x / w), round(1000 * y / h), round(1000 * bw / w), round(1000 * bh / h)],
                    "label": coco3.NAMES[ann["category_id"]],
                }
            )
        reply = {"role": "assistant", "content": [{"type": "text", "text": json.dumps(objs)}]}
        return {"messages": [*coco3.user_turn(row), reply], "images": [row["image"]]}

    return subject(coco3.fields(), convert=convert)


@fault("D03", stage="data", also=("D04",))
def original_pixels_for_a_model_of_a_thousand_steps() -> Any:
    def format_data(sample: dict[str, Any]) -> dict[str, Any]:
        out = []
        for (x1, y1, x2, y2), category in zip(sample["objects"]["bbox"], sample["objects"]["category"], strict=True):
            name = cookbook.LABELS[category]
            out.append(f"<|object_ref_start|>{name}<|object_ref_end|><|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>")
        answer = {"role": "assistant", "content": [{"type": "text", "text": "".join(out) or "none"}]}
        return {"image": sample["image"], "messages": [*cookbook.prompt_of(sample), answer]}

    return subject(cookbook.fields(), convert=format_data)


@fault("D03", stage="data")
def pixels_of_the_file_although_the_processor_shrinks_it() -> Any:
    """Qwen2.5-VL wants pixels of the picture that it sees; these are pixels of the file."""
    from benchmarks.faults.bases import processor_of

    rows = team.load_rows(12, 13)
    for row in rows:
        row["image"] = row["image"].resize((row["image"].width * 3, row["image"].height * 3))
    processor = processor_of("qwen2_5_vl", max_pixels=200_000)

    def to_chat(row: dict[str, Any]) -> dict[str, Any]:
        w, h = row["image"].size
        found = [
            {"bbox_2d": [round(b[1] * w), round(b[0] * h), round(b[3] * w), round(b[2] * h)], "label": label}
            for b, label in zip(row["bboxes"], row["labels"], strict=True)
        ]
        answer = {"role": "assistant", "content": [{"type": "text", "text": json.dumps(found)}]}
        return {"messages": team.question(row) + [answer], "images": [row["image"]]}

    fields = team.fields()
    return subject(
        fields,
        rows=rows,
        convert=to_chat,
        processor=processor,
        collate=team.make_collate(processor),
        parse=None,
        metric=None,
        settings=fields["settings"] | {"max_pixels": 200_000},
    )


@fault("D04", stage="data", also=("D03",))
def thousandths_kept_after_the_move_to_qwen2_5() -> Any:
    def to_chat(row: dict[str, Any]) -> dict[str, Any]:
        found = []
        for (y1, x1, y2, x2), label in zip(row["bboxes"], row["labels"], strict=True):
            found.append({"bbox_2d": [round(v * 1000) for v in (x1, y1, x2, y2)], "label": label})
        answer = {"role": "assistant", "content": [{"type": "text", "text": json.dumps(found)}]}
        return {"messages": team.question(row) + [answer], "images": [row["image"]]}

    def parse(text: str) -> list[Any]:
        return [[v / 1000 for v in item["bbox_2d"]] for item in json.loads(text)]

    return subject(team.fields(), convert=to_chat, parse=parse, metric=None)


@fault("D05", stage="data")
def noisy_annotations_nobody_cleaned() -> Any:
    rows = cookbook.dataset(18, 14)
    for index, row in enumerate(rows):
        boxes, names = row["objects"]["bbox"], row["objects"]["category"]
        if not boxes:
            continue
        if index % 4 == 0:
            boxes[0] = [-9, boxes[0][1], boxes[0][2], boxes[0][3]]
        elif index % 4 == 1:
            boxes.append([boxes[-1][0], boxes[-1][1] + 1, boxes[-1][0], boxes[-1][1] + 30])
            names.append(names[-1])
        elif index % 4 == 2:
            boxes.append(list(boxes[-1]))
            names.append(names[-1])
        else:
            boxes[-1] = [boxes[-1][0], boxes[-1][1], row["width"] + 12, boxes[-1][3]]
    return subject(cookbook.fields(), rows=rows)


def phone_jpeg(image: Image.Image) -> bytes:
    """Write a picture as a phone does that was held upright: turned in the file, and a tag that says so."""
    exif = Image.Exif()
    exif[274] = 6
    buffer = io.BytesIO()
    image.transpose(Image.Transpose.ROTATE_90).save(buffer, "JPEG", exif=exif, quality=92)
    return buffer.getvalue()


@fault("D06", stage="data")
def phone_photographs_opened_without_their_orientation() -> Any:
    rows = cookbook.dataset(15, 15)
    for row in rows[::2]:
        row["image"] = Image.open(io.BytesIO(phone_jpeg(row["image"])))
    return subject(cookbook.fields(), rows=rows)


@fault("D08", stage="data")
def sizes_of_the_originals_beside_shrunken_copies() -> Any:
    """Boxes belong to the size in the columns, the files were halved afterwards; the converter divides by the file's."""
    rows = coco3.coco_rows(14, 16)
    for index, row in enumerate(rows):
        if index % 3 == 0:
            row["image"] = row["image"].resize((row["width"] // 2, row["height"] // 2))
    return subject(coco3.fields(), rows=rows)


@fault("D09", stage="data")
def mirrored_pictures_with_the_boxes_of_before() -> Any:
    def convert(row: dict[str, Any]) -> dict[str, Any]:
        example = gemma.to_pair(row)
        seed = int(sum(map(sum, row["objects"]["bbox"]))) if row["objects"]["bbox"] else 0
        if seed % 2 == 0:
            example["image"] = row["image"].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return example

    return subject(gemma.fields(count=16), convert=convert)


@fault("D10", stage="data")
def a_fifth_of_the_validation_pictures_was_trained_on() -> Any:
    train, val = cookbook.dataset(15, 17), cookbook.dataset(8, 18)
    for place, source in ((1, 3), (4, 7)):
        val[place] = dict(train[source], image_id=f"val-{place}")
    return subject(cookbook.fields(), rows=train, splits={"train": train, "val": val})


@fault("D11", stage="data")
def asked_for_cups_and_answered_with_everything() -> Any:
    question = "Detect every cup in this image. If there is none, answer: none"

    def prompt(row: dict[str, Any]) -> list[dict[str, Any]]:
        system, _ = cookbook.prompt_of(row)
        return [system, {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        example = cookbook.format_data(row)
        return {"image": row["image"], "messages": prompt(row) + example["messages"][-1:]}

    return subject(cookbook.fields(), convert=convert, render=prompt)


@fault("D12", stage="data")
def only_the_first_box_is_taught() -> Any:
    def convert(row: dict[str, Any]) -> dict[str, Any]:
        objects = row["objects"]
        first = {"bbox": objects["bbox"][:1], "category": objects["category"][:1]}
        return cookbook.format_data({"image": row["image"], "objects": first})

    return subject(cookbook.fields(), convert=convert)


@fault("D14", stage="data")
def pictures_without_objects_answer_with_nothing_at_all() -> Any:
    def convert(row: dict[str, Any]) -> dict[str, Any]:
        example = cookbook.format_data(row)
        if not row["objects"]["bbox"]:
            example["messages"][-1]["content"][0]["text"] = ""
        return example

    return subject(cookbook.fields(count=18), convert=convert)


@fault("D15", stage="data")
def the_column_is_called_category_and_not_categories() -> Any:
    def convert(row: dict[str, Any]) -> dict[str, Any]:
        names = row["objects"]["categories"]
        return cookbook.format_data(row | {"objects": {"bbox": row["objects"]["bbox"], "category": names}})

    return subject(cookbook.fields(), convert=convert)


@fault("D17", stage="data")
def a_strip_and_a_thumbnail_among_the_pictures() -> Any:
    rows = llava.entries(12, 19)
    rows[4]["image"] = Image.new("RGB", (1230, 5), (90, 90, 160))
    rows[4]["annotations"] = []
    rows[4]["conversations"][1]["value"] = "[]"
    return subject(llava.fields(), rows=rows)


@fault("D08", stage="data")
def width_and_height_columns_exchanged() -> Any:
    rows = []
    for scene in scenes(12, 20):
        w, h = scene.height, scene.width
        rows.append(
            {
                "image": scene.image,
                "width": w,
                "height": h,
                "objects": {"bbox": scene.boxes, "category": [cookbook.LABELS.index(x) for x in scene.labels]},
            }
        )
    return subject(cookbook.fields(), rows=rows)

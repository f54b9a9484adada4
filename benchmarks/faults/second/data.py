"""More faults of annotations and converters."""

from __future__ import annotations

import json
from typing import Any

from PIL import Image

from benchmarks.faults.homes import coco3, cookbook, gemma, llava, team
from benchmarks.faults.pictures import LABELS, draw, scenes
from benchmarks.faults.registry import fault, subject


@fault("D01", stage="data")
def paligemma_targets_with_x_first() -> Any:
    """The family's order is y1, x1, y2, x2; target and parser both put x first."""

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        w, h = row["image"].size
        pieces = []
        for (x1, y1, x2, y2), name in zip(row["objects"]["bbox"], row["objects"]["category"], strict=True):
            bins = [min(1023, round(v * 1024)) for v in (x1 / w, y1 / h, x2 / w, y2 / h)]
            pieces.append("".join(f"<loc{b:04d}>" for b in bins) + f" {name}")
        reply = {"role": "assistant", "content": [{"type": "text", "text": " ; ".join(pieces) or "none"}]}
        return {"image": row["image"], "messages": [*gemma.inference(row), reply]}

    def parse(text: str, width: int, height: int) -> list[dict[str, Any]]:
        found = gemma.LOC.findall(text)
        return [
            {
                "bbox": [int(a) / 1024 * width, int(b) / 1024 * height, int(c) / 1024 * width, int(d) / 1024 * height],
                "label": e,
            }
            for a, b, c, d, e in found
        ]

    return subject(gemma.fields(), convert=convert, parse=parse)


@fault("D02", stage="data")
def yolo_centres_read_as_corners() -> Any:
    rows = []
    for scene in scenes(14, 91):
        w, h = scene.width, scene.height
        boxes = [[(a + c) / 2 / w, (b + d) / 2 / h, (c - a) / w, (d - b) / h] for a, b, c, d in scene.boxes]
        rows.append({"image": scene.image, "bboxes": boxes, "labels": scene.labels})

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        w, h = team.seen(*row["image"].size)
        out = []
        for (x1, y1, x2, y2), label in zip(row["bboxes"], row["labels"], strict=True):
            out.append({"bbox_2d": [round(x1 * w), round(y1 * h), round(x2 * w), round(y2 * h)], "label": label})
        reply = {"role": "assistant", "content": [{"type": "text", "text": json.dumps(out)}]}
        return {"messages": [*team.question(row), reply], "images": [row["image"]]}

    return subject(team.fields(), rows=rows, box_format="xyxy/fraction", convert=convert)


@fault("D03", stage="data", also=("D04",))
def fractions_between_zero_and_one_for_qwen3() -> Any:
    """Coordinates are written as 0.412 where the model was made for 412."""

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        w, h = row["image"].size
        out = []
        for ann in row["annotations"]:
            x, y, bw, bh = ann["bbox"]
            box = [round(x / w, 3), round(y / h, 3), round((x + bw) / w, 3), round((y + bh) / h, 3)]
            out.append({"bbox_2d": box, "label": coco3.NAMES[ann["category_id"]]})
        reply = {"role": "assistant", "content": [{"type": "text", "text": json.dumps(out)}]}
        return {"messages": [*coco3.user_turn(row), reply], "images": [row["image"]]}

    return subject(coco3.fields(), convert=convert)


@fault("D04", stage="data", also=("D03",))
def pixels_kept_after_the_move_to_qwen3() -> Any:
    def convert(row: dict[str, Any]) -> dict[str, Any]:
        out = []
        for ann in row["annotations"]:
            x, y, bw, bh = ann["bbox"]
            out.append({"bbox_2d": [x, y, x + bw, y + bh], "label": coco3.NAMES[ann["category_id"]]})
        reply = {"role": "assistant", "content": [{"type": "text", "text": json.dumps(out)}]}
        return {"messages": [*coco3.user_turn(row), reply], "images": [row["image"]]}

    return subject(coco3.fields(), convert=convert, parse=None, metric=None)


@fault("D07", stage="data")
def cut_out_products_with_an_alpha_channel() -> Any:
    rows = cookbook.dataset(14, 92)
    for number, row in enumerate(rows):
        if number % 3 == 0:
            row["image"] = row["image"].convert("RGBA")
        elif number % 3 == 1:
            row["image"] = row["image"].convert("P")
    return subject(cookbook.fields(), rows=rows, collate=None)


@fault("D09", stage="data")
def cropped_to_the_middle_with_the_boxes_of_the_whole() -> Any:
    def convert(row: dict[str, Any]) -> dict[str, Any]:
        w, h = row["image"].size
        middle = row["image"].crop((w // 6, h // 6, w - w // 6, h - h // 6)).resize((w, h))
        return coco3.build_example(row) | {"images": [middle]}

    return subject(coco3.fields(count=16), convert=convert)


@fault("D10", stage="data")
def bursts_of_the_same_scene_in_both_splits() -> Any:
    """Other bytes, the same scene: saved again at a lower quality and two pixels narrower."""
    import io

    train, val = cookbook.dataset(16, 93), cookbook.dataset(8, 94)
    for place in (0, 2, 6):
        buffer = io.BytesIO()
        train[place]["image"].save(buffer, "JPEG", quality=60)
        val[place] = dict(train[place], image=Image.open(io.BytesIO(buffer.getvalue())), image_id=f"v{place}")
    return subject(cookbook.fields(), rows=train, splits={"train": train, "validation": val})


@fault("D12", stage="data")
def a_loop_returns_after_its_first_object() -> Any:
    def describe(row: dict[str, Any]) -> str:
        w, h = team.seen(*row["image"].size)
        for (y1, x1, y2, x2), label in zip(row["bboxes"], row["labels"], strict=True):
            box = [round(x1 * w), round(y1 * h), round(x2 * w), round(y2 * h)]
            return json.dumps([{"bbox_2d": box, "label": label}])
        return "[]"

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        reply = {"role": "assistant", "content": [{"type": "text", "text": describe(row)}]}
        return {"messages": [*team.question(row), reply], "images": [row["image"]]}

    return subject(team.fields(), convert=convert)


@fault("D13", stage="data")
def objects_in_the_order_of_clicks() -> Any:
    import random

    dice = random.Random(7)
    rows = cookbook.dataset(24, 95, negatives=True)
    for row in rows:
        pairs = list(zip(row["objects"]["bbox"], row["objects"]["category"], strict=True))
        dice.shuffle(pairs)
        row["objects"] = {"bbox": [p[0] for p in pairs], "category": [p[1] for p in pairs]}
    return subject(cookbook.fields(), rows=rows)


@fault("D14", stage="data")
def no_picture_without_objects() -> Any:
    return subject(cookbook.fields(count=40, seed=96, negatives=False))


@fault("D15", stage="data")
def a_split_that_is_not_there() -> Any:
    rows = cookbook.dataset(12, 97)
    settings = {"train_split": "train", "eval_split": "validation", "model_type": "qwen2_vl"}
    return subject(
        cookbook.fields(), rows=rows, splits={"train": rows, "val": cookbook.dataset(6, 98)}, settings=settings
    )


@fault("D16", stage="data")
def barcodes_far_away_and_few_pixels() -> Any:
    """Boxes of 40 pixels on pictures of 2,000, which are shrunk to 300."""
    from benchmarks.faults.bases import processor_of

    processor = processor_of("qwen2_vl", max_pixels=300 * 300)
    rows = []
    for number in range(12):
        boxes = [
            [150 + 130 * number, 300 + 60 * k, 190 + 130 * number, 340 + 60 * k] for k in range(0, 2 + number % 3, 2)
        ]
        names = [LABELS[(number + k) % 3] for k in range(len(boxes))]
        image = draw((2000, 1500), boxes, names, 900 + number)
        kinds = [LABELS.index(name) for name in names]
        rows.append(
            {
                "image_id": number,
                "image": image,
                "width": 2000,
                "height": 1500,
                "objects": {"bbox": boxes, "category": kinds},
            }
        )
    fields = cookbook.fields()
    return subject(fields, rows=rows, processor=processor, settings=fields["settings"] | {"max_pixels": 90_000})


@fault("D17", stage="data")
def icons_of_a_few_pixels() -> Any:
    rows = coco3.coco_rows(12, 99)
    rows[7].update(image=Image.new("RGB", (640, 3), (9, 9, 9)), width=640, height=3, annotations=[])
    return subject(coco3.fields(), rows=rows)


@fault("D18", stage="data")
def a_jsonl_from_before_the_last_edit() -> Any:
    """The cached `messages` hold an older prompt and boxes of an older scale; the formatter was edited since."""
    rows = cookbook.dataset(12, 100)
    for row in rows:
        w, h = row["image"].size
        text = "".join(
            f"{LABELS[k]} ({round(a * 100 / w)},{round(b * 100 / h)}),({round(c * 100 / w)},{round(d * 100 / h)})"
            for (a, b, c, d), k in zip(row["objects"]["bbox"], row["objects"]["category"], strict=True)
        )
        row["messages"] = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Find cups, plates and signs."}]},
            {"role": "assistant", "content": [{"type": "text", "text": text or "none"}]},
        ]
    return subject(cookbook.fields(), rows=rows)


@fault("D05", stage="data")
def the_same_object_annotated_by_two_people() -> Any:
    rows = llava.entries(15, 101)
    for row in rows:
        anns = row["annotations"]
        row["annotations"] = [a for ann in anns for a in (ann, dict(ann, bbox=[ann["bbox"][0] + 1, *ann["bbox"][1:]]))]
        w, h = row["image"].size
        row["conversations"][1]["value"] = json.dumps(
            [
                {
                    "bbox_2d": [
                        round(1000 * x / w),
                        round(1000 * y / h),
                        round(1000 * (x + bw) / w),
                        round(1000 * (y + bh) / h),
                    ],
                    "label": ann["category"],
                }
                for ann in row["annotations"]
                for x, y, bw, bh in [ann["bbox"]]
            ]
        )
    return subject(llava.fields(), rows=rows)

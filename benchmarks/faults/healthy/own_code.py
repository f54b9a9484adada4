"""Healthy set-ups in users' own hands: data, conversation, collator, parser and metric fit together."""

from __future__ import annotations

import json
import random
from typing import Any

from benchmarks.faults.bases import processor_of
from benchmarks.faults.homes import coco3, cookbook, gemma, llava, team
from benchmarks.faults.homes.scoring import labelled_f1, mean_overlap
from benchmarks.faults.registry import healthy, subject


@healthy
def notebook_native_boxes_right_padding() -> Any:
    return subject(cookbook.fields(count=18))


@healthy
def team_json_in_resized_pixels() -> Any:
    return subject(team.fields(count=18))


@healthy
def llava_turns_left_padding() -> Any:
    return subject(llava.fields(count=18))


@healthy
def coco_to_qwen3_json() -> Any:
    return subject(coco3.fields(count=18))


@healthy
def paligemma_prefix_and_suffix() -> Any:
    return subject(gemma.fields(count=18))


@healthy
def boxes_shuffled_on_purpose() -> Any:
    rows = coco3.coco_rows(18, 61)
    dice = random.Random(5)
    for row in rows:
        dice.shuffle(row["annotations"])
    return subject(coco3.fields(), rows=rows)


@healthy
def one_class_one_box() -> Any:
    rows = team.load_rows(18, 62, labels=("sign",), most=1)
    return subject(team.fields(), rows=rows)


@healthy
def left_padding_with_role_scan() -> Any:
    """Masks are found by the assistant's header, so padding may be on any side."""
    processor = processor_of("qwen2_vl")
    processor.tokenizer.padding_side = "left"
    return subject(cookbook.fields(seed=63), processor=processor, collate=cookbook.DetectionCollator(processor))


@healthy
def right_padding_of_single_turns() -> Any:
    processor = processor_of("qwen2_vl")
    return subject(llava.fields(seed=64), processor=processor, collate=llava.TurnCollator(processor, side="right"))


@healthy
def two_questions_about_a_picture() -> Any:
    rows = llava.entries(14, 65)
    for row in rows:
        count = len(row["annotations"])
        row["conversations"] += [{"from": "human", "value": "count all objects"}, {"from": "gpt", "value": str(count)}]
    return subject(llava.fields(), rows=rows, render=None, decode=None, parse=None, metric=None)


@healthy
def train_and_validation_apart() -> Any:
    train, val = cookbook.dataset(18, 66), cookbook.dataset(8, 67)
    fields = cookbook.fields()
    return subject(fields, rows=train, splits={"train": train, "val": val})


@healthy
def question_names_the_labels_of_the_row() -> Any:
    """One class a question; the others' boxes are left out and the question says so."""

    def ask(row: dict[str, Any]) -> list[dict[str, Any]]:
        text = f"Locate every {row['wanted']}. Return a JSON list with bbox_2d and label."
        return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        reply = {"role": "assistant", "content": [{"type": "text", "text": coco3.grounding(row)}]}
        return {"messages": [*ask(row), reply], "images": [row["image"]]}

    rows = coco3.coco_rows(18, 68)
    for number, row in enumerate(rows):
        wanted = row["annotations"][0]["category_id"] if row["annotations"] else 1 + number % 3
        row["wanted"] = coco3.NAMES[wanted]
        row["annotations"] = [ann for ann in row["annotations"] if ann["category_id"] == wanted]
    return subject(coco3.fields(), rows=rows, convert=convert, render=ask)


@healthy
def already_written_messages_in_a_table() -> Any:
    """Rows of an Arrow table; empty keys are dropped before the template sees them."""
    from datasets import Dataset

    from benchmarks.faults.first.model import without_empty_keys

    def clean(row: dict[str, Any]) -> dict[str, Any]:
        return {
            "image": row["image"],
            "messages": without_empty_keys({"image": [], "messages": [row["messages"]]})["messages"][0],
        }

    table = Dataset.from_list([cookbook.format_data(row) for row in cookbook.dataset(14, 69)])
    fields = cookbook.fields()
    return subject(
        {key: fields[key] for key in ("processor", "collate", "settings", "decode")}, rows=table, convert=clean
    )


@healthy
def prompt_and_answer_by_trls_own_masks() -> Any:
    """TRL's training template marks what the assistant says; the processor returns the mask."""
    from pathlib import Path

    import trl

    processor = processor_of("qwen2_5_vl")
    template = (Path(trl.__file__).parent / "chat_templates" / "qwen2_5_vl_training.jinja").read_text("utf-8")

    def collate(examples: list[dict[str, Any]]) -> Any:
        conversations = []
        for example in examples:
            messages = [dict(m, content=[dict(p) for p in m["content"]]) for m in example["messages"]]
            messages[0]["content"][0]["image"] = example["images"][0]
            conversations.append(messages)
        batch = processor.apply_chat_template(
            conversations,
            chat_template=template,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True, "padding_side": "right"},
        )
        mask = batch.pop("assistant_masks")
        batch["labels"] = batch["input_ids"].masked_fill(mask == 0, -100)
        return batch

    return subject(team.fields(seed=70), processor=processor, collate=collate)


@healthy
def fenced_answers_are_parsed_as_taught() -> Any:
    """The answer stands in a fence of backquotes, in training and in the parser."""

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        text = f"```json\n{coco3.grounding(row)}\n```"
        reply = {"role": "assistant", "content": [{"type": "text", "text": text}]}
        return {"messages": [*coco3.user_turn(row), reply], "images": [row["image"]]}

    return subject(coco3.fields(seed=71), convert=convert)


@healthy
def pictures_mirrored_with_their_boxes() -> Any:
    from PIL import Image

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        if row["image"].width % 8:
            return cookbook.format_data(row)
        w = row["image"].width
        boxes = [[w - c, b, w - a, d] for a, b, c, d in row["objects"]["bbox"]]
        turned = {
            "image": row["image"].transpose(Image.Transpose.FLIP_LEFT_RIGHT),
            "objects": {"bbox": boxes, "category": row["objects"]["category"]},
        }
        return cookbook.format_data(turned)

    fields = cookbook.fields(seed=72)
    return subject({k: v for k, v in fields.items() if k not in ("parse", "metric", "decode")}, convert=convert)


@healthy
def metrics_alone() -> Any:
    return subject({}, metric=mean_overlap)


@healthy
def metrics_with_labels() -> Any:
    return subject({}, metric=labelled_f1)


@healthy
def answers_in_plain_json_without_native_tokens() -> Any:
    """Qwen2-VL taught to answer in JSON, which the prompt asks for; the parser reads what was taught."""

    def ask(row: dict[str, Any]) -> list[dict[str, Any]]:
        text = "Detect every cup, plate and sign. Answer in JSON: a list of objects with bbox and label."
        return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        w, h = row["image"].size
        out = []
        for (a, b, c, d), kind in zip(row["objects"]["bbox"], row["objects"]["category"], strict=True):
            grid = [round(a * 1000 / w), round(b * 1000 / h), round(c * 1000 / w), round(d * 1000 / h)]
            out.append({"bbox": grid, "label": cookbook.LABELS[kind]})
        reply = {"role": "assistant", "content": [{"type": "text", "text": json.dumps(out)}]}
        return {"image": row["image"], "messages": [*ask(row), reply]}

    def parse(text: str, width: int, height: int) -> list[list[float]]:
        items = json.loads(text.removesuffix("<|im_end|>"))
        sides = (width, height, width, height)
        return [[v * side / 1000 for v, side in zip(item["bbox"], sides, strict=True)] for item in items]

    return subject(cookbook.fields(seed=73), convert=convert, render=ask, parse=parse)


@healthy
def smolvlm_in_plain_words() -> Any:
    from benchmarks.faults.homes import smol

    return subject(smol.fields(count=18))

"""Checks of converters and questions, one fault each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from doctor_hands import (
    QUESTION,
    SYSTEM,
    collator,
    messages,
    render,
    rows,
    spans,
    subject,
    target,
    tiny_processor,
    told,
)

from vlmdet.doctor.checks import conversation
from vlmdet.doctor.gather.conversations import after_arrow

CHECKS = conversation.CHECKS
Row = dict[str, Any]


def made(write: Callable[[Row], list[Row]]) -> Callable[[Row], Row]:
    return lambda row: {"messages": write(row), "image": row["image"]}


def as_text(row: Row, **more: Any) -> Any:
    return tiny_processor().apply_chat_template(messages(None, **more), tokenize=False, add_generation_prompt=True)


def without_pictures(examples: list[Row]) -> Any:
    """A collator that never looks for pictures."""
    processor = tiny_processor()
    texts = [processor.apply_chat_template(one["messages"], tokenize=False) for one in examples]
    batch = processor(text=texts, padding=True, return_tensors="pt")
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    for row, ids in enumerate(batch["input_ids"].tolist()):
        for first, stop in spans(ids, processor):
            batch["labels"][row, first:stop] = batch["input_ids"][row, first:stop]
    return batch


def test_keys_that_are_none() -> None:
    def through_arrow(row: Row) -> list[Row]:
        turns = messages(target(row))
        turns[1]["content"][0] = {"type": "image", "image": "a.jpg"}
        return after_arrow(turns)

    given = subject(convert=made(through_arrow))
    assert told(CHECKS, given)[0] == "C01"

    def strip(examples: list[Row]) -> Any:
        for one in examples:
            for turn in one["messages"]:
                turn["content"] = [
                    {key: value for key, value in part.items() if value is not None} for part in turn["content"]
                ]
        return collator(tiny_processor())(examples)

    assert told(CHECKS, subject(convert=made(through_arrow), collate=strip)) == []


@pytest.mark.parametrize(
    ("asked", "ids"),
    [
        (render, []),
        (as_text, []),
        (lambda row: messages(None, system="Another one."), ["C02"]),
        (lambda row: messages(None, system=None), ["C02"]),
        (lambda row: as_text(row, system=None), ["C02"]),
        (lambda row: messages(None, question=QUESTION + " Answer in JSON."), ["C03"]),
        (lambda row: as_text(row, question="Where is it?"), ["C03"]),
    ],
)
def test_question_at_inference(asked: Callable[[Row], Any], ids: list[str]) -> None:
    assert told(CHECKS, subject(render=asked)) == ids


def test_default_system_message_is_the_written_one() -> None:
    written = made(lambda row: messages(target(row), system="You are a helpful assistant."))
    assert told(CHECKS, subject(convert=written, render=lambda row: messages(None, system=None))) == []


def test_one_of_several_questions_of_training_is_asked() -> None:
    questions = iter(["Find the cups.", QUESTION, "Where are cups?"] * 10)
    assert (
        told(CHECKS, subject(convert=made(lambda row: messages(target(row), question=next(questions))), render=render))
        == []
    )


@pytest.mark.parametrize(
    ("settings", "ids"),
    [
        ({"eval_system_prompt": "Another one."}, ["C02"]),
        ({"eval": {"user_prompt": "Where is it?"}}, ["C03"]),
        ({"callback_system_prompt": ""}, ["C02"]),
        ({"eval": {"user_prompt": QUESTION, "system_prompt": SYSTEM}}, []),
        ({"eval_user_prompt": "Detect every {label} in this image."}, []),
    ],
)
def test_prompts_of_the_settings(settings: Row, ids: list[str]) -> None:
    assert told((conversation.asked_as_trained,), subject(settings=settings)) == ids


@pytest.mark.parametrize(
    ("question", "ids"),
    [
        ("Detect cups. Answer in JSON with bbox_2d.", ["C04"]),
        ("Detect cups as [x1, y1, x2, y2].", ["C04"]),
        ("Detect cups, coordinates from 0 to 1000, as (x1,y1),(x2,y2).", []),
        ("Detect cups, coordinates between 0 and 1.", ["C04"]),
        ("Detect cups. Give absolute pixel coordinates.", ["C04"]),
        ("Detect cups.", []),
    ],
)
def test_format_that_the_question_asks_for(question: str, ids: list[str]) -> None:
    assert told(CHECKS, subject(convert=made(lambda row: messages(target(row), question=question)))) == ids


def test_syntax_foreign_to_the_family_is_minor() -> None:
    given = subject(
        convert=made(lambda row: messages(target(row).replace("<|box_start|>", "").replace("<|box_end|>", "")))
    )
    assert told(CHECKS, given) == ["C04"] and told(CHECKS, given, least=3) == []


def test_placeholders_and_pictures() -> None:
    def two(row: Row) -> list[Row]:
        turns = messages(target(row))
        turns[1]["content"].insert(0, {"type": "image"})
        return turns

    def none(row: Row) -> list[Row]:
        turns = messages(target(row))
        turns[1]["content"].pop(0)
        return turns

    def in_system(row: Row) -> list[Row]:
        turns = messages(target(row))
        turns[0]["content"].append(turns[1]["content"].pop(0))
        return turns

    assert told(CHECKS, subject(convert=made(two))) == ["C05"]
    assert told(CHECKS, subject(convert=made(none), collate=without_pictures)) == ["C05"]
    assert told(CHECKS, subject(convert=made(in_system))) == ["C05"]


def test_one_picture_for_all() -> None:
    held = rows()

    def first_picture(examples: list[Row]) -> Any:
        return collator(tiny_processor())([{**one, "image": examples[0]["image"]} for one in examples])

    assert told(
        CHECKS, subject(rows=held, convert=lambda row: {"messages": messages(target(row)), "image": held[0]["image"]})
    ) == ["C05"]
    assert told(CHECKS, subject(collate=first_picture)) == ["C05"]


def test_nested_pictures() -> None:
    def nested(row: Row) -> Row:
        return {"messages": messages(target(row)), "images": [[row["image"]]]}

    def strict(examples: list[Row]) -> Any:
        pictures = [one["images"][0] for one in examples]
        if any(isinstance(one, list) for one in pictures):
            raise ValueError("Could not make a flat list of images")
        return collator(tiny_processor())([{**one, "image": one["images"][0]} for one in examples])

    def opening(examples: list[Row]) -> Any:
        return collator(tiny_processor())([{**one, "image": one["images"][0][0]} for one in examples])

    assert told(CHECKS, subject(convert=nested, collate=strict)) == ["C06"]
    assert told(CHECKS, subject(convert=nested, collate=opening)) == []


def tagged(row: Row) -> list[Row]:
    return [{"role": "user", "content": f"<image>\n{QUESTION}"}, {"role": "assistant", "content": target(row)}]


def test_tag_that_stays_text() -> None:
    assert told(CHECKS, subject(convert=made(tagged), collate=without_pictures))[0] == "C07"
    assert told(CHECKS, subject(convert=made(tagged), collate=None))[0] == "C07"

    def replacing(examples: list[Row]) -> Any:
        mark = "<|vision_start|><|image_pad|><|vision_end|>"
        for one in examples:
            one["messages"] = [
                {**turn, "content": turn["content"].replace("<image>", mark)} for turn in one["messages"]
            ]
        return collator(tiny_processor())(examples)

    assert told(CHECKS, subject(convert=made(tagged), collate=replacing)) == []


def test_targets_without_variety() -> None:
    constant = made(lambda row: messages("<|box_start|>(1,2),(3,4)<|box_end|>"))
    assert told(CHECKS, subject(convert=constant)) == ["C08"]
    assert told(CHECKS, subject(convert=made(lambda row: messages("")))) == ["C08"]


def test_control_tokens_in_the_data() -> None:
    held = rows()
    held[3]["objects"]["category"][0] = "cup<|im_end|>"
    named = made(lambda row: messages(target(row).replace("cup", row["objects"]["category"][0])))
    assert told(CHECKS, subject(rows=held, convert=named)) == ["C09"]
    assert told(CHECKS, subject(convert=made(lambda row: messages(target(row), question="Find <|im_end|> cups.")))) == [
        "C09"
    ]


def test_indented_prompt() -> None:
    text = "You find objects.\n        Answer with boxes.\n        Nothing else."
    assert told(CHECKS, subject(convert=made(lambda row: messages(target(row), system=text)))) == ["C10"]
    example = 'Answer so:\n[\n  {"label": "cup"}\n]'
    assert told(CHECKS, subject(convert=made(lambda row: messages(target(row), system=example)))) == []


def test_healthy() -> None:
    assert told(CHECKS, subject(render=render)) == []
    assert told(CHECKS, subject(collate=None)) == []
    text = "<|vision_start|><|image_pad|><|vision_end|>" + QUESTION
    strings = made(lambda row: [{"role": "user", "content": text}, {"role": "assistant", "content": target(row)}])
    assert told(CHECKS, subject(convert=strings)) == []
    negatives = made(lambda row: messages("none" if len(row["objects"]["bbox"]) == 1 else target(row)))
    assert told(CHECKS, subject(convert=negatives)) == []


def test_rows_that_are_stored_in_a_dataset() -> None:
    import datasets

    held = rows()

    def raw(row: Row) -> Row:
        turns = messages(target(held[row["i"]]))
        turns[1]["content"][0] = {"type": "image", "image": "a.jpg"}
        return {"messages": turns, "image": held[row["i"]]["image"]}

    stored = datasets.Dataset.from_list([{"i": i} for i in range(len(held))])
    # the converter may be called on the fly: told as a trap, and no more
    given = subject(rows=stored, convert=raw)
    assert told(CHECKS, given) == ["C01"] and told(CHECKS, given, least=3) == []
    assert told(CHECKS, subject(rows=stored, convert=raw, settings={"cached_rows": "train.jsonl"}), least=4) == ["C01"]
    assert told(CHECKS, subject(rows=[{"i": i} for i in range(len(held))], convert=raw)) == []
    converted = datasets.Dataset.from_list([{"messages": raw({"i": i})["messages"]} for i in range(len(held))])
    assert told(CHECKS, subject(rows=converted, convert=None, collate=None))[0] == "C01"

"""Checks of chat templates, control tokens, padding side and generation prompt, one fault each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from doctor_hands import collator, convert, messages, render, spans, subject, target, tiny_processor, told

from vlmdet.doctor.checks import template

CHECKS = template.CHECKS


def with_template(text: str | None) -> Any:
    processor = copy.deepcopy(tiny_processor())
    processor.chat_template = processor.tokenizer.chat_template = text
    return processor


FOR_TEXT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
LLAMA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {% endif %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'user' %} [/INST]{% endif %}{% endfor %}"
)


def own_template() -> str:
    return str(tiny_processor().chat_template)


@pytest.mark.parametrize(
    "text",
    [
        lambda: None,
        lambda: FOR_TEXT,
        lambda: LLAMA,
        lambda: own_template().replace("<|im_end|>\n", "\n"),
        lambda: own_template().replace("<|im_start|>", "<start_of_turn>").replace("<|im_end|>", "<end_of_turn>"),
        lambda: own_template().replace("<|vision_start|><|image_pad|><|vision_end|>", ""),
    ],
    ids=["none", "for text", "llama", "no end", "gemma", "no picture"],
)
def test_templates_of_other_families(text: Callable[[], str | None]) -> None:
    processor = with_template(text())
    assert told(CHECKS, subject(processor=processor, collate=collator(processor)))[0] == "T01"
    assert told(CHECKS, subject(processor=processor, collate=None))[0] == "T01"


def labelled(batch: Any, processor: Any) -> Any:
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    for row, ids in enumerate(batch["input_ids"].tolist()):
        first, stop = spans(ids, processor)[0]
        batch["labels"][row, first:stop] = batch["input_ids"][row, first:stop]
    return batch


def written(change: Callable[[str], str], **more: Any) -> Callable[[list[dict[str, Any]]], Any]:
    """A collator that changes the rendered text before it is tokenised."""
    processor = tiny_processor()

    def collate(examples: list[dict[str, Any]]) -> Any:
        texts = [change(processor.apply_chat_template(one["messages"], tokenize=False, **more)) for one in examples]
        pictures = [[one["image"]] for one in examples]
        return labelled(processor(text=texts, images=pictures, padding=True, return_tensors="pt"), processor)

    return collate


def test_collator_without_the_template() -> None:
    processor = tiny_processor()

    def collate(examples: list[dict[str, Any]]) -> Any:
        texts = [
            "<|vision_start|><|image_pad|><|vision_end|>Find. " + one["messages"][-1]["content"][0]["text"]
            for one in examples
        ]
        batch = processor(text=texts, images=[[one["image"]] for one in examples], padding=True, return_tensors="pt")
        batch["labels"] = batch["input_ids"].clone()
        return batch

    assert told((template.chat_template,), subject(collate=collate)) == ["T01"]


def test_end_token_twice() -> None:
    assert told(CHECKS, subject(collate=written(lambda text: text.rstrip() + "<|im_end|>"))) == ["T02"]
    assert told(CHECKS, subject(collate=written(lambda text: "<|im_start|>" + text))) == ["T02"]


def test_control_strings_that_are_no_tokens() -> None:
    def renamed(row: dict[str, Any]) -> dict[str, Any]:
        return {"messages": messages(target(row).replace("box_start", "bbox_begin")), "image": row["image"]}

    def tags(row: dict[str, Any]) -> dict[str, Any]:
        text = target(row).replace("<|box_start|>", "<box>").replace("<|box_end|>", "</box>")
        return {"messages": messages(text), "image": row["image"]}

    assert told(CHECKS, subject(convert=renamed)) == ["T03"]
    assert told(CHECKS, subject(convert=tags), least=3) == []  # words of one's own may be meant


def test_control_strings_that_the_collator_spells_out() -> None:
    processor = tiny_processor()
    tokenizer = processor.tokenizer
    box = tokenizer.convert_tokens_to_ids("<|box_start|>")
    letters = (
        tokenizer("<|", add_special_tokens=False)["input_ids"]
        + tokenizer("box_start|>", add_special_tokens=False)["input_ids"]
    )

    def collate(examples: list[dict[str, Any]]) -> Any:
        batch = collator(processor)(examples)
        rows = [
            [part for one in ids for part in (letters if one == box else [one])] for ids in batch["input_ids"].tolist()
        ]
        longest = max(map(len, rows))
        batch["input_ids"] = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
        batch["attention_mask"] = (batch["input_ids"] != tokenizer.pad_token_id).long()
        return labelled(batch, processor)

    assert told((template.control_strings,), subject(collate=collate)) == ["T03"]


def test_generation_prompt() -> None:
    processor = tiny_processor()

    def text(row: dict[str, Any], **more: Any) -> Any:
        return processor.apply_chat_template(messages(None), tokenize=False, **more)

    assert told(CHECKS, subject(collate=written(str, add_generation_prompt=True))) == ["T10"]
    assert told(CHECKS, subject(render=text)) == ["T10"]
    assert told(CHECKS, subject(render=lambda row: text(row, add_generation_prompt=True))) == []
    assert told(CHECKS, subject(settings={"eval_add_generation_prompt": False})) == ["T10"]


@pytest.mark.parametrize(
    ("settings", "ids"),
    [
        ({"eval_padding_side": "right", "eval_batch_size": 8}, ["T07"]),
        ({"eval_padding_side": "right", "eval_batch_size": 1}, []),
        ({"eval_padding_side": "left", "eval_batch_size": 8}, []),
        ({"padding_side": "right", "eval_batch_size": 8, "max_new_tokens": 64}, ["T07"]),
        ({"padding_side": "right", "eval_batch_size": 8}, []),
    ],
)
def test_padding_side(settings: dict[str, Any], ids: list[str]) -> None:
    assert told((template.padding_side,), subject(settings=settings), least=3) == ids


def test_healthy() -> None:
    assert told(CHECKS, subject(render=render)) == []
    assert told(CHECKS, subject(convert=convert, collate=None)) == []
    same = copy.deepcopy(tiny_processor())
    same.tokenizer.pad_token = same.tokenizer.eos_token
    assert told(CHECKS, subject(processor=same, collate=collator(same))) == []


def test_length_set_without_a_collator() -> None:
    assert told(CHECKS, subject(collate=None, settings={"max_length": 60})) == ["T09"]
    assert told(CHECKS, subject(collate=None, settings={"max_length": 1024})) == []

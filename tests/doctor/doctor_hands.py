"""A small pipeline of a user's own, on the embedded base's processor, whose parts tests replace one by one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlmdet.doctor.checks import Check
from vlmdet.doctor.evidence import Evidence
from vlmdet.doctor.examine import run_check
from vlmdet.doctor.findings import Finding
from vlmdet.doctor.subject import Subject

SYSTEM = "You find objects."
QUESTION = "Detect every cup in this image."
START = "<|im_start|>assistant\n"


@functools.cache
def tiny_processor() -> Any:
    """The embedded base's processor; changed by nobody: `copy.deepcopy` it first."""
    from vlmdet.models.loader import load

    return load("tiny").processor


def rows(count: int = 8) -> list[dict[str, Any]]:
    """Rows of one to three boxes each; pictures of two sizes."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        width, height = (112, 84) if i % 2 else (84, 112)
        boxes = []
        for j in range(1 + i % 3):
            x, y = rng.uniform(0, 0.2) * width, (0.05 + 0.3 * j) * height
            boxes.append([round(x, 1), round(y, 1), round(x + 0.6 * width, 1), round(y + 0.15 * height, 1)])
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        made.append({"image": Image.fromarray(pixels), "objects": {"bbox": boxes, "category": ["cup"] * len(boxes)}})
    return made


def target(row: dict[str, Any]) -> str:
    """The answer in Qwen2-VL's syntax."""
    width, height = row["image"].size
    parts = []
    for box in row["objects"]["bbox"]:
        a, b, c, d = (round(1000 * one / side) for one, side in zip(box, (width, height, width, height), strict=True))
        parts.append(f"<|object_ref_start|>cup<|object_ref_end|><|box_start|>({a},{b}),({c},{d})<|box_end|>")
    return "".join(parts)


def messages(answer: str | None, *, system: str | None = SYSTEM, question: str = QUESTION) -> list[dict[str, Any]]:
    """A conversation; without the last turn where there is no answer."""
    turns: list[dict[str, Any]] = [
        {"role": "system", "content": [{"type": "text", "text": system}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
    ]
    turns = turns if system is not None else turns[1:]
    return turns if answer is None else [*turns, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def convert(row: dict[str, Any]) -> dict[str, Any]:
    """The healthy converter."""
    return {"messages": messages(target(row)), "image": row["image"]}


def render(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The healthy question at inference."""
    return messages(None)


def encode(processor: Any, examples: list[dict[str, Any]], **more: Any) -> Any:
    """Render and tokenise, padded, without labels."""
    texts = [processor.apply_chat_template(one["messages"], tokenize=False) for one in examples]
    return processor(text=texts, images=[[one["image"]] for one in examples], padding=True, return_tensors="pt", **more)


def spans(ids: list[int], processor: Any) -> list[tuple[int, int]]:
    """Places from behind each `<|im_start|>assistant` and newline up to and with its end token."""
    tokenizer = processor.tokenizer
    start = tokenizer(START, add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    found = []
    for i in range(len(ids) - len(start) + 1):
        if ids[i : i + len(start)] == start:
            stop = next((j for j in range(i + len(start), len(ids)) if ids[j] == end), len(ids) - 1)
            found.append((i + len(start), stop + 1))
    return found


def collator(
    processor: Any,
    *,
    change: Callable[[Any, Any], None] | None = None,
    end: bool = True,
    turns: slice = slice(None),
    **more: Any,
) -> Callable[[list[dict[str, Any]]], Any]:
    """Make a healthy collator; `change(batch, processor)` breaks its labels afterwards."""

    def collate(examples: list[dict[str, Any]]) -> Any:
        batch = encode(processor, examples, **more)
        labels = torch.full_like(batch["input_ids"], -100)
        for row, ids in enumerate(batch["input_ids"].tolist()):
            for first, stop in spans(ids, processor)[turns]:
                stop = stop if end else stop - 1
                labels[row, first:stop] = batch["input_ids"][row, first:stop]
        batch["labels"] = labels
        if change is not None:
            change(batch, processor)
        return batch

    return collate


def subject(**parts: Any) -> Subject:
    """A healthy subject with some parts replaced."""
    processor = parts.get("processor") or tiny_processor()
    values: dict[str, Any] = {
        "rows": rows(),
        "convert": convert,
        "processor": processor,
        "collate": collator(processor),
    }
    return Subject(**{**values, **parts})


def told(checks: tuple[Check, ...], given: Subject, *, least: float = 0.0) -> list[str]:
    """Return the ids that checks find, in the order in which they are ranked; not those below a severity."""
    from vlmdet.doctor.findings import finding_from_dict, rank

    evidence = Evidence(given)
    found: list[Finding] = []
    for check in checks:
        for kind, fields in run_check(check, evidence):
            assert "itself failed" not in fields.get("needs", ""), fields
            if kind == "finding" and fields["severity"] >= least:
                found.append(finding_from_dict(fields))
    return [one.id for one in rank(found)[0]]

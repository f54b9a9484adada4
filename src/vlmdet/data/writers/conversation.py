"""Words the conversations of training files for other trainers, and says what they assume.

When: ONCE, by the writers of `swift`, `llamafactory` and `trl`. Question and answer are those that this tool trains with:
prompts of `grounding.prompts`, the text of the codec, boxes from top to bottom. A codec that writes pixels of the resized
picture needs the size that the trainer will make, so a file fits one family, one trainer and one pair of pixel limits;
`conversion.json` names them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from vlmdet.data.dataset import build_messages
from vlmdet.data.writers.files import Row, Writing
from vlmdet.errors import ConfigError, DataError
from vlmdet.grounding import View, get_codec
from vlmdet.grounding.prompts import PROMPT_VERSION
from vlmdet.grounding.sizes import qwen_size

_TAG = re.compile(r"<(?:image|video|audio|bbox|ref-object|cot-process)>")


class Processor(NamedTuple):
    """How a family's published processor resizes: multiples of `factor`, between two numbers of pixels."""

    factor: int
    min_pixels: int
    max_pixels: int


PROCESSORS = {
    "qwen2_vl": Processor(28, 3136, 12_845_056),
    "qwen2_5_vl": Processor(28, 3136, 12_845_056),
    "qwen3_vl": Processor(32, 65_536, 16_777_216),
}
"""By codec, from `preprocessor_config.json` of the published models; other families write no number that depends on it."""


@dataclass(frozen=True)
class Training:
    """What training files are written for.

    Attributes:
        codec: how the family writes boxes; see `vlmdet.grounding.CODECS`.
        min_pixels: what the trainer is told; None for its default.
        max_pixels: what the trainer is told; None for its default.
    """

    codec: str = "qwen2_vl"
    min_pixels: int | None = None
    max_pixels: int | None = None


class Conversation(NamedTuple):
    """What is said about one picture, and the numbers of its boxes in the order of the answer."""

    system: str
    question: str
    answer: str
    order: list[int]


def converse(row: Row, asked: tuple[str, ...], codec: str, view: View) -> Conversation:
    """Word the conversation about one picture; `asked` are the labels of the question."""
    order = row.sample.boxes.raster_order().tolist()
    labels = [row.sample.labels[number] for number in order]
    messages = build_messages(
        asked,
        boxes=row.sample.boxes[order],
        labels=labels,
        view=view,
        codec=codec,
        box_order="as_given",
        own_words=True,
    )
    system, question, answer = ("".join(part.get("text", "") for part in message["content"]) for message in messages)
    return Conversation(system, question, answer, order)


def check_training(writing: Writing, training: Training) -> None:
    """Refuse what no training file can hold.

    Raises:
        ConfigError: the codec is unknown, or the pixel limits cross.
        DataError: there is no class to ask for, or a class name holds a trainer's own tag.
    """
    get_codec(training.codec)
    low, high = training.min_pixels, training.max_pixels
    if any(limit is not None and limit < 1 for limit in (low, high)) or (low or 0) > (high or float("inf")):
        raise ConfigError(f"--min-pixels {low} and --max-pixels {high} leave no size", "give positive numbers in order")
    if not writing.dataset.labels:
        raise DataError(f"{writing.dataset.source} has no class, so there is nothing to ask for")
    for label in writing.dataset.labels:
        if tag := _TAG.search(label):
            raise DataError(f"the class {label!r} holds {tag[0]}, which trainers replace", "rename it with --rename")


def limits(training: Training, default: tuple[int, int]) -> tuple[int, int]:
    """Return the pixel limits in force, those that are not given from `default`."""
    low = default[0] if training.min_pixels is None else training.min_pixels
    return min(low, training.max_pixels or low), default[1] if training.max_pixels is None else training.max_pixels


def processor_view(codec: str, min_pixels: int, max_pixels: int) -> Callable[[int, int], View]:
    """Return how a family's processor resizes a picture under pixel limits."""
    processor = PROCESSORS.get(codec)

    def view_of(width: int, height: int) -> View:
        if processor is None:
            return View(width, height, width, height)
        resized = qwen_size(width, height, min_pixels=min_pixels, max_pixels=max_pixels, factor=processor.factor)
        return View(width, height, *resized)

    return view_of


def describe(writing: Writing, training: Training, *, resize: str, use: list[str], **pixels: int) -> dict[str, Any]:
    """Return what `conversion.json` says about training files: what they assume, and what to tell the trainer."""
    sample = build_messages(writing.dataset.labels)
    return {
        "codec": training.codec,
        "codec_version": get_codec(training.codec).VERSION,
        "prompt_version": PROMPT_VERSION,
        "system_prompt": sample[0]["content"][0]["text"],
        "user_prompt": sample[1]["content"][1]["text"],
        "box_order": "raster",
        "resize": resize,
        **pixels,
        "use": use,
    }

"""System and user prompts, versioned: the one place that words the question.

The prompt is part of the contract of a run (`contract.json`): a model that was tuned under one wording is asked under
the same wording. A change of any string here needs a new `PROMPT_VERSION`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

PROMPT_VERSION = "detect-1"

SYSTEM_PROMPT = "You find objects in images and answer with their bounding boxes."

NONE_ANSWER = "none"
"""The whole answer for an image that holds none of the objects asked for."""


def build_user_prompt(labels: Sequence[str]) -> str:
    """Word the question for a list of labels.

    When: once per row in data preparation, and once per image in prediction.

    Input: `labels`, at least one, as they shall be written in the answer, e.g. `["nutrition table"]`.
    Output: `'Detect every nutrition table in this image. If there is none, answer: none'`; several labels become
    `'Detect every object in this image that is one of: barcode, logo. If there is none, answer: none'`.

    Raises:
        ValueError: `labels` is empty.
    """
    if not labels:
        raise ValueError("a prompt needs at least one label to ask for")
    what = labels[0] if len(labels) == 1 else None
    question = (
        f"every {what} in this image" if what else f"every object in this image that is one of: {', '.join(labels)}"
    )
    return f"Detect {question}. If there is none, answer: {NONE_ANSWER}"


NATIVE_PROMPT_VERSION = "native-1"

_ONE = "Outline the position of each {what} and output all the coordinates in JSON format."
_SEVERAL = (
    'Locate every instance that belongs to the following categories: "{what}". Report bbox coordinates in JSON format.'
)
_REFER = 'Locate "{what}", and output its bbox coordinates in JSON format.'
_PLAIN = (
    ' Answer with a JSON list of {{"bbox": [x1, y1, x2, y2], "label": "…"}}, where x and y are integers from 0 (left, top) '
    "to 1000 (right, bottom) of the image. If there is none, answer []."
)
_NATIVE: dict[str, tuple[str, str, str]] = {
    "qwen2_vl": (
        "Detect the bounding box of every {what} in this image.",
        "Detect the bounding box of every object in this image that is one of: {what}.",
        "Detect the bounding box of {what}.",
    ),
    "qwen2_5_vl": (_ONE, _SEVERAL, _REFER),
    "qwen3_vl": (_SEVERAL, _SEVERAL, _REFER),
    "paligemma": ("detect {what}", "detect {what}", "detect {what}"),
    "florence2": (
        "<OPEN_VOCABULARY_DETECTION>{what}",
        "<CAPTION_TO_PHRASE_GROUNDING>{what}",
        "<CAPTION_TO_PHRASE_GROUNDING>{what}",
    ),
    "internvl": (
        "Please detect and label all {what} in the image with their bounding boxes.",
        "Please detect and label all of these objects in the image with their bounding boxes: {what}.",
        "Please provide the bounding box coordinate of the region this sentence describes: <ref>{what}</ref>",
    ),
    "plain_json": (
        "Find every {what} in this image." + _PLAIN,
        "Find every object in this image that is one of: {what}." + _PLAIN,
        "Find what this describes: {what}." + _PLAIN,
    ),
}


def build_native_prompt(codec: str, labels: Sequence[str], *, task: Literal["detect", "refer"] = "detect") -> str:
    """Word the question as a family's own examples do: for a base that was not tuned under our wording.

    Input: name of the codec; `labels`, escaped; `task`, `detect` for every object of one or several classes, `refer` for
    the one thing that a free text describes: the only label.
    Output: e.g. `'detect barcode ; logo'` for PaliGemma. Our own wording, for every family, is `build_user_prompt`.

    Source: spatial understanding and 2D grounding cookbooks of Qwen2.5-VL and Qwen3-VL; "detect" of PaliGemma's model card;
    task tokens of `Florence2Processor` in transformers (`<OPEN_VOCABULARY_DETECTION>` takes one class); the referring
    question of InternVL's RefCOCO evaluation. The sentences for Qwen2-VL, for classes in InternVL, and for plain JSON are
    ours: none is published.

    Raises:
        ValueError: `labels` is empty, `refer` got more than one, or the codec has no prompts.
    """
    if not labels or (task == "refer" and len(labels) != 1):
        raise ValueError(f"the task {task} got {len(labels)} labels")
    if codec not in _NATIVE:
        raise ValueError(f"no prompts for the codec '{codec}'")
    one, several, refer = _NATIVE[codec]
    template = refer if task == "refer" else one if len(labels) == 1 else several
    return template.format(what={"paligemma": " ; ", "florence2": ". "}.get(codec, ", ").join(labels))

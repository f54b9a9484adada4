"""System and user prompts, versioned: the one place that words the question.

The prompt is part of the contract of a run (`contract.json`): a model that was tuned under one wording is asked under
the same wording. A change of any string here needs a new `PROMPT_VERSION`.
"""

from __future__ import annotations

from collections.abc import Sequence

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

"""What a run asks: the system message and the question, by the codec of its answers.

When: ALWAYS; no torch. Families that talk are asked in our words (`prompts.build_user_prompt`), whatever notation they answer
in. PaliGemma and Florence-2 know neither instructions nor a system message: they were trained on tasks, `detect cup ; logo`,
and write location tokens only when asked so. A run that tunes them asks that way too: it starts from what the base can do,
and the base is scored on a question that it understands. What they lack is learnt: the answer `none`.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlmdet.grounding.codec import escape_label, guard_label
from vlmdet.grounding.prompts import (
    NATIVE_PROMPT_VERSION,
    PROMPT_VERSION,
    SYSTEM_PROMPT,
    build_native_prompt,
    build_user_prompt,
)

TASK_CODECS = frozenset({"paligemma", "florence2"})
"""Codecs of families that are asked by a task of theirs."""


def question_of(codec: str, labels: Sequence[str]) -> tuple[str, str]:
    r"""Word what a model is asked beside a picture.

    When: once per row in data preparation, once per picture in prediction, once per contract.

    Input: name of the codec that the answer is written in; `labels` as the user writes them, at least one.
    Output: system message and question, control tokens in labels made harmless: `("You find …", "Detect every cup …")`;
    `("", "detect cup ; logo")` for `paligemma`. PaliGemma's processor puts `<bos>` before and a line break after it,
    Florence-2's turns the task token into its sentence (`<OPEN_VOCABULARY_DETECTION>cup` -> `Locate cup in the image.`).

    Raises:
        ValueError: `labels` is empty.
    """
    if codec in TASK_CODECS:
        return native_question_of(codec, labels)
    return SYSTEM_PROMPT, build_user_prompt([escape_label(label) for label in labels])


def native_question_of(codec: str, labels: Sequence[str]) -> tuple[str, str]:
    """Word what a base is asked in its family's own words: no system message, and the question; see `build_native_prompt`."""
    guard = guard_label if codec in TASK_CODECS else escape_label
    return "", build_native_prompt(codec, [guard(label) for label in labels])


def version_of_question(codec: str, labels: Sequence[str], asked: tuple[str, str]) -> str:
    """Tell which version of our prompts a question is, for the record of an evaluation.

    When: once per evaluation.

    Input: as `question_of`; `asked`, system message and question as they were put.
    Output: `PROMPT_VERSION` or `NATIVE_PROMPT_VERSION`; `other` for words that this version of the tool does not put.
    """
    if asked == native_question_of(codec, labels):
        return NATIVE_PROMPT_VERSION
    return PROMPT_VERSION if asked == question_of(codec, labels) else "other"

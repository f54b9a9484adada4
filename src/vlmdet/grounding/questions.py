"""What a run asks: the system message and the question, by the codec of its answers.

When: ALWAYS; no torch. Families that talk are asked in our words (`prompts.build_user_prompt`), whatever notation they answer
in. PaliGemma and Florence-2 know neither instructions nor a system message: they were trained on tasks, `detect cup ; logo`,
and write location tokens only when asked so. A run that tunes them asks that way too: it starts from what the base can do,
and the base is scored on a question that it understands. What they lack is learnt: the answer `none`.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlmdet.grounding.codec import escape_label, guard_label
from vlmdet.grounding.prompts import SYSTEM_PROMPT, build_native_prompt, build_user_prompt

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
        return "", build_native_prompt(codec, [guard_label(label) for label in labels])
    return SYSTEM_PROMPT, build_user_prompt([escape_label(label) for label in labels])

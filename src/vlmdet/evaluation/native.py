"""Ask a base in its own words: what it can do before anybody tunes it, by the prompt that its family was trained on.

When: AFTER training, for `eval/<split>/base_native`; no torch. Pixels and pictures are those of the tuned model; question,
notation and the names in the answers are the family's own. A base that fails under our prompt may be good under its own, so
both are told.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from vlmdet.contract import Contract
from vlmdet.grounding import get_codec
from vlmdet.grounding.questions import native_question_of


def native_contract(contract: Contract, codec: str) -> Contract:
    """Return the contract by which a base is asked in its family's own words.

    When: once per evaluation with the base.

    Input: the tuned model's contract; `codec`, the family's own (`models.loader.codec_of(model, "auto")`).
    Output: the same pixels, labels and base, with the family's prompt and notation and without a system message.
    """
    system_prompt, user_prompt = native_question_of(codec, contract.labels)
    return dataclasses.replace(
        contract,
        system_prompt=system_prompt,
        user_prompt=user_prompt,
        codec=codec,
        codec_version=get_codec(codec).VERSION,
    )


def map_label(label: str | None, labels: Sequence[str]) -> str | None:
    """Return the label that a base means by a word of its own: `Cups` is `cup`, and `nutrition table` is `nutrition-table`.

    Input: what the answer calls the box; the labels that were asked for.
    Output: the label that differs from it in case, blanks, hyphens, underscores or a plural s alone; the only one, where one
    is asked for and the box has no name; else the word as it is.
    """
    if label is None:
        return labels[0] if len(labels) == 1 else None
    if label in labels:
        return label
    same = [name for name in labels if _plain(name) == _plain(label)]
    return same[0] if len(same) == 1 else label


def _plain(label: str) -> str:
    words = re.sub(r"[\s_-]+", " ", label.casefold()).strip()
    return words.removesuffix("s")

"""The wording that the embedded base was trained on stays; native prompts word every family and task."""

from __future__ import annotations

import pytest

from vlmdet.grounding import CODECS
from vlmdet.grounding.prompts import (
    NONE_ANSWER,
    PROMPT_VERSION,
    SYSTEM_PROMPT,
    build_native_prompt,
    build_user_prompt,
)


def test_our_wording() -> None:
    assert (PROMPT_VERSION, NONE_ANSWER) == ("detect-1", "none")
    assert SYSTEM_PROMPT == "You find objects in images and answer with their bounding boxes."
    assert build_user_prompt(["cup"]) == "Detect every cup in this image. If there is none, answer: none"


@pytest.mark.parametrize("codec", CODECS)
def test_every_family_and_task(codec: str) -> None:
    assert "red cup" in build_native_prompt(codec, ["red cup"])
    several = build_native_prompt(codec, ["cup", "dog"])
    assert "cup" in several and "dog" in several
    assert "{" not in build_native_prompt(codec, ["the cup on the left"], task="refer").replace('{"bbox"', "")
    with pytest.raises(ValueError):
        build_native_prompt(codec, ["cup", "dog"], task="refer")
    with pytest.raises(ValueError):
        build_native_prompt(codec, [])


def test_known_wordings() -> None:
    assert build_native_prompt("paligemma", ["cup", "dog"]) == "detect cup ; dog"
    assert build_native_prompt("florence2", ["cup"]) == "<OPEN_VOCABULARY_DETECTION>cup"
    assert '{"bbox": [x1, y1, x2, y2], "label": "…"}' in build_native_prompt("plain_json", ["cup"])
    with pytest.raises(ValueError):
        build_native_prompt("qwen4", ["cup"])

"""What a run asks, family by family, and that no label can smuggle a control token into it."""

from __future__ import annotations

import pytest

from vlmdet.grounding.questions import native_question_of, question_of, version_of_question

SYSTEM = "You find objects in images and answer with their bounding boxes."


@pytest.mark.parametrize(
    ("codec", "labels", "system", "question"),
    [
        ("qwen2_vl", ["cup"], SYSTEM, "Detect every cup in this image. If there is none, answer: none"),
        ("internvl", ["cup"], SYSTEM, "Detect every cup in this image. If there is none, answer: none"),
        ("paligemma", ["cup"], "", "detect cup"),
        ("paligemma", ["cup", "red sign"], "", "detect cup ; red sign"),
        ("florence2", ["cup"], "", "<OPEN_VOCABULARY_DETECTION>cup"),
        ("florence2", ["cup", "red sign"], "", "<CAPTION_TO_PHRASE_GROUNDING>cup. red sign"),
        # a label that is a control token of the family, or ends like the separator
        ("paligemma", ["<loc0001>", "cup;"], "", r"detect <\loc0001> ; cup\u003b"),
        ("florence2", ["<OD>"], "", r"<OPEN_VOCABULARY_DETECTION><\OD>"),
        (
            "qwen2_vl",
            ["a<|im_end|>"],
            SYSTEM,
            r"Detect every a<\|im_end|> in this image. If there is none, answer: none",
        ),
    ],
)
def test_each_family_is_asked_as_it_understands(codec: str, labels: list[str], system: str, question: str) -> None:
    assert question_of(codec, labels) == (system, question)


def test_nothing_to_ask_for_is_refused() -> None:
    for codec in ("paligemma", "qwen2_vl"):
        with pytest.raises(ValueError, match="label"):
            question_of(codec, [])


@pytest.mark.parametrize(("codec", "own"), [("qwen2_vl", "detect-1"), ("paligemma", "native-1")])
def test_the_version_of_a_question_is_that_of_its_words(codec: str, own: str) -> None:
    labels = ["cup", "x<|im_end|>"]
    assert version_of_question(codec, labels, question_of(codec, labels)) == own
    assert version_of_question(codec, labels, native_question_of(codec, labels)) == "native-1"
    system, question = question_of(codec, labels)
    assert version_of_question(codec, labels, (system, question + " ")) == "other"
    assert version_of_question(codec, ["cup"], (system, question)) == "other"

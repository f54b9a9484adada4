"""Scores of boxes: which tokens count, worked out by hand; then what holds for every answer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmdet.boxes import Boxes
from vlmdet.evaluation.scores import SCORE_SOURCES, TOKEN_SOURCES, score_boxes, score_consistency
from vlmdet.grounding import CODECS, View

VIEW = View(1000, 500, 1036, 504)
LN = {p: math.log(p) for p in (0.9, 0.8, 0.5, 0.4, 0.25, 0.2, 0.1)}


def score(codec: str, parts: list[tuple[str, float]], source: Any = "token_probability") -> list[float]:
    """Score an answer that is given as texts and probabilities of its tokens."""
    text = "".join(part for part, _ in parts)
    parsed = CODECS[codec].parse(text, VIEW)
    return score_boxes(
        parsed, text, [part for part, _ in parts], [math.log(p) if p else -math.inf for _, p in parts], source=source
    )


# Tokens that count have .5 and .125, whose geometric mean is .25 in equal number; all others .9 (.7 begins a box).
QWEN2 = [
    ("<|object_ref_start|>", 0.7), ("c", 0.5), ("up", 0.125), ("<|object_ref_end|>", 0.9), ("<|box_start|>", 0.9), ("(", 0.9),
    ("1", 0.5), (",", 0.9), ("2", 0.125), ("),(", 0.9), ("3", 0.5), (",", 0.9), ("4", 0.125), (")", 0.9), ("<|box_end|>", 0.9),
]  # fmt: skip
QWEN3 = [
    ('[{"', 0.7), ("bbox", 0.9), ("_2d", 0.9), ('":', 0.9), (" [", 0.9), ("1", 0.5), (",", 0.9), (" ", 0.9), ("2", 0.125),
    (", ", 0.9), ("3", 0.5), (", ", 0.9), ("4", 0.125), ('], "', 0.9), ("label", 0.9), ('": "', 0.9), ("cup", 0.25), ('"}]', 0.9),
]  # fmt: skip
PALIGEMMA = [
    ("<loc0001>", 0.5), ("<loc0002>", 0.125), ("<loc0003>", 0.5), ("<loc0004>", 0.125), (" c", 0.5), ("up", 0.125), ("<eos>", 0.9)
]  # fmt: skip
FLORENCE2 = [("<s>", 0.9), ("cup", 0.25), *[(f"<loc_{i}>", p) for i, p in enumerate((0.5, 0.125, 0.5, 0.125))]]
INTERNVL = [("<ref>", 0.7), ("cup", 0.25), ("</ref>", 0.9), ("<box>", 0.9), ("[[", 0.9), ("1", 0.25), (", ", 0.9), ("2", 0.25),
            (", ", 0.9), ("3", 0.25), (", ", 0.9), ("4", 0.25), ("]]", 0.9), ("</box>", 0.9)]  # fmt: skip
BY_NAME = [
    ("red", 0.5),
    (" cup", 0.125),
    (": ", 0.9),
    ("[", 0.9),
    ("1,", 0.25),
    ("2,", 0.25),
    ("3,", 0.25),
    ("4", 0.25),
    ("]", 0.9),
]


@pytest.mark.parametrize(
    ("codec", "parts", "first"),
    [
        ("qwen2_vl", QWEN2, 0.7),
        ("qwen3_vl", QWEN3, 0.7),
        ("plain_json", QWEN3, 0.7),
        ("paligemma", PALIGEMMA, 0.5),
        ("florence2", FLORENCE2, 0.25),
        ("internvl", INTERNVL, 0.7),
        ("qwen3_vl", BY_NAME, 0.5),
    ],
)
def test_tokens_of_label_and_coordinates_count(codec: str, parts: list[tuple[str, float]], first: float) -> None:
    assert score(codec, parts) == pytest.approx([0.25])
    assert score(codec, parts, "first_token") == pytest.approx([first])


def test_each_box_has_its_own_score() -> None:
    second = [(part, 0.3 if p == 0.7 else 0.1 if p < 0.6 else p) for part, p in QWEN2]
    assert score("qwen2_vl", [*QWEN2, *second]) == pytest.approx([0.25, 0.1])
    assert score("qwen2_vl", [*QWEN2, *second], "first_token") == pytest.approx([0.7, 0.3])
    assert score("qwen2_vl", [("none", 0.5)]) == []


def test_a_shared_name_counts_once() -> None:
    tail = [
        ("(", 0.9),
        ("5", 0.1),
        (",", 0.9),
        ("6", 0.1),
        ("),(", 0.9),
        ("7", 0.1),
        (",", 0.9),
        ("8", 0.1),
        (")", 0.9),
    ]
    assert score("qwen2_vl", [*QWEN2, *tail]) == pytest.approx([0.25, 0.1])


def test_an_impossible_token_makes_the_score_zero() -> None:
    assert score("paligemma", [*PALIGEMMA[:3], ("<loc0004>", 0.0), *PALIGEMMA[4:]]) == [0.0]


def test_a_token_without_text_belongs_to_the_character_that_it_begins() -> None:
    parts = [*PALIGEMMA[:4], (" ", 0.9), ("", 0.5), ("杯", 0.125)]
    assert score("paligemma", parts) == pytest.approx([0.25])
    begins = [("", 0.4), ("杯", 0.5), *FLORENCE2[2:]]
    assert score("florence2", begins, "first_token") == pytest.approx([0.4])


def test_a_name_of_marks_alone() -> None:
    """`++` has no letter: the numbers count."""
    assert score("florence2", [("++", 0.9), *FLORENCE2[2:]]) == pytest.approx([0.25])


def test_what_does_not_fit_is_refused() -> None:
    parsed = CODECS["qwen2_vl"].parse("none", VIEW)
    for tokens, logprobs in ((["no"], [0.0]), (["none"], []), (["none"], [math.nan])):
        with pytest.raises(ValueError):
            score_boxes(parsed, "none", tokens, logprobs, source="first_token")
    with pytest.raises(ValueError, match="token_probability"):
        score_boxes(parsed, "none", ["none"], [0.0], source="consistency")
    assert set(TOKEN_SOURCES) < set(SCORE_SOURCES)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("source", TOKEN_SOURCES)
@given(
    data=st.data(),
    n=st.integers(1, 5),
    labels=st.lists(st.sampled_from(["cup", "", "表", '"a": 1', "++"]), min_size=5, max_size=5),
)
@settings(deadline=None, max_examples=25)
def test_between_the_least_and_the_greatest_probability(
    codec: str, source: Any, data: st.DataObject, n: int, labels: list[str]
) -> None:
    boxes = Boxes(np.array([[0.1 * i, 0.2, 0.1 * i + 0.3, 0.7] for i in range(n)]))
    text = CODECS[codec].encode(labels[:n], boxes, VIEW)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=60)))
    tokens = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    logprobs = data.draw(st.lists(st.floats(-20, 0), min_size=len(tokens), max_size=len(tokens)))
    scores = score_boxes(CODECS[codec].parse(text, VIEW), text, tokens, logprobs, source=source)
    assert len(scores) == n
    assert all(
        math.exp(min(logprobs)) <= value * (1 + 1e-9) and value <= math.exp(max(logprobs)) * (1 + 1e-9)
        for value in scores
    )
    certain = score_boxes(CODECS[codec].parse(text, VIEW), text, tokens, [0.0] * len(tokens), source=source)
    assert certain == [1.0] * n


def test_consistency_is_the_share_of_answers_with_the_box() -> None:
    def answer(*rows: tuple[str, int, int, int, int]) -> Any:
        return CODECS["florence2"].parse(
            "".join(f"{n}<loc_{a}><loc_{b}><loc_{c}><loc_{d}>" for n, a, b, c, d in rows), VIEW
        )

    cup, dog = ("cup", 0, 0, 100, 100), ("dog", 500, 500, 700, 700)
    asked = answer(cup, dog)
    half = ("cup", 0, 0, 100, 50)  # 100 x 50 of 100 x 100: IoU .5
    less = ("cup", 0, 0, 100, 49)
    nothing = CODECS["florence2"].parse("I cannot see that", VIEW)
    assert score_consistency(asked, [asked, asked]) == [1.0, 1.0]
    assert score_consistency(asked, [answer(half), answer(less), answer(dog, dog), nothing]) == [0.25, 0.25]
    assert score_consistency(asked, [answer(("dog", 0, 0, 100, 100))]) == [0.0, 0.0]  # another label
    assert score_consistency(nothing, [asked]) == []
    with pytest.raises(ValueError):
        score_consistency(asked, [])

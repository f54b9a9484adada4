"""Scores of boxes that a model wrote as text: from the probabilities of their tokens, or from how often it says the same.

When: AFTER generation, once per answer; numpy only. `Parsed.spans` says which characters are a box's own.

    text     <|object_ref_start|> nut rition  table <|object_ref_end|> <|box_start|> ( 9 2 , 3 1 0 ) … <|box_end|>
    counts                        ×   ×       ×                                        × ×   × × ×

    token_probability   geometric mean of the probabilities of the box's label and coordinate tokens: those marked above
    first_token         the probability of the first token of the box, marks included
    consistency         share of sampled answers that have the box too

A token counts for `token_probability` if it has a letter or a digit of the name or of a number. What only holds them together
does not: control tokens, tags, brackets, commas, blanks, keys of JSON, and the letters of `<loc…>`. Those are close to certain
once a box is begun, and would dilute what the model doubts. A token with both, `"cup"}`, counts. The name counts for one box
where several share it. The geometric mean makes boxes with long and short names comparable.

`first_token` is, for most families, the decision to write another box rather than to end the answer: `<|object_ref_start|>`
against `<|im_end|>`. PaliGemma begins a box with a number and Florence-2 with its name: the token holds that choice as well.
Pix2Seq scores a box by its class token (Chen et al. 2022, section 2.3).

None of these is a probability that the box is right before `calibration.py` has made it one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, get_args

import numpy as np

from vlmdet.evaluation.match import IOU_DECIMALS
from vlmdet.grounding import Parsed
from vlmdet.grounding.codec import CONTROL

ScoreSource = Literal["token_probability", "first_token", "consistency"]
SCORE_SOURCES: tuple[str, ...] = get_args(ScoreSource)
TOKEN_SOURCES = ("token_probability", "first_token")
"""Those that need the probabilities of one answer; `consistency` needs several answers."""

_SYNTAX = re.compile(
    rf"{CONTROL.pattern}|</?+(?:ref|box|quad|s|pad|bos|eos)>|<loc_?+|<seg_?+\d++>"
    r"|(?P<key>[\"'“]?+[^\W\d]\w{0,40}+[\"'”]?+)\s*+[:：]"
)
_CONTENT = re.compile(r"[^\W_]")


def score_boxes(
    parsed: Parsed, text: str, tokens: Sequence[str], logprobs: Sequence[float], *, source: ScoreSource
) -> list[float]:
    """Score each box of an answer by the probabilities of its tokens.

    When: once per answer, after parsing.

    Input: what was `parsed` from `text`; the texts of the answer's tokens, which together are `text` (one that ends inside a
    character is "", and belongs to the next); a natural logarithm of the probability for each; `source`, one of `TOKEN_SOURCES`.
    Output: a score from 0 to 1 for each box. A box without words of its own (two boxes in one quoted text) has 0.

    Raises:
        ValueError: the tokens are not those of the text, a logarithm is no number, or the source needs several answers.
    """
    if source not in TOKEN_SOURCES:
        raise ValueError(f"'{source}' is no score of one answer's tokens: {', '.join(TOKEN_SOURCES)}")
    if "".join(tokens) != text or len(tokens) != len(logprobs):
        raise ValueError(
            f"{len(tokens)} tokens and {len(logprobs)} probabilities are not those of the text {text[:60]!r}"
        )
    chances = np.minimum(np.asarray(logprobs, dtype=np.float64).reshape(-1), 0.0)
    if np.isnan(chances).any():
        raise ValueError("a token's probability is not a number")
    ends = np.fromiter(accumulate(len(token) for token in tokens), dtype=np.int64, count=len(tokens))
    scores = []
    for (start, end), label in zip(parsed.spans, parsed.labels, strict=True):
        if source == "first_token":
            rows = _rows(ends, [start] if end > start else [])[:1]
        else:
            places = _content(text[start:end], label)
            rows = _rows(ends, [start + place for place in places] if places else list(range(start, end)))
        scores.append(float(np.exp(chances[rows].mean())) if len(rows) else 0.0)
    return scores


def score_consistency(parsed: Parsed, samples: Sequence[Parsed], *, threshold: float = 0.5) -> list[float]:
    """Score each box of an answer by the share of other answers to the same question that have it too.

    When: once per picture, after k sampled answers.

    Input: the answer to be scored; k >= 1 `samples`; the lowest IoU at which two boxes of the same label are the same box.
    Output: a multiple of 1/k from 0 to 1 for each box; a sample counts once, whatever it repeats. A sample that could not
    be parsed has no box, and counts against all.

    Raises:
        ValueError: there is no sample.
    """
    if not samples:
        raise ValueError("consistency needs at least one sampled answer")
    found = np.zeros(len(parsed.boxes))
    for sample in samples:
        same = np.asarray([[one == other for other in sample.labels] for one in parsed.labels], dtype=bool)
        near = parsed.boxes.iou(sample.boxes).round(IOU_DECIMALS) >= threshold
        found += (near & same.reshape(near.shape)).any(axis=1)
    return [float(count) for count in found / len(samples)]


def _content(words: str, label: str | None) -> list[int]:
    """Return which characters are letters or digits of a name or of a number."""
    content = {match.start() for match in _CONTENT.finditer(words)}
    for match in _SYNTAX.finditer(words):
        key = (match["key"] or "").strip("\"'“”")
        if not key or label is None or key not in label:  # `red cup: [1, 2, 3, 4]` has its name before a colon
            content.difference_update(range(*match.span()))
    return sorted(content)


def _rows(ends: np.ndarray, places: Sequence[int]) -> np.ndarray:
    """Return the numbers of the tokens that hold characters, in order; tokens without text go with the next that has one.

    Input: where each token ends in the text, in characters; places of characters.
    """
    rows = set(np.searchsorted(ends, np.asarray(places, dtype=np.int64), side="right").tolist())
    for row in list(rows):
        while row and ends[row - 1] == (ends[row - 2] if row > 1 else 0):
            row -= 1
            rows.add(row)
    return np.asarray(sorted(rows), dtype=np.int64)

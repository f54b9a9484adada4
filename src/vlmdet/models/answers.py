"""What goes into an engine and what comes out: a picture to ask about, an answer, or the reason why there is none.

When: PER RUN, between `evaluation.predict` and whatever generates; no torch, for an answer may come from a server.
An engine is a callable `engine(asks) -> Iterator[tuple[int, Answer | RowError]]`; its results come in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vlmdet.grounding.codec import View
from vlmdet.records import Sample

MAX_BOXES = 100
"""At most so many in a constrained answer; COCO counts no more of a picture either."""


@dataclass(frozen=True)
class Ask:
    """One picture to ask about.

    Attributes:
        index: its place among the samples.
        sample: opened by `sample.image`, lazily, inside the engine.
        messages: the conversation without an answer, with a placeholder for the picture; see `data.dataset.build_messages`.
        view: its original size, and the size that the model sees.
    """

    index: int
    sample: Sample
    messages: list[dict[str, Any]]
    view: View


@dataclass(frozen=True)
class Answer:
    """What a model wrote about one picture.

    Attributes:
        text: the answer, control tokens included, without the end token.
        prompt_tokens: length of the prompt, image tokens included.
        image_tokens: of these, image tokens.
        answer_tokens: tokens generated, the end token included.
        truncated: the limit was reached before an end token.
        milliseconds: wall time of the batch, divided by its rows; of a server, of the request.
        tokens: the texts of the answer's tokens, without the end token; together they are `text`. Empty when not asked for.
        logprobs: natural logarithm of each token's probability, as many as `tokens`.
        samples: texts of further answers to the same question, drawn by chance. Empty when not asked for.
    """

    text: str
    prompt_tokens: int
    image_tokens: int
    answer_tokens: int
    truncated: bool
    milliseconds: float
    tokens: tuple[str, ...] = ()
    logprobs: tuple[float, ...] = ()
    samples: tuple[str, ...] = ()


@dataclass(frozen=True)
class RowError:
    """A picture that could not be run; `reason` is one line."""

    reason: str


Engine = Callable[[Sequence[Ask]], Iterator[tuple[int, Answer | RowError]]]


def token_texts(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Return the text of each token of an answer, so that together they are the text of all.

    When: once per answer whose token probabilities are asked for.

    Input: a tokenizer of transformers; ids without the end token.
    Output: `("<|box_start|>", "(", "12", ",", …)`. Of a character whose bytes are spread over several tokens, the last one has
    the text, and those before it have "".
    """
    alone: list[str] = tokenizer.batch_decode([[token] for token in ids], skip_special_tokens=False)
    if "".join(alone) == tokenizer.decode(list(ids), skip_special_tokens=False):
        return tuple(alone)  # as almost always
    texts, done = [], ""
    for count in range(1, len(ids) + 1):
        whole = tokenizer.decode(list(ids[:count]), skip_special_tokens=False)
        if whole.endswith("\ufffd") and count < len(ids):
            texts.append("")
            continue
        texts.append(whole[len(done) :])
        done = whole
    return tuple(texts)

"""Word a chat for an OpenAI-compatible server, and read what it sends back.

When: AFTER training, per picture, by `evaluation.server`; no torch. What a server sends is checked field by field before use.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec


class Token(msgspec.Struct):
    """One token of an answer; `bytes` where the server sends them."""

    token: str
    logprob: float
    bytes: list[Annotated[int, msgspec.Meta(ge=0, le=255)]] | None = None


class Logprobs(msgspec.Struct):
    content: list[Token] | None = None


class Message(msgspec.Struct):
    content: str | None = None


class Choice(msgspec.Struct):
    """`token_ids` are vLLM's, the end token included."""

    message: Message
    finish_reason: str | None = None
    logprobs: Logprobs | None = None
    token_ids: list[int] | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int = 0


class Completion(msgspec.Struct):
    """A chat completion; `prompt_token_ids` are vLLM's, image tokens included."""

    choices: Annotated[list[Choice], msgspec.Meta(min_length=1)]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None


def read_completion(said: Any) -> Completion:
    """Check what a server sent.

    Input: parsed JSON, of which everything that is not needed is left aside.

    Raises:
        ValueError: it is no chat completion, or gave up its answer; the message says where.
    """
    if isinstance(said, dict) and said.get("error"):  # some servers say 200 and then this
        raise ValueError(f"an error: {str(said['error'])[:200]}")
    completion = msgspec.convert(said, Completion)  # its ValidationError is a ValueError
    for choice in completion.choices:
        if choice.finish_reason not in ("stop", "length"):
            raise ValueError(f"a broken-off answer: finish_reason is {str(choice.finish_reason)[:40]!r}")
        for entry in (choice.logprobs.content or ()) if choice.logprobs else ():
            if not math.isfinite(entry.logprob):
                raise ValueError(f"the probability {entry.logprob} of {entry.token[:40]!r}")
    return completion


def texts_of(tokens: Sequence[Token], text: str) -> tuple[str, ...] | None:
    """Return the texts of tokens that together are `text`, from their own texts or else their bytes; None where neither fits.

    The end token may be listed, and is not in the text. Of a character that is spread over several tokens, the last has it.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoded = [decoder.decode(bytes(entry.bytes or ())) for entry in tokens]
    for texts in ([entry.token for entry in tokens], decoded):
        for count in (len(texts), max(len(texts) - 1, 0)):
            if "".join(texts[:count]) == text:
                return tuple(texts[:count])
    return None


def chat_message(message: dict[str, Any], picture: str) -> dict[str, Any]:
    """Word a message of a conversation as OpenAI does: a text alone is a string; beside a picture it is a part.

    Input: a message of `data.dataset.build_messages`; `picture`, a URL that takes the place of its placeholder.
    """
    parts = message["content"]
    if all("image" not in part for part in parts):
        return {"role": message["role"], "content": "".join(part["text"] for part in parts)}
    return {
        "role": message["role"],
        "content": [
            {"type": "image_url", "image_url": {"url": picture}}
            if "image" in part
            else {"type": "text", "text": part["text"]}
            for part in parts
        ],
    }

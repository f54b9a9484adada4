"""The bytes that a token stands for, where a letter may be cut into several tokens.

When: to find an answer of Chinese or accented letters among token ids. Source: GPT-2's byte-level vocabulary writes each
byte as one
printable letter; sentencepiece writes bytes that it has no piece for as `<0xE4>`.
"""

from __future__ import annotations

import functools
import re
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@functools.cache
def _letters() -> dict[str, int]:
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [one for one in range(256) if one not in shown]
    return {chr(one): one for one in shown} | {chr(256 + i): one for i, one in enumerate(hidden)}


def bytes_of(tokenizer: Any, token: int, text: str) -> bytes:
    """Return the bytes of one token; those of `text`, its text as known, where it is not cut from a letter."""
    if "�" not in text:
        return text.encode()
    piece = tokenizer.convert_ids_to_tokens(token)
    if not isinstance(piece, str):
        return text.encode()
    single = _BYTE.fullmatch(piece)
    if single:
        return bytes([int(single.group(1), 16)])
    letters = _letters()
    if all(one in letters for one in piece):
        return bytes(letters[one] for one in piece)
    return text.encode()


def latin(data: bytes) -> str:
    """Return bytes as a text of one character each, so that places count bytes."""
    return data.decode("latin-1")

"""Decoding that cannot leave a codec's notation or the label list: of each row's next tokens, those that the grammar allows.

When: PER RUN, in decoding with `--constrain`; the unconstrained answer is the default.

    once per tokenizer   `Constraint`: the bytes of every token, as a tree
    once per batch       `Constraint.start(views)`: nothing is written yet
    every step           the result of that, on logits: not allowed becomes -inf; ends are allowed where an answer may end, only

An answer is a chain of pieces (`grounding.grammar`): to the first corner of a box, then for each box from its second corner to
the first of the next, or to the end. Each piece is a small regular expression, and the second corner is never left of the first
or above it. Which tokens may follow is worked out by llguidance, lazily: no automaton is multiplied by a vocabulary beforehand.

Added tokens, such as `<|box_start|>`, are one token each: nobody can spell them out of `<|`, `box`, …. Each begins with a mark
that no other token has, in the tree and in the expressions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import llguidance
import llguidance.hf
import numpy as np
import torch

from vlmdet.boxes import Boxes
from vlmdet.grounding import View, get_codec
from vlmdet.grounding.grammar import closing_pattern, first_corner, literal, opening_pattern

_MARK = "\U0010fffd"
"""Private use: no text has it, and its first byte, F4, belongs to this plane alone."""


class Constraint:
    """What is allowed for one tokenizer and one list of labels.

    Input: `tokenizer`, a fast one of transformers; name of the `codec`; `labels` as the user writes them; the largest number of
    boxes (see `boxes_that_fit`); `ends`, the ids of which each ends an answer; `lead`, ids with which an answer begins ahead of
    its text: `<s>` of Florence-2.

    Raises:
        ValueError: there is no label, no end, or no box is allowed.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        codec: str,
        labels: Sequence[str],
        max_boxes: int,
        ends: Sequence[int],
        lead: Sequence[int] = (),
    ) -> None:
        if not labels or max_boxes < 1 or not ends:
            raise ValueError(f"{len(labels)} labels, up to {max_boxes} boxes and {len(ends)} ends make no answer")
        self.codec, self.labels, self.max_boxes, self.ends = codec, list(labels), max_boxes, sorted(set(ends))
        self.lead = list(lead)
        known = llguidance.hf.from_tokenizer(tokenizer)
        added = set(tokenizer.get_added_vocab().values())
        mark = _MARK.encode()
        self.bytes: list[bytes] = []
        for token in range(known.vocab_size):
            text = known.decode_bytes([token])
            # a byte of the mark's plane is in no answer: b"" is never allowed
            self.bytes.append(mark + text if token in added else b"" if mark[:1] in text else text)
        self.tree = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Tokens(self.bytes, self.ends)))
        # `<loc0001>`, `<loc0002>`, … begin alike, and the expressions have patterns for their numbers
        begins = {literal(re.sub(r"\d+>\Z", "", text)) for text in tokenizer.get_added_vocab()} - {""}
        self.begins = re.compile(
            "|".join(re.escape(begin) for begin in sorted(begins, key=len, reverse=True)) or r"(?!)"
        )

    def start(self, views: Sequence[View]) -> Choice:
        """Return what changes the logits of one batch; `views`, one for each row, in its order."""
        return Choice([_Row(self, view) for view in views])

    def matcher(self, pattern: str) -> Any:
        """Return the state of the library at the start of an expression."""
        marked = self.begins.sub(lambda begin: _MARK + begin[0], pattern)
        grammar = f'%llguidance {{"no_forcing": true}}\nstart: /{llguidance.regex_to_lark(marked)}/'
        matcher = llguidance.LLMatcher(self.tree, grammar, log_level=0)
        _check(matcher)
        return matcher


class Choice:
    """The rows of one batch: called at every step with what each has written, it bars what may not follow.

    It is a `choose` of `models.decoding.decode`; `inference` hands it to transformers' `generate` as a logits processor.
    """

    def __init__(self, rows: Sequence[_Row]) -> None:
        self.rows = list(rows)

    def __call__(self, logits: torch.Tensor, rows: Sequence[int], ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return logits with -inf where a token is not allowed.

        Input: `logits` (n, vocabulary); for each of the n, its row in the batch and all ids of its answer so far. A row that has
        ended is left as it is.
        """
        allowed = np.zeros(tuple(logits.shape), dtype=bool)
        for place, (row, written) in enumerate(zip(rows, ids, strict=True)):
            self.rows[row].mark(written, allowed[place])
        least = torch.finfo(logits.dtype).min  # what the model itself rules out is still better than what may not be
        return logits.clamp(min=least).masked_fill(~torch.from_numpy(allowed).to(logits.device), -torch.inf)


class _Row:
    """One answer that is being written."""

    def __init__(self, constraint: Constraint, view: View) -> None:
        self.constraint, self.view = constraint, view
        self.matcher = constraint.matcher(opening_pattern(constraint.codec, constraint.labels, view))
        self.read = 0  # tokens
        self.text = b""  # without marks; the end of it is enough
        self.boxes = 0
        self.ended = False
        self.may_end = True  # where the piece may end, the answer may: not at a first corner

    def mark(self, written: Sequence[int], allowed: np.ndarray) -> None:
        """Read the tokens that are new, and set the flags (vocabulary,) of those that may follow."""
        lead = self.constraint.lead
        if len(written) < len(lead):
            allowed[lead[len(written)]] = True
            return
        for token in written[max(self.read, len(lead)) :]:
            self.ended = self.ended or token in self.constraint.ends
            if not self.ended:
                self._take(token)
        self.read = len(written)
        if self.ended:  # what follows is padding
            allowed[:] = True
            return
        mask = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        _check(self.matcher)
        flags = np.unpackbits(mask, bitorder="little").astype(bool)[: len(allowed)]
        allowed[: len(flags)] = flags
        ends = self.constraint.ends
        allowed[ends] = bool(flags[ends[0]]) and self.may_end

    def _take(self, token: int) -> None:
        constraint = self.constraint
        if not self.matcher.consume_token(token):
            raise RuntimeError(f"token {token} was not allowed here: {self.matcher.get_error()}")
        text = constraint.bytes[token].removeprefix(_MARK.encode())
        self.text = (self.text + text)[-400:]
        corner = first_corner(constraint.codec, self.text.decode(errors="replace"))
        self.may_end = corner is None
        if corner is not None:
            self.boxes += 1
            last = self.boxes == constraint.max_boxes
            pattern = closing_pattern(constraint.codec, constraint.labels, self.view, corner, last=last)
            self.matcher = constraint.matcher(pattern)


class _Tokens:
    """What the library asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], ends: Sequence[int]) -> None:
        self.tokens = tokens
        self.eos_token_id = ends[0]
        self.special_token_ids = list(ends)

    def __call__(self, text: bytes) -> list[int]:
        return []  # asked for only where text is forced, and that is switched off: the model chooses its own tokens


def _check(matcher: Any) -> None:
    if matcher.is_error():
        raise RuntimeError(f"the grammar of the answers could not be followed: {matcher.get_error()[:300]}")


def boxes_that_fit(tokenizer: Any, codec: str, labels: Sequence[str], max_new_tokens: int) -> int:
    """Return how many boxes of the longest label an answer has room for, at least one; more could be cut off.

    When: once per run, for `max_boxes`.

    Input: as `Constraint`; the limit of tokens, the end token included. Numbers are taken to be as long as they get.
    """
    encode, view = get_codec(codec).encode, View(9999, 9999, 9999, 9999)

    def tokens(label: str, count: int) -> int:
        text = encode([label] * count, Boxes(np.full((count, 4), 0.9989)), view)
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    first = max(tokens(label, 1) for label in labels)
    more = max(tokens(label, 2) - tokens(label, 1) for label in labels)
    return 1 + max(0, max_new_tokens - 1 - first) // max(1, more)

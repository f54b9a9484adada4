"""Every row of the user's batches with what is wrong in its labels: `mask.compare` over all of them, once.

When: before `supervision`, which explains it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlmdet.doctor.calls import NotAvailable, UserCodeError
from vlmdet.doctor.checks import mask
from vlmdet.doctor.checks.mask import Difference, Row, Tokens
from vlmdet.doctor.evidence import Evidence, once
from vlmdet.doctor.gather.batches import Batch, supervised_of
from vlmdet.doctor.gather.conversations import text_of
from vlmdet.doctor.gather.token_bytes import bytes_of, latin

MADE = ("two turns", "answer in the question")
"""Awkward rows that are not the user's own."""

HEADER = 4
"""Tokens of a turn's header: `<|im_start|>`, `assistant`, newline."""


@dataclass(frozen=True)
class Seen:
    """One row of one batch, and what is wrong with its labels.

    Attributes:
        batch: name of the batch; where: the user's row.
        answers: as the user wrote them (`row` holds their bytes where letters are cut into tokens).
        prompt: supervised tokens of the prompt, without pictures, padding and the header of the answer's turn.
        header: of these, tokens of the header alone; `tail` those behind the last end token.
    """

    batch: str
    where: str
    row: Row
    tokens: Tokens
    difference: Difference
    answers: tuple[str, ...]
    prompt: tuple[int, ...]
    header: tuple[int, ...]
    tail: tuple[int, ...]

    @property
    def length(self) -> int:
        """Number of real tokens."""
        return sum(self.row.mask)

    @property
    def cut(self) -> bool:
        """Is the answer or its end token not there at all?"""
        return self.difference.lost > 0 or self.difference.absent > 0

    @property
    def wrong(self) -> bool:
        """Does anything carry loss that should not, or the reverse? A supervised header is not counted."""
        one = self.difference
        return bool(
            one.none
            or one.shifted
            or one.other
            or one.missing
            or one.ends
            or self.prompt
            or one.pictures
            or one.padding
        )

    def told(self) -> str:
        """Return the row as it is shown to the user: tokens with loss between marks."""
        wanted = " … ".join(self.answers)
        wanted = wanted if len(wanted) <= 200 else wanted[:200] + "…"
        head = f"{self.where}, {self.difference.supervised} tokens with loss (between ⟦ and ⟧)"
        return f"{head}\n{self.difference.shown}\nshould be: {wanted!r} and its end token"


def answers_to_learn(raw: Any, answers: Sequence[str]) -> tuple[str, ...]:
    """Return the answers that should carry loss: of prompt-completion rows those of the completion alone."""
    if (
        isinstance(raw, Mapping)
        and isinstance(raw.get("prompt"), (list, tuple))
        and isinstance(raw.get("completion"), (list, tuple))
    ):
        texts = [text_of(one) for one in raw["completion"] if isinstance(one, Mapping)]
        return tuple(text for text in texts if text)
    return tuple(answers)


@once
def rows_of_batches(evidence: Evidence) -> list[Seen]:
    """Compare every row of every batch with its answers.

    Raises:
        NotAvailable: no batch with labels, or no answer is found in any.
    """
    tokenizer = evidence.tokenizer
    known = mask.tokens_of(
        tokenizer, ends=evidence.end_ids(), pictures=evidence.picture_ids(), control=evidence.control()
    )
    batches = dict(evidence.batches())
    extra = _padded_pair(evidence, batches)
    if extra is not None:
        batches[extra.name] = extra
    awkward, examples = evidence.awkward(), evidence.examples()
    raws: dict[str, Any] = {one.where: one.raw for one in examples}
    raws |= {where: raw for name, (raw, where, _) in awkward.items() if name in MADE}
    ends = [word for word, one in evidence.control().items() if one in known.ends]
    seen = []
    for batch in batches.values():
        if batch.labels is None:
            continue
        decoder = any(len(a) != len(b) for a, b in zip(batch.ids, batch.labels, strict=True))
        for one in supervised_of(batch, tokenizer):
            texts = [_without_end(text, ends) for text in answers_to_learn(raws.get(one.where), one.answers)]
            answers = tuple(text for text in texts if text)
            if any(word in text for text in answers for word in ends):
                continue  # an end token within an answer is C09's
            if answers:
                ids = () if decoder else one.ids
                seen.append(
                    _look(
                        Row(f"{one.where}, {batch.name}", ids, one.labels, one.mask, answers),
                        batch.name,
                        one.where,
                        known,
                        tokenizer,
                    )
                )
    if not seen:
        raise NotAvailable("batches with labels, of rows with answers")
    return seen


def _without_end(text: str, ends: Sequence[str]) -> str:
    """Cut off an end token that the converter writes itself."""
    text = text.strip()
    for word in ends:
        text = text.removesuffix(word).rstrip()
    return text


def _padded_pair(evidence: Evidence, batches: Mapping[str, Batch]) -> Batch | None:
    """Collate the rows of fewest and most tokens, where `short+long` happened to need no padding."""
    pair = batches.get("short+long")
    if pair is not None and any(0 in row for row in pair.mask):
        return None
    lengths = {
        name: len(batch.ids[0]) for name, batch in batches.items() if name.startswith("row ") and len(batch.ids) == 1
    }
    if len(set(lengths.values())) < 2:
        return None
    examples = evidence.examples()
    chosen = [examples[int(pick(lengths, key=lambda name: lengths[name]).split()[1])] for pick in (min, max)]
    try:
        return evidence.collate(
            [one.raw for one in chosen],
            "shortest+longest",
            [one.where for one in chosen],
            [one.answers for one in chosen],
        )
    except (UserCodeError, NotAvailable):
        return None


def _look(row: Row, batch: str, where: str, known: Tokens, tokenizer: Any) -> Seen:
    """Compare one row; answers beyond ASCII are looked for by their bytes, because a letter may be cut into several tokens."""
    shown = None
    tokens, used = known, row
    if any(not answer.isascii() for answer in row.answers):
        shown = _shown(row, known, tokenizer)
        tokens = replace(known, pieces=lambda one: latin(bytes_of(tokenizer, one, known.pieces(one))))
        used = replace(row, answers=tuple(latin(answer.strip().encode()) for answer in row.answers))
    difference = mask.compare(used, tokens)
    if shown is not None:
        difference = replace(difference, shown=shown)
    padding, pictures = set(difference.padding), set(difference.pictures)
    spans = [span for span in mask.find_answers(used, tokens) if span is not None] if used.ids else []
    ordinary = {i for i in difference.extra if i not in padding and i not in pictures}
    header: set[int] = set()
    for span in spans:
        i = (
            span.start - 1 if span.start - 1 in ordinary else span.start - 2
        )  # a newline before the answer is not counted
        run = [j for j in range(i, max(i - HEADER - 1, -1), -1) if all(k in ordinary for k in range(j, i + 1))]
        header.update(run if len(run) <= HEADER else ())
    pad = known.pad
    if pad is not None and not padding and all(row.mask) and len(ordinary) > 1:  # a batch without a mask
        ends = [i for i in ordinary if row.ids[i] == pad and pad not in known.ends]
        difference = replace(difference, padding=tuple(ends))
        ordinary -= set(ends)
    last = max((span.end if span.end is not None else span.stop - 1 for span in spans), default=len(row.ids))
    tail = tuple(sorted(i for i in ordinary if i > last))
    prompt = tuple(sorted(i for i in ordinary - header if i <= last))
    return Seen(batch, where, used, tokens, difference, row.answers, prompt, tuple(sorted(header)), tail)


def _shown(row: Row, known: Tokens, tokenizer: Any) -> str:
    """Write a row whose letters may be cut into several tokens: decoded by runs, marks around what carries loss."""
    if not row.ids:
        return "".join(known.pieces(one) for one in row.labels if one != mask.IGNORED)
    parts: list[str] = []
    start = 0
    for i in range(1, len(row.ids) + 1):
        if i == len(row.ids) or (row.labels[i] != mask.IGNORED) != (row.labels[start] != mask.IGNORED):
            text = tokenizer.decode(list(row.ids[start:i]), skip_special_tokens=False)
            text = text if len(text) <= 400 else text[:100] + " … " + text[-280:]
            parts.append(f"⟦{text}⟧" if row.labels[start] != mask.IGNORED else text)
            start = i
    return "".join(parts)

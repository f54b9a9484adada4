"""Which tokens of a batch carry loss, against those that should: answer and end token, of every turn, and nothing else.

When: WHEN WRONG. Pure: plain lists of token ids and labels in, differences out; `checks/labels.py` makes findings of them. The
answer is found by its text in what the ids decode to, so nothing is assumed about how the user's collator finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

IGNORED = -100
MARK = ("⟦", "⟧")
"""Stand around supervised tokens in what is shown to the user."""


@dataclass(frozen=True)
class Tokens:
    """What is known of a tokenizer.

    Attributes:
        pieces: the text of one id; pieces of a row concatenate to its text.
        ends: ids that end a turn or a text.
        control: ids of control tokens, ends included.
        pictures: ids of image and video placeholders and of the marks around them.
        pad: id of the padding, None without one.
        ordinary: number of ordinary ids: `vocab_size`; control tokens lie above it in some families.
    """

    pieces: Callable[[int], str]
    ends: frozenset[int]
    control: frozenset[int]
    pictures: frozenset[int]
    pad: int | None = None
    ordinary: int | None = None


@dataclass(frozen=True)
class Row:
    """One row of a collated batch.

    Attributes:
        name: for messages, e.g. `train row 3, alone` or `… beside a longer one`.
        ids, labels: of one length; of an encoder-decoder, `ids` is () and labels hold the answer alone.
        mask: 1 for real tokens, 0 for padding.
        answers: text of each turn that the model should learn, in order.
    """

    name: str
    ids: tuple[int, ...]
    labels: tuple[int, ...]
    mask: tuple[int, ...]
    answers: tuple[str, ...]


class Span(NamedTuple):
    """Where one answer stands: tokens `start` to `stop` - 1; `end` is the index of its end token, None where there is none."""

    start: int
    stop: int
    end: int | None


@dataclass(frozen=True)
class Difference:
    """What is wrong with the labels of one row.

    Attributes:
        row: its name.
        none: no token is supervised.
        shifted: labels are the ids of the next (1) or the previous (-1) position.
        other: indices whose label is neither ignored nor their own id.
        extra: supervised indices outside of every answer and its end token.
        pictures: of these, picture tokens. `padding`: padding.
        missing: unsupervised indices inside of answers.
        ends: number of answers whose end token is not supervised; `absent`: whose end token is not there at all.
        turns: for each answer, whether most of it is supervised.
        lost: answers that are not found in the ids at all (cut, or never rendered).
        supervised: number of supervised tokens.
        shown: the row's text, supervised tokens between marks.
    """

    row: str
    none: bool
    shifted: int
    other: tuple[int, ...]
    extra: tuple[int, ...]
    pictures: tuple[int, ...]
    padding: tuple[int, ...]
    missing: tuple[int, ...]
    ends: int
    absent: int
    turns: tuple[bool, ...]
    lost: int
    supervised: int
    shown: str

    @property
    def right(self) -> bool:
        """Tell whether exactly the answers and their end tokens are supervised."""
        wrong = self.none or self.shifted or self.other or self.extra or self.missing or self.ends or self.lost
        return not wrong


def texts_of(ids: Sequence[int], tokens: Tokens) -> tuple[str, list[int]]:
    """Return the text of ids, and for each character the index of the token that it comes from."""
    pieces = [tokens.pieces(one) for one in ids]
    owner = [i for i, piece in enumerate(pieces) for _ in piece]
    return "".join(pieces), owner


def find_answers(row: Row, tokens: Tokens) -> list[Span | None]:
    """Find each answer in a row's ids, the last one from the end, so that the same words in the prompt are no answer."""
    text, owner = texts_of(row.ids, tokens)
    spans: list[Span | None] = []
    before = len(text)
    for answer in reversed(row.answers):
        wanted = answer.strip()
        at = text.rfind(wanted, 0, before) if wanted else -1
        if at < 0:
            spans.append(None)
            continue
        start, stop = owner[at], owner[at + len(wanted) - 1] + 1
        if (
            at > 0 and owner[at - 1] == start and text[at - 1].strip()
        ):  # the token holds something before the answer too
            start += 1
        end = next(
            (i for i in range(stop, min(stop + 3, len(row.ids))) if row.ids[i] in tokens.ends and row.mask[i]), None
        )
        if end is None and stop < len(row.ids) and row.ids[stop] in tokens.ends:  # an end that is masked as padding is
            end = stop
        spans.append(Span(start, stop, end))
        before = at
    return spans[::-1]


def compare(row: Row, tokens: Tokens) -> Difference:
    """Compare the labels of one row with answers and end tokens.

    Output: the difference; a newline of the template behind an end token may be supervised (TRL does) and is not counted.
    """
    if not row.ids:
        return _compare_decoder(row, tokens)
    supervised = [i for i, label in enumerate(row.labels) if label != IGNORED]
    shifted = _shift(row, supervised)
    other = tuple(i for i in supervised if row.labels[i] != row.ids[i]) if not shifted else ()
    if shifted:
        moved = {i + shifted for i in supervised}
        supervised = sorted(i for i in moved if 0 <= i < len(row.ids))
    spans = find_answers(row, tokens)
    found = [span for span in spans if span is not None]
    inside = {i for span in found for i in range(span.start, span.stop)}
    ends = {span.end for span in found if span.end is not None}
    template = {end + 1 for end in ends if end + 1 < len(row.ids) and not tokens.pieces(row.ids[end + 1]).strip()}
    chosen = set(supervised)
    edge = {span.start - 1 for span in found if span.start > 0 and not tokens.pieces(row.ids[span.start - 1]).strip()}
    extra = sorted(chosen - inside - ends - template - edge)
    missing = sorted(inside - chosen)
    return Difference(
        row=row.name,
        none=not supervised,
        shifted=shifted,
        other=other,
        extra=tuple(extra),
        pictures=tuple(i for i in extra if row.ids[i] in tokens.pictures),
        padding=tuple(i for i in extra if not row.mask[i]),
        missing=tuple(missing),
        ends=sum(span.end is not None and span.end not in chosen for span in found),
        absent=sum(span.end is None for span in found),
        turns=tuple(
            span is not None and len(chosen & set(range(span.start, span.stop))) * 2 > span.stop - span.start
            for span in spans
        ),
        lost=sum(span is None for span in spans),
        supervised=len(supervised),
        shown=show(row, tokens),
    )


def _compare_decoder(row: Row, tokens: Tokens) -> Difference:
    """Compare labels that are an answer of their own, as an encoder-decoder's."""
    kept = [label for label in row.labels if label != IGNORED]
    text = "".join(tokens.pieces(one) for one in kept)
    wanted = "".join(row.answers).strip()
    ended = any(one in tokens.ends for one in kept[-2:])
    return Difference(
        row=row.name,
        none=not kept,
        shifted=0,
        other=(),
        extra=(),
        pictures=tuple(i for i, one in enumerate(row.labels) if one in tokens.pictures),
        padding=tuple(i for i, one in enumerate(row.labels) if one == tokens.pad and one not in tokens.ends),
        missing=() if wanted in text else (0,),
        ends=int(bool(kept) and not ended),
        absent=0,
        turns=(wanted in text,),
        lost=0,
        supervised=len(kept),
        shown=MARK[0] + text + MARK[1],
    )


def _shift(row: Row, supervised: Sequence[int]) -> int:
    """Return 1 where labels hold the id of the next position, -1 of the previous one, 0 else."""
    if not supervised or sum(row.labels[i] == row.ids[i] for i in supervised) * 2 > len(supervised):
        return 0
    for by in (1, -1):
        hits = sum(0 <= i + by < len(row.ids) and row.labels[i] == row.ids[i + by] for i in supervised)
        if hits * 10 >= 9 * len(supervised):
            return by
    return 0


def show(row: Row, tokens: Tokens, *, most: int = 900) -> str:
    """Write a row's text with marks around what carries loss; runs of one token are written once with their number."""
    parts: list[str] = []
    marked = False
    i = 0
    while i < len(row.ids):
        run = 1
        while i + run < len(row.ids) and row.ids[i + run] == row.ids[i] and _on(row, i + run) == _on(row, i):
            run += 1
        if _on(row, i) != marked:
            parts.append(MARK[1] if marked else MARK[0])
            marked = not marked
        parts.append(tokens.pieces(row.ids[i]) * min(run, 2) + (f"(×{run})" if run > 2 else ""))
        i += run
    if marked:
        parts.append(MARK[1])
    text = "".join(parts)
    return text if len(text) <= most else text[: most // 3] + " … " + text[-2 * most // 3 :]


def _on(row: Row, i: int) -> bool:
    return row.labels[i] != IGNORED


def control_masked(row: Row, tokens: Tokens, difference: Difference) -> tuple[bool, bool]:
    """Tell what kind of answer tokens is masked: (control tokens alone, all but digits).

    Output: the first is True where every unsupervised answer token is a control token and every control token is
    unsupervised; the second where what is supervised of the answers is digits and nothing else.
    """
    missing = {row.ids[i] for i in difference.missing}
    spans = [span for span in find_answers(row, tokens) if span is not None]
    inside = [i for span in spans for i in range(span.start, span.stop)]
    kept = [tokens.pieces(row.ids[i]).strip() for i in inside if i not in difference.missing]
    digits = bool(kept) and bool(missing) and all(not text or text.isdigit() for text in kept)
    control = bool(missing) and missing <= tokens.control
    return control and not digits, digits


def above_ordinary(row: Row, tokens: Tokens, difference: Difference) -> bool:
    """Tell whether what is masked of the answers and their ends is exactly what lies at or above `vocab_size`."""
    if tokens.ordinary is None:
        return False
    spans = [span for span in find_answers(row, tokens) if span is not None]
    wanted = [
        i for span in spans for i in (*range(span.start, span.stop), *([span.end] if span.end is not None else []))
    ]
    masked = {i for i in wanted if row.labels[i] == IGNORED}
    high = {i for i in wanted if row.ids[i] >= tokens.ordinary}
    return bool(high) and masked == high and len(high) < len(wanted)


def constant_share(rows: Sequence[Row]) -> float:
    """Return the share of supervised tokens that stand in every row at the same place counted from the first supervised one."""
    kept = [[label for label in row.labels if label != IGNORED] for row in rows]
    kept = [one for one in kept if one]
    if len(kept) < 2:
        return 0.0
    same = 0
    for column in zip(*kept, strict=False):
        if len(set(column)) > 1:
            break
        same += 1
    return same / (sum(map(len, kept)) / len(kept))


def tokens_of(
    tokenizer: Any, *, ends: Collection[int], pictures: Collection[int], control: Mapping[str, int]
) -> Tokens:
    """Read what `compare` needs from a transformers tokenizer.

    Input: `ends`, ids that end a turn; `pictures`, ids of picture tokens; `control`, text to id of control tokens.
    """
    backwards = {value: key for key, value in control.items()}
    cache: dict[int, str] = {}

    def piece(one: int) -> str:
        if one not in cache:
            cache[one] = backwards.get(one) or _decode_one(tokenizer, one)
        return cache[one]

    return Tokens(
        pieces=piece,
        ends=frozenset(ends),
        control=frozenset(control.values()) | frozenset(ends),
        pictures=frozenset(pictures),
        pad=tokenizer.pad_token_id,
        ordinary=getattr(tokenizer, "vocab_size", None),
    )


def _decode_one(tokenizer: Any, one: int) -> str:
    if not 0 <= one < len(tokenizer):
        return f"<id {one}>"
    token = tokenizer.convert_ids_to_tokens(one)
    if isinstance(token, str) and "▁" in token:  # sentencepiece drops the blank before the first token of a text
        return token.replace("▁", " ")
    return str(tokenizer.decode([one], skip_special_tokens=False, clean_up_tokenization_spaces=False))

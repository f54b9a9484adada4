"""What the two families with location tokens share: runs of `<loc…>` and the names beside them.

When: ALWAYS; no torch. `paligemma` and `florence2` differ in the order of numbers and in the side on which the name stands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from vlmdet.grounding.codec import unguard_label
from vlmdet.grounding.reading import to_float

_RUN = re.compile(r"<loc_?+\d++>(?:\s*+<loc_?+\d++>)*+")
_TOKEN = re.compile(r"<loc_?+(\d++)>")
# Masks, wrappers and task tokens: none of them belongs to a name.
_OTHER = re.compile(r"<seg_?+\d++>|</?+(?:s|pad|bos|eos|poly|sep|od|and|image)>|<[A-Z_]{2,40}>|<\|[a-z_]{1,40}\|>")
_MASK = re.compile(r"<seg_?+\d|<poly>")
_STRIPPED = " \t\r\n;,，、"


class Run(NamedTuple):
    """Numbers of location tokens that stand together, and the text on both sides up to the next run.

    `places` has start and end of each token in the text, `start` and `end` those of the run with the names beside it.
    """

    numbers: list[float]
    before: str
    after: str
    detail: str
    places: list[tuple[int, int]]
    start: int
    end: int

    def span(self, i: int, *, name_before: bool = False, name_after: bool = False) -> tuple[int, int]:
        """Return the place of the box whose first number is the i-th; the name goes to the box that it stands beside."""
        start, end = self.places[i][0], self.places[i + 3][1]
        if name_before and i == 0:
            start = self.start
        if name_after and i + 4 == len(self.numbers):
            end = self.end
        return start, end


def runs(text: str) -> Iterator[Run]:
    """Give the runs of location tokens of a text, in order."""
    found = list(_RUN.finditer(text))
    for i, match in enumerate(found):
        before = text[found[i - 1].end() if i else 0 : match.start()]
        after = text[match.end() : found[i + 1].start() if i + 1 < len(found) else len(text)]
        tokens = list(_TOKEN.finditer(text, match.start(), match.end()))
        yield Run(
            [to_float(token[1]) for token in tokens],
            before,
            after,
            match[0][:80],
            [token.span() for token in tokens],
            match.start() - (len(before) - _words(before)[0]),
            match.end() + _words(after)[1],
        )


def _words(text: str) -> tuple[int, int]:
    """Return where a name between runs begins and ends, wrappers and separators off; the length and 0 where there is none."""
    start, end, pos = len(text), 0, 0
    for stop, following in [*(other.span() for other in _OTHER.finditer(text)), (len(text), 0)]:
        piece = text[pos:stop]
        if piece.strip(_STRIPPED):
            start = min(start, stop - len(piece.lstrip(_STRIPPED)))
            end = pos + len(piece.rstrip(_STRIPPED))
        pos = following
    return start, end


def name_of(text: str) -> str | None:
    """Read a name as it stands between runs: wrappers and separators off, escaping undone; None for nothing."""
    plain = _OTHER.sub("", text).strip(_STRIPPED)
    return unguard_label(plain) if plain else None


def has_mask(text: str) -> bool:
    """Tell whether a text holds tokens of a segmentation mask."""
    return _MASK.search(text) is not None


def is_cut(text: str) -> bool:
    """Tell whether a text ends inside a location token."""
    return re.search(r"<(?:l(?:o(?:c(?:_?+\d*+)?+)?+)?+)?+\Z", text[-20:]) is not None

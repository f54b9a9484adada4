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
    """Numbers of location tokens that stand together, and the text on both sides up to the next run."""

    numbers: list[float]
    before: str
    after: str
    detail: str


def runs(text: str) -> Iterator[Run]:
    """Give the runs of location tokens of a text, in order."""
    found = list(_RUN.finditer(text))
    for i, match in enumerate(found):
        before = text[found[i - 1].end() if i else 0 : match.start()]
        after = text[match.end() : found[i + 1].start() if i + 1 < len(found) else len(text)]
        yield Run([to_float(digits) for digits in _TOKEN.findall(match[0])], before, after, match[0][:80])


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

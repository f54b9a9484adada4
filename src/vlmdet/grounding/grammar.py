r"""The answers that a codec writes, as one regular expression: for decoding that cannot leave the notation or the label list.

When: once per run, or per picture where numbers are pixels; no torch. `models.constrain` makes tokens from it, a server takes it
as it is. It uses what all dialects have: literals, `[0-9]`, groups, `|`, `{m,n}`; no look-around, no possessive quantifiers, no
anchors. The whole answer matches, as in `re.fullmatch`.

    qwen2_vl, labels cup and plan (1,2)    (?:none|<\|object_ref_start\|>(?:cup|plan \\\(1,2\))<\|object_ref_end\|>…(?:…){0,19})

What a text of this expression can still have is a second corner left of or above the first: a regular expression would have to
remember two numbers, a state for each of a million corners. Its parser swaps one axis (`axis_swapped`), gives no box for two
(`both_axes_reversed`), and names a box without area (`zero_area`). Who decodes token by token knows the first corner when the
second begins, and goes piece by piece: `opening_pattern` to the first corner of the first box, then for each box
`closing_pattern`, from its second corner to the first corner of the next box or to the end. So no axis is reversed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vlmdet.grounding import florence2, internvl, paligemma, plain_json, qwen2_5_vl, qwen2_vl, qwen3_vl
from vlmdet.grounding.codec import View, escape_label, guard_label
from vlmdet.grounding.json_boxes import write_label
from vlmdet.grounding.prompts import NONE_ANSWER

_SPECIAL = re.compile(r"[\\.^$*+?()\[\]{}|]")


class _Notation(NamedTuple):
    """How a codec writes boxes: parts of regular expressions.

    A box is `head` up to its first number, the first corner, `between`, which ends it, `gap`, the second corner, and `tail`.
    `gap` is apart because some tokenizers put a blank and the number after it into one token.
    """

    head: str
    first: str
    between: str
    gap: str
    second: str
    tail: str
    joint: str
    start: str
    end: str
    none: str

    @property
    def box(self) -> str:
        return self.opening + self.gap + self.second + self.tail

    @property
    def opening(self) -> str:
        return self.head + self.first + self.between

    def more(self, count: int) -> str:
        return f"(?:{self.joint}{self.box}){{0,{count}}}" if count else ""


class Corner(NamedTuple):
    """The first corner of a box that is being written, in numbers of the codec."""

    x: int
    y: int


def answer_pattern(codec: str, labels: Sequence[str], view: View, max_boxes: int) -> str:
    """Return a regular expression of the answers that a codec writes about a list of labels.

    When: once per run; once per size of picture for `qwen2_5_vl`.

    Input: name of the codec; `labels` as the user writes them, at least one; `view`, which says how large numbers may be where
    they are pixels; the largest number of boxes.
    Output: of every text that `encode` makes of up to `max_boxes` boxes with these labels, in any order and with any numbers
    on the grid; see the module for what else it lets through.

    Raises:
        ValueError: there is no label, or no box is allowed.
    """
    if not labels or max_boxes < 1:
        raise ValueError(f"{len(labels)} labels and up to {max_boxes} boxes make no answer")
    notation = _notation(codec, labels, view)
    return f"(?:{notation.none}|{notation.start}{notation.box}{notation.more(max_boxes - 1)}{notation.end})"


def opening_pattern(codec: str, labels: Sequence[str], view: View) -> str:
    """Return a regular expression of the explicit answer that there is nothing, or of all up to the first corner of a box.

    Input: as `answer_pattern`.
    Output: e.g. `(?:none|<\\|object_ref_start\\|>(?:cup)<\\|object_ref_end\\|><\\|box_start\\|>\\(…,…\\),\\()`.
    """
    notation = _notation(codec, labels, view)
    return f"(?:{notation.none}|{notation.start}{notation.opening})"


def closing_pattern(codec: str, labels: Sequence[str], view: View, corner: Corner, *, last: bool) -> str:
    """Return a regular expression from the second corner of a box to the first corner of the next, or to the end of the answer.

    Input: as `answer_pattern`; the first `corner` of the box, which the second is neither left of nor above; `last`, whether
    no other box may follow.
    Output: of what follows a text that `first_corner` knows.
    """
    notation = _notation(codec, labels, view)
    second = _notation(codec, labels, view, low=corner).second
    after = notation.end if last else f"(?:{notation.joint}{notation.opening}|{notation.end})"
    return f"{notation.gap}{second}{notation.tail}{after}"


def first_corner(codec: str, text: str) -> Corner | None:
    """Return the first corner of a box where a text ends with it; else None.

    Input: an answer that keeps to `answer_pattern` so far, e.g. `…<|box_start|>(12,34),(`.
    Output: e.g. `Corner(12, 34)`. Takes the same time whatever the length.
    """
    tail = text[-80:]
    if codec in (paligemma.NAME, florence2.NAME):
        run = re.search(r"(?:<loc_?[0-9]+>)+\Z", tail)
        numbers = [int(digits) for digits in re.findall("[0-9]+", run[0])] if run else []
        if len(numbers) != 2:
            return None
        return Corner(*reversed(numbers)) if codec == paligemma.NAME else Corner(*numbers)
    match = re.search(_FIRST_CORNERS[codec], tail)
    return Corner(int(match[1]), int(match[2])) if match else None


def number_pattern(low: int, high: int, *, width: int = 0) -> str:
    """Return a regular expression of exactly the whole numbers from low to high, in digits.

    Input: 0 <= `low` <= `high`; `width`, zeros in front up to so many digits.
    Output: e.g. for 0 and 1000 `(?:[0-9]|[1-9][0-9]|[1-9][0-9]{2}|1000)`.
    """
    if width:
        return f"(?:{'|'.join(_between(str(low).zfill(width), str(high).zfill(width)))})"
    parts: list[str] = []
    for digits in range(len(str(low)), len(str(high)) + 1):
        first = max(low, 10 ** (digits - 1) if digits > 1 else 0)
        parts += _between(str(first), str(min(high, 10**digits - 1)))
    return f"(?:{'|'.join(parts)})"


def _between(low: str, high: str) -> list[str]:
    """Cover the numbers between two of the same number of digits by patterns that share no number."""
    if not low:
        return [""]
    if low[0] == high[0]:
        return [low[0] + rest for rest in _between(low[1:], high[1:])]
    left = len(low) - 1
    zeros, nines = "0" * left, "9" * left
    first, last = int(low[0]), int(high[0])
    below: list[str] = []
    above: list[str] = []
    if low[1:] != zeros:
        below = [low[0] + rest for rest in _between(low[1:], nines)]
        first += 1
    if high[1:] != nines:
        above = [high[0] + rest for rest in _between(zeros, high[1:])]
        last -= 1
    middle = []
    if first <= last:
        digit = str(first) if first == last else f"[{first}-{last}]"
        middle = [digit + ("" if not left else "[0-9]" if left == 1 else f"[0-9]{{{left}}}")]
    return below + middle + above


def literal(text: str) -> str:
    """Return a regular expression of one text: `re.escape` for the characters that every dialect knows as special."""
    return _SPECIAL.sub(r"\\\g<0>", text)


_FIRST_CORNERS = {
    qwen2_vl.NAME: r"<\|box_start\|>\(([0-9]+),([0-9]+)\),\(\Z",
    internvl.NAME: r"<box>\[\[([0-9]+), ([0-9]+),\Z",
    qwen2_5_vl.NAME: r'\{"bbox_2d": \[([0-9]+), ([0-9]+),\Z',
    qwen3_vl.NAME: r'\{"bbox_2d": \[([0-9]+), ([0-9]+),\Z',
    plain_json.NAME: r'\{"bbox": \[([0-9]+), ([0-9]+),\Z',
}
"""Of the codecs that write numbers as digits."""


def _notation(codec: str, labels: Sequence[str], view: View, *, low: Corner | None = None) -> _Notation:
    """Return the parts; with `low`, the second corner begins there."""
    least_x, least_y = (low.x, low.y) if low else (0, 0)

    def names(write: Callable[[str], str]) -> str:
        return f"(?:{'|'.join(dict.fromkeys(literal(write(label)) for label in labels))})"

    def corners(limit_x: int, limit_y: int, *, width: int = 0) -> tuple[str, str, str, str]:
        return (
            number_pattern(0, limit_x, width=width),
            number_pattern(0, limit_y, width=width),
            number_pattern(least_x, limit_x, width=width),
            number_pattern(least_y, limit_y, width=width),
        )

    if codec == qwen2_vl.NAME:
        x1, y1, x2, y2 = corners(qwen2_vl.GRID, qwen2_vl.GRID)
        head = rf"<\|object_ref_start\|>{names(escape_label)}<\|object_ref_end\|><\|box_start\|>\("
        return _Notation(head, f"{x1},{y1}", r"\),\(", "", f"{x2},{y2}", r"\)<\|box_end\|>", "", "", "", NONE_ANSWER)
    if codec == internvl.NAME:
        x1, y1, x2, y2 = corners(internvl.GRID, internvl.GRID)
        head = rf"<ref>{names(guard_label)}</ref><box>\[\["
        return _Notation(head, f"{x1}, {y1}", ",", " ", f"{x2}, {y2}", r"\]\]</box>", "", "", "", NONE_ANSWER)
    if codec == paligemma.NAME:
        x1, y1, x2, y2 = corners(paligemma.GRID, paligemma.GRID, width=4)
        first, second = f"<loc{y1}><loc{x1}>", f"<loc{y2}><loc{x2}>"
        return _Notation("", first, "", "", second, f" {names(guard_label)}", " ; ", "", "", NONE_ANSWER)
    if codec == florence2.NAME:
        x1, y1, x2, y2 = corners(florence2.BINS - 1, florence2.BINS - 1)
        first, second = f"<loc_{x1}><loc_{y1}>", f"<loc_{x2}><loc_{y2}>"
        return _Notation(names(guard_label), first, "", "", second, "", "", "", "", NONE_ANSWER)
    limits = (view.resized_width, view.resized_height) if codec == qwen2_5_vl.NAME else (qwen3_vl.GRID, qwen3_vl.GRID)
    x1, y1, x2, y2 = corners(*limits)
    head = rf'\{{"{"bbox" if codec == plain_json.NAME else "bbox_2d"}": \['
    tail = rf'\], "label": {names(write_label)}\}}'
    return _Notation(head, f"{x1}, {y1}", ",", " ", f"{x2}, {y2}", tail, ", ", r"\[", r"\]", r"\[\]")

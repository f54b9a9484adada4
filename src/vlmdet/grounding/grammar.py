r"""The answers that a codec writes, as one regular expression: for decoding that cannot leave the notation or the label list.

When: once per run, or per picture where numbers are pixels; no torch. `models.constrain` makes tokens from it, a server takes it
as it is. It uses what all dialects have: literals, `[0-9]`, groups, `|`, `{m,n}`; no look-around, no possessive quantifiers, no
anchors. The whole answer matches, as in `re.fullmatch`.

    qwen2_vl, labels cup and plan (1,2)    (?:none|<\|object_ref_start\|>(?:cup|plan \\\(1,2\))<\|object_ref_end\|>…(?:…){0,19})

What a text of this expression can still have is a second corner left of or above the first: a regular expression would have to
remember two numbers, a state for each of a million corners. Its parser swaps one axis (`axis_swapped`), gives no box for two
(`both_axes_reversed`), and names a box without area (`zero_area`). `rest_pattern` is what may follow a first corner that is
known: who decodes token by token goes on with that one, and has none of the first two.
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

    A box is `head` up to its first number, the first corner, `between` up to the second corner, that one, and `tail`.
    """

    head: str
    first: str
    between: str
    second: str
    tail: str
    joint: str
    start: str
    end: str
    none: str

    @property
    def box(self) -> str:
        return self.head + self.first + self.between + self.second + self.tail

    def more(self, count: int) -> str:
        return f"(?:{self.joint}{self.box}){{0,{count}}}" if count else ""


class Corner(NamedTuple):
    """The first corner of a box that is being written, in numbers of the codec, and what comes before the second one."""

    x: int
    y: int
    before_second: str


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


def rest_pattern(codec: str, labels: Sequence[str], view: View, max_boxes: int, corner: Corner) -> str:
    """Return a regular expression of what may follow a first corner, so that the second is neither left of it nor above it.

    Input: as `answer_pattern`; `max_boxes` counts the box that has begun; `corner` of `first_corner`.
    Output: of the text from there to the end of the answer.
    """
    notation = _notation(codec, labels, view)
    second = _notation(codec, labels, view, low=corner).second
    more = notation.more(max_boxes - 1)
    return f"{_literal(corner.before_second)}{second}{notation.tail}{more}{notation.end}"


def first_corner(codec: str, text: str) -> Corner | None:
    """Return the first corner of a box where a text ends just behind it; else None.

    Input: an answer that keeps to `answer_pattern` so far, e.g. `…<|box_start|>(12,34)`.
    Output: e.g. `Corner(12, 34, ",(")`. Takes the same time whatever the length.
    """
    tail = text[-80:]
    if codec in (paligemma.NAME, florence2.NAME):
        run = re.search(r"(?:<loc_?[0-9]+>)+\Z", tail)
        numbers = [int(digits) for digits in re.findall("[0-9]+", run[0])] if run else []
        if len(numbers) != 2:
            return None
        first, second = numbers
        return Corner(second, first, "") if codec == paligemma.NAME else Corner(first, second, "")
    pattern, between = _FIRST_CORNERS[codec]
    match = re.search(pattern, tail)
    return Corner(int(match[1]), int(match[2]), between[len(match[3]) :]) if match else None


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


def _literal(text: str) -> str:
    return _SPECIAL.sub(r"\\\g<0>", text)


_FIRST_CORNERS = {
    qwen2_vl.NAME: (r"<\|box_start\|>\(([0-9]+),([0-9]+)(\),\(|\),|\))\Z", "),("),
    internvl.NAME: (r"<box>\[\[([0-9]+), ([0-9]+)(, |,)\Z", ", "),
    **{
        name: (rf'\{{"{key}": \[([0-9]+), ([0-9]+)(, |,)\Z', ", ")
        for name, key in ((qwen2_5_vl.NAME, "bbox_2d"), (qwen3_vl.NAME, "bbox_2d"), (plain_json.NAME, "bbox"))
    },
}
"""Of the codecs that separate numbers: a box up to its second number and some of what follows it, and all that follows it."""


def _notation(codec: str, labels: Sequence[str], view: View, *, low: Corner | None = None) -> _Notation:
    """Return the parts; with `low`, the second corner begins there."""
    least_x, least_y = (low.x, low.y) if low else (0, 0)

    def names(write: Callable[[str], str]) -> str:
        return f"(?:{'|'.join(dict.fromkeys(_literal(write(label)) for label in labels))})"

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
        return _Notation(head, f"{x1},{y1}", r"\),\(", f"{x2},{y2}", r"\)<\|box_end\|>", "", "", "", NONE_ANSWER)
    if codec == internvl.NAME:
        x1, y1, x2, y2 = corners(internvl.GRID, internvl.GRID)
        head = rf"<ref>{names(guard_label)}</ref><box>\[\["
        return _Notation(head, f"{x1}, {y1}", ", ", f"{x2}, {y2}", r"\]\]</box>", "", "", "", NONE_ANSWER)
    if codec == paligemma.NAME:
        x1, y1, x2, y2 = corners(paligemma.GRID, paligemma.GRID, width=4)
        first, second = f"<loc{y1}><loc{x1}>", f"<loc{y2}><loc{x2}>"
        return _Notation("", first, "", second, f" {names(guard_label)}", " ; ", "", "", NONE_ANSWER)
    if codec == florence2.NAME:
        x1, y1, x2, y2 = corners(florence2.BINS - 1, florence2.BINS - 1)
        first, second = f"<loc_{x1}><loc_{y1}>", f"<loc_{x2}><loc_{y2}>"
        return _Notation(names(guard_label), first, "", second, "", "", "", "", NONE_ANSWER)
    limits = (view.resized_width, view.resized_height) if codec == qwen2_5_vl.NAME else (qwen3_vl.GRID, qwen3_vl.GRID)
    x1, y1, x2, y2 = corners(*limits)
    head = rf'\{{"{"bbox" if codec == plain_json.NAME else "bbox_2d"}": \['
    tail = rf'\], "label": {names(write_label)}\}}'
    return _Notation(head, f"{x1}, {y1}", ", ", f"{x2}, {y2}", tail, ", ", r"\[", r"\]", r"\[\]")

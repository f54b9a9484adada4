"""Read boxes that stand in a sentence: `(x1,y1),(x2,y2)` between tags or without, `[[x1, y1, x2, y2]]`, and their names.

When: ALWAYS; no torch. `qwen2_vl` reads with `read_points`, `internvl` with `read_brackets`; every other codec that finds
nothing in its own notation tries both.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from vlmdet.grounding.codec import CONTROL, strip_control, unescape_label
from vlmdet.grounding.reading import NUMBER, Reading, is_quadrangle, numbers_in, to_float

# Possessive quantifiers keep this linear: no character can be given back.
_POINT = rf"[(（]\s*+({NUMBER})\s*+[,，、]\s*+({NUMBER})\s*+[)）]"
_RUN = rf"{_POINT}(?:\s*+(?:[,，、]\s*+)?+{_POINT})*+"
_ALL_POINTS = re.compile(rf"\s*+{_RUN}\s*+")
# What is read as one piece, in this order: a backslash and what it escapes; a marked name, in which nothing is a box; the
# inside of box tags; points.
_PIECES = re.compile(
    r"\\[\\|(（]"
    r"|<\|object_ref_start\|>(?:[^<]++|<(?!\|))*+<\|object_ref_end\|>"
    r"|<\|(?:box|quad)_start\|>(?P<span>[^<\\a-zA-Z]*+)<\|(?:box|quad)_end\|>"
    rf"|(?P<points>{_RUN})"
)
_NEXT_POINT = re.compile(rf"\s*+([,，、]?+)\s*+{_POINT}")
_TAGS = re.compile(r"</?+(?:ref|box|quad)>")
_NAME_TAGS = (("<|object_ref_start|>", "<|object_ref_end|>"), ("<ref>", "</ref>"))
_GROUP = rf"[(（\[【]\s*+({NUMBER}(?:\s*+[,，、]?+\s*+{NUMBER})*+)\s*+[)）\]】]"
_OUTER = r"(?:[\[(（【]\s*+(?=[\[(（【]))?+"
_GROUPS = re.compile(
    r"\\(?:u[0-9a-f]{4}|.)"
    rf"|(?P<groups>{_GROUP}(?:\s*+(?:[,，、]\s*+)?+{_OUTER}{_GROUP})*+)[\s\])）】]*+"
    r"|<box>(?P<bare>[^<\\a-zA-Z]*+)</box>",
    re.DOTALL,
)
_NEXT_GROUP = re.compile(rf"\s*+([,，、]?+)\s*+{_OUTER}{_GROUP}")
_AND = re.compile(r"[\s,，、>]+(?:and|und|et|和|与|以及)(?:\s+|(?=<))")
_BULLET = re.compile(r"\s*(?:[-*•]|\d{1,3}[.)])\s+")
# Words that begin a sentence about a box, or end one before it: such a text is no name.
_SENTENCE = re.compile(
    r"\b(?:is|are|was|were)\b(?:[^.]{0,60}\b(?:at|by|in|with|as|is|are|from|within|located|be))?\W*\Z|\bgiven by\W*\Z"
    r"|\b(?:bounding box|coordinates?)\b",
    re.IGNORECASE,
)
_STRIPPED = " \t\r\n,，;；:：、.。"


def read_points(text: str, reading: Reading) -> None:
    """Find `(x1,y1),(x2,y2)`, and what else stands between box tags.

    Input: `text`, with or without the control tokens of Qwen2-VL, or with the tags of the first Qwen-VL.
    """
    label: str | None = None
    end = 0
    for match in _PIECES.finditer(text):
        run, span = match["points"], match["span"]  # once: each look-up copies it
        if run is None and span is None:
            continue
        label, before = _name(text[end : match.start()], label, marked=span is not None, first=end == 0)
        start = match.start() - before
        end = match.end()
        inside = match.start("span" if run is None else "points")
        if span is not None and not _ALL_POINTS.fullmatch(span):
            _odd_span(span, label, reading, inside, (start, end))
            continue
        found = _boxes(run or span)
        for i, (points, first, last) in enumerate(found):
            place = (inside + first if i else start, inside + last if i + 1 < len(found) else _after_box(text, end))
            reading.points(points, label, (run or span).strip(), place)
    if _opens(text[end:], "<|box_start|>", "<|box_end|>") or _opens(text[end:], "<box>", "</box>"):
        reading.problem("truncated", text[end : end + 80])


def read_brackets(
    text: str, reading: Reading, undo: Callable[[str], str] = unescape_label, *, exact: bool = False
) -> None:
    """Find groups of numbers in brackets of any kind, and four bare numbers between `<box>` tags.

    Input: `text`, e.g. `<ref>cup</ref><box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box>`, also without the tags; `undo` for the
    escaping of names; `exact`, whether blanks inside name tags are part of the name.
    """
    label: str | None = None
    end = 0
    for match in _GROUPS.finditer(text):
        groups, bare = match["groups"], match["bare"]
        if groups is None and bare is None:
            continue
        label, before = _name(text[end : match.start()], label, first=end == 0, undo=undo, exact=exact)
        start = match.start() - before
        end = match.end()
        inside = match.start("bare" if groups is None else "groups")
        if groups is None and _is_balanced(bare):
            groups = bare
        if groups is None:
            _odd_span(bare, label, reading, inside, (start, end))
            continue
        matches = list(_NEXT_GROUP.finditer(groups))
        found = [(found[1], numbers_in(found[2])) for found in matches]
        starts = [start, *(inside + _bracket(groups, found, 2) for found in matches[1:])]
        ends = [*(inside + found.end() for found in matches[:-1]), _after_box(text, _before_blanks(text, end))]
        points: list[list[float]] = []
        for i, (_, numbers) in enumerate(found):
            if len(numbers) == 2:
                points.append(numbers)
                # Two points that a comma joins are the corners of a box; without one the next box begins.
                if i + 1 < len(found) and len(found[i + 1][1]) == 2 and (found[i + 1][0] or len(points) % 2):
                    continue
                reading.points(points, label, groups, (starts[i + 1 - len(points)], ends[i]))
                points = []
            elif len(numbers) == 4:
                reading.box(numbers, label, groups, (starts[i], ends[i]))
            elif len(numbers) == 8 and is_quadrangle(numbers):
                corners = [numbers[j : j + 2] for j in range(0, 8, 2)]
                reading.points(corners, label, groups, (starts[i], ends[i]))
            elif len(numbers) > 2:
                reading.problem("odd_number_count", groups)
    if _opens(text[end:], "<box>", "</box>"):
        reading.problem("truncated", text[end : end + 80])


def _after_box(text: str, end: int) -> int:
    """Return where a box ends whose last number ends at `end`: after the tag that closes it, if there is one."""
    return end + len("</box>") if text.startswith("</box>", end) else end


def _before_blanks(text: str, end: int) -> int:
    while end and text[end - 1].isspace():
        end -= 1
    return end


def _odd_span(span: str, label: str | None, reading: Reading, inside: int, place: tuple[int, int]) -> None:
    """Read what stands between box tags and is no run of points: `[1,2,3,4],[5,6,7,8]`, `1,2,3,4`, `(1,2),(3,4`.

    Input: `inside`, where the span begins in the text; `place`, the whole with its name.
    """
    matches = list(re.finditer(r"[(（\[【]([^()（）\[\]【】]*+)[)）\]】]", span))
    groups = [numbers_in(match[1]) for match in matches]
    if groups and all(len(group) == 4 for group in groups):
        reading.problem("brackets", span)
        for i, (group, match) in enumerate(zip(groups, matches, strict=True)):
            start, end = match.span()
            last = i + 1 == len(groups)
            reading.box(group, label, span, (inside + start if i else place[0], place[1] if last else inside + end))
        return
    numbers = numbers_in(span)
    if len(numbers) == 4:
        reading.problem("bracket", span)
        reading.box(numbers, label, span, place)
    elif len(numbers) == 2 and len(groups) == 1:
        reading.problem("point", span)
    elif numbers:
        reading.problem("odd_number_count", span)


def _is_balanced(span: str) -> bool:
    """Tell whether as many brackets open as close, and at least one."""
    opening = sum(span.count(mark) for mark in "(（[【")
    return 0 < opening == sum(span.count(mark) for mark in ")）]】")


def _opens(text: str, start: str, end: str) -> bool:
    """Tell whether the last `start` of a text has no `end` after it."""
    return text.rfind(start) > text.rfind(end)


def _name(
    between: str,
    last: str | None,
    *,
    marked: bool = False,
    first: bool = False,
    undo: Callable[[str], str] = unescape_label,
    exact: bool = False,
) -> tuple[str | None, int]:
    """Read the name that stands before a box; nothing there means that the last name goes on.

    Input: `between`, the text since the last box; `marked`, whether control tokens mark the box: then they would mark a
    name too, and longer plain text is none; `first`, whether no box stands before it.
    Output: the name, and how many characters before the end of `between` it begins, tag included; 0 where none stands there.
    """
    # From the right, and only once for each tag: a search from the left is quadratic on a text of a million openings.
    for start_tag, end_tag in sorted(_NAME_TAGS, key=lambda tag: -between.rfind(tag[1])):
        end = between.rfind(end_tag)
        start = between.rfind(start_tag, 0, max(end, 0))
        if end >= 0 and start >= 0:
            name = between[start + len(start_tag) : end]
            return undo(name if exact or start_tag[1] == "|" else name.strip()), len(between) - start
    untagged = strip_control(between)
    plain = whole = _TAGS.sub("", untagged)
    cut = 0  # characters cut from the right, as long as that matters
    introduction, _, line = plain.strip().rpartition("\n")
    if introduction.rstrip().endswith((":", "：", ".", "。", "!", "?")):  # "Here are the objects:"
        cut = len(plain) - len(plain.rstrip())
        plain = line
    for start_of_name in (_BULLET,) if first else (_AND, _BULLET):
        found = start_of_name.match(plain)
        plain = plain[found.end() :] if found else plain
    plain = plain.lstrip(_STRIPPED).lstrip(">").lstrip(_STRIPPED)
    start = len(whole) - cut - len(plain)
    plain = plain.rstrip(_STRIPPED).rstrip("[(").rstrip(_STRIPPED)
    if not plain:
        return last, 0
    tail = plain[-200:]
    if _SENTENCE.search(tail) or (marked and len(tail.split()) > 4):
        return None, 0
    return undo(plain), len(between) - _place(CONTROL, between, _place(_TAGS, untagged, start))


def _place(pattern: re.Pattern[str], text: str, at: int) -> int:
    """Return where the `at`-th of those characters stands that are left when a pattern is deleted from a text."""
    for match in pattern.finditer(text):
        if match.start() > at:
            break
        at += match.end() - match.start()
    return at


def _boxes(text: str) -> list[tuple[list[list[float]], int, int]]:
    """Split a run of points into boxes: their points, and where in the run each begins and ends.

    The corners of one box are joined by a comma. Without control tokens two boxes after one name stand side by side,
    `(1,2),(3,4)(5,6),(7,8)`: a missing comma starts the next box, unless the whole run is two points.
    """
    found = list(_NEXT_POINT.finditer(text))
    groups: list[list[re.Match[str]]] = []
    for match in found:
        if groups and (match[1] or len(found) == 2):
            groups[-1].append(match)
        else:
            groups.append([match])
    return [
        ([[to_float(match[2]), to_float(match[3])] for match in group], _bracket(text, group[0], 2), group[-1].end())
        for group in groups
    ]


def _bracket(text: str, match: re.Match[str], number: int) -> int:
    """Return where the bracket stands that opens before a group of a match."""
    return max(text.rfind(mark, match.start(), match.start(number)) for mark in "(（[【")

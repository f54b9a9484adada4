"""What the parsers share: a list of boxes that checks its numbers, and the way from that list to `Parsed`.

When: ALWAYS; no torch. A parser finds numbers and names in a text and hands both to a `Reading`, which alone decides
whether numbers are a box. The rules are those of every codec:

    one axis reversed      the box, and the problem `axis_swapped`
    both axes reversed     no box, `both_axes_reversed`: nobody can tell x2, y2, x1, y1 from x, y, width, height
    outside the grid       no box, `out_of_grid`; a number that is not finite is outside
    no width or height     the box, and `zero_area`
    four corners           their bounding box, and `quad`
    one point              no box, `point`
    all below 1, with a    no box, `fractions`: on a grid of hundreds that is another unit
    decimal point
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vlmdet.boxes import FRACTIONS, Boxes
from vlmdet.grounding.codec import Parsed, ParseProblem, is_none_answer

_DETAIL = 80

LONGEST = 300_000
"""Characters of an answer that are read: some 75,000 tokens. What comes after them is lost, and named `too_long`."""

NUMBER = r"[-+]?+(?:\d++(?:\.\d*+)?+|\.\d++)(?:[eE][-+]?+\d{1,3}+)?+"
"""A number as models write it; possessive, so that a search stays linear."""

_NUMBER = re.compile(NUMBER)


@dataclass
class Reading:
    """Boxes, names and problems found so far in one answer.

    Attributes:
        x_limit: largest number on the grid of the family, first axis.
        y_limit: the same, second axis.
        rows: x1, y1, x2, y2 on that grid.
        labels: a name for each row, None where there is none.
        problems: each repair or loss.
        spans: place of each row in the text that is read; see `Parsed`.
        offset: where that text begins in the whole answer, in characters.
        candidates: boxes that were found whole, those included that a rule above refused.
    """

    x_limit: float
    y_limit: float
    rows: list[list[float]] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    problems: list[ParseProblem] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    offset: int = 0
    candidates: int = 0

    def problem(self, kind: str, detail: str) -> None:
        """Write down a repair or a loss; `detail` is cut to 80 characters."""
        self.problems.append(ParseProblem(kind, detail[:_DETAIL]))

    def cut(self, text: str) -> str:
        """Return as much of an answer as is read, so that no text takes a parser longer than a second."""
        if len(text) > LONGEST:
            self.problem("too_long", f"{len(text) - LONGEST} characters are not read: {text[LONGEST : LONGEST + 20]}")
        return text[:LONGEST]

    def points(self, points: Sequence[Sequence[float]], label: str | None, detail: str, span: tuple[int, int]) -> None:
        """Take two opposite corners, or four corners of a quadrangle, each x, y on the grid, and their place in the text."""
        if len(points) in (2, 4):
            self.candidates += 1
        if any(not (0 <= x <= self.x_limit and 0 <= y <= self.y_limit) for x, y in points):  # NaN is outside too
            self.problem("out_of_grid", detail)
        elif len(points) > 1 and _are_fractions([number for point in points for number in point]):
            self.problem("fractions", detail)
        elif len(points) == 4:
            self.problem("quad", detail)
            xs, ys = zip(*points, strict=True)
            self._add([min(xs), min(ys), max(xs), max(ys)], label, span)
        elif len(points) != 2:
            self.problem("point" if len(points) == 1 else "odd_point_count", detail)
        else:
            self._corners(points, label, detail, span)

    def box(self, numbers: Sequence[float], label: str | None, detail: str, span: tuple[int, int]) -> None:
        """Take x1, y1, x2, y2 on the grid, and their place in the text."""
        x1, y1, x2, y2 = numbers
        self.points([(x1, y1), (x2, y2)], label, detail, span)

    def _corners(
        self, corners: Sequence[Sequence[float]], label: str | None, detail: str, span: tuple[int, int]
    ) -> None:
        (x1, y1), (x2, y2) = corners
        if x1 > x2 and y1 > y2:
            self.problem("both_axes_reversed", detail)
            return
        if x1 > x2 or y1 > y2:
            self.problem("axis_swapped", detail)
        if x1 == x2 or y1 == y2:
            self.problem("zero_area", detail)
        self._add([min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)], label, span)

    def _add(self, row: list[float], label: str | None, span: tuple[int, int]) -> None:
        self.rows.append(row)
        self.labels.append(label)
        self.spans.append(span)

    def finish(self, text: str, *, empty: bool = False, shift: float = 0.0) -> Parsed:
        """Return what the answer says.

        Input: the whole `text`; `empty`, whether it is an explicit answer without boxes besides `none`, e.g. `[]`;
        `shift`, added to every number where a number names a bin and stands for its centre (0.5): the grid is then one
        step longer than its largest number.
        """
        rows = np.asarray(self.rows, dtype=np.float64).reshape(-1, 4) + shift
        size = np.array([self.x_limit, self.y_limit] * 2) + 2 * shift
        boxes = Boxes.from_array(rows / size, FRACTIONS, 1, 1)
        spans = [(start + self.offset, end + self.offset) for start, end in self.spans]
        if self.rows:
            return Parsed(boxes, self.labels, self.problems, spans, "ok")
        if not self.candidates and (empty or is_none_answer(text)):
            return Parsed(boxes, self.labels, self.problems, spans, "none")
        self.problem("no_box", text)
        return Parsed(boxes, self.labels, self.problems, spans, "parse_failure")


def is_quadrangle(numbers: Sequence[float]) -> bool:
    """Tell whether eight numbers can only be four corners: convex, and not two boxes one after the other."""
    x, y = numbers[::2], numbers[1::2]
    if all(x[i] <= x[i + 1] and y[i] <= y[i + 1] for i in (0, 2)):
        return False
    turns = []
    for i in range(4):
        j, k = (i + 1) % 4, (i + 2) % 4
        turns.append((x[j] - x[i]) * (y[k] - y[j]) - (y[j] - y[i]) * (x[k] - x[j]))
    return all(turn > 0 for turn in turns) or all(turn < 0 for turn in turns)


def _are_fractions(numbers: Sequence[float]) -> bool:
    return max(numbers) <= 1 and any(0 < number < 1 for number in numbers)


def to_float(digits: str) -> float:
    """Read a number; one of over a hundred characters is as good as infinite."""
    return float(digits) if len(digits) <= 100 else float("inf")


def numbers_in(text: str) -> list[float]:
    """Return every number of a text."""
    return [to_float(digits) for digits in _NUMBER.findall(text)]


def final_answer(text: str) -> str:
    """Return what follows the reasoning of a model that shows it: boxes tried out there are no answer.

    Input: e.g. `<think>Is it [1, 2, 3, 4]?</think><answer>[5, 6, 7, 8]</answer>`.
    Output: e.g. `[5, 6, 7, 8]`; the whole text where no such tag stands in it, and nothing of an unfinished `<think>`.
    """
    start, end = final_answer_bounds(text)
    return text[start:end]


def final_answer_bounds(text: str) -> tuple[int, int]:
    """Return where `final_answer` begins and ends, in characters."""
    start, end = 0, len(text)
    thought = text.rfind("</think>")
    if thought >= 0:
        start = thought + len("</think>")
    elif text.lstrip()[:7] == "<think>" and "<answer>" not in text:
        start = end
    answer = text.rfind("<answer>", start)
    if answer >= 0:
        start = answer + len("<answer>")
        close = text.find("</answer>", start)
        end = end if close < 0 else close
    return start, end

"""Boxes as JSON: writing them, and finding them in whatever tree of lists and objects a model wrote.

When: ALWAYS; no torch. `qwen2_5_vl`, `qwen3_vl` and `plain_json` are this module with a grid and a key; `qwen2_vl` falls
back on it. What counts as a box:

    {"bbox_2d": [x1, y1, x2, y2], "label": "cup"}      also under the keys of `_BOX_KEYS`, at any depth
    {"cup": [x1, y1, x2, y2]}                          a name as the key, where no other name is given
    [[x1, y1, x2, y2], …]                              bare lists; ["cup", x1, y1, x2, y2]; "cup: [x1, y1, x2, y2]"
    {"x1": …, "y1": …, "x2": …, "y2": …}               and other spellings of named numbers
    [[x1, y1], [x2, y2]]                               two corners, or four

Not a box: a point, eight numbers in one list that may be two boxes or a quadrangle, nine numbers of a box in space, numbers
in percent or below 1 (another unit). Each is named in the problems.

Long, because all spellings that models use stand in one place, and a rule for one of them is read against the others.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vlmdet.boxes import Boxes
from vlmdet.grounding.codec import GUARDED, Parsed
from vlmdet.grounding.lenient_json import Document, Node, Text, Word, read_json
from vlmdet.grounding.points import read_brackets, read_points
from vlmdet.grounding.reading import NUMBER, Reading, final_answer_bounds, is_quadrangle, numbers_in, to_float

# Keys are compared in small letters, without `_`, `-` and blanks.
_BOX_KEYS = frozenset(
    "bbox2d bbox box2d box boxes bboxes bboxs boundingbox boundingboxes bbox2ds boxes2d boundingbox2d bbox2dlist position "
    "positions coordinates coordinate coords location locations region rect rectangle area xyxy bndbox xywh yxyx "
    "cxcywh quad quads quadrilateral poly polygon polygons points vertices corners".split()
)
_POINT_KEYS = frozenset("point point2d points2d keypoint keypoints center centre centerpoint click".split())
_QUAD_KEYS = frozenset("quad quads quadrilateral poly polygon polygons points vertices corners".split())
_LABEL_KEYS = (
    "label name class category object labels labelname classname categoryname objectname objectlabel type textcontent text "
    "content description caption phrase ref expression title tag item labelen nameen names"
).split()
_CONTAINER_KEYS = frozenset(
    "objects detections detection results result annotations predictions items data output outputs answer answers "
    "instances regions elements arguments parameters args image images response final list entities json".split()
)
_NAMED_NUMBERS = (
    ("x1 y1 x2 y2", "xyxy"),
    ("xmin ymin xmax ymax", "xyxy"),
    ("left top right bottom", "xyxy"),
    ("startx starty endx endy", "xyxy"),
    ("x y width height", "xywh"),
    ("x y w h", "xywh"),
    ("left top width height", "xywh"),
)
_NAMED_CORNERS = (("topleft", "bottomright"), ("lefttop", "rightbottom"), ("upperleft", "lowerright"), ("start", "end"))
_FIRST_NAMES = {names.split()[0] for names, _ in _NAMED_NUMBERS} | {first for first, _ in _NAMED_CORNERS}
_NUMBER_TEXT = re.compile(rf"\s*+({NUMBER})\s*+(?:px)?+\s*+")
_PERCENT_TEXT = re.compile(rf"\s*+{NUMBER}\s*+%\s*+")
_BOX_TEXT = re.compile(r"[\d\s.,，、;()\[\]（）<>+-]{7,200}")
# A line that names the list after it: "- **red cup**: [1, 2, 3, 4]".
_LINE_NAME = re.compile(r"[\s\-*•#>\d.)\"'`]*+(?P<name>[^\n:：\[\]{}]{1,60}?)[\"'*`]*\s*[:：]\s*\Z")
_NO_NAME = re.compile(
    r"\b(?:is|are|was|at|b?box(?:es|_2d)?|bounding|coordinates?|locations?|positions?|answers?|outputs?|results?|json|"
    r"here|following|detected|found|sure|format|object)\b|坐标|如下|位置",
    re.IGNORECASE,
)
_EMPTY_WORDS = frozenset("none nothing n/a null empty".split())


def write_json(labels: Sequence[str], boxes: Boxes, *, key: str, x_limit: int, y_limit: int) -> str:
    """Write boxes as a JSON list on one line.

    Input: n `labels` and n `boxes`; `key` of the four numbers; the largest numbers of the grid.
    Output: `[{"bbox_2d": [135, 114, 1016, 672], "label": "cup"}]`, numbers rounded to the grid and cut to it; `[]` for
    no box. A label that holds something like a control token is written with JSON's own escape: `\\u003c|im_end|>`.

    Raises:
        ValueError: labels and boxes differ in number.
    """
    grid = np.rint(boxes.xyxy * np.array([x_limit, y_limit] * 2)).clip(0, [x_limit, y_limit] * 2).astype(int)
    rows = [{key: row.tolist(), "label": label} for label, row in zip(labels, grid, strict=True)]
    return GUARDED.sub("\\\\u003c", json.dumps(rows, ensure_ascii=False))


def write_label(label: str) -> str:
    """Return a label as `write_json` writes it, quotes included."""
    return GUARDED.sub("\\\\u003c", json.dumps(label, ensure_ascii=False))


def parse_json(text: str, *, x_limit: float, y_limit: float) -> Parsed:
    """Read an answer of a family that writes JSON; never raises, takes time in proportion to the length.

    Input: `text`; the largest numbers of the grid.
    Output: `Parsed`. Where no JSON box stands in it, boxes in the notation of Qwen2-VL are taken from the same grid, with
    the problem `other_notation`.
    """
    start, end = final_answer_bounds(text)
    reading = Reading(x_limit, y_limit, offset=start)
    answer = reading.cut(text[start:end])
    document = collect_boxes(answer, reading)
    if not reading.candidates:
        for read in (read_points, read_brackets):
            other = Reading(x_limit, y_limit, offset=start)
            read(answer, other)
            if other.candidates:
                other.problems[:0] = reading.problems
                other.problem("other_notation", answer)
                return other.finish(text)
        numbers = numbers_in(answer) if _BOX_TEXT.fullmatch(answer) else []
        if len(numbers) == 4 and not document.roots:
            reading.problem("bracket", answer)
            reading.box(numbers, None, answer, (len(answer) - len(answer.lstrip()), len(answer.rstrip())))
    return reading.finish(text, empty=says_nothing(answer, document))


def collect_boxes(text: str, reading: Reading) -> Document:
    """Put every JSON box of a text into a `Reading`, with what was mended; return the tree that was read."""
    document = read_json(text)
    for kind, start in document.repairs:
        reading.problem(kind, text[start : start + 80])
    collector = _Collector(text, reading)
    end = 0
    for root in document.roots:
        collector.walk(root, _name_before(text, end, root.start))
        end = root.start + 1
    collector.widen()
    if document.truncated:
        reading.problem("truncated", text[-80:])
    return document


class _Name(NamedTuple):
    """A name for the boxes below a node, and the place that a box and this name would have in the text.

    `end` is None where the name stands before the box, whose own end it then is; `start` is None where nobody knows.
    """

    text: str | None
    start: int | None = None
    end: int | None = None


class _Collector:
    """Walks a tree in the order of the text, without recursion: a hostile one is a million levels deep."""

    def __init__(self, text: str, reading: Reading) -> None:
        self.text = text
        self.reading = reading
        self.todo: list[tuple[Node, str, _Name]] = []
        self.wide: list[tuple[int, int]] = []  # for each row of the reading: its place with its name

    def walk(self, root: Node, label: _Name) -> None:
        self.todo = [(root, "", label)]
        while self.todo:
            node, key, label = self.todo.pop()
            children = self._list(node, key, label) if node.kind == "list" else self._object(node, label)
            self.todo.extend(reversed(children))

    def widen(self) -> None:
        """Give each box the words of its name too, where those are no other box's: an object with one box is all its own."""
        own = self.reading.spans[-len(self.wide) :] if self.wide else []
        starts, last = sorted(start for start, _ in own), 0
        order = sorted(range(len(own)), key=lambda i: own[i])
        spans = list(own)
        for i in order:
            start, end = self.wide[i]
            alone = bisect_left(starts, end) - bisect_left(starts, start) == 1
            if not (alone and last <= start <= own[i][0] and own[i][1] <= end):
                start, end = own[i]
            start = max(
                start, last
            )  # two boxes in one text, `{"a": "1,2,3,4", …}`, have one place: the second has nothing
            end = last = max(start, end)
            spans[i] = (start, end)
        self.reading.spans[len(self.reading.spans) - len(own) :] = spans

    def _box(self, numbers: Sequence[float], name: _Name, node: Node) -> None:
        x1, y1, x2, y2 = numbers
        self._points([(x1, y1), (x2, y2)], name, node)

    def _points(self, points: Sequence[Sequence[float]], name: _Name, node: Node) -> None:
        last = node.items[-1] if node.items else None
        start, end = node.start, max(node.end, last.end if isinstance(last, Node) else 0)
        count = len(self.reading.rows)
        self.reading.points(points, None if name.text is None else str(name.text), self._detail(node), (start, end))
        if len(self.reading.rows) > count:
            self.wide.append((start if name.start is None else name.start, end if name.end is None else name.end))

    def _detail(self, node: Node) -> str:
        return self.text[node.start : node.start + 80]

    # ---- lists ------------------------------------------------------------------------------------------------------

    def _list(self, node: Node, key: str, label: _Name) -> list[tuple[Node, str, _Name]]:
        """Read a list as one box, or return what is to be looked at inside it."""
        detail = self._detail(node)
        items = node.items
        children = [item for item in items if isinstance(item, Node)]
        if not children:
            if node.closed:
                self._flat(node, key, label, detail)
            return []
        points = [_point(item) for item in items] if len(items) <= 64 else [None]
        if node.closed and len(points) > 1 and all(point is not None for point in points):
            if key in _POINT_KEYS or (key in _QUAD_KEYS and len(points) != 4):
                self.reading.problem("point", detail)
            else:
                self._points([point for point in points if point is not None], label, node)
            return []
        result, name = [], label
        for item in items:  # a name stands before its box: ["cup", [1, 2, 3, 4], "dog", [5, 6, 7, 8]]
            if isinstance(item, str):
                name = _Name(item.strip() if isinstance(item, Word) else item, _start(item))
            elif isinstance(item, Node):
                result.append((item, key, name))
        return result

    def _flat(self, node: Node, key: str, label: _Name, detail: str) -> None:
        """Read a list without lists in it."""
        numbers, names, converted = [], [], False
        for item in node.items:
            if isinstance(item, float):
                numbers.append(item)
            elif isinstance(item, str):
                if _PERCENT_TEXT.fullmatch(item):
                    self.reading.problem("percent", detail)
                    return
                match = _NUMBER_TEXT.fullmatch(item)
                if match:
                    numbers.append(to_float(match[1]))
                    converted = True
                else:
                    names.append(item.strip() if isinstance(item, Word) else item)
            else:
                numbers.append(float("nan"))  # null: the number is missing
        if not numbers:
            for name in names:
                self._text(name, key, label, node)
            return
        if converted:
            self.reading.problem("number_as_text", detail)
        self._numbers(numbers, key, _Name(names[0]) if names else label, node)

    def _numbers(self, numbers: list[float], key: str, label: _Name, node: Node) -> None:
        count, detail = len(numbers), self._detail(node)
        if count == 5 and 0 < numbers[4] < 1 < max(numbers[:4]):  # a confidence
            self.reading.problem("extra_number", detail)
            self._box(_ordered(numbers[:4], key), label, node)
        elif count == 4 and key not in _POINT_KEYS:
            self._box(_ordered(numbers, key), label, node)
        elif count == 8 and (key in _QUAD_KEYS or is_quadrangle(numbers)):
            self._points(list(zip(numbers[::2], numbers[1::2], strict=True)), label, node)
        elif count == 2 or key in _POINT_KEYS:
            self.reading.problem("point", detail)
        else:
            self.reading.candidates += count == 8
            self.reading.problem("odd_number_count", detail)

    def _text(self, text: str, key: str, label: _Name, node: Node) -> None:
        """Read a box that stands in quotes: `"bbox_2d": "12, 34, 56, 78"`."""
        if not _BOX_TEXT.fullmatch(text):
            return
        numbers = numbers_in(text.replace("-", " ") if text.count("-") == 3 and "," not in text else text)
        if len(numbers) >= 4:
            self.reading.problem("number_as_text", self._detail(node))
            self._numbers(numbers, key, label, node)

    # ---- objects ----------------------------------------------------------------------------------------------------

    def _object(self, node: Node, label: _Name) -> list[tuple[Node, str, _Name]]:
        """Read the boxes of an object itself, and return what is to be looked at inside it."""
        if all(key is None for key, _ in node.items):  # a brace too many
            return [(value, "", label) for _, value in node.items if isinstance(value, Node)]
        detail = self._detail(node)
        if self._named(node, label, detail):
            return []
        keyed = [(_plain(key), key, value) for key, value in node.items]
        name_key = _label_key(keyed)
        names = [_as_label(value) for plain, _, value in keyed if plain == name_key and name_key is not None]
        own = names[0] if names else None
        beside = [_Name(name, node.start, node.end) for name in names]
        if not names and label.start is None:  # a name from further out has its place there
            label = _Name(label.text, node.start, node.end)
        boxes = [i for i, (plain, _, value) in enumerate(keyed) if plain in _BOX_KEYS and _may_hold_box(value)]
        if not boxes:
            boxes = [i for i, (plain, _, value) in enumerate(keyed) if plain in _POINT_KEYS and isinstance(value, Node)]
        if not boxes and own is not None:  # an unknown key for the box beside a known one for the name
            boxes = [i for i, (plain, _, value) in enumerate(keyed) if plain != name_key and _is_box_like(value)]
            if boxes:
                self.reading.problem("other_key", detail)
        chosen = set(boxes)
        inside: list[tuple[Node, str, _Name]] = []
        for place, i in enumerate(boxes):
            plain, _, value = keyed[i]
            name = beside[place if len(names) == len(boxes) else 0] if names else label
            if isinstance(value, Node):
                inside.append((value, plain, name))
            else:
                self._text(value, plain, name, node)
        if len(boxes) > 1 and len({keyed[i][0] for i in boxes}) < len(boxes):
            self.reading.problem("duplicate_key", detail)
        for i, (plain, key, value) in enumerate(keyed):
            if i in chosen or not isinstance(value, Node) or plain == name_key:
                continue
            if boxes and not _holds_objects(value):
                continue  # keypoints, colours, masks beside a box
            name = beside[0] if own is not None and not boxes else label
            if own is None and key is not None and plain not in _CONTAINER_KEYS and plain not in _BOX_KEYS:
                name = _Name(key.strip() if isinstance(key, Word) else key, _start(key))
            inside.append((value, "" if plain in _CONTAINER_KEYS else plain, name))
        for plain, key, value in keyed:
            if not boxes and own is None and isinstance(value, str) and plain and _BOX_TEXT.fullmatch(value):
                self._text(value, plain, _Name(key), node)
        return inside

    def _named(self, node: Node, label: _Name, detail: str) -> bool:
        """Read `{"x1": 1, "y1": 2, "x2": 3, "y2": 4}`; tell whether the object is one."""
        if not 2 <= len(node.items) <= 40:
            return False
        values = {_plain(key): value for key, value in node.items}
        if _FIRST_NAMES.isdisjoint(values):
            return False
        name_key = _label_key([(key, key, value) for key, value in values.items()])
        name = _Name(_as_label(values[name_key])) if name_key is not None else label
        for names, order in _NAMED_NUMBERS:
            found = [_as_number(values.get(part)) for part in names.split()]
            numbers = [number for number in found if number is not None]
            if len(numbers) == 4:
                if order == "xywh":
                    self.reading.problem("xywh", detail)
                self._box(_ordered(numbers, order), name, node)
                return True
        for first, last in _NAMED_CORNERS:
            corners = [_point(values.get(first)), _point(values.get(last))]
            points = [corner for corner in corners if corner is not None]
            if len(points) == 2:
                self._points(points, name, node)
                return True
        return False


# ---- values ---------------------------------------------------------------------------------------------------------


def _start(text: str) -> int | None:
    return text.start if isinstance(text, Text) else None


def _plain(key: str | None) -> str:
    return re.sub(r"[\s_\-*\"']", "", key[:60]).lower() if key else ""


def _label_key(keyed: Sequence[tuple[str, Any, Any]]) -> str | None:
    """Choose the key that holds the name: the known ones in their order, then `name_xx`, `label_xx`."""
    named = {plain for plain, _, value in keyed if plain and _as_label(value) is not None}
    if not named:
        return None
    for known in _LABEL_KEYS:
        if known in named:
            return known
    starts = ("label", "name", "class", "category")
    others = sorted(plain for plain in named if plain.startswith(starts) or plain.endswith(starts))
    return others[0] if others else None


def _as_label(value: Any) -> str | None:
    """Read a name: a text, a number, the first of a list, or the English one of an object of languages."""
    if isinstance(value, Node):
        if value.kind == "object":
            texts = {_plain(key): item for key, item in value.items if isinstance(item, str)}
            if "en" in texts:
                return str(texts["en"])
            return next((str(text) for key, text in texts.items() if key in ("english", "zh", *_LABEL_KEYS[:4])), None)
        value = value.items[0] if len(value.items) == 1 else None
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return value.strip() if isinstance(value, Word) else str(value)
    return None


def _as_number(value: Any) -> float | None:
    if isinstance(value, str):
        match = _NUMBER_TEXT.fullmatch(value)
        return to_float(match[1]) if match else None
    return value if isinstance(value, float) else None


def _point(value: Any) -> tuple[float, float] | None:
    """Read `[x, y]` or `{"x": …, "y": …}`."""
    if not isinstance(value, Node) or len(value.items) != 2 or not value.closed:
        return None
    if value.kind == "object":
        named = {_plain(key): item for key, item in value.items}
        x, y = _as_number(named.get("x")), _as_number(named.get("y"))
    else:
        x, y = (_as_number(item) for item in value.items)
    return (x, y) if x is not None and y is not None else None


def _is_box_like(value: Any) -> bool:
    """Tell whether a value is four numbers, or a list that begins with such."""
    for _ in range(3):
        if not isinstance(value, Node) or value.kind != "list" or not value.items:
            return False
        if not isinstance(value.items[0], Node):
            return len(value.items) == 4 and all(_as_number(item) is not None for item in value.items)
        value = value.items[0]
    return False


def _may_hold_box(value: Any) -> bool:
    if isinstance(value, Node):
        return bool(value.items)
    return isinstance(value, str) and _BOX_TEXT.fullmatch(value) is not None


def _holds_objects(value: Node) -> bool:
    return value.kind == "object" or any(isinstance(item, Node) and item.kind == "object" for item in value.items[:100])


def _ordered(numbers: Sequence[float], key: str) -> list[float]:
    """Turn four numbers into x1, y1, x2, y2 where their key says another order."""
    a, b, c, d = numbers
    if key == "xywh":
        return [a, b, a + c, b + d]
    if key == "cxcywh":
        return [a - c / 2, b - d / 2, a + c / 2, b + d / 2]
    return [b, a, d, c] if key == "yxyx" else [a, b, c, d]


def _name_before(text: str, end: int, start: int) -> _Name:
    """Read the name on the line before a bare list: `red cup: [1, 2, 3, 4]`."""
    if text[start : start + 1] not in ("[", "【", "［"):
        return _Name(None)
    line = text[max(end, start - 80) : start].rpartition("\n")[2]
    match = _LINE_NAME.fullmatch(line)
    if match is None or _NO_NAME.search(match["name"]) or len(match["name"].split()) > 6:
        return _Name(None)
    return _Name(match["name"].strip(), start - len(line) + match.start("name"))


def says_nothing(text: str, document: Document) -> bool:
    """Tell whether an answer is an explicit "nothing": `[]`, `{"objects": []}`, a fenced `none`."""
    words = re.sub(r"```|\bjson\b|\W", "", text[:200]).lower() if len(text) <= 200 else ""
    if words in _EMPTY_WORDS:
        return True
    return bool(document.roots) and not document.truncated and all(_is_empty(root) for root in document.roots)


def _is_empty(root: Node) -> bool:
    """Tell whether a list or an object holds nothing but empty lists, nulls, and names beside an empty box."""
    todo, looked = [root], 0
    while todo:
        node = todo.pop()
        looked += 1
        if looked > 1000:
            return False
        pairs = node.items if node.kind == "object" else [(None, item) for item in node.items]
        hollow = any(_plain(key) in _BOX_KEYS and not _may_hold_box(value) for key, value in pairs)
        for key, value in pairs:
            if isinstance(value, Node):
                todo.append(value)
            elif value is None or (isinstance(value, str) and value.strip().lower() in _EMPTY_WORDS):
                continue
            elif not (hollow and _plain(key) in _LABEL_KEYS):
                return False
    return True

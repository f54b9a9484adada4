"""Read JSON as models write it: into a tree, whatever is broken in it, in one pass.

When: ALWAYS; no torch. The standard library reads valid JSON only, and a repairing library does not say what it
repaired. This reader takes what models answer: JSON in prose or fences, single quotes, full-width punctuation, comments,
trailing commas, bare words, brackets that are missing, doubled or mismatched, an answer that is cut. Valid JSON comes out
as the standard library would read it, except that an object keeps all pairs, in order, also where a key stands twice.

Every character is looked at a bounded number of times, so that a megabyte of brackets takes well under a second: runs of
numbers are one token, quantifiers are possessive, and a quote without an end is searched for once for each kind of quote.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from vlmdet.grounding.reading import NUMBER, numbers_in

Kind = Literal["list", "object"]


class Text(str):
    """A text value or a key that knows where it begins."""

    __slots__ = ("start",)
    start: int

    def __new__(cls, text: str, start: int) -> Self:
        """Make one; `start` is the place of its first character, quote included."""
        made = super().__new__(cls, text)
        made.start = start
        return made


class Word(Text):
    """Text that stands without quotes."""

    __slots__ = ()


class Node:
    """A list or an object; what JSON cannot repeat or leave out, this can.

    Attributes:
        kind: `list` or `object`.
        start: where in the text it begins.
        end: where it ends, its bracket included.
        items: the values of a list; the pairs of an object, key None where a value stands without one.
        closed: whether its end was found.
        implied: whether its brackets are missing.
        key, colon: of an object that is being read: the key that waits for its value, and whether a colon followed.
    """

    __slots__ = ("closed", "colon", "end", "implied", "items", "key", "kind", "start")

    def __init__(
        self,
        kind: Kind,
        start: int,
        items: list[Any] | None = None,
        *,
        end: int | None = None,
        closed: bool = False,
        implied: bool = False,
    ) -> None:
        self.kind = kind
        self.start = start
        self.end = start if end is None else end
        self.items: list[Any] = [] if items is None else items
        self.closed = closed
        self.implied = implied
        self.key: str | None = None
        self.colon = False


Value = float | str | None | Node


@dataclass(slots=True)
class Document:
    """What stands in a text.

    Attributes:
        roots: lists and objects that lie in no other, in the order of the text.
        repairs: kind and place of what was mended: `bracket`, `quote`.
        truncated: whether the text ends inside one of them.
    """

    roots: list[Node] = field(default_factory=list)
    repairs: list[tuple[str, int]] = field(default_factory=list)
    truncated: bool = False


_OPEN = "\\[{(（【［｛"
_CLOSE = "\\]})）】］｝"
_COMMA = ",，、;；"
_COLON = ":：="
_QUOTES = '"“”'
_MARKS = _OPEN + _CLOSE + _COMMA + _COLON + _QUOTES
_NUMBERS = rf"{NUMBER}(?![\w.%])(?:\s*+[,，、]\s*+{NUMBER}(?![\w.%]))*+"
# A quote ends a text only before what may follow a text; any other belongs to it: 'the dog's bowl', "19" rack".
_ENDS = rf"(?=\s*+(?:[{_COMMA}{_CLOSE}]|[:：]|\Z|```|</|//|#|[\"'][\w ]{{1,40}}[\"']\s*+[:：])|[ \t]*+\n)"
_DOUBLE = rf"\"(?P<double>(?:[^\"\\]++|\\.|\"(?!{_ENDS}))*+)\""
_SINGLE = rf"'(?P<single>(?:[^'\\]++|\\.|'(?!{_ENDS}))*+)'"
_CURLY = r"[“”](?P<curly>[^“”]*+)[“”]"


def _token(*texts: str) -> re.Pattern[str]:
    return re.compile(
        r"\s*+(?:"
        rf"(?P<list>[\[(（【［]\s*+{_NUMBERS}\s*+[,，]?+\s*+[\])）】］])"
        rf"|(?P<numbers>{_NUMBERS})"
        rf"|(?P<open>[{_OPEN}])"
        rf"|(?P<close>[{_CLOSE}])"
        rf"|\\\"(?P<escaped>[^\"\\]*+)\\\"" + "".join(f"|{text}" for text in texts) + rf"|(?P<comma>[{_COMMA}\s]++)"
        rf"|(?P<colon>[{_COLON}]++)"
        r"|(?P<comment>//[^\n]*+|\#[^\n]*+|/\*(?:[^*]++|\*(?!/))*+(?:\*/)?+)"
        rf"|(?P<word>[^\s{_MARKS}'][^\s{_MARKS}]*+(?:[ \t]++[^\s{_MARKS}'#/][^\s{_MARKS}]*+)*+)"
        r"|(?P<other>.))",
        re.DOTALL,
    )


_TEXTS = {'"': _DOUBLE, "'": _SINGLE, "“”": _CURLY}
_FIELDS = "bbox_2d|bbox|box_2d|box|bounding_box|label|xmin|x_min|x1"
# A bracket, or a key whose object lost its brace.
_START = re.compile(
    rf"[\[{{【［｛]|(?P<key>[\"'“]\w{{1,40}}[\"'”]\s*+[:：]|(?m:^[ \t]*+(?:[-*]\s*+)?+)(?:{_FIELDS})\s*+[{_COLON}])"
)
_PAIR = re.compile(rf"{NUMBER}\s*+[,，、]\s*+{NUMBER}")
_PATIENCE = 20_000
"""Tokens without two numbers side by side, after which the reader looks for such numbers further on."""
_SPECIAL = {
    "none": None,
    "null": None,
    "nan": float("nan"),
    "inf": float("inf"),
    "infinity": float("inf"),
    "-inf": float("-inf"),
    "-infinity": float("-inf"),
}
_UNESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|(.))", re.DOTALL)
_LETTERS = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}


def read_json(text: str) -> Document:
    """Find and read every list and object of a text; never raises.

    Input: e.g. `Sure:\\n```json\\n[{'bbox_2d': [1, 2, 3, 4], 'label': 'cup'}]\\n``` `.
    Output: a `Document` with, here, one root.
    """
    return _Reader(text).read()


class _Reader:
    """The state of one pass: the lists and objects that are open, outermost first."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.document = Document()
        self.stack: list[Node] = []
        self.open_objects = 0  # of the stack
        self.at = 0  # where the token begins that is read

    def read(self) -> Document:
        text, texts = self.text, _TEXTS
        token = _token(*texts.values())
        pos, kind, idle = 0, "", 0
        while True:
            if not self.stack:
                start = _START.search(text, pos)
                if start is None:
                    break
                pos = start.start()
                if start["key"]:
                    self._push("object", pos, implied=True)
                    pos += len(start[0]) - len(start[0].lstrip(" \t-*"))
            if idle > _PATIENCE:
                pos = self._skip(pos)
                idle = 0
                continue
            match = token.match(text, pos)
            if match is None:
                break
            pos = match.end()
            kind = match.lastgroup or ""
            self.at = match.start(kind)
            idle += 1
            if kind == "list":
                numbers = numbers_in(match[kind])
                self._value(Node("list", match.start(kind), numbers, end=pos, closed=True))
                idle = idle if len(numbers) == 1 else 0
            elif kind == "numbers":
                numbers = numbers_in(match[kind])
                self._numbers(numbers, match.start(kind), pos)
                idle = idle if len(numbers) == 1 else 0
            elif kind == "open":
                self._push("object" if match[kind] in "{｛" else "list", match.start(kind))
            elif kind == "close":
                self._close("object" if match[kind] in "}｝" else "list", match.start(kind))
            elif kind == "comma":
                self._comma()
            elif kind == "colon":
                self._colon()
            elif kind == "word":
                word = match[kind]
                self._value(_SPECIAL[word.lower()] if word.lower() in _SPECIAL else Word(word, self.at))
            elif kind == "other":
                # A quote that gets here has no end: no text in such quotes begins after it either.
                left = {marks: pattern for marks, pattern in texts.items() if match[kind] not in marks}
                if left != texts:
                    texts, token = left, _token(*left.values())
                    self.document.repairs.append(("quote", match.start(kind)))
            elif kind != "comment":
                self._value(Text(_unescape(match[kind]), self.at - (2 if kind == "escaped" else 1)))
        self._end(kind)
        return self.document

    def _skip(self, pos: int) -> int:
        """Give up what is open, and go on shortly before the next two numbers that stand together."""
        pair = _PAIR.search(self.text, pos)
        self.document.repairs.append(("skipped", pos))
        for node in self.stack:
            node.end = pos
        self.stack.clear()
        self.open_objects = 0
        return max(pos, pair.start() - 100) if pair else len(self.text)

    def _push(self, kind: Kind, start: int, *, implied: bool = False) -> None:
        node = Node(kind, start, implied=implied)
        if self.stack:
            self._value(node)
        else:
            self.document.roots.append(node)
        self.stack.append(node)
        self.open_objects += kind == "object"

    def _pop(self, end: int, *, closed: bool) -> None:
        node = self.stack.pop()
        self._settle(node)
        node.closed = closed
        node.end = end
        self.open_objects -= node.kind == "object"

    def _settle(self, node: Node) -> None:
        """Store a key that got no value, or a value that got no key."""
        if node.key is not None:
            node.items.append((node.key, None) if node.colon else (None, node.key))
            node.key, node.colon = None, False

    def _close(self, kind: Kind, start: int) -> None:
        """End the innermost node of a kind, and what was left open inside it; none of that kind: the innermost one."""
        if self.stack[-1].kind != kind:
            if self.open_objects if kind == "object" else self.open_objects < len(self.stack):
                while self.stack[-1].kind != kind:
                    self.document.repairs.append(("bracket", self.stack[-1].start))
                    self._pop(start, closed=True)
            else:
                self.document.repairs.append(("bracket", start))
        self._pop(start + 1, closed=True)

    def _comma(self) -> None:
        self._settle(self.stack[-1])

    def _colon(self) -> None:
        top = self.stack[-1]
        if top.kind == "list":
            self._reopen(top)
            return
        if top.key is None and top.items:
            self._split_text(top)
        top.colon = top.key is not None

    def _reopen(self, top: Node) -> None:
        """A colon in a list: its end is missing, or its brackets are those of an object."""
        if not top.items or not isinstance(top.items[-1], str):
            return
        key = top.items.pop()
        self.document.repairs.append(("bracket", top.start))
        if len(self.stack) > 1 and self.stack[-2].kind == "object" and top.items:
            self._pop(key.start if isinstance(key, Text) else self.at, closed=True)
        else:
            top.kind = "object"
            top.items = [(None, item) for item in top.items]
            self.open_objects += 1
        self.stack[-1].key, self.stack[-1].colon = key, True

    def _split_text(self, top: Node) -> None:
        """A colon after `"label": "cup, "bbox_2d"`: the quote after cup is missing."""
        key, value = top.items[-1]
        if not isinstance(value, str):
            return
        at = max(value.rfind('"'), value.rfind("'"))
        if at >= 0:
            self.document.repairs.append(("quote", top.start))
            top.items[-1] = (key, value[:at].rstrip(" ,，\n\t"))
            top.key = value[at + 1 :]
        elif key is None:
            top.items.pop()
            top.key = value

    def _numbers(self, numbers: list[float], start: int, end: int) -> None:
        """Take numbers that no brackets of their own hold."""
        top = self.stack[-1]
        if top.kind == "list":
            top.items.extend(numbers)
        elif len(numbers) == 1 and top.colon:
            self._value(numbers[0])
        else:
            self.document.repairs.append(("bracket", start))
            self._value(Node("list", start, numbers, end=end, closed=True, implied=True))

    def _value(self, value: Value) -> None:
        top = self.stack[-1] if self.stack else None
        if top is None:
            self.document.roots.append(value)  # type: ignore[arg-type]  # only a whole list comes without a parent
        elif top.kind == "list":
            top.items.append(value)
        elif top.colon:
            top.items.append((top.key, value))
            top.key, top.colon = None, False
        elif isinstance(value, str):
            self._settle(top)
            top.key = value
        elif top.key is not None:  # `"cup" [1, 2, 3, 4]`: the colon is missing
            top.items.append((top.key, value))
            top.key = None
        elif isinstance(value, Node) and value.kind == "list":
            self._join(top, value)
        else:
            top.items.append((None, value))

    def _join(self, top: Node, value: Node) -> None:
        """Put a list that stands without a key to the value before it: `"bbox_2d": [1, 2], [3, 4]`."""
        key, last = top.items[-1] if top.items else (None, None)
        if isinstance(last, float) and value.implied:
            whole = Node("list", value.start, [last, *value.items], end=value.end, closed=True, implied=True)
            top.items[-1] = (key, whole)
        elif not isinstance(last, Node) or last.kind != "list":
            top.items.append((None, value))
        elif value.implied and last.implied:
            last.items.extend(value.items)
            last.end = value.end
        elif last.implied and last.items and isinstance(last.items[0], Node):
            last.items.append(value)
            last.end = value.end
        else:
            top.items[-1] = (key, Node("list", last.start, [last, value], end=value.end, closed=True, implied=True))

    def _end(self, last: str) -> None:
        """Close what is open at the end of the text; a last bare word or number may have lost its rest."""
        self.document.truncated = any(not node.implied for node in self.stack)
        if self.document.truncated:
            top = self.stack[-1]
            if top.key is not None:
                top.key, top.colon = None, False
            elif top.kind == "object" and top.items and last in ("word", "numbers"):
                top.items[-1] = (top.items[-1][0], None)
        while self.stack:
            self._pop(len(self.text), closed=self.stack[-1].implied)


def _unescape(text: str) -> str:
    """Undo JSON's escapes; an escape that JSON does not know stays."""
    if "\\" not in text:
        return text

    def plain(match: re.Match[str]) -> str:
        code = match[1] or match[2]
        if code:
            return chr(int(code, 16))
        return _LETTERS.get(match[3]) or (match[3] if match[3] in "\"'\\/" else match[0])

    # Characters above U+FFFF are written as two escapes; a lone half stays as it is.
    return _UNESCAPE.sub(plain, text).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")

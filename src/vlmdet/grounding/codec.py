"""What every codec takes and gives: `View`, `Parsed`, and the escaping of labels.

When: ALWAYS; no torch. A codec is the only place that knows how a model family writes boxes. It is a module with two
functions, `encode(labels, boxes, view) -> str` and `parse(text, view) -> Parsed`, and a `VERSION`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from vlmdet.boxes import Boxes
from vlmdet.grounding.prompts import NONE_ANSWER


@dataclass(frozen=True)
class View:
    """Sizes of one picture: upright and original, and as the model sees it; all in pixels."""

    width: int
    height: int
    resized_width: int
    resized_height: int


class ParseProblem(NamedTuple):
    """What a parser repaired or lost: `kind` is one word, `detail` quotes the text."""

    kind: str
    detail: str


@dataclass(frozen=True)
class Parsed:
    """What an answer says.

    Attributes:
        boxes: n boxes on the upright picture.
        labels: n names; None where the text gives a box without one.
        problems: each repair or loss.
        spans: start and end, in characters of the text as it was given, of each box's own words: its numbers and its
            name, with the marks around and between them. Spans do not overlap: of several boxes that share a name one has
            it, or none. The name of a box may stand elsewhere.
        status: `ok` with at least one box, `none` for the explicit answer that there is nothing, else `parse_failure`.
    """

    boxes: Boxes
    labels: list[str | None]
    problems: list[ParseProblem]
    spans: list[tuple[int, int]]
    status: Literal["ok", "none", "parse_failure"]


class Codec(Protocol):
    """The two functions and the version of one family's way to write boxes."""

    NAME: str
    VERSION: str

    def encode(self, labels: Sequence[str], boxes: Boxes, view: View) -> str: ...

    def parse(self, text: str, view: View) -> Parsed: ...


CONTROL = re.compile(r"<\|[a-z0-9_]{1,40}\|>|<\|[a-z0-9_]{0,40}$")
_NONE = re.compile(rf"\W*{NONE_ANSWER}\W*", re.IGNORECASE)
# What a tokenizer could take for a control token, or a parser for the corner of a box.
_NUMBER = r"\s*+[-+]?+\d++(?:\.\d++)?+\s*+"
_HOSTILE = re.compile(rf"\\|<(?=\|)|[(（](?={_NUMBER}[,，、]{_NUMBER}[)）])")

# Control tokens and task tokens of the other families, up to their first letter; `<b>` and `a < b` are ordinary text.
_WORDS = (
    "think|answer|tool_call|tool_response|ref|box|quad|img|image|img_context|video|s|pad|bos|eos|unk|mask|od|bbox|poly|sep|"
    "and|cap|ncap|dcap|ocr|grounding|ground|obj|region_cap|proposal|region_to_desciption|start_of_turn|end_of_turn|"
    r"loc_?\d++|seg_?\d++|seg|unused_?\d++|start_of_image|end_of_image"
)
GUARDED = re.compile(rf"<(?=\||/?(?:(?:{_WORDS})\b|(?-i:[A-Z][A-Z_]++>)))", re.IGNORECASE)
"""The `<` of what a tokenizer of any family could take for a control token, or a parser for a tag."""
_EDGE = re.compile(r"\A[\s;,，、]|[\s;,，、]\Z")
_GUARD = re.compile(r"\\(?:u([0-9a-f]{4})|([\\|(（\[【]))|(?<=<)\\(?=[A-Za-z/])")
_LIST = re.compile(rf"[\[【](?=(?:{_NUMBER}[,，、]){{3}}{_NUMBER}[\]】])")


def escape_label(label: str) -> str:
    r"""Make a label safe to stand in a prompt or an answer: `a<|im_end|>b` becomes `a<\|im_end|>b`.

    No tokenizer can read a control token in the result, and no parser a corner of a box: `plan (1,2)` becomes
    `plan \(1,2)`. An ordinary label, one without a backslash, `<|` or two numbers in brackets, comes back unchanged;
    `unescape_label` undoes the rest.
    """
    return _HOSTILE.sub(lambda match: "<\\" if match[0] == "<" else "\\" + match[0], label)


def unescape_label(text: str) -> str:
    r"""Undo `escape_label`; a backslash that it cannot have written stays."""
    return re.sub(r"\\([\\|(（])", r"\1", text)


def is_none_answer(text: str) -> bool:
    """Tell whether a text, control tokens aside, says only that there is nothing: `none`, `None.`."""
    words = strip_control(text).strip()
    return len(words) <= 100 and _NONE.fullmatch(words) is not None


def strip_control(text: str) -> str:
    """Delete everything that looks like a control token."""
    return CONTROL.sub("", text)


def guard_label(label: str) -> str:
    r"""Make a label safe in an answer that has no JSON around it and marks nothing but boxes: `<loc0001>` becomes `<\loc0001>`.

    As `escape_label`, and the tags of every other family, four numbers in square brackets, and blanks or separators at
    either end, which a parser could not tell from those around the label: `cup;` becomes `cup\u003b`. An ordinary label
    comes back unchanged; an empty one becomes a single backslash. `unguard_label` undoes it.
    """
    guarded = _LIST.sub(lambda match: "\\" + match[0], escape_label(label))
    guarded = GUARDED.sub(r"<\\", guarded)
    return _EDGE.sub(lambda match: f"\\u{ord(match[0]):04x}", guarded) or "\\"


def unguard_label(text: str) -> str:
    """Undo `guard_label`; a backslash that it cannot have written stays."""
    if text == "\\":
        return ""
    return _GUARD.sub(lambda match: chr(int(match[1], 16)) if match[1] else match[2] or "", text)

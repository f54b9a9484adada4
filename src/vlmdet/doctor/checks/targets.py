"""Which modules a target pattern matches, as PEFT reads it, in which area they lie, and weights counted by area.

When: for checks of adapters and freeze policies. PEFT reads a single text as one regular expression that must fit the
whole name, and each entry of a list as the end of a name, never as an expression (peft#2964).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

AREAS = ("vision", "merger", "deepstack", "language", "embeddings", "head")
_PATTERNS = {
    "deepstack": r"deepstack_merger_list\.",
    "merger": r"(^|\.)merger(\.|$)|projector|connector(\.|$)|(^|\.)mlp1\.|image_projection|aligner|modality_projection",
    "vision": r"visual|vision|vit\.|image_encoder|image_tower|siglip",
    "embeddings": r"embed_tokens|(^|\.)shared(\.|$)|wte(\.|$)|word_embeddings",
    "head": r"lm_head|output_layer",
}
_WRAPPED = re.compile(
    r"base_model\.model\.|_orig_mod\.|^module\.|\.(base_layer|original_module|modules_to_save(\.[^.]+)?)(?=\.|$)"
)
_ADAPTER = re.compile(r"\.(lora_\w+?|ia3_\w+)(\.\w+)*$")
_EXPRESSION = re.compile(r"[\\^$*+?|()\[\]{}]")
_AREA_WORD = re.compile(r"vis|merger|project|connector|language|tower|text|decoder|encoder", re.IGNORECASE)


def area_of(name: str) -> str:
    """Return the area of a module or parameter by its name, of any family."""
    return next((area for area, pattern in _PATTERNS.items() if re.search(pattern, name)), "language")


def plain_name(name: str) -> str:
    """Return the name that a module or parameter has without wrappers of PEFT, compilers and data parallelism."""
    return _WRAPPED.sub("", name)


def layer_of(name: str) -> str:
    """Return the plain name of the layer that an adapter's parameter sits on."""
    return _ADAPTER.sub("", plain_name(name))


@dataclass(frozen=True)
class Matched:
    """What one entry of the targets matches.

    Attributes:
        entry: as the user wrote it, or one of its alternatives.
        names: of the modules.
        counts: area to number of modules.
        listed: whether it stood in a list.
    """

    entry: str
    names: tuple[str, ...]
    listed: bool
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def expression(self) -> bool:
        """Is it written as a regular expression?"""
        return bool(_EXPRESSION.search(self.entry))

    @property
    def line(self) -> str:
        """Say it in one line of a table."""
        told = ", ".join(f"{area} {self.counts[area]}" for area in AREAS if self.counts.get(area))
        return f"{self.entry!r}: {told or 'no module'}"


def matches(targets: Any, names: Sequence[str]) -> list[Matched]:
    """Match each entry of `target_modules` against module names, as PEFT does.

    Input: text (one expression, or `all-linear`, which gives []), list or set.
    """
    if isinstance(targets, str):
        return [] if targets == "all-linear" else [_matched(targets, _full(targets, names), False)]
    return [
        _matched(one, [name for name in names if name == one or name.endswith(f".{one}")], True)
        for one in _ordered(targets)
    ]


def _ordered(targets: Iterable[Any]) -> list[str]:
    found = [str(one) for one in targets]
    return sorted(found) if isinstance(targets, (set, frozenset)) else found


def _matched(entry: str, names: Sequence[str], listed: bool) -> Matched:
    return Matched(entry, tuple(names), listed, Counter(map(area_of, names)))


def _full(pattern: str, names: Sequence[str]) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error:
        return []
    return [name for name in names if compiled.fullmatch(name)]


def deeper(names: Iterable[str], depth: int = 96) -> dict[str, str]:
    """Return names as a deeper model would have them, each with the name of this (small) model that it stands for.

    `layers.0.q_proj` stands for `layers.1.q_proj` to `layers.95.q_proj` too: patterns may name blocks that a small model has not.
    """
    names = list(names)
    found = {name: name for name in names}
    for name in names:
        match = re.search(r"(?<=\.)0(?=\.)", name)
        if match:
            for i in range(1, depth):
                found.setdefault(f"{name[: match.start()]}{i}{name[match.end() :]}", name)
    return found


def dead_alternatives(pattern: str, names: Sequence[str]) -> list[str]:
    """Return alternatives of one expression that add nothing: of the whole, and those of a group that name an area.

    `.*(vision_tower|language_model).*q_proj` on a model that says `visual` gives `vision_tower`.
    """
    whole = split_alternatives(pattern)
    if len(whole) > 1:
        return [one for one in whole if not _full(one, names)]
    dead = []
    for start, end in _groups(pattern):
        head = re.match(r"\?(:|P<\w+>)", pattern[start + 1 : end])
        inside = pattern[start + 1 + (head.end() if head else 0) : end]
        options = split_alternatives(inside)
        if len(options) < 2 or not any(_AREA_WORD.search(one) for one in options):
            continue
        dead += [one for one in options if not _full(f"{pattern[:start]}(?:{one}){pattern[end + 1 :]}", names)]
    return [one for one in dead if _AREA_WORD.search(one)]


def split_alternatives(pattern: str) -> list[str]:
    """Split an expression at the bars that stand in no group."""
    parts, depth, start, skip, bracket = [], 0, 0, False, False
    for i, sign in enumerate(pattern):
        if skip:
            skip = False
        elif sign == "\\":
            skip = True
        elif bracket:
            bracket = sign != "]"
        elif sign == "[":
            bracket = True
        elif sign in "()":
            depth += 1 if sign == "(" else -1
        elif sign == "|" and depth == 0:
            parts.append(pattern[start:i])
            start = i + 1
    return [*parts, pattern[start:]]


def _groups(pattern: str) -> list[tuple[int, int]]:
    opened, found, skip = [], [], False
    for i, sign in enumerate(pattern):
        if skip:
            skip = False
        elif sign == "\\":
            skip = True
        elif sign == "(":
            opened.append(i)
        elif sign == ")" and opened:
            found.append((opened.pop(), i))
    return sorted(found)


def table(named: Iterable[tuple[str, int, bool]]) -> dict[str, tuple[int, int]]:
    """Count parameters by area.

    Input: (name, number of parameters, whether they train). Output: area to (trainable, all), areas without any left out.
    """
    found: dict[str, tuple[int, int]] = {}
    for name, number, trains in named:
        area = area_of(plain_name(name))
        trainable, total = found.get(area, (0, 0))
        found[area] = (trainable + (number if trains else 0), total + number)
    return {area: found[area] for area in AREAS if area in found}


def told(counts: Mapping[str, tuple[int, int]]) -> str:
    """Say a table in one line: `vision 12,288 of 1,200,000 trainable, language 0 of …`."""
    return "; ".join(
        f"{area} {trainable:,} of {total:,} parameters trainable" for area, (trainable, total) in counts.items()
    )


def near(entry: str, names: Sequence[str], most: int = 3) -> list[str]:
    """Return kinds of module names that share most words with an entry that matches nothing."""
    words = set(re.findall(r"[a-z]+[a-z0-9_]*", re.sub(r"\\.", " ", entry.lower())))
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\.\d+(?=\.)", ".N", name), name)

    def shared(kind: str) -> int:
        parts = set(kind.lower().split("."))
        inner = set(re.split(r"[._]", kind.lower()))
        return 3 * len(words & parts) + len({piece for word in words for piece in word.split("_")} & inner)

    order = sorted(kinds, key=lambda kind: -shared(kind))
    return [kind for kind in order[:most] if shared(kind)]

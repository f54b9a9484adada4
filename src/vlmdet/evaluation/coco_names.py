"""Which picture and which class of a truth file a result means: by id, by name, or by place in the list.

When: AFTER, while result files of other tools are read; no torch. COCO's format says that `image_id` and `category_id` are
the ids of the truth file. Tools write more than that: the name of the file or its stem (Ultralytics), the name of the class,
or its place in the list counted from 0 or 1. All results of a file are read in one way: the first in which every one of them
finds its place. What was assumed is told, and what two ways read differently is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from vlmdet.errors import DataError

IMAGE_WAYS = ("id", "name", "stem", "number")
CATEGORY_WAYS = ("id", "name", "from-0", "from-1")

Way = Mapping[Any, int]
"""From what a result says to the place of a picture or class in the truth file."""


@dataclass(frozen=True)
class Resolved:
    """Places (n) in the truth file, None where there is none; the way in which they were read; what to tell the user."""

    places: list[int | None]
    way: str
    notes: tuple[str, ...]


def plain_id(value: Any) -> Any:
    """Return one form of an id: 7, 7.0, "7" and "007" are 7; another text is itself; anything else None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, str):
        text = value.strip()
        digits = text.removeprefix("-")
        return int(text) if digits.isascii() and digits.isdigit() and len(digits) <= 40 else text
    return None


def image_ways(ids: Sequence[Any], names: Sequence[str]) -> dict[str, Way]:
    """Return the ways to name a picture: its id, its file, the file's stem, the number that the stem is."""
    paths = [PurePosixPath(name.replace("\\", "/")) for name in names]
    stems = [path.stem for path in paths]
    return {
        "id": _unique(ids),
        "name": {**_unique([path.name for path in paths]), **_unique(names)},
        "stem": _unique(stems),
        "number": _unique([int(stem) if stem.isascii() and stem.isdigit() else None for stem in stems]),
    }


def category_ways(ids: Sequence[Any], names: Sequence[str]) -> dict[str, Way]:
    """Return the ways to name a class: its id, its name, its place in the order of ids counted from 0 or from 1."""
    order = sorted(range(len(ids)), key=lambda place: (isinstance(ids[place], str), ids[place]))
    return {
        "id": _unique(ids),
        "name": {**_unique([name.strip().casefold() for name in names]), **_unique(names)},
        "from-0": dict(enumerate(order)),
        "from-1": dict(enumerate(order, start=1)),
    }


def resolve(
    what: str,
    values: Sequence[Any],
    names: Sequence[Any],
    ways: Mapping[str, Way],
    *,
    chosen: str | None,
    flag: str,
    own_table: bool = False,
) -> Resolved:
    """Find the picture or class that each result means.

    When: once per result file, for its pictures and once for its classes.

    Input: `what`, "image" or "category", for messages; n ids and n names as written, None where there is none; `ways` of
    `image_ways` or `category_ways`; `chosen`, the way that the user named with `flag`; `own_table`, the names stand in a table
    of the file, whose ids its results have: where ids and names mean different things, the names are meant.
    Output: `Resolved`. Where no way suits every result, that which suits most; the others have no place.

    Raises:
        DataError: two ways suit every result and mean different things.
    """
    found = {way: _look_up(way, values, names, table) for way, table in ways.items() if chosen in (None, way)}
    fits = [way for way, places in found.items() if places and None not in places]
    if not fits:
        best = max(found, key=lambda way: sum(place is not None for place in found[way]))
        return Resolved(found[best], best, ())
    way = fits[0]
    others = [other for other in fits[1:] if found[other] != found[way]]
    written_id = any(value is not None for value in values)
    counted = {"from-0", "from-1"}
    # an id that is in the truth file is that id by the format, whatever place it would be; a name beside it must agree
    clash = [other for other in others if way in counted or (other == "name" and written_id)]
    if own_table and "name" in clash:
        way, clash = "name", []
    if clash and chosen is None:
        at = next(i for i, (a, b) in enumerate(zip(found[way], found[clash[0]], strict=True)) if a != b)
        raise DataError(
            f"the {what} of a result reads as '{way}' and as '{clash[0]}', and means different ones: "
            f"{_show(values[at])}, {_show(names[at])}",
            f"say which with {flag} {way} or {flag} {clash[0]}",
        )
    notes = []
    if way != "id" and way != fits[0]:
        notes.append(f"{what}: read by name, since the file has a table of its own, with other ids ({flag} {way})")
    elif way != "id":
        notes.append(f"{what}: read by {_WORDS[way]}, since that finds every result ({flag} {way})")
    elif "number" in others:
        notes.append(
            f"{what}: read by id, as the format says; the numbers of the files' names differ ({flag} number reads those)"
        )
    return Resolved(found[way], way, tuple(notes))


_WORDS = {
    "id": "id",
    "name": "name",
    "stem": "the file's name without its ending",
    "number": "the number that the file's name is",
    "from-0": "place in the order of ids, counted from 0",
    "from-1": "place in the order of ids, counted from 1",
}


def _look_up(way: str, values: Sequence[Any], names: Sequence[Any], table: Way) -> list[int | None]:
    """Find the place of each result in one way; a name counts for the ways of names, else what stands in the id."""
    known: dict[Any, int | None] = {}
    places = []
    for value, name in zip(values, names, strict=True):
        key = (type(value), value, name) if isinstance(value, str | int | float | None) else None
        if key is None or key not in known:
            place = next((table[form] for form in _forms(way, value, name) if form in table), None)
            if key is not None:
                known[key] = place
            places.append(place)
        else:
            places.append(known[key])
    return places


def _forms(way: str, value: Any, name: Any) -> Iterator[Any]:
    if way in ("name", "stem"):
        for text in (name, value):
            if isinstance(text, str):
                path = PurePosixPath(text.replace("\\", "/"))
                if way == "stem":
                    yield from (text, path.stem)
                else:
                    yield from (text, text.strip().casefold(), path.name)
                return
    elif (plain := plain_id(value)) is not None:
        yield plain


def _unique(keys: Sequence[Any]) -> dict[Any, int]:
    """Map each key that stands once to its place: what two share names neither."""
    table: dict[Any, int] = {}
    twice = set()
    for place, key in enumerate(keys):
        if key in table:
            twice.add(key)
        table[key] = place
    return {key: place for key, place in table.items() if key not in twice and key is not None}


def _show(value: Any) -> str:
    return str(value)[:60]

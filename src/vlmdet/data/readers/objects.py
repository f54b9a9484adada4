"""The objects of one row, in the spellings that data sets use for them.

When: ONCE, by the readers of Parquet and JSON lines. All of these say the same:

    {"bbox": [[4, 5, 20, 10]], "category": [1]}            lists of one length (what Arrow makes of the next)
    [{"bbox": [4, 5, 20, 10], "category_name": "dog"}]     a list of objects
    {"boxes": [[4, 5, 20, 10]], "labels": ["dog"]}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

BOX = ("bbox", "bboxes", "boxes", "box")
"""Fields that hold boxes."""

CLASS = (
    "category_name", "category_names", "category", "categories", "label", "labels", "label_name", "class_name",
    "class_names", "class", "classes", "name", "names", "ref",
    "category_id", "category_ids", "label_id", "label_ids", "class_id", "class_ids",
)  # fmt: skip
"""Fields that hold the class, by name or by number; names win over numbers, earlier ones over later ones."""


class Thing(NamedTuple):
    """One object as written: its box, and the number or the name of its class."""

    box: Any
    number: int | None
    name: str


def box_field(fields: Any) -> str | None:
    """Return the field that holds boxes, or None."""
    return next((field for field in BOX if field in fields), None)


def read_objects(objects: Any) -> list[Thing] | None:
    """Return every object of a row; None where that is no such list, or its lists differ in length."""
    if isinstance(objects, Mapping):
        field = box_field(objects)
        boxes = objects.get(field) if field else None
        if boxes is None or not _is_list(boxes):
            return None
        said = [objects[key] for key in CLASS if _is_list(objects.get(key))]
        if any(len(values) != len(boxes) for values in said):
            return None
        return [Thing(box, *_class_of(values)) for box, *values in zip(boxes, *said, strict=True)]
    if not _is_list(objects) or not all(isinstance(thing, Mapping) for thing in objects):
        return None
    found = []
    for thing in objects:
        field = box_field(thing)
        classes = [thing[key] for key in CLASS if key in thing]
        found.append(Thing(thing[field] if field else None, *_class_of(classes)))
    return found


def _class_of(said: Sequence[Any]) -> tuple[int | None, str]:
    """Return the first number and the first name among what an object says of its class."""
    number, name = None, ""
    for value in said:
        if isinstance(value, str):
            if not name and value.strip():
                name = value
        elif number is None and isinstance(value, int) and not isinstance(value, bool):
            number = value
    return number, name


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)

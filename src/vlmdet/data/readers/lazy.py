"""Samples that are built when they are asked for, from columns.

When: EVERY ACCESS to a split of a data set that a reader opened. A hundred thousand rows with seven boxes each take 60 MB
as columns, and several hundred as objects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from vlmdet.boxes import Boxes, BoxFormat
from vlmdet.data.readers.frames import frame_of, read_head
from vlmdet.errors import ImageError
from vlmdet.records import Sample

Picture = Path | Callable[[], bytes]


@dataclass(frozen=True, eq=False)
class Columns:
    """The rows of a data set, n rows and m boxes.

    Attributes:
        ids: n ids.
        picture: row number -> where the picture is.
        sizes: (n, 2) int64, width and height that the row states; 0, 0 where it states none.
        offsets: (n + 1,) int64; the boxes of row i are those from offsets[i] to offsets[i + 1].
        xyxy: (m, 4) float64, fractions.
        label_numbers: (m,) int64, into `names`.
        names: class names.
        groups: row number -> group.
        source: row number -> `file:row`.
        meta: row number -> what else the row said; a new dictionary each time. Its `crowd` lists regions as they are
            written, in `box_format`: `[{"label": "cup", "bbox": [0, 0, 40, 10]}]`.
        box_format: how boxes are written in the files.
        exif: what the user said about turned pictures.
        reads_heads: look at every picture's head at access, also where a size is stated.
    """

    ids: Sequence[str]
    picture: Callable[[int], Picture]
    sizes: np.ndarray
    offsets: np.ndarray
    xyxy: np.ndarray
    label_numbers: np.ndarray
    names: Sequence[str]
    groups: Callable[[int], str]
    source: Callable[[int], str]
    meta: Callable[[int], dict[str, Any]]
    box_format: BoxFormat
    exif: str | None
    reads_heads: bool


class LazySamples(Sequence[Sample]):
    """One split: a sequence of samples, each built at access.

    A row that states no size gets that of its picture's head, and 0 x 0 where there is none to read: opening the
    picture then says why.
    """

    def __init__(self, columns: Columns, numbers: np.ndarray, split: str) -> None:
        self._columns = columns
        self._numbers = numbers
        self._split = split

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> LazySamples: ...
    def __getitem__(self, index: int | slice) -> Sample | LazySamples:
        if isinstance(index, slice):
            return LazySamples(self._columns, self._numbers[index], self._split)
        return self._build(int(self._numbers[index]))

    def __iter__(self) -> Iterator[Sample]:
        for number in self._numbers.tolist():
            yield self._build(number)

    def _build(self, number: int) -> Sample:
        columns = self._columns
        start, end = columns.offsets[number], columns.offsets[number + 1]
        boxes = Boxes(columns.xyxy[start:end])
        labels = tuple(columns.names[label] for label in columns.label_numbers[start:end].tolist())
        width, height = columns.sizes[number].tolist()
        picture = columns.picture(number)
        source = columns.source(number)
        known, turn, frame_size = True, 1, (width, height)
        if columns.reads_heads or width <= 0:
            try:
                head = read_head(picture, source)
            except ImageError:  # opening it says so again, and the pre-pass writes it down
                pass
            else:
                frame = frame_of((width, height), *head, columns.exif)
                turn, known = frame.turn, frame.known
                boxes = boxes.turned(turn) if turn != 1 else boxes
                if width <= 0:
                    frame_size = frame.upright[::-1] if turn >= 5 else frame.upright
                width, height = frame.upright
        meta = columns.meta(number)
        crowd, crowd_labels = _crowd(meta.get("crowd", ()), columns.box_format, frame_size, turn)
        return Sample(
            id=columns.ids[number],
            picture=picture,
            width=width,
            height=height,
            boxes=boxes,
            labels=labels,
            split=self._split,
            group=columns.groups(number),
            source=source,
            meta=meta,
            turn_unknown=not known,
            crowd=crowd,
            crowd_labels=crowd_labels,
        )


def _crowd(
    regions: Sequence[Mapping[str, Any]], box_format: BoxFormat, size: tuple[int, int], turn: int
) -> tuple[Boxes, tuple[str, ...]]:
    """Return the regions of crowds on the upright picture, cut to it; one without an area covers nothing, and is left out."""
    if not regions or min(size) <= 0:
        return Boxes.empty(), ()
    boxes = Boxes.from_array([region["bbox"] for region in regions], box_format, *size).turned(turn).clip()
    kept = [i for i, area in enumerate(boxes.area()) if area > 0]
    return boxes[kept], tuple(regions[i]["label"] for i in kept)

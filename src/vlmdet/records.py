"""`Sample` and `DetectionDataset`: the one in-memory row of the tool.

When: ALWAYS. Readers make them, everything else takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from vlmdet.boxes import Boxes, BoxFormat
from vlmdet.images import open_image


@dataclass(frozen=True)
class Problem:
    """One row that has trouble, as a line of `problems.jsonl`.

    Attributes:
        file: the file that holds the row.
        row: line, row number or object number in it; None where the whole file is meant.
        id: the sample's id, "" where it is not known yet.
        kind: one word, e.g. `degenerate_box`, `unknown_category`, `unreadable_image`.
        detail: what was found, one line.
        action: what was done: `row_dropped`, `box_dropped`, `box_clipped`, `kept`.
    """

    file: str
    row: int | None
    id: str
    kind: str
    detail: str
    action: str

    def as_dict(self) -> dict[str, Any]:
        """Return the line's fields."""
        return asdict(self)


@dataclass(frozen=True)
class Sample:
    """One picture and its boxes.

    Attributes:
        id: unique within the data set.
        picture: the file, or a function that returns the bytes of one; opened only by `image`.
        width: of the upright picture, in pixels.
        height: of the upright picture, in pixels.
        boxes: n boxes on the upright picture.
        labels: n names.
        split: `train`, `val`, `test`, …
        group: rows of one product or scene share it; "" where unknown.
        source: `file:row`, for messages.
        meta: what else the row said.
        turn_unknown: its EXIF tag turns the picture, and nothing tells whether the boxes were drawn before or after;
            they are taken as upright, and the pre-pass drops the row.
        crowd: m regions of many objects at once (COCO's `iscrowd`) on the upright picture: nothing to learn, and what is
            predicted on them is no mistake.
        crowd_labels: m names.
    """

    id: str
    picture: Path | Callable[[], bytes]
    width: int
    height: int
    boxes: Boxes
    labels: tuple[str, ...]
    split: str = "train"
    group: str = ""
    source: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    turn_unknown: bool = False
    crowd: Boxes = field(default_factory=Boxes.empty)
    crowd_labels: tuple[str, ...] = ()

    @property
    def image(self) -> Image.Image:
        """Open the picture: upright RGB.

        Raises:
            ImageError: it is missing, broken or refused.
        """
        source = self.picture if isinstance(self.picture, Path) else self.picture()
        return open_image(source, name=self.source or self.id)


@dataclass(frozen=True)
class DetectionDataset:
    """Named splits of samples.

    Attributes:
        source: what the user named.
        splits: samples by split; from a reader, built at access from compact columns, so that 100,000 rows fit.
        labels: class names, in the order of the source.
        box_format: order and unit that were read.
        decided_by: why that format: `defined by Pascal VOC`.
        problems: rows and boxes with trouble.
        notes: what was chosen on the way, one line each: rows left out by a limit, a validation split made from train.
    """

    source: str
    splits: dict[str, Sequence[Sample]]
    labels: tuple[str, ...]
    box_format: BoxFormat
    decided_by: str
    problems: list[Problem] = field(default_factory=list)
    notes: tuple[str, ...] = ()

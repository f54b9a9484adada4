"""Does a user's parser read his own training targets back: all boxes, in one space, in the declared order?

When: WHEN WRONG; numpy only. A target that was written from known boxes is decoded as his evaluation does and parsed; what
comes back is compared with the boxes in every order and space that is known. `checks/evaluation.py` makes findings of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmdet.doctor.calls import NotAvailable, UserCodeError, as_boxes, call_parse
from vlmdet.doctor.gather.text_boxes import Space, read_space


@dataclass(frozen=True)
class Target:
    """One training answer, and what it was written from.

    Attributes:
        row: its name, for messages.
        text: the answer as it is read by the parser.
        width, height: of the upright picture in pixels.
        resized: (width, height) that the model sees, None where that is unknown.
        boxes: (n, 4) xyxy fractions.
    """

    row: str
    text: str
    width: int
    height: int
    resized: tuple[int, int] | None
    boxes: np.ndarray


@dataclass(frozen=True)
class ReadBack:
    """What a parser made of targets.

    Attributes:
        space: the reading under which the boxes lie on the truth, with its mean IoU; None where no box came back.
        per_row: (found, wanted) of each target.
        failure: what the parser raised first, with its place; "" where it never did.
        worst: the target of which the most boxes are missing, and what the parser gave for it.
        targets, parsed: what was written, and the boxes (n, 4) that came back, as they came.
    """

    space: Space | None
    per_row: tuple[tuple[int, int], ...]
    failure: str
    worst: tuple[Target, str]
    targets: tuple[Target, ...]
    parsed: tuple[np.ndarray, ...]

    @property
    def found(self) -> int:
        """Boxes that came back."""
        return sum(found for found, _ in self.per_row)

    @property
    def wanted(self) -> int:
        """Boxes that were written."""
        return sum(wanted for _, wanted in self.per_row)

    @property
    def iou(self) -> float:
        """Mean IoU of the best reading; 0 where no box came back."""
        return self.space.iou if self.space is not None else 0.0


def read_back(parse: Callable[..., Any], targets: Sequence[Target]) -> ReadBack:
    """Parse targets and compare the boxes with those that they were written from.

    Input: the user's parser; at least one target, each with at least one box.
    """
    parsed: list[np.ndarray] = []
    failure, worst, most = "", (targets[0], ""), -1
    for target in targets:
        try:
            boxes = [box for _, box in as_boxes(call_parse(parse, target.text, target.width, target.height))]
        except UserCodeError as error:
            failure, boxes = failure or f"{error.text} at {error.where}", []
        except NotAvailable as error:
            failure, boxes = failure or str(error), []
        parsed.append(np.asarray(boxes, dtype=np.float64).reshape(-1, 4))
        if len(target.boxes) - len(boxes) > most:
            most, worst = len(target.boxes) - len(boxes), (target, str(boxes))
    space = read_space(
        parsed,
        [target.boxes for target in targets],
        [(target.width, target.height) for target in targets],
        [target.resized for target in targets],
    )
    per_row = tuple((len(boxes), len(target.boxes)) for boxes, target in zip(parsed, targets, strict=True))
    return ReadBack(space, per_row, failure, worst, tuple(targets), tuple(parsed))

"""In which format undeclared boxes most likely are: valid first, then on the objects of the pictures.

When: where the user declares no format. numpy and Pillow only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vlmdet.boxes import FORMATS, Boxes, BoxFormat
from vlmdet.doctor.calls import NotAvailable
from vlmdet.doctor.gather.annotations import Annotation, open_stored
from vlmdet.doctor.gather.contrast import compare_readings, thumbnail
from vlmdet.doctor.sampling import every
from vlmdet.images import BROKEN, to_upright_rgb

if TYPE_CHECKING:
    from vlmdet.doctor.evidence import Evidence

LOOKED_AT = 60
"""Pictures that are opened to compare readings."""


@dataclass(frozen=True)
class Shown:
    """An opened row: small pixels, a small picture, its annotation."""

    annotation: Annotation
    pixels: np.ndarray
    image: Image.Image


def open_some(evidence: Evidence) -> list[Shown]:
    """Open some rows with boxes, upright and small; rows that cannot be opened or are turned by EXIF are left out."""
    usable = [
        one
        for one in evidence.annotations()
        if one.boxes is not None
        and len(one.boxes)
        and one.picture
        and not one.picture.error
        and one.picture.orientation == 1
    ]
    shown = []
    for one in every(usable, LOOKED_AT):
        try:
            image = to_upright_rgb(open_stored(evidence.splits()[one.split].raw(one.row)[one.keys["picture"]]))
        except (*BROKEN, Image.DecompressionBombError):
            continue
        small = image.copy()
        small.thumbnail((480, 480))
        shown.append(Shown(one, thumbnail(image), small))
    return shown


def read_as(one: Annotation, box_format: BoxFormat) -> np.ndarray:
    """Return a row's boxes, (n, 4) fractions, read in a format."""
    return Boxes.from_array(np.nan_to_num(np.asarray(one.boxes)), box_format, *(one.size or (1, 1))).xyxy


def invalid_share(annotations: Sequence[Annotation], box_format: BoxFormat) -> float:
    """Return the share of boxes that are empty, reversed or over 2 % outside when read in a format."""
    bad = total = 0
    for one in annotations:
        if one.boxes is None or not len(one.boxes) or one.size is None:
            continue
        xyxy = read_as(one, box_format)
        fine = (xyxy > -0.02).all(1) & (xyxy < 1.02).all(1) & (xyxy[:, 2:] > xyxy[:, :2]).all(1)
        bad, total = bad + int((~fine).sum()), total + len(xyxy)
    return bad / total if total else 0.0


def better(ours: float, theirs: float, wins: float, number: int) -> bool:
    """Is the second of two readings surely the one that lies on the objects? Arguments as `compare_readings` returns them."""
    return number >= 6 and theirs > 1.35 * ours + 2 and wins >= 0.72 and (wins - 0.5) * number**0.5 > 0.8


def likely_format(evidence: Evidence) -> tuple[BoxFormat, bool]:
    """Return the likely format, and whether the pictures decided between orders; see `Evidence.likely`."""
    known = [one for one in evidence.annotations() if one.boxes is not None and len(one.boxes) and one.size]
    if not known:
        raise NotAvailable("boxes in the rows")
    highest = max(float(np.nan_to_num(one.boxes).max()) for one in known if one.boxes is not None)
    units = ("fraction",) if highest <= 1.5 else ("pixel", "per_mille")
    shares = {one: invalid_share(known, one) for one in FORMATS if one.unit in units}
    least = min(shares.values())
    candidates = [one for one in shares if shares[one] <= least + 0.02]
    candidates.sort(key=lambda one: (units.index(one.unit), FORMATS.index(one)))
    best = candidates[0]
    shown = evidence.shown()
    pixels = [one.pixels for one in shown]
    decided = len(candidates) == 1
    for other in candidates[1:]:
        ours, theirs = ([read_as(one.annotation, form) for one in shown] for form in (best, other))
        compared = compare_readings(pixels, ours, theirs)
        back = (compared[1], compared[0], 1 - compared[2], compared[3])
        if better(*compared):
            best, decided = other, True
        elif other.unit == best.unit and {other.order, best.order} == {"xyxy", "yxyx"}:
            decided = decided or better(*back)
    return best, decided

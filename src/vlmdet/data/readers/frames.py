"""Which way up a picture's boxes are: its EXIF turn against the size that the row states.

When: EVERY ACCESS to a row whose size must come from the picture, and by readers that need sizes at once.

A picture that a phone stored sideways has two sizes. A row that states the stored one has its boxes on the stored
picture, a row that states the upright one on the upright picture. Where both are the same (a square, a turn by 180
degrees) or nothing is stated, the row does not tell, and the user has to: `--exif applied` (the tool that drew the boxes
showed pictures upright) or `--exif ignored` (it showed them as stored).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image, TiffImagePlugin

from vlmdet.errors import ImageError
from vlmdet.images import BROKEN, orientation

EXIF = ("applied", "ignored")


class Frame(NamedTuple):
    """`turn` moves the boxes onto the upright picture of size `upright`; `known` is False where that is open."""

    turn: int
    upright: tuple[int, int]
    known: bool


def read_head(picture: Path | Callable[[], bytes], name: str = "") -> tuple[tuple[int, int], int]:
    """Read size and EXIF orientation from a picture file's first bytes; no pixel is decoded.

    Output: width and height as stored, and tag 274, from 1 to 8.

    Raises:
        ImageError: it is missing or no picture.
    """
    where = name or str(picture)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(picture if isinstance(picture, Path) else io.BytesIO(picture())) as image:
                tag = orientation(image)
                # Pillow turns a TIFF itself: its size is already the upright one
                turned = isinstance(image, TiffImagePlugin.TiffImageFile) and tag >= 5
                return ((image.height, image.width) if turned else image.size), tag
    except FileNotFoundError as error:
        raise ImageError(f"{where}: no such file") from error
    except (*BROKEN, Image.DecompressionBombError) as error:
        raise ImageError(f"{where}: not a picture that can be read") from error


def frame_of(stated: tuple[int, int], stored: tuple[int, int], tag: int, exif: str | None) -> Frame:
    """Decide which way up the boxes of a row are.

    Input: `stated` size of the row, (0, 0) for none; `stored` size and `tag` of the picture; `exif`, what the user said.
    Output: a `Frame`. A stated size that is neither of the two is kept as the upright one, for the pre-pass to report.
    """
    upright = (stored[1], stored[0]) if tag >= 5 else stored
    is_stated = stated[0] > 0 and stated[1] > 0
    if is_stated and stated not in (stored, upright):
        return Frame(1, stated, True)
    if tag == 1:
        return Frame(1, upright, True)
    if is_stated and stored != upright:
        return Frame(tag if stated == stored else 1, upright, True)
    return Frame(tag if exif == "ignored" else 1, upright, exif in EXIF)

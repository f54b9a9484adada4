"""Open a picture the one way: upright, RGB, whole, and not larger than a limit.

When: ALWAYS; Pillow and numpy only. A picture from a phone carries its turn as EXIF tag 274; every step of this tool
sees the picture as a viewer shows it.
"""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from vlmdet.errors import BrokenImageError, ImageError, RefusedImageError

MAX_IMAGE_PIXELS = 178_956_970
"""Above this many pixels a file is refused as a decompression bomb (twice Pillow's warning limit)."""

_EXIF_ORIENTATION = 274
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURN_HOLDERS = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
BROKEN = (OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError, OverflowError, struct.error)
"""What Pillow's decoders and its EXIF reader raise on a broken file."""


def open_image(source: Path | bytes, *, name: str = "") -> Image.Image:
    """Open a picture file upright and in RGB.

    When: whenever pixels are needed; nothing is kept open.

    Input: a path, or the bytes of a picture file; `name` for messages.
    Output: an RGB image in memory. Transparency is laid on white, 16-bit grey is scaled to 8 bits, CMYK and palettes
    are converted.

    Raises:
        ImageError: missing, empty, truncated, not a picture, or over `MAX_IMAGE_PIXELS`.
    """
    where = name or (str(source) if isinstance(source, Path) else "a picture in memory")
    with decode(source, where) as image:
        return to_upright_rgb(image)


def decode(source: Path | bytes, name: str) -> Image.Image:
    """Open and decode a picture as stored: neither turned nor converted.

    Raises:
        ImageError: as `open_image`.
    """
    image = open_file(source, name)
    load(image, name)
    return image


def open_file(source: Path | bytes, name: str) -> Image.Image:
    """Read a picture file and its header: size, mode and format are known, no pixel is decoded.

    Raises:
        ImageError: missing, empty or not a picture; `RefusedImageError`: over `MAX_IMAGE_PIXELS`.
    """
    try:
        data = source.read_bytes() if isinstance(source, Path) else source
    except FileNotFoundError as error:
        raise ImageError(f"{name}: no such file") from error
    except OSError as error:
        raise ImageError(f"{name}: cannot be read ({error.strerror})") from error
    if not data:
        raise ImageError(f"{name}: the file is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: not a picture in any format that Pillow reads") from error
    except Image.DecompressionBombError as error:
        raise _refused(f"{name}: over the limit") from error
    except BROKEN as error:
        raise _broken(name, error) from error
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise _refused(f"{name}: {image.width} x {image.height} pixels, over the limit")
    return image


def load(image: Image.Image, name: str) -> None:
    """Decode the pixels of an image of `open_file`, all of them.

    Raises:
        BrokenImageError: the file ends early or its pixels cannot be decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image.load()
    except Image.DecompressionBombError as error:  # a part of the file that is larger than its header says
        raise _refused(f"{name}: over the limit") from error
    except BROKEN as error:
        raise _broken(name, error) from error


def _refused(what: str) -> RefusedImageError:
    return RefusedImageError(f"{what} of {MAX_IMAGE_PIXELS:,} pixels", "scale the picture down")


def _broken(name: str, error: Exception) -> BrokenImageError:
    return BrokenImageError(f"{name}: broken or truncated ({error})", "restore the file or leave the row out")


def orientation(image: Image.Image) -> int:
    """Return EXIF tag 274 of an image, 1 to 8; 1 where it is absent or odd."""
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except BROKEN:  # viewers show such a picture as stored
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def to_upright_rgb(image: Image.Image) -> Image.Image:
    """Turn an opened image as its EXIF tag says and convert it to RGB; an upright RGB image comes back as it is."""
    turn = _TURNS.get(orientation(image))
    if turn is not None:
        # not by ImageOps.exif_transpose: it writes the EXIF block anew, and fails where another tag of it is broken
        image = image.transpose(turn)
        image.info = {key: value for key, value in image.info.items() if key not in _TURN_HOLDERS}
    if image.mode == "RGB":
        return image
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        grey = np.asarray(image, dtype=np.float64) / 257.0
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        paper = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(paper, layer).convert("RGB")
    return image.convert("RGB")

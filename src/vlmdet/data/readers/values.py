"""Single values as files write them: paths, names of splits, sizes, four numbers, text.

When: ONCE, by the readers of this folder.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from vlmdet.errors import DataError

SPLIT_NAMES = {"validation": "val", "valid": "val", "dev": "val", "training": "train", "testing": "test"}
"""Names of splits that mean another one."""


def safe_path(folder: Path, name: str, root: Path) -> Path | None:
    """Return `folder / name` where it stays below `root`; None where it does not, or can be no path at all.

    The test is made on the names, not on where links lead: links to a store are common among data sets and are the
    user's own, while `../../etc/passwd` and `/etc/passwd` come from the file. An absolute path below `root` is one too.
    """
    name = name.replace("\\", "/")
    if not name or any(ord(letter) < 32 for letter in name) or ":" in name[:2]:
        return None
    if any(len(part.encode(errors="replace")) > 255 for part in name.split("/")) or len(name) > 2000:
        return None  # longer than a file system allows
    base = os.path.abspath(root)
    path = os.path.abspath(os.path.join(os.path.abspath(folder), name))
    inside = path.startswith(base.rstrip("/") + "/")
    if PurePosixPath(name).is_absolute() and not inside:
        return None
    return Path(path) if inside and path != base else None


def split_name(text: str, default: str = "train") -> str:
    """Return the split that a file or folder is named after: `instances_val2017` is of `val`; else `default`."""
    for word in "".join(letter if letter.isalpha() else " " for letter in text.lower()).split():
        if word in ("train", "val", "test") or word in SPLIT_NAMES:
            return SPLIT_NAMES.get(word, word)
    return default


def read_text(path: Path, most: int = 64_000_000) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Raises:
        DataError: it cannot be read, is too large, or is not UTF-8.
    """
    try:
        if path.stat().st_size > most:
            raise DataError(f"{path} has over {most:,} bytes", "this is no file of that kind")
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is no text in UTF-8 ({error.reason} at byte {error.start})", "save it as UTF-8"
        ) from error


def side(value: Any) -> int:
    """Return a stated width or height in pixels; 0 where it is no positive whole number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return 0
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return 0
    return int(number) if math.isfinite(number) and 1 <= number < 2**31 and number == int(number) else 0


def four_numbers(value: Any) -> list[float] | None:
    """Return four finite floats, or None."""
    if isinstance(value, str | bytes | Mapping):
        return None
    try:
        numbers = [float(number) for number in value]
    except (TypeError, ValueError, OverflowError):
        return None
    return numbers if len(numbers) == 4 and all(map(math.isfinite, numbers)) else None

"""Write a file so that it is there whole or not at all.

When: ALWAYS; no torch. Contracts, marks, logs and caches go through here: whoever reads them may start while they are written,
and the process that writes may die.
"""

from __future__ import annotations

import secrets
from pathlib import Path


def write_whole(path: Path, data: bytes | str) -> None:
    """Write bytes, or text as UTF-8, beside a file's place and rename them into it.

    Several processes may write one file: the last one wins, and none sees half of another's.

    Raises:
        OSError: the disk is full, or the folder cannot be written to; nothing is left behind.
    """
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        fresh.write_bytes(data.encode() if isinstance(data, str) else data)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)

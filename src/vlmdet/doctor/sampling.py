"""Choose some rows, evenly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

_T = TypeVar("_T")


def every(rows: Sequence[_T], most: int) -> Iterator[_T]:
    """Yield at most so many rows, evenly chosen, in order."""
    if len(rows) <= most:
        yield from rows
    else:
        yield from (rows[int(i)] for i in np.unique(np.linspace(0, len(rows) - 1, most).astype(int)))

"""Every error that is the user's to mend.

    VlmdetError              what, where, why; `hint` says what to do next
    ├── DataError            a data set, a row or an annotation cannot be used
    │   └── ImageError       a picture cannot be opened
    │       ├── BrokenImageError    it opens, and cannot be decoded to its end
    │       └── RefusedImageError   it has more pixels than are opened
    ├── ConfigError          a setting, a flag or a combination of them cannot work
    ├── ContractError        two steps of a run assume different things
    ├── ModelError           a model or adapter cannot be loaded or used
    └── TrainingError        a run would not train what was meant

The command line prints one line of a `VlmdetError` and exits with 2. Anything else is a bug, and shows its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VlmdetError(Exception):
    """A mistake that the user can mend.

    Args:
        message: what is wrong, where, and why; one line.
        hint: what to do next; one line, may be empty.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.message}; {self.hint}" if self.hint else self.message
        return " ".join(text.split())


class DataError(VlmdetError):
    """A data set, a row or an annotation cannot be used."""


class ImageError(DataError):
    """A picture cannot be opened."""


class BrokenImageError(ImageError):
    """A picture opens, and cannot be decoded to its end: truncated, most of the time."""


class RefusedImageError(ImageError):
    """A picture has more pixels than are opened."""


class ConfigError(VlmdetError):
    """A setting, a flag or a combination of them cannot work."""


class ContractError(VlmdetError):
    """Two steps of a run assume different things."""


class ModelError(VlmdetError):
    """A model or adapter cannot be loaded or used."""


class TrainingError(VlmdetError):
    """A run would not train what was meant."""


class Stopped(Exception):  # noqa: N818  nothing went wrong
    """A run was told to stop by a signal, and has saved what it had.

    Args:
        message: where it stopped and how it goes on.
        signal: number of the signal; the exit code is 128 more, as shells have it.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return `did you mean 'x'?`, or the whole list where nothing is near; for hints."""
    options = list(choices)
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"there is: {', '.join(options) or 'nothing'}"

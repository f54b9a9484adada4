"""Find the picture that a row names: in a likely folder of the data set, and never outside it.

When: ONCE, by readers whose files name pictures. A name is looked for where the last one was, then in the other folders,
then, by its last part alone, anywhere below the root, where it must be the only one of that name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from vlmdet.data.readers.values import safe_path

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
"""File names, in lower case, that are taken for pictures."""

GIVE_UP = 200
"""After so many names without one picture the set is taken to have none: annotations can be read without."""

MOST_FILES = 500_000
"""So many files are looked through for a picture by its name alone, should the root be somebody's home."""

_PLAIN = re.compile(r"(?!/)(?!.*\.\.)[^\\:\x00-\x1f]{1,250}")


class Finder:
    """Finds pictures below `root`, in `folders` of it.

    Attributes:
        missing: names that were not found, in order.
        found: how many were.
    """

    def __init__(self, root: Path, folders: Iterable[Path]) -> None:
        self.root = root
        self.missing: list[str] = []
        self.found = 0
        self._folders = [os.path.abspath(folder) for folder in dict.fromkeys(folders) if folder.is_dir()] or [
            os.path.abspath(root)
        ]
        self._by_name: dict[str, list[str]] | None = None

    def find(self, name: str) -> str | None:
        """Return the path of a picture; None where the name leads out of the root.

        A name of no picture gives the path at which it was expected.
        """
        if _PLAIN.fullmatch(name):
            paths = [os.path.join(folder, name) for folder in self._folders]
        else:
            paths = [str(safe) for folder in self._folders if (safe := safe_path(Path(folder), name, self.root))]
            if not paths:
                return None
        if not self.found and len(self.missing) >= GIVE_UP:
            self.missing.append(name)
            return paths[0]
        for number, path in enumerate(paths):
            if os.path.isfile(path):
                self.found += 1
                if number and len(paths) == len(self._folders):
                    self._folders.insert(0, self._folders.pop(number))
                return path
        alone = self._names().get(os.path.basename(name.replace("\\", "/")), [])
        if len(alone) == 1:
            self.found += 1
            return alone[0]
        self.missing.append(name)
        return paths[0]

    def _names(self) -> dict[str, list[str]]:
        if self._by_name is None:
            self._by_name = {}
            seen = 0
            for folder, folders, files in os.walk(os.path.abspath(self.root)):
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                seen += len(files)
                if seen > MOST_FILES:
                    break
                for file in files:
                    if file.lower().endswith(SUFFIXES):
                        self._by_name.setdefault(file, []).append(os.path.join(folder, file))
        return self._by_name

    def note(self) -> list[str]:
        """Return a line on pictures that are not there; none where all are."""
        if not self.missing:
            return []
        total = self.found + len(self.missing)
        return [f"{len(self.missing)} of {total} pictures are not below {self.root}, e.g. {self.missing[0][:200]}"]

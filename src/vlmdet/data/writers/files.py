"""What every writer shares: safe file names, pictures put in their place, boxes rounded, rows walked.

When: ONCE, by the writers of this folder. An id is whatever a reader found, a path or three hundred characters of
Arabic among it; a file name made of it has no separator, no control character and no second meaning, and no two names
of one set differ only in case or in how an accent is encoded. Where the name is not the id, `Writing.renamed` says
which id it stands for.
"""

from __future__ import annotations

import io
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL.TiffImagePlugin import TiffImageFile

from vlmdet.boxes import BoxFormat
from vlmdet.data.pictures import compare_size
from vlmdet.errors import DataError, ImageError
from vlmdet.images import load, open_file, orientation, to_upright_rgb
from vlmdet.records import DetectionDataset, Problem, Sample

LONGEST_NAME = 120
"""Bytes of a name without its suffix; a file system takes 255."""

JPEG_QUALITY = 95
PIXELS = BoxFormat("xyxy", "pixel")

_JPEGS = ("JPEG", "MPO")
_SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}


@dataclass(frozen=True)
class Row:
    """One picture as it lies in the target.

    Attributes:
        sample: where it came from.
        stem: its file name without a suffix, unique in the set.
        file: its path below the target's folder, with `/`; the bare name where `data` is meant to be embedded.
        width: of the upright picture, in pixels, as the file has them.
        height: of the upright picture, in pixels, as the file has them.
        data: the picture file; empty where it lies at `file`.
    """

    sample: Sample
    stem: str
    file: str
    width: int
    height: int
    data: bytes = b""


@dataclass
class Writing:
    """One conversion under way: what is written, where to, and what happened.

    Attributes:
        dataset: the data set to write.
        root: the folder to fill.
        upright: write pixels upright where the file has an EXIF turn, since the target's readers do not turn.
        link: link to picture files and copy none.
        problems: rows and boxes with trouble, the data set's own first.
        images: pictures written, by split.
        boxes: boxes written, by split.
        pictures: files by what was done: `copied`, `linked`, `turned_upright`.
        renamed: id by file name without suffix, where they differ.
    """

    dataset: DetectionDataset
    root: Path
    upright: bool = False
    link: bool = False
    problems: list[Problem] = field(default_factory=list)
    images: Counter[str] = field(default_factory=Counter)
    boxes: Counter[str] = field(default_factory=Counter)
    pictures: Counter[str] = field(default_factory=Counter)
    renamed: dict[str, str] = field(default_factory=dict)
    _taken: Counter[str] = field(default_factory=Counter)

    def rows(self, split: str, folder: str | None) -> Iterator[Row]:
        """Put the pictures of a split in their place, one after the other.

        Input: `folder` below the root, or None to have each file as bytes.
        Output: a `Row` for every picture that can be used; the others are reported and left out.
        """
        place = self.root / folder if folder is not None else self.root
        place.mkdir(parents=True, exist_ok=True)
        self.images[split] += 0
        self.boxes[split] += 0
        for sample in self.dataset.splits[split]:
            try:
                row = self._place(sample, folder)
            except ImageError as error:
                self.report(sample, "unreadable_image", error.message, "row_dropped")
                continue
            if row is not None:
                self.images[split] += 1
                self.boxes[split] += len(sample.boxes)
                yield row

    def leave_out(self, split: str, row: Row, kind: str, detail: str) -> None:
        """Take back a row whose picture is embedded, since the target has no use for it."""
        self.images[split] -= 1
        self.boxes[split] -= len(row.sample.boxes)
        self.report(row.sample, kind, detail, "row_dropped")

    def report(self, sample: Sample, kind: str, detail: str, action: str) -> None:
        """Note a problem of one row."""
        self.problems.append(Problem(sample.source, None, sample.id, kind, detail, action))

    def corners(self, row: Row, decimals: int) -> np.ndarray:
        """Return the boxes of a row as x1, y1, x2, y2 in pixels with `decimals`, (n, 4) float64.

        A box too small for the grid gets one step of it, which is reported: without an area readers would drop it.
        """
        exact = row.sample.boxes.to_array(PIXELS, row.width, row.height)
        rounded = exact.round(decimals)
        step = 10.0**-decimals
        for number, side in zip(*np.nonzero(rounded[:, 2:] <= rounded[:, :2]), strict=True):
            if exact[number, side] >= exact[number, side + 2]:
                continue  # it had no area before
            limit = (row.width, row.height)[side] - step
            low = min(np.floor(exact[number, side] / step) * step, limit)
            rounded[number, side], rounded[number, side + 2] = np.round([low, low + step], decimals)
            said = f"box {number + 1} ({row.sample.labels[number]}) is {exact[number].tolist()} in pixels"
            self.report(row.sample, "tiny_box", f"{said}: widened to {rounded[number].tolist()}", "kept")
        return rounded

    def split_file(self, split: str) -> str:
        """Return a split's name as a file may have it.

        Raises:
            DataError: another split has that name already.
        """
        names = {name: safe_name(name) for name in self.dataset.splits}
        twins = [name for name, file in names.items() if file.casefold() == names[split].casefold() and name != split]
        if twins:
            raise DataError(f"the splits '{split}' and '{twins[0]}' would have one file name, {names[split]}")
        return names[split]

    def _place(self, sample: Sample, folder: str | None) -> Row | None:
        """Check size and turn of a picture by its header, then copy, link or turn it."""
        name = sample.source or sample.id
        source = sample.picture if isinstance(sample.picture, Path) else sample.picture()
        image = open_file(source, name)
        kind, turn = image.format or "", orientation(image)
        tag = 1 if isinstance(image, TiffImageFile) else turn  # Pillow turns a TIFF itself, its size too
        width, height = image.size[::-1] if tag >= 5 else image.size
        findings = list(compare_size(sample, image.size, tag))
        turned = self.upright and turn != 1
        for finding in findings:
            self.report(sample, *finding)
        if any(finding.action == "row_dropped" for finding in findings):
            return None
        if turned:
            load(image, name)
            kind = "JPEG" if kind in _JPEGS else "PNG"
            file = io.BytesIO()
            to_upright_rgb(image).save(file, kind, **({"quality": JPEG_QUALITY} if kind == "JPEG" else {}))
            data = file.getvalue()
        else:
            data = source.read_bytes() if isinstance(source, Path) else source
        stem = self._stem(sample.id)
        written = stem + _SUFFIXES.get(kind, f".{kind.lower()}")
        if folder is None:
            return Row(sample, stem, written, width, height, data)
        target = self.root / folder / written
        linked = self.link and isinstance(source, Path) and not turned
        if linked:
            target.symlink_to(os.path.realpath(source))
        else:
            target.write_bytes(data)
        self.pictures["turned_upright" if turned else "linked" if linked else "copied"] += 1
        return Row(sample, stem, f"{folder}/{written}", width, height)

    def _stem(self, sample_id: str) -> str:
        """Return a name that no other picture of the set has, and note it where it is not the id."""
        wanted = safe_name(sample_id)
        stem = wanted
        while self._taken[_same(stem)]:
            self._taken[_same(wanted)] += 1
            stem = f"{wanted}-{self._taken[_same(wanted)]}"
        self._taken[_same(stem)] += 1
        if stem != sample_id:
            self.renamed[stem] = sample_id
        return stem


def safe_name(text: str) -> str:
    """Make a file name without a suffix of any text: letters, digits, `-`, `_` and `.`, in any script, at most 120 bytes.

    An ordinary name comes back unchanged; `../a b` becomes `_a_b`. Different texts may get one name.
    """
    kept = "".join(letter if letter in "-_." or unicodedata.category(letter)[0] in "LNM" else "_" for letter in text)
    cut = kept.encode("utf-8", "replace")[:LONGEST_NAME].decode("utf-8", "ignore")
    return cut.lstrip(".-").rstrip(".") or "unnamed"


def _same(name: str) -> str:
    """Return what a file system that is blind to case and to the coding of accents makes of a name."""
    return unicodedata.normalize("NFKC", name).casefold()

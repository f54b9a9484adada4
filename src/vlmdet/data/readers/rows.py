"""What every reader does with rows: collect them, decide how boxes are written, check the boxes, put splits together.

When: ONCE, by the readers of this folder. A reader calls `add` for a picture and `add_box` for each of its boxes, with
the four numbers as they are written; `finish` does the rest for all boxes of the set at once, since a set has a million.

Long, because what is checked of a box, and what is then done with it, is told in one place.
"""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from vlmdet.boxes import FORMATS, BoxFormat, many_to_fractions
from vlmdet.data.readers.box_format import FITS, LEAST, OUT, decide, misfits
from vlmdet.data.readers.frames import EXIF, read_head
from vlmdet.data.readers.lazy import Columns, LazySamples, Picture
from vlmdet.data.readers.refusal import refuse_open
from vlmdet.errors import ConfigError, DataError, ImageError, did_you_mean
from vlmdet.records import DetectionDataset, Problem

ROUNDING = 1e-6
"""Boxes that leave the picture by no more than this share of it are cut without a report: float32 does that."""

DUPLICATE_IOU = 0.95
"""Above this IoU two boxes of one label on one picture are reported as the same."""

TINY_SIDE = 0.005
"""A box with a side below this share of the picture's is reported: rounding to a grid of 1000 moves it by a tenth."""

WHOLE_AREA = 0.98
"""A box that covers more than this share of the picture is reported: often a missing box, written as the picture."""

SPLIT_NAMES = {"validation": "val", "valid": "val", "dev": "val", "training": "train", "testing": "test"}
"""Names of splits that mean another one."""

LEAST_INSIDE = 0.01
"""A box of which less lies on the picture is not cut but left out: it is no object of this picture."""

Report = Callable[[int | None, str, str, str], None]
"""Takes row, kind, detail, action of a problem; file and id are known."""


class Rows:
    """The rows of a data set while it is read.

    Args:
        source: what the user named.
        split: keep rows of this split only; None for all.
        exif: what the user said about turned pictures: `applied`, `ignored` or None.
    """

    def __init__(self, source: str, *, split: str | None = None, exif: str | None = None) -> None:
        if exif is not None and exif not in EXIF:
            raise ConfigError(f"unknown exif '{exif}'", did_you_mean(exif, EXIF))
        self.source = source
        self.wanted = split
        self.exif = exif
        self.notes: list[str] = []
        self.labels: dict[str, int] = {}
        self.extra: dict[str, Sequence[Any]] = {}
        """Columns that every sample's `meta` gets a value of, one value a row."""
        self._splits: dict[str, int] = {}
        self._files: list[str] = []
        self._file_numbers: dict[str, int] = {}
        self._split_names: list[str] = []
        self._taken: dict[str, int] = {}
        self._ids: list[str] = []
        self._pictures: list[str | Callable[[], bytes]] = []
        self._sizes = array("q")
        self._row_splits = array("q")
        self._row_files = array("q")
        self._row_places = array("q")
        self._groups: dict[int, str] = {}
        self._meta: dict[int, dict[str, Any]] = {}
        self._values = array("d")
        self._owners = array("q")
        self._numbers = array("q")
        self._places = array("q")
        self._problems: list[tuple[str, Problem]] = []
        self._dropped: set[int] = set()

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def boxes(self) -> int:
        """How many boxes were added."""
        return len(self._owners)

    @property
    def problems(self) -> list[Problem]:
        """Problems that were reported until now."""
        return [problem for _, problem in self._problems]

    def add_split(self, name: str) -> None:
        """Make a split known, also where no row of it follows."""
        if name not in self._splits:
            self._splits[name] = len(self._splits)
            self._split_names.append(name)

    def label_number(self, name: str) -> int:
        """Return the number of a class name; a new one gets the next."""
        return self.labels.setdefault(name, len(self.labels))

    def used_labels(self) -> set[str]:
        """Return the names of classes that have a box."""
        names = list(self.labels)
        return {names[number] for number in set(self._numbers)}

    def meta_of(self, row: int) -> dict[str, Any]:
        """Return what else a row says, to be added to."""
        return self._meta.setdefault(row, {})

    def report(
        self, split: str, file: str, place: int | None, sample_id: str, kind: str, detail: str, action: str
    ) -> None:
        """Note a problem of a row."""
        self._problems.append((split, Problem(file, place, sample_id, kind, detail, action)))

    def reporter(self, split: str, file: str, sample_id: str) -> Report:
        """Return a function that notes a problem of one row."""

        def report(place: int | None, kind: str, detail: str, action: str) -> None:
            self.report(split, file, place, sample_id, kind, detail, action)

        return report

    def report_row(self, row: int, kind: str, detail: str, action: str, place: int | None = None) -> None:
        """Note a problem of a row that was added; `place` defaults to the row's own."""
        split, file, where = self._where(row)
        self.report(split, file, where if place is None else place, self._ids[row], kind, detail, action)

    def drop(self, row: int, kind: str, detail: str) -> None:
        """Leave out a row that was added, and say why."""
        self.report_row(row, kind, detail, "row_dropped")
        self._dropped.add(row)

    def add(
        self,
        sample_id: str,
        split: str,
        picture: str | Callable[[], bytes],
        *,
        file: str,
        place: int | None = None,
        width: int = 0,
        height: int = 0,
        group: str = "",
        meta: dict[str, Any] | None = None,
        is_file_name: bool = False,
    ) -> int:
        """Add a picture.

        Input: an id, made unique here; `picture`, a path or a function that returns a file's bytes; `file` and `place`,
        where the row stands; `width` and `height` as the row states them, 0 for not at all; `is_file_name`, the id is made
        of a file's name, which files in the folders of different splits may share.
        Output: the number of the row.
        """
        self.add_split(split)
        row, number = len(self._ids), self._splits[split]
        unique, place_number = sample_id, -1 if place is None else place
        if sample_id in self._taken:
            unique = f"{split}/{sample_id}"
            while unique in self._taken:
                unique += f"#{row}"
            if not is_file_name or self._taken[sample_id] == number:
                said = f"'{sample_id[:200]}' is used before; this row is now '{unique[:200]}'"
                self.report(split, file, place, unique, "duplicate_id", said, "kept")
        self._taken[unique] = number
        self._ids.append(unique)
        self._pictures.append(picture)
        self._sizes.extend((width, height) if width > 0 and height > 0 else (0, 0))
        self._row_splits.append(number)
        if file not in self._file_numbers:
            self._file_numbers[file] = len(self._files)
            self._files.append(file)
        self._row_files.append(self._file_numbers[file])
        self._row_places.append(place_number)
        if group:
            self._groups[row] = group
        if meta:
            self._meta[row] = meta
        return row

    def add_box(self, row: int, values: Any, label: str, place: int) -> None:
        """Add a box as it is written; one that is not four finite numbers is reported and left out."""
        numbers = four_numbers(values)
        if numbers is None:
            said = f"box {place} ({label}) is not four finite numbers: {str(values)[:80]}"
            self.report_row(row, "bad_box", said, "box_dropped", place)
        else:
            self.add_numbers(row, numbers, self.label_number(label), place)

    def add_numbers(self, row: int, numbers: Sequence[float], label_number: int, place: int) -> None:
        """Add a box of four finite floats whose class is numbered: what `add_box` ends in."""
        self._values.extend(numbers)
        self._owners.append(row)
        self._numbers.append(label_number)
        self._places.append(place)

    def finish(
        self,
        *,
        stated: BoxFormat | None = None,
        why: str = "",
        given: BoxFormat | None = None,
        allowed: Sequence[BoxFormat] = FORMATS,
        labels: Iterable[str] | None = None,
        reads_heads: bool = False,
        is_named: bool = False,
    ) -> DetectionDataset:
        """Decide how boxes are written, check each, and make the data set.

        Input: `stated`, what the format defines, and `why`; `given`, what the user named, which wins; `allowed`, readings
        that the format leaves open where it defines none (`why` then says what it does tell); `labels`, class names in
        order, None for the order of appearance; `reads_heads` where a picture's head is at hand and may correct a stated
        size; `is_named` where the files name each side, so that no other format can be asked for.
        Output: the data set.

        Raises:
            DataError: the numbers do not tell how boxes are written, most boxes misfit, or there is no such split.
        """
        values = np.frombuffer(self._values, dtype=np.float64).reshape(-1, 4)
        owners = np.frombuffer(self._owners, dtype=np.int64)
        sizes = np.array(self._sizes, dtype=np.int64).reshape(-1, 2)
        known = given or stated
        if self._needs_sizes(known, allowed, values):
            self._fill_sizes(sizes, owners)
        left_out = np.zeros(len(self), dtype=bool)
        left_out[sorted(self._dropped)] = True
        usable = ~left_out[owners]
        box_sizes = sizes[owners]
        decided_by = "given by the user" if given else why
        table: tuple[str, ...] = ()
        if known is None:
            decision = decide(values[usable], box_sizes[usable], owners[usable], allowed)
            if decision.box_format is None:
                raise refuse_open(self.source, decision, self._shown(values, sizes, owners, usable))
            known, table = decision.box_format, decision.table
            decided_by = f"{why}; {decision.reason}" if why else decision.reason
        self._refuse_misfits(values[usable], box_sizes[usable], known, decided_by, is_open=not is_named)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            xyxy = many_to_fractions(values, known, box_sizes)
        keep = self._check(xyxy, values, sizes, known, usable)
        columns = self._columns(xyxy, keep, sizes, reads_heads or self.exif == "ignored")
        row_splits = np.frombuffer(self._row_splits, dtype=np.int64)
        if self.wanted is not None and self.wanted not in self._splits:
            raise DataError(f"{self.source} has no split '{self.wanted}'", did_you_mean(self.wanted, self._splits))
        wanted = [name for name in self._splits if self.wanted in (None, name)]
        return DetectionDataset(
            source=self.source,
            splits={
                name: LazySamples(columns, np.flatnonzero((row_splits == self._splits[name]) & ~left_out), name)
                for name in wanted
            },
            labels=tuple(self.labels if labels is None else labels),
            box_format=known,
            decided_by=decided_by,
            problems=[problem for name, problem in self._problems if name in wanted],
            notes=(*self.notes, *table),
        )

    def _where(self, row: int) -> tuple[str, str, int | None]:
        place = self._row_places[row]
        split, file = self._row_splits[row], self._row_files[row]
        return self._split_names[split], self._files[file], None if place < 0 else place

    def _source_of(self, row: int) -> str:
        _, file, place = self._where(row)
        return file if place is None else f"{file}:{place}"

    def _picture_of(self, row: int) -> Picture:
        picture = self._pictures[row]
        return Path(picture) if isinstance(picture, str) else picture

    def _needs_sizes(self, known: BoxFormat | None, allowed: Sequence[BoxFormat], values: np.ndarray) -> bool:
        """Tell whether boxes may be in pixels, so that the size of each picture must be known now."""
        if known is not None:
            return known.unit == "pixel"
        return any(one.unit == "pixel" for one in allowed) and bool((values > 2).any())

    def _fill_sizes(self, sizes: np.ndarray, owners: np.ndarray) -> None:
        """Read sizes that no row states, in place, from the heads of pictures with boxes; drop what has none."""
        for row in np.intersect1d(np.flatnonzero(sizes[:, 0] <= 0), owners).tolist():
            try:
                stored, tag = read_head(self._picture_of(row), self._source_of(row))
            except ImageError as error:
                self.drop(row, "unreadable_image", error.message)
                continue
            if tag != 1 and self.exif is None:
                said = f"EXIF orientation {tag}, pixels and no stated size: say --exif applied or --exif ignored"
                self.drop(row, "exif_undecided", said)
            upright = tag >= 5 and self.exif == "applied"
            sizes[row] = stored[::-1] if upright else stored

    def _shown(
        self, values: np.ndarray, sizes: np.ndarray, owners: np.ndarray, usable: np.ndarray, most: int = 40
    ) -> list[tuple[Picture, str, tuple[int, int], np.ndarray]]:
        """Return some pictures with boxes, for a refusal to draw: picture, id, size, numbers."""
        rows = np.unique(owners[usable])
        chosen = rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)] if len(rows) else rows
        return [
            (self._picture_of(row), self._ids[row], tuple(sizes[row].tolist()), values[owners == row])
            for row in chosen.tolist()
        ]

    def _refuse_misfits(
        self, values: np.ndarray, sizes: np.ndarray, box_format: BoxFormat, decided_by: str, *, is_open: bool
    ) -> None:
        """Stop where many boxes cannot be meant under the format, while another fits them."""

        def wrong_under(one: BoxFormat) -> int:
            return int(sum(mask.sum() for mask in misfits(values, one, sizes)))

        wrong = wrong_under(box_format)
        if 2 * wrong <= len(values) and wrong < max(LEAST, OUT * len(values)):
            return
        others = [one for one in FORMATS if one.unit != "pixel" or (sizes > 0).all()]
        fitting = [str(one) for one in others if wrong_under(one) <= FITS * len(values)]
        if fitting:
            raise DataError(
                f"{self.source} is read as {box_format} ({decided_by}), but {wrong} of {len(values)} boxes end before "
                f"they begin or leave their picture; they fit as {' or '.join(fitting)}",
                f"name the format that is right, e.g. --box-format {fitting[0]}"
                if is_open
                else "its sides are named in the files: mend what wrote them",
            )

    def _check(
        self, xyxy: np.ndarray, values: np.ndarray, sizes: np.ndarray, box_format: BoxFormat, usable: np.ndarray
    ) -> np.ndarray:
        """Report boxes that are odd, cut those that stick out (in place); returns a mask of those that can be used.

        Boxes that are not `usable`, whose rows are left out, are no problem of their own.
        """
        owners = np.frombuffer(self._owners, dtype=np.int64)
        xyxy[~np.isfinite(xyxy).all(axis=1)] = (2.0, 2.0, 3.0, 3.0)  # numbers so large that their sum is infinite
        low, high = xyxy[:, :2], xyxy[:, 2:]
        is_reversed = usable & (low > high).any(axis=1)
        is_flat = usable & (low == high).any(axis=1) & ~is_reversed
        with np.errstate(over="ignore"):
            shares = np.divide(
                (high.clip(0, 1) - low.clip(0, 1)).prod(axis=1),
                (high - low).prod(axis=1),
                where=~is_flat,
                out=np.ones(len(xyxy)),
            )
        is_outside = (
            usable & (((high <= 0) | (low >= 1)).any(axis=1) | (shares < LEAST_INSIDE)) & ~is_reversed & ~is_flat
        )
        keep = usable & ~(is_reversed | is_flat | is_outside)
        sticks_out = ((low < -ROUNDING) | (high > 1 + ROUNDING)).any(axis=1) & keep
        np.clip(xyxy, 0.0, 1.0, out=xyxy)
        sides = high - low
        lost = keep & (sides <= 0).any(axis=1)  # a box that touches the border by less than a float can hold
        keep &= ~lost
        whole = keep & (sides.prod(axis=1) > WHOLE_AREA)
        tiny = keep & (sides.min(axis=1, initial=1.0) < TINY_SIDE)
        kinds = [
            (is_reversed, "reversed_box", "ends before it begins", "box_dropped"),
            (is_flat | lost, "degenerate_box", "has no area", "box_dropped"),
            (is_outside, "box_outside", "lies outside the picture, or all but a hundredth of it does", "box_dropped"),
            (sticks_out & keep, "box_outside", "sticks out of the picture", "box_clipped"),
            (whole, "whole_image_box", f"covers more than {WHOLE_AREA:.0%} of the picture", "kept"),
            (tiny, "tiny_box", f"has a side below {TINY_SIDE:.1%} of the picture's", "kept"),
        ]
        twins = self._duplicates(xyxy, keep)
        kinds.append(
            (twins, "duplicate_box", f"is another box of its picture and label (IoU > {DUPLICATE_IOU})", "kept")
        )
        names = list(self.labels)
        for number in np.flatnonzero(np.logical_or.reduce([mask for mask, *_ in kinds])).tolist():
            row = int(owners[number])
            width, height = sizes[row].tolist()
            on = f" on {width} x {height}" if width > 0 else ""
            label = names[self._numbers[number]]
            said = f"box {self._places[number]} ({label[:80]}): {values[number].tolist()} as {box_format}{on}"
            for mask, kind, what, action in kinds:
                if mask[number]:
                    self.report_row(row, kind, f"{said} {what}", action, self._places[number])
        return keep

    def _duplicates(self, xyxy: np.ndarray, keep: np.ndarray) -> np.ndarray:
        """Mark boxes that cover nearly what an earlier box of their picture and label covers.

        Boxes are compared along their left edges: over IoU .95 these differ by less than a twentieth of the width.
        """
        owners, numbers = np.frombuffer(self._owners, dtype=np.int64), np.frombuffer(self._numbers, dtype=np.int64)
        order = np.flatnonzero(keep)
        order = order[np.lexsort((xyxy[order, 0], numbers[order], owners[order]))]
        is_twin = np.zeros(len(xyxy), dtype=bool)
        first, step = np.arange(len(order)), 0
        while len(first):
            step += 1
            first = first[first + step < len(order)]
            a, b = order[first], order[first + step]
            near = (owners[a] == owners[b]) & (numbers[a] == numbers[b])
            near &= xyxy[b, 0] - xyxy[a, 0] <= (1 - DUPLICATE_IOU) * (xyxy[a, 2] - xyxy[a, 0])
            first, a, b = first[near], a[near], b[near]
            both = (
                (np.minimum(xyxy[a, 2:], xyxy[b, 2:]) - np.maximum(xyxy[a, :2], xyxy[b, :2])).clip(min=0).prod(axis=1)
            )
            areas = (xyxy[:, 2:] - xyxy[:, :2])[np.stack([a, b])].prod(axis=2).sum(axis=0)
            same = both > DUPLICATE_IOU * (areas - both)
            is_twin[np.maximum(a, b)[same]] = True
            first = first[~is_twin[order[first]]]  # what equals an earlier box has been compared by it
        return is_twin

    def _columns(self, xyxy: np.ndarray, keep: np.ndarray, sizes: np.ndarray, reads_heads: bool) -> Columns:
        owners = np.frombuffer(self._owners, dtype=np.int64)
        order = np.flatnonzero(keep)
        if (np.diff(owners[order]) < 0).any():
            order = order[np.argsort(owners[order], kind="stable")]
        counts = np.bincount(owners[order], minlength=len(self))
        ordered = xyxy if len(order) == len(xyxy) and (order[:-1] < order[1:]).all() else xyxy[order]
        ordered.setflags(write=False)
        files = self._files
        extra = dict(self.extra)

        def source(row: int) -> str:
            place = self._row_places[row]
            file = files[self._row_files[row]]
            return file if place < 0 else f"{file}:{place}"

        def meta(row: int) -> dict[str, Any]:
            return {**{key: column[row] for key, column in extra.items()}, **self._meta.get(row, {})}

        return Columns(
            ids=self._ids,
            picture=self._picture_of,
            sizes=sizes,
            offsets=np.concatenate([[0], np.cumsum(counts)]),
            xyxy=ordered,
            label_numbers=np.frombuffer(self._numbers, dtype=np.int64)[order].astype(np.int32),
            names=list(self.labels),
            groups=lambda row: self._groups.get(row, ""),
            source=source,
            meta=meta,
            exif=self.exif,
            reads_heads=reads_heads,
        )


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
    except ValueError:
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

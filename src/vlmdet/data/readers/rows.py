"""What every reader does with rows: collect them, decide how boxes are written, check the boxes, put splits together.

When: ONCE, by the readers of this folder. A reader calls `add` for a picture and `add_box` for each of its boxes, with
the four numbers as they are written; `finish` does the rest for all boxes of the set at once, since a set has a million.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmdet.boxes import FORMATS, BoxFormat, many_to_fractions
from vlmdet.data.readers.box_format import FITS, LEAST, OUT, decide, misfits
from vlmdet.data.readers.checks import check_boxes
from vlmdet.data.readers.frames import EXIF, read_head
from vlmdet.data.readers.lazy import Columns, LazySamples, Picture
from vlmdet.data.readers.refusal import refuse_open
from vlmdet.data.readers.values import four_numbers
from vlmdet.errors import ConfigError, DataError, ImageError, did_you_mean
from vlmdet.records import DetectionDataset, Problem

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
        columns = self._columns(xyxy, keep, sizes, known, reads_heads or self.exif == "ignored")
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
        """Cut boxes in place, report those that are odd; returns a mask of those that can be used."""
        owners, numbers = np.frombuffer(self._owners, dtype=np.int64), np.frombuffer(self._numbers, dtype=np.int64)
        keep, findings = check_boxes(xyxy, usable, owners, numbers)
        names = list(self.labels)
        for number in np.flatnonzero(np.logical_or.reduce([finding.mask for finding in findings])).tolist():
            row = int(owners[number])
            width, height = sizes[row].tolist()
            on = f" on {width} x {height}" if width > 0 else ""
            label = names[self._numbers[number]]
            said = f"box {self._places[number]} ({label[:80]}): {values[number].tolist()} as {box_format}{on}"
            for finding in findings:
                if finding.mask[number]:
                    place = self._places[number]
                    self.report_row(row, finding.kind, f"{said} {finding.what}", finding.action, place)
        return keep

    def _columns(
        self, xyxy: np.ndarray, keep: np.ndarray, sizes: np.ndarray, box_format: BoxFormat, reads_heads: bool
    ) -> Columns:
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
            box_format=box_format,
            exif=self.exif,
            reads_heads=reads_heads,
        )

"""Open every picture of a data set once: what is odd about it, and which pictures are the same.

When: ONCE per command, by `inspect` and by the pre-pass of `train`. Pictures are opened by several threads (Pillow
decodes outside Python's lock). A JPEG is decoded at the smallest of its scales that still fills `SMALL` pixels: all of
its entropy-coded data is read, so that a truncated file fails as it does at full size, while a photograph of 12
megapixels takes a fifth of the time. Everything else is decoded whole.

Two pictures look the same where their fingerprints do: for 8 x 8 places, whether the picture grows lighter to the
right and to the bottom (128 bits; "difference hash"), and their 8 x 8 mean colours. Scaling and compressing again
change a few bits.
"""

from __future__ import annotations

import hashlib
import operator
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from vlmdet.errors import BrokenImageError, ImageError, RefusedImageError
from vlmdet.grounding.sizes import MAX_ASPECT
from vlmdet.images import load, open_file, orientation, to_upright_rgb
from vlmdet.records import Problem, Sample

LARGE_PIXELS = 50_000_000
"""Above this many pixels a picture is reported: opening it takes a second and 150 MB, whatever the model then sees."""

SMALL = 64
"""Both sides of a picture have at least this many pixels when its fingerprint is taken, where it has them at all."""

NEAR_BITS = 12
"""Fingerprints that differ in no more of their 128 bits are near. Measured (experiments/LOG.md): photographs compressed
or scaled again differ in 5 or fewer 19 times of 20, different photographs of BCCD or COCO128 in 33 or more."""

NEAR_COLOR = 24.0
"""Mean difference of 8 x 8 colours, of 255, up to which two near fingerprints are the same picture."""

WINDOW = 64
"""Neighbours that are compared within one part's order: the search stays linear where thousands are alike."""


class Finding(NamedTuple):
    """One oddity of one picture: the last three fields of a `Problem`."""

    kind: str
    detail: str
    action: str


@dataclass(frozen=True)
class Look:
    """What opening one picture found.

    Attributes:
        findings: what is odd.
        digest: 16 bytes of the SHA-256 of the file; empty where it cannot be read.
        bits: 16 bytes, the 128 bits of the fingerprint; empty where it cannot be decoded.
        colors: 192 bytes, 8 x 8 mean colours.
    """

    findings: tuple[Finding, ...] = ()
    digest: bytes = b""
    bits: bytes = b""
    colors: bytes = b""


@dataclass(frozen=True)
class LookedOver:
    """What `look_over` found.

    Attributes:
        problems: picture by picture, then the pictures that are the same, then the groups that are divided.
        twins: id of a row that is reported as the same -> id of the row that it is like.
    """

    problems: list[Problem]
    twins: dict[str, str]


class _Row(NamedTuple):
    id: str
    source: str
    split: str


def look_over(samples: Iterable[Sample], *, total: int | None = None) -> LookedOver:
    """Open every picture once and report what is odd about it, and which are the same.

    When: once, before training, or for `inspect`; progress on stderr after two seconds.

    Input: `samples`, each visited once and not kept; `total`, how many there are, for the progress, where they are no list.
    Output: a problem for each oddity. `row_dropped`: `unreadable_image`; `truncated_image`, that is, it opens and cannot
    be decoded to its end; `refused_image`, over the limit of `images.MAX_IMAGE_PIXELS`; `too_long_image`, which
    no Qwen-VL model is shown; `size_mismatch` where the sides do not fit the stated ones, so that the boxes would lie
    elsewhere, and `exif_rotated` where that is so or open (`Sample.turn_unknown`). `kept`:
    `cmyk_image`, `palette_image`, `sixteen_bit_image`, `large_image`, `exif_rotated`, `size_mismatch` of the same shape;
    `duplicate_image` (the same bytes as an earlier row), `near_duplicate` (the same picture in another split, by its
    looks), `group_overlap` (a group, such as a barcode, has rows in several splits).
    """
    rows: list[_Row] = []
    looks: list[Look] = []
    problems: list[Problem] = []
    groups: dict[str, Counter[str]] = {}
    first_of: dict[str, _Row] = {}
    for sample, look in _look_at_all(samples, total if total is not None else operator.length_hint(samples) or None):
        row = _Row(sample.id, sample.source, sample.split)
        rows.append(row)
        looks.append(look)
        problems += [Problem(row.source, None, row.id, *finding) for finding in look.findings]
        if sample.group:
            groups.setdefault(sample.group, Counter())[sample.split] += 1
            first_of.setdefault(sample.group, row)
    same, twins = _same_pictures(rows, looks)
    problems += same
    for group, counts in groups.items():
        if len(counts) > 1:
            where = ", ".join(f"{split} ({count})" for split, count in counts.items())
            said = f"group '{group[:80]}' has rows in {where}: what is held out is not new"
            first = first_of[group]
            problems.append(Problem(first.source, None, first.id, "group_overlap", said, "kept"))
    return LookedOver(problems, twins)


def _look_at_all(samples: Iterable[Sample], total: int | None, *, at_once: int = 128) -> Iterator[tuple[Sample, Look]]:
    """Look at pictures with a thread for each core, in order; few are in memory at a time."""
    threads = min(os.cpu_count() or 1, 8)
    pause = 0.2 if sys.stderr.isatty() else 10.0  # seconds between two lines: a log keeps each
    source = iter(samples)
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=total, desc="pictures", unit="", delay=2, mininterval=pause, file=sys.stderr, leave=False) as bar,
    ):
        while chunk := list(islice(source, at_once)):
            for sample, look in zip(chunk, pool.map(look_at, chunk), strict=True):
                bar.update()
                yield sample, look


def look_at(sample: Sample) -> Look:
    """Open one picture: what is odd about it, and its fingerprint.

    When: once per row, by `look_over`.
    """
    name = sample.source or sample.id
    digest = b""
    try:
        data = _read(sample, name)
        digest = hashlib.sha256(data).digest()[:16]
        image, stored = _decode_small(data, name, SMALL)
        tag = orientation(image)
    except RefusedImageError as error:
        return Look((Finding("refused_image", error.message, "row_dropped"),), digest)
    except BrokenImageError as error:
        return Look((Finding("truncated_image", error.message, "row_dropped"),), digest)
    except ImageError as error:
        return Look((Finding("unreadable_image", error.message, "row_dropped"),), digest)
    findings = (*_oddities(image.mode, stored), *compare_size(sample, stored, tag))
    return Look(findings, digest, *_fingerprint(to_upright_rgb(image)))


def open_small(sample: Sample, side: int) -> Image.Image:
    """Open a picture upright, in RGB, and no larger than `side`: for a page, in a fraction of the time.

    Raises:
        ImageError: as `Sample.image`.
    """
    name = sample.source or sample.id
    image = to_upright_rgb(_decode_small(_read(sample, name), name, side)[0])
    scale = min(1.0, side / max(image.size))
    size = max(1, round(scale * image.width)), max(1, round(scale * image.height))
    return image.resize(size, Image.Resampling.LANCZOS)


def _decode_small(data: bytes, name: str, least: int) -> tuple[Image.Image, tuple[int, int]]:
    """Decode a picture as stored, a JPEG at the smallest scale with both sides over `least`; and return its full size."""
    image = open_file(data, name)
    stored = image.size
    image.draft(None, (least, least))
    drafted = image.size
    load(image, name)
    return image, (image.size if drafted == stored else stored)  # Pillow turns a TIFF while it loads


def _read(sample: Sample, name: str) -> bytes:
    if not isinstance(sample.picture, Path):
        return sample.picture()
    try:
        return sample.picture.read_bytes()
    except FileNotFoundError as error:
        raise ImageError(f"{name}: no such file") from error
    except OSError as error:
        raise ImageError(f"{name}: cannot be read ({error.strerror})") from error


def _oddities(mode: str, size: tuple[int, int]) -> Iterator[Finding]:
    if mode == "CMYK":
        yield Finding("cmyk_image", "CMYK, converted to RGB", "kept")
    elif mode in ("P", "PA"):
        yield Finding("palette_image", "a palette, converted to RGB", "kept")
    elif mode.startswith("I"):
        yield Finding("sixteen_bit_image", f"mode {mode}, scaled to 8 bits", "kept")
    if max(size) > MAX_ASPECT * min(size):
        said = (
            f"{size[0]} x {size[1]} pixels; the Qwen-VL processors refuse one over {MAX_ASPECT} times as long as wide"
        )
        yield Finding("too_long_image", said, "row_dropped")
    if size[0] * size[1] > LARGE_PIXELS:
        yield Finding("large_image", f"{size[0]} x {size[1]} pixels; scale it down to save time", "kept")


def compare_size(sample: Sample, stored: tuple[int, int], tag: int) -> Iterator[Finding]:
    """Compare what a row says with the file, whose EXIF orientation is `tag` and whose size before the turn is `stored`.

    When: once per row, by the pre-pass and by the writers.
    """
    stated, upright = (sample.width, sample.height), (stored[1], stored[0]) if tag >= 5 else stored
    said = f"stated as {stated[0]} x {stated[1]}, is {upright[0]} x {upright[1]}"
    if sample.turn_unknown:
        open_question = "nothing tells whether its boxes were drawn before the turn or after; --exif applied or ignored"
        yield Finding("exif_rotated", f"EXIF orientation {tag}: {open_question} says it", "row_dropped")
    elif stated == upright:
        if tag != 1:
            yield Finding("exif_rotated", f"EXIF orientation {tag}; boxes are taken as upright", "kept")
    elif stated == stored:
        turn = f"EXIF orientation {tag} turns the picture, the row states the size before it"
        yield Finding("exif_rotated", f"{turn}: {said} upright, its boxes would lie elsewhere (--exif)", "row_dropped")
    elif _same_shape(stated, upright):
        yield Finding("size_mismatch", f"{said}, of the same shape", "kept")
    else:
        yield Finding("size_mismatch", f"{said}: its boxes would lie elsewhere", "row_dropped")


def _same_shape(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Tell whether one size is the other scaled, give or take the rounding of a pixel on the smaller one."""
    small, large = sorted((first, second))
    if min(small) < 1:
        return False
    return abs(small[0] * large[1] / large[0] - small[1]) <= 1 or abs(small[1] * large[0] / large[1] - small[0]) <= 1


def _fingerprint(image: Image.Image) -> tuple[bytes, bytes]:
    """Return 16 bytes of bits and 192 of colours of an upright RGB picture."""
    grey = np.asarray(image.convert("L").resize((9, 9), Image.Resampling.BOX))
    right, down = grey[:8, 1:] > grey[:8, :8], grey[1:, :8] > grey[:8, :8]
    return np.packbits([right, down]).tobytes(), image.resize((8, 8), Image.Resampling.BOX).tobytes()


def _same_pictures(rows: Sequence[_Row], looks: Sequence[Look]) -> tuple[list[Problem], dict[str, str]]:
    """Report rows with the bytes of an earlier one, and rows that look like an earlier one of another split."""
    problems: list[Problem] = []
    twins: dict[str, str] = {}

    def report(row: _Row, other: _Row, kind: str, how: str) -> None:
        where = f"in {row.split} too" if row.split == other.split else f"in {other.split}, this row in {row.split}"
        twins[row.id] = other.id
        problems.append(Problem(row.source, None, row.id, kind, f"{how} '{other.id}' ({where})", "kept"))

    first: dict[bytes, int] = {}
    fresh: list[int] = []
    for number, look in enumerate(looks):
        if not look.digest:
            continue
        earlier = first.setdefault(look.digest, number)
        if earlier != number:
            report(rows[number], rows[earlier], "duplicate_image", "the same bytes as")
        elif look.bits:
            fresh.append(number)
    nearest = near_pairs(
        np.frombuffer(b"".join(looks[number].bits for number in fresh), np.uint64).reshape(-1, 2),
        np.frombuffer(b"".join(looks[number].colors for number in fresh), np.uint8).reshape(-1, 192),
        [rows[number].split for number in fresh],
    )
    for late, (early, distance) in sorted(nearest.items()):
        how = f"{distance} of 128 bits differ from those of"
        report(rows[fresh[late]], rows[fresh[early]], "near_duplicate", how)
    return problems, twins


def near_pairs(bits: np.ndarray, colors: np.ndarray, splits: Sequence[str]) -> dict[int, tuple[int, int]]:
    """Find rows that look like a row of another split.

    When: once per data set; linear in the rows: for each of eight parts of 16 bits the rows are sorted, and each is
    compared with the `WINDOW` rows after it that have the same part.

    Input: `bits` (n, 2) uint64 and `colors` (n, 192) uint8 of n pictures, and their `splits`.
    Output: row -> the nearest earlier row of another split and the bits that differ, at most `NEAR_BITS`. Two rows that
    differ in 7 bits or fewer have an equal part, and nine pairs of ten that differ in 12; beyond that, a pair is missed
    only where over `WINDOW` rows share the part.
    """
    bands = np.ascontiguousarray(bits).view(np.uint16).reshape(-1, 8)
    part = np.unique(np.asarray(splits, dtype=object).astype(str), return_inverse=True)[1]
    count = len(bits)
    best = np.full(count, np.iinfo(np.int64).max)  # of each row: bits that differ * count + the other row
    for band in bands.T:
        order = np.lexsort((bits[:, 1], bits[:, 0], band))
        for step in range(1, min(WINDOW, count - 1) + 1):
            one, other = order[:-step], order[step:]
            alike = band[one] == band[other]
            if not alike.any():
                break
            alike &= part[one] != part[other]
            one, other = one[alike], other[alike]
            distance = np.bitwise_count(bits[one] ^ bits[other]).sum(axis=1, dtype=np.int64)
            near = distance <= NEAR_BITS
            one, other, distance = one[near], other[near], distance[near]
            same = np.abs(colors[one].astype(np.int16) - colors[other]).mean(axis=1) <= NEAR_COLOR
            early, late = np.minimum(one, other)[same], np.maximum(one, other)[same]
            np.minimum.at(best, late, distance[same] * count + early)
    found = np.flatnonzero(best < np.iinfo(np.int64).max)
    return {int(late): (int(best[late] % count), int(best[late] // count)) for late in found}

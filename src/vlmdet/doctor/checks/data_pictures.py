"""Checks of the pictures of rows: turned by EXIF, of other modes, of other sizes than stored, shared between splits.

When: a part of stage data. No torch.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vlmdet.boxes import Boxes
from vlmdet.doctor.calls import NotAvailable, UserCodeError
from vlmdet.doctor.checks import Check, Outcome, check, found, looked
from vlmdet.doctor.evidence import Evidence, every
from vlmdet.doctor.gather.annotations import Annotation, dhash, open_stored
from vlmdet.doctor.gather.conversations import pictures_of
from vlmdet.images import BROKEN, to_upright_rgb


@check("D06", needs=("rows|splits",))
def exif(evidence: Evidence) -> Outcome:
    """Are pictures with an EXIF turn and their boxes turned alike?"""
    annotations = [one for one in evidence.annotations() if one.picture and not one.picture.error]
    if not annotations:
        raise NotAvailable("pictures")
    turned = [one for one in annotations if one.picture and one.picture.orientation != 1]
    if not turned:
        yield looked("D06", f"{len(annotations)} pictures, none with an EXIF turn")
        return
    quarter = [one for one in turned if one.picture and one.picture.orientation >= 5]
    boxed: dict[str, int] = {"upright": 0, "as stored": 0}
    for one in quarter:
        side = _side_of_boxes(evidence, one)
        if side:
            boxed[side] += 1
    shown: dict[str, int] = {"upright": 0, "as stored": 0}
    for one in every(turned, 40):
        side = _side_of_picture(evidence, one)
        if side:
            shown[side] += 1
    figures = (
        f"{len(turned)} of {len(annotations)} pictures have an EXIF turn (tag 274: "
        f"{dict(Counter(one.picture.orientation for one in turned if one.picture))}); their boxes or stored "
        "sizes fit the upright picture in "
        f"{boxed['upright']} rows, the picture as stored in {boxed['as stored']}"
    )
    if evidence.subject.convert is not None:
        figures += f"; the converter gives {shown['upright']} upright and {shown['as stored']} as stored"
    stored, upright = boxed["as stored"], boxed["upright"]
    if evidence.subject.convert is not None and (shown["upright"] or shown["as stored"]):
        as_stored = shown["as stored"] > shown["upright"]
        differ = (as_stored and upright >= stored) if (boxed["upright"] or boxed["as stored"]) else as_stored
        differ = differ or (not as_stored and stored > upright)
        certainty = 0.95 if (boxed["upright"] or boxed["as stored"]) else 0.6
    else:
        differ, certainty = True, 0.85 if stored > upright else 0.7
    if differ:
        yield found(
            "D06",
            where=turned[0].where,
            evidence=figures,
            certainty=certainty,
            cause="Image.open does not apply the turn, viewers and most annotation tools do",
        )
    else:
        yield looked("D06", figures)


def _side_of_boxes(evidence: Evidence, one: Annotation) -> str | None:
    if one.picture is None:
        return None
    raw, upright = (one.picture.width, one.picture.height), one.picture.upright
    if raw == upright:
        return None
    if one.stored in (raw, upright):
        return "upright" if one.stored == upright else "as stored"
    declared = evidence.declared() or evidence.likely_format()
    if one.boxes is None or not len(one.boxes) or declared.unit != "pixel":
        return None
    outside = {}
    for name, size in (("upright", upright), ("as stored", raw)):
        outside[name] = int((Boxes.from_array(np.nan_to_num(one.boxes), declared, *size).xyxy > 1.01).any(axis=1).sum())
    return None if outside["upright"] == outside["as stored"] else min(outside, key=lambda name: outside[name])


def _side_of_picture(evidence: Evidence, one: Annotation) -> str | None:
    """Say whether the converter's picture of a row is upright."""
    if evidence.subject.convert is None or one.picture is None:
        return None
    try:
        given = pictures_of(evidence._convert(evidence.raw_row(one), one))
    except (UserCodeError, NotAvailable):
        return None
    if not given:
        return None
    if not isinstance(given[0], Image.Image):
        return "upright"  # a path or bytes: transformers' own loading turns it
    turned_still = given[0].getexif().get(274, 1) not in (None, 1)
    raw, upright = (one.picture.width, one.picture.height), one.picture.upright
    if raw == upright:
        return "as stored" if turned_still else "upright"
    portrait = given[0].height > given[0].width
    return "upright" if portrait == (upright[1] > upright[0]) else "as stored"


@check("D07", needs=("rows|splits",))
def modes(evidence: Evidence) -> Outcome:
    """Are pictures RGB, or made so with a white background?"""
    annotations = [one for one in evidence.annotations() if one.picture]
    broken = [one for one in annotations if one.picture and one.picture.error]
    counts = Counter(one.picture.mode for one in annotations if one.picture and not one.picture.error)
    odd = [one for one in annotations if one.picture and not one.picture.error and one.picture.mode != "RGB"]
    figures = f"{len(annotations)} pictures: " + ", ".join(f"{count} {mode}" for mode, count in counts.most_common())
    unreadable = [
        one for one in broken if one.picture and not one.picture.error.startswith(("FileNotFoundError", "an address"))
    ]
    lines = []
    where = ""
    if unreadable:
        where = unreadable[0].where
        lines.append(
            f"{len(unreadable)} cannot be opened, e.g. {where}: {unreadable[0].picture.error if unreadable[0].picture else ''}"
        )
    bad = [(one, text) for one in every(odd, 40) if (text := _not_made_rgb(evidence, one))]
    if bad:
        where = where or bad[0][0].where
        lines.append(f"{len(bad)} of {min(len(odd), 40)} that are not RGB {bad[0][1]}, e.g. {bad[0][0].where}")
    if not annotations:
        raise NotAvailable("pictures")
    if lines:
        yield found(
            "D07",
            where=where,
            evidence=f"{figures}; " + "; ".join(lines),
            cause="pictures are passed on in the mode in which they are stored",
        )
    else:
        yield looked("D07", figures)


def _not_made_rgb(evidence: Evidence, one: Annotation) -> str:
    """Say what is wrong with how the converter makes a picture RGB; "" where nothing is."""
    raw_row = evidence.splits()[one.split].raw(one.row)
    if evidence.subject.convert is None:
        return "" if one.picture and one.picture.mode == "L" else "stay as they are"
    try:
        given = pictures_of(evidence._convert(evidence.raw_row(one), one))
        stored = open_stored(raw_row[one.keys["picture"]])
    except (UserCodeError, NotAvailable, *BROKEN):
        return ""
    if not given or not isinstance(given[0], Image.Image):
        return ""  # a path: whoever opens it decides
    if given[0].mode != "RGB":
        return f"stay {given[0].mode} after the converter"
    wanted = np.asarray(to_upright_rgb(stored).resize((32, 32)), dtype=float)
    got = np.asarray(given[0].resize((32, 32)), dtype=float)
    if np.abs(wanted - got).mean() > 30:
        return "come out with other colours (transparency on black, or 16 bits cut off)"
    return ""


@check("D08", needs=("rows|splits",))
def stored_sizes(evidence: Evidence) -> Outcome:
    """Are stored widths and heights those of the files?"""
    known = [one for one in evidence.annotations() if one.stored and one.picture and not one.picture.error]
    if not known:
        raise NotAvailable("rows with width and height beside their pictures")
    bad = []
    for one in known:
        assert one.picture is not None
        if one.stored not in (one.picture.upright, (one.picture.width, one.picture.height)):
            bad.append(one)
    if bad:
        swapped = sum(one.picture is not None and one.stored == one.picture.upright[::-1] for one in bad)
        first = bad[0]
        size = first.picture.upright if first.picture else ()
        yield found(
            "D08",
            where=first.where,
            evidence=f"{len(bad)} of {len(known)} rows; {first.where} says {first.stored}, its file is {size}"
            + (f"; {swapped} have width and height exchanged" if swapped else ""),
            cause="the files were resized, or width and height were exchanged, after the annotations were made",
            certainty=min(1.0, 0.7 + len(bad) / len(known)),
        )
    else:
        yield looked("D08", f"{len(known)} stored sizes equal the files'")


@check("D10", needs=("splits",))
def leakage(evidence: Evidence) -> Outcome:
    """Do train and validation share pictures, near copies or groups?"""
    annotations = evidence.annotations()
    names = list(dict.fromkeys(one.split for one in annotations))
    if len(names) < 2:
        raise NotAvailable("two splits")
    train = next((name for name in names if "train" in name.lower()), names[0])
    others = [one for one in annotations if one.split != train]
    hashes = {one.picture.sha1: one for one in annotations if one.split == train and one.picture and one.picture.sha1}
    same = [(one, hashes[one.picture.sha1]) for one in others if one.picture and one.picture.sha1 in hashes]
    near = [] if same else _near(evidence, annotations, train)
    groups: dict[str, Annotation] = {}
    for one in annotations:
        if one.split == train and one.group:
            groups.setdefault(one.group, one)
    shared = [(one, groups[one.group]) for one in others if one.group and one.group in groups]
    if len({one.group for one in annotations}) < 5:
        shared = []  # a field of a few values is no group of scenes
    figures = f"{len(others)} rows outside {train} compared with {len(annotations) - len(others)} in it"
    lines = [
        f"{len(pairs)} {what}, e.g. {pairs[0][0].where} and {pairs[0][1].where}"
        for what, pairs in (("have the same picture", same), ("have a near copy", near), ("share a group", shared))
        if pairs
    ]
    if lines:
        share = max(len(same), len(near), len(shared)) / max(len(others), 1)
        yield found(
            "D10",
            where=(same or near or shared)[0][0].where,
            evidence=f"{figures}: " + "; ".join(lines),
            cause="rows were split at random, or the same rows were used twice",
            certainty=min(1.0, 0.6 + share),
        )
    else:
        yield looked("D10", f"{figures}: no shared file, near copy or group")


def _near(evidence: Evidence, annotations: Sequence[Annotation], train: str) -> list[tuple[Annotation, Annotation]]:
    table: dict[int, list[tuple[Annotation, np.ndarray]]] = defaultdict(list)
    pairs = []
    for one in sorted(annotations, key=lambda one: one.split != train):
        if one.picture is None or one.picture.error:
            continue
        try:
            image = open_stored(evidence.splits()[one.split].raw(one.row)[one.keys["picture"]])
            small = image.copy() if isinstance(image, Image.Image) and not getattr(image, "filename", "") else image
            code = dhash(small)
            pixels = np.asarray(small.convert("RGB").resize((24, 24), Image.Resampling.BOX), dtype=float)
        except (*BROKEN, Image.DecompressionBombError):
            continue
        if pixels.std() < 12 or not 8 <= code.bit_count() <= 56:
            continue  # hardly anything to be seen: all such pictures look alike
        codes = [code, *(code ^ (1 << bit) for bit in range(64))] if one.split != train else [code]
        if one.split == train:
            table[code].append((one, pixels))
            continue
        hit = next(
            (
                other
                for key in codes
                for other, p in table.get(key, ())
                if np.abs(p - pixels).mean() < 5 and np.abs(p - pixels).max() < 60
            ),
            None,
        )
        if hit is not None:
            pairs.append((one, hit))
    return pairs


PICTURE_CHECKS: tuple[Check, ...] = (exif, modes, stored_sizes, leakage)

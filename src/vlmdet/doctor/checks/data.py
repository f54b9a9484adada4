"""Checks of the rows as they lie there: pictures, sizes, boxes, splits, labels, order, names of fields; how boxes are read is in
`box_reading`.

When: first, and before every run. No torch: a data set is examined in seconds on any laptop. The module is also the example for
authors of checks: small functions, one list, figures for what is fine.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmdet.doctor.calls import NotAvailable, UserCodeError, place_of
from vlmdet.doctor.checks import Check, Outcome, check, found, looked, skipped
from vlmdet.doctor.checks.box_reading import BOX_CHECKS
from vlmdet.doctor.evidence import Evidence, every, processor_limits
from vlmdet.doctor.gather.annotations import Annotation, dhash, open_stored
from vlmdet.doctor.gather.conversations import pictures_of, text_of
from vlmdet.doctor.gather.reading import invalid_share
from vlmdet.doctor.gather.text_boxes import boxes_in, paired_iou
from vlmdet.images import BROKEN, to_upright_rgb

SPLIT_OPTIONS = ("train_split", "eval_split", "val_split", "validation_split", "test_split", "split")


@check("D05", needs=("rows|splits",))
def odd_boxes(evidence: Evidence) -> Outcome:
    """Are boxes within their pictures, with an area, once each; and numbers of targets within the grid?"""
    annotations, truth = evidence.annotations(), evidence.truth()
    kinds: dict[str, list[str]] = defaultdict(list)
    total = large = 0
    for one, boxes in zip(annotations, truth, strict=True):
        if one.odd:
            kinds["no four numbers"].append(one.where)
        if boxes is None or one.boxes is None or one.size is None:
            continue
        total += len(boxes)
        slack = 1.5 / np.tile(np.maximum(one.size, 1), 2)
        for box, raw in zip(boxes, one.boxes, strict=True):
            shown = f"{one.where}: {np.round(raw, 4).tolist()}"
            if not np.isfinite(raw).all():
                kinds["not finite"].append(shown)
            elif (box < -slack).any() or (box > 1 + slack).any():
                kinds["outside the picture"].append(shown)
            elif (box[2:] - box[:2] <= 1e-9).any():
                kinds["without area"].append(shown)
            elif ((box[2:] - box[:2]) * one.size < 2).any():
                kinds["under two pixels wide or high"].append(shown)
            large += bool((box[2:] - box[:2]).clip(0).prod() > 0.95)
        for i in range(len(boxes)):
            same = [j for j in range(i) if one.labels[i] == one.labels[j]]
            if same and (paired_iou(np.broadcast_to(boxes[i], (len(same), 4)), boxes[same]) > 0.95).any():
                kinds["twice in one picture"].append(f"{one.where}: {np.round(one.boxes[i], 4).tolist()}")
    written = _odd_targets(evidence)
    if written is not None:
        kinds.update(written)
    if kinds:
        lines = [f"{len(examples)} {kind}, e.g. {examples[0]}" for kind, examples in kinds.items()]
        share = sum(map(len, kinds.values())) / max(total, 1)
        yield found("D05", where=next(iter(kinds.values()))[0].split(":")[0], evidence=f"{total} boxes: " + "; ".join(lines),
                    cause="annotation noise, or numbers cut and not clipped", certainty=min(1.0, 0.6 + share * 4))  # fmt: skip
    else:
        yield looked("D05", f"{total} boxes within their pictures; {large} cover over 95 % of theirs")


def _odd_targets(evidence: Evidence) -> dict[str, list[str]] | None:
    """Return kinds of odd numbers in targets, and whether they were cut and not rounded."""
    try:
        space, examples, truth = evidence.space(), evidence.examples(), evidence.truth()
    except (NotAvailable, UserCodeError):
        return None
    if space is None or space.iou < 0.6 or space.unit not in ("per_mille", "bins"):
        return None
    top = 1000 if space.unit == "per_mille" else 1023
    kinds: dict[str, list[str]] = defaultdict(list)
    rest: list[float] = []
    for one in examples:
        boxes = truth[one.index]
        texts = boxes_in(one.answer)
        for box in texts:
            if min(box.numbers) < 0 or max(box.numbers) > top:
                kinds["outside the grid of the target"].append(f"{one.where}: {list(box.numbers)}")
        if boxes is not None and len(texts) == len(boxes) == 1 and space.order in ("xyxy", "yxyx"):
            numbers = np.array(texts[0].numbers)[[0, 1, 2, 3] if space.order == "xyxy" else [1, 0, 3, 2]]
            rest += list(boxes[0] * (1000 if space.unit == "per_mille" else 1024) - numbers)
    values = np.array(rest)
    near = values[np.abs(values) < 1.0]
    if (
        space.unit == "per_mille"
        and len(near) >= 40
        and len(near) > 0.9 * len(values)
        and near.min() > -0.05
        and near.mean() > 0.38
    ):
        kinds["numbers are cut and not rounded (mean remainder"].append(
            f"{near.mean():.2f} of a grid step over {len(near)})"
        )
    return kinds


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
    boxed = {"upright": 0, "as stored": 0}
    for one in quarter:
        side = _side_of_boxes(evidence, one)
        if side:
            boxed[side] += 1
    shown = {"upright": 0, "as stored": 0}
    for one in every(turned, 40):
        side = _side_of_picture(evidence, one)
        if side:
            shown[side] += 1
    figures = (
        f"{len(turned)} of {len(annotations)} pictures have an EXIF turn (tag 274: "
        f"{dict(Counter(one.picture.orientation for one in turned if one.picture))}); their boxes or stored sizes fit the upright picture in "
        f"{boxed['upright']} rows, the picture as stored in {boxed['as stored']}"
    )
    if evidence.subject.convert is not None:
        figures += f"; the converter gives {shown['upright']} upright and {shown['as stored']} as stored"
    stored, upright = boxed["as stored"], boxed["upright"]
    if evidence.subject.convert is not None and sum(shown.values()):
        as_stored = shown["as stored"] > shown["upright"]
        differ = (as_stored and upright >= stored) if sum(boxed.values()) else as_stored
        differ = differ or (not as_stored and stored > upright)
        certainty = 0.95 if sum(boxed.values()) else 0.6
    else:
        differ, certainty = True, 0.85 if stored > upright else 0.7
    if differ:
        yield found("D06", where=turned[0].where, evidence=figures, certainty=certainty,
                    cause="Image.open does not apply the turn, viewers and most annotation tools do")  # fmt: skip
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
    from vlmdet.boxes import Boxes

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
    turned_still = (given[0].getexif() or {}).get(274, 1) not in (None, 1)
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
        yield found("D08", where=first.where, evidence=f"{len(bad)} of {len(known)} rows; {first.where} says {first.stored}, its file is {size}"
                    + (f"; {swapped} have width and height exchanged" if swapped else ""),
                    cause="the files were resized, or width and height were exchanged, after the annotations were made",
                    certainty=min(1.0, 0.7 + len(bad) / len(known)))  # fmt: skip
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
        yield found("D10", where=(same or near or shared)[0][0].where, evidence=f"{figures}: " + "; ".join(lines),
                    cause="rows were split at random, or the same rows were used twice", certainty=min(1.0, 0.6 + share))  # fmt: skip
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


@check("D11", needs=("rows|splits",))
def classes(evidence: Evidence) -> Outcome:
    """Does each target hold the classes that its question asks for, and is each class spelt one way?"""
    annotations = evidence.annotations()
    counts = Counter(label for one in annotations for label in one.labels if label)
    lines: list[str] = []
    certainty = 0.0
    where = "labels"
    spellings = defaultdict(list)
    for label in counts:
        spellings["".join(label.lower().replace("_", " ").replace("-", " ").split()).rstrip("s")].append(label)
    twice = [names for names in spellings.values() if len(names) > 1]
    if twice:
        lines.append(
            "one class under several spellings: "
            + "; ".join(", ".join(f"{n!r} ({counts[n]})" for n in names) for names in twice[:5])
        )
        certainty = 0.8
    typos = _typos(counts, {name for names in twice for name in names})
    if typos:
        lines.append(
            "rare labels that look like a slip: "
            + "; ".join(f"{a!r} ({counts[a]}) beside {b!r} ({counts[b]})" for a, b in typos[:5])
        )
        certainty = max(certainty, 0.5)
    asked = _other_classes(evidence, list(counts))
    if asked is not None:
        wrong, seen, example = asked
        if wrong and wrong >= 0.02 * seen:
            lines.insert(
                0,
                f"{wrong} of {seen} targets hold a class that the question does not ask for, or not the annotated one; {example}",
            )
            certainty, where = min(1.0, 0.75 + wrong / seen), example.split(":")[0]
    if lines:
        yield found("D11", where=where, evidence="; ".join(lines), cause="targets hold classes that the question does not name, or labels are spelt in several ways",
                    certainty=certainty)  # fmt: skip
    elif not counts:
        raise NotAvailable("labels in the rows")
    else:
        rare = [label for label, count in counts.items() if count < 0.01 * sum(counts.values())]
        yield looked(
            "D11",
            f"{len(counts)} classes in {sum(counts.values())} boxes"
            + (f"; under 1 %: {', '.join(rare[:8])}" if rare else ""),
        )


def _typos(counts: Counter[str], known: set[str]) -> list[tuple[str, str]]:
    total = sum(counts.values())
    common = [label for label, count in counts.items() if count > 0.05 * total and len(label) >= 5]
    rare = [
        label for label, count in counts.items() if count <= 0.03 * total and label not in known and len(label) >= 5
    ]
    pairs = []
    for label in rare[:200]:
        near = difflib.get_close_matches(label.lower(), [one.lower() for one in common], n=1, cutoff=0.86)
        if near and abs(len(near[0]) - len(label)) <= 1:
            pairs.append((label, next(one for one in common if one.lower() == near[0])))
    return pairs


def _other_classes(evidence: Evidence, names: list[str]) -> tuple[int, int, str] | None:
    try:
        examples = evidence.examples()
    except (NotAvailable, UserCodeError):
        return None
    annotations = evidence.annotations()
    wrong = seen = 0
    text = ""
    words = sorted((name for name in names if len(name) >= 2 and not name.isdigit()), key=len, reverse=True)
    for one in examples:
        asked, answered = _named(one.prompt + " " + (one.system or ""), words), _named(one.answer, words)
        if not answered:
            continue
        labels = {label for label in annotations[one.index].labels if label}
        seen += 1
        beyond = (answered - asked if asked else set()) or (answered - labels if labels else set())
        if beyond:
            wrong += 1
            text = (
                text
                or f"{one.where}: asked {one.prompt[:120]!r}, annotated {sorted(labels)}, target {one.answer[:160]!r}"
            )
    return (wrong, seen, text) if seen else None


def _named(text: str, words: Sequence[str]) -> set[str]:
    """Return the class names in a text, the longest first, each place once."""
    low = f" {text.lower()} "
    found_names = set()
    for word in words:
        at = low.find(word.lower())
        while at >= 0:
            if (not low[at - 1].isalnum() and not low[at + len(word) : at + len(word) + 1].isalpha()) or low[
                at + len(word) : at + len(word) + 2
            ] in ("s ", "s,"):
                found_names.add(word)
                low = low.replace(word.lower(), " " * len(word))
                break
            at = low.find(word.lower(), at + 1)
    return found_names


@check("D13", needs=("rows|splits",))
def order_in_targets(evidence: Evidence) -> Outcome:
    """Are the boxes of targets sorted in some way?"""
    space = evidence.space()
    order = space.order if space is not None else "xyxy"
    rows = []
    for one in evidence.examples():
        numbers = np.array([box.numbers for box in boxes_in(one.answer)], float)
        if len(numbers) >= 2:
            rows.append((numbers[:, [1, 0, 3, 2]] if order == "yxyx" else numbers, one))
    if len(rows) < 8:
        raise NotAvailable("8 or more rows with several boxes in their targets")
    keys = {
        "top": lambda b: b[:, 1],
        "left": lambda b: b[:, 0],
        "bottom": lambda b: b[:, 3],
        "right": lambda b: b[:, 2],
        "centre, top to bottom": lambda b: b[:, 1] + b[:, 3],
        "centre, left to right": lambda b: b[:, 0] + b[:, 2],
        "area": lambda b: (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]),
        "distance from the corner": lambda b: b[:, 0] ** 2 + b[:, 1] ** 2,
    }
    shares = {}
    for name, key in keys.items():
        steps = [np.sign(np.diff(key(numbers))) for numbers, _ in rows]
        every_step = np.concatenate(steps)
        shares[name] = max(float((every_step >= 0).mean()), float((every_step <= 0).mean()))
    grouped = _grouped(evidence, rows, keys)
    best = max(shares, key=lambda name: shares[name])
    top = max(shares[best], grouped)
    figures = f"{len(rows)} targets with several boxes: {shares[best]:.0%} of steps follow '{best}'"
    if top < 0.8:
        yield found("D13", where=rows[0][1].where, evidence=f"{figures}, the best of {len(keys)} keys; {rows[0][1].answer[:300]}",
                    cause="boxes are written in the order of the annotations, which is arbitrary", certainty=0.6)  # fmt: skip
    else:
        yield looked("D13", figures)


def _grouped(evidence: Evidence, rows: Sequence[tuple[np.ndarray, Any]], keys: Mapping[str, Any]) -> float:
    """Return the best share of sorted steps where boxes are first grouped by label: runs of one label are looked at."""
    annotations = evidence.annotations()
    best = 0.0
    for key in keys.values():
        good = total = 0
        for numbers, one in rows:
            labels = annotations[one.index].labels
            if len(labels) != len(numbers) or len(set(labels)) == 1:
                continue
            names = [text for text in sorted({label or "" for label in labels}, key=lambda t: one.answer.find(t))]
            start = 0
            for name in names:
                count = sum((label or "") == name for label in labels)
                values = key(numbers[start : start + count])
                good, total = good + int((np.diff(values) >= 0).sum()), total + max(count - 1, 0)
                start += count
        if total >= 10:
            best = max(best, good / total)
    return best


@check("D14", needs=("rows|splits",))
def negatives(evidence: Evidence) -> Outcome:
    """Are there rows without objects, and have they a written answer?"""
    annotations = [one for one in evidence.annotations() if one.boxes is not None]
    if not annotations:
        raise NotAvailable("rows with a field of boxes")
    empty = {
        i
        for i, one in enumerate(evidence.annotations())
        if one.boxes is not None and not len(one.boxes) and not one.odd
    }
    figures = f"{len(empty)} of {len(annotations)} rows have no object"
    silent: list[str] = []
    dropped = 0
    try:
        examples = evidence.examples()
        known = {one.index: one for one in examples}
        silent = [known[i].where for i in empty if i in known and not known[i].answer.strip()]
        dropped = sum(i not in known for i in empty)
    except (NotAvailable, UserCodeError):
        pass
    if silent:
        yield found("D14", where=silent[0], evidence=f"{figures}; {len(silent)} of their targets are empty text", cause="the converter joins no boxes to an empty answer",
                    severity=3)  # fmt: skip
    elif dropped:
        yield found("D14", where=place_of(evidence.subject.convert), evidence=f"{figures}; the converter leaves {dropped} of them out",
                    cause="rows without objects do not come out of the converter", certainty=0.9)  # fmt: skip
    elif not empty and len(annotations) >= 8:
        yield found(
            "D14",
            where="the data set",
            evidence=figures,
            cause="only pictures with objects were collected",
            severity=1,
            certainty=0.5,
        )
    else:
        yield looked("D14", figures)


@check("D15", needs=("rows|splits",))
def names_of_fields(evidence: Evidence) -> Outcome:
    """Are fields and splits there under the names that are used?"""
    splits = evidence.splits()
    lines: list[tuple[str, str, float]] = []
    for option in SPLIT_OPTIONS:
        wanted = evidence.options.flat.get(option)
        if isinstance(wanted, str) and evidence.subject.splits and wanted.split("[")[0] not in splits:
            lines.append(
                (
                    option,
                    f"settings['{option}'] is {wanted!r}; splits: {', '.join(map(repr, splits))}{_near_name(wanted, list(splits))}",
                    1.0,
                )
            )
    annotations = evidence.annotations()
    lost = [one for one in annotations if one.picture and one.picture.error.startswith("FileNotFoundError")]
    if lost and lost[0].picture:
        lines.append(
            (
                lost[0].where,
                f"{len(lost)} of {len(annotations)} pictures are not there, e.g. {lost[0].picture.path}",
                0.9,
            )
        )
    keys = [set(evidence.splits()[one.split].raw(one.row)) for one in every(annotations, 200)]
    common = Counter(key for row in keys for key in row)
    for key, count in common.items():
        if 0.5 * len(keys) < count < len(keys) and str(key) in {
            k.split(".")[0].split("[")[0] for one in annotations for k in one.keys.values()
        }:
            first = next(one for one, row in zip(every(annotations, 200), keys, strict=True) if key not in row)
            lines.append(
                (
                    first.where,
                    f"{len(keys) - count} of {len(keys)} rows have no {key!r}; {first.where} has {sorted(map(str, evidence.splits()[first.split].raw(first.row)))}",
                    0.8,
                )
            )
    if evidence.subject.convert is not None:
        lines += _converter_names(evidence, annotations)
    if lines:
        where, _, certainty = lines[0]
        severity = 3 if evidence.subject.convert is not None and any(line[2] >= 0.9 for line in lines) else 2
        yield found("D15", where=where, evidence="; ".join(text for _, text, _ in lines), cause="a name was guessed, or differs between rows or splits",
                    certainty=certainty, severity=severity)  # fmt: skip
    else:
        yield looked("D15", f"{len(keys)} rows with {', '.join(sorted(map(str, common)))}; splits {', '.join(splits)}")


def _converter_names(evidence: Evidence, annotations: Sequence[Annotation]) -> list[tuple[str, str, float]]:
    lines: list[tuple[str, str, float]] = []
    try:
        examples, errors = evidence.converted()
    except UserCodeError as error:
        examples, errors = [], [error]
    except NotAvailable:
        return []
    for error in errors[:1]:
        row = next((one for one in annotations if one.where == error.subject), annotations[0])
        names = sorted(map(str, evidence.splits()[row.split].raw(row.row)))
        hint = (
            _near_name(str(error.error.args[0]), names)
            if isinstance(error.error, KeyError) and error.error.args
            else ""
        )
        lines.append((f"{error.where}, on {error.subject}", f"the converter raised {error.text} on {len(errors)} rows at {error.where}: {error.line}; "
                      f"the row has {', '.join(names)}{hint}", 1.0))  # fmt: skip
    boxed = [one for one in examples if (boxes := annotations[one.index].boxes) is not None and len(boxes)]
    if len(boxed) >= 3 and not any(boxes_in(one.answer) for one in boxed) and len({one.answer for one in boxed}) == 1:
        lines.append((boxed[0].where, f"none of {len(boxed)} targets holds a box, and all their rows do; {boxed[0].where} has boxes under "
                      f"{annotations[boxed[0].index].keys.get('boxes')!r}, its target is {boxed[0].answer[:80]!r}", 0.95))  # fmt: skip
    return lines


def _near_name(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f"; nearest: {near[0]!r}" if near else ""


@check("D16", "D17", needs=("rows|splits",))
def small_objects(evidence: Evidence) -> Outcome:
    """Are objects larger than one image token, and pictures such as the processor takes?"""
    annotations = [one for one in evidence.annotations() if one.size and min(one.size) > 0]
    if not annotations:
        raise NotAvailable("sizes of pictures")
    odd = [one for one in annotations if one.size and (max(one.size) > 200 * min(one.size) or min(one.size) < 28)]
    if odd:
        yield found("D17", where=odd[0].where, evidence=f"{len(odd)} of {len(annotations)} pictures are over 200 times as long as wide or under 28 pixels, e.g. "
                    f"{odd[0].where}: {odd[0].size}", cause="smart_resize refuses such sizes")  # fmt: skip
    else:
        yield looked(
            "D17", f"{len(annotations)} pictures of {min(min(one.size or (0,)) for one in annotations)} pixels and more"
        )
    asked = evidence.options.number("max_pixels") or processor_limits(evidence.subject.processor)[1]
    if not asked:
        yield skipped("D16", "settings['max_pixels'] or processor")
        return
    family = evidence.family()
    if family and not family.startswith("qwen"):
        yield skipped("D16", f"the resize rule of {family}, which has no max_pixels")
        return
    truth = evidence.truth()
    factor = evidence.factor()
    sides = []
    for one, boxes in zip(evidence.annotations(), truth, strict=True):
        seen = evidence.size_seen(one)
        if boxes is not None and seen is not None:
            sides += list((np.abs(boxes[:, 2:] - boxes[:, :2]) * seen).min(axis=1))
    if not sides:
        yield skipped("D16", "rows with boxes")
        return
    share = float((np.array(sides) < factor).mean())
    figures = f"{share:.0%} of {len(sides)} boxes have a side under one image token ({factor} pixels) at max_pixels {int(asked):,}; median side {np.median(sides):.0f}"
    if (
        share > 0.1
        and (declared := evidence.declared() or evidence.likely_format())
        and invalid_share(annotations, declared) < 0.2
    ):
        yield found("D16", where="max_pixels", evidence=figures, cause="pictures are shrunk below what the objects need",
                    severity=3 if share >= 0.4 else 2, certainty=min(1.0, 0.5 + share))  # fmt: skip
    else:
        yield looked("D16", figures)


@check("D18", needs=("rows|splits", "convert"))
def stale_rows(evidence: Evidence) -> Outcome:
    """Do formatted rows equal what the formatter writes today?"""
    cached = _cached_rows(evidence)
    fresh = evidence.examples()
    if cached is None:
        raise NotAvailable(
            "cached rows: 'messages' beside the raw fields, settings['cached_rows'] or artefacts['cached']"
        )
    by_id = {key: row for row in cached if isinstance(row, Mapping) and (key := _id_of(row)) is not None}
    compared = 0
    for one in every(fresh, 200):
        raw = evidence.raw_row(evidence.annotations()[one.index])
        old = raw if _has_messages(raw) else by_id.get(_id_of(raw))
        if old is None and len(cached) >= len(evidence.annotations()) and not by_id:
            old = cached[one.index]
        if not isinstance(old, Mapping) or not _has_messages(old):
            continue
        compared += 1
        before = [(m.get("role"), text_of(m)) for m in old["messages"]]
        now = [(m.get("role"), text_of(m)) for m in one.messages]
        if before != now:
            a, b = next(((x, y) for x, y in zip(before, now, strict=False) if x != y), (before[-1], now[-1]))
            yield found(
                "D18",
                where=one.where,
                evidence=f"cached: {a}\ntoday:  {b}",
                cause="the formatter was changed after these rows were written",
            )
            return
    if not compared:
        raise NotAvailable("cached rows that belong to the raw ones")
    yield looked("D18", f"{compared} cached rows equal what the formatter writes today")


def _has_messages(row: Any) -> bool:
    return isinstance(row, Mapping) and isinstance(row.get("messages"), (list, tuple))


def _id_of(row: Any) -> str | None:
    if not isinstance(row, Mapping):
        return None
    for key in ("id", "image_id", "file_name", "filename", "image_path", "name"):
        if isinstance(row.get(key), (str, int)):
            return f"{key}:{row[key]}"
    image = row.get("image")
    return f"image:{image}" if isinstance(image, str) else None


def _cached_rows(evidence: Evidence) -> Sequence[Any] | None:
    value = evidence.options.get("cached_rows")
    artefacts = evidence.subject.artefacts
    if value is None and isinstance(artefacts, Mapping):
        value = next(
            (
                artefacts[key]
                for key in artefacts
                if any(word in str(key).lower() for word in ("cache", "formatted", "jsonl"))
            ),
            None,
        )
    if isinstance(value, (str, Path)):
        path = Path(value)
        files = [path] if path.is_file() else sorted(path.glob("*.jsonl")) if path.is_dir() else []
        if files:
            return [json.loads(line) for line in files[0].read_text(encoding="utf-8").splitlines() if line.strip()]
        return None
    if value is not None and hasattr(value, "__getitem__") and not isinstance(value, Mapping):
        return value
    if any(_has_messages(evidence.raw_row(one)) for one in evidence.annotations()[:3]):
        return [evidence.raw_row(one) for one in evidence.annotations()]
    return None


CHECKS: tuple[Check, ...] = (
    *BOX_CHECKS,
    odd_boxes,
    exif,
    modes,
    stored_sizes,
    leakage,
    classes,
    order_in_targets,
    negatives,
    names_of_fields,
    small_objects,
    stale_rows,
)
"""All checks of stage data."""

"""Checks of how boxes are read and written: order, unit, the family's space, boxes left out, pictures changed without them.

When: the first of stage data. No torch. Three witnesses: which readings are valid at all; which lies on the objects
(contrast across
the sides of boxes, in the user's own pictures); and in which order and space the numbers of his targets lie on the true boxes.

Long, because four rows of the catalogue are told apart by one comparison of readings.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from vlmdet.boxes import FORMATS, Boxes, BoxFormat
from vlmdet.doctor.calls import NotAvailable, UserCodeError
from vlmdet.doctor.checks import Check, Outcome, check, found, looked, skipped
from vlmdet.doctor.evidence import Evidence
from vlmdet.doctor.findings import Finding
from vlmdet.doctor.gather.annotations import Annotation, open_stored
from vlmdet.doctor.gather.contrast import compare_readings
from vlmdet.doctor.gather.conversations import make_example, pictures_of
from vlmdet.doctor.gather.reading import Shown, better, invalid_share, read_as
from vlmdet.doctor.gather.text_boxes import Space, best_iou, boxes_in, corners_of, paired_iou
from vlmdet.doctor.pictures import drawn
from vlmdet.images import BROKEN

ROTATED = {"xyxy": "yxyx", "yxyx": "xyxy"}
NATIVE = {
    "qwen2_vl": ("xyxy", "per_mille"),
    "qwen3_vl": ("xyxy", "per_mille"),
    "qwen2_5_vl": ("xyxy", "resized"),
    "qwen_vl": ("xyxy", "per_mille"),
    "paligemma": ("yxyx", "bins"),
    "florence2": ("xyxy", "per_mille"),
    "internvl": ("xyxy", "per_mille"),
}
"""Model type to the order and unit that it writes (../shared/design/peers.md, section 2)."""

_Y_FIRST = re.compile(
    r"y_?1\W{1,4}x_?1|y_?min\W{1,4}x_?min|top\W{1,4}left\W{1,4}bottom|yxyx|y0\W{1,4}x0", re.IGNORECASE
)
_X_FIRST = re.compile(r"x_?1\W{1,4}y_?1|x_?min\W{1,4}y_?min|left\W{1,4}top\W{1,4}right|xyxy|x0\W{1,4}y0", re.IGNORECASE)
_SIZES = re.compile(r"xywh|\bwidth\b|\bw\W{1,3}h\b", re.IGNORECASE)
_UNITS = re.compile(r"pixel|absolute|normali[sz]ed|0\s*(?:to|-|–|\.\.)\s*1|relative|per.?cent", re.IGNORECASE)


def decided(evidence: Evidence) -> bool:
    """Do the pictures say which of the readings of undeclared boxes is true?"""
    return evidence.likely()[1]


def _names(first: BoxFormat, second: BoxFormat) -> str:
    """Return the id of taking the second format for the first."""
    if first.unit != second.unit:
        return "D03"
    return "D01" if ROTATED.get(first.order) == second.order else "D02"


@check("D01", "D02", "D03", needs=("rows|splits",))
def order_of_rows(evidence: Evidence) -> Outcome:
    """Are the stored boxes in the declared format?"""
    annotations = [one for one in evidence.annotations() if one.boxes is not None and len(one.boxes) and one.size]
    if not annotations:
        raise NotAvailable("rows with boxes and pictures or sizes")
    count = sum(len(one.boxes) for one in annotations if one.boxes is not None)
    declared = evidence.declared()
    if declared is None:
        for identifier in ("D01", "D02", "D03"):
            yield skipped(identifier, "box_format, the declared order and unit, or convert beside rows with boxes")
        return
    bad = invalid_share(annotations, declared)
    others = {one: invalid_share(annotations, one) for one in FORMATS if one != declared}
    shown = evidence.shown()
    contrast = _contrast(shown, declared)
    figures = f"{count} boxes of {len(annotations)} rows read as {declared}: {1 - bad:.1%} valid"
    finding = None
    highest = max(float(np.nan_to_num(one.boxes).max()) for one in annotations if one.boxes is not None)
    if declared.unit != "fraction" and highest <= 1.5:
        other = BoxFormat(declared.order, "fraction")
        finding = _misread(
            evidence, shown, declared, other, f"{figures}; the largest number of all is {highest:.3g}", 1.0
        )
    elif bad > 0.03 and count >= 3:
        refuted = {
            one for one, (ours, theirs, wins, number) in contrast.items() if better(theirs, ours, 1 - wins, number)
        }
        rank = sorted(
            others.keys() - refuted,
            key=lambda one: (
                others[one] > bad / 4,
                round(others[one], 2),
                one.unit != declared.unit,
                -contrast.get(one, (0, 0, 0, 0))[1],
            ),
        )
        best = rank[0] if rank else declared
        if best != declared and others[best] <= bad / 4 and others[best] < 0.05:
            # another unit makes few odd boxes valid whatever they are: it needs many, or the pictures' word
            noise = best.unit != declared.unit and bad < 0.5 and not better(*contrast.get(best, (0.0, 0.0, 0.0, 0)))
            strength = 0.5 if noise else min(1.0, 0.7 + bad)
            finding = _misread(
                evidence,
                shown,
                declared,
                best,
                f"{figures}; read as {best}: {1 - others[best]:.1%} valid",
                strength,
            )
    if finding is None:
        for other, (ours, theirs, wins, number) in sorted(contrast.items(), key=lambda item: -item[1][1]):
            if others[other] <= max(0.02, bad) and better(ours, theirs, wins, number):
                text = (
                    f"{figures}, but their sides do not lie on edges of the objects: mean contrast across the sides "
                    f"{ours:.0f} read as "
                    f"{declared}, {theirs:.0f} read as {other}, more on {wins:.0%} of {number} boxes"
                )
                finding = _misread(evidence, shown, declared, other, text, 0.9)
                break
    if finding is not None:
        yield finding
    for identifier in ("D01", "D02", "D03"):
        if finding is None or finding.id != identifier:
            yield looked(identifier, figures)


def _contrast(shown: Sequence[Shown], declared: BoxFormat) -> dict[BoxFormat, tuple[float, float, float, int]]:
    found_by = {}
    for other in FORMATS:
        if other != declared and shown:
            ours = [read_as(one.annotation, declared) for one in shown]
            theirs = [read_as(one.annotation, other) for one in shown]
            found_by[other] = compare_readings([one.pixels for one in shown], ours, theirs)
    return found_by


def _misread(
    evidence: Evidence, shown: Sequence[Shown], ours: BoxFormat, other: BoxFormat, text: str, certainty: float
) -> Finding:
    example = shown[0] if shown else None
    pictures: tuple[str, ...] = ()
    where = "the rows' boxes"
    if example is not None and example.annotation.boxes is not None:
        where = example.annotation.where
        text += (
            f"\n{where}: {np.round(example.annotation.boxes[0], 4).tolist()} in a picture of {example.annotation.size}"
        )
        pictures = (
            drawn(
                example.image,
                [
                    (f"as {ours}", read_as(example.annotation, ours)),
                    (f"as {other}", read_as(example.annotation, other)),
                ],
            ),
        )
    return found(
        _names(ours, other),
        where=where,
        evidence=text,
        cause=f"the boxes are declared as {ours}, and the file holds {other}",
        certainty=certainty,
        pictures=pictures,
    )


@check("D01", "D02", "D03", "D04", needs=("rows|splits",))
def space_of_targets(evidence: Evidence) -> Outcome:
    """Do the numbers of the targets lie on the true boxes, in the order and space of the model's family?"""
    space = evidence.space()
    if space is None:
        raise NotAvailable("targets with boxes beside annotated boxes")
    family = evidence.family()
    native = NATIVE.get(family)
    figures = f"{space.boxes} boxes of targets lie on the true ones as {space} (mean IoU {space.iou:.2f}"
    figures += f"; {space.runner_up}: {space.runner_up_iou:.2f})"
    prompts = " ".join({one.questions + (one.system or "") for one in evidence.examples()[:50]})
    example = next(one for one in evidence.examples() if boxes_in(one.written))
    shown = f"{figures}\n{example.where}: {example.written[:200]}"
    annotation = evidence.annotations()[example.index]
    if annotation.boxes is not None:
        shown += f"\nannotated: {np.round(annotation.boxes, 4).tolist()[:4]} in a picture of {annotation.size}"
    told: set[str] = set()
    sure = 1.0 if evidence.declared() is not None or decided(evidence) else 0.45
    if space.iou < 0.6:
        finding = _scaled(evidence, space, shown)
        if finding is not None:
            told.add(finding.id)
            yield finding
    else:
        wanted = _wanted_order(native, prompts, example.written)
        lead = space.iou - (space.runner_up_iou if space.runner_up.split("/")[0] != space.order else 0)
        if lead > 0.08 and {space.order, wanted} == {"xyxy", "yxyx"}:
            told.add("D01")
            yield found(
                "D01",
                where=example.where,
                evidence=shown,
                certainty=(0.95 if native else 0.7) * sure,
                cause=f"the targets are written {space.order}, and "
                + ("the question asks for" if _asked_order(prompts) else f"{family or 'the usual model'} writes")
                + f" {wanted}",
            )
        elif lead > 0.08 and space.order in ("xywh", "cxcywh") and not _SIZES.search(prompts):
            told.add("D02")
            yield found(
                "D02",
                where=example.where,
                evidence=shown,
                certainty=0.9 * sure,
                cause=f"the targets are written {space.order}, and models write corners",
            )
        finding = _wrong_space(space, native, family, prompts, example.where, shown)
        if finding is not None:
            told.add(finding.id)
            yield finding
    for identifier in ("D01", "D02", "D03", "D04"):
        if identifier == "D04" and not native:
            yield skipped("D04", "the model's family (settings['model_name'], processor or model)")
        elif identifier not in told:
            yield looked(identifier, figures)


def _asked_order(prompts: str) -> str:
    """Return the order that the questions ask for, "" where they say nothing or name both."""
    first = {name for name, words in (("yxyx", _Y_FIRST), ("xyxy", _X_FIRST)) if words.search(prompts)}
    return first.pop() if len(first) == 1 else ""


def _wanted_order(native: tuple[str, str] | None, prompts: str, written: str) -> str:
    """Return the order that targets should have: as asked for, else as the family writes in its own syntax."""
    asked = _asked_order(prompts)
    if asked:
        return asked
    if native is not None and (native[0] != "yxyx" or "<loc" in written):  # y first belongs to location tokens
        return native[0]
    return "xyxy"


def _wrong_space(
    space: Space, native: tuple[str, str] | None, family: str, prompts: str, where: str, shown: str
) -> Finding | None:
    if native is None or space.unit == native[1] or space.unit == "other":
        return None
    same = {"bins", "per_mille"}
    if {space.unit, native[1]} <= same and abs(space.iou - space.runner_up_iou) < 0.03:
        return None
    if space.unit == "given" and native[1] == "resized":
        return None  # the converter resizes, and writes pixels of what it gives
    if {space.unit, native[1]} <= {"pixel", "resized"} and abs(space.iou - space.runner_up_iou) < 0.03:
        return None  # pictures that are hardly resized
    if (
        "resized" in (space.unit, native[1])
        and space.runner_up == f"{native[0]}/{native[1]}"
        and space.runner_up_iou > 0.9
    ):
        return None
    identifier = "D03" if space.unit in ("pixel", "given", "fraction", "percent") else "D04"
    asked = bool(_UNITS.search(prompts)) and space.unit in ("pixel", "fraction", "percent")
    names = {
        "per_mille": "0-1000 of the picture",
        "bins": "0-1023",
        "fraction": "fractions 0-1",
        "percent": "per cent",
        "pixel": "pixels of the original picture",
        "given": "pixels of the picture that the converter gives",
        "resized": "pixels of the resized picture",
    }
    return found(
        identifier,
        where=where,
        evidence=shown,
        cause=f"the targets are {names.get(space.unit, space.unit)}, and {family} writes {names[native[1]]}",
        certainty=0.45 if asked else 0.9,
    )


def _scaled(evidence: Evidence, space: Space, shown: str) -> Finding | None:
    """Fit numbers of targets against the true pixels on each axis: a constant factor is a mistake of unit."""
    annotations, truth = evidence.annotations(), evidence.truth()
    rows = [
        (np.array([box.numbers for box in boxes_in(one.written)], float), truth[one.index], annotations[one.index].size)
        for one in evidence.examples()
    ]
    pairs = [
        (n, t * np.tile(s, 2)) for n, t, s in rows if t is not None and s is not None and len(n) == len(t) and len(n)
    ]
    if sum(len(n) for n, _ in pairs) < 4:
        return None
    numbers, pixels = (np.concatenate(part) for part in zip(*pairs, strict=True))
    best = None
    for order in ("xyxy", "yxyx", "xywh", "cxcywh"):
        read = corners_of(numbers, order)
        fits = []
        for axis in (0, 1):
            x, y = pixels[:, axis::2].ravel(), read[:, axis::2].ravel()
            if np.ptp(x) == 0:
                return None
            slope, offset = np.polyfit(x, y, 1)
            residual = float(np.std(y - slope * x - offset) / (np.std(y) + 1e-9))
            fits.append((slope, offset, residual))
        worst = max(fit[2] for fit in fits)
        if best is None or worst < best[1]:
            best = (order, worst, fits)
    order, residual, fits = best  # type: ignore[misc]
    if residual > 0.15:
        return None
    text = "; ".join(
        f"{name}: number = {slope:.4g} x pixels {offset:+.1f}"
        for name, (slope, offset, _) in zip("xy", fits, strict=True)
    )
    identifier = "D01" if order == "yxyx" else "D02" if order in ("xywh", "cxcywh") else "D03"
    return found(
        identifier,
        where="targets",
        evidence=f"{shown}\nfitted as {order}, {text}",
        certainty=0.85,
        cause="the numbers of the targets are the true pixels times a constant that is of no picture's size",
    )


@check("D12", needs=("rows|splits",))
def boxes_left_out(evidence: Evidence) -> Outcome:
    """Has each target as many boxes as its row?"""
    annotations = evidence.annotations()
    names = {label for one in annotations for label in one.labels if label}
    several = fewer = 0
    worst = None
    for one in evidence.examples():
        annotation = annotations[one.index]
        if annotation.boxes is None:
            continue
        wanted = len(annotation.boxes)
        asked = {label for label in names if label.lower() in one.questions.lower()}
        if asked and len(names) > 1 and any(label for label in annotation.labels):
            wanted = min(wanted, max(sum(label in asked for label in annotation.labels), 1))
        written = len(boxes_in(one.written))
        if wanted >= 2:
            several += 1
            if written < wanted:
                fewer += 1
                if worst is None or wanted - written > worst[1] - worst[2]:
                    worst = (one, wanted, written)
    if not several:
        raise NotAvailable("rows with several boxes beside their targets")
    if (
        worst is not None
        and fewer >= max(1, 0.1 * several)
        and any(boxes_in(one.written) for one in evidence.examples())
    ):
        one, wanted, written = worst
        yield found(
            "D12",
            where=one.where,
            certainty=min(1.0, 0.5 + fewer / several),
            evidence=f"{fewer} of {several} rows with several boxes have fewer in the target; {one.where} has {wanted} boxes "
            f"and its target {written}: {one.written[:300]}",
            cause="the converter writes some of the boxes only",
        )
    else:
        yield looked(
            "D12",
            f"{several} rows with several boxes, all of them in their targets"
            if not fewer
            else f"{several - fewer} of {several} rows",
        )


# ---- D09: pictures changed without their boxes ----------------------------------------------------------------------

_RED = (226, 32, 38)
PLACES = ((0.08, 0.12, 0.40, 0.35), (0.55, 0.10, 0.92, 0.30), (0.12, 0.55, 0.30, 0.93), (0.50, 0.60, 0.85, 0.88))


@check("D09", needs=("rows|splits", "convert"))
def picture_and_boxes(evidence: Evidence) -> Outcome:
    """Does the target follow the picture through the converter? A drawn rectangle must be where its box says."""
    template = next(
        (one for one in evidence.annotations() if one.boxes is not None and len(one.boxes) and one.picture), None
    )
    if template is None:
        raise NotAvailable("rows with a picture and boxes")
    wrong: list[tuple[tuple[float, ...], np.ndarray, np.ndarray, float, Image.Image]] = []
    fine = 0
    with tempfile.TemporaryDirectory(prefix="vlmdet-doctor-") as folder:
        for turn in range(8):
            place = PLACES[turn % len(PLACES)]
            row, image = _drawn_row(evidence, template, place, Path(folder) / f"{turn}.png")
            try:
                example = make_example(evidence.convert(row), "a drawn row", 0)
            except (UserCodeError, NotAvailable) as error:
                raise NotAvailable(f"a converter that takes a drawn row like its own ({error})") from error
            seen = _rectangle_in(pictures_of(example.raw))
            numbers = boxes_in(example.answer)
            if seen is None or len(numbers) != 1:
                continue
            where, size = seen
            iou = _agreement(evidence, np.array(numbers[0].numbers), where, image.size, size)
            if iou < 0.75:
                read = np.array(numbers[0].numbers, float)
                opened_picture = open_stored(pictures_of(example.raw)[0]).convert("RGB")
                wrong.append((place, where, read, iou, opened_picture))
            else:
                fine += 1
    if not wrong and not fine:
        raise NotAvailable("a converter whose picture and target can be read back")
    moved = [one for one in wrong if float(paired_iou(np.array([one[0]]), one[1][None])[0]) < 0.9]
    if wrong and (moved or fine):
        spot, where, read, iou, image = (moved or wrong)[0]
        yield found(
            "D09",
            where="your convert",
            evidence=f"a red rectangle drawn at {list(spot)} (fractions) is at {np.round(where, 3).tolist()} "
            "in the converted picture, and the "
            f"target says {read.tolist()} (IoU {iou:.2f}); so on {len(wrong)} of {len(wrong) + fine} drawn rows",
            cause="the converter changes the picture and not the boxes"
            if moved
            else "the converter changes the boxes and not the picture",
            pictures=(drawn(image, [("where it is", where[None])]),),
        )
    elif wrong:
        raise NotAvailable("targets in a space that is known (see D01 to D04)")
    else:
        yield looked("D09", f"{fine} drawn rectangles are where their targets say")


def _drawn_row(evidence: Evidence, one: Annotation, place: tuple[float, ...], file: Path) -> tuple[Any, Image.Image]:
    """Copy a raw row with a drawn picture of one red rectangle and its box in the row's own form."""
    # the same size as the row's own picture: sizes may be stored anywhere in the row, and for a converter they must be true
    width, height = one.size or (640, 480)
    scale = min(1.0, 1024 / max(width, height)) if one.stored is None else 1.0
    width, height = max(int(width * scale), 56), max(int(height * scale), 56)
    image = Image.new("RGB", (width, height), (238, 238, 232))
    box = np.array(place) * [width, height, width, height]
    ImageDraw.Draw(image).rectangle([float(v) for v in (*box[:2], *(box[2:] - 1))], fill=_RED)
    row = dict(evidence.raw_row(one))
    row[one.keys["picture"]] = _stored_like(row[one.keys["picture"]], image, file)
    box_format = evidence.declared() or evidence.likely_format()
    numbers = Boxes(np.array([place])).to_array(box_format, width, height)[0]
    values = [round(float(v)) for v in numbers] if box_format.unit != "fraction" else [float(v) for v in numbers]
    row = _with_one_box(row, one, values)
    for pair in (("width", "height"), ("image_width", "image_height"), ("img_width", "img_height")):
        if all(name in row for name in pair):
            row[pair[0]], row[pair[1]] = width, height
    return row, image


def _stored_like(value: Any, image: Image.Image, file: Path) -> Any:
    if isinstance(value, (list, tuple)):
        return [_stored_like(value[0], image, file)]
    if isinstance(value, Image.Image):
        return image
    image.save(file)
    if isinstance(value, Mapping):
        return {**value, "bytes": file.read_bytes() if value.get("bytes") is not None else None, "path": str(file)}
    if isinstance(value, (bytes, bytearray)):
        return file.read_bytes()
    if isinstance(value, np.ndarray):
        return np.asarray(image)
    return file if isinstance(value, Path) else str(file)


def _with_one_box(row: dict[str, Any], one: Annotation, values: list[Any]) -> dict[str, Any]:
    key = one.keys["boxes"]
    if "[]" in key:
        holder, inner = key.split("[].")
        first = dict(row[holder][0])
        old = first.get(inner)
        first[inner] = dict(zip(old, values, strict=False)) if isinstance(old, Mapping) else values
        if "area" in first:
            first["area"] = None
        return {**row, holder: [first]}
    holder, _, inner = key.rpartition(".")
    group = dict(row[holder]) if holder else dict(row)
    count = len(one.boxes) if one.boxes is not None else 0
    old = group[inner]
    single = (
        isinstance(old, (list, tuple, np.ndarray))
        and len(old) == 4
        and not isinstance(old[0], (list, tuple, np.ndarray, Mapping))
    )
    group[inner] = values if single and count == 1 else [values]
    if not single and isinstance(old, (list, tuple)) and old and isinstance(old[0], Mapping):
        changed = {**old[0]}
        for name in ("bbox", "box", "bbox_2d"):
            if name in changed:
                changed[name] = values
        group[inner] = [changed]
    for name, other in group.items():
        if (
            name != inner
            and isinstance(other, (list, tuple))
            and len(other) == count
            and not single
            and name not in ("image", "images", "messages")
        ):
            group[name] = list(other[:1])
    return {**row, holder: group} if holder else group


def _rectangle_in(pictures: Sequence[Any]) -> tuple[np.ndarray, tuple[int, int]] | None:
    """Find the red rectangle in a converted picture: fractions x1, y1, x2, y2, and the picture's size."""
    if len(pictures) != 1:
        return None
    try:
        image = open_stored(pictures[0]).convert("RGB")
    except (*BROKEN, AttributeError):
        return None
    pixels = np.asarray(image, dtype=np.int16)
    red = (pixels[..., 0] > 150) & (pixels[..., 1] < 110) & (pixels[..., 2] < 110)
    if red.sum() < 20:
        return None
    rows, columns = np.flatnonzero(red.any(axis=1)), np.flatnonzero(red.any(axis=0))
    box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], float)
    return box / np.tile(image.size, 2), image.size


def _agreement(
    evidence: Evidence, numbers: np.ndarray, where: np.ndarray, original: tuple[int, int], now: tuple[int, int]
) -> float:
    """Return the best IoU of a target's numbers with where the rectangle is, in any space that the picture's sizes allow."""
    from vlmdet.errors import VlmdetError
    from vlmdet.grounding.sizes import qwen_size

    scales = [np.full(4, 1000.0), np.full(4, 1024.0), np.full(4, 999.0), np.ones(4), np.full(4, 100.0)]
    for size in {original, now}:
        scales.append(np.tile(np.array(size, float), 2))
        low, high = evidence.limits()
        try:
            scales.append(
                np.tile(np.array(qwen_size(*size, min_pixels=low, max_pixels=high, factor=evidence.factor()), float), 2)
            )
        except VlmdetError:
            continue
    space = evidence.space()
    orders = [space.order] if space is not None and space.iou > 0.6 else ["xyxy", "yxyx", "xywh", "cxcywh"]
    return max(
        float(best_iou(where[None], corners_of(numbers[None], order) / scale)[0])
        for order in orders
        for scale in scales
    )


BOX_CHECKS: tuple[Check, ...] = (order_of_rows, space_of_targets, boxes_left_out, picture_and_boxes)

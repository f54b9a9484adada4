"""Checks of the rows as they lie there: names of fields, rows without objects, sizes of objects, stale rows; and the list of all.

When: first, and before every run. No torch: a data set is examined in seconds on any laptop. How boxes are read is in
`box_reading`,
pictures are in `data_pictures`, boxes and labels in `data_targets`. The module is also the example for authors of checks.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmdet.doctor.calls import NotAvailable, UserCodeError, place_of
from vlmdet.doctor.checks import Check, Outcome, check, found, looked, skipped
from vlmdet.doctor.checks.box_reading import BOX_CHECKS
from vlmdet.doctor.checks.data_pictures import PICTURE_CHECKS
from vlmdet.doctor.checks.data_targets import TARGET_CHECKS
from vlmdet.doctor.evidence import Evidence, every, processor_limits
from vlmdet.doctor.foreign import identifier_of
from vlmdet.doctor.gather.annotations import Annotation
from vlmdet.doctor.gather.conversations import text_of
from vlmdet.doctor.gather.reading import invalid_share
from vlmdet.doctor.gather.text_boxes import boxes_in

SPLIT_OPTIONS = ("train_split", "eval_split", "val_split", "validation_split", "test_split", "split")


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
        yield found(
            "D14",
            where=silent[0],
            evidence=f"{figures}; {len(silent)} of their targets are empty text",
            cause="the converter joins no boxes to an empty answer",
            severity=3,
        )
    elif dropped:
        yield found(
            "D14",
            where=place_of(evidence.subject.convert),
            evidence=f"{figures}; the converter leaves {dropped} of them out",
            cause="rows without objects do not come out of the converter",
            certainty=0.9,
        )
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
                    f"settings['{option}'] is {wanted!r}; splits: {', '.join(map(repr, splits))}"
                    f"{_near_name(wanted, list(splits))}",
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
                    f"{len(keys) - count} of {len(keys)} rows have no {key!r}; {first.where} has "
                    f"{sorted(map(str, evidence.splits()[first.split].raw(first.row)))}",
                    0.8,
                )
            )
    if evidence.subject.convert is not None:
        lines += _converter_names(evidence, annotations)
        yield from _other_errors(evidence)
    if lines:
        where, _, certainty = lines[0]
        severity = 3 if evidence.subject.convert is not None and any(line[2] >= 0.9 for line in lines) else 2
        yield found(
            "D15",
            where=where,
            evidence="; ".join(text for _, text, _ in lines),
            cause="a name was guessed, or differs between rows or splits",
            certainty=certainty,
            severity=severity,
        )
    else:
        yield looked("D15", f"{len(keys)} rows with {', '.join(sorted(map(str, common)))}; splits {', '.join(splits)}")


def _converter_names(evidence: Evidence, annotations: Sequence[Annotation]) -> list[tuple[str, str, float]]:
    lines: list[tuple[str, str, float]] = []
    try:
        examples, errors = evidence.converted()
    except UserCodeError as raised:
        examples, errors = [], [raised]
    except NotAvailable:
        return []
    for error in [one for one in errors if identifier_of(one) == "D15"][:1]:
        row = next((one for one in annotations if one.where == error.subject), annotations[0])
        names = sorted(map(str, evidence.splits()[row.split].raw(row.row)))
        hint = (
            _near_name(str(error.error.args[0]), names)
            if isinstance(error.error, KeyError) and error.error.args
            else ""
        )
        lines.append(
            (
                f"{error.where}, on {error.subject}",
                f"the converter raised {error.text} on {len(errors)} rows at {error.where}: {error.line}; "
                f"the row has {', '.join(names)}{hint}",
                1.0,
            )
        )
    boxed = [one for one in examples if (boxes := annotations[one.index].boxes) is not None and len(boxes)]
    if len(boxed) >= 3 and not any(boxes_in(one.written) for one in boxed) and len({one.written for one in boxed}) == 1:
        lines.append(
            (
                boxed[0].where,
                f"none of {len(boxed)} targets holds a box, and all their rows do; {boxed[0].where} has boxes under "
                f"{annotations[boxed[0].index].keys.get('boxes')!r}, its target is {boxed[0].answer[:80]!r}",
                0.95,
            )
        )
    return lines


def _other_errors(evidence: Evidence) -> Outcome:
    """Tell what the converter raised on some rows that says something else than a wrong name: modes, odd sizes."""
    try:
        errors = evidence.converted()[1]
    except (UserCodeError, NotAvailable):
        return  # on all rows: told by whoever asks for examples
    kinds: dict[str, list[UserCodeError]] = {}
    for error in errors:
        kinds.setdefault(identifier_of(error), []).append(error)
    for identifier, group in kinds.items():
        if identifier != "D15":
            yield found(
                identifier,
                where=f"{group[0].where}, on {group[0].subject}",
                evidence=f"the converter raised on {len(group)} rows: {group[0].text}; {group[0].line}",
                cause=f"your convert raised {group[0].text}",
            )


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
        yield found(
            "D17",
            where=odd[0].where,
            evidence=f"{len(odd)} of {len(annotations)} pictures are over 200 times as long as wide or under 28 pixels, e.g. "
            f"{odd[0].where}: {odd[0].size}",
            cause="smart_resize refuses such sizes",
        )
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
    figures = (
        f"{share:.0%} of {len(sides)} boxes have a side under one image token ({factor} pixels) at max_pixels "
        f"{int(asked):,}; median side {np.median(sides):.0f}"
    )
    if (
        share > 0.2
        and (declared := evidence.declared() or evidence.likely_format())
        and invalid_share(annotations, declared) < 0.2
    ):
        yield found(
            "D16",
            where="max_pixels",
            evidence=figures,
            cause="pictures are shrunk below what the objects need",
            severity=3 if share >= 0.4 else 2,
            certainty=min(1.0, 0.5 + share),
        )
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
        old = raw if _has_messages(raw) else by_id.get(_id_of(raw) or "")
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
    *TARGET_CHECKS,
    *PICTURE_CHECKS,
    negatives,
    names_of_fields,
    small_objects,
    stale_rows,
)
"""All checks of stage data."""

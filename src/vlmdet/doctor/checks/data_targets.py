"""Checks of boxes and labels, as stored and as targets hold them: odd boxes, classes, order.

When: a part of stage data. No torch.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlmdet.doctor.calls import NotAvailable, UserCodeError
from vlmdet.doctor.checks import Check, Outcome, check, found, looked
from vlmdet.doctor.evidence import Evidence
from vlmdet.doctor.gather.text_boxes import boxes_in, labels_in, paired_iou


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
        yield found(
            "D05",
            where=next(iter(kinds.values()))[0].split(":")[0],
            evidence=f"{total} boxes: " + "; ".join(lines),
            cause="annotation noise, or numbers cut and not clipped",
            certainty=min(1.0, 0.6 + share * 4),
        )
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
        texts = boxes_in(one.written)
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
        yield found(
            "D11",
            where=where,
            evidence="; ".join(lines),
            cause="targets hold classes that the question does not name, or labels are spelt in several ways",
            certainty=certainty,
        )
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


MOST_CLASSES = 200
"""Names that targets write, at most, to take them for classes and not for descriptions."""
_EXAMPLE = re.compile(r"\{[^{}]*\}|\b(?:such as|e\.g\.|for example|for instance|including)[^?!\n]*", re.IGNORECASE)
_ANYTHING = ("object", "objects", "thing", "item", "label", "box", "image", "picture", "photo", "class")
"""Words that questions hold whatever they ask for."""


def _other_classes(evidence: Evidence, names: list[str]) -> tuple[int, int, str] | None:
    try:
        examples = evidence.examples()
    except (NotAvailable, UserCodeError):
        return None
    annotations = evidence.annotations()
    wrong = seen = 0
    text = ""
    named = {name for name in names if len(name) >= 2 and not name.isdigit()}
    written = set().union(*(labels_in(one.written) for one in examples))
    # rows may hold numbers for classes: the targets say their names
    known = named | (written if len(written) <= MOST_CLASSES else set())
    words = sorted((name for name in known if len(name) >= 2 and name.lower() not in _ANYTHING), key=len, reverse=True)
    for one in examples:
        # the question decides, and the system's list of all classes only where it names none; examples ask for nothing
        asked = _named(_EXAMPLE.sub(" ", one.questions), words) or _named(_EXAMPLE.sub(" ", one.system or ""), words)
        answered = _named(one.written, words)
        if not answered:
            continue
        labels = {label for label in annotations[one.index].labels if label in named}
        seen += 1
        beyond = (answered - asked if asked else set()) or (answered - labels if labels else set())
        if beyond:
            wrong += 1
            annotated = sorted({label for label in annotations[one.index].labels if label})
            text = (
                text
                or f"{one.where}: asked {one.questions[:120]!r}, annotated {annotated}, target {one.written[:160]!r}"
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
        numbers = np.array([box.numbers for box in boxes_in(one.written)], float)
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
        yield found(
            "D13",
            where=rows[0][1].where,
            evidence=f"{figures}, the best of {len(keys)} keys; {rows[0][1].answer[:300]}",
            cause="boxes are written in the order of the annotations, which is arbitrary",
            certainty=0.6,
        )
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
            names = sorted({label or "" for label in labels}, key=one.answer.find)
            start = 0
            for name in names:
                count = sum((label or "") == name for label in labels)
                values = key(numbers[start : start + count])
                good, total = good + int((np.diff(values) >= 0).sum()), total + max(count - 1, 0)
                start += count
        if total >= 10:
            best = max(best, good / total)
    return best


TARGET_CHECKS: tuple[Check, ...] = (odd_boxes, classes, order_in_targets)

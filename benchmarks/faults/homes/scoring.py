"""Metrics as users write them: F1 at an overlap of one half, and the mean of best overlaps, one to one."""

from __future__ import annotations

from typing import Any


def overlap(a: Any, b: Any) -> float:
    """Intersection over union of two boxes x1, y1, x2, y2."""
    left, top = max(a[0], b[0]), max(a[1], b[1])
    right, bottom = min(a[2], b[2]), min(a[3], b[3])
    inter = max(0.0, right - left) * max(0.0, bottom - top)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return inter / union if union > 0 else 0.0


def f1(predictions: Any, truths: Any) -> dict[str, float]:
    """F1 over all pictures; every truth is found at most once."""
    hits = extra = missed = 0
    for boxes, wanted in zip(predictions, truths, strict=True):
        free = list(range(len(wanted)))
        for box in boxes:
            best = max(free, key=lambda place: overlap(box, wanted[place]), default=None)
            if best is not None and overlap(box, wanted[best]) >= 0.5:
                hits += 1
                free.remove(best)
            else:
                extra += 1
        missed += len(free)
    precision = hits / (hits + extra) if hits + extra else 1.0
    recall = hits / (hits + missed) if hits + missed else 1.0
    both = precision + recall
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / both if both else 0.0}


def labelled_f1(predictions: Any, truths: Any) -> float:
    """F1 of boxes with labels; a box of another label is no hit."""
    hits = total = 0
    for found, wanted in zip(predictions, truths, strict=True):
        left = list(wanted)
        total += len(found) + len(wanted)
        for item in found:
            same = [t for t in left if t["label"] == item["label"] and overlap(item["bbox"], t["bbox"]) >= 0.5]
            if same:
                best = max(same, key=lambda t: overlap(item["bbox"], t["bbox"]))
                left = [t for t in left if t is not best]
                hits += 1
    return 2 * hits / total if total else 1.0


def mean_overlap(predictions: Any, truths: Any) -> float:
    """Mean over pictures of the sum of matched overlaps divided by the larger number of boxes."""
    values = []
    for boxes, wanted in zip(predictions, truths, strict=True):
        if not boxes and not wanted:
            values.append(1.0)
            continue
        pairs = sorted(((overlap(b, w), i, j) for i, b in enumerate(boxes) for j, w in enumerate(wanted)), reverse=True)
        used_b: set[int] = set()
        used_w: set[int] = set()
        total = 0.0
        for value, i, j in pairs:
            if i not in used_b and j not in used_w:
                used_b.add(i)
                used_w.add(j)
                total += value
        values.append(total / max(len(boxes), len(wanted)))
    return sum(values) / len(values)

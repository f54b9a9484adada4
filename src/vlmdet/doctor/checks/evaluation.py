"""Checks of the stage evaluation: does the parser read the targets back, is the metric one, are both models asked alike?

When: WHEN WRONG. The metric is called on predictions of known worth (`metric_probe`), the parser on the user's own targets
(`round_trip`); what a finished run shows is looked at in `run_logs`.

Long, because each way in which a parser can misread is told apart from the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vlmdet.doctor.calls import NotAvailable, UserCodeError, call, place_of
from vlmdet.doctor.checks import Check, Outcome, check, found, looked, run_logs, skipped
from vlmdet.doctor.checks.metric_probe import Picture, probe_metric
from vlmdet.doctor.checks.round_trip import ReadBack, Target, read_back
from vlmdet.doctor.gather.text_boxes import boxes_in, corners_of

if TYPE_CHECKING:
    from vlmdet.doctor.evidence import Evidence

ROWS = 200
"""Targets that are read back, at most; all with several boxes come first."""

GOOD = 0.85
"""Mean IoU of target and reading from which a box counts as read back: above what rounding costs but the smallest boxes."""

_METRIC = {
    "E01": "an exception of one picture is caught and becomes a number: a broken evaluation looks like a bad model",
    "E02": "one box of each picture is looked at, so repeats and misses cost nothing",
    "E09": "the metric does not measure overlap: axes are swapped, sides are read as corners, or a box is compared with itself",
    "E10": "several predictions are matched to one true box",
    "E12": "pictures without a prediction are left out of the mean, so a parser that fails more scores higher",
    "E15": "labels are not compared, so a box of the wrong class counts as found",
}


@check("E01", "E02", "E09", "E10", "E12", "E15", needs=("metric",))
def metric_of_known_worth(evidence: Evidence) -> Outcome:
    """Call the metric on perfect, empty, swapped, moved, doubled, renamed and raising predictions."""
    metric = evidence.need("metric")
    faults, told = probe_metric(metric, _own_pictures(evidence))
    for fault in faults:
        more = {"severity": 2, "certainty": 0.6} if fault.meant else {}
        yield found(
            fault.id, where=place_of(metric), evidence=f"{fault.evidence}\n{told}", cause=_METRIC[fault.id], **more
        )
    for identifier in set(_METRIC) - {fault.id for fault in faults}:
        yield looked(identifier, told)


def _own_pictures(evidence: Evidence) -> list[Picture]:
    """Return boxes of some of the user's rows, as they stand in them; [] where there are none that fit."""
    try:
        annotations, truth, declared = (
            evidence.annotations(),
            evidence.truth(),
            evidence.declared() or evidence.likely_format(),
        )
    except (NotAvailable, UserCodeError):
        return []
    pictures: list[Picture] = []
    for one, boxes in zip(annotations, truth, strict=True):
        if boxes is None or not len(boxes) or one.boxes is None or str(declared).partition("/")[0] != "xyxy":
            continue
        wide = (boxes[:, 2:] - boxes[:, :2] > 0.02).all()
        apart = np.abs(boxes[:, [0, 2]] - boxes[:, [1, 3]]).min() > 0.02
        inside = bool((boxes >= 0).all() and (boxes <= 1).all())
        if wide and apart and inside and len(boxes) <= 6 and _separate(boxes):
            pictures.append(
                [(label or "object", tuple(box)) for label, box in zip(one.labels, one.boxes.tolist(), strict=True)]
            )
        if len(pictures) == 12:
            break
    return pictures


def _separate(boxes: np.ndarray) -> bool:
    low, high = np.maximum(boxes[:, None, :2], boxes[None, :, :2]), np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    inner = np.clip(high - low, 0, None).prod(axis=2)
    return bool((inner[~np.eye(len(boxes), dtype=bool)] == 0).all())


@check("E03", "E04", "E05", "E14", "E17", needs=("parse",))
def targets_read_back(evidence: Evidence) -> Outcome:
    """Write a target, decode it as the evaluation does, parse it, and compare with the boxes that it was written from."""
    parse = evidence.need("parse")
    targets = _targets(evidence)
    raw = read_back(parse, targets)
    where, told = place_of(parse), _told(raw)
    if _lost(raw):
        yield from _not_read(raw, where, told)
        return
    lost = False
    for identifier, name, texts in _decoded(evidence, targets):
        again = read_back(parse, [_with(target, text) for target, text in zip(targets, texts, strict=True)])
        if _lost(again):
            lost = True
            target, got = again.worst
            yield found(
                identifier, where=where, cause=f"{name} deletes what the parser looks for",
                evidence=f"target   {_find(targets, target).text}\ndecoded  {target.text}\nparsed   {got}\n{_told(again)}",
            )  # fmt: skip
            if identifier == "E03":
                yield found(
                    "E05", where=where, evidence=f"without special tokens: {target.text}", certainty=0.7, consequence_of="E03",
                    cause="a server skips special tokens unless told otherwise, and the parser needs them",
                )  # fmt: skip
        else:
            yield looked(identifier, _told(again))
    if lost:
        return
    if evidence.subject.processor is None:
        yield skipped("E05", "a processor, and decode or the server's skip_special_tokens")
    yield from _space_of(raw, where, told)
    for identifier in ("E03", "E04"):
        yield looked(identifier, told)


def _lost(read: ReadBack) -> bool:
    """Tell whether boxes are missing, or lie under no reading where they were written."""
    return read.found < read.wanted * 0.98 or read.iou < GOOD or bool(read.failure)


def _told(read: ReadBack) -> str:
    space = f"as {read.space}, mean IoU {read.iou:.3f}" if read.space is not None else "no box came back"
    return f"{read.found} of {read.wanted} boxes of {len(read.per_row)} targets read back, {space}" + (
        f"; it raised {read.failure}" if read.failure else ""
    )


def _not_read(read: ReadBack, where: str, told: str) -> Outcome:
    target, got = read.worst
    evidence = f"target   {target.text}\nparsed   {got}\n{told}"
    some = [(have, want) for have, want in read.per_row if want > 1]
    first = (
        bool(some) and all(have == 1 for have, _ in some) and all(have == 1 for have, want in read.per_row if want == 1)
    )
    if misread := _misread(read):
        yield found("E17", where=where, evidence=evidence, cause=misread, severity=3)
        return
    if first:
        yield found("E04", where=where, evidence=evidence, cause="the parser stops after the first box")
    elif read.found == 0:
        yield found(
            "E03",
            where=where,
            evidence=evidence,
            cause="the parser does not know the form in which the targets are written",
        )
    elif read.found < read.wanted * 0.98:
        yield found(
            "E04",
            where=where,
            evidence=evidence,
            cause="the parser knows only some of the forms in which boxes are written",
        )
    elif read.failure:
        yield found("E03", where=where, evidence=evidence, cause="the parser raises on targets of the training itself")
    elif read.space is not None and read.space.iou >= 0.35:
        yield found(
            "E14",
            where=where,
            evidence=evidence,
            cause="boxes come back moved or scaled: turned by another size than they were written for",
        )
    else:
        yield found("E03", where=where, evidence=evidence, cause="the parser reads numbers, and not those of the boxes")


def _misread(read: ReadBack) -> str:
    """Tell which wrong reading of the targets' numbers explains what came back; "" where none does."""
    if read.found < read.wanted * 0.98 or read.failure:
        return ""
    readings = {
        "corners are read as x, y, width and height": lambda n: np.concatenate([n[:, :2], n[:, :2] + n[:, 2:]], axis=1),
        "corners are read as a centre and sides": lambda n: np.concatenate(
            [n[:, :2] - n[:, 2:] / 2, n[:, :2] + n[:, 2:] / 2], axis=1
        ),
        "far corners are turned into sides": lambda n: np.concatenate([n[:, :2], n[:, 2:] - n[:, :2]], axis=1),
    }
    for cause, reading in readings.items():
        if all(_alike(parsed, reading(target.boxes)) for target, parsed in zip(read.targets, read.parsed, strict=True)):
            return cause
    swapped = [
        [_alike(box[None], true[None]) for box, true in zip(parsed, target.boxes[:, [1, 0, 3, 2]], strict=True)]
        for target, parsed in zip(read.targets, read.parsed, strict=True)
        if len(parsed) == len(target.boxes)
    ]
    kept = [
        [_alike(box[None], true[None]) for box, true in zip(parsed, target.boxes, strict=True)]
        for target, parsed in zip(read.targets, read.parsed, strict=True)
        if len(parsed) == len(target.boxes)
    ]
    both = [one or other for a, b in zip(swapped, kept, strict=True) for one, other in zip(a, b, strict=True)]
    turned = sum(one and not other for a, b in zip(swapped, kept, strict=True) for one, other in zip(a, b, strict=True))
    if both and np.mean(both) > 0.9 and turned:
        return f"x and y of {turned} of {len(both)} boxes are swapped: the order is guessed from the numbers"
    return ""


def _alike(parsed: np.ndarray, wanted: np.ndarray) -> bool:
    """Tell whether boxes are others times one factor for x and one for y, whatever those are."""
    if parsed.shape != wanted.shape or not len(parsed):
        return False
    for axis in (0, 1):
        one, other = parsed[:, [axis, axis + 2]].ravel(), wanted[:, [axis, axis + 2]].ravel()
        factor = float(one @ other / max(other @ other, 1e-12))
        if factor <= 0 or np.abs(one - factor * other).max() > 0.03 * factor * max(np.abs(other).max(), 1e-9):
            return False
    return True


def _space_of(read: ReadBack, where: str, told: str) -> Outcome:
    """Judge order and space in which boxes come back, where they do."""
    assert read.space is not None
    target, got = read.worst
    evidence = f"target   {target.text}\nparsed   {got}\n{told}"
    if read.space.order != "xyxy" and read.space.iou - read.space.runner_up_iou > 0.1:
        yield found(
            "E17",
            where=where,
            evidence=evidence,
            cause=f"boxes come back as {read.space.order}, not as xyxy",
            severity=3,
        )
    else:
        yield looked("E17", told)
    if read.space.unit == "resized" and read.space.iou - read.space.runner_up_iou > 0.02:
        yield found(
            "E14", where=where, evidence=evidence,
            cause="boxes come back in pixels of the resized picture, and the truth is in those of the original",
            certainty=0.8,
        )  # fmt: skip
    else:
        yield looked("E14", told)


def _targets(evidence: Evidence) -> list[Target]:
    """Return targets with boxes and what they were written from: the true ones, or their own numbers where those are unknown."""
    examples = evidence.examples()
    annotations = evidence.annotations()
    try:
        truth: list[Any] = list(evidence.truth())
    except NotAvailable:
        truth = [None] * len(annotations)
    space = evidence.space() if any(one is not None for one in truth) else None
    # a target whose own boxes are wrong is the fault of an earlier stage: then the parser is held to its numbers
    trusted = space is not None and space.iou > GOOD
    targets = []
    for one in sorted(examples, key=lambda example: -len(boxes_in(example.answer))):
        annotation, numbers = annotations[one.index], [box.numbers for box in boxes_in(one.answer)]
        boxes = truth[one.index] if trusted else None
        if boxes is None:
            boxes = _fractions(np.asarray(numbers, dtype=np.float64).reshape(-1, 4), space)
        if not numbers or len(boxes) != len(numbers) or annotation.size is None:
            continue
        targets.append(Target(one.where, one.answer, *annotation.size, evidence.size_seen(annotation), boxes))
        if len(targets) == ROWS:
            break
    if not targets:
        raise NotAvailable("targets that hold boxes, and the sizes of their pictures")
    return targets


def _fractions(numbers: np.ndarray, space: Any) -> np.ndarray:
    """Bring numbers of a target to fractions as they stand, on a grid of 1,000 unless all are below 1."""
    corners = corners_of(numbers, space.order) if space is not None and space.unit != "other" else numbers
    return corners if not len(corners) or np.abs(corners).max() <= 1.5 else corners / 1000.0


def _with(target: Target, text: str) -> Target:
    return Target(target.row, text, target.width, target.height, target.resized, target.boxes)


def _find(targets: list[Target], target: Target) -> Target:
    return next(one for one in targets if one.row == target.row)


def _decoded(evidence: Evidence, targets: list[Target]) -> list[tuple[str, str, list[str]]]:
    """Return targets as the evaluation and as a server decode their ids: id of the check, by what, texts."""
    if evidence.subject.processor is None:
        return []
    tokenizer = evidence.tokenizer
    ids = [tokenizer(target.text, add_special_tokens=False)["input_ids"] for target in targets]
    ways = []
    decode, options = evidence.subject.decode, evidence.options
    if decode is not None:
        ends = sorted(evidence.end_ids())[:1]
        ways.append(("E03", place_of(decode), [_decode(decode, [*one, *ends]) for one in ids]))
    for phase in ("serve", None):
        if options.get("skip_special_tokens", phase=phase) and (phase or decode is None):
            shown = options.shown("skip_special_tokens", phase=phase)
            ways.append(("E05", shown, [tokenizer.decode(one, skip_special_tokens=True) for one in ids]))
            break
    return ways


def _decode(decode: Any, ids: list[int]) -> str:
    """Call the user's decode with ids of one answer: a list, else a tensor, else a batch of one."""
    import torch

    failure: UserCodeError | None = None
    for given in (ids, torch.tensor(ids), torch.tensor([ids]), [ids]):
        try:
            text = call("decode", decode, given)
        except UserCodeError as error:
            failure = failure or error
            continue
        if isinstance(text, (list, tuple)) and len(text) == 1:
            text = text[0]
        if isinstance(text, str):
            return text
    if failure is not None:
        raise failure
    raise NotAvailable("a decode that returns text")


@check("E06", needs=("settings", "processor"))
def room_for_answers(evidence: Evidence) -> Outcome:
    """Compare the limit of generated tokens with the lengths of the targets."""
    limit = evidence.options.number("max_new_tokens", phase="eval") or evidence.options.number("max_new_tokens")
    if limit is None:
        raise NotAvailable("max_new_tokens in the settings")
    tokenizer = evidence.tokenizer
    lengths = np.asarray(
        [len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in evidence.targets()]
    )
    longest = int(np.percentile(lengths, 99))
    over = int((lengths > limit).sum())
    told = (
        f"{evidence.options.shown('max_new_tokens')}; targets with their end token: median {np.median(lengths):.0f}, "
        f"p99 {longest}, max {lengths.max()}"
    )
    if over:
        yield found(
            "E06", where=evidence.options.shown("max_new_tokens"), evidence=f"{told}; {over} of {len(lengths)} do not fit",
            cause="an answer that is as long as its target is cut, and its last box lost",
        )  # fmt: skip
    else:
        yield looked("E06", told)


@check("E13", needs=("settings|model",))
def greedy(evidence: Evidence) -> Outcome:
    """Look whether answers are drawn at random where they are scored."""
    options = evidence.options
    sample = options.get("do_sample", phase="eval")
    sample = options.get("do_sample") if sample is None else sample
    heat = options.number("temperature", phase="eval") or options.number("temperature")
    if sample is None:
        config = getattr(evidence.subject.model, "generation_config", None)
        sample = getattr(config, "do_sample", None)
        if sample:
            yield found(
                "E13", where="model.generation_config", cause="generate takes what the checkpoint's generation_config says",
                evidence=f"do_sample={sample}, temperature={getattr(config, 'temperature', 1)}; no setting says otherwise",
            )  # fmt: skip
            return
    if sample is True or (sample is None and heat not in (None, 0, 0.0)):
        yield found(
            "E13", where=options.shown("do_sample"), evidence=f"{options.shown('do_sample')}, {options.shown('temperature')}",
            cause="the same model scores otherwise at each run",
        )  # fmt: skip
    elif sample is None and heat is None:
        raise NotAvailable("do_sample or temperature in the settings")
    else:
        yield looked("E13", f"{options.shown('do_sample')}, {options.shown('temperature')}")


_SAME = (
    "min_pixels",
    "max_pixels",
    "system_prompt",
    "user_prompt",
    "dtype",
    "max_new_tokens",
    "do_sample",
    "load_in_4bit",
)


@check("E08", needs=("settings",))
def base_asked_alike(evidence: Evidence) -> Outcome:
    """Compare the settings under which the base was scored with those of the tuned model."""
    options = evidence.options
    differ: list[str] = []
    same: list[str] = []
    for name in _SAME:
        base = options.get(name, phase="base")
        tuned = next(
            (value for phase in ("eval", "train") if (value := options.get(name, phase=phase)) is not None),
            options.get(name),
        )
        if base is None or tuned is None:
            continue
        (same if base == tuned else differ).append(f"{name}: base {base!r}, tuned {tuned!r}")
    if differ:
        yield found(
            "E08", where="settings", evidence="\n".join(differ),
            cause="base and tuned model are scored under different conditions, so the gain is not the training's",
        )  # fmt: skip
    elif same:
        yield looked("E08", "; ".join(same))
    else:
        raise NotAvailable(
            "settings of the base's evaluation (base_max_pixels, base_user_prompt, …) beside the tuned model's"
        )


CHECKS: tuple[Check, ...] = (
    metric_of_known_worth,
    targets_read_back,
    room_for_answers,
    greedy,
    base_asked_alike,
    *run_logs.CHECKS,
)

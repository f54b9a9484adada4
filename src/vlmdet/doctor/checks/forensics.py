"""What a finished run's own logs and answers say about the mistake behind them.

When: WHEN WRONG, after a run of any trainer; numpy only. Pure functions: from a `trainer_state.json` as it is, and from answers
that `gather` has brought into one form. Each returns catalogue ids with the figures that show them, the likeliest first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vlmdet.doctor.gather.answers import Answered
from vlmdet.doctor.gather.text_boxes import best_iou


class Clue(NamedTuple):
    """One id of the catalogue, the figures that point to it, and how surely (0 to 1)."""

    id: str
    evidence: str
    certainty: float = 1.0


# ---- trainer_state.json ---------------------------------------------------------------------------------------------


def curve(log: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values of one logged figure, in order; what is no number is NaN."""
    pairs = [(row.get("step", i), _number(row[key])) for i, row in enumerate(log) if key in row]
    steps = np.asarray([step for step, _ in pairs], dtype=np.float64)
    return steps, np.asarray([value for _, value in pairs], dtype=np.float64)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def look_at_log(log: Sequence[Mapping[str, Any]], settings: Mapping[str, Any] | None = None) -> list[Clue]:
    """Read a trainer's `log_history`.

    Input: the list as `trainer_state.json` has it; the user's settings, where known, for `learning_rate`.
    Output: clues: frozen losses (O10, M01), no trend (O01), numbers that are none (O03), over-training (O02), a loss that falls
    while the task's own figure falls too (O08).
    """
    clues: list[Clue] = []
    _, loss = curve(log, "loss")
    _, evaluated = curve(log, "eval_loss")
    _, norms = curve(log, "grad_norm")
    broken = [
        name for name, values in (("loss", loss), ("eval_loss", evaluated), ("grad_norm", norms)) if not _finite(values)
    ]
    if broken:
        first = next(
            (
                row.get("step", "?")
                for row in log
                for name in broken
                if name in row and not math.isfinite(_number(row[name]))
            ),
            "?",
        )
        clues.append(Clue("O03", f"{', '.join(broken)} is no finite number from step {first} on"))
    frozen = _frozen(evaluated)
    if frozen:
        shown = ", ".join(f"{value:.6f}" for value in evaluated[:4])
        zero = len(norms) > 0 and bool((norms == 0).all())
        more = "; grad_norm is 0 at every step" if zero else ""
        clues.append(Clue("O10", f"{len(evaluated)} evaluation losses are equal to six decimals: {shown}{more}", 0.95))
        clues.append(Clue("M01", f"evaluation loss constant to six decimals ({shown}){more}: nothing trains", 0.9))
    elif len(loss) >= 4 and len(norms) >= 3 and bool((norms == 0).all()) and not broken:
        clues.append(Clue("O10", f"grad_norm is 0 at all {len(norms)} logged steps", 0.9))
        clues.append(
            Clue(
                "M01", f"grad_norm is 0 at all {len(norms)} logged steps: nothing that the loss depends on trains", 0.9
            )
        )
    elif len(loss) >= 4 and bool((loss == 0).all()):
        clues.append(
            Clue("L02", f"the training loss is exactly 0 at all {len(loss)} logged steps: no token is supervised", 0.95)
        )
    if not frozen and not broken and len(loss) >= 8 and (clue := _flat(loss, log, settings or {})):
        clues.append(clue)
    if len(evaluated) >= 3 and not frozen and not broken:
        lowest = int(evaluated.argmin())
        if (
            lowest < len(evaluated) - 1
            and evaluated[-1] > evaluated[lowest] * 1.25
            and len(loss)
            and loss[-1] < loss[0] / 2
        ):
            clues.append(
                Clue(
                    "O02",
                    f"the evaluation loss rises from {evaluated[lowest]:.3f} to {evaluated[-1]:.3f} while the training loss "
                    f"falls to {loss[-1]:.3f}",
                    0.85,
                )
            )
    clues.extend(_task(log, evaluated))
    return clues


def _finite(values: np.ndarray) -> bool:
    return bool(np.isfinite(values).all())


def _frozen(values: np.ndarray) -> bool:
    """Tell whether three evaluations or more gave one value to six decimals."""
    return len(values) >= 3 and _finite(values) and float(np.ptp(values)) < 1e-6


def _flat(loss: np.ndarray, log: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Clue | None:
    """Find a training loss without a trend: its last third no lower than its first, within the noise."""
    third = max(len(loss) // 3, 2)
    first, last = loss[:third], loss[-third:]
    noise = float(np.sqrt(first.var(ddof=1) / third + last.var(ddof=1) / third)) if third > 1 else 0.0
    fall = float(first.mean() - last.mean())
    if fall > max(2 * noise, 0.05 * abs(float(first.mean()))) or first.mean() < 0.05:
        return None
    rates = curve(log, "learning_rate")[1]
    rate = float(np.nanmax(rates)) if len(rates) and _finite(rates) else _number(settings.get("learning_rate"))
    told = f", at a learning rate of at most {rate:.1e}" if math.isfinite(rate) else ""
    evidence = (
        f"the training loss goes from {first.mean():.3f} to {last.mean():.3f} over {len(loss)} logged steps{told}"
    )
    return Clue("O01", evidence, 0.9 if math.isfinite(rate) and rate < 5e-5 else 0.7)


_TASK = ("iou", "f1", "map", "ap50", "recall", "precision", "accuracy", "acc", "detection")


def _task(log: Sequence[Mapping[str, Any]], evaluated: np.ndarray) -> list[Clue]:
    """Compare the evaluation loss with a figure of the task itself."""
    names = {
        key for row in log for key in row if any(word in key.lower() for word in _TASK) and "loss" not in key.lower()
    }
    for name in sorted(names):
        values = curve(log, name)[1]
        if len(values) < 3 or not _finite(values) or len(evaluated) < 3 or not _finite(evaluated):
            continue
        fell = evaluated[-1] < evaluated[0] * 0.9
        rose = values[-1] > values[0] + 0.03 or values.max() > values[0] + 0.05
        if fell and not rose:
            return [
                Clue(
                    "O08",
                    f"eval_loss falls from {evaluated[0]:.3f} to {evaluated[-1]:.3f}, {name} goes from {values[0]:.3f} to "
                    f"{values[-1]:.3f}",
                )
            ]
        best_loss, best_task = int(evaluated.argmin()), int(values.argmax())
        if len(values) == len(evaluated) and best_loss != best_task and values[best_loss] < values[best_task] - 0.1:
            return [
                Clue(
                    "O08",
                    f"the checkpoint of the lowest eval_loss has {name} {values[best_loss]:.3f}, another {values[best_task]:.3f}",
                    0.8,
                )
            ]
    return []


# ---- answers --------------------------------------------------------------------------------------------------------


def mean_iou(answers: Sequence[Answered]) -> float:
    """Return the mean best IoU per true box, misses as 0; NaN without a true box."""
    ious = [best_iou(one.boxes, one.truth) for one in answers if len(one.truth)]
    return float(np.concatenate(ious).mean()) if ious else math.nan


def constant_box_iou(answers: Sequence[Answered]) -> float:
    """Return the mean IoU that the median true box scores on every picture: what can be had without looking."""
    scaled = [one.truth for one in answers if len(one.truth)]
    if not scaled:
        return math.nan
    median = np.median(np.concatenate(scaled), axis=0)
    ious = [best_iou(median[None], one.truth) for one in answers if len(one.truth)]
    return float(np.concatenate(ious).mean())


def duplicate_share(answers: Sequence[Answered], above: float = 0.95) -> float:
    """Return the share of predicted boxes that repeat an earlier one of their picture."""
    total = sum(len(one.boxes) for one in answers)
    repeated = sum(
        int(best_iou(one.boxes[:i], one.boxes[i : i + 1])[0] > above)
        for one in answers
        for i in range(1, len(one.boxes))
    )
    return repeated / total if total else 0.0


@dataclass(frozen=True)
class Fit:
    """Prediction against truth along one axis: prediction = slope x truth + offset, and how well the other axis fits.

    `shift` is the mean of prediction - truth; `sure` and `sure_shift` are four standard errors of slope and shift.
    """

    axis: str
    slope: float
    offset: float
    r2: float
    other_r2: float
    sure: float
    shift: float
    sure_shift: float


def fit_axes(answers: Sequence[Answered]) -> tuple[Fit, Fit] | None:
    """Fit the corners of predictions on those of the truth, for x and y, as shares of the picture where its size is known.

    Input: answers; only pictures with one true and one predicted box are used, for there is no doubt which belongs to which.
    Output: the fits of x and of y; None with fewer than eight such pictures, or where the truth hardly varies.
    """
    pairs = [(one.boxes[0], one.truth[0]) for one in answers if len(one.boxes) == len(one.truth) == 1]
    if len(pairs) < 8:
        return None
    predicted, truth = np.asarray([a for a, _ in pairs]), np.asarray([b for _, b in pairs])
    if truth[:, [0, 2]].std() == 0 or truth[:, [1, 3]].std() == 0:
        return None
    fits = []
    for axis, own, other in (("x", [0, 2], [1, 3]), ("y", [1, 3], [0, 2])):
        slope, offset, r2 = _line(truth[:, own].ravel(), predicted[:, own].ravel())
        errors = predicted[:, own].mean(axis=1) - truth[:, own].mean(axis=1)
        sure = 4 * abs(slope) * math.sqrt((1 - r2) / max(r2, 1e-9) / (len(pairs) - 2))
        other_r2 = _line(truth[:, other].ravel(), predicted[:, own].ravel())[2]
        sure_shift = 4 * float(errors.std()) / math.sqrt(len(pairs))
        fits.append(Fit(axis, slope, offset, r2, other_r2, sure, float(errors.mean()), sure_shift))
    return fits[0], fits[1]


def _extent(answers: Sequence[Answered]) -> float:
    """Return how far the true boxes reach: about 1 for fractions, the picture's side for pixels of an unknown size."""
    return max((float(one.truth.max()) for one in answers if len(one.truth)), default=1.0)


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Return slope, offset and r2 of least squares; r2 0 where y does not vary."""
    if y.std() < 1e-9:
        return 0.0, float(y.mean()), 0.0
    slope, offset = np.polyfit(x, y, 1)
    return float(slope), float(offset), float(np.corrcoef(x, y)[0, 1] ** 2)


def look_at_answers(answers: Sequence[Answered], *, limit: int | None = None) -> list[Clue]:
    """Read the answers of a run.

    Input: answers with their truth; `limit`, `max_new_tokens` where known.
    Output: clues: swapped axes (D01), boxes scaled or shifted (D03, E14), a constant box (C08), repeats and limit hits (E07).
    """
    clues: list[Clue] = []
    fits = fit_axes(answers)
    if fits is not None:
        x, y = fits
        told = "; ".join(
            f"{one.axis}: slope {one.slope:.2f}, offset {one.offset:+.3f}, r2 {one.r2:.2f}" for one in fits
        )
        if min(x.other_r2, y.other_r2) > 0.6 and min(x.other_r2, y.other_r2) > max(x.r2, y.r2) + 0.2:
            clues.append(
                Clue(
                    "D01",
                    f"predicted x follows true y (r2 {x.other_r2:.2f}) and y follows x ({y.other_r2:.2f}); {told}",
                )
            )
        elif min(x.r2, y.r2) > 0.8 and any(abs(one.slope - 1) > max(0.08, one.sure) for one in fits):
            clues.append(Clue("D03", f"predictions are the truth, scaled: {told}"))
            clues.append(Clue("E14", f"predictions are the truth, scaled: {told}", 0.9))
        elif min(x.r2, y.r2) > 0.8 and any(
            abs(one.shift) > max(0.05 * _extent(answers), one.sure_shift) for one in fits
        ):
            clues.append(Clue("E14", f"predictions are the truth, shifted: {told}", 0.9))
    boxes = [one.boxes for one in answers if len(one.boxes)]
    if len(boxes) >= 8:
        firsts = np.asarray([each[0] for each in boxes])
        truths = np.asarray([(one.truth)[0] for one in answers if len(one.boxes) and len(one.truth)]).reshape(-1, 4)
        if firsts.std(axis=0).max() < 0.02 and len(truths) and truths.std(axis=0).max() > 0.05:
            clues.append(
                Clue(
                    "C08",
                    f"{len(boxes)} pictures got one box: {firsts.mean(axis=0).round(3).tolist()}, whatever is on them",
                    0.9,
                )
            )
    repeated = duplicate_share(answers)
    hits = [one.truncated or (limit is not None and (one.new_tokens or 0) >= limit) for one in answers]
    at_limit = float(np.mean(hits)) if hits else 0.0
    told = f"{repeated:.0%} of the predicted boxes repeat another one" + (
        f", {at_limit:.0%} of the answers end at the limit" + (f" of {limit} tokens" if limit else "")
        if at_limit
        else ""
    )
    if repeated > 0.1 or at_limit > 0.2:
        clues.append(Clue("E07", told))
    return clues


def same_answers(one: Sequence[Answered], other: Sequence[Answered]) -> tuple[float, int]:
    """Return the share of pictures on which two runs answered alike, and the number of pictures that both have."""
    by_id = {answer.id: answer for answer in other}
    pairs = [(answer, by_id[answer.id]) for answer in one if answer.id in by_id]
    same = [
        a.text == b.text if a.text or b.text else a.boxes.shape == b.boxes.shape and np.allclose(a.boxes, b.boxes)
        for a, b in pairs
    ]
    return (float(np.mean(same)) if same else 0.0), len(pairs)

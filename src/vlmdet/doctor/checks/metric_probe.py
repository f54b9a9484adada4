"""What a user's metric makes of predictions whose worth is known: perfect, empty, swapped, shifted, doubled, raising.

When: WHEN WRONG; numpy only. Behaviour alone is looked at: the metric is called, and its figures are compared with what the
case is worth. `checks/evaluation.py` turns what is found into findings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmdet.doctor.calls import NotAvailable, UserCodeError, call, plain

Box = tuple[float, float, float, float]
Picture = list[tuple[str, Box]]
"""Labels and boxes of one picture, xyxy."""

EXAMPLES: list[Picture] = [
    [("cup", (40.0, 120.0, 340.0, 180.0))],
    [("cup", (10.0, 20.0, 210.0, 70.0)), ("plate", (300.0, 200.0, 420.0, 440.0))],
    [
        ("plate", (100.0, 60.0, 580.0, 160.0)),
        ("cup", (420.0, 250.0, 600.0, 460.0)),
        ("cup", (20.0, 300.0, 220.0, 400.0)),
    ],
    [("plate", (250.0, 30.0, 330.0, 410.0))],
]
"""Used where the user's rows give no boxes; 640 x 480 pixels, none on the diagonal, wide ones and tall ones."""

SHIFT = 0.6
"""Boxes are moved by this share of their width, which leaves an IoU of (1 - .6) / (1 + .6) = .25."""


@dataclass(frozen=True)
class Fault:
    """One way in which a metric is wrong: the catalogue's id, the figures that show it, and whether it may be meant so."""

    id: str
    evidence: str
    meant: bool = False


class _Raising:
    """Predictions of one picture that raise when they are looked at, as a broken answer does in a parser.

    No list: numpy would read a list's memory without asking it.
    """

    def _fail(self, *_: Any, **__: Any) -> Any:
        raise ValueError("a prediction that cannot be read, given by the doctor")

    __iter__ = __len__ = __getitem__ = __bool__ = __array__ = _fail


def probe_metric(metric: Callable[..., Any], truths: Sequence[Picture] = ()) -> tuple[list[Fault], str]:
    """Call a metric on cases of known worth.

    When: once per examination.

    Input: the user's `metric(predictions, truths)`; `truths`, some pictures of his own rows, in the numbers that he uses.
    Output: what is wrong, and one line with the figures of each case.

    Raises:
        UserCodeError: the metric raises on perfect predictions in every form that is known.
    """
    own = [picture for picture in truths if picture]
    pictures = own if len(own) >= 2 and any(len(picture) > 1 for picture in own) else EXAMPLES
    run = _Run(metric, pictures)
    perfect = run.figures([list(one) for one in pictures])
    empty = run.figures([[] for _ in pictures])
    half = run.figures([list(one) if i % 2 == 0 else [] for i, one in enumerate(pictures)])
    swapped = run.figures([[(name, _swap(box)) for name, box in one] for one in pictures])
    moved = run.figures([[(name, _move(box)) for name, box in one] for one in pictures])
    copied = run.figures([[one[0]] * 5 for one in pictures])
    doubled = run.figures([[item for item in one for _ in range(2)] for one in pictures])
    added = run.figures([[*one, (one[0][0], _corner(one))] for one in pictures])
    spoilt = run.figures([_Raising() if i == 0 else list(one) for i, one in enumerate(pictures)])
    renamed = run.figures([[(f"not {name}", box) for name, box in one] for one in pictures]) if run.labelled else None

    faults: list[Fault] = []

    def add(identifier: str, evidence: str) -> None:
        faults.append(Fault(identifier, evidence))

    best = _best(perfect)
    silent = spoilt is not None and not _says_errors(perfect, spoilt)
    if best is not None and best == 0 and not any((empty or {}).values()) and silent:
        # nothing scores, and what raises is not heard of: what fails inside is caught, picture by picture
        add(
            "E01",
            f"predictions equal to the truth score {_show(perfect)}, and one that raises when it is read gives no error",
        )
    elif best is not None and best < 0.99:
        if (_best(swapped) or 0) > max(best + 0.05, 0.95):
            add("E09", f"perfect predictions score {best:.3f}, the same with x and y swapped {_best(swapped):.3f}")
        elif (_best(empty) or 0) > best:
            add("E12", f"perfect predictions score {best:.3f}, no prediction at all {_best(empty):.3f}")
        else:
            add("E09", f"predictions equal to the truth score {best:.3f}, not 1")
    elif best is not None:
        if moved is not None and _unmoved(perfect, moved):
            add(
                "E09", f"each box moved by {SHIFT:.0%} of its width (IoU .25) scores {_show(moved)}, as perfect ones do"
            )
        elif moved is not None and (wrong := _wrong_iou(perfect, moved, _expected(pictures))):
            add(
                "E09",
                f"each box moved by {SHIFT:.0%} of its width has an IoU of .25 with its own; the metric says {wrong}",
            )
        elif swapped is not None and _unmoved(perfect, swapped):
            add("E09", f"predictions with x and y swapped score {_show(swapped)}, as perfect ones do")
        blind = _blind_to_copies(perfect, added, doubled) if added and doubled else ""
        nothing = [value for name, value in _scores(empty).items() if "prec" not in name.lower()]  # of none may be 1
        if nothing and min(nothing) >= 0.5:
            add("E12", f"no prediction at all scores {_show(empty)}")
        elif half is not None and _unmoved(perfect, half) and not blind:  # a precision alone is not moved either
            add(
                "E12",
                f"with no prediction on half of the pictures it scores {_show(half)}, as with all: they are left out",
            )
        if renamed is not None and _unmoved(perfect, renamed):
            add("E15", f"with every label wrong it scores {_show(renamed)}")
        over = {
            name: value for case in (doubled, copied) for name, value in (case or {}).items() if 1.0001 < value <= 100
        }
        over = {name: value for name, value in _scores(over).items() if (perfect or {}).get(name, 2.0) <= 1.0001}
        if over:
            add("E10", f"each box predicted twice scores {_show(over)}: above 1")
        elif blind:
            add("E10", f"each box predicted twice scores {blind}: a true box is counted as found more than once")
        elif doubled is not None and copied is not None and _unmoved(perfect, doubled) and _unmoved(perfect, copied):
            add("E02", f"five copies of the first box score {_show(copied)}, as one box for each true one does")
        elif doubled is not None and added is not None and _unmoved(perfect, doubled) and _unmoved(perfect, added):
            # a mean IoU over true boxes alone is a figure that people want; that nothing falls is worth a word
            told = (
                f"each box twice scores {_show(doubled)}, a false box more {_show(added)}: nothing that is told falls"
            )
            faults.append(Fault("E02", told, meant=True))
    if silent and best is not None and best >= 0.99:
        add("E01", f"a prediction that raises when it is read gives no error; the score is {_show(spoilt)}")
    shown = (
        ("perfect", perfect),
        ("none", empty),
        ("half", half),
        ("swapped", swapped),
        ("moved", moved),
        ("twice", doubled),
    )
    return faults, "; ".join(f"{name} {_show(case)}" for name, case in shown if case is not None)


class _Run:
    """Calls a metric in the form of predictions that it takes."""

    def __init__(self, metric: Callable[..., Any], pictures: Sequence[Picture]) -> None:
        self.metric, self.pictures = metric, pictures
        self.form, self.labelled = self._find_form()

    def _find_form(self) -> tuple[Callable[[Picture], Any], bool]:
        """Choose how a picture's boxes are given: the form in which perfect predictions score highest, bare boxes first."""
        found: list[tuple[float, int, Callable[[Picture], Any], bool]] = []
        failure: UserCodeError | None = None
        for place, (form, labelled) in enumerate(_FORMS):
            try:
                figures = self._call(form, self.pictures, self.pictures)
            except UserCodeError as error:
                failure = failure or error
                continue
            if figures:
                found.append((round(min(_best(figures) or 0.0, 1.0), 3), -place, form, labelled))
        if not found:
            if failure is not None:
                raise failure
            raise NotAvailable("a metric that returns a number, or a dict of numbers")
        _, _, form, labelled = max(found, key=lambda one: one[:2])
        return form, labelled

    def _call(
        self, form: Callable[[Picture], Any], predictions: Sequence[Any], truths: Sequence[Picture]
    ) -> dict[str, float]:
        return figures_of(
            call("metric", self.metric, [form(one) for one in predictions], [form(one) for one in truths])
        )

    def figures(self, predictions: Sequence[Any]) -> dict[str, float] | None:
        """Return the figures of a case; None where the metric raises on it, which is a loud end and no fault."""
        try:
            return self._call(self.form, predictions, self.pictures)
        except (UserCodeError, NotAvailable):
            return None


def _bare(picture: Picture) -> Any:
    return picture if isinstance(picture, _Raising) else [list(box) for _, box in picture]


def _dicts(key: str) -> Callable[[Picture], Any]:
    def form(picture: Picture) -> Any:
        if isinstance(picture, _Raising):
            return picture
        return [{key: list(box), "label": name, "category": name} for name, box in picture]

    return form


_FORMS: tuple[tuple[Callable[[Picture], Any], bool], ...] = (
    (_bare, False),
    (_dicts("bbox"), True),
    (_dicts("box"), True),
    (_dicts("bbox_2d"), True),
)


def figures_of(value: Any, name: str = "score") -> dict[str, float]:
    """Return the numbers of what a metric returned, by name; NaN and texts are left out."""
    value = plain(value)
    if isinstance(value, bool):
        return {}
    if isinstance(value, (int, float)):
        return {} if math.isnan(value) else {name: float(value)}
    if isinstance(value, Mapping):
        return {key: number for part, one in value.items() for key, number in figures_of(one, str(part)).items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return {key: number for i, one in enumerate(value) for key, number in figures_of(one, f"{name}[{i}]").items()}
    return {}


_NO_SCORE = ("n", "num", "count", "tp", "fp", "fn", "error", "fail", "support", "total", "images", "threshold")


def _scores(figures: dict[str, float] | None) -> dict[str, float]:
    """Leave out what counts something; a metric of one figure is that figure."""
    if not figures:
        return {}
    kept = {
        name: value
        for name, value in figures.items()
        if not any(name.lower() == word or name.lower().startswith((f"{word}_", f"{word}s")) for word in _NO_SCORE)
    }
    return kept or figures


def _best(figures: dict[str, float] | None) -> float | None:
    return max(_scores(figures).values(), default=None)


def _says_errors(perfect: dict[str, float] | None, spoilt: dict[str, float]) -> bool:
    """Tell whether a metric counts what failed, under whatever name."""
    before = perfect or {}
    return any(
        value > before.get(name, 0.0)
        for name, value in spoilt.items()
        if any(word in name.lower() for word in ("error", "fail", "invalid", "exception", "skipped"))
    )


def _unmoved(perfect: dict[str, float] | None, other: dict[str, float] | None) -> bool:
    """Tell whether no figure of a case is different from that of perfect predictions."""
    one, two = perfect or {}, other or {}
    return bool(one) and all(abs(two.get(name, value) - value) < 1e-6 for name, value in one.items())


def _expected(pictures: Sequence[Picture]) -> tuple[float, float]:
    """Return the lowest and highest mean IoU of moved boxes: each with its own, and each true one with the best of all."""
    best = []
    for picture in pictures:
        moved = [_move(box) for _, box in picture]
        best += [max(_iou(box, other) for other in moved) for _, box in picture]
    own = (1 - SHIFT) / (1 + SHIFT)
    return own, max(sum(best) / len(best), own)


def _iou(one: Box, other: Box) -> float:
    width, height = min(one[2], other[2]) - max(one[0], other[0]), min(one[3], other[3]) - max(one[1], other[1])
    inner = max(width, 0.0) * max(height, 0.0)
    areas = (one[2] - one[0]) * (one[3] - one[1]) + (other[2] - other[0]) * (other[3] - other[1])
    return inner / (areas - inner)


def _wrong_iou(perfect: dict[str, float] | None, moved: dict[str, float], expected: tuple[float, float]) -> str:
    """Return the figures of moved boxes that are a mean IoU, by their name or because there is no other, and a wrong one."""
    scores = _scores(moved)
    wrong = {
        name: value
        for name, value in scores.items()
        if ("iou" in name.lower() or len(scores) == 1)
        and not any(sign in name for sign in ("@", "50", "75", "0.", "acc"))
        and abs((perfect or {}).get(name, 0.0) - 1) < 0.01
        and 0.02 < value < 0.98
        and not expected[0] - 0.02 <= value <= expected[1] + 0.02
    }
    return _show(wrong) if wrong else ""


def _show(figures: dict[str, float] | None) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in list((figures or {}).items())[:6]) or "nothing"


def _blind_to_copies(perfect: dict[str, float] | None, added: dict[str, float], doubled: dict[str, float]) -> str:
    """Return the figures that a false box elsewhere lowers and a second copy of each box does not; a mean of IoUs may do so."""
    blind = {
        name: doubled[name]
        for name, value in _scores(perfect).items()
        if "iou" not in name.lower() and added.get(name, value) < value - 1e-6 <= doubled.get(name, 0.0)
    }
    return _show(blind) if blind else ""


def _corner(picture: Picture) -> Box:
    """Return a small box beyond all others of a picture."""
    right, bottom = max(box[2] for _, box in picture), max(box[3] for _, box in picture)
    left, top = min(box[0] for _, box in picture), min(box[1] for _, box in picture)
    side = max(right - left, bottom - top) / 10
    return (right, bottom, right + side, bottom + side)


def _swap(box: Box) -> Box:
    return (box[1], box[0], box[3], box[2])


def _move(box: Box) -> Box:
    by = SHIFT * (box[2] - box[0])
    return (box[0] + by, box[1], box[2] + by, box[3])

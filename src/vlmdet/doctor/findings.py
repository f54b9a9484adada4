"""What an examination says: findings, what was not run and why, what was checked; and in which order they are told.

When: at the end of `examine`. Standard library only: findings cross a process border as JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

MINOR = 1.0
"""Causes of less weight (hints of severity 1) are told last, after what the others bring about."""

SHOWN = 5
"""Findings told at most, apart from consequences; the others are listed by id under `further`."""

CONSEQUENCES: dict[str, tuple[str, ...]] = {
    # data
    "D01": ("D02", "D03", "D05", "E03", "E09", "E14", "O08"),
    "D02": ("D01", "D03", "D05", "D16", "E03"),
    "D03": ("D05", "D16", "E14", "D04"),
    "D04": ("E14", "C04", "C05"),
    "D06": ("D08", "D05"),
    "D05": ("E04",),
    "D08": ("D05",),
    "D09": ("E03", "E14", "D05"),
    "D12": ("E03", "E04", "O08"),
    "D14": ("L02", "C08"),
    "D15": ("C01", "C05", "C08", "L02", "D11", "D12", "D14"),
    "D18": ("E03", "C04", "D12"),
    # conversation
    "C01": ("C02", "C03", "C05", "C07", "L02", "L04", "L05", "V05", "V06"),
    "C02": ("S05", "C10"),
    "C03": ("S05",),
    "C04": ("E03", "E04"),
    "C05": ("V05", "V06", "V01"),
    "C06": ("C05", "V05"),
    "C07": ("C05", "V05", "V06"),
    "C08": ("L02", "O08"),
    "C09": ("T09", "L04", "L05", "V05", "E03", "C05"),
    # template and tokens
    "T01": ("T10", "L01", "L02", "C02", "L04", "E07", "C05", "V05"),
    "T02": ("L04", "L05", "C02"),
    "T03": ("L08", "E03", "L03", "L04", "L05"),
    "T04": ("L08", "L02", "L01", "L04"),
    "T05": ("E07", "E03"),
    "T06": ("S04", "V01", "C02", "S07"),
    "T08": ("L01", "E07", "E06", "L04", "L11"),
    "T09": ("L01", "L02", "L04", "L05", "L06", "V05", "E06", "L08", "L11"),
    "T10": ("C02", "L04"),
    # labels
    "L01": ("E07", "E06", "L04", "L11", "S07", "T08", "L06"),
    "L02": ("L01", "L04", "L05", "L06", "L08", "L11", "M15", "O10", "O01"),
    "L03": ("L04", "L07", "L05"),
    "L04": ("L05", "L07", "L06"),
    "L05": ("L04",),
    "L06": ("L04", "L05", "L01"),
    "L08": ("L04", "L05", "E03", "L09"),
    "L09": ("L08", "L04", "L05", "L01", "L11"),
    "L10": ("L04", "L05", "L01", "L02", "L03", "T07"),
    "L11": ("L04", "L01", "O01", "L05", "L08"),
    "L12": ("L04", "L03", "L07", "L02"),
    # vision
    "V01": ("D16", "V04", "E08"),
    "V02": ("V01", "V04", "V12"),
    "V03": ("V01", "E14"),
    "V06": ("L11", "V07"),
    "V07": ("V06",),
    # model
    "M01": ("M08", "M13", "M15", "M04", "M06", "M14", "O01", "O10", "E16", "L11", "O07"),
    "M02": ("M01", "M15", "M10", "E16", "O10", "L11", "M03", "O01", "O02"),
    "M03": ("M01", "M15"),
    "M04": ("M13", "M14"),
    "M05": ("M14",),
    "M06": ("M01", "M14", "M13", "M08"),
    "M08": ("M13", "M15", "O10", "O01", "L11"),
    "M10": ("E16", "S01"),
    "M11": ("S01", "E16", "E08", "M10"),
    "M13": ("M14",),
    "M15": ("O01", "O10", "M13", "L11", "E16"),
    # optimisation
    "O01": ("O10", "L11", "M15"),
    "O03": ("M08", "M15", "O10", "O01", "L11", "O02"),
    "O09": ("M11",),
    # evaluation
    "E01": ("E12",),
    "E03": ("E04", "E05", "E12", "E14"),
    "E05": ("E03", "E04"),
    "E08": ("E16",),
    "E16": ("O08",),
    # serving
    "S04": ("V01", "T06"),
    "S03": ("S01",),
}
"""Cause to what it brings about: where both are found, the second is told as a consequence of the first."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, as a paragraph that a tired engineer can act on.

    Attributes:
        id: of the catalogue, e.g. `L01`.
        title: what is wrong, in a few words.
        severity: 4 silent and fatal, 3 silent and harmful, 2 loud or partial, 1 minor.
        stage: data, conversation, template, labels, vision, model, optimisation, evaluation or serving.
        where: row, file and line, or option in which it lies.
        evidence: from the user's own data: decoded tokens, two grids, a table; may have several lines.
        cause: why that is so.
        fix: what to do.
        reference: one place to read on.
        effect: what it does to training or to the figures.
        certainty: 0 to 1; 1 where it was seen happening, lower where it is inferred.
        consequence_of: id of the finding that explains this one.
        pictures: `data:` addresses of pictures with boxes drawn, for the page.
    """

    id: str
    title: str
    severity: int
    stage: str
    where: str
    evidence: str
    cause: str
    fix: str
    reference: str
    effect: str = ""
    certainty: float = 1.0
    consequence_of: str | None = None
    pictures: tuple[str, ...] = ()

    @property
    def weight(self) -> float:
        """Severity times certainty: the higher, the earlier it is told."""
        return self.severity * self.certainty


@dataclass(frozen=True)
class NotRun:
    """A check that did not run, and what it needs to."""

    id: str
    title: str
    needs: str


@dataclass(frozen=True)
class Checked:
    """A check that ran and found nothing: `figures` says what was looked at, e.g. `200 rows, 517 boxes`."""

    id: str
    title: str
    figures: str = ""


@dataclass(frozen=True)
class Report:
    """What one examination says.

    Attributes:
        findings: ranked; at most `SHOWN` causes, then the consequences of any cause.
        not_run: checks whose inputs were not there, with what they need.
        checked: checks that ran and found nothing.
        seconds: of the whole examination.
        isolation: `fork` (a process of its own with a memory limit and a time-out) or `process`, and why.
        further: findings over the limit, of the lowest weight.
    """

    findings: tuple[Finding, ...]
    not_run: tuple[NotRun, ...]
    checked: tuple[Checked, ...]
    seconds: float
    isolation: str = "process"
    further: tuple[Finding, ...] = ()

    @property
    def worst(self) -> int:
        """Return the highest severity found, 0 on a clean bill."""
        return max((one.severity for one in self.findings), default=0)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {
            "findings": [asdict(one) for one in self.findings],
            "not_run": [asdict(one) for one in self.not_run],
            "checked": [asdict(one) for one in self.checked],
            "further": [asdict(one) for one in self.further],
            "seconds": round(self.seconds, 2),
            "isolation": self.isolation,
        }


def finding_from_dict(values: Mapping[str, Any]) -> Finding:
    """Read a finding back from JSON values."""
    return Finding(**{**values, "pictures": tuple(values.get("pictures", ()))})


def rank(found: Iterable[Finding], *, shown: int = SHOWN) -> tuple[tuple[Finding, ...], tuple[Finding, ...]]:
    """Order findings: causes by severity times certainty, then what they bring about.

    Output: findings to show and those over the limit. One id is told once (the one with the most weight). A finding is
    a consequence where a cause of `CONSEQUENCES` was found with at least half its weight; chains end at the first cause.
    Causes come first, then consequences, then causes of less weight than `MINOR`.
    """
    best: dict[str, Finding] = {}
    for one in found:
        if one.id not in best or one.weight > best[one.id].weight:
            best[one.id] = one
    order = sorted(best.values(), key=lambda one: (-one.weight, one.id))
    cause_of = {one.id: one.consequence_of or _cause(one, order) for one in order}
    causes = [one for one in order if cause_of[one.id] is None]
    effects = [replace(one, consequence_of=_first(one.id, cause_of)) for one in order if cause_of[one.id] is not None]
    told = causes[:shown]
    major = [one for one in told if one.weight >= MINOR]
    return (*major, *effects, *told[len(major) :]), tuple(causes[shown:])


def _cause(one: Finding, order: Sequence[Finding]) -> str | None:
    for other in order:
        mutual = one.id in CONSEQUENCES.get(other.id, ()) and other.id in CONSEQUENCES.get(one.id, ())
        if mutual and (other.weight, one.id) <= (one.weight, other.id):
            continue  # of two that may explain one another, the one with more weight is the cause
        if other.id != one.id and one.id in CONSEQUENCES.get(other.id, ()) and other.weight >= one.weight / 2:
            return other.id
    return None


def _first(identifier: str, cause_of: Mapping[str, str | None]) -> str | None:
    seen = {identifier}
    cause = cause_of[identifier]
    while cause is not None and cause_of.get(cause) is not None and cause not in seen:
        seen.add(cause)
        cause = cause_of[cause]
    return cause

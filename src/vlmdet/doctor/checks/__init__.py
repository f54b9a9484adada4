"""The checks, one module for each stage of the catalogue, and how to write one.

A check is a small function from `Evidence` to what it found, marked with the ids that it settles:

    @check("L01", needs=("collate", "processor"))
    def end_token(evidence: Evidence) -> Outcome:
        rows = evidence.supervised()                      # made once, shared; raises NotAvailable where it cannot be made
        bad = [row for row in rows if row.ids[-1] not in evidence.end_ids()]
        if bad:
            yield found("L01", where=bad[0].where, evidence=f"last token with loss: {bad[0].tokens[-1]!r}",
                        cause="the mask of the collator ends before the end token")
        yield looked("L01", f"{len(rows)} rows end in the end token")

`needs` names fields of the `Subject`, `"rows|splits"` either: where one is absent the check is told as not run. `found` fills
title, severity, stage, fix and reference from the catalogue; each may be overridden (`severity=2`, `certainty=.6` where it is
inferred and not seen). `looked` says with figures what was looked at: an id without a finding is on the clean bill.
`skipped("L12", "TRL's configuration")` says that one id of several could not be settled, and what it needs. What the check lets
through: `NotAvailable` -> not run; `UserCodeError` -> a finding at the user's own line (by `examine`). Anything else that
is raised is a bug of the check: told as not run, with its text.

Rules: look at behaviour, never at the text of a source. One id is told once per examination: give all rows that are wrong as one
finding with the number, the worst as evidence. A difference that may be meant has certainty below .5 or is no finding:
false alarms of severity 3 and 4 are worse than a miss. No check changes anything, downloads, or writes outside a
temporary directory.
A module lists its functions in the tuple `CHECKS`. Causes and consequences: `findings.CONSEQUENCES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlmdet.doctor.catalogue import ENTRIES
from vlmdet.doctor.findings import Checked, Finding, NotRun

if TYPE_CHECKING:
    from vlmdet.doctor.evidence import Evidence

STAGES = ("data", "conversation", "template", "labels", "vision", "model", "optimisation", "evaluation", "serving")
"""In the order of the catalogue, A to I; each is a module here."""

Outcome = Iterator[Finding | Checked | NotRun]


@dataclass(frozen=True)
class Check:
    """A function with the ids that it settles and the fields of the subject that it needs."""

    ids: tuple[str, ...]
    needs: tuple[str, ...]
    run: Callable[[Evidence], Outcome]

    @property
    def name(self) -> str:
        """Name of the function."""
        return self.run.__name__

    def missing(self, given: frozenset[str]) -> list[str]:
        """Return the needs that are not among the given fields."""
        return [one for one in self.needs if not any(name in given for name in one.split("|"))]


def check(*ids: str, needs: tuple[str, ...] = ()) -> Callable[[Callable[[Evidence], Outcome]], Check]:
    """Mark a function as a check of the ids."""
    return lambda run: Check(ids, needs, run)


def found(identifier: str, *, where: str, evidence: str, cause: str, **more: Any) -> Finding:
    """Make a finding; what is not given comes from the catalogue."""
    entry = ENTRIES[identifier]
    values: dict[str, Any] = {
        "title": entry.title,
        "severity": entry.severity,
        "stage": entry.stage,
        "fix": entry.fix,
        "reference": entry.reference,
        "effect": entry.symptom,
    }
    return Finding(id=identifier, where=where, evidence=evidence, cause=cause, **{**values, **more})


def looked(identifier: str, figures: str) -> Checked:
    """Say what was looked at for an id."""
    return Checked(identifier, ENTRIES[identifier].title, figures)


def skipped(identifier: str, needs: str) -> NotRun:
    """Say that an id could not be settled, and what it needs."""
    return NotRun(identifier, ENTRIES[identifier].title, needs)


def all_checks() -> list[Check]:
    """Return the checks of every stage, in order; a module is imported when it is first asked for."""
    return [one for stage in STAGES for one in checks_of(stage)]


def checks_of(stage: str) -> tuple[Check, ...]:
    """Return the checks of a stage."""
    module: Any = import_module(f"vlmdet.doctor.checks.{stage}")
    return module.CHECKS

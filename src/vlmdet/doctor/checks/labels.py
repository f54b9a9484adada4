"""Checks of the stage labels: which tokens carry loss, decoded, against answer and end token of every turn.

The diagnosis is one for all ids: `supervision.verdict`.
"""

from __future__ import annotations

from vlmdet.doctor.checks import Check, Outcome, check, supervision
from vlmdet.doctor.evidence import Evidence


@check(*(one for one in supervision.IDS if one[0] == "L"), needs=("rows|splits|build_trainer", "processor|build_trainer", "collate|build_trainer"))
def tokens_with_loss(evidence: Evidence) -> Outcome:
    """Decode what carries loss on awkward batches, and compare."""
    yield from supervision.of_stage(evidence, "L")


CHECKS: tuple[Check, ...] = (tokens_with_loss,)

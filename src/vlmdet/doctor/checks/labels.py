"""Checks of the stage labels: which tokens carry loss, decoded, against answer and end token of every turn.

The diagnosis is one for all ids: `supervision.verdict`.
"""

from __future__ import annotations

from vlmdet.doctor.calls import NotAvailable
from vlmdet.doctor.checks import Check, Outcome, check, found, looked, supervision
from vlmdet.doctor.evidence import Evidence


@check(
    *(one for one in supervision.IDS if one[0] == "L"),
    needs=("rows|splits|build_trainer", "processor|build_trainer", "collate|build_trainer"),
)
def tokens_with_loss(evidence: Evidence) -> Outcome:
    """Decode what carries loss on awkward batches, and compare."""
    yield from supervision.of_stage(evidence, "L")


@check("L12", needs=("settings",))
def option_for_pictures(evidence: Evidence) -> Outcome:
    """Look whether the installed TRL knows assistant_only_loss for pictures, where there is no collator to ask."""
    if evidence.subject.collate is not None or evidence.subject.build_trainer is not None:
        return  # what carries loss is seen in their rows
    if not evidence.options.get("assistant_only_loss"):
        raise NotAvailable("collate or build_trainer")
    version = evidence.versions().get("trl", "")
    if not version:
        raise NotAvailable("collate, build_trainer, or the version of TRL")
    told = f"{evidence.options.shown('assistant_only_loss')}, TRL {version}"
    if version.split(".")[0] == "0":
        yield found(
            "L12",
            where=evidence.options.shown("assistant_only_loss"),
            evidence=told,
            cause="TRL before 1.0 makes this mask for text alone: with pictures the option is ignored or refused",
            certainty=0.8,
        )
    else:
        yield looked("L12", told)


CHECKS: tuple[Check, ...] = (tokens_with_loss, option_for_pictures)

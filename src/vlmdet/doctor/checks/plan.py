"""Checks of the plan of a run: when it saves and evaluates, how the rate goes, how many steps it has.

When: as part of `checks.optimisation`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlmdet.doctor.calls import NotAvailable, place_of
from vlmdet.doctor.checks import Check, Outcome, check, found, looked, skipped
from vlmdet.doctor.checks.built import argument, trainer_of
from vlmdet.doctor.checks.rates import judge_saving, judge_warmup, planned_steps

if TYPE_CHECKING:
    from vlmdet.doctor.evidence import Evidence


def number(evidence: Evidence, name: str, default: float | None = None) -> float | None:
    value = argument(evidence, name)
    if isinstance(value, bool) or value is None:
        return default
    try:
        return float(value)
    except (TypeError, ValueError):
        return default


def rows_of_training(evidence: Evidence) -> int | None:
    """Return the number of rows of training: as the settings say, else of the trainer's data."""
    told = evidence.options.number("num_samples")
    if told:
        return int(told)
    built = trainer_of(evidence)
    data: Any = getattr(built.trainer, "train_dataset", None) if built is not None else None
    return len(data) if hasattr(data, "__len__") else None


def plan(evidence: Evidence) -> int | None:
    """Return the optimiser steps that are planned, None where it cannot be told."""
    most = number(evidence, "max_steps")
    return planned_steps(
        rows=rows_of_training(evidence),
        batch=number(evidence, "per_device_train_batch_size"),
        accumulation=number(evidence, "gradient_accumulation_steps", 1) or 1,
        world=evidence.options.number("world_size", 1) or 1,
        epochs=number(evidence, "num_train_epochs", 3) or 3,
        most=most if most and most > 0 else None,
    )


@check("O05", needs=("settings|build_trainer",))
def best_checkpoint(evidence: Evidence) -> Outcome:
    """Compare when checkpoints are saved and evaluated, which are kept, and by which figure they are chosen."""
    if trainer_of(evidence) is None and not any(
        name in evidence.options
        for name in ("save_steps", "eval_steps", "load_best_model_at_end", "metric_for_best_model", "save_total_limit")
    ):
        raise NotAvailable("save_steps, eval_steps or load_best_model_at_end")
    values = {
        name: argument(evidence, name)
        for name in ("save_strategy", "eval_strategy", "metric_for_best_model", "greater_is_better")
    }
    best = argument(evidence, "load_best_model_at_end") is True
    own = evidence.options
    save = number(evidence, "save_steps") if best or "save_steps" in own else None
    verdicts = judge_saving(
        save=save,
        evaluate=number(evidence, "eval_steps"),
        steps=plan(evidence),
        best=best,
        keep=number(evidence, "save_total_limit"),
        metric=str(values["metric_for_best_model"]) if values["metric_for_best_model"] else None,
        greater=values["greater_is_better"] if isinstance(values["greater_is_better"], bool) else None,
        save_strategy=word(values["save_strategy"]),
        eval_strategy=word(values["eval_strategy"]),
    )
    shown = ", ".join(
        f"{name}={argument(evidence, name)!r}"
        for name in (
            "save_steps",
            "eval_steps",
            "save_total_limit",
            "load_best_model_at_end",
            "metric_for_best_model",
            "greater_is_better",
        )
        if argument(evidence, name) is not None
    )
    steps = plan(evidence)
    shown += f"; {steps} steps planned" if steps else ""
    rows = rows_of_training(evidence)
    sampled = rows is not None and rows < 200 and not own.number("num_samples") and not own.number("max_steps")
    for verdict in verdicts[:1]:
        if sampled and f"{steps} steps" in verdict.cause:  # a few rows of the data, for this examination
            verdict = verdict._replace(severity=2, certainty=0.6)
        yield found(
            "O05",
            where="settings" if own.flat else "training arguments",
            evidence=shown,
            cause="; ".join(one.cause for one in verdicts),
            severity=verdict.severity,
            certainty=verdict.certainty,
        )
    if not verdicts:
        yield looked("O05", shown)


def word(value: Any) -> str | None:
    return None if value is None else str(getattr(value, "value", value)).lower()


@check("O06", "O11", needs=("settings|build_trainer",))
def schedule(evidence: Evidence) -> Outcome:
    """Compare warm-up, a schedule of the user's own, and figures that he planned with the steps that follow."""
    steps = plan(evidence)
    ratio = number(evidence, "warmup_ratio")
    share = judge_warmup(steps=steps, warmup=number(evidence, "warmup_steps"), ratio=ratio)
    own = _own_schedule(evidence, steps)
    if share is not None and share[0] > 0.2:
        yield found(
            "O06",
            where="settings" if evidence.options.flat else "training arguments",
            evidence=f"{share[1]}: the rate rises for {min(share[0], 1):.0%} of the run",
            certainty=1.0 if share[0] > 0.25 else 0.8,
            cause="the warm-up is longer than a short run bears, or was reckoned for more steps",
        )
    elif own:
        yield found(
            "O06",
            where=place_of(evidence.subject.build_trainer) if evidence.subject.build_trainer else "settings",
            evidence=own,
            cause="the schedule was made for another number of steps than the run has",
        )
    elif share is None:
        yield skipped("O06", "warmup_steps with the number of rows and batch, or warmup_ratio")
    else:
        yield looked("O06", share[1])
    yield from _as_planned(evidence, steps)


def _own_schedule(evidence: Evidence, steps: int | None) -> str:
    """Return how a schedule of the user's own, or one whose length he sets, does not fit the planned steps."""
    length = next(
        (
            evidence.options.number(name)
            for name in ("num_training_steps", "scheduler_steps", "lr_scheduler_steps", "t_max")
            if evidence.options.number(name)
        ),
        None,
    )
    if length and steps and not 0.75 <= length / steps <= 1.34:
        return f"the schedule is {length:.0f} steps long, {steps} steps are planned"
    built = trainer_of(evidence)
    schedule = getattr(built.trainer, "lr_scheduler", None) if built is not None else None
    functions = getattr(schedule, "lr_lambdas", None)
    if not functions or not steps or steps < 4:
        return ""
    shares = [float(functions[0](step)) for step in range(steps)]
    high = max(shares)
    shown = f"the rate over {steps} planned steps, as shares of its peak: " + ", ".join(
        f"{shares[int(i * (steps - 1) / 4)]:.2f}" for i in range(5)
    )
    if high < 0.5:
        return f"{shown}; it never reaches half of its peak"
    if sum(one < 0.01 * high for one in shares) > 0.4 * steps:
        return f"{shown}; it is 0 for most of the run"
    return ""


def _as_planned(evidence: Evidence, steps: int | None) -> Outcome:
    """Compare the steps and the batch that the user expects with what follows from his settings."""
    options = evidence.options
    wanted = next(
        (
            options.number(name)
            for name in ("expected_steps", "planned_steps", "expected_total_steps", "num_training_steps")
            if options.number(name)
        ),
        None,
    )
    batch, accumulated = (
        options.number("per_device_train_batch_size"),
        options.number("gradient_accumulation_steps", 1) or 1,
    )
    world = options.number("world_size", 1) or 1
    total = next(
        (
            options.number(name)
            for name in ("effective_batch_size", "global_batch_size", "total_batch_size", "expected_batch_size")
            if options.number(name)
        ),
        None,
    )
    if wanted and steps and options.number("max_steps") is None and abs(wanted - steps) > max(1, 0.05 * steps):
        yield found(
            "O11",
            where="settings",
            evidence=f"{wanted:.0f} steps are expected, {steps} follow from "
            "rows, batch, accumulation, processes and epochs",
            cause="the batch is shared among another number of processes, or accumulated otherwise, than was believed",
        )
    elif total and batch and total != batch * accumulated * world:
        yield found(
            "O11",
            where="settings",
            evidence=f"a batch of {total:.0f} is expected; {batch:.0f} x "
            f"{accumulated:.0f} accumulated x {world:.0f} processes is "
            f"{batch * accumulated * world:.0f}",
            cause="GPUs that share one model count as one process",
        )
    elif steps and (wanted or total):
        yield looked("O11", f"{steps} steps, as planned")
    else:
        yield skipped("O11", "expected_steps or effective_batch_size in the settings, or a finished run")


CHECKS: tuple[Check, ...] = (best_checkpoint, schedule)

"""Rules of learning rates, budgets, schedules and checkpoints, on plain numbers.

When: for checks of settings. Figures are those of published recipes: LoRA trains at 1e-5 to 5e-4, whole weights at 1e-6
to 5e-5. Adam moves a weight by about the rate in each step, whatever the gradient, so rate times steps bounds how far a
weight can go.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Verdict(NamedTuple):
    """What a rule says: id of the catalogue, why, severity and certainty."""

    id: str
    cause: str
    severity: int = 3
    certainty: float = 1.0


def judge_rate(rate: float, steps: float | None, *, adapter: bool | None, optimizer: str = "adamw") -> Verdict | None:
    """Judge a learning rate by the method and, where it is known, by the number of steps.

    Input: `adapter`, whether LoRA trains; None where unknown: then only what is wrong for both is told.
    """
    if rate <= 0 or not any(word in optimizer.lower() for word in ("adam", "lamb")):
        return None
    budget = None if steps is None else rate * steps
    reach = "" if budget is None else f"; in {steps:.0f} steps a weight can move by {budget:.1g} at most"
    if rate < 5e-7 and (budget is None or budget < 5e-3):
        return Verdict("O01", f"a rate of {rate:.1g} is far below what any method needs{reach}")
    if adapter is True:
        if rate < 1e-5 and (budget is None or budget < 0.02):
            return Verdict(
                "O01",
                f"LoRA begins at 0 and needs 1e-4 to 2e-4; {rate:.1g} is a rate for whole weights, or less{reach}",
            )
        if rate <= 2e-5 and budget is not None and budget < 0.005:
            return Verdict("O01", f"LoRA at {rate:.1g} needs many more steps{reach}", 3 if rate <= 1.01e-5 else 2, 0.9)
    if adapter is False and rate <= 1e-6 and budget is not None and budget < 2e-4:
        return Verdict("O01", f"a rate of {rate:.1g} for whole weights needs thousands of steps{reach}", 3, 0.8)
    high = {True: 2e-3, False: 9e-5, None: 2e-3}[adapter]
    if rate >= high:
        method = "whole weights, which take 1e-6 to 5e-5" if adapter is False else "LoRA, which takes 1e-4 to 5e-4"
        return Verdict("O02", f"a rate of {rate:.1g} is too high for {method}: what the base knows is overwritten")
    if adapter is True and rate >= 1e-3:
        return Verdict("O02", f"a rate of {rate:.1g} is at the upper end for LoRA", 2, 0.7)
    return None


def planned_steps(
    *, rows: float | None, batch: float | None, accumulation: float, world: float, epochs: float, most: float | None
) -> int | None:
    """Return the optimiser steps that follow from the settings; None where rows or batch are unknown."""
    if most is not None and most > 0:
        return int(most)
    if not rows or not batch:
        return None
    batches = math.ceil(rows / (batch * world))
    return math.ceil(epochs * max(math.ceil(batches / accumulation), 1))


def judge_saving(
    *,
    save: float | None,
    evaluate: float | None,
    steps: int | None,
    best: bool,
    keep: float | None,
    metric: str | None,
    greater: bool | None,
    save_strategy: str | None = None,
    eval_strategy: str | None = None,
) -> list[Verdict]:
    """Judge whether the checkpoint that is called the best can be it.

    Input: `save`, `evaluate`, steps between two; `best`, load_best_model_at_end; `keep`, save_total_limit; `metric`,
    metric_for_best_model.
    """
    said: list[Verdict] = []
    by_steps = save_strategy not in ("no", "epoch") and eval_strategy not in ("no", "epoch")
    if save and evaluate and by_steps and save >= 1 and evaluate >= 1 and save % evaluate and (best or evaluate % save):
        said.append(
            Verdict(
                "O05",
                "checkpoints are saved at steps at which nothing was evaluated, so the best one may never "
                "have been saved",
            )
        )
    if best and steps is not None:
        if evaluate and evaluate >= 1 and by_steps and evaluate > steps:
            said.append(Verdict("O05", f"nothing is evaluated in {steps} steps, so there is no best"))
        elif save and save >= 1 and by_steps and save > steps:
            said.append(Verdict("O05", f"no checkpoint is saved in {steps} steps, so there is no best to load"))
        elif save and save >= 1 and by_steps and evaluate and steps // save <= 1:
            said.append(Verdict("O05", f"one checkpoint is saved in {steps} steps: the best is the only one", 2))
    if best and {save_strategy, eval_strategy} in ({"no", "steps"}, {"no", "epoch"}, {"steps", "epoch"}, {"no", None}):
        said.append(
            Verdict(
                "O05",
                f"save_strategy={save_strategy!r} and eval_strategy={eval_strategy!r}: saved and evaluated at "
                "different times",
            )
        )
    if metric and keep is not None and keep <= 1 and not best:
        said.append(Verdict("O05", "only the last checkpoint is kept, whatever the figures say: the best is deleted"))
    if metric and greater is not None:
        name = metric.lower()
        loss = "loss" in name or "error" in name or "perplexity" in name
        task = any(word in name for word in ("iou", "f1", "map", "ap50", "recall", "precision", "acc", "score"))
        if (loss and greater) or (task and not loss and not greater):
            said.append(
                Verdict("O05", f"greater_is_better={greater} for {metric}: the worst checkpoint is kept as the best")
            )
    return said


def judge_warmup(*, steps: int | None, warmup: float | None, ratio: float | None) -> tuple[float, str] | None:
    """Return the share of the run that warms up, with how it was reckoned; None where nothing says."""
    if warmup is not None and 0 < warmup < 1:
        return warmup, f"warmup_steps={warmup:g} of the run"
    if warmup:
        return (warmup / steps, f"warmup_steps={warmup:.0f} of {steps} planned steps") if steps else None
    if ratio is not None:
        return ratio, f"warmup_ratio={ratio:g}"
    return None

"""Checks of the stage optimisation: rates, precision, accumulation, checkpoints, schedule, the loss of evaluation.

When: CHECK BEFORE TRAINING, from settings, from the arguments of the trainer that was built, and from a few passes of
it. Logs of finished runs
are read in `run_logs`, chains of stages in `saved_adapters`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from vlmdet.doctor.calls import NotAvailable, UserCodeError, place_of
from vlmdet.doctor.checks import Check, Outcome, check, found, looked, saved_adapters, skipped
from vlmdet.doctor.checks.built import argument, trainer_of, uses_adapter
from vlmdet.doctor.checks.rates import judge_rate, judge_saving, judge_warmup, planned_steps

if TYPE_CHECKING:
    from vlmdet.doctor.evidence import Evidence

BF16 = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "paligemma", "idefics3", "smolvlm", "gemma3", "qwen_vl")
"""Families whose checkpoints were trained in bfloat16."""


def _number(evidence: Evidence, name: str, default: float | None = None) -> float | None:
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
    most = _number(evidence, "max_steps")
    return planned_steps(
        rows=rows_of_training(evidence),
        batch=_number(evidence, "per_device_train_batch_size"),
        accumulation=_number(evidence, "gradient_accumulation_steps", 1) or 1,
        world=evidence.options.number("world_size", 1) or 1,
        epochs=_number(evidence, "num_train_epochs", 3) or 3,
        most=most if most and most > 0 else None,
    )


@check("O01", "O02", needs=("settings|build_trainer",))
def learning_rate(evidence: Evidence) -> Outcome:
    """Judge the learning rate by the method and the number of steps."""
    rate = _number(evidence, "learning_rate")
    built = trainer_of(evidence)
    own = getattr(built.trainer, "optimizer", None) if built is not None else None
    if own is not None:  # the user's own optimiser: its rate counts
        rate = max(float(group.get("initial_lr", group["lr"])) for group in own.param_groups)
    if rate is None:
        raise NotAvailable("learning_rate")
    steps = plan(evidence)
    adapter = None if built is not None and not built.trainable else uses_adapter(evidence)
    method = {True: "LoRA", False: "whole weights", None: "method unknown"}[adapter]
    shown = f"learning_rate={rate:g}, {method}, {f'{steps} steps planned' if steps else 'steps unknown'}"
    optimizer = str(getattr(argument(evidence, "optim", "adamw"), "value", argument(evidence, "optim", "adamw")))
    verdict = judge_rate(rate, steps, adapter=adapter, optimizer=optimizer)
    vision = evidence.options.number("vision_learning_rate")
    if verdict is None and vision:
        verdict = judge_rate(vision, steps, adapter=adapter, optimizer=optimizer)
        shown += f", vision {vision:g}"
    rows, epochs = rows_of_training(evidence), _number(evidence, "num_train_epochs", 0) or 0
    if verdict is not None:
        yield found(
            verdict.id,
            where="settings" if evidence.options.key("learning_rate") else "training arguments",
            evidence=shown,
            cause=verdict.cause,
            severity=verdict.severity,
            certainty=verdict.certainty,
        )
    elif adapter is False and evidence.options.number("num_samples") and rows and rows <= 500 and epochs >= 10:
        yield found(
            "O02",
            where="settings",
            evidence=f"{shown}; {rows} rows, {epochs:g} epochs",
            severity=2,
            certainty=0.7,
            cause="whole weights see few rows very often and learn them by heart",
        )
    else:
        yield looked("O01", shown)
        yield looked("O02", shown)


@check("O03", needs=("settings|build_trainer|model",))
def half_precision(evidence: Evidence) -> Outcome:
    """Compare the precision of training with that of the checkpoint, and see whether losses are numbers."""
    from vlmdet.doctor.evidence import family_name

    options, built, subject = evidence.options, trainer_of(evidence), evidence.subject
    words = [("fp16=True", argument(evidence, "fp16") is True), (options.shown("dtype"), _half(options.get("dtype")))]
    words += [
        (options.shown(name), _half(options.get(name)))
        for name in ("bnb_4bit_compute_dtype", "compute_dtype", "precision", "mixed_precision")
    ]
    if built is not None:
        for _, cls, keywords in built.loads.models:
            dtype = keywords.get("dtype", keywords.get("torch_dtype"))
            words.append((f"{cls}.from_pretrained(dtype={dtype})", _half(dtype)))
            inner = getattr(keywords.get("quantization_config"), "bnb_4bit_compute_dtype", None)
            words.append((f"bnb_4bit_compute_dtype={inner}", _half(inner)))
    if hasattr(subject.model, "dtype"):
        words.append((f"model.dtype={subject.model.dtype}", _half(subject.model.dtype)))
    asked = [text for text, half in words if half]
    family = family_name(
        options, subject.model if subject.model is not None else getattr(built, "model", None), subject.processor
    )
    saved = _saved_dtype(evidence)
    if asked and (saved == "bfloat16" or (saved is None and family in BF16)):
        yield found(
            "O03",
            where="settings" if options.flat else "training arguments",
            certainty=0.9,
            evidence=f"{', '.join(dict.fromkeys(asked))}; the checkpoint ({family or 'config.json'}) is in bfloat16",
            cause="float16 ends at 65,504: activations of a model that was trained in bfloat16 go over it",
        )
        return
    if built is not None and built.trainable:
        steps = evidence.steps()
        wrong = [loss for loss in steps.losses if not math.isfinite(loss)]
        grads = [name for name, norm in steps.gradients.items() if norm is not None and not math.isfinite(norm)]
        if (wrong or grads) and _supervised(evidence, built):
            yield found(
                "O03",
                where=place_of(subject.build_trainer),
                cause="an operation of the model or of the loss gives no finite number on this batch",
                evidence=f"losses of three steps: {', '.join(f'{loss:g}' for loss in steps.losses)}; "
                f"gradients that are not finite: {len(grads)}" + (f", such as {grads[0]}" if grads else ""),
            )
            return
        yield looked("O03", f"losses of three steps: {', '.join(f'{loss:.4f}' for loss in steps.losses)}")
        return
    told = (
        ", ".join(text for text, _ in words if "=" in text and not text.startswith("fp16"))
        or f"bf16={argument(evidence, 'bf16')}"
    )
    if (
        any(options.get(name) is not None for name in ("fp16", "bf16", "dtype", "precision", "mixed_precision"))
        or asked
        or subject.model is not None
    ):
        yield looked("O03", told)
    else:
        yield skipped("O03", "bf16, fp16 or dtype in the settings, or build_trainer")


def _half(value: Any) -> bool:
    return str(value).lower().replace("torch.", "") in ("float16", "fp16", "half", "16", "16-mixed")


def _saved_dtype(evidence: Evidence) -> str | None:
    """Return the type of weights that the base's config.json names."""
    try:
        artefacts = evidence.artefacts()
    except (NotAvailable, UserCodeError):
        return None
    for name, one in artefacts.items():
        config = one.configs.get("config.json")
        if "adapter" not in name.lower() and isinstance(config, dict):
            value = config.get("dtype") or config.get("torch_dtype")
            if value:
                return str(value).replace("torch.", "")
    return None


def _supervised(evidence: Evidence, built: Any) -> bool:
    """Tell whether the trainer's first batch has tokens with loss; without any the loss is no number for another reason (L02)."""
    from vlmdet.doctor.live import probes

    return bool(probes.supervised_tokens(probes.first_batch(evidence, built)))


@check("O04", needs=("build_trainer",))
def loss_and_accumulation(evidence: Evidence) -> Outcome:
    """Reckon the loss of the same rows in one batch and accumulated one by one."""
    from vlmdet.doctor.live import probes

    built = evidence.trainer()
    losses = probes.losses_cut_in_two_ways(evidence, built)
    if not math.isfinite(losses.whole) or not math.isfinite(losses.accumulated):
        raise NotAvailable("a loss that is a finite number")
    tokens = sum(count for _, count in losses.single)
    weighted = sum(loss * count for loss, count in losses.single) / tokens
    even = sum(loss for loss, _ in losses.single) / len(losses.single)
    shown = (
        f"{len(losses.single)} rows in one batch: {losses.whole:.4f}; one by one, accumulated: "
        f"{losses.accumulated:.4f}; "
    )
    shown += (
        f"rows alone: {', '.join(f'{loss:.4f} ({count} tokens)' for loss, count in losses.single)}; mean "
        f"weighted by tokens {weighted:.4f}"
    )
    gap = abs(losses.whole - losses.accumulated) / max(abs(losses.whole), 1e-6)
    spread = max(loss for loss, _ in losses.single) - min(loss for loss, _ in losses.single)
    if gap < max(2e-3, 1e-6) or (spread < 1e-3 and gap < 1e-2):
        yield looked("O04", shown)
        return
    if losses.accumulated > 2 * losses.whole:
        cause = (
            "the loss is a mean already and is not divided by the number of micro batches: "
            "num_items_in_batch is taken and not used"
        )
    elif abs(losses.accumulated - even) < abs(losses.accumulated - weighted):
        cause = (
            "each micro batch is averaged by itself, so short answers weigh more than long ones; "
            "num_items_in_batch is not used"
        )
    else:
        cause = "the loss is not a mean over tokens of all micro batches"
    yield found("O04", where=place_of(evidence.subject.build_trainer), evidence=shown, cause=cause)


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
    save = _number(evidence, "save_steps") if best or "save_steps" in own else None
    verdicts = judge_saving(
        save=save,
        evaluate=_number(evidence, "eval_steps"),
        steps=plan(evidence),
        best=best,
        keep=_number(evidence, "save_total_limit"),
        metric=str(values["metric_for_best_model"]) if values["metric_for_best_model"] else None,
        greater=values["greater_is_better"] if isinstance(values["greater_is_better"], bool) else None,
        save_strategy=_word(values["save_strategy"]),
        eval_strategy=_word(values["eval_strategy"]),
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
    for verdict in verdicts[:1]:
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


def _word(value: Any) -> str | None:
    return None if value is None else str(getattr(value, "value", value)).lower()


@check("O06", "O11", needs=("settings|build_trainer",))
def schedule(evidence: Evidence) -> Outcome:
    """Compare the warm-up with the planned steps, a schedule of the user's own with them, and planned figures with what
    follows from the settings."""
    steps = plan(evidence)
    ratio = _number(evidence, "warmup_ratio")
    share = judge_warmup(steps=steps, warmup=_number(evidence, "warmup_steps"), ratio=ratio)
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


@check("O07", needs=("build_trainer|settings",))
def evaluation_loss(evidence: Evidence) -> Outcome:
    """Go one step of evaluation and see whether it gives a loss, and whether the figure that chooses checkpoints exists."""
    built = trainer_of(evidence)
    metric = argument(evidence, "metric_for_best_model")
    strategy = _word(argument(evidence, "eval_strategy")) or "no"
    if built is None:
        names = evidence.options.get("label_names")
        if names is None:
            raise NotAvailable("build_trainer, or label_names")
        if "labels" not in ([names] if isinstance(names, str) else names):
            yield found(
                "O07",
                where="settings",
                evidence=f"label_names={names!r}",
                cause="no loss is reckoned in evaluation without labels by this name",
            )
        else:
            yield looked("O07", f"label_names={names!r}")
        return
    from vlmdet.doctor.live import probes

    loss, names, keys = probes.evaluation_loss(evidence, built)
    shown = f"one step of evaluation: loss {loss}, label_names={list(names)}, the batch has {', '.join(keys)}"
    if loss is None and (built.trainer.eval_dataset is not None or strategy != "no"):
        cause = (
            "the batch has no labels"
            if "labels" not in keys
            else (
                "none of the label names is in the batch"
                if names and not set(names) & set(keys)
                else "the trainer does not find the labels beneath the adapter"
            )
        )
        yield found("O07", where=place_of(evidence.subject.build_trainer), evidence=shown, cause=cause)
        return
    known = ("loss", "eval_loss", "runtime", "mean_token_accuracy", "entropy", "num_tokens")
    bare = str(metric).removeprefix("eval_") if metric else ""
    if (
        bare
        and built.trainer.compute_metrics is None
        and not bare.endswith(known)
        and type(built.trainer).evaluate.__module__.split(".")[0] in ("transformers", "trl")
    ):
        yield found(
            "O07",
            where="training arguments",
            evidence=f"metric_for_best_model={metric!r}, and the trainer has no compute_metrics",
            cause="no figure of that name is ever made",
        )
        return
    yield looked("O07", shown)


@check("L11", needs=("rows|splits", "convert", "collate", "processor"))
def one_row_by_heart(evidence: Evidence) -> Outcome:
    """Let a small model learn one row by heart and write it: a loss near 0 that leads to another answer has labels at the
    wrong place."""
    learnt = evidence.overfit()
    shown = (
        f"{learnt.where}: loss {learnt.losses[0]:.3f} to {learnt.losses[-1]:.3f} in {len(learnt.losses)} "
        f"steps\nanswer   {learnt.target!r}\nwritten  {learnt.written!r}"
    )
    if not learnt.learnt:
        yield skipped(
            "L11",
            f"a small model that learns one row; its loss went from {learnt.losses[0]:.3f} to {learnt.losses[-1]:.3f}",
        )
    elif _alike(learnt.written, learnt.target) < 0.75:
        yield found(
            "L11",
            where=learnt.where,
            evidence=shown,
            cause="the labels do not lead to the answer: they are shifted, or not those of the answer",
            certainty=0.8,
        )
    else:
        yield looked("L11", shown.replace("\n", "; "))


def _alike(one: str, other: str) -> float:
    """Return how much of the answer was written, from its start: 1 for all of it."""
    import difflib

    blocks = difflib.SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks) / max(len(other), 1)


CHECKS: tuple[Check, ...] = (
    learning_rate,
    half_precision,
    loss_and_accumulation,
    best_checkpoint,
    schedule,
    evaluation_loss,
    one_row_by_heart,
    saved_adapters.stages_follow,
)

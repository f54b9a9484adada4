"""Checks of the stage optimisation: rates, precision, accumulation, checkpoints, schedule, the loss of evaluation.

When: CHECK BEFORE TRAINING, from settings, from the arguments of the trainer that was built, and from a few passes of
it. Logs of finished runs are read in `run_logs`, chains of stages in `stages`.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from vlmdet.doctor.calls import NotAvailable, UserCodeError, place_of
from vlmdet.doctor.checks import Check, Outcome, check, found, looked, skipped, stages
from vlmdet.doctor.checks.built import argument, trainer_of, uses_adapter
from vlmdet.doctor.checks.plan import CHECKS as PLAN_CHECKS
from vlmdet.doctor.checks.plan import number, plan, rows_of_training, word
from vlmdet.doctor.checks.rates import judge_rate

if TYPE_CHECKING:
    from vlmdet.doctor.evidence import Evidence

BF16 = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "paligemma", "idefics3", "smolvlm", "gemma3", "qwen_vl")
"""Families whose checkpoints were trained in bfloat16."""


@check("O01", "O02", "M15", needs=("settings|build_trainer",))
def learning_rate(evidence: Evidence) -> Outcome:
    """Judge the learning rate by the method and the number of steps."""
    rate = number(evidence, "learning_rate")
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
    rows, epochs = rows_of_training(evidence), number(evidence, "num_train_epochs", 0) or 0
    if rate <= 0 and built is None:
        yield found("M15", where="settings", evidence=shown, cause="the learning rate is 0")
        return
    yield skipped("M15", "build_trainer")
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


@check("O04", needs=("settings",))
def release_of_accumulation(evidence: Evidence) -> Outcome:
    """Read whether the release of transformers weighs accumulated micro batches by their tokens."""
    options = evidence.options
    steps = options.number("gradient_accumulation_steps")
    version = evidence.versions().get("transformers", "")
    match = re.match(r"(\d+)\.(\d+)", version)
    if not steps or match is None or evidence.subject.build_trainer is not None:
        raise NotAvailable("build_trainer, or gradient_accumulation_steps in the settings")
    if steps > 1 and (int(match.group(1)), int(match.group(2))) < (4, 46):
        yield found(
            "O04",
            where=f"transformers {version}",
            evidence=f"transformers {version}, gradient_accumulation_steps={steps:.0f}",
            cause="before 4.46 each micro batch is averaged by itself, so that short answers weigh more than long ones",
        )
    else:
        yield skipped("O04", "build_trainer")


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


@check("O07", needs=("build_trainer|settings",))
def evaluation_loss(evidence: Evidence) -> Outcome:
    """Go one step of evaluation and see whether it gives a loss, and whether the figure that chooses checkpoints exists."""
    built = trainer_of(evidence)
    metric = argument(evidence, "metric_for_best_model")
    strategy = word(argument(evidence, "eval_strategy")) or "no"
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
    release_of_accumulation,
    loss_and_accumulation,
    *PLAN_CHECKS,
    evaluation_loss,
    one_row_by_heart,
    *stages.CHECKS,
)

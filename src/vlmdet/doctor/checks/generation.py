"""Checks of how answers are generated during training: mode, cache, and the side of padding.

When: as part of `checks.model`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmdet.doctor.calls import NotAvailable
from vlmdet.doctor.checks import Check, Outcome, check, found, looked, skipped
from vlmdet.doctor.checks.built import trainer_of

if TYPE_CHECKING:
    from vlmdet.doctor.evidence import Evidence

PHASES = ("eval", "callback")


@check("M12", "T07", needs=("settings|build_trainer|model",))
def generation(evidence: Evidence) -> Outcome:
    """Watch the user's callbacks generate, and read what the settings say of generation."""
    built = trainer_of(evidence)
    noted = []
    if built is not None:
        from vlmdet.doctor.live.callbacks import watch_callbacks

        noted = watch_callbacks(built)
    yield from _mode(evidence, noted)
    yield from _padding(evidence, noted)


def _mode(evidence: Evidence, noted: list) -> Outcome:  # type: ignore[type-arg]
    """Tell of generation in training mode, without cache."""
    training = [one for one in noted if one.training]
    slow = [one for one in noted if not one.use_cache]
    if training or slow:
        one = (training or slow)[0]
        yield found(
            "M12",
            where=one.caller,
            evidence=f"{len(noted)} calls of generate: {len(training)} with "
            f"model.training=True, {len(slow)} with use_cache=False",
            cause="the callback does not switch the model to evaluation: dropout acts, and recomputation "
            "switches the cache off"
            if training
            else "the cache is switched off for training and stays off",
        )
        return
    options, model = evidence.options, evidence.subject.model
    for phase in PHASES:
        if options.get("use_cache", phase=phase) is False:
            yield found(
                "M12",
                where="settings",
                evidence=options.shown("use_cache", phase=phase),
                cause="without a cache the whole text is read again for each new token",
            )
            return
        for name in ("train_mode", "training_mode", "model_training", "training"):
            if options.get(name, phase=phase) is True:
                yield found(
                    "M12",
                    where="settings",
                    evidence=options.shown(name, phase=phase),
                    cause="dropout acts while answers are generated",
                )
                return
        for name in ("eval_mode", "model_eval"):
            if options.get(name, phase=phase) is False:
                yield found(
                    "M12",
                    where="settings",
                    evidence=options.shown(name, phase=phase),
                    cause="dropout acts while answers are generated",
                )
                return
    if hasattr(model, "named_modules") and evidence.subject.build_trainer is None:
        config = getattr(model, "generation_config", None)
        uncached = (
            getattr(config, "use_cache", None) is False
            or getattr(getattr(model, "config", None), "use_cache", None) is False
        )
        if uncached or (model.training and getattr(model, "is_gradient_checkpointing", False)):
            yield found(
                "M12",
                where="model",
                certainty=0.8,
                evidence=f"model.training={model.training}, use_cache={not uncached}",
                cause="the model is left as training needs it",
            )
            return
        yield looked("M12", f"model.training={model.training}, use_cache=True")
    elif noted:
        yield looked("M12", f"{len(noted)} calls of generate by callbacks, in evaluation mode and with a cache")
    else:
        yield skipped("M12", "a callback of your own that generates, or settings of generation")


def _padding(evidence: Evidence, noted: list) -> Outcome:  # type: ignore[type-arg]
    """Tell of batches of several rows that are padded on the right and then generated from."""
    wrong = [one for one in noted if one.rows > 1 and one.padded_right and not one.padded_left]
    options = evidence.options
    if wrong:
        one = wrong[0]
        yield found(
            "T07",
            where=one.caller,
            evidence=f"generate was called on {one.rows} rows, {one.padded_right} of them padded at the end",
            cause="the answer goes on after the padding, not after the question; transformers says no "
            "word for some families",
        )
        return
    side = next(
        (options.get("padding_side", phase=phase) for phase in PHASES if options.get("padding_side", phase=phase)), None
    )
    sizes = [options.number("per_device_train_batch_size", phase=phase) for phase in PHASES]
    size = next((one for one in sizes if one), None)
    own = side or options.get("padding_side")
    generating = next(
        (
            one
            for key in options.flat
            for one in (options.number(key),)
            if one and "batch" in key and "size" in key and any(word in key for word in ("generat", "infer", "predict"))
        ),
        None,
    )
    if own is None and generating and generating > 1 and evidence.subject.processor is not None:
        own = getattr(evidence.tokenizer, "padding_side", None)
    if own == "right" and (side or generating or size) and (generating or size or 2) > 1:
        yield found(
            "T07",
            where="settings",
            certainty=1.0 if side or options.get("padding_side") else 0.8,
            evidence=f"padding_side='right', and answers are generated in batches of {generating or size or 'several'}",
            cause="in a batch the shorter questions are followed by padding, and their answers begin after it",
        )
        return
    if not noted and own is None:
        raise NotAvailable(
            "padding_side and the batch size of generation in the settings, or a callback that generates"
        )
    yield looked("T07", f"padding_side={own!r}" + (f", {len(noted)} calls of generate" if noted else ""))


CHECKS: tuple[Check, ...] = (generation,)

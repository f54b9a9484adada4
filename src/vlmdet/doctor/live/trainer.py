"""The user's trainer on a small model, and what three steps of it do.

When: for checks of stages model and optimisation. `build` runs the user's `build_trainer` under `patched`; `take_steps`
goes three
steps by the trainer's own loss, optimiser and data, without its scheduler, callbacks and saving.
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from vlmdet.doctor.calls import NotAvailable, UserCodeError, call, fill
from vlmdet.doctor.evidence import Evidence
from vlmdet.doctor.live.patched import Loads, patched

STEPS = 3
MOST_PIXELS = 112 * 112
"""Pictures are shown to the small model no larger than this, where the processor's own limits decide: steps take a second."""


@dataclass
class Built:
    """The trainer that `build_trainer` returned, and what was said while it was built.

    Attributes:
        trainer, model: the trainer and its model, unwrapped of nothing.
        loads: what was loaded and asked for.
        warnings: texts of warnings and of log messages of level WARNING and above.
        trainable: name -> number of trainable parameters.
        total: number of all parameters.
        arguments: the training arguments as the user wrote them (before they were made harmless).
        started: name -> norm of each weight of an adapter that begins at 0 (LoRA's B), before any step.
    """

    trainer: Any
    model: nn.Module
    loads: Loads
    warnings: list[str]
    trainable: dict[str, int]
    total: int
    arguments: dict[str, Any]
    started: dict[str, float] = field(default_factory=dict)


@dataclass
class Steps:
    """What three optimiser steps did.

    Attributes:
        losses: of each step.
        gradients: parameter name -> norm of its gradient, the largest of the steps; None where there never was one.
        moved: trainable parameter name -> norm of its change over all steps.
        optimised: names of parameters that the optimiser holds.
        error: what a step raised.
        rates: learning rate of each group of the optimiser.
    """

    losses: list[float] = field(default_factory=list)
    gradients: dict[str, float | None] = field(default_factory=dict)
    moved: dict[str, float] = field(default_factory=dict)
    optimised: set[str] = field(default_factory=set)
    error: UserCodeError | None = None
    rates: list[float] = field(default_factory=list)


def build(evidence: Evidence) -> Built:
    """Build the user's trainer on a small model.

    Raises:
        UserCodeError: it raised.
        NotAvailable: what it returned is no trainer.
    """
    function = evidence.need("build_trainer")
    given = {"processor": evidence.subject.processor, "model": None, "settings": evidence.subject.settings}
    chosen = fill(function, {k: v for k, v in given.items() if v is not None})
    if any(one == "model" for one in _required(function)):
        chosen["model"] = evidence.tiny().model
    with patched(evidence) as loads, _heard() as heard:
        trainer = call("build_trainer", function, **chosen)
    if isinstance(trainer, tuple):
        trainer = trainer[0]
    model = getattr(trainer, "model", None)
    if not isinstance(model, nn.Module):
        raise NotAvailable("build_trainer that returns a trainer with a model")
    trainable = {name: one.numel() for name, one in model.named_parameters() if one.requires_grad}
    arguments = loads.arguments[-1] if loads.arguments else dict(vars(getattr(trainer, "args", None) or object))
    started = {name: float(one.detach().float().norm()) for name, one in model.named_parameters() if ".lora_B." in name}
    total = sum(one.numel() for one in model.parameters())
    return Built(trainer, model, loads, heard, trainable, total, arguments, started)


def _required(function: Any) -> list[str]:
    from vlmdet.doctor.calls import parameters_of

    return [one.name for one in parameters_of(function).values() if one.default is one.empty]


@contextlib.contextmanager
def _heard() -> Iterator[list[str]]:
    """Collect warnings and log messages."""
    texts: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    ear = Ear(level=logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("", "transformers", "trl", "peft", "accelerate")]
    for logger in loggers:
        logger.addHandler(ear)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield texts
        texts.extend(str(one.message) for one in caught)
    finally:
        for logger in loggers:
            logger.removeHandler(ear)


@contextlib.contextmanager
def small_pictures(*holders: Any) -> Iterator[None]:
    """Let picture processors make small pictures for the time of the block."""
    kept: list[tuple[Any, Any, Any]] = []
    for holder in holders:
        images = getattr(holder, "image_processor", None)
        size: Any = getattr(images, "size", None)
        if images is None or any(images is one for one, _, _ in kept):
            continue
        try:
            longest = size["longest_edge"]
        except (KeyError, TypeError, AttributeError):
            continue
        if isinstance(longest, int) and longest > MOST_PIXELS:
            kept.append((images, size, {name: getattr(images, name, None) for name in ("min_pixels", "max_pixels")}))
            new = {"shortest_edge": min(size["shortest_edge"], 56 * 56), "longest_edge": MOST_PIXELS}
            try:
                images.size = type(size)(**new) if not isinstance(size, dict) else new
            except TypeError:
                images.size = new
    try:
        yield
    finally:
        for images, size, _ in kept:
            images.size = size


def take_steps(evidence: Evidence) -> Steps:
    """Go three steps with the user's trainer.

    Raises:
        UserCodeError, NotAvailable: as `build`; a step that raises is told in `Steps.error`.
    """
    built: Built = evidence.trainer()
    trainer, model = built.trainer, built.model
    steps = Steps()
    names = {id(one): name for name, one in model.named_parameters()}
    trainable = {name: one for name, one in model.named_parameters() if one.requires_grad}
    before = {name: one.detach().clone() for name, one in trainable.items()}
    processors = (
        evidence.subject.processor,
        getattr(trainer, "processing_class", None),
        getattr(trainer.data_collator, "processor", None),
    )
    try:
        with small_pictures(*processors), _heard():
            call("trainer", _go, trainer, model, steps, names)
    except UserCodeError as error:
        steps.error = error
    steps.moved = {name: float((one.detach().float() - before[name].float()).norm()) for name, one in trainable.items()}
    return steps


def _go(trainer: Any, model: nn.Module, steps: Steps, names: Mapping[int, str]) -> None:
    arguments = trainer.args
    arguments.per_device_train_batch_size = min(getattr(arguments, "per_device_train_batch_size", 1), 2)
    if hasattr(trainer, "_train_batch_size"):
        trainer._train_batch_size = arguments.per_device_train_batch_size
    if getattr(arguments, "gradient_checkpointing", False):
        model.gradient_checkpointing_enable(arguments.gradient_checkpointing_kwargs)  # as Trainer.train does it
    trainer.model_wrapped = model
    optimizer = trainer.create_optimizer() or trainer.optimizer
    for group in optimizer.param_groups:
        group["lr"] = group.get("initial_lr", group["lr"])  # a warm-up begins at 0, and no schedule runs here
        steps.rates.append(float(group["lr"]))
        steps.optimised.update(names.get(id(one), "another model's") for one in group["params"])
    model.train()
    steps.gradients = {name: None for name, one in model.named_parameters() if one.requires_grad}
    batches = iter(trainer.get_train_dataloader())
    for _ in range(STEPS):
        try:
            inputs = next(batches)
        except StopIteration:
            batches = iter(trainer.get_train_dataloader())
            inputs = next(batches)
        inputs = trainer._prepare_inputs(inputs)
        loss = trainer.compute_loss(model, inputs)
        loss = loss[0] if isinstance(loss, tuple) else loss
        steps.losses.append(float(loss.detach()))
        loss.backward()
        for name, one in model.named_parameters():
            if one.requires_grad and one.grad is not None:
                norm = float(one.grad.detach().float().norm())
                held = steps.gradients.get(name)
                steps.gradients[name] = norm if held is None or not math.isfinite(norm) else max(norm, held)
        optimizer.step()
        optimizer.zero_grad()

"""Single questions to a built trainer: gradients without recomputation, one batch cut in two ways, one evaluation step.

When: for checks of stages model and optimisation, after the three steps; each takes one or few passes of the small
model. Nothing lasts: gradients are dropped, no weight changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vlmdet.doctor.calls import NotAvailable, call
from vlmdet.doctor.evidence import Evidence
from vlmdet.doctor.gather.conversations import copied
from vlmdet.doctor.live.trainer import Built, _heard, small_pictures

IGNORED = -100
PICTURES = ("pixel_values", "pixel_values_videos", "images", "image_embeds", "pixel_attention_mask")


def first_batch(evidence: Evidence, built: Built) -> dict[str, Any]:
    """Return the first batch of training as the trainer gets it."""
    with _quiet(evidence, built):
        batch = call("trainer", lambda: next(iter(built.trainer.get_train_dataloader())))
        return dict(built.trainer._prepare_inputs(batch))


def shows_pictures(batch: Mapping[str, Any]) -> bool:
    """Tell whether a batch holds pixels."""
    return any(batch.get(name) is not None for name in PICTURES)


def supervised_tokens(batch: Mapping[str, Any]) -> int | None:
    """Count tokens that carry loss; None where the batch has no labels."""
    labels = batch.get("labels")
    return None if labels is None else int((torch.as_tensor(labels) != IGNORED).sum())


def gradients(evidence: Evidence, built: Built, *, recompute: bool) -> dict[str, float | None]:
    """Go forth and back once, with or without recomputed activations; return the norm of each trainable parameter's gradient."""
    model = built.model
    batch = first_batch(evidence, built)
    was = getattr(model, "is_gradient_checkpointing", False)
    try:
        if not recompute and was:
            model.gradient_checkpointing_disable()
        model.train()
        model.zero_grad(set_to_none=True)
        with _quiet(evidence, built):
            loss = call("trainer", built.trainer.compute_loss, model, batch)
            loss = loss[0] if isinstance(loss, tuple) else loss
            call("trainer", loss.backward)
        return {
            name: None if one.grad is None else float(one.grad.detach().float().norm())
            for name, one in model.named_parameters()
            if one.requires_grad
        }
    finally:
        model.zero_grad(set_to_none=True)
        if not recompute and was:
            model.gradient_checkpointing_enable(built.trainer.args.gradient_checkpointing_kwargs)


@dataclass(frozen=True)
class Losses:
    """The loss of the same rows as one batch, and as micro batches of one row each, accumulated as the trainer does it.

    Attributes:
        whole, accumulated: losses; the mean over all tokens is the same for both where nothing depends on the cut.
        single: loss and supervised tokens of each row alone, as a call without `num_items_in_batch` gives them.
    """

    whole: float
    accumulated: float
    single: tuple[tuple[float, int], ...]


def losses_cut_in_two_ways(evidence: Evidence, built: Built, rows: int = 4) -> Losses:
    """Reckon the loss of rows together, and one by one with gradient accumulation.

    Raises:
        NotAvailable: rows of equal length only, no labels, or a data set that cannot be indexed.
        UserCodeError: the trainer's collator or loss raised.
    """
    trainer, model = built.trainer, built.model
    data, collate = trainer.train_dataset, trainer.data_collator
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__") or len(data) < rows:
        raise NotAvailable(f"{rows} rows of a training set that can be indexed")
    model.eval()
    with torch.no_grad(), _quiet(evidence, built):
        examples = [call("trainer", data.__getitem__, int(i * len(data) / (2 * rows))) for i in range(2 * rows)]
        if hasattr(trainer, "_remove_unused_columns") and getattr(trainer.args, "remove_unused_columns", False):
            collate = trainer._get_collator_with_removed_columns(collate)
        ones = [dict(trainer._prepare_inputs(call("collate", collate, [copied(one)]))) for one in examples]
        counts = [supervised_tokens(one) for one in ones]
        if not all(counts):
            raise NotAvailable("labels with supervised tokens in each row")
        order = sorted(range(len(ones)), key=lambda i: counts[i] or 0)
        chosen = [*order[: rows // 2], *order[-(rows - rows // 2) :]]
        if len({counts[i] for i in chosen}) < 2:
            raise NotAvailable("rows whose answers differ in length")
        whole = dict(trainer._prepare_inputs(call("collate", collate, [copied(examples[i]) for i in chosen])))
        parts = [ones[i] for i in chosen]
        single = tuple((_loss(trainer, model, one, None), counts[i] or 0) for i, one in zip(chosen, parts, strict=True))
        together = _step(trainer, model, [whole])
        accumulated = _step(trainer, model, parts)
    return Losses(together, accumulated, single)


def _loss(trainer: Any, model: Any, inputs: dict[str, Any], items: Any) -> float:
    keywords = {} if items is None else {"num_items_in_batch": items}
    loss = call("trainer", trainer.compute_loss, model, dict(inputs), **keywords)
    return float(loss[0] if isinstance(loss, tuple) else loss)


def _step(trainer: Any, model: Any, batches: list[dict[str, Any]]) -> float:
    """Sum the losses of micro batches as `Trainer.training_step` scales them."""
    items = (
        trainer._get_num_items_in_batch(batches, torch.device("cpu"))
        if hasattr(trainer, "_get_num_items_in_batch")
        else None
    )
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None:
        scaled = (
            getattr(trainer, "model_accepts_loss_kwargs", False) and items is not None
        ) or trainer.compute_loss_func is not None
    total = sum(_loss(trainer, model, one, items) for one in batches)
    return total if scaled else total / len(batches)


def evaluation_loss(evidence: Evidence, built: Built) -> tuple[float | None, tuple[str, ...], tuple[str, ...]]:
    """Go one step of evaluation; return its loss (None where there is none), the trainer's label names, and the batch's keys."""
    trainer = built.trainer
    with _quiet(evidence, built):
        if trainer.eval_dataset is not None:
            batch = call("trainer", lambda: next(iter(trainer.get_eval_dataloader(_first_of(trainer.eval_dataset)))))
        else:
            batch = call("trainer", lambda: next(iter(trainer.get_train_dataloader())))
        built.model.eval()
        keys = tuple(batch)
        loss, _, _ = call("trainer", trainer.prediction_step, built.model, batch, True)
    return None if loss is None else float(loss.mean()), tuple(trainer.label_names or ()), keys


def _first_of(data: Any) -> Any:
    return next(iter(data.values())) if isinstance(data, Mapping) and not hasattr(data, "features") else data


@contextlib.contextmanager
def _quiet(evidence: Evidence, built: Built) -> Iterator[None]:
    trainer = built.trainer
    holders = (
        evidence.subject.processor,
        getattr(trainer, "processing_class", None),
        getattr(trainer.data_collator, "processor", None),
    )
    with small_pictures(*holders), _heard():
        yield

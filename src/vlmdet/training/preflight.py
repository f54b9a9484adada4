"""The plan of a run that is not started: `vlmdet plan`.

When: before a run, as often as wanted; nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vlmdet.models.families import codec_of
from vlmdet.models.loader import Loaded, load_processor, make_contract
from vlmdet.models.stages import stages_of
from vlmdet.settings import Settings
from vlmdet.training.batches import make_collator, training_rows
from vlmdet.training.lengths import read_lengths
from vlmdet.training.plan import Plan, has_weights, make_plan, measure_step, set_up, skeleton_of
from vlmdet.training.precision import in_half, keep_exact
from vlmdet.training.prepare import fingerprint_rows, load_base, read_data
from vlmdet.training.processes import world_size


def preflight(settings: Settings, *, processes: int | None = None, say: Callable[[str], None] = print) -> Plan:
    """Plan a run from its settings.

    When: once per stage of `vlmdet plan`.

    Input: settings; without `data.source` only what concerns the model is planned. `processes`, as many as would share the work.
    Output: `Plan`. Where the base's weights are on this machine they are loaded, and a step is measured on the first rows; else a
    model without weights is built from its configuration, and no time is given.

    Raises:
        DataError: rows are too long, see `lengths.refuse_long_rows`, or the data set cannot be read.
        ModelError: there is no such base, or no processor to count tokens with.
    """
    dataset = read_data(settings, say) if settings.data.source else None
    base = load_base(settings) if has_weights(stages_of(settings.model.name).weights) else None
    plain = skeleton_of(settings) if base is None else set_up(base.model, settings)
    keep_exact(plain)
    plain.config.use_cache = False
    where, half = _compute(settings, plain, real=base is not None)
    tokens, seconds = None, None
    if dataset is not None:
        loaded = base or _without_weights(settings, plain)
        contract = make_contract(
            loaded,
            labels=dataset.labels,
            codec=codec_of(loaded.model.config.model_type, settings.model.codec),
            box_order=settings.data.box_order,
            max_new_tokens=settings.evaluation.max_new_tokens,
            data_fingerprint=fingerprint_rows(dataset),
        )
        samples = dataset.splits["train"]
        rows = training_rows(samples, settings, contract)
        tokens = read_lengths(rows, samples, loaded.processor, settings, contract, config=plain.config)
        if base is not None:
            batch = [rows[i] for i in range(min(settings.training.batch_size, len(rows)))]
            seconds = measure_step(plain, make_collator(base.processor, settings, contract)(batch))
    return make_plan(
        settings,
        plain,
        tokens=tokens,
        val_rows=0 if dataset is None else min(len(dataset.splits.get("val", ())), settings.training.eval_rows),
        processes=processes or world_size(),
        device=where,
        compute_bytes=2 if half else 4,
        seconds_per_pass=seconds,
    )


def _without_weights(settings: Settings, skeleton: Any) -> Loaded:
    """Stand in for a loaded base: a processor, and a model that is only asked what it is."""
    model = settings.model
    base = stages_of(model.name).weights
    processor = load_processor(base, min_pixels=model.min_pixels, max_pixels=model.max_pixels)
    return Loaded(skeleton, processor, base, "", None)


def _compute(settings: Settings, model: Any, *, real: bool) -> tuple[str, bool]:
    """Return the device that the run would take, and whether it computes in 16 bits."""
    if real:
        return str(next(model.parameters()).device.type), in_half(model)
    asked, dtype = settings.model.device, settings.model.dtype
    where = ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked
    return where, dtype == "bfloat16" or (dtype == "auto" and where.startswith("cuda"))

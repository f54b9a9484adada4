"""The preflight: what a run will read, train, need and take, with the arithmetic, before anything starts.

When: PER RUN, by `vlmdet plan` and before every training. What cannot work is an error elsewhere; what looks wrong is in
`Plan.warnings`, each with its way out.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model

from vlmdet.models.families import parameters_by_area
from vlmdet.models.loader import build_skeleton
from vlmdet.models.lora import build_lora_config, format_areas, train_only
from vlmdet.settings import Settings, TrainingSettings
from vlmdet.training.lengths import RowTokens
from vlmdet.training.memory import Batch, estimate_memory
from vlmdet.training.optim import rates_by_area
from vlmdet.training.precision import as_the_run
from vlmdet.training.untouched import untouched
from vlmdet.utils.gpu import find_available_gpus

GIB = 2**30
MOST_WARMUP = 0.2
MOST_IMAGE_TOKENS = 2000
LEAST_ANSWER_SHARE = 0.01


@dataclass(frozen=True)
class Plan:
    """What a run will do; without a data set only what concerns the model is filled.

    Attributes:
        rows: training rows; None without a data set.
        image_tokens: of each row: `{"p50", "p95", "max"}`.
        answer_tokens: likewise, those that carry loss.
        answer_share: answer tokens over all tokens.
        steps: optimiser steps.
        steps_arithmetic: how they come about, one line.
        warmup_steps: during which the rate rises.
        evaluations: how often answers are generated and scored during the run, the last step included.
        parameters: by area, trainable, frozen and quantised.
        trainable_parameters: their sum.
        learning_rates: by area that trains.
        memory: estimated peak of one process in bytes, by part, see `training.memory`.
        memory_total: the sum.
        device: what was found: `cpu, 23.0 GiB of memory available`.
        available: bytes there for one process; None where nobody tells.
        fits: whether the sum does; None where nobody tells.
        seconds_per_pass: measured, forward and backward; None where not measured.
        seconds: expected for all steps, without evaluations; None likewise.
        warnings: what looks wrong.
    """

    rows: int | None
    image_tokens: dict[str, int] | None
    answer_tokens: dict[str, int] | None
    answer_share: float | None
    steps: int | None
    steps_arithmetic: str
    warmup_steps: int | None
    evaluations: int | None
    parameters: dict[str, dict[str, int]]
    trainable_parameters: int
    learning_rates: dict[str, float]
    memory: dict[str, int]
    memory_total: int
    device: str
    available: int | None
    fits: bool | None
    seconds_per_pass: float | None
    seconds: float | None
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self)


def make_plan(
    settings: Settings,
    model: Any,
    *,
    tokens: RowTokens | None = None,
    val_rows: int = 0,
    processes: int = 1,
    device: str = "cpu",
    compute_bytes: int = 4,
    seconds_per_pass: float | None = None,
    fused_loss: bool = True,
) -> Plan:
    """Work out what a run will do.

    When: once per run, before the first step, and in `vlmdet plan`.

    Input: the run's `settings`; `model` as it will train, the trainer's or `skeleton_of`; `tokens` of the training rows
    (`lengths.count_tokens`); `val_rows`, validation rows that there are; `processes` that share the work; `device`, `cpu` or
    `cuda`; `compute_bytes`, 2 for bfloat16, else 4; `seconds_per_pass` from `measure_step`; `fused_loss`, logits are
    computed only where labels are (`training.losses`).
    """
    training = settings.training
    rows = None if tokens is None else len(tokens.ids)
    steps, arithmetic = plan_steps(training, rows, processes)
    warmup = None if steps is None else math.ceil(training.warmup_fraction * steps)
    batch = None
    if tokens is not None and rows:
        longest, answers = int(tokens.total.max()), int(tokens.answer.max())
        batch = Batch(
            min(training.batch_size, rows), longest, int(tokens.image.max()), answers if fused_loss else longest
        )
    parameters = parameters_by_area(model.named_parameters())
    memory = estimate_memory(
        model,
        compute_bytes=compute_bytes,
        optimizer=training.optimizer,
        checkpointing=training.gradient_checkpointing,
        batch=batch,
        processes=processes,
        device="cuda" if device.startswith("cuda") else "cpu",
    )
    total = sum(memory.values())
    found, available = find_memory(device, processes)
    share = None if tokens is None or not rows else float(tokens.answer.sum() / tokens.total.sum())
    passes = None if steps is None else steps * training.gradient_accumulation
    plan = Plan(
        rows=rows,
        image_tokens=None if tokens is None else _spread(tokens.image),
        answer_tokens=None if tokens is None else _spread(tokens.answer),
        answer_share=share,
        steps=steps,
        steps_arithmetic=arithmetic,
        warmup_steps=warmup,
        evaluations=None if steps is None else _evaluations(training, steps, val_rows),
        parameters=parameters,
        trainable_parameters=sum(count["trainable"] for count in parameters.values()),
        learning_rates={area: rate for area, rate in rates_by_area(training).items() if parameters[area]["trainable"]},
        memory=memory,
        memory_total=total,
        device=found,
        available=available,
        fits=None if available is None else total <= available,
        seconds_per_pass=seconds_per_pass,
        seconds=None if seconds_per_pass is None or passes is None else seconds_per_pass * passes,
        warnings=(),
    )
    return Plan(**{**vars(plan), "warnings": tuple(_findings(plan, training))})


def plan_steps(training: TrainingSettings, rows: int | None, processes: int) -> tuple[int | None, str]:
    """Return the number of optimiser steps and the arithmetic behind it.

    Output: `(24, "120 rows / (8 x 2 x 1 processes) = 8 a pass x 3 epochs = 24 steps")`; each division is rounded up, as the
    trainer does. None without rows, unless `training.max_steps` says it.
    """
    if training.max_steps:
        return training.max_steps, f"training.max_steps = {training.max_steps} steps"
    if rows is None:
        return None, "no data set, no steps"
    batches = math.ceil(rows / (training.batch_size * processes))
    a_pass = math.ceil(batches / training.gradient_accumulation)
    steps = max(1, math.ceil(a_pass * training.epochs))
    size = f"{training.batch_size} x {training.gradient_accumulation} x {processes} processes"
    return steps, f"{rows:,} rows / ({size}) = {a_pass:,} a pass x {training.epochs:g} epochs = {steps:,} steps"


def skeleton_of(settings: Settings) -> Any:
    """Build the model that the settings would train, adapter and frozen areas included, without weights.

    When: in `vlmdet plan`; needs a configuration only.

    Raises:
        ConfigError: a target or an area fits nothing in this model.
        ModelError: there is no configuration.
    """
    model = build_skeleton(
        settings.model.name, quantization=settings.model.quantization, quantize_vision=settings.model.quantize_vision
    )
    return set_up(model, settings)


def set_up(model: Any, settings: Settings) -> Any:
    """Put the adapter on a plain model, or thaw and freeze its areas, as a run would."""
    if settings.training.method == "lora":
        bare = model.device.type == "meta"  # without it each matrix would be drawn at random first
        return get_peft_model(model, build_lora_config(model, **asdict(settings.lora)), low_cpu_mem_usage=bare)
    if settings.training.areas:
        train_only(model, settings.training.areas)
    return model


def measure_step(model: Any, batch: Mapping[str, Any], *, passes: int = 2, fused: bool = False) -> float:
    """Measure one forward and backward pass on a real batch; the model and the random numbers stay as they were.

    When: once per run, before the first step.

    Input: the trainer's own `model`; a `batch` of its collator. The first of `passes` is for warming up and does not count,
    unless it is the only one; `fused`, the model has TRL's fused head, and the run uses it.
    Output: seconds of the fastest of the others.
    """
    cuda = model.device.type == "cuda"
    ready = {key: value.to(model.device) for key, value in batch.items()}
    head = {"fused_lm_head": True} if fused else {}
    taken = []
    with untouched(model, weights=False):
        model.train()
        model.config.use_cache = False
        for _ in range(passes):
            started = time.perf_counter()
            with as_the_run(model):
                loss = model(**ready, **head).loss
            loss.backward()
            if cuda:
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - started)
            for weight in model.parameters():
                weight.grad = None
    return min(taken[1:] or taken)


def find_memory(device: str, processes: int = 1) -> tuple[str, int | None]:
    """Find how much memory one process of a run may take.

    Output: a line for the user and bytes, None where nobody tells. On CUDA what the fullest of the `processes` freest GPUs has
    left; on a CPU the machine's available memory, divided.
    """
    if device.startswith("cuda"):
        gpus = find_available_gpus(min_free_memory_gb=0.0, max_utilization=1.0)[:processes]
        if len(gpus) < processes or not gpus:
            return f"{processes} GPU asked for, {len(gpus)} found", None
        free = min(gpu.free_gib or 0.0 for gpu in gpus)
        names = ", ".join(sorted({gpu.name for gpu in gpus}))
        return f"{len(gpus)} x {names}, {free:.1f} GiB free", round(free * GIB)
    available = _available_memory()
    if available is None:
        return "cpu, memory unknown", None
    return f"cpu, {available / GIB:.1f} GiB of memory available", available // processes


def format_plan(plan: Plan) -> str:
    """Lay a plan out for a terminal: rows, tokens, steps, parameters, memory by part, time, warnings."""
    lines = []
    if plan.rows is not None:
        image, answer = plan.image_tokens or {}, plan.answer_tokens or {}
        lines += [
            f"rows: {plan.rows:,}",
            f"image tokens: p50 {image['p50']:,}, p95 {image['p95']:,}, max {image['max']:,}",
            f"answer tokens: p50 {answer['p50']:,}, p95 {answer['p95']:,}, max {answer['max']:,}; "
            f"{plan.answer_share or 0:.1%} of all tokens carry loss",
        ]
    lines.append(f"steps: {plan.steps_arithmetic}")
    if plan.steps is not None:
        lines.append(
            f"warm-up: {plan.warmup_steps} of {plan.steps:,} steps ({(plan.warmup_steps or 0) / plan.steps:.0%}); "
            f"evaluations: {plan.evaluations}"
        )
    lines += ["", format_areas(plan.parameters), ""]
    lines.append("learning rates: " + ", ".join(f"{area} {rate:g}" for area, rate in plan.learning_rates.items()))
    parts = ", ".join(
        f"{part.replace('_', ' ')} {_size(size)}" for part, size in plan.memory.items() if size or part == "activations"
    )
    fits = {True: "fits", False: "DOES NOT FIT", None: "unknown whether it fits"}[plan.fits]
    missing = "" if plan.rows is not None else " (without a data set: no activations, no logits)"
    lines += [
        f"memory of a process, estimated: {_size(plan.memory_total)}{missing}, {fits} ({plan.device})",
        f"  {parts}",
    ]
    if plan.seconds_per_pass is None:
        lines.append("time: not measured")
    else:
        whole = "" if plan.seconds is None else f" -> {_duration(plan.seconds)} without evaluations"
        lines.append(f"time: {plan.seconds_per_pass:.2f} s a pass, measured{whole}")
    lines += [f"warning: {text}" for text in plan.warnings]
    return "\n".join(lines)


def _findings(plan: Plan, training: TrainingSettings) -> list[str]:
    """Word what looks wrong; rows V04, L07, O05 and O06 of the doctor's catalogue, and memory."""
    found = []
    steps = plan.steps
    if steps is not None and plan.warmup_steps is not None:
        if plan.warmup_steps > MOST_WARMUP * steps:
            found.append(
                f"warm-up takes {plan.warmup_steps} of {steps} steps: the full rate is reached only briefly; "
                f"lower training.warmup_fraction or train longer"
            )
        if plan.evaluations == 0:
            found.append(
                "evaluation never happens: there is no validation row, so the best checkpoint cannot be chosen; "
                "raise data.val_fraction"
            )
        elif training.eval_every > steps:
            found.append(
                f"training.eval_every is {training.eval_every}, the run has {steps} steps: it is scored after the last one "
                "only; lower it to choose among several checkpoints"
            )
    save, evaluate = training.save_every, training.eval_every
    if save and evaluate and save % evaluate and evaluate % save:
        found.append(
            f"training.save_every={save} is not aligned with training.eval_every={evaluate}: some checkpoints are never "
            "scored; make one a multiple of the other"
        )
    if plan.fits is False and plan.available is not None:
        found.append(
            f"{_size(plan.memory_total)} are needed and {_size(plan.available)} are there ({plan.device}); halve "
            "training.batch_size and double training.gradient_accumulation, set training.gradient_checkpointing=true, lower "
            "model.max_pixels, or use model.quantization=nf4"
        )
    if plan.image_tokens is not None and plan.image_tokens["max"] > MOST_IMAGE_TOKENS:
        found.append(
            f"a picture takes up to {plan.image_tokens['max']:,} image tokens: slow, and seldom better than "
            f"{MOST_IMAGE_TOKENS:,}; lower model.max_pixels"
        )
    if plan.answer_share is not None and plan.answer_share < LEAST_ANSWER_SHARE:
        found.append(
            f"only {plan.answer_share:.2%} of the tokens are answers: most of the time goes into pictures and prompts; lower "
            "model.max_pixels, or ask for fewer classes"
        )
    return found


def _evaluations(training: TrainingSettings, steps: int, val_rows: int) -> int:
    if not val_rows:
        return 0
    return math.ceil(steps / training.eval_every) if training.eval_every else 1


def _spread(values: np.ndarray) -> dict[str, int]:
    """Return the median, the 95th percentile and the maximum; percentiles are values that occur."""
    if not len(values):
        return {"p50": 0, "p95": 0, "max": 0}
    p50, p95 = np.percentile(values, [50, 95], method="inverted_cdf")
    return {"p50": int(p50), "p95": int(p95), "max": int(values.max())}


def _available_memory() -> int | None:
    """Return the bytes that the system would give without swapping (Linux), else all of the machine's memory."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _size(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def has_weights(name: str) -> bool:
    """Tell whether a base can be loaded here without a download: `tiny`, a run, or a folder with safetensors."""
    return name == "tiny" or bool(_safetensors(Path(name)))


def _safetensors(folder: Path) -> Sequence[Path]:
    return sorted(folder.glob("*.safetensors")) if folder.is_dir() else []

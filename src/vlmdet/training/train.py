"""Train a model on a data set; read from top to bottom.

When: PER RUN.

    vlmdet train SOURCE --recipe r4-joint --model Qwen/Qwen2-VL-2B-Instruct training.epochs=5

`prepare` reads the data, loads the base and writes the contract; `train` runs TRL's `SFTTrainer` with our collator. They
are two steps so that a caller can score the untuned base between them, under the very contract of the run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from trl import SFTConfig, SFTTrainer

from vlmdet.config import Settings, to_yaml
from vlmdet.contract import Contract
from vlmdet.data.augment import augment_rows
from vlmdet.data.collators import Qwen2VLCollatorV1, Qwen2VLCollatorV2, Qwen2VLCollatorV3
from vlmdet.data.dataset import build_rows
from vlmdet.data.readers import open_dataset
from vlmdet.data.select import check_pictures, drop_rows, ensure_val, refuse_above, select, write_problems
from vlmdet.errors import DataError, TrainingError
from vlmdet.evaluation.predict import predict
from vlmdet.grounding.sizes import plan_view
from vlmdet.models.loader import Loaded, load, make_contract
from vlmdet.models.lora import build_lora_config, format_areas, refuse_untrainable
from vlmdet.records import DetectionDataset, Sample
from vlmdet.runs import new_run
from vlmdet.training.callbacks import (
    GradNormCallback,
    IoUEvalCallback,
    JsonLogCallback,
    ProgressBar,
    SamplePictureCallback,
)
from vlmdet.training.optim import Muon, muon_groups
from vlmdet.utils.environment import describe_environment, format_environment

Say = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start: its folder holds `config.yaml`, `contract.json` and `problems.jsonl`."""

    settings: Settings
    folder: Path
    dataset: DetectionDataset
    base: Loaded
    contract: Contract


def read_data(settings: Settings, say: Say) -> DetectionDataset:
    """Open the data set that the settings name, with their classes, names, limit and validation split.

    When: once per run; again by `vlmdet eval` from the run's `config.yaml`.

    Raises:
        DataError: nothing there, an unknown class, or no rows left.
    """
    data = settings.data
    dataset = open_dataset(
        data.source, format=data.format, box_format=data.box_format, exif=data.exif, stream=data.stream
    )
    dataset = select(
        dataset, classes=data.classes or None, rename=data.rename or None, limit=data.limit, seed=data.seed
    )
    dataset, note = ensure_val(dataset, fraction=data.val_fraction, seed=data.seed)
    for line in dict.fromkeys([*dataset.notes, note]):
        say(line)
    counts = ", ".join(f"{name} {len(samples)}" for name, samples in dataset.splits.items())
    say(f"data: {data.source}: {counts} pictures; boxes read as {dataset.box_format} ({dataset.decided_by})")
    if not dataset.splits.get("train"):
        raise DataError(f"{data.source}: no row in the split 'train'", f"there is: {counts or 'no split at all'}")
    if not dataset.labels:
        raise DataError(f"{data.source}: no class to look for", "name one with --classes")
    return dataset


def prepare(settings: Settings, *, command: str = "", say: Say = print) -> Prepared:
    """Read the data, look at every picture, load the base and write down what the run assumes.

    When: once per run, before anything is trained.

    Input: checked settings; `command`, as typed, for the record; `say`, where lines for the user go.
    Output: `Prepared`; in the new run folder `config.yaml`, `contract.json`, `command.txt`, `env.txt`, `problems.jsonl`.

    Raises:
        DataError: too many rows are broken, see `data.max_problems`.
        ModelError: the base cannot be loaded.
    """
    dataset = read_data(settings, say)
    used = [sample for name in ("train", "val") for sample in dataset.splits.get(name, ())]
    before = sum(problem.action == "row_dropped" for problem in dataset.problems)
    total = sum(len(samples) for samples in dataset.splits.values()) + before
    dataset = drop_rows(dataset, check_pictures(used))
    problems = dataset.problems
    refuse_above(problems, total, share=settings.data.max_problems)

    model = settings.model
    base = load(
        model.name,
        dtype=model.dtype,
        device=model.device,
        attention=model.attention,
        min_pixels=model.min_pixels,
        max_pixels=model.max_pixels,
    )
    if base.contract is not None:
        raise TrainingError(
            f"{model.name} is a tuned run", "training on top of a run is not supported yet; name its base"
        )
    contract = make_contract(
        base,
        labels=dataset.labels,
        codec="qwen2_vl" if model.codec == "auto" else model.codec,
        box_order=settings.data.box_order,
        max_new_tokens=settings.evaluation.max_new_tokens,
        data_fingerprint=fingerprint_rows(dataset),
    )

    folder = new_run(settings.name)
    (folder / "config.yaml").write_text(to_yaml(settings), encoding="utf-8")
    (folder / "command.txt").write_text(command + "\n", encoding="utf-8")
    (folder / "env.txt").write_text(format_environment(describe_environment()) + "\n", encoding="utf-8")
    write_problems(folder / "problems.jsonl", problems)
    contract.write(folder)
    kinds = Counter(f"{problem.kind} ({problem.action})" for problem in problems)
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "none"
    say(f"problems: {listed}; written to {folder / 'problems.jsonl'}")
    return Prepared(settings, folder, dataset, base, contract)


def fingerprint_rows(dataset: DetectionDataset) -> str:
    """Hash ids, splits, boxes and labels of a data set: 16 hexadecimal digits."""
    rows = [
        [sample.id, split, sample.boxes.tolist(), list(sample.labels)]
        for split, samples in sorted(dataset.splits.items())
        for sample in samples
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def train(prepared: Prepared, *, say: Say = print) -> Path:
    """Train the prepared base and return the run's folder, in which `checkpoints/best` is the result.

    When: once per run.

    Raises:
        TrainingError: nothing is trainable, the model is wrapped already, or the first batch's labels are not exactly
            the answers.
    """
    settings, folder, contract = prepared.settings, prepared.folder, prepared.contract
    training = settings.training
    transformers.set_seed(training.seed)
    logging.getLogger("transformers.trainer").setLevel(logging.WARNING)

    # 1. Rows: conversation and picture, written once; changed at every access only where augmentation is on.
    rows = training_rows(prepared)
    steps = planned_steps(settings, len(rows))
    size = training.batch_size * training.gradient_accumulation
    how = f"limited to {steps}" if training.max_steps else f"x {training.epochs:g} epochs -> {steps}"
    say(f"steps: {len(rows)} rows / {size} a step {how} steps")

    # 2. The adapter is described here and built by the trainer, once.
    model = prepared.base.model
    peft_config = None
    if training.method == "lora":
        lora = settings.lora
        peft_config = build_lora_config(
            model, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, targets=lora.targets
        )
    model.config.use_cache = False

    # 3. Callbacks: norms, scores, pictures, log, in this order.
    (folder / "train").mkdir()
    watched = list(prepared.dataset.splits.get("val", []))[: training.eval_rows]
    evaluation = IoUEvalCallback(
        partial(predict_watched, prepared=prepared, samples=watched),
        labels=contract.labels,
        every=training.eval_every,
        metrics_csv=folder / "train" / "metrics.csv",
        write_contract=contract.write,
    )
    callbacks = [
        GradNormCallback(),
        evaluation,
        SamplePictureCallback(evaluation, watched, folder / "train" / "samples", count=training.sample_rows),
        JsonLogCallback(folder / "train" / "log.jsonl"),
    ]

    # 4. The trainer. TRL's defaults that would do harm here are set: no truncation, no dropped columns, no hub.
    arguments = SFTConfig(
        output_dir=str(folder / "checkpoints"),
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule,
        warmup_steps=math.ceil(training.warmup_fraction * steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        activation_checkpointing=training.gradient_checkpointing,
        bf16=model.dtype == torch.bfloat16,
        use_cpu=model.device.type == "cpu",
        max_length=None,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_num_workers=training.loader_workers,
        save_strategy="no",  # the evaluation callback asks for a checkpoint whenever it has scored one
        save_only_model=True,  # nothing resumes yet, and the optimizer's state would be a pickle of twice the size
        eval_strategy="no",
        logging_steps=max(1, min(10, steps // 10)),
        logging_first_step=True,
        report_to="none",
        disable_tqdm=None,
        seed=training.seed,
        push_to_hub=False,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=make_collator(prepared),
        processing_class=prepared.base.processor,
        peft_config=peft_config,
        callbacks=callbacks,
        optimizers=(make_optimizer(model, settings), None),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.remove_callback(transformers.ProgressCallback)  # it writes every log to stdout, which --json keeps clean
    if sys.stderr.isatty():
        trainer.add_callback(ProgressBar)
    # not TRL's own `log`, which would move its averages since the last entry into this one
    evaluation.log = partial(transformers.Trainer.log, trainer)

    # 5. What will train, before the first step; nothing trainable is an error.
    say(format_areas(refuse_untrainable(trainer.model)))
    trainer.train()
    model.config.use_cache = True
    best = (folder / "checkpoints" / "best").resolve()
    f1, iou = evaluation.best
    say(f"best checkpoint: {best} (F1@0.5 {f1:.3f}, mean best IoU {iou:.3f} on {len(watched)} val pictures)")
    return folder


def training_rows(prepared: Prepared) -> datasets.Dataset:
    """Make the rows that the trainer reads: `messages`, `image`, `boxes`, `labels`, `id`."""
    settings, contract = prepared.settings, prepared.contract
    view_of = partial(
        plan_view, min_pixels=contract.min_pixels, max_pixels=contract.max_pixels, factor=contract.size_factor
    )
    rows = build_rows(
        prepared.dataset.splits["train"],
        labels=contract.labels,
        codec=contract.codec,
        box_order=settings.data.box_order,
        view_of=view_of,
    )
    chances = asdict(settings.augment)
    if any(chances.values()):
        rows = rows.with_transform(
            partial(
                augment_rows,
                chances=chances,
                asked=contract.labels,
                codec=contract.codec,
                box_order=settings.data.box_order,
                view_of=view_of,
            )
        )
    return rows


def make_optimizer(model: Any, settings: Settings) -> torch.optim.Optimizer | None:
    """Return Muon where the settings ask for it; None leaves AdamW to the trainer."""
    training = settings.training
    if training.optimizer == "adamw":
        return None
    groups = muon_groups(model, lr=training.learning_rate, weight_decay=training.weight_decay)
    return Muon(groups, lr=training.learning_rate)


def planned_steps(settings: Settings, rows: int) -> int:
    """Return the number of optimiser steps: rows over batches, rounded up, times epochs, or `max_steps`."""
    training = settings.training
    if training.max_steps:
        return training.max_steps
    batches = math.ceil(rows / training.batch_size)
    return max(1, math.ceil(math.ceil(batches / training.gradient_accumulation) * training.epochs))


def make_collator(prepared: Prepared) -> Any:
    """Return the collator that the settings name, with the contract's pixel limits."""
    kinds = {"v1": Qwen2VLCollatorV1, "v2": Qwen2VLCollatorV2, "v3": Qwen2VLCollatorV3}
    return kinds[prepared.settings.training.collator](
        prepared.base.processor, min_pixels=prepared.contract.min_pixels, max_pixels=prepared.contract.max_pixels
    )


def predict_watched(model: Any, *, prepared: Prepared, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Predict the validation pictures during training, under the run's contract."""
    evaluation = prepared.settings.evaluation
    return predict(
        model,
        prepared.base.processor,
        samples,
        contract=prepared.contract,
        batch_size=evaluation.batch_size,
        max_new_tokens=evaluation.max_new_tokens,
    )

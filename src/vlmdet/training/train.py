"""Train a model on a data set; read from top to bottom.

When: PER RUN.

    vlmdet train SOURCE --recipe r4-joint --model Qwen/Qwen2-VL-2B-Instruct training.epochs=5

`prepare` reads the data, loads the base and writes the contract; `train` runs TRL's `SFTTrainer` with our collator. They
are two steps so that a caller can score the untuned base between them, under the very contract of the run. `train_stages`
does both for each stage of a recipe. A stopped run goes on where its newest whole checkpoint is; see `training.checkpoints`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
import transformers
from trl import SFTConfig, SFTTrainer

from vlmdet.config import AugmentSettings, Settings, to_yaml
from vlmdet.contract import Contract
from vlmdet.data.readers import open_dataset
from vlmdet.data.select import check_pictures, drop_rows, ensure_val, refuse_above, select, write_problems
from vlmdet.errors import DataError, Stopped, TrainingError
from vlmdet.evaluation.predict import predict
from vlmdet.models.loader import Loaded, load, make_contract
from vlmdet.models.lora import build_lora_config, format_areas, refuse_untrainable, train_only
from vlmdet.records import DetectionDataset, Sample
from vlmdet.runs import find_equal, is_done, lock, new_run
from vlmdet.training.batches import LengthGroups, cache_features, make_collator, training_rows
from vlmdet.training.callbacks import (
    EpochCallback,
    GradNormCallback,
    IoUEvalCallback,
    JsonLogCallback,
    ProgressBar,
    SamplePictureCallback,
    StopCallback,
    choose_trackers,
)
from vlmdet.training.checkpoints import go_back, is_disk_full, write_done
from vlmdet.training.gate import ROWS, STEPS, GateResult, choose_rows, format_gate, gate_rates, overfit_gate
from vlmdet.training.lengths import context_of, count_tokens, refuse_long_rows
from vlmdet.training.losses import score_supervised_only
from vlmdet.training.optim import make_optimizer
from vlmdet.training.processes import check_launched, from_main, is_main, join, predict_shared, world_size
from vlmdet.utils.environment import describe_environment, format_environment

Say = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start: its folder holds `config.yaml`, `contract.json` and `problems.jsonl`.

    Attributes:
        lock: keeps other processes out of the folder as long as it is open; None on all but the main process.
    """

    settings: Settings
    folder: Path
    dataset: DetectionDataset
    base: Loaded
    contract: Contract
    lock: IO[str] | None = None


def train_stages(
    stages: Sequence[Settings], *, command: str = "", new: bool = False, say: Say = print
) -> tuple[Path, Prepared]:
    """Train each stage on the result of the one before; returns the folder of the last run, and how it was prepared.

    When: once per command. A stage but the last that is finished already, with the same settings, data and base, is used as
    it is, unless `new`.
    """
    below: Path | None = None
    for number, settings in enumerate(stages, 1):
        last = number == len(stages)
        if len(stages) > 1:
            say(f"\nstage {number} of {len(stages)}: {settings.name}")
        if below is not None:
            best = os.path.relpath((below / "checkpoints" / "best").resolve())
            settings = replace(settings, model=replace(settings.model, name=best))
        prepared = prepare(settings, command=command, new=new, reuse=not last, say=say)
        below = prepared.folder if is_done(prepared.folder) else train(prepared, say=say)
        if not last and prepared.lock is not None:
            prepared.lock.close()
    return prepared.folder, prepared


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


def prepare(
    settings: Settings, *, command: str = "", new: bool = False, reuse: bool = False, say: Say = print
) -> Prepared:
    """Read the data, look at every picture, load the base and write down what the run assumes.

    When: once per run, before anything is trained.

    Input: checked settings; `command`, as typed, for the record; `new`, start another run where an equal one is
    unfinished; `reuse`, take an equal one that is finished, too; `say`, where lines for the user go.
    Output: `Prepared`; in the run's folder `config.yaml`, `contract.json`, `command.txt`, `env.txt`, `problems.jsonl`. The folder
    is that of the newest run with equal settings, data and base, if that is unfinished; else a new one.

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

    base = load_base(settings)
    contract = make_contract(
        base,
        labels=dataset.labels,
        codec=settings.model.codec,
        box_order=settings.data.box_order,
        max_new_tokens=settings.evaluation.max_new_tokens,
        data_fingerprint=fingerprint_rows(dataset),
    )
    join(cpu=base.model.device.type == "cpu")
    folder = from_main(partial(_choose_folder, settings, contract, new=new, reuse=reuse))
    held = None
    if is_main():
        held = lock(folder)
        with (folder / "command.txt").open("a", encoding="utf-8") as file:
            file.write(command + "\n")
        (folder / "env.txt").write_text(format_environment(describe_environment()) + "\n", encoding="utf-8")
        write_problems(folder / "problems.jsonl", problems)
        contract.write(folder)
    kinds = Counter(f"{problem.kind} ({problem.action})" for problem in problems)
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "none"
    say(f"problems: {listed}; written to {folder / 'problems.jsonl'}")
    return Prepared(settings, folder, dataset, base, contract, held)


def load_base(settings: Settings) -> Loaded:
    """Load the base that the settings name; a tuned run or checkpoint is a base too, with its adapter merged in memory."""
    model = settings.model
    return load(
        model.name,
        dtype=model.dtype,
        device=model.device,
        attention=model.attention,
        min_pixels=model.min_pixels,
        max_pixels=model.max_pixels,
        quantization=model.quantization,
        quantize_vision=model.quantize_vision,
        as_base=True,
    )


def _choose_folder(settings: Settings, contract: Contract, *, new: bool, reuse: bool) -> Path:
    """Return the folder of an equal run that is to go on, or of a new one, whose `config.yaml` is written."""
    config = to_yaml(settings)
    prints = {key: getattr(contract, key) for key in ("data_fingerprint", "base_fingerprint")}
    equal = None if new else find_equal(settings.name, config=config, fingerprints=prints)
    if equal is not None and (reuse or not is_done(equal)):
        return equal
    folder = new_run(settings.name)
    contract.write(folder)
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    return folder


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

    When: once per run; again, with the same settings, after it was stopped.

    Raises:
        TrainingError: nothing is trainable, the model is wrapped already, the first batch's labels are not exactly the
            answers, or the disk is full.
        Stopped: a signal came; what was trained is saved.
    """
    settings, folder, contract = prepared.settings, prepared.folder, prepared.contract
    training = settings.training
    started = time.monotonic()
    transformers.set_seed(training.seed)
    logging.getLogger("transformers.trainer").setLevel(logging.WARNING)
    (folder / "train").mkdir(exist_ok=True)
    goes_on, history = from_main(partial(go_back, folder))
    if goes_on is not None:
        say(f"going on from {goes_on}")

    # 1. Rows: conversation and picture, written once; changed at every access only where augmentation is on.
    # One that is too long is refused: nothing is ever cut.
    epochs = EpochCallback()
    samples, processor = prepared.dataset.splits["train"], prepared.base.processor
    rows = training_rows(samples, settings, contract, epoch=lambda: epochs.number)
    limits = {"min_pixels": contract.min_pixels, "max_pixels": contract.max_pixels}
    tokens = count_tokens(rows, [(sample.width, sample.height) for sample in samples], processor, **limits)
    longest = training.max_tokens or context_of(prepared.base.model.config)
    if longest is not None:
        refuse_long_rows(tokens, limit=longest, factor=contract.size_factor, **limits)
    steps = planned_steps(settings, len(rows))
    size = training.batch_size * training.gradient_accumulation * world_size()
    how = f"limited to {steps}" if training.max_steps else f"x {training.epochs:g} epochs -> {steps}"
    say(f"steps: {len(rows)} rows / {size} a step {how} steps")

    # 2. What trains: areas are thawed here; an adapter is described here and built by the trainer, once.
    model = prepared.base.model
    peft_config = None
    if training.method == "lora":
        peft_config = build_lora_config(model, **asdict(settings.lora))
    elif training.areas:
        train_only(model, training.areas)
    keep_exact(model)
    model.config.use_cache = False

    # 3. Callbacks, in this order: stop, norms, scores, pictures, log.
    watched = list(prepared.dataset.splits.get("val", []))[: training.eval_rows]
    stop = StopCallback()
    evaluation = IoUEvalCallback(
        partial(predict_watched, prepared=prepared, samples=watched),
        labels=contract.labels,
        every=training.eval_every,
        save_every=training.save_every,
        metrics_csv=folder / "train" / "metrics.csv",
        write_contract=contract.write,
        history=history,
    )
    callbacks = [
        epochs,
        stop,
        GradNormCallback(),
        evaluation,
        SamplePictureCallback(evaluation, watched, folder / "train" / "samples", count=training.sample_rows),
        JsonLogCallback(folder / "train" / "log.jsonl"),
    ]

    # 4. The trainer. TRL's defaults that would do harm here are set: no truncation, no dropped columns, no hub.
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "train" / "tensorboard")
    arguments = SFTConfig(
        output_dir=str(folder / "checkpoints"),
        run_name=f"{folder.parent.name}-{folder.name}",
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule,
        warmup_steps=math.ceil(training.warmup_fraction * steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        neftune_noise_alpha=training.neftune_alpha or None,
        activation_checkpointing=training.gradient_checkpointing,
        bf16=model.dtype == torch.bfloat16,
        use_cpu=model.device.type == "cpu",
        max_length=None,
        ddp_find_unused_parameters=False,  # every row has a picture, so every trainable weight takes part in every step
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_num_workers=training.loader_workers,
        save_strategy="no",  # the evaluation callback asks for a checkpoint whenever it has scored one, or one is due
        eval_strategy="no",
        logging_steps=1,  # an average over several steps would be another one after a stop in between
        report_to=choose_trackers(training.report_to) if is_main() else [],
        disable_tqdm=None,
        seed=training.seed,
        push_to_hub=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs and no launcher: never DataParallel
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=make_collator(processor, settings, contract),
        processing_class=processor,
        peft_config=peft_config,
        callbacks=callbacks,
    )
    trainer.optimizer = make_optimizer(trainer.model, training)
    score_supervised_only(trainer.model)
    if training.cache_features:
        trainer.data_collator = cache_features(trainer.model, processor, trainer.data_collator, rows, contract, say=say)
    if training.group_by_length:
        order = LengthGroups(tokens.total.tolist(), batch=size, seed=training.seed, epoch=lambda: epochs.number)
        trainer._get_train_sampler = lambda dataset=None: order
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.remove_callback(transformers.ProgressCallback)  # it writes every log to stdout, which --json keeps clean
    if sys.stderr.isatty():
        trainer.add_callback(ProgressBar)
    # not TRL's own `log`, which would move its averages since the last entry into this one
    evaluation.log = partial(transformers.Trainer.log, trainer)
    say(check_launched(training.distributed, trainer.accelerator))

    # 5. What will train, before the first step; nothing trainable is an error.
    say(format_areas(refuse_untrainable(trainer.model)))
    if training.overfit_gate and goes_on is None and steps > STEPS:
        say(f"overfit gate: {ROWS} rows …")
        say(format_gate(learn_by_heart(trainer.model, prepared)))
    transformers.set_seed(training.seed)
    with saving_to(folder):
        trainer.train(resume_from_checkpoint=str(goes_on) if goes_on else None)
    model.config.use_cache = True
    step = trainer.state.global_step
    if stop.signal is not None and step < trainer.state.max_steps:
        raise Stopped(f"stopped after step {step} of {trainer.state.max_steps}; the same command goes on", stop.signal)
    best = (folder / "checkpoints" / "best").resolve()
    f1, iou = evaluation.best
    if is_main():
        write_done(
            folder, {"steps": step, "best": best.name, "f1_50": f1, "mean_best_iou": iou, "val_rows": len(watched)}
        )
    say(f"best checkpoint: {best} (F1@0.5 {f1:.3f}, mean best IoU {iou:.3f} on {len(watched)} val pictures)")
    say(f"trained in {time.monotonic() - started:.0f} s")
    return folder


def learn_by_heart(model: Any, prepared: Prepared) -> GateResult:
    """Run the overfit gate with the run's own collator, rates and contract, on pictures as they are.

    Raises:
        TrainingError: the rows were not generated back.
    """
    settings, contract = prepared.settings, prepared.contract
    plain = replace(
        settings,
        augment=AugmentSettings(),
        training=replace(settings.training, cache_pictures=False, cache_features=False),
    )
    rows = training_rows(prepared.dataset.splits["train"], plain, contract)
    return overfit_gate(
        model,
        prepared.base.processor,
        [rows[i] for i in choose_rows(rows)],
        collator=make_collator(prepared.base.processor, plain, contract),
        contract=contract,
        learning_rates=gate_rates(settings.training),
        batch_size=min(ROWS, settings.training.batch_size),
    )


def keep_exact(model: Any) -> None:
    """Keep what trains in float32: in half precision a step of a small rate is less than the last digit, and lost."""
    for weight in model.parameters():
        if weight.requires_grad and weight.dtype in (torch.bfloat16, torch.float16):
            weight.data = weight.data.float()


@contextlib.contextmanager
def saving_to(folder: Path) -> Iterator[None]:
    """Turn a full disk into a clear error; the half-written checkpoint is deleted and the last whole one stays."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        last, _ = from_main(partial(go_back, folder))
        kept = f"{last} is whole" if last else "no checkpoint was written yet"
        raise TrainingError(
            f"the disk of {folder} is full ({' '.join(str(error).split())[:120]}); {kept}",
            "free some space; the same command goes on from there",
        ) from error


def planned_steps(settings: Settings, rows: int) -> int:
    """Return the number of optimiser steps: rows over batches, rounded up, times epochs, or `max_steps`."""
    training = settings.training
    if training.max_steps:
        return training.max_steps
    batches = math.ceil(rows / (training.batch_size * world_size()))
    return max(1, math.ceil(math.ceil(batches / training.gradient_accumulation) * training.epochs))


def predict_watched(model: Any, *, prepared: Prepared, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Predict the validation pictures during training, under the run's contract; each process does its share."""
    evaluation = prepared.settings.evaluation
    device = model.device.type
    mixed = any(weight.dtype != model.dtype for weight in model.parameters() if weight.is_floating_point())
    with torch.autocast(device, torch.bfloat16, enabled=mixed and model.dtype == torch.bfloat16):
        return predict_shared(
            partial(
                predict,
                model,
                prepared.base.processor,
                contract=prepared.contract,
                batch_size=evaluation.batch_size,
                max_new_tokens=evaluation.max_new_tokens,
            ),
            samples,
        )

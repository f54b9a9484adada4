"""Train a model on a data set; read from top to bottom.

When: PER RUN.

    vlmdet train SOURCE --recipe r4-joint --model Qwen/Qwen2-VL-2B-Instruct training.epochs=5

`prepare` (training/prepare.py) reads the data, loads the base and writes the contract; `train` runs TRL's `SFTTrainer` with our
collator; `train_stages` does both for each stage of a recipe. A stopped run goes on where its newest whole checkpoint is; see
`training.checkpoints`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import transformers
from safetensors import SafetensorError
from trl import SFTConfig, SFTTrainer

from vlmdet.errors import Stopped, TrainingError
from vlmdet.evaluation.predict import predict
from vlmdet.files import write_whole
from vlmdet.models.inference import hf_engine
from vlmdet.models.lora import build_lora_config, refuse_untrainable, train_only
from vlmdet.records import Sample
from vlmdet.runs import is_done
from vlmdet.settings import AugmentSettings, Settings
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
from vlmdet.training.checkpoints import go_back, is_disk_full, refuse_other_processes, step_of, write_done
from vlmdet.training.first_batch import check_first_batch, write_first_batch
from vlmdet.training.gate import ROWS, STEPS, GateResult, choose_rows, format_gate, gate_rates, overfit_gate
from vlmdet.training.lengths import RowTokens, read_lengths
from vlmdet.training.losses import score_supervised_only
from vlmdet.training.optim import make_optimizer
from vlmdet.training.plan import format_plan, make_plan, measure_step, plan_steps
from vlmdet.training.precision import as_the_run, in_half, keep_exact
from vlmdet.training.prepare import Prepared, Say, prepare
from vlmdet.training.processes import (
    check_launched,
    from_main,
    gather,
    is_main,
    refuse_other_device,
    world_size,
)


def train_stages(
    stages: Sequence[Settings],
    *,
    command: str = "",
    new: bool = False,
    before: Callable[[Prepared], object] | None = None,
    say: Say = print,
) -> tuple[Path, Prepared]:
    """Train each stage on the result of the one before; returns the folder of the last run, and how it was prepared.

    When: once per command. A stage but the last that is finished already, with the same settings, data and base, is used as
    it is, unless `new`. `before` is called on the main process with each stage that is about to be trained; what it raises ends
    all.
    """
    below: Path | None = None
    for number, settings in enumerate(stages, 1):
        last = number == len(stages)
        if len(stages) > 1:
            say(f"\nstage {number} of {len(stages)}: {settings.name}")
        if below is not None:
            # the main process says it, once it has pointed `best`: another might still see the one before
            best = from_main(partial(_best_of, below))
            settings = replace(settings, model=replace(settings.model, name=best))
        prepared = prepare(settings, command=command, new=new, reuse=not last, say=say)
        if before is not None and not is_done(prepared.folder):
            from_main(partial(before, prepared))
        below = prepared.folder if is_done(prepared.folder) else train(prepared, say=say)
        if not last and prepared.lock is not None:
            prepared.lock.close()
    return prepared.folder, prepared


def _best_of(folder: Path) -> str:
    return os.path.relpath((folder / "checkpoints" / "best").resolve())


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
        refuse_other_processes(goes_on, world_size())

    # 1. Rows: conversation and picture, written once; changed at every access only where augmentation is on.
    # One that is too long is refused: nothing is ever cut.
    epochs = EpochCallback()
    samples, processor = prepared.dataset.splits["train"], prepared.base.processor
    rows = training_rows(samples, settings, contract, epoch=lambda: epochs.number)
    tokens = read_lengths(rows, samples, processor, settings, contract, config=prepared.base.model.config)
    steps, _ = plan_steps(training, len(rows), world_size())
    assert steps is not None  # there are rows

    # 2. What trains: areas are thawed here; an adapter is described here and built by the trainer, once.
    model, collator = prepared.base.model, make_collator(processor, settings, contract)
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

    # 4. The trainer, with the adapter, the optimizer and what a step costs.
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "train" / "tensorboard")
    arguments = trainer_arguments(settings, folder, model, warmup_steps=math.ceil(training.warmup_fraction * steps))
    refuse_other_device(model.device, arguments.device)
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs and no launcher: never DataParallel
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=collator,
        processing_class=processor,
        peft_config=peft_config,
        callbacks=callbacks,
    )
    keep_exact(trainer.model)  # TRL turns the adapter of a 4-bit base into bfloat16
    trainer.optimizer = make_optimizer(trainer.model, training)
    score_supervised_only(trainer.model)
    if training.cache_features:
        trainer.data_collator = cache_features(trainer.model, processor, trainer.data_collator, rows, contract, say=say)
    if training.group_by_length:
        order = LengthGroups(
            tokens.total.tolist(),
            batch=training.batch_size * training.gradient_accumulation * world_size(),
            seed=training.seed,
            epoch=lambda: epochs.number,
        )
        trainer._get_train_sampler = lambda dataset=None: order
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.remove_callback(transformers.ProgressCallback)  # it writes every log to stdout, which --json keeps clean
    if sys.stderr.isatty():
        trainer.add_callback(ProgressBar)
    # not TRL's own `log`, which would move its averages since the last entry into this one
    evaluation.log = partial(transformers.Trainer.log, trainer)
    say(check_launched(training.distributed, trainer.accelerator))

    # 5. Before the first step: nothing trainable is an error, the first batch is looked at, the plan is said, and four rows
    # are learnt by heart.
    refuse_untrainable(trainer.model)
    batch = look_at_first_batch(rows, collator, prepared)
    say_plan(trainer, batch, tokens, val_rows=len(watched), prepared=prepared, say=say)
    if training.overfit_gate and goes_on is None and steps > STEPS:
        say(f"overfit gate: {ROWS} rows …")
        say(format_gate(learn_by_heart(trainer.model, prepared)))

    # 6. Training, from the start or from where it was stopped.
    transformers.set_seed(training.seed)
    step = 0 if goes_on is None else step_of(goes_on)
    # else it died between its last checkpoint and `done.json`, and the trainer would take one step more
    if step < steps:
        with saving_to(folder), stop:
            trainer.train(resume_from_checkpoint=str(goes_on) if goes_on else None)
        step = trainer.state.global_step
    model.config.use_cache = True
    if stop.signal is not None and step < steps:
        raise Stopped(f"stopped after step {step} of {steps}; the same command goes on", stop.signal)
    best = (folder / "checkpoints" / "best").resolve()
    f1, iou = evaluation.best
    if is_main():
        write_done(
            folder, {"steps": step, "best": best.name, "f1_50": f1, "mean_best_iou": iou, "val_rows": len(watched)}
        )
    say(f"best checkpoint: {best} (F1@0.5 {f1:.3f}, mean best IoU {iou:.3f} on {len(watched)} val pictures)")
    say(f"trained in {time.monotonic() - started:.0f} s")
    return folder


def trainer_arguments(settings: Settings, folder: Path, model: Any, *, warmup_steps: int) -> SFTConfig:
    """Word the settings for TRL. Its defaults that would do harm here are set: no truncation, no dropped columns, no hub."""
    training = settings.training
    return SFTConfig(
        output_dir=str(folder / "checkpoints"),
        run_name=f"{folder.parent.name}-{folder.name}",
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule,
        warmup_steps=warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        neftune_noise_alpha=training.neftune_alpha or None,
        activation_checkpointing=training.gradient_checkpointing,
        bf16=in_half(model),
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


def look_at_first_batch(rows: datasets.Dataset, collator: Any, prepared: Prepared) -> Any:
    """Make the first batch, in the order of the rows, write it as a page, then judge it; returns the batch.

    Raises:
        TrainingError: the labels are not exactly the answers; `train/first_batch.html` is there to be looked at.
    """
    settings, contract, processor = prepared.settings, prepared.contract, prepared.base.processor
    first = [rows[i] for i in range(min(settings.training.batch_size, len(rows)))]
    batch = collator(first)
    names = [row["id"] for row in first]
    pictures = [row["image"] for row in first]  # as augmentation left them
    if isinstance(pictures[0], dict):  # left undecoded for a cache
        pictures = [sample.image for sample in prepared.dataset.splits["train"][: len(first)]]
    path = prepared.folder / "train" / "first_batch.html"
    page = partial(write_first_batch, path, batch, processor, names, pictures=pictures, codec=contract.codec)
    if is_main():
        page()  # before it is judged, so that what is wrong can be looked at
    findings = check_first_batch(batch, processor, names, collator=collator)
    if findings and is_main():
        page(findings=findings)
    return batch


def say_plan(trainer: Any, batch: Any, tokens: RowTokens, *, val_rows: int, prepared: Prepared, say: Say) -> None:
    """Say what the run will do, with a measured step, and write it to `train/plan.json`."""
    plan = make_plan(
        prepared.settings,
        trainer.model,
        tokens=tokens,
        val_rows=val_rows,
        processes=world_size(),
        device=trainer.args.device.type,
        compute_bytes=2 if trainer.args.bf16 else 4,
        seconds_per_pass=measure_step(trainer.model, batch, fused=True),
    )
    say(format_plan(plan))
    if is_main():
        write_whole(prepared.folder / "train" / "plan.json", json.dumps(plan.as_dict(), indent=2) + "\n")


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
        fused=True,
    )


@contextlib.contextmanager
def saving_to(folder: Path) -> Iterator[None]:
    """Turn a full disk into a clear error; the half-written checkpoint is deleted and the last whole one stays."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # of Python, of torch's writer, of safetensors
        if not is_disk_full(error):
            raise
        last = go_back(folder)[0] if is_main() else None
        kept = f"{last} is whole" if last else "no checkpoint was written yet"
        raise TrainingError(
            f"the disk of {folder} is full ({' '.join(str(error).split())[:120]}); {kept}",
            "free some space; the same command goes on from there",
        ) from error


def predict_watched(model: Any, *, prepared: Prepared, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Predict the validation pictures during training, under the run's contract; each process does its share."""
    evaluation = prepared.settings.evaluation
    engine = hf_engine(
        replace(prepared.base, model=model),
        contract=prepared.contract,
        batch_size=evaluation.batch_size,
        max_new_tokens=evaluation.max_new_tokens,
    )
    with as_the_run(model):
        return predict(engine, samples, contract=prepared.contract, gather=gather)

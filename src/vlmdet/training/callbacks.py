"""What the trainer calls while it trains: gradient norms, scored answers, pictures, logs.

When: PER RUN; each class below says at which moments. Order matters, and `train.py` keeps it: stop, norms, scores, pictures, log.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlmdet.boxes import FRACTIONS, Boxes
from vlmdet.errors import ConfigError
from vlmdet.evaluation.metrics import score_rows
from vlmdet.models.families import area_of
from vlmdet.records import Sample
from vlmdet.training.checkpoints import delete_others, point, rank
from vlmdet.utils.visualization import draw_truth_and_prediction, image_grid


class GradNormCallback(TrainerCallback):
    """Measure the norm of the gradient by area, before it is clipped.

    The trainer's event `on_pre_optimizer_step` comes after clipping, so the norms are taken by a hook on each parameter
    that fires when its gradient has been accumulated; with several backward passes per step the last one counts, which
    has seen them all. Under DDP the hook sees the rank's own gradient.

    When: hooks at the start of training; the figures join every log entry as `grad_norm/vision`, …, `grad_norm/all`.
    """

    def __init__(self) -> None:
        self._squares: dict[str, torch.Tensor] = {}
        self._hooks: list[Any] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for name, parameter in kwargs["model"].named_parameters():
            if parameter.requires_grad:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._take(name)))

    def _take(self, name: str) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None  # torch calls the hook after it has written the gradient
            self._squares[name] = parameter.grad.detach().float().square().sum()

        return hook

    def norms(self) -> dict[str, float]:
        """Return the norms of the last step, `{"all": …, "language": …, …}`; empty before the first."""
        sums: dict[str, float] = {}
        if self._squares:
            values = torch.stack(list(self._squares.values())).tolist()  # one wait for the GPU, not one a parameter
            for name, square in zip(self._squares, values, strict=True):
                for area in ("all", area_of(name)):
                    sums[area] = sums.get(area, 0.0) + square
        return {area: math.sqrt(square) for area, square in sums.items()}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and "loss" in logs:
            logs.update({f"grad_norm/{area}": round(norm, 5) for area, norm in self.norms().items()})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


class EpochCallback(TrainerCallback):
    """Know the number of the current epoch, for augmentation and for the order of length groups: `number`, from 0.

    When: at the start of each epoch, before the loader's workers are made, so that they have it too.
    """

    def __init__(self) -> None:
        self.number = 0

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.number = int(state.epoch or 0)


class StopCallback(TrainerCallback):
    """Save and stop at the end of the step in which SIGTERM or SIGINT comes; a second signal stops at once.

    When: every step. Signals are caught within `with stop:`; several processes agree on the step before any of them stops.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._caught)

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _caught(self, number: int, frame: Any) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.world_size > 1:
            told = torch.tensor([self.signal or 0], device=args.device)
            torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
            self.signal = int(told) or None
        if self.signal is not None:
            control.should_save = control.should_training_stop = True


class IoUEvalCallback(TrainerCallback):
    """Generate answers for validation pictures, score them, and keep the best checkpoint.

    When: every `every` optimiser steps and after the last one. The figures go to the trainer's log (`eval/f1_50`, …) and to
    `metrics.csv`; then the trainer saves a checkpoint, `best` and `last` are pointed at the right ones, and others are
    deleted. Best is the highest F1@0.5, and among equals the highest mean best IoU.
    """

    def __init__(
        self,
        predict_rows: Callable[[Any], list[dict[str, Any]]],
        *,
        labels: Sequence[str],
        every: int,
        metrics_csv: Path,
        write_contract: Callable[[Path], None],
        save_every: int = 0,
        history: Sequence[dict[str, float]] = (),
    ) -> None:
        """Take what to call.

        Args:
            predict_rows: from the model to rows of `predictions.jsonl` for the validation pictures; with several processes
                each calls it, and each gets all rows.
            labels: that the prompt asks for.
            every: optimiser steps between two evaluations; 0: only at the end.
            metrics_csv: the file to append to.
            write_contract: writes `contract.json` into a checkpoint's folder, which marks it as whole.
            save_every: optimiser steps between two checkpoints beside those of evaluations; 0: none.
            history: evaluations of a run that goes on, oldest first.
        """
        self.predict_rows = predict_rows
        self.labels = labels
        self.every = every
        self.save_every = save_every
        self.metrics_csv = metrics_csv
        self.write_contract = write_contract
        self.rows: list[dict[str, Any]] = []
        self.history: list[dict[str, float]] = list(history)
        self.best: tuple[float, float] = max((rank(row) for row in self.history), default=(-1.0, -1.0))
        self.log: Callable[[dict[str, float]], None] | None = None  # the trainer's own `log`, once there is a trainer
        self._scored = int(self.history[-1]["step"]) if self.history else -1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.save_every and state.global_step % self.save_every == 0:
            control.should_save = True
        last = state.global_step >= state.max_steps
        if control.should_training_stop and not last:  # told to stop: what is trained is saved now, and scored later
            return
        if last or self._is_due(state.global_step):
            self._score(state, control, kwargs["model"])
            control.should_save = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make up for the evaluation of a step in which the run was stopped."""
        step = state.global_step
        if step and self._is_due(step) and self._scored != step:
            self._score(state, control, kwargs["model"])
            self._keep(args, state)

    def _is_due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    def _score(self, state: TrainerState, control: TrainerControl, model: Any) -> None:
        self.rows = self.predict_rows(model)
        figures = score_rows(self.rows, labels_asked=self.labels, resamples=200, seed=0)
        row = {"step": float(state.global_step)}
        row |= {name: figure["value"] for name, figure in figures.items() if figure["value"] is not None}
        self.history.append(row)
        self._scored = state.global_step
        if self.log is not None:
            logging = control.should_log  # a log in between would take the trainer's own entry of this step with it
            self.log({f"eval/{name}": round(value, 5) for name, value in row.items() if name != "step"})
            control.should_log = logging
        if state.is_world_process_zero:
            self._append(row, list(figures))

    def _append(self, row: dict[str, float], names: list[str]) -> None:
        new = not self.metrics_csv.exists()
        with self.metrics_csv.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=["step", *names])
            if new:
                writer.writeheader()
            writer.writerow({name: row.get(name, "") for name in ["step", *names]})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.world_size > 1:
            PartialState().wait_for_everyone()  # each process writes its own random state into the folder
        saved = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            (saved / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody needs: config.yaml says it all
            self.write_contract(saved)
        self._keep(args, state)

    def _keep(self, args: TrainingArguments, state: TrainerState) -> None:
        """Point `last`, and where it is better `best`, at the checkpoint of this step, and delete the others."""
        better = self._scored == state.global_step and rank(self.history[-1]) > self.best
        if better:
            self.best = rank(self.history[-1])
        if not state.is_world_process_zero:
            return
        checkpoints = Path(str(args.output_dir))
        saved = checkpoints / f"checkpoint-{state.global_step}"
        point(checkpoints / "last", saved.name)
        if better or not (checkpoints / "best").exists():
            point(checkpoints / "best", saved.name)
        delete_others(checkpoints)


class SamplePictureCallback(TrainerCallback):
    """Draw the same few validation pictures after every evaluation: truth dashed green, prediction solid red.

    When: after `IoUEvalCallback`, from its rows; writes `samples/step_000120.png`, and hands it to the trackers.
    """

    def __init__(self, evaluation: IoUEvalCallback, samples: Sequence[Sample], folder: Path, *, count: int = 8) -> None:
        self.evaluation = evaluation
        self.samples = list(samples)[:count]
        self.folder = folder
        self._drawn = len(evaluation.history)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        new = len(self.evaluation.history) > self._drawn
        if not self.samples or not new or not state.is_world_process_zero:
            return
        self._drawn = len(self.evaluation.history)
        self.folder.mkdir(parents=True, exist_ok=True)
        grid = draw_rows(self.samples, self.evaluation.rows, columns=4)
        grid.save(self.folder / f"step_{state.global_step:06d}.png")
        for tracker in args.report_to:
            send_picture(tracker, grid, state.global_step, folder=Path(str(args.output_dir)).parent / "train")


def choose_trackers(asked: Sequence[str]) -> list[str]:
    """Turn `auto` into the tracker that is installed, tensorboard or none, and refuse one that is not there.

    Raises:
        ConfigError: a tracker is asked for by name and not installed.
    """
    there = {name: importlib.util.find_spec(name) is not None for name in ("tensorboard", "trackio", "wandb", "mlflow")}
    names = [name for name in asked if name != "auto"]
    for name in names:
        if not there[name]:
            raise ConfigError(f"training.report_to names {name}, which is not installed", f"pip install {name}")
    if "auto" in asked and there["tensorboard"] and "tensorboard" not in names:
        names.append("tensorboard")
    return names


def send_picture(tracker: str, picture: Any, step: int, *, folder: Path) -> None:
    """Hand a drawn picture to a tracker, whose run the trainer's own callback has begun.

    When: after each evaluation. Run here: tensorboard; the other three are written after their documentation.
    """
    if tracker == "tensorboard":
        import numpy as np
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(folder / "tensorboard")) as writer:
            writer.add_image("samples", np.asarray(picture.convert("RGB")), step, dataformats="HWC")
    elif tracker == "mlflow":
        mlflow = importlib.import_module("mlflow")

        mlflow.log_image(picture, f"samples/step_{step:06d}.png")
    elif tracker in ("wandb", "trackio"):
        module = importlib.import_module(tracker)
        module.log({"samples": module.Image(picture)}, step=step)


def draw_rows(samples: Sequence[Sample], rows: Sequence[dict[str, Any]], *, columns: int) -> Any:
    """Draw samples with the rows of `predictions.jsonl` that belong to them, as one grid; returns a PIL image."""
    by_id = {row["id"]: row for row in rows}
    pictures = []
    for sample in samples:
        row = by_id[sample.id]
        found = Boxes.from_array(row["boxes"], FRACTIONS, row["width"], row["height"])
        pictures.append(
            draw_truth_and_prediction(
                sample.image, sample.boxes, found, truth_labels=list(sample.labels), prediction_labels=row["labels"]
            )
        )
    return image_grid(pictures, titles=[sample.id for sample in samples], columns=columns)


class JsonLogCallback(TrainerCallback):
    """Append every log entry of the trainer to `log.jsonl`, whatever tracker is or is not installed.

    When: on every log; it stands last, so that entries hold what the callbacks before it added.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class ProgressBar(ProgressCallback):
    """Show the trainer's progress bar on stderr, without its habit of writing every log entry to stdout.

    When: every step, where stderr is a terminal.
    """

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing; `log.jsonl` has it."""

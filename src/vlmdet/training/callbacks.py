"""What the trainer calls while it trains: gradient norms, scored answers, pictures, logs.

When: PER RUN; each class below says at which moments. Order matters, and `train.py` keeps it: norms, scores, pictures, log.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlmdet.boxes import FRACTIONS, Boxes
from vlmdet.evaluation.metrics import score_rows
from vlmdet.models.families import area_of
from vlmdet.records import Sample
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
        for name, square in self._squares.items():
            for area in ("all", area_of(name)):
                sums[area] = sums.get(area, 0.0) + float(square)
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
    ) -> None:
        """Take what to call.

        Args:
            predict_rows: from the model to rows of `predictions.jsonl` for the validation pictures.
            labels: that the prompt asks for.
            every: optimiser steps between two evaluations; 0: only at the end.
            metrics_csv: the file to append to.
            write_contract: writes `contract.json` into a checkpoint's folder.
        """
        self.predict_rows = predict_rows
        self.labels = labels
        self.every = every
        self.metrics_csv = metrics_csv
        self.write_contract = write_contract
        self.rows: list[dict[str, Any]] = []
        self.history: list[dict[str, float]] = []
        self.best: tuple[float, float] = (-1.0, -1.0)
        self.log: Callable[[dict[str, float]], None] | None = None  # the trainer's own `log`, once there is a trainer
        self._scored = -1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        due = self.every > 0 and state.global_step % self.every == 0
        if not due and state.global_step < state.max_steps:
            return
        self.rows = self.predict_rows(kwargs["model"])
        figures = score_rows(self.rows, labels_asked=self.labels, resamples=200, seed=0)
        row = {"step": float(state.global_step)}
        row |= {name: figure["value"] for name, figure in figures.items() if figure["value"] is not None}
        self.history.append(row)
        self._scored = state.global_step
        if self.log is not None:
            due = control.should_log  # a log in between would take the trainer's own entry of this step with it
            self.log({f"eval/{name}": round(value, 5) for name, value in row.items() if name != "step"})
            control.should_log = due
        self._append(row, list(figures))
        control.should_save = True

    def _append(self, row: dict[str, float], names: list[str]) -> None:
        new = not self.metrics_csv.exists()
        with self.metrics_csv.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=["step", *names])
            if new:
                writer.writeheader()
            writer.writerow({name: row.get(name, "") for name in ["step", *names]})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        checkpoints = Path(str(args.output_dir))
        saved = checkpoints / f"checkpoint-{state.global_step}"
        self.write_contract(saved)
        point(checkpoints / "last", saved.name)
        if self._scored == state.global_step:
            rank = (self.history[-1].get("f1_50", 0.0), self.history[-1].get("mean_best_iou", 0.0))
            if rank > self.best or not (checkpoints / "best").exists():
                self.best = rank
                point(checkpoints / "best", saved.name)
        delete_others(checkpoints)


def point(link: Path, target: str) -> None:
    """Make a symbolic link beside its target, replacing an older one in a single step."""
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(link)


def delete_others(checkpoints: Path) -> None:
    """Delete the checkpoints to which neither `best` nor `last` points."""
    kept = {(checkpoints / name).resolve().name for name in ("best", "last") if (checkpoints / name).exists()}
    for folder in checkpoints.glob("checkpoint-*"):
        if folder.name not in kept:
            shutil.rmtree(folder)


class SamplePictureCallback(TrainerCallback):
    """Draw the same few validation pictures after every evaluation: truth dashed green, prediction solid red.

    When: after `IoUEvalCallback`, from its rows; writes `samples/step_000120.png`.
    """

    def __init__(self, evaluation: IoUEvalCallback, samples: Sequence[Sample], folder: Path, *, count: int = 8) -> None:
        self.evaluation = evaluation
        self.samples = list(samples)[:count]
        self.folder = folder
        self._drawn = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.samples or len(self.evaluation.history) == self._drawn:
            return
        self._drawn = len(self.evaluation.history)
        self.folder.mkdir(parents=True, exist_ok=True)
        grid = draw_rows(self.samples, self.evaluation.rows, columns=4)
        grid.save(self.folder / f"step_{state.global_step:06d}.png")


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

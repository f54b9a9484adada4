"""Checks of the stage optimisation, on settings and on trainers as users build them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from tests.doctor.test_checks_model import NAMED as CHECKS_OF_MODEL
from tests.doctor.test_checks_model import save_adapter
from tests.doctor.user_training import NAME, PROCESSOR, adapted, base, rows, trainer
from vlmdet.doctor.checks.optimisation import CHECKS
from vlmdet.doctor.evidence import Evidence
from vlmdet.doctor.examine import run_check
from vlmdet.doctor.subject import Subject

NAMED = {one.name: one for one in CHECKS}
PLAN = {"num_samples": 800, "batch_size": 8, "epochs": 3}  # 100 batches, 300 steps


def say(check: str, **subject: Any) -> dict[str, dict[str, Any]]:
    """Run one check; return findings by id."""
    results = list(run_check(NAMED[check], Evidence(Subject(**{"processor": PROCESSOR, **subject}))))
    broken = [fields["needs"] for kind, fields in results if kind == "not_run" and "itself failed" in fields["needs"]]
    assert not broken
    return {fields["id"]: fields for kind, fields in results if kind == "finding"}


@pytest.mark.parametrize(
    ("check", "settings", "identifier"),
    [
        ("learning_rate", {"learning_rate": 2e-7, "lora_rank": 8}, "O01"),
        ("learning_rate", {"lr": 1e-5, "use_lora": True, **PLAN}, "O01"),
        ("learning_rate", {"learning_rate": 2e-4, "full_finetune": True}, "O02"),
        ("learning_rate", {"learning_rate": 2e-4, "lora_rank": 8, **PLAN}, None),
        ("half_precision", {"model_name": NAME, "fp16": True}, "O03"),
        ("half_precision", {"model_name": NAME, "torch_dtype": "float16"}, "O03"),
        ("half_precision", {"model_name": NAME, "bf16": True}, None),
        ("best_checkpoint", {"save_steps": 75, "eval_steps": 50, **PLAN}, "O05"),
        ("best_checkpoint", {"save_steps": 500, "eval_steps": 500, "load_best_model_at_end": True, **PLAN}, "O05"),
        ("best_checkpoint", {"save_steps": 100, "eval_steps": 50, "load_best_model_at_end": True, **PLAN}, None),
        ("schedule", {"warmup_steps": 150, **PLAN}, "O06"),
        ("schedule", {"warmup_steps": 15, **PLAN}, None),
        ("schedule", {"warmup_ratio": 0.03, "num_training_steps": 1200, **PLAN}, "O06"),
        ("schedule", {"expected_steps": 75, **PLAN}, "O11"),
        ("schedule", {"effective_batch_size": 32, "num_gpus": 4, "device_map": "auto", **PLAN}, "O11"),
        ("learning_rate", {"learning_rate": 0.0, "lora_rank": 8}, "M15"),
        ("release_of_accumulation", {"gradient_accumulation_steps": 8, "transformers_version": "4.45.2"}, "O04"),
        ("release_of_accumulation", {"gradient_accumulation_steps": 8, "transformers_version": "4.46.0"}, None),
        ("evaluation_loss", {"label_names": ["target"]}, "O07"),
    ],
)
def test_settings(check: str, settings: dict[str, Any], identifier: str | None) -> None:
    found = say(check, settings=settings)
    assert identifier in found if identifier else not found


class OwnMean(Trainer):
    """Averages each micro batch by itself, and does not use num_items_in_batch."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return model(**inputs).loss


class NoNumber(Trainer):
    """Its loss is no number."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return model(**inputs).loss * torch.tensor(float("nan"))


def test_a_loss_that_depends_on_accumulation() -> None:
    assert not say("loss_and_accumulation", build_trainer=lambda: trainer(adapted()))
    found = say(
        "loss_and_accumulation", build_trainer=lambda: trainer(adapted(), OwnMean, gradient_accumulation_steps=4)
    )["O04"]
    assert "num_items_in_batch is taken and not used" in found["cause"]


def test_a_loss_that_is_no_number() -> None:
    assert "O03" in say("half_precision", build_trainer=lambda: trainer(adapted(), NoNumber))
    assert not say("half_precision", build_trainer=lambda: trainer(adapted()))


def test_float16_of_a_bfloat16_checkpoint() -> None:
    assert "fp16=True" in say("half_precision", build_trainer=lambda: trainer(adapted(), fp16=True))["O03"]["evidence"]


@pytest.mark.parametrize(("names", "hit"), [(["target"], True), (None, False)])
def test_one_step_of_evaluation(names: Any, hit: bool) -> None:
    def build() -> Trainer:
        return trainer(
            adapted(), label_names=names, eval_strategy="steps", eval_steps=2, more={"eval_dataset": rows()[:2]}
        )

    assert ("O07" in say("evaluation_loss", build_trainer=build)) == hit


def test_a_figure_that_is_never_made() -> None:
    found = say(
        "evaluation_loss", build_trainer=lambda: trainer(adapted(), metric_for_best_model="iou", greater_is_better=True)
    )
    assert "compute_metrics" in found["O07"]["evidence"]


def test_rates_of_a_trainer() -> None:
    assert "O02" in say("learning_rate", build_trainer=lambda: trainer(base(), learning_rate=1e-3))
    assert "O01" in say("learning_rate", build_trainer=lambda: trainer(adapted(), learning_rate=1e-6))
    assert not say("learning_rate", build_trainer=lambda: trainer(base(), learning_rate=1e-5))


def test_a_schedule_made_for_other_steps() -> None:
    def build(length: int) -> Any:
        def made() -> Trainer:
            model = adapted()
            optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-4)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / length, 1.0))
            return trainer(model, more={"optimizers": (optimizer, schedule)})

        return made

    assert "never reaches half" in say("schedule", build_trainer=build(500))["O06"]["evidence"]
    assert not say("schedule", build_trainer=build(2))


def test_steps_that_the_trainer_refuses() -> None:
    def build() -> Trainer:
        steps = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 50, "save_steps": 75}
        return trainer(adapted(), load_best_model_at_end=True, **steps, more={"eval_dataset": rows()[:2]})

    results = list(
        run_check(CHECKS_OF_MODEL["after_building"], Evidence(Subject(processor=PROCESSOR, build_trainer=build)))
    )
    assert [fields["id"] for kind, fields in results if kind == "finding"] == ["O05"]


def test_few_rows_in_a_trainer_are_no_short_run() -> None:
    def build() -> Trainer:
        steps = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 50, "save_steps": 50}
        return trainer(adapted(), load_best_model_at_end=True, **steps, more={"eval_dataset": rows()[:2]})

    assert say("best_checkpoint", build_trainer=build)["O05"]["severity"] == 2


def test_stages_that_do_not_follow(tmp_path: Path) -> None:
    one, same, other = (
        save_adapter(tmp_path / name, seed=seed) for name, seed in (("s1", 0), ("same", 0), ("other", 1))
    )
    assert "O09" in say("stages_follow", artefacts={"stage1": one, "stage2": other})
    assert not say("stages_follow", artefacts={"stage1": one, "stage2": same})
    on_the_first = save_adapter(tmp_path / "s2", base_name=str(one), seed=2)
    assert not say("stages_follow", artefacts={"stage1": one, "stage2": on_the_first})


def converted(row: dict[str, Any]) -> dict[str, Any]:
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Find"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": row["text"]}]}
    return {"messages": [user, answer], "image": row["image"]}


@pytest.mark.parametrize("shift", [0, 1])
def test_one_row_by_heart(shift: int) -> None:
    def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        texts = [PROCESSOR.apply_chat_template(one["messages"], tokenize=False) for one in examples]
        batch = dict(
            PROCESSOR(text=texts, images=[[one["image"]] for one in examples], return_tensors="pt", padding=True)
        )
        labels = torch.full_like(batch["input_ids"], -100)
        for i, ids in enumerate(batch["input_ids"].tolist()):
            start = (
                len(ids) - ids[::-1].index(PROCESSOR.tokenizer.convert_tokens_to_ids("<|im_start|>")) + 2
            )  # assistant, newline
            labels[i, start:] = batch["input_ids"][i, start:]
        batch["labels"] = labels.roll(shift, dims=1)
        return batch

    held = [{"image": row["image"], "text": f"cup {10 + i}, {200 + i}, {31 * i}"} for i, row in enumerate(rows())]
    found = say("one_row_by_heart", rows=held, convert=converted, collate=collate, settings={"model_name": NAME})
    assert ("L11" in found) == bool(shift)

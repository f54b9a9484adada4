"""The gate lets a right set-up pass, stops broken ones, and leaves everything as it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image, ImageDraw
from trl.trainer.utils import add_fused_lm_head

from vlmdet.boxes import FRACTIONS, Boxes
from vlmdet.config import load_settings
from vlmdet.contract import Contract
from vlmdet.data.collators import Qwen2VLCollatorV3
from vlmdet.data.dataset import build_messages
from vlmdet.errors import TrainingError
from vlmdet.models.families import AREAS
from vlmdet.models.loader import Loaded, load, make_contract
from vlmdet.models.lora import build_lora_config
from vlmdet.training.gate import (
    GateResult,
    GateRow,
    choose_rows,
    format_gate,
    gate_rates,
    judge_answer,
    overfit_gate,
)
from vlmdet.training.untouched import untouched

LIMITS = {"min_pixels": 4 * 28 * 28, "max_pixels": 16 * 28 * 28}
PLACES = [(20, 30, 80, 90), (90, 20, 160, 70)]


def make_rows(places: list[tuple[int, int, int, int]] = PLACES) -> list[dict[str, Any]]:
    """One red sign on each picture of 200 x 150."""
    rows = []
    for i, place in enumerate(places):
        image = Image.new("RGB", (200, 150), (200, 220, 240))
        ImageDraw.Draw(image).rectangle(place, fill=(180, 30, 60))
        boxes = Boxes.from_array([[place[0] / 200, place[1] / 150, place[2] / 200, place[3] / 150]], FRACTIONS, 1, 1)
        messages = build_messages(["sign"], boxes=boxes, labels=["sign"], size=image.size)
        rows.append({"id": f"r{i}", "image": image, "messages": messages, "boxes": boxes.tolist(), "labels": ["sign"]})
    return rows


def contract_of(loaded: Loaded) -> Contract:
    return make_contract(
        loaded, labels=["sign"], codec="qwen2_vl", box_order="raster", max_new_tokens=64, data_fingerprint=""
    )


def rates(rate: float) -> dict[str, float]:
    return dict.fromkeys(AREAS, rate)


@pytest.fixture
def small(small_base: Any) -> Loaded:
    return load(str(small_base), **LIMITS)


@pytest.fixture(scope="module")
def tiny() -> Loaded:
    return load("tiny")


def run(loaded: Loaded, model: Any = None, rows: Any = None, **changes: Any) -> GateResult:
    contract = contract_of(loaded)
    keywords: dict[str, Any] = {
        "collator": Qwen2VLCollatorV3(loaded.processor, min_pixels=contract.min_pixels, max_pixels=contract.max_pixels),
        "contract": contract,
        "learning_rates": rates(2e-3),
    }
    return overfit_gate(model or loaded.model, loaded.processor, rows or make_rows(), **keywords | changes)


def test_a_right_set_up_passes_and_nothing_moves(tiny: Loaded) -> None:
    model = tiny.model.eval()
    model.config.use_cache = True
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    model.model.visual.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(2), torch.manual_seed(3)

    result = run(tiny)
    assert result.passed
    assert result.first_loss > 1
    assert result.last_loss < 0.02
    assert [row.generated for row in result.rows] == [row.wanted for row in result.rows]
    assert result.rows[0].wanted == (
        "<|object_ref_start|>sign<|object_ref_end|><|box_start|>(100,200),(400,600)<|box_end|>"
    )

    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(weight.grad is None for weight in model.parameters() if weight is not first)
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache is True
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    model.zero_grad()


def test_an_adapter_passes_and_stays_zero() -> None:
    loaded = load("tiny")
    config = build_lora_config(loaded.model, rank=16, alpha=32, dropout=0.1, targets=["language.attn", "language.mlp"])
    model = get_peft_model(loaded.model, config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert run(loaded, model, make_rows()[:1], learning_rates=rates(5e-3)).passed
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(tensor.any() for name, tensor in after.items() if "lora_B" in name)


def test_it_is_put_back_after_an_error_too(small: Loaded) -> None:
    before = {name: tensor.clone() for name, tensor in small.model.state_dict().items()}
    state = torch.get_rng_state()
    try:
        with untouched(small.model, weights=True), torch.no_grad():
            next(small.model.parameters()).add_(1)
            torch.rand(3)
            small.model.train()
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert all(torch.equal(before[name], tensor) for name, tensor in small.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not small.model.training


def one_label_left(collator: Any) -> Callable[[Any], Any]:
    def collate(rows: Any) -> Any:
        batch = collator(rows)
        for labels in batch["labels"]:
            labels[torch.nonzero(labels != -100).flatten()[1:]] = -100
        return batch

    return collate


def test_labels_that_say_nothing_are_found_by_generating(small: Loaded) -> None:
    """With loss on the first token alone the loss falls to nothing, and only the answer shows that nothing was learnt."""
    collator = one_label_left(Qwen2VLCollatorV3(small.processor, **LIMITS))
    with pytest.raises(TrainingError) as caught:
        run(small, collator=collator)
    assert "2 of 2 rows were not generated back" in caught.value.message
    assert "what is generated is not what was learnt" in caught.value.message
    assert "r0: wanted '<|object_ref_start|>sign<|object_ref_end|><|box_start|>(100,200)" in caught.value.message
    assert "loss mask" in caught.value.hint
    assert "training.overfit_gate=false" in caught.value.hint


def test_a_wrong_codec_at_generation_is_found(tiny: Loaded) -> None:
    with pytest.raises(TrainingError, match="what is generated is not what was learnt"):
        run(tiny, contract=replace(contract_of(tiny), codec="paligemma"))


def test_a_rate_of_zero_learns_nothing(small: Loaded) -> None:
    with pytest.raises(TrainingError, match=r"they were not even learnt.*training\.learning_rate"):
        run(small, learning_rates=rates(0.0), steps=3)


def test_a_model_that_is_frozen_by_mistake_learns_nothing(small: Loaded) -> None:
    small.model.requires_grad_(False)
    with pytest.raises(TrainingError, match="no parameter of the model is trainable"):
        run(small)
    small.model.model.visual.patch_embed.requires_grad_(True)  # all that trains looks at colours
    with pytest.raises(TrainingError, match=r"they were not even learnt.*what is trainable"):
        run(small, steps=10)


def test_rows_are_split_into_batches_as_the_run_splits_them(small: Loaded) -> None:
    sizes = []
    collator = Qwen2VLCollatorV3(small.processor, **LIMITS)

    def counted(rows: Any) -> Any:
        sizes.append(len(rows))
        return collator(rows)

    with pytest.raises(TrainingError):
        run(small, collator=counted, steps=0, batch_size=1)
    assert sizes == [1, 1]


def test_the_fused_head_learns_the_same(small: Loaded) -> None:
    """Its loss is TRL's, computed in tiles; the message quotes it before and after two steps."""
    add_fused_lm_head(small.model)
    with pytest.raises(TrainingError) as plain:
        run(small, steps=2)
    with pytest.raises(TrainingError) as fused:
        run(small, steps=2, fused=True)
    assert "the loss went from 7." in plain.value.message
    assert plain.value.message == fused.value.message


TRUTH = "<|object_ref_start|>sign<|object_ref_end|><|box_start|>(100,200),(400,600)<|box_end|>"


@pytest.mark.parametrize(
    ("text", "good", "lowest"),
    [
        (TRUTH, True, 1.0),
        (TRUTH.replace("(100,200)", "(130,200)"), True, 0.9),  # a tenth of its width lost
        (TRUTH.replace("(100,200)", "(175,200)"), False, 0.75),
        (TRUTH.replace("sign", "sun"), False, 0.0),
        (TRUTH * 2, False, 1.0),  # one box too many
        ("none", False, 0.0),
        ("", False, 0.0),
    ],
)
def test_an_answer_is_judged_by_its_boxes(small: Loaded, text: str, good: bool, lowest: float) -> None:
    row = judge_answer(make_rows()[0], text, contract_of(small))
    assert row.good == good
    assert row.lowest_iou == pytest.approx(lowest)


def test_an_empty_picture_wants_an_empty_answer(small: Loaded) -> None:
    messages = build_messages(["sign"], boxes=Boxes.empty())
    row = make_rows()[0] | {"boxes": [], "labels": [], "messages": messages}
    assert judge_answer(row, "none", contract_of(small)).good
    assert not judge_answer(row, TRUTH, contract_of(small)).good
    assert not judge_answer(row, "", contract_of(small)).good


def test_rows_are_chosen_for_short_answers_that_differ() -> None:
    a, b, c = [0.1, 0.1, 0.2, 0.2], [0.3, 0.3, 0.4, 0.4], [0.5, 0.5, 0.6, 0.6]
    boxes = [[], [a] * 9, [a], [a], [a, b], [], [c]]
    rows = [{"boxes": row} for row in boxes]
    assert choose_rows(rows) == [1, 2, 4, 6]
    assert choose_rows(rows, count=1) == [2]
    assert choose_rows(rows[:3]) == [0, 1, 2]  # with what there is
    assert choose_rows([{"boxes": [a]}, {"boxes": [a]}, {"boxes": [b]}], count=2) == [0, 2]


@pytest.mark.parametrize(
    ("changes", "language", "vision", "deepstack"),
    [
        (["training.learning_rate=1e-5"], 1e-4, 1e-4, 1e-4),
        (["training.learning_rate=5e-4", "training.vision_learning_rate=1e-5"], 1e-3, 1e-4, 1e-3),
        (["training.learning_rate=5e-3", "training.merger_learning_rate=1e-4"], 5e-3, 5e-3, 1e-3),
        (["training.learning_rate=0.02", "training.optimizer=muon", "training.method=full"], 2e-3, 2e-3, 2e-3),
    ],
)
def test_rates_are_the_runs_own_or_ten_times_as_high(
    changes: list[str], language: float, vision: float, deepstack: float
) -> None:
    found = gate_rates(load_settings(None, changes).training)
    assert set(found) == set(AREAS)
    expected = {"language": language, "vision": vision, "deepstack": deepstack, "merger": deepstack}
    assert {area: found[area] for area in expected} == pytest.approx(expected)


def test_one_line_says_what_was_found() -> None:
    rows = (GateRow("a", "x", "x", 1.0, True), GateRow("b", "x", "y", 0.0, False))
    result = GateResult(steps=7, first_loss=7.2, last_loss=0.015, rows=rows, seconds=3.21)
    assert format_gate(result) == "overfit gate: 1 of 2 rows generated back after 7 steps, loss 7.200 -> 0.015, 3.2 s"
    assert result.as_dict()["passed"] is False
    assert result.as_dict()["rows"][1]["generated"] == "y"


@pytest.mark.parametrize(
    ("last", "due", "passed"), [(3.5, False, True), (3.7, False, False), (3.5, True, False), (0.01, True, False)]
)
def test_a_frozen_language_model_needs_to_halve_the_loss_only(last: float, due: bool, passed: bool) -> None:
    rows = (GateRow("a", "x", "y", 0.0, False),)
    result = GateResult(steps=100, first_loss=7.2, last_loss=last, rows=rows, seconds=1.0, answers_due=due)
    assert result.passed == passed
    assert ("since the language model is frozen" in format_gate(result)) == (not due)


def test_whether_answers_are_due_follows_what_trains(small: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmdet.training.gate._learn", lambda *_, **__: (3, 7.0, 1.0))
    with pytest.raises(TrainingError, match="they were not even learnt"):
        run(small)
    small.model.model.language_model.requires_grad_(False)
    assert not run(small).answers_due

"""Logits only where labels are: the same loss and gradients as the plain forward of transformers, in every Qwen-VL family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText
from trl.trainer.utils import add_fused_lm_head

from vlmdet.training import losses
from vlmdet.training.losses import score_supervised_only

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture
def model_of(family_base: Callable[[str], Path]) -> Callable[[str], Any]:
    return lambda family: AutoModelForImageTextToText.from_pretrained(family_base(family), dtype=torch.float32).train()


def batch_for(model: Any, *, rows: int = 2) -> dict[str, torch.Tensor]:
    """A picture of 4 x 4 patches (4 image tokens) and 6 text tokens a row; labels on the last three, and on two of row 1."""
    patch = model.config.vision_config.patch_size
    image = model.config.image_token_id
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(10, 200, (rows, 6), generator=generator)
    start = torch.full((rows, 1), model.config.vision_start_token_id)
    ids = torch.cat([text[:, :2], start, torch.full((rows, 4), image), text[:, 2:]], dim=1)
    labels = torch.full_like(ids, -100)
    labels[:, -3:] = ids[:, -3:]
    labels[1, -3] = -100
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == image).long(),
        "labels": labels,
        "pixel_values": torch.randn(rows * 16, 3 * 2 * patch * patch, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * rows),
    }


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [False, True])
def test_loss_and_gradients_are_those_of_the_plain_forward(
    model_of: Callable[[str], Any], family: str, lora: bool
) -> None:
    model = model_of(family)
    batch = batch_for(model)
    base = model
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    plain = model(**batch)
    expected = gradients(model, plain.loss)

    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    assert score_supervised_only(model)
    scored = model(**batch, fused_lm_head=True)
    assert scored.label_mask.sum() == 5
    torch.testing.assert_close(-scored.log_probs.sum() / 5, plain.loss, rtol=0, atol=1e-6)
    torch.testing.assert_close(scored.loss, plain.loss, rtol=0, atol=1e-6)
    found = gradients(model, -scored.log_probs.sum() / 5)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_only_supervised_positions_reach_the_head(
    model_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("qwen2_vl")
    shapes = []

    class Recording(losses.ChunkedLogProbFunction):  # type: ignore[misc]
        @staticmethod
        def apply(hidden: torch.Tensor, *rest: Any) -> Any:
            shapes.append(tuple(hidden.shape))
            return losses_apply(hidden, *rest)

    losses_apply = losses.ChunkedLogProbFunction.apply
    monkeypatch.setattr(losses, "ChunkedLogProbFunction", Recording)
    add_fused_lm_head(model)
    score_supervised_only(model)
    model(**batch_for(model), fused_lm_head=True)
    assert shapes == [(5, 64)]


def test_metrics_and_the_mean_over_an_accumulated_batch_are_trls(model_of: Callable[[str], Any]) -> None:
    model = model_of("qwen3_vl")
    batch = batch_for(model)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    theirs = model(**batch, fused_lm_head=True, num_items_in_batch=7)
    score_supervised_only(model)
    ours = model(**batch, fused_lm_head=True, num_items_in_batch=7)
    for name in ("loss", "log_probs", "entropy", "is_top1", "label_mask"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=1e-6, msg=name)


def test_a_batch_without_labels_has_a_loss_of_0_and_a_gradient(model_of: Callable[[str], Any]) -> None:
    model = model_of("qwen2_vl")
    batch = batch_for(model)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    add_fused_lm_head(model)
    score_supervised_only(model)
    loss = model(**batch, fused_lm_head=True).loss
    assert loss.item() == 0
    loss.backward()


def test_it_is_done_once_and_generation_stays_as_it_was(model_of: Callable[[str], Any]) -> None:
    model = model_of("qwen2_vl").eval()
    batch = batch_for(model)
    labels = batch.pop("labels")
    before = model.generate(**batch, max_new_tokens=4, do_sample=False)
    add_fused_lm_head(model)
    assert score_supervised_only(model)
    assert not score_supervised_only(model)
    assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False), before)
    assert model(**batch, labels=labels).logits.shape == (2, 11, model.config.text_config.vocab_size)


def test_other_families_keep_their_loss() -> None:
    model = torch.nn.Linear(2, 2)
    model.config = type("Config", (), {"model_type": "gemma3"})()  # type: ignore[assignment]
    assert not score_supervised_only(model)
    assert "forward" not in vars(model)

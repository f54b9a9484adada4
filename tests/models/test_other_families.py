"""PaliGemma, Florence-2, InternVL and Idefics3: adapters on the language model learn, and what they learnt is generated back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl.trainer.utils import add_fused_lm_head

from vlmdet.boxes import Boxes
from vlmdet.config import load_settings
from vlmdet.data.collators_other import PromptAnswerCollator, in_one_row
from vlmdet.data.dataset import build_messages
from vlmdet.errors import ModelError, TrainingError
from vlmdet.grounding import View, get_codec
from vlmdet.models.families import area_of, codec_of, resolve_targets
from vlmdet.models.inference import generate_answers
from vlmdet.models.loader import load
from vlmdet.models.lora import build_lora_config
from vlmdet.models.processors import seen_size, show_whole_pictures
from vlmdet.training.first_batch import check_first_batch
from vlmdet.training.lengths import count_tokens, refuse_long_rows
from vlmdet.training.prepare import prepare
from vlmdet.training.train import train

FAMILIES = ("paligemma", "florence2", "internvl", "idefics3")
CODECS = {"idefics3": "plain_json"}
LABELS = ["cup", "red sign"]
TRUTH = {"cup": [0.1, 0.2, 0.5, 0.6], "red sign": [0.3, 0.1, 0.9, 0.8]}
SIZE = (80, 60)


@pytest.fixture(params=FAMILIES)
def base(request: pytest.FixtureRequest, other_base: Callable[[str], Path]) -> tuple[Any, Any]:
    """A model and its processor."""
    folder = other_base(request.param)
    processor = AutoProcessor.from_pretrained(folder)
    show_whole_pictures(processor)
    return AutoModelForImageTextToText.from_pretrained(folder), processor


def limits(processor: Any) -> dict[str, int]:
    width, height = seen_size(processor)
    return {"min_pixels": width * height, "max_pixels": width * height}


def two_rows(model: Any) -> list[dict[str, Any]]:
    """Two noisy pictures with the same question and different answers."""
    rng = np.random.default_rng(0)
    return [
        {
            "id": label,
            "image": Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize(SIZE),
            "messages": build_messages(LABELS, boxes=Boxes(np.array([box])), labels=[label], codec=codec_of(model)),
        }
        for label, box in TRUTH.items()
    ]


def adapted(model: Any, rank: int = 8) -> Any:
    targets = ["language.attn", "language.mlp"]
    return get_peft_model(model, build_lora_config(model, rank=rank, alpha=2 * rank, dropout=0.0, targets=targets))


def test_roles_name_the_language_models_layers_and_areas_are_told_apart(base: tuple[Any, Any]) -> None:
    model, _ = base
    attention, mlp = (resolve_targets(model, [role]) for role in ("language.attn", "language.mlp"))
    # two decoder layers of q, k, v, o and gate, up, down; BART: two encoder layers (4 and fc1, fc2), two decoder layers with
    # attention to themselves and to the encoder (8 and fc1, fc2)
    assert (len(attention), len(mlp)) == ((24, 8) if model.config.model_type == "florence2" else (8, 6))
    assert {area_of(f"{name}.weight") for name in [*attention, *mlp]} == {"language"}
    areas = {area_of(name) for name, _ in model.named_parameters()}
    assert {"vision", "merger", "language", "embeddings"} <= areas
    tower = next(
        module for name, module in model.named_modules() if name in ("model.vision_tower", "model.vision_model")
    )
    names = {id(weight): name for name, weight in model.named_parameters()}
    assert {area_of(names[id(weight)]) for weight in tower.parameters()} == {"vision"}


def test_a_gradient_reaches_every_adapter_matrix_and_nothing_else(base: tuple[Any, Any]) -> None:
    model, processor = base
    batch = PromptAnswerCollator(processor, **limits(processor))(two_rows(model))
    batch.pop("shift_labels", None)
    wrapped = adapted(model, rank=2)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:  # zero at first, and then A has no gradient
                weight.normal_(0, 0.02)
    wrapped.train()
    wrapped(**batch).loss.backward()
    for name, weight in wrapped.named_parameters():
        if "lora_" in name:
            assert weight.grad is not None and weight.grad.abs().max() > 0, name
        else:
            assert weight.grad is None, name


def test_trls_loss_is_the_models_own(base: tuple[Any, Any]) -> None:
    """TRL replaces the forward and shifts labels by one; Florence-2's decoder needs them where they are."""
    model, processor = base
    batch = PromptAnswerCollator(processor, **limits(processor))(two_rows(model))
    model.eval()
    with torch.no_grad():
        own = model(**{key: value for key, value in batch.items() if key != "shift_labels"}).loss
        add_fused_lm_head(model, outputs=("log_probs",))
        theirs = model(**batch, fused_lm_head=True)
    assert int(theirs.label_mask.sum()) == int((batch["labels"] != -100).sum())
    torch.testing.assert_close(theirs.loss, own, atol=1e-5, rtol=1e-5)


def test_two_pictures_are_learnt_by_heart_and_generated_back(base: tuple[Any, Any]) -> None:
    model, processor = base
    rows, codec = two_rows(model), get_codec(codec_of(model))
    collator = PromptAnswerCollator(processor, **limits(processor))
    batch = collator(rows)
    batch.pop("shift_labels", None)
    torch.manual_seed(0)
    wrapped = adapted(model)
    optimizer = torch.optim.AdamW([weight for weight in wrapped.parameters() if weight.requires_grad], lr=1e-2)
    wrapped.train()
    for _ in range(200 if model.config.is_encoder_decoder else 100):
        loss = wrapped(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    answers = generate_answers(
        wrapped,
        processor,
        [row["messages"][:-1] for row in rows],
        [row["image"] for row in rows],
        **limits(processor),
        max_new_tokens=64,
    )
    for row, answer in zip(rows, answers, strict=True):
        parsed = codec.parse(answer.text, View(*SIZE, *SIZE))
        assert (parsed.status, parsed.labels) == ("ok", [row["id"]]), answer.text
        np.testing.assert_allclose(parsed.boxes.xyxy[0], TRUTH[row["id"]], atol=1e-3)  # within the codec's grid
        assert not answer.truncated and answer.image_tokens > 0
        (alone,) = generate_answers(
            wrapped, processor, [row["messages"][:-1]], [row["image"]], **limits(processor), max_new_tokens=64
        )
        assert alone.text == answer.text


def test_paligemma_looks_ahead_in_its_prompt_only(other_base: Callable[[str], Path]) -> None:
    processor = AutoProcessor.from_pretrained(other_base("paligemma"))
    model = AutoModelForImageTextToText.from_pretrained(other_base("paligemma")).eval()
    batch = PromptAnswerCollator(processor, **limits(processor))(two_rows(model)[:1])
    learnt = (batch["labels"][0] != -100).nonzero().flatten()
    first, last = int(learnt[0]), int(learnt[-1])
    with torch.no_grad():
        before = model(**batch).logits[0]
        for place, moved in ((first - 2, True), (last, False)):  # a word of the prompt; the end of the answer
            changed = {key: value.clone() for key, value in batch.items()}
            changed["input_ids"][0, place] = 7
            after = model(**changed).logits[0]
            reach = slice(16, place)  # everything before it, but for the picture
            assert bool((after[reach] - before[reach]).abs().max() > 1e-3) is moved


def test_the_page_of_the_first_batch_finds_nothing_wrong(base: tuple[Any, Any]) -> None:
    model, processor = base
    batch = PromptAnswerCollator(processor, **limits(processor))(two_rows(model))
    assert check_first_batch(batch, processor, ["a", "b"]) == []
    shown = in_one_row(batch)
    learnt = shown["labels"] != -100
    assert torch.equal(shown["labels"][learnt], shown["input_ids"][learnt])
    assert int(learnt.sum()) == int((batch["labels"] != -100).sum())
    batch["labels"][0][batch["labels"][0] != -100] = -100
    with pytest.raises(TrainingError, match="a: no token carries loss"):
        check_first_batch(batch, processor, ["a", "b"])


def test_tokens_are_counted_without_a_picture(base: tuple[Any, Any]) -> None:
    model, processor = base
    rows = two_rows(model)
    batch = PromptAnswerCollator(processor, **limits(processor))(rows)
    bare = [{"id": row["id"], "messages": row["messages"]} for row in rows]
    tokens = count_tokens(bare, [SIZE] * 2, processor, **limits(processor))
    assert tokens.answer.tolist() == (batch["labels"] != -100).sum(dim=1).tolist()
    assert tokens.image.tolist() == (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist()
    total = batch["attention_mask"].sum(dim=1)
    if model.config.is_encoder_decoder:
        total = total + (batch["labels"] != -100).sum(dim=1)
    assert tokens.total.tolist() == total.tolist()
    width, _ = seen_size(processor)
    refuse_long_rows(tokens, limit=int(total.max()), factor=width, **limits(processor))
    with pytest.raises(Exception, match=r"rows have more than 9 tokens.*the text alone is too long"):
        refuse_long_rows(tokens, limit=9, factor=width, **limits(processor))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_trains_and_loads_again_under_its_contract(
    other_base: Callable[[str], Path], family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "set"
    folder.mkdir()
    for part in ("train", "val"):
        Image.new("RGB", SIZE, (200, 220, 240)).save(folder / f"{part}.png")
        line = {"id": part, "image": f"{part}.png", "width": SIZE[0], "height": SIZE[1], "split": part}
        line |= {"boxes": [[0.1, 0.2, 0.5, 0.6]], "box_format": "xyxy/fraction", "labels": ["cup"]}
        (folder / f"{part}.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    settings = load_settings(
        None,
        [
            f"data.source={folder}",
            f"model.name={other_base(family)}",
            "training.max_steps=2",
            "training.batch_size=1",
            "training.learning_rate=1e-3",
            "training.report_to=[]",
            "training.overfit_gate=false",
            "evaluation.max_new_tokens=8",
        ],
    )
    prepared = prepare(settings, say=lambda line: None)
    contract = prepared.contract
    own = family in ("paligemma", "florence2")
    assert contract.codec == CODECS.get(family, family)
    assert contract.system_prompt == ("" if own else "You find objects in images and answer with their bounding boxes.")
    assert contract.user_prompt == {
        "paligemma": "detect cup",
        "florence2": "<OPEN_VOCABULARY_DETECTION>cup",
    }.get(family, "Detect every cup in this image. If there is none, answer: none")
    side = 64 if family == "florence2" else 56
    assert (contract.min_pixels, contract.max_pixels, contract.size_factor) == (side * side, side * side, side)
    run = train(prepared, say=lambda line: None)
    tuned = load(str(run / "checkpoints" / "best"))
    assert tuned.contract == contract
    assert any(bool(weight.any()) for name, weight in tuned.model.named_parameters() if "lora_B" in name)
    with pytest.raises(ModelError, match=rf"sees every picture at {side} x {side}"):
        load(str(other_base(family)), min_pixels=3136, max_pixels=12544)

"""The loop of our own writes the ids that transformers' `generate` writes, row by row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image

from vlmdet.data.collators import collate_prompts
from vlmdet.data.dataset import build_messages
from vlmdet.models.answers import token_texts
from vlmdet.models.decoding import _move_padding, can_loop, decode
from vlmdet.models.inference import generate_answers
from vlmdet.models.loader import Loaded, load
from vlmdet.models.lora import build_lora_config

LIMITS = {"min_pixels": 4 * 28 * 28, "max_pixels": 16 * 28 * 28}
SIZES = ((60, 60), (200, 90), (56, 140), (112, 112), (300, 40), (60, 60))
SAME, OTHER = [["sign"]] * 6, [["sign"], ["red sign", "x"], ["a longer name of a sign"], ["x"], ["y"], ["sign"]]


def loud(folder: Path) -> Loaded:
    """An untrained model is so faint that it would repeat the last token of any prompt; this one says something."""
    loaded = load(str(folder), **LIMITS)
    with torch.no_grad():
        for name, weight in loaded.model.named_parameters():
            if weight.ndim == 2 and "embed_tokens" not in name:
                weight.mul_(8)
    return loaded


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in SIZES]


@pytest.mark.parametrize("asked", [SAME, OTHER], ids=["one question", "several questions"])
@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_ids_and_probabilities_are_those_of_generate(
    family_base: Callable[[str], Path], model_type: str, asked: list[list[str]], pictures: list[Image.Image]
) -> None:
    loaded = loud(family_base(model_type))
    assert can_loop(loaded.model)
    loaded.model.generation_config.repetition_penalty = (
        1.3  # checkpoints bring such settings; a list of boxes repeats its words
    )
    rows = ([build_messages(labels) for labels in asked], pictures)
    ours = generate_answers(loaded.model, loaded.processor, *rows, **LIMITS, max_new_tokens=12, logprobs=True)
    theirs = generate_answers(
        loaded.model, loaded.processor, *rows, **LIMITS, max_new_tokens=12, logprobs=True, plain=True
    )
    assert len({answer.text for answer in ours}) > 1
    for one, other in zip(ours, theirs, strict=True):
        assert (one.text, one.tokens, one.truncated, one.answer_tokens) == (
            other.text,
            other.tokens,
            other.truncated,
            other.answer_tokens,
        )
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)
        assert len(one.logprobs) == len(one.tokens) > 0
        assert "".join(one.tokens) == one.text
        assert max(one.logprobs) <= 0


def test_rows_that_have_ended_leave_and_the_others_go_on_as_before(
    small_base: Path, pictures: list[Image.Image]
) -> None:
    """With the tokens of one row's fourth place as end tokens, rows end at different steps."""
    loaded = loud(small_base)
    batch = collate_prompts(loaded.processor, [build_messages(["sign"])] * 6, pictures, **LIMITS)
    with torch.inference_mode():
        free = decode(loaded.model, batch, ends=[], max_new_tokens=16)
        assert [len(row.ids) for row in free] == [16] * 6 and not any(row.ended for row in free)
        ends = {free[0].ids[3], free[3].ids[8]}
        cut = decode(loaded.model, batch, ends=sorted(ends), max_new_tokens=16, logprobs=True)
    wanted = []
    for row in free:
        stop = next((i + 1 for i, token in enumerate(row.ids) if token in ends), 16)
        wanted.append(row.ids[:stop])
    assert [row.ids for row in cut] == wanted
    assert [row.ended for row in cut] == [ids[-1] in ends for ids in wanted]
    assert [len(row.logprobs) for row in cut] == [len(ids) for ids in wanted]
    assert len({len(ids) for ids in wanted}) > 1


def test_an_adapter_takes_part(small_base: Path, pictures: list[Image.Image]) -> None:
    loaded = loud(small_base)
    rows = ([build_messages(["sign"])] * 6, pictures)
    before = generate_answers(loaded.model, loaded.processor, *rows, **LIMITS, max_new_tokens=8)
    config = build_lora_config(loaded.model, rank=4, alpha=8, dropout=0.0, targets=["language.attn"])
    model = get_peft_model(loaded.model, config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(0))
    ours = generate_answers(model, loaded.processor, *rows, **LIMITS, max_new_tokens=8)
    theirs = generate_answers(model, loaded.processor, *rows, **LIMITS, max_new_tokens=8, plain=True)
    assert [answer.text for answer in ours] == [answer.text for answer in theirs]
    assert [answer.text for answer in ours] != [answer.text for answer in before]


def test_padding_moves_behind_the_shared_tokens() -> None:
    batch = {
        "input_ids": torch.tensor([[0, 0, 7, 8, 1, 2], [7, 8, 3, 4, 5, 6]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6]),
        "mm_token_type_ids": torch.tensor([[0, 0, 0, 0, 1, 0], [0, 0, 1, 1, 0, 0]]),
    }
    positions = torch.tensor([[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]])[None].expand(3, -1, -1)
    moved, places = _move_padding(batch, positions, 2)
    assert moved["input_ids"].tolist() == [[7, 8, 0, 0, 1, 2], [7, 8, 3, 4, 5, 6]]
    assert moved["attention_mask"].tolist() == [[1, 1, 0, 0, 1, 1], [1] * 6]
    assert moved["mm_token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 0], [0, 0, 1, 1, 0, 0]]
    assert places[0].tolist() == [[0, 1, 0, 0, 2, 3], [0, 1, 2, 3, 4, 5]]


def test_families_that_the_loop_is_not_tested_for_go_through_generate(other_base: Callable[[str], Path]) -> None:
    loaded = load(str(other_base("internvl")))
    assert not can_loop(loaded.model)


def test_token_texts_join_to_the_answer_where_a_character_is_spread_over_tokens(small_base: Path) -> None:
    tokenizer = load(str(small_base), **LIMITS).processor.tokenizer
    text = "<|box_start|>(12,345) größe 漢字 🙂"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text) / 3
    assert "".join(token_texts(tokenizer, ids)) == text

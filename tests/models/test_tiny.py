"""The parts of which the embedded base is built: whole numbers, all of Unicode, near numbers near in space."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from vlmdet.models.tiny import CONTROL_TOKENS, build_model, build_tokenizer, number_ids


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(["Detect every red sign, none, 12 of 910"] * 3, vocab_size=1400)


def test_each_number_and_each_control_token_is_one_piece(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in [*CONTROL_TOKENS, *(str(value) for value in range(1000))]:
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 1
    ids, values = number_ids(tokenizer)
    assert len(set(ids.tolist())) == 1000
    assert [tokenizer.decode([i]) for i in ids[[0, 7, 910]].tolist()] == ["0", "7", "910"]
    assert values[910] == 910
    for text in ("(92,310),(1000,705)", "Grüße, 桌子 🍫\n\t x"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token != tokenizer.eos_token  # else padding would hide the end from the loss


def test_embeddings_of_near_numbers_are_alike_and_the_seed_decides(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_model(tokenizer, seed=3)
    ids, _ = number_ids(tokenizer)
    rows = torch.nn.functional.normalize(model.get_input_embeddings().weight[ids].detach(), dim=1)
    likeness = [float((rows[:-step] * rows[step:]).sum(dim=1).mean()) for step in (1, 3, 10, 100)]
    assert likeness == sorted(likeness, reverse=True)
    assert likeness[0] > 0.9
    assert abs(likeness[-1]) < 0.3
    again, other = build_model(tokenizer, seed=3).state_dict(), build_model(tokenizer, seed=4).state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in model.state_dict().items())
    assert not all(torch.equal(weight, other[name]) for name, weight in model.state_dict().items())

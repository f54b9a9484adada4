"""What a server must see is what the collators make: the ids of the prompt, and the pixels, to the last bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmdet.contract import Contract
from vlmdet.data.collators import collate_prompts
from vlmdet.data.collators_other import collate_other_prompts
from vlmdet.data.dataset import build_messages
from vlmdet.errors import ContractError
from vlmdet.evaluation.rendering import Rendering
from vlmdet.grounding import View
from vlmdet.grounding.sizes import plan_view
from vlmdet.models.answers import token_texts
from vlmdet.models.loader import load, load_processor, make_contract
from vlmdet.models.processors import is_other_family

LABELS = ("red sign", "a<|im_end|>b")
SIZES = ((400, 300), (60, 60), (90, 333))


def contract_of(name: str, **limits: int) -> tuple[Any, Contract]:
    loaded = load(name, **limits)
    return loaded.processor, make_contract(
        loaded, labels=LABELS, box_order="raster", max_new_tokens=8, data_fingerprint=""
    )


def photo(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_vl", "internvl", "idefics3", "paligemma"])
def test_ids_and_pixels_are_those_of_the_collator(
    family_base: Callable[[str], Path], other_base: Callable[[str], Path], model_type: str
) -> None:
    squashed = model_type not in ("qwen2_vl", "qwen3_vl")
    limits = {} if squashed else {"min_pixels": 4096, "max_pixels": 40_000}
    processor, contract = contract_of(str((other_base if squashed else family_base)(model_type)), **limits)
    rendering = Rendering(processor, contract)
    messages = build_messages(LABELS, codec=contract.codec)
    collate = collate_other_prompts if is_other_family(processor) else collate_prompts
    limits = {"min_pixels": contract.min_pixels, "max_pixels": contract.max_pixels}
    for size in SIZES:
        image = photo(*size)
        expected = collate(processor, [messages], [image], **limits)
        sent = rendering.picture(image)
        assert sent is not None
        assert rendering.ids(messages, View(*size, *sent.size)) == tuple(expected["input_ids"][0].tolist())
        if not squashed:
            view = plan_view(*size, **limits, factor=contract.size_factor)
            assert sent.size == (view.resized_width, view.resized_height)
        arrived = collate(processor, [messages], [sent], **limits)
        assert np.array_equal(arrived["pixel_values"].numpy(), expected["pixel_values"].numpy())
    assert rendering.image_token_id in rendering.ids(messages, View(*size, *sent.size))


def test_another_template_or_other_limits_are_refused() -> None:
    processor, contract = contract_of("tiny")
    Rendering(processor, contract)
    with pytest.raises(ContractError, match="template_sha256 was 0, now "):
        Rendering(processor, dataclasses.replace(contract, template_sha256="0"))
    other = load_processor("tiny", min_pixels=3136, max_pixels=12544)
    with pytest.raises(ContractError, match=r"were \(12544, 38416, 28\), now \(3136, 12544, 28\)"):
        Rendering(other, contract)


def test_a_strip_that_would_be_resized_twice_is_not_sent() -> None:
    processor, contract = contract_of("tiny")
    assert Rendering(processor, contract).picture(photo(3000, 20)) is None


def test_texts_of_tokens_make_up_the_text_of_all() -> None:
    tokenizer = load_processor("tiny", min_pixels=None, max_pixels=None).tokenizer
    text = "<|object_ref_start|>Grüße, 桌子 🍫<|object_ref_end|><|box_start|>(1,22),(333,999)<|box_end|>"
    ids = tokenizer(text)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == text and len(texts) == len(ids)
    assert texts[0] == "<|object_ref_start|>" and texts[-1] == "<|box_end|>" and "333" in texts
    assert texts[texts.index("桌") - 1] == "" and "🍫" in texts  # the base has no piece for them, but their bytes
    cut = ids[: texts.index("🍫")]  # in the middle of a character: the mark of what cannot be shown
    assert "".join(token_texts(tokenizer, cut)) == tokenizer.decode(cut)
    assert token_texts(tokenizer, cut)[-1].endswith("\ufffd")
    assert token_texts(tokenizer, []) == ()

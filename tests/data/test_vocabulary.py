"""The vocabulary that the collators are tested with is the real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize("file", ["token_vectors_transformersjs.json", "token_vectors_computed.json"])
def test_published_ids(qwen_processor: Any, shared: Path, file: str) -> None:
    vectors = json.loads((shared / "data/qwen/reference" / file).read_text(encoding="utf-8"))
    assert vectors
    for vector in vectors:
        text, ids = vector["text"], vector["ids"]
        assert qwen_processor.tokenizer.encode(text, add_special_tokens=False) == ids, text


def test_control_tokens_have_the_published_ids(qwen_processor: Any) -> None:
    published = {
        "<|endoftext|>": 151643,
        "<|im_start|>": 151644,
        "<|im_end|>": 151645,
        "<|object_ref_start|>": 151646,
        "<|box_start|>": 151648,
        "<|vision_start|>": 151652,
        "<|image_pad|>": 151655,
        "<|video_pad|>": 151656,
    }
    tokenizer = qwen_processor.tokenizer
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in published} == published
    assert len(tokenizer) == 151657

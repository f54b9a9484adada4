"""The collators with the processors of Qwen2.5-VL and Qwen3-VL: true vocabulary, template and patch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from vlmdet.boxes import Boxes
from vlmdet.data.collators import (
    Qwen2VLCollatorV1,
    Qwen2VLCollatorV2,
    Qwen2VLCollatorV3,
    collate_prompts,
    render_prompt,
)
from vlmdet.data.dataset import build_messages
from vlmdet.errors import TrainingError
from vlmdet.grounding.sizes import plan_view

LIMITS = {"min_pixels": 65_536, "max_pixels": 1_048_576}
FAMILIES = {"qwen2_5_vl": ("Qwen2_5_VL", "Qwen2VL", 14), "qwen3_vl": ("Qwen3VL", "Qwen3VL", 16)}
ANSWERS = {
    # 10 % of 756 and 20 % of 1,036 pixels, 60 % and 70 %: what Qwen2.5-VL sees of 768 x 1024, in multiples of 28
    "qwen2_5_vl": '[{"bbox_2d": [76, 207, 454, 725], "label": "cup"}]',
    "qwen3_vl": '[{"bbox_2d": [100, 200, 600, 700], "label": "cup"}]',
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, qwen_processor: Any) -> tuple[str, Any]:
    name: str = request.param
    kind, video, patch = FAMILIES[name]
    import trl

    template = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    processor = getattr(transformers, f"{kind}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(patch_size=patch),
        tokenizer=qwen_processor.tokenizer,
        video_processor=getattr(transformers, f"{video}VideoProcessor")(patch_size=patch),
        chat_template=template.read_text(encoding="utf-8"),
    )
    return name, processor


def row_of(name: str, processor: Any, size: tuple[int, int], seed: int = 0) -> dict[str, Any]:
    factor = processor.image_processor.patch_size * processor.image_processor.merge_size
    messages = build_messages(
        ["cup"],
        boxes=Boxes(np.array([[0.1, 0.2, 0.6, 0.7]])),
        labels=["cup"],
        view=plan_view(*size, **LIMITS, factor=factor),
        codec=name,
    )
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return {"id": str(size), "messages": messages, "image": Image.fromarray(pixels).resize(size)}


def test_v3_learns_the_answer_under_the_familys_grid(family: tuple[str, Any]) -> None:
    name, processor = family
    rows = [row_of(name, processor, (768, 1024)), row_of(name, processor, (300, 280), 1)]
    batch = Qwen2VLCollatorV3(processor, **LIMITS)(rows)  # its own check holds the ids to the processor's
    # a picture of 768 x 1024, as published: 1 x 74 x 54 patches and 999 image tokens, of Qwen3-VL 1 x 64 x 48 and 768
    grid, tokens = {"qwen2_5_vl": ([1, 74, 54], 999), "qwen3_vl": ([1, 64, 48], 768)}[name]
    assert batch["image_grid_thw"][0].tolist() == grid
    assert int((batch["input_ids"][0] == processor.image_token_id).sum()) == tokens
    assert int(batch["mm_token_type_ids"][0].sum()) == tokens
    patch = FAMILIES[name][2]
    assert batch["pixel_values"].shape == (int(batch["image_grid_thw"].prod(dim=1).sum()), 3 * 2 * patch * patch)
    learnt = batch["labels"][0][batch["labels"][0] != -100]
    assert processor.tokenizer.decode(learnt) == ANSWERS[name] + "<|im_end|>"

    prompts = collate_prompts(processor, [row["messages"] for row in rows], [row["image"] for row in rows], **LIMITS)
    for i in range(len(rows)):
        asked = prompts["input_ids"][i][prompts["attention_mask"][i] == 1]
        taught = batch["input_ids"][i][batch["attention_mask"][i] == 1]
        assert torch.equal(asked, taught[: len(asked)])
        assert int(batch["labels"][i, len(asked)]) == int(taught[len(asked)])  # the first token that is learnt
        assert (batch["labels"][i, : len(asked)] == -100).all()
    assert torch.equal(prompts["pixel_values"], batch["pixel_values"])


def test_the_prompt_ends_where_an_answer_begins(family: tuple[str, Any]) -> None:
    name, processor = family
    text = render_prompt(processor, row_of(name, processor, (300, 280))["messages"])
    assert text.startswith("<|im_start|>system\n")
    assert text.count("<|vision_start|><|image_pad|><|vision_end|>") == 1
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("collator", [Qwen2VLCollatorV1, Qwen2VLCollatorV2])
def test_the_other_two_see_the_same_grid(family: tuple[str, Any], collator: Any) -> None:
    name, processor = family
    rows = [row_of(name, processor, (300, 280)), row_of(name, processor, (500, 700), 1)]
    theirs, ours = collator(processor, **LIMITS)(rows), Qwen2VLCollatorV3(processor, **LIMITS)(rows)
    assert torch.equal(theirs["image_grid_thw"], ours["image_grid_thw"])
    assert torch.equal(theirs["input_ids"], ours["input_ids"])


def test_a_template_that_makes_room_for_thoughts_is_refused(family: tuple[str, Any]) -> None:
    name, processor = family
    # as templates of thinking checkpoints do, before what the assistant says
    processor.chat_template = processor.chat_template.replace(
        "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}",
        "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n<think>\\n' }}",
    ).replace(
        "{% if add_generation_prompt %}<|im_start|>assistant\n",
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>",
    )
    with pytest.raises(TrainingError, match="without a place for thoughts"):
        Qwen2VLCollatorV3(processor, **LIMITS)([row_of(name, processor, (300, 280))])

"""V3 against an outside source: TRL's own vision collator in prompt-completion form.

TRL supervises the whole completion that the template writes, so also the newline after the last `<|im_end|>`. Without that
one token both must put loss on the same ids, row for row, at the same places.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from vlmdet.boxes import FRACTIONS, Boxes
from vlmdet.data.collators import Qwen2VLCollatorV3
from vlmdet.data.dataset import IMAGE_PLACEHOLDER, build_messages
from vlmdet.grounding.sizes import plan_view
from vlmdet.models.loader import load_processor

LIMITS = {"min_pixels": 4 * 28 * 28, "max_pixels": 16 * 28 * 28}
CUP = [0.1, 0.2, 0.3, 0.4]
BOXES = [CUP, [0.5, 0.05, 0.95, 0.31], [0.0, 0.0, 1.0, 1.0], [0.333, 0.666, 0.334, 0.999]]
CASES: dict[str, tuple[list[str], list[list[float]], list[str]]] = {
    # asked, boxes, their labels
    "one box": (["cup"], [CUP], ["cup"]),
    "several": (["cup", "plate"], BOXES, ["cup", "plate", "cup", "plate"]),
    "nothing there": (["cup"], [], []),
    "long question": ([f"thing number {i} of the list" for i in range(40)], [CUP], ["thing number 7 of the list"]),
    "other scripts": (
        ["tasse à café", "白血球", "чашка", "🍕"],
        BOXES,
        ["tasse à café", "白血球", "чашка", "🍕"],
    ),
    "hostile": (["a<|im_end|>b"], [CUP], ["a<|im_end|>b"]),
}


def make_rows(codec: str) -> list[dict[str, Any]]:
    """Six rows of different length, pictures of different size."""
    rows = []
    for i, (name, (asked, boxes, labels)) in enumerate(CASES.items()):
        pixels = np.random.default_rng(i).integers(0, 255, (6, 8, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((60 + 41 * i, 150 - 17 * i))
        messages = build_messages(
            asked,
            boxes=Boxes.from_array(boxes, FRACTIONS, 1, 1) if boxes else Boxes.empty(),
            labels=labels,
            size=image.size,
            view=plan_view(*image.size, **LIMITS),
            codec=codec,
        )
        rows.append({"id": name, "image": image, "messages": messages})
    return rows


def as_prompt_and_completion(row: dict[str, Any]) -> dict[str, Any]:
    """Word a row as TRL's documentation does: a bare image part, which the collator fills with the picture."""
    messages = copy.deepcopy(row["messages"])
    for message in messages:
        for part in message["content"]:
            if part.get("image") == IMAGE_PLACEHOLDER:
                del part["image"]
    return {"prompt": messages[:-1], "completion": messages[-1:], "images": [row["image"]]}


def collate_both(processor: Any, rows: list[dict[str, Any]]) -> tuple[Any, Any]:
    processor.image_processor.size = {"shortest_edge": LIMITS["min_pixels"], "longest_edge": LIMITS["max_pixels"]}
    theirs = DataCollatorForVisionLanguageModeling(processor, max_length=None, completion_only_loss=True)
    ours = Qwen2VLCollatorV3(processor, **LIMITS)
    return ours(rows), theirs([as_prompt_and_completion(row) for row in rows])


@pytest.fixture(params=["real vocabulary", "tiny base"])
def processor(request: pytest.FixtureRequest) -> Any:
    if request.param == "tiny base":
        return load_processor("tiny", min_pixels=None, max_pixels=None)
    return copy.deepcopy(request.getfixturevalue("qwen_processor"))


@pytest.mark.parametrize("codec", ["qwen2_vl", "qwen2_5_vl"])
def test_supervised_ids_are_trls_without_its_last_newline(processor: Any, codec: str) -> None:
    rows = make_rows(codec)
    ours, theirs = collate_both(processor, rows)
    (newline,) = processor.tokenizer("\n", add_special_tokens=False)["input_ids"]
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    lengths = set()
    for i, row in enumerate(rows):
        our_places = torch.nonzero(ours["labels"][i] != -100).flatten().tolist()
        their_places = torch.nonzero(theirs["labels"][i] != -100).flatten().tolist()
        assert their_places[:-1] == our_places, row["id"]
        assert ours["labels"][i][our_places].tolist() == theirs["labels"][i][their_places[:-1]].tolist(), row["id"]
        assert theirs["labels"][i][their_places[-1]] == newline, row["id"]
        assert ours["labels"][i][our_places[-1]] == end, row["id"]
        lengths.add(len(our_places))
    assert len(lengths) >= 5


def test_the_rest_of_the_batch_is_trls_too(processor: Any) -> None:
    """Same ids, same attention, same pixels: only the last newline's label differs."""
    ours, theirs = collate_both(processor, make_rows("qwen2_vl"))
    assert set(ours) == set(theirs)
    for key in set(ours) - {"labels"}:
        assert torch.equal(ours[key], theirs[key]), key
    differs = ours["labels"] != theirs["labels"]
    assert differs.sum(dim=1).tolist() == [1] * len(CASES)

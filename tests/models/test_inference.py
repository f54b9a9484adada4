"""An answer depends on its own picture and question, not on the rows beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vlmdet.boxes import Boxes
from vlmdet.data.collators import collate_prompts
from vlmdet.data.dataset import build_messages
from vlmdet.grounding.sizes import plan_view
from vlmdet.models import inference
from vlmdet.models.answers import Ask, RowError
from vlmdet.models.inference import generate_answers, hf_engine, parse_qwen_bbox_output, run_qwen2vl_inference
from vlmdet.models.loader import load, make_contract
from vlmdet.records import Sample

LIMITS = {"min_pixels": 4 * 28 * 28, "max_pixels": 16 * 28 * 28}
SIZES = ((60, 60), (200, 90), (56, 140), (112, 112))
LABELS = (["sign"], ["red sign", "green sign", "blue sign"], ["a much longer name of a sign"], ["x"])


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_batch_of_four_is_four_batches_of_one(family_base: Callable[[str], Path], model_type: str) -> None:
    loaded = load(str(family_base(model_type)), **LIMITS)
    with torch.no_grad():  # untrained layers are so faint that the model would repeat the last token of any prompt
        for name, weight in loaded.model.named_parameters():
            if weight.ndim == 2 and "embed_tokens" not in name:
                weight.mul_(8)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in SIZES]
    messages = [build_messages(labels) for labels in LABELS]
    batch = collate_prompts(loaded.processor, messages, images, **LIMITS)
    assert len(set(batch["attention_mask"].sum(dim=1).tolist())) > 1  # else nothing is padded and nothing is shown
    together = loaded.model(**batch).logits[:, -1]
    loaded.model.train()
    answers = generate_answers(loaded.model, loaded.processor, messages, images, **LIMITS, max_new_tokens=12)
    assert loaded.model.training  # as it was
    loaded.model.eval()
    for i, (message, image) in enumerate(zip(messages, images, strict=True)):
        alone = loaded.model(**collate_prompts(loaded.processor, [message], [image], **LIMITS)).logits[0, -1]
        torch.testing.assert_close(together[i], alone, atol=1e-4, rtol=1e-3)
        (answer,) = generate_answers(loaded.model, loaded.processor, [message], [image], **LIMITS, max_new_tokens=12)
        assert answer.text == answers[i].text
        assert (answer.prompt_tokens, answer.image_tokens) == (answers[i].prompt_tokens, answers[i].image_tokens)
    assert len({answer.text for answer in answers}) > 1
    # 112 x 112 is 4 x 4 tokens of 28 x 28; as 4 x 4 of 32 x 32 it would be over the limit, so 3 x 3
    assert answers[3].image_tokens == {"qwen3_vl": 9}.get(model_type, 16)
    text = run_qwen2vl_inference(loaded.model, loaded.processor, images[1], LABELS[1], **LIMITS, max_new_tokens=12)
    assert text == answers[1].text


def test_an_answer_ends_at_the_end_token_or_is_called_truncated(
    small_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(str(small_base), **LIMITS)
    tokenizer = loaded.processor.tokenizer
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tail = [[7, 8, end, tokenizer.pad_token_id], [7, 8, 9, 10]]

    def generate(input_ids: torch.Tensor, **kwargs: object) -> SimpleNamespace:
        return SimpleNamespace(sequences=torch.cat([input_ids, torch.tensor(tail)], dim=1))

    monkeypatch.setattr(loaded.model, "generate", generate)
    image = Image.new("RGB", (60, 60))
    ended, cut = generate_answers(
        loaded.model,
        loaded.processor,
        [build_messages(["sign"])] * 2,
        [image] * 2,
        **LIMITS,
        max_new_tokens=4,
        plain=True,
    )
    assert (ended.text, ended.answer_tokens, ended.truncated) == (tokenizer.decode([7, 8]), 3, False)
    assert (cut.text, cut.answer_tokens, cut.truncated) == (tokenizer.decode([7, 8, 9, 10]), 4, True)


def test_boxes_are_read_in_pixels() -> None:
    text = "<|object_ref_start|>sign<|object_ref_end|><|box_start|>(100,250),(500,750)<|box_end|>"
    assert parse_qwen_bbox_output(text, 200, 80) == [{"label": "sign", "bbox": [20.0, 20.0, 100.0, 60.0]}]
    assert parse_qwen_bbox_output(text) == [{"label": "sign", "bbox": [100.0, 250.0, 500.0, 750.0]}]
    assert parse_qwen_bbox_output("none") == []


def test_a_batch_that_fails_is_asked_picture_by_picture_and_what_fails_alone_is_an_error(
    small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(str(small_base), **LIMITS)
    contract = make_contract(
        loaded, labels=["sign"], codec="auto", box_order="raster", max_new_tokens=4, data_fingerprint=""
    )
    asks = []
    for index, (width, height) in enumerate(SIZES):
        path = tmp_path / f"{index}.png"
        Image.new("RGB", (width, height), "red").save(path)
        sample = Sample(str(index), path, width, height, Boxes.empty(), ())
        asks.append(Ask(index, sample, build_messages(["sign"]), plan_view(width, height, **LIMITS)))
    engine = hf_engine(loaded, contract=contract, batch_size=3, max_new_tokens=4)
    whole = dict(engine(asks))
    real = inference.decode
    sizes = []

    def decode(model: object, batch: dict[str, torch.Tensor], **kwargs: object) -> object:
        sizes.append(len(batch["input_ids"]))
        if len(batch["input_ids"]) > 1 or (batch["image_grid_thw"][0].tolist() == [1, 4, 10]):
            raise torch.OutOfMemoryError("no room")
        return real(model, batch, **kwargs)

    monkeypatch.setattr(inference, "decode", decode)
    broken = dict(engine(asks))
    assert sizes == [3, 1, 1, 1, 1]
    (lost,) = [index for index, answer in broken.items() if isinstance(answer, RowError)]
    assert lost == 1 and "no room" in broken[lost].reason
    for index, answer in broken.items():
        if index != lost:
            assert answer.text == whole[index].text

    asks[1].sample.picture.write_bytes(b"no picture")
    monkeypatch.setattr(inference, "decode", real)
    assert isinstance(dict(engine(asks))[1], RowError)

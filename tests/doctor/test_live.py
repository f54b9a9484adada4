"""The small model: of the user's architecture and vocabulary, under his trainer, after three steps, one row by heart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from tests.doctor.drawn import SETTINGS, draw_rows, make_convert
from vlmdet.doctor import Subject
from vlmdet.doctor.calls import UserCodeError
from vlmdet.doctor.evidence import Evidence
from vlmdet.doctor.live.tiny import CLASSES, class_of, random_model, small_config
from vlmdet.models.tiny import TINY_DIR

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module")
def processor() -> Any:
    return transformers.AutoProcessor.from_pretrained(TINY_DIR)


class Collator:
    """Loss on the answers and their end tokens, found by the headers of their turns."""

    def __init__(self, processor: Any, *, end: bool = True, shift: int = 0) -> None:
        self.processor, self.end, self.shift = processor, end, shift

    def __call__(self, examples: Any) -> Any:
        texts = [self.processor.apply_chat_template(one["messages"], tokenize=False) for one in examples]
        images = [[one["image"]] for one in examples]
        batch = self.processor(text=texts, images=images, padding=True, return_tensors="pt")
        header = self.processor.tokenizer("<|im_start|>assistant\n")["input_ids"]
        end = self.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
        labels = torch.full_like(batch["input_ids"], -100)
        for row, ids in enumerate(batch["input_ids"].tolist()):
            for i in range(len(ids)):
                if ids[i : i + len(header)] == header:
                    stop = ids.index(end, i + len(header)) + self.end
                    labels[row, i + len(header) : stop] = batch["input_ids"][row, i + len(header) : stop]
        batch["labels"] = torch.roll(labels, -self.shift, 1) if self.shift else labels
        return batch


def evidence_of(processor: Any, **fields: Any) -> Evidence:
    given = {"rows": draw_rows(8), "box_format": "xyxy/pixel", "convert": make_convert(), "settings": SETTINGS}
    return Evidence(Subject(processor=processor, **{**given, **fields}))


@pytest.mark.parametrize("kind", QWEN)
def test_small_configurations_run(kind: str, processor: Any) -> None:
    config = small_config(getattr(transformers, f"{CLASSES[kind]}Config")(), processor)
    model = random_model(class_of(config), config)
    assert sum(one.numel() for one in model.parameters()) < 2_000_000
    assert model.get_input_embeddings().weight.shape[0] == len(processor.tokenizer)
    ids = torch.tensor([processor.tokenizer("a cup")["input_ids"]])
    assert model(input_ids=ids).logits.shape == (1, ids.shape[1], len(processor.tokenizer))


def build(processor: Any, *, rate: float = 1e-3, freeze: bool = False) -> Any:
    def build_trainer() -> Any:
        model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
            "Qwen/Qwen2-VL-7B-Instruct", dtype="bfloat16"
        )
        if freeze:
            model.requires_grad_(False)
        args = transformers.TrainingArguments(
            output_dir="/nowhere/at/all", bf16=True, learning_rate=rate, report_to="wandb", remove_unused_columns=False
        )
        rows = [make_convert()(row) for row in draw_rows(4)]
        return transformers.Trainer(model=model, args=args, train_dataset=rows, data_collator=Collator(processor))

    return build_trainer


def test_the_users_trainer_on_a_small_model(processor: Any) -> None:
    original = transformers.PreTrainedModel.__dict__["from_pretrained"]
    evidence = evidence_of(processor, build_trainer=build(processor))
    built = evidence.trainer()
    assert built.loads.models == [
        ("Qwen/Qwen2-VL-7B-Instruct", "Qwen2VLForConditionalGeneration", {"dtype": "bfloat16"})
    ]
    assert built.total == sum(built.trainable.values())
    assert built.arguments["bf16"] is True and built.arguments["output_dir"] == "/nowhere/at/all"
    assert transformers.PreTrainedModel.__dict__["from_pretrained"] is original
    steps = evidence.steps()
    assert steps.error is None and len(steps.losses) == 3
    assert set(steps.moved) == set(built.trainable) and sum(one > 0 for one in steps.moved.values()) > 20
    assert evidence.steps() is steps


def test_a_rate_of_nothing_moves_nothing(processor: Any) -> None:
    steps = evidence_of(processor, build_trainer=build(processor, rate=0.0)).steps()
    assert set(steps.moved.values()) == {0.0} and max(one or 0 for one in steps.gradients.values()) > 0


def test_a_step_that_cannot_be_taken_is_told(processor: Any) -> None:
    steps = evidence_of(processor, build_trainer=build(processor, freeze=True)).steps()
    assert steps.error is not None and steps.moved == {}


def test_a_trainer_that_raises(processor: Any) -> None:
    def build_trainer() -> Any:
        raise RuntimeError("no such luck")

    with pytest.raises(UserCodeError, match="no such luck"):
        evidence_of(processor, build_trainer=build_trainer).trainer()


def test_one_row_by_heart(processor: Any) -> None:
    good = evidence_of(processor, collate=Collator(processor)).overfit()
    assert good.learnt and good.written == good.target and good.ended
    endless = evidence_of(processor, collate=Collator(processor, end=False)).overfit()
    assert endless.learnt and not endless.ended
    shifted = evidence_of(processor, collate=Collator(processor, shift=1)).overfit()
    assert shifted.written != shifted.target


def test_awkward_batches(processor: Any) -> None:
    evidence = evidence_of(processor, collate=Collator)
    batches = evidence.batches()
    assert {"short", "long", "two turns", "answer in the question", "short+long", "short+long, left", "row 0"} <= set(
        batches
    )
    assert batches["short+long, left"].padded_left and not batches["short+long, right"].padded_left
    assert processor.tokenizer.padding_side == "right"
    for row in evidence.supervised():
        wanted = row.answers if row.batch == "two turns" else row.answers[-1:]
        assert row.text == "".join(f"{one}<|im_end|>" for one in wanted)

"""Checks of labels (and T04, T08, T09) on user-style collators, one mutation each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from doctor_hands import collator, encode, messages, rows, spans, subject, target, tiny_processor, told
from PIL import Image

from vlmdet.doctor.checks import labels, template
from vlmdet.doctor.subject import Subject

CHECKS = (*labels.CHECKS, template.masks_by_token)
Change = Callable[[Any, Any], None]


def ids_of(processor: Any, *words: str) -> torch.Tensor:
    return torch.tensor([processor.tokenizer.convert_tokens_to_ids(word) for word in words])


def everything(batch: Any, processor: Any) -> None:
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][batch["attention_mask"] == 0] = -100


def all_but_pictures(batch: Any, processor: Any) -> None:
    everything(batch, processor)
    pictures = ids_of(processor, "<|image_pad|>", "<|vision_start|>", "<|vision_end|>")
    batch["labels"][torch.isin(batch["input_ids"], pictures)] = -100


def nothing(batch: Any, processor: Any) -> None:
    batch["labels"][:] = -100


def nothing_in_one_row(batch: Any, processor: Any) -> None:
    batch["labels"][batch["attention_mask"].sum(1) == 72] = -100


def no_special(batch: Any, processor: Any) -> None:
    batch["labels"][torch.isin(batch["labels"], torch.tensor(processor.tokenizer.all_special_ids))] = -100


def no_box_tokens(batch: Any, processor: Any) -> None:
    batch["labels"][torch.isin(batch["labels"], ids_of(processor, "<|box_start|>", "<|box_end|>"))] = -100


def below_vocab_size(batch: Any, processor: Any) -> None:
    batch["labels"][batch["labels"] >= processor.tokenizer.vocab_size] = -100


def digits(batch: Any, processor: Any) -> None:
    tokenizer = processor.tokenizer
    keep = torch.tensor([i for i in range(len(tokenizer)) if tokenizer.decode([i]).strip().isdigit()])
    batch["labels"][~torch.isin(batch["labels"], keep)] = -100


def shifted(batch: Any, processor: Any) -> None:
    held = batch["labels"]
    batch["labels"] = torch.cat([held[:, 1:], torch.full_like(held[:, :1], -100)], 1)


def picture_tokens(batch: Any, processor: Any) -> None:
    image = ids_of(processor, "<|image_pad|>")
    batch["labels"][batch["input_ids"] == image] = image.item()


def padding(batch: Any, processor: Any) -> None:
    batch["labels"][batch["attention_mask"] == 0] = processor.tokenizer.pad_token_id


def _from_answers(batch: Any, processor: Any, offset: int) -> None:
    for row, ids in enumerate(batch["input_ids"].tolist()):
        first = spans(ids, processor)[0][0]
        batch["labels"][row, first : first + max(offset, 0)] = -100
        batch["labels"][row, first + min(offset, 0) : first] = batch["input_ids"][row, first + min(offset, 0) : first]


def late(batch: Any, processor: Any) -> None:
    _from_answers(batch, processor, 3)


def early(batch: Any, processor: Any) -> None:
    _from_answers(batch, processor, -12)


def header(batch: Any, processor: Any) -> None:
    _from_answers(batch, processor, -3)


def prefix_from_zero(batch: Any, processor: Any) -> None:
    everything(batch, processor)
    for row, (ids, mask) in enumerate(zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)):
        real = [one for one, on in zip(ids, mask, strict=True) if on]
        batch["labels"][row, : spans(real, processor)[0][0]] = -100


def cut_at(length: int) -> Change:
    def change(batch: Any, processor: Any) -> None:
        for name in ("input_ids", "labels", "attention_mask", "mm_token_type_ids"):
            if name in batch:
                batch[name] = batch[name][:, :length]

    return change


def by_first_place(processor: Any) -> Callable[[list[dict[str, Any]]], Any]:
    """A collator that looks for the answer's ids from the left."""
    tokenizer = processor.tokenizer

    def collate(examples: list[dict[str, Any]]) -> Any:
        batch = encode(processor, examples)
        labels = torch.full_like(batch["input_ids"], -100)
        for row, ids in enumerate(batch["input_ids"].tolist()):
            answer = examples[row]["messages"][-1]["content"][0]["text"]
            wanted = tokenizer(answer, add_special_tokens=False)["input_ids"]
            at = next(i for i in range(len(ids)) if ids[i : i + len(wanted)] == wanted)
            labels[row, at : at + len(wanted) + 1] = batch["input_ids"][row, at : at + len(wanted) + 1]
        batch["labels"] = labels
        return batch

    return collate


@pytest.mark.parametrize(
    ("change", "ids"),
    [
        (everything, ["L03", "L04"]),
        (all_but_pictures, ["L04", "L07"]),
        (nothing, ["L02"]),
        (no_box_tokens, ["L08"]),
        (no_special, ["T04", "L08"]),  # in this vocabulary these are the same ids
        (below_vocab_size, ["T04", "L08"]),
        (digits, ["L09"]),
        (shifted, ["L11"]),
        (picture_tokens, ["L03"]),
        (padding, ["L03"]),
        (late, ["L04", "L05"]),
        (early, ["L04"]),
        (cut_at(75), ["T09"]),
    ],
)
def test_each_broken_mask_has_its_id(change: Change, ids: list[str]) -> None:
    assert told(CHECKS, subject(collate=collator(tiny_processor(), change=change))) == ids


def test_end_token_alone() -> None:
    assert told(CHECKS, subject(collate=collator(tiny_processor(), end=False))) == ["L01"]


def test_header_with_loss_is_minor() -> None:
    given = subject(collate=collator(tiny_processor(), change=header))
    assert told(CHECKS, given) == ["L04"] and told(CHECKS, given, least=3) == []


def test_option_without_effect() -> None:
    settings = {"assistant_only_loss": True}
    broken = subject(collate=collator(tiny_processor(), change=everything), settings=settings)
    assert told(CHECKS, broken) == ["L12", "L04"]
    assert told(CHECKS, subject(settings=settings)) == []
    empty = subject(collate=collator(tiny_processor(), change=nothing), settings=settings)
    assert told(CHECKS, empty) == ["L12", "L02"]


def test_every_row_is_cut_before_its_answer() -> None:
    given = subject(collate=collator(tiny_processor(), change=cut_at(40)), settings={"max_seq_length": 40})
    assert told(CHECKS, given) == ["T09"]


def test_padding_that_is_the_end_token() -> None:
    processor = copy.deepcopy(tiny_processor())
    processor.tokenizer.pad_token = processor.tokenizer.eos_token

    def by_id(batch: Any, processor: Any) -> None:
        batch["labels"][batch["labels"] == processor.tokenizer.pad_token_id] = -100

    assert told(CHECKS, subject(processor=processor, collate=collator(processor, change=by_id))) == ["T08", "L01"]
    assert told(CHECKS, subject(processor=processor, collate=collator(processor))) == []


def test_prefix_mask_on_rows_padded_left() -> None:
    left = copy.deepcopy(tiny_processor())
    left.tokenizer.padding_side = "left"
    assert told(CHECKS, subject(processor=left, collate=collator(left, change=prefix_from_zero))) == ["L10", "T07"]
    assert told(CHECKS, subject(processor=left, collate=collator(left))) == []


def test_answer_by_its_first_place() -> None:
    assert told(CHECKS, subject(collate=by_first_place(tiny_processor()))) == ["L05"]


def two_turns(row: dict[str, Any]) -> dict[str, Any]:
    text = target(row)
    more = [
        {"role": "user", "content": [{"type": "text", "text": "And the plates?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "none"}]},
    ]
    return {"messages": [*messages(text), *more], "image": row["image"]}


def test_one_of_two_turns() -> None:
    processor = tiny_processor()
    for turns in (slice(0, 1), slice(-1, None)):
        given = subject(convert=two_turns, collate=collator(processor, turns=turns))
        assert told(CHECKS, given, least=3) == ["L06"]
        # with rows of one turn it does no harm yet
        assert told(CHECKS, subject(collate=collator(processor, turns=turns)), least=3) == []
    assert told(CHECKS, subject(convert=two_turns)) == []


@pytest.mark.parametrize("only", [True, False])
def test_collator_of_trl(only: bool) -> None:
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    def prompt_completion(row: dict[str, Any]) -> dict[str, Any]:
        turns = messages(target(row))
        return {"prompt": turns[:-1], "completion": turns[-1:], "images": [row["image"]]}

    collate = DataCollatorForVisionLanguageModeling(tiny_processor(), completion_only_loss=only)
    wanted = [] if only else ["L03", "L04"]
    assert told(CHECKS, subject(convert=prompt_completion, collate=collate)) == wanted


def test_healthy_answers_of_many_kinds() -> None:
    processor = tiny_processor()
    assert told(CHECKS, subject()) == []
    assert told(CHECKS, subject(collate=collator(processor, change=prefix_from_zero))) == []

    def chinese(row: dict[str, Any]) -> dict[str, Any]:
        return {"messages": messages(target(row).replace("cup", "杯子é")), "image": row["image"]}

    def negatives(row: dict[str, Any]) -> dict[str, Any]:
        return {
            "messages": messages("none" if len(row["objects"]["bbox"]) == 1 else target(row)),
            "image": row["image"],
        }

    def json(row: dict[str, Any]) -> dict[str, Any]:
        text = '[{"bbox_2d": [1, 2, 3, 4], "label": "cup"}]' * len(row["objects"]["bbox"])
        return {"messages": messages(text), "image": row["image"]}

    for made in (chinese, negatives, json):
        assert told(CHECKS, subject(convert=made)) == [], made
    assert told(CHECKS, subject(convert=chinese, collate=collator(processor, end=False))) == ["L01"]


def of_family(folder: Any, answer: Callable[[int], str], question: str) -> dict[str, Any]:
    """Rows of a family that the project's own collator takes."""
    pictures = [Image.new("RGB", (64, 64), (i * 30, 80, 120)) for i in range(6)]
    rows = [
        {"image": picture, "objects": {"bbox": [[i, 2, 30, 40 + i]], "category": ["cup"]}}
        for i, picture in enumerate(pictures)
    ]

    def made(row: dict[str, Any]) -> dict[str, Any]:
        return {
            "messages": messages(answer(int(row["objects"]["bbox"][0][0])), system=None, question=question),
            "image": row["image"],
        }

    return {"rows": rows, "convert": made}


@pytest.mark.parametrize(
    ("family", "answer", "question"),
    [
        ("paligemma", "<loc0100><loc0200><loc0{:03d}><loc0400> cup", "detect cup"),
        ("florence2", "cup<loc_100><loc_200><loc_{:03d}><loc_400>", "Locate the phrases in the caption: cup."),
        ("internvl", "<ref>cup</ref><box>[[1, 2, {}, 4]]</box>", "Find the cup."),
        ("idefics3", '[{{"bbox": [1, 2, {}, 4], "label": "cup"}}]', "Find the cup."),
    ],
)
def test_other_families_are_healthy(other_base: Any, family: str, answer: str, question: str) -> None:
    import transformers

    from vlmdet.data.collators_other import PromptAnswerCollator
    from vlmdet.models.processors import seen_size

    folder = other_base(family)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    width, height = seen_size(processor)
    collate = PromptAnswerCollator(processor, min_pixels=width * height, max_pixels=width * height)
    given = subject(
        processor=processor,
        collate=collate,
        model=str(folder),
        **of_family(folder, lambda i: answer.format(600 + i), question),
    )
    assert told((*CHECKS, *template.CHECKS), given) == []


@pytest.mark.parametrize(("version", "ids"), [("0.22.1", ["L12"]), ("1.16.0", [])])
def test_option_by_version(version: str, ids: list[str]) -> None:
    settings = {"assistant_only_loss": True, "trl_version": version}
    assert told(labels.CHECKS, subject(collate=None, settings=settings)) == ids


@pytest.mark.parametrize(
    ("more", "ids"),
    [({"prompt_completion": True}, []), ({"prompt_completion": True, "length": 60}, ["T09"]), ({}, ["L03", "L04"])],
)
def test_collator_of_the_trainer(more: dict[str, Any], ids: list[str], tmp_path: Any) -> None:
    processor = tiny_processor()

    def build_trainer() -> Any:
        import datasets
        from transformers import AutoModelForImageTextToText
        from trl import SFTConfig, SFTTrainer

        turns = [(messages(target(row)), [row["image"]]) for row in rows()]
        held = [{"messages": one, "images": pictures} for one, pictures in turns]
        if more.get("prompt_completion"):
            held = [{"prompt": one[:-1], "completion": one[-1:], "images": pictures} for one, pictures in turns]
        arguments = SFTConfig(
            output_dir=str(tmp_path), max_length=more.get("length"), report_to="none", bf16=False, use_cpu=True
        )
        model = AutoModelForImageTextToText.from_pretrained("Qwen/Qwen2-VL-2B-Instruct")
        return SFTTrainer(
            model=model, args=arguments, train_dataset=datasets.Dataset.from_list(held), processing_class=processor
        )

    given = Subject(build_trainer=build_trainer, processor=processor, settings={"model_type": "qwen2_vl"})
    assert told(CHECKS, given) == ids

"""Faults in a SmolVLM notebook and with TRL's own options."""

from __future__ import annotations

from typing import Any

from benchmarks.faults.bases import processor_of
from benchmarks.faults.homes import smol, trainers
from benchmarks.faults.registry import fault, subject


@fault("L01", stage="labels")
def the_last_tokens_of_a_row_but_one() -> Any:
    processor = processor_of("idefics3")
    return subject(smol.fields(), processor=processor, collate=smol.make_collate(processor, extra=0))


@fault("D12", stage="data")
def the_largest_object_alone_is_written() -> Any:
    def talk(row: dict[str, Any]) -> dict[str, Any]:
        def area(item: tuple[Any, Any]) -> int:
            (a, b, c, d), _ = item
            return int((c - a) * (d - b))

        pairs = sorted(zip(row["boxes"], row["labels"], strict=True), key=area)[-1:]
        return smol.talk(row | {"boxes": [p[0] for p in pairs], "labels": [p[1] for p in pairs]})

    return subject(smol.fields(), convert=talk)


@fault("L12", stage="labels", also=("L04", "L03"))
def assistant_only_loss_and_a_collator_that_knows_nothing_of_it() -> Any:
    """TRL's option is on; the collator that is passed makes labels of everything but padding and pictures."""
    fields = trainers.fields(None)
    processor = fields["processor"]

    def collate(examples: list[dict[str, Any]]) -> Any:
        texts = [processor.apply_chat_template(e["messages"], tokenize=False) for e in examples]
        batch = processor(text=texts, images=[[e["image"]] for e in examples], return_tensors="pt", padding=True)
        labels = batch["input_ids"].clone()
        for token in ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", processor.tokenizer.pad_token):
            labels[labels == processor.tokenizer.convert_tokens_to_ids(token)] = -100
        batch["labels"] = labels
        return batch

    settings = {"assistant_only_loss": True, "trl_version": "0.22.2", "trainer": "SFTTrainer"}
    return subject(fields, collate=collate, build_trainer=None, settings=settings)


@fault("C02", stage="conversation")
def a_default_system_text_of_the_template_at_inference() -> Any:
    """Trained with an empty system message; the template adds its own one where there is none."""
    from benchmarks.faults.homes import team

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        example = team.to_chat(row)
        empty = {"role": "system", "content": [{"type": "text", "text": ""}]}
        return example | {"messages": [empty, *example["messages"]]}

    return subject(team.fields(), convert=convert)

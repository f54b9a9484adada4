"""Faults of chat templates and tokenizers."""

from __future__ import annotations

from typing import Any

from benchmarks.faults.bases import model_of, processor_of
from benchmarks.faults.homes import coco3, cookbook, gemma, llava, team
from benchmarks.faults.registry import fault, subject

VICUNA = (
    "{% for m in messages %}{{ m['role'] | upper }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


@fault("T01", stage="template")
def a_vicuna_template_on_a_qwen() -> Any:
    processor = processor_of("qwen2_5_vl")
    processor.chat_template = VICUNA
    return subject(team.fields(), processor=processor, collate=team.make_collate(processor))


@fault("T02", stage="template")
def a_bos_by_hand_and_one_by_the_processor() -> Any:
    processor = processor_of("paligemma")

    def collate(items: list[dict[str, Any]]) -> Any:
        return processor(
            text=["<image><bos>" + item["messages"][0]["content"][1]["text"] for item in items],
            images=[item["image"] for item in items],
            suffix=[item["messages"][1]["content"][0]["text"] for item in items],
            return_tensors="pt",
            padding="longest",
        )

    return subject(gemma.fields(), processor=processor, collate=collate)


@fault("T03", stage="template", also=("C04",))
def box_tokens_of_another_model() -> Any:
    """The answers of a Qwen2-VL notebook in InternVL's control words, which this tokenizer cuts to pieces."""

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        example = cookbook.format_data(row)
        text = example["messages"][-1]["content"][0]["text"]
        for old, new in (
            ("object_ref_start", "ref"),
            ("object_ref_end", "/ref"),
            ("box_start", "det"),
            ("box_end", "/det"),
        ):
            text = text.replace(f"<|{old}|>", f"<|{new}|>")
        example["messages"][-1]["content"][0]["text"] = text
        return example

    return subject(cookbook.fields(), convert=convert)


@fault("T05", stage="template")
def thousand_new_location_tokens_and_an_old_embedding() -> Any:
    processor = processor_of("qwen2_vl")
    processor.tokenizer.add_tokens([f"<loc_{n}>" for n in range(1001)], special_tokens=True)

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        w, h = row["image"].size
        out = []
        for (a, b, c, d), kind in zip(row["objects"]["bbox"], row["objects"]["category"], strict=True):
            grid = (a / w, b / h, c / w, d / h)
            out.append(cookbook.LABELS[kind] + "".join(f"<loc_{round(1000 * v)}>" for v in grid))
        answer = {"role": "assistant", "content": [{"type": "text", "text": "".join(out) or "none"}]}
        return {"image": row["image"], "messages": [*cookbook.prompt_of(row), answer]}

    return subject(
        cookbook.fields(),
        processor=processor,
        model=model_of("qwen2_vl"),
        convert=convert,
        decode=None,
        parse=None,
        metric=None,
    )


@fault("T08", stage="template", also=("L01",))
def pad_is_made_eos_and_pad_is_masked() -> Any:
    processor = processor_of("qwen3_vl")
    processor.tokenizer.pad_token = processor.tokenizer.eos_token

    def collate(features: list[dict[str, Any]]) -> Any:
        texts = [processor.apply_chat_template(f["messages"], tokenize=False).strip() for f in features]
        images = [f["images"] for f in features]
        batch = processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt")
        labels = batch["input_ids"].clone()
        for i, f in enumerate(features):
            asked = processor.apply_chat_template(f["messages"][:-1], tokenize=False, add_generation_prompt=True)
            labels[i, : len(processor(text=[asked], images=[f["images"]])["input_ids"][0])] = -100
        labels[labels == processor.tokenizer.pad_token_id] = -100
        batch["labels"] = labels
        return batch

    return subject(coco3.fields(), processor=processor, collate=collate)


@fault("T09", stage="template")
def cut_at_the_length_of_a_text_model() -> Any:
    """Lists are cut after 150 tokens; the answers of full pictures lose their end."""

    class Cutting(llava.TurnCollator):
        def one(self, sample: dict[str, Any]) -> tuple[list[int], list[int], Any]:
            ids, labels, pixels = super().one(sample)
            return ids[:150], labels[:150], pixels

    fields = llava.fields()
    return subject(fields, collate=Cutting, settings=fields["settings"] | {"max_length": 150})


@fault("T10", stage="template")
def the_generation_prompt_is_added_in_training() -> Any:
    class Collator(cookbook.DetectionCollator):
        def __call__(self, examples: list[dict[str, Any]]) -> Any:
            texts = [
                self.processor.apply_chat_template(e["messages"], tokenize=False, add_generation_prompt=True)
                for e in examples
            ]
            images = [[e["image"]] for e in examples]
            batch = self.processor(text=texts, images=images, return_tensors="pt", padding=True)
            labels = batch["input_ids"].clone().fill_(-100)
            for row, ids in enumerate(batch["input_ids"].tolist()):
                size = len(self.header)
                starts = [i for i in range(len(ids)) if ids[i : i + size] == self.header]
                first = starts[0] + size
                last = ids.index(self.end, first) + 1
                labels[row, first:last] = batch["input_ids"][row, first:last]
            return {**batch, "labels": labels}

    return subject(cookbook.fields(), collate=Collator)

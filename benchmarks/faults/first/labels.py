"""Faults of the loss mask."""

from __future__ import annotations

import re
from typing import Any

from benchmarks.faults.bases import processor_of
from benchmarks.faults.homes import coco3, cookbook, gemma, llava, team
from benchmarks.faults.registry import fault, subject


@fault("L01", stage="labels")
def the_answers_span_stops_before_its_end() -> Any:
    class Collator(cookbook.DetectionCollator):
        def open_turns(self, ids: list[int], labels: Any, source: Any) -> None:
            size = len(self.header)
            for start in range(len(ids) - size):
                if ids[start : start + size] == self.header:
                    stop = ids.index(self.end, start)
                    labels[start + size : stop] = source[start + size : stop]

    return subject(cookbook.fields(), collate=Collator)


@fault("L01", stage="labels")
def answers_are_tokenised_without_their_end() -> Any:
    class Turns(llava.TurnCollator):
        def one(self, sample: dict[str, Any]) -> tuple[list[int], list[int], Any]:
            pixels = self.processor.image_processor(images=[sample["image"]], return_tensors="pt")
            pads = "<|image_pad|>" * (int(pixels["image_grid_thw"].prod()) // 4)
            question = sample["messages"][0]["content"][-1]["text"]
            prompt = (
                "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
                f"<|vision_start|>{pads}<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
            )
            front, reply = self.encode(prompt), self.encode(sample["messages"][1]["content"][0]["text"])
            return front + reply, [-100] * len(front) + reply, pixels

    return subject(llava.fields(), collate=Turns)


@fault("L01", stage="labels")
def all_control_tokens_are_masked_at_once() -> Any:
    """Every special id is set to -100; JSON answers have none but the end."""
    processor = processor_of("qwen2_5_vl")
    inner = team.make_collate(processor)

    def collate(batch: list[dict[str, Any]]) -> Any:
        import torch

        out = inner(batch)
        special = torch.tensor(processor.tokenizer.all_special_ids)
        out["labels"][torch.isin(out["labels"], special)] = -100
        return out

    return subject(team.fields(), processor=processor, collate=collate)


@fault("L02", stage="labels")
def the_marker_of_the_answer_is_another_models() -> Any:
    class Collator(cookbook.DetectionCollator):
        def __init__(self, processor: Any) -> None:
            super().__init__(processor)
            self.header = processor.tokenizer.encode("ASSISTANT:", add_special_tokens=False)

    return subject(cookbook.fields(), collate=Collator)


@fault("L03", stage="labels", also=("L04",))
def everything_but_padding_is_learnt() -> Any:
    """The cookbook's way with the image token of another model: 151655 does not occur here."""
    processor = processor_of("qwen2_vl")

    def collate_fn(examples: list[dict[str, Any]]) -> Any:
        texts = [processor.apply_chat_template(e["messages"], tokenize=False) for e in examples]
        batch = processor(text=texts, images=[[e["image"]] for e in examples], return_tensors="pt", padding=True)
        labels = batch["input_ids"].clone()
        labels[labels == processor.tokenizer.pad_token_id] = -100
        for token in (151652, 151653, 151655):
            labels[labels == token] = -100
        batch["labels"] = labels
        return batch

    return subject(cookbook.fields(), processor=processor, collate=collate_fn)


@fault("L04", stage="labels", also=("L03",))
def the_prompt_is_measured_before_the_picture_is_expanded() -> Any:
    class Collator(coco3.PromptLengthCollator):
        def tokens(self, text: str, images: list[Any]) -> list[int]:
            return self.p.tokenizer(text)["input_ids"]

    return subject(coco3.fields(), collate=Collator)


@fault("L04", stage="labels")
def the_prompt_is_measured_without_its_system_text() -> Any:
    processor = processor_of("qwen2_5_vl")
    long = {
        "role": "system",
        "content": [{"type": "text", "text": "You are a helpful assistant. Report all objects as JSON."}],
    }

    def ask(row: dict[str, Any]) -> list[dict[str, Any]]:
        return [long, *team.question(row)]

    def to_chat(row: dict[str, Any]) -> dict[str, Any]:
        example = team.to_chat(row)
        return example | {"messages": [long, *example["messages"]]}

    def collate(batch: list[dict[str, Any]]) -> Any:
        texts = [processor.apply_chat_template(b["messages"], tokenize=False).rstrip() for b in batch]
        images = [b["images"][0] for b in batch]
        out = processor(text=texts, images=images, padding=True, return_tensors="pt")
        labels = out["input_ids"].clone()
        for i, b in enumerate(batch):
            user = [m for m in b["messages"] if m["role"] == "user"]
            head = processor.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
            size = processor(text=[head], images=[images[i]], return_tensors="pt")["input_ids"].shape[1]
            labels[i, :size] = -100
        labels[out["attention_mask"] == 0] = -100
        out["labels"] = labels
        return out

    return subject(team.fields(), processor=processor, convert=to_chat, render=ask, collate=collate)


@fault("L05", stage="labels")
def the_answer_is_searched_from_the_front() -> Any:
    """The first place with the answer's ids; the question holds `none`, and so do rows without objects."""

    class Collator(cookbook.DetectionCollator):
        def __call__(self, examples: list[dict[str, Any]]) -> Any:
            tokenizer = self.processor.tokenizer
            texts = [self.processor.apply_chat_template(e["messages"], tokenize=False) for e in examples]
            batch = self.processor(
                text=texts, images=[[e["image"]] for e in examples], return_tensors="pt", padding=True
            )
            labels = batch["input_ids"].clone().fill_(-100)
            for row, example in enumerate(examples):
                answer = tokenizer.encode(example["messages"][-1]["content"][0]["text"], add_special_tokens=False)
                alternatives = (
                    [answer, tokenizer.encode(" none", add_special_tokens=False)] if len(answer) < 6 else [answer]
                )
                ids = batch["input_ids"][row].tolist()
                for place in range(len(ids)):
                    hit = next((a for a in alternatives if ids[place : place + len(a)] == a), None)
                    if hit:
                        stop = place + len(hit) + 1
                        labels[row, place:stop] = batch["input_ids"][row, place:stop]
                        break
            batch["labels"] = labels
            return batch

    return subject(cookbook.fields(), collate=Collator)


@fault("L06", stage="labels")
def only_the_first_of_two_answers_is_learnt() -> Any:
    class FirstTurn(llava.TurnCollator):
        def one(self, sample: dict[str, Any]) -> tuple[list[int], list[int], Any]:
            ids, labels, pixels = super().one(sample)
            learnt = [i for i, label in enumerate(labels) if label != -100]
            last = next((i for i in learnt if i + 1 not in learnt), learnt[-1])
            return ids, [label if i <= last else -100 for i, label in enumerate(labels)], pixels

    rows = llava.entries(12, 31)
    for row in rows:
        count = len(row["annotations"])
        row["conversations"] += [{"from": "human", "value": "count all objects"}, {"from": "gpt", "value": str(count)}]
    return subject(llava.fields(), rows=rows, collate=FirstTurn, render=None)


@fault("L08", stage="labels")
def box_tokens_are_taken_for_picture_tokens() -> Any:
    class Collator(cookbook.DetectionCollator):
        def __call__(self, examples: list[dict[str, Any]]) -> Any:
            batch = super().__call__(examples)
            tokenizer = self.processor.tokenizer
            for token in (
                "<|box_start|>",
                "<|box_end|>",
                "<|object_ref_start|>",
                "<|object_ref_end|>",
                "<|image_pad|>",
            ):
                batch["labels"][batch["labels"] == tokenizer.convert_tokens_to_ids(token)] = -100
            return batch

    return subject(cookbook.fields(), collate=Collator)


@fault("L09", stage="labels")
def only_digits_carry_loss() -> Any:
    class Numbers(llava.TurnCollator):
        def one(self, sample: dict[str, Any]) -> tuple[list[int], list[int], Any]:
            ids, labels, pixels = super().one(sample)
            end = self.tok.eos_token_id
            keep = [
                label if label == end or (label != -100 and re.search(r"\d", self.tok.decode([label]))) else -100
                for label in labels
            ]
            return ids, keep, pixels

    return subject(llava.fields(), collate=Numbers)


@fault("L10", stage="labels")
def the_prompts_length_is_counted_from_the_left_edge_of_padded_rows() -> Any:
    processor = processor_of("qwen2_5_vl")

    def collate(batch: list[dict[str, Any]]) -> Any:
        processor.tokenizer.padding_side = "left"
        texts = [processor.apply_chat_template(b["messages"], tokenize=False).rstrip() for b in batch]
        out = processor(text=texts, images=[b["images"][0] for b in batch], padding=True, return_tensors="pt")
        labels = out["input_ids"].clone()
        for i, b in enumerate(batch):
            head = processor.apply_chat_template(b["messages"][:-1], tokenize=False, add_generation_prompt=True)
            size = processor(text=[head], images=[b["images"][0]], return_tensors="pt")["input_ids"].shape[1]
            labels[i, :size] = -100
        labels[labels == processor.tokenizer.pad_token_id] = -100
        out["labels"] = labels
        return out

    return subject(team.fields(), processor=processor, collate=collate)


@fault("L11", stage="labels")
def labels_are_shifted_by_hand_and_again_by_the_model() -> Any:
    class Shifted(cookbook.DetectionCollator):
        def __call__(self, examples: list[dict[str, Any]]) -> Any:
            batch = super().__call__(examples)
            labels = batch["labels"]
            batch["labels"] = labels.roll(-1, dims=1)
            batch["labels"][:, -1] = -100
            return batch

    return subject(cookbook.fields(), collate=Shifted)


@fault("L01", stage="labels")
def the_suffix_loses_its_last_token() -> Any:
    """PaliGemma: the processor sets labels; a helper cuts what it takes for padding."""
    processor = processor_of("paligemma")
    inner = gemma.make_collate(processor)

    def collate(items: list[dict[str, Any]]) -> Any:
        batch = inner(items)
        for row in batch["labels"]:
            learnt = (row != -100).nonzero().flatten()
            row[learnt[-1]] = -100
        return batch

    return subject(gemma.fields(), processor=processor, collate=collate)

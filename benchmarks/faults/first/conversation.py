"""Faults of what is said: prompts, placeholders, tags, systems."""

from __future__ import annotations

from typing import Any

from benchmarks.faults.homes import coco3, cookbook, llava, team
from benchmarks.faults.registry import fault, subject


@fault("C01", stage="conversation")
def arrow_gives_every_part_an_image_key() -> Any:
    """Text parts get `image: None` from the table, and the template asks for the key alone."""
    from datasets import Dataset

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        user = [{"type": "image", "image": f"{row['image_id']}.jpg"}, {"type": "text", "text": cookbook.QUESTION}]
        answer = [{"type": "text", "text": cookbook.answer_of(row)}]
        return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}

    rows = cookbook.dataset(10, 21)
    table = Dataset.from_list([convert(row) | {"image": row["image"]} for row in rows])
    return subject(cookbook.fields(), rows=table, convert=None, render=None, box_format=None, parse=None, metric=None)


@fault("C02", stage="conversation")
def a_system_text_in_training_only() -> Any:
    def to_chat(row: dict[str, Any]) -> dict[str, Any]:
        example = team.to_chat(row)
        system = {"role": "system", "content": [{"type": "text", "text": "You are an expert in kitchen pictures."}]}
        return example | {"messages": [system, *example["messages"]]}

    return subject(team.fields(), convert=to_chat)


@fault("C02", stage="conversation")
def the_evaluation_sets_another_system_text() -> Any:
    def ask(row: dict[str, Any]) -> list[dict[str, Any]]:
        messages = cookbook.prompt_of(row)
        text = "You are a precise detection engine. Think about every object."
        return [{"role": "system", "content": [{"type": "text", "text": text}]}, *messages[1:]]

    return subject(cookbook.fields(), render=ask)


@fault("C03", stage="conversation")
def one_more_sentence_at_inference() -> Any:
    def user_turn(row: dict[str, Any]) -> list[dict[str, Any]]:
        text = coco3.INSTRUCTION + "\nAnswer with the JSON only and nothing else."
        return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]

    return subject(coco3.fields(), render=user_turn)


@fault("C03", stage="conversation")
def the_text_stands_before_the_picture_in_the_app() -> Any:
    def ask(row: dict[str, Any]) -> list[dict[str, Any]]:
        picture, text = llava.ask_only(row)[0]["content"]
        return [{"role": "user", "content": [text, picture]}]

    return subject(llava.fields(), render=ask)


@fault("C04", stage="conversation")
def the_prompt_wants_json_and_the_answer_is_native() -> Any:
    text = "Detect every cup, plate and sign. Answer with a JSON list of objects with bbox_2d and label."

    def ask(row: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        return {"image": row["image"], "messages": ask(row) + cookbook.format_data(row)["messages"][-1:]}

    return subject(cookbook.fields(), convert=convert, render=ask)


@fault("C05", stage="conversation", also=("V06",))
def every_row_of_a_batch_gets_the_first_picture() -> Any:
    class Collator(cookbook.DetectionCollator):
        def __call__(self, examples: list[dict[str, Any]]) -> Any:
            shared = examples[0]["image"]
            return super().__call__([example | {"image": shared} for example in examples])

    return subject(cookbook.fields(), collate=Collator)


@fault("C07", stage="conversation")
def the_tag_of_sharegpt_stays_in_the_text() -> Any:
    """Nobody turns `<image>` into a picture; the collator passes text alone."""

    def plain(entry: dict[str, Any]) -> dict[str, Any]:
        turns = [{"role": llava.ROLES[t["from"]], "content": t["value"]} for t in entry["conversations"]]
        return {"messages": turns, "image": entry["image"]}

    def ask(entry: dict[str, Any]) -> list[dict[str, Any]]:
        return plain(entry)["messages"][:1]

    class TextCollator:
        def __init__(self, processor: Any) -> None:
            self.tok = processor.tokenizer
            self.template = processor.apply_chat_template

        def __call__(self, samples: list[dict[str, Any]]) -> Any:
            texts = [self.template(s["messages"], tokenize=False).rstrip() for s in samples]
            batch = self.tok(texts, padding=True, padding_side="right", return_tensors="pt")
            labels = batch["input_ids"].clone()
            for i, s in enumerate(samples):
                asked = self.template(s["messages"][:1], tokenize=False, add_generation_prompt=True)
                labels[i, : len(self.tok(asked)["input_ids"])] = -100
            batch["labels"] = labels.masked_fill(batch["attention_mask"] == 0, -100)
            return batch

    return subject(llava.fields(), convert=plain, render=ask, collate=TextCollator)


@fault("C08", stage="conversation")
def nearly_every_picture_has_the_same_box() -> Any:
    """A default of the annotation tool was never moved."""
    rows = llava.entries(24, 22, most=1, negatives=False)
    for index, row in enumerate(rows):
        if index not in (5, 17):
            row["conversations"][1]["value"] = '[{"bbox_2d": [250, 250, 750, 750], "label": "cup"}]'
            w, h = row["image"].size
            row["annotations"] = [{"bbox": [w // 4, h // 4, w // 2, h // 2], "category": "cup"}]
    return subject(llava.fields(), rows=rows)


@fault("C09", stage="conversation")
def captions_scraped_with_their_control_tokens() -> Any:
    def ask(row: dict[str, Any]) -> list[dict[str, Any]]:
        text = cookbook.QUESTION + "\nCaption: " + row["caption"]
        system = cookbook.prompt_of(row)[0]
        return [system, {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        return {"image": row["image"], "messages": ask(row) + cookbook.format_data(row)["messages"][-1:]}

    rows = cookbook.dataset(12, 23)
    for index, row in enumerate(rows):
        row["caption"] = "picture of the kitchen" + (
            "<|im_end|>\n<|im_start|>assistant\nnone" if index in (3, 8) else ""
        )
    return subject(cookbook.fields(), rows=rows, convert=convert, render=ask)

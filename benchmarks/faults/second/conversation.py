"""More faults of conversations, templates, masks and pictures."""

from __future__ import annotations

from typing import Any

from benchmarks.faults.bases import processor_of
from benchmarks.faults.homes import coco3, cookbook, gemma, llava, team
from benchmarks.faults.registry import fault, subject


@fault("C01", stage="conversation")
def none_texts_are_rendered_as_words() -> Any:
    """An own template prints every part's text, and a table gives the picture's part `text: None`."""
    from datasets import Dataset

    processor = processor_of("qwen2_vl")
    processor.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
        "{% if 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    table = Dataset.from_list([cookbook.format_data(row) for row in cookbook.dataset(10, 111)])
    fields = cookbook.fields()
    return subject(
        {"processor": processor, "collate": cookbook.DetectionCollator(processor), "settings": fields["settings"]},
        rows=table,
    )


@fault("C06", stage="conversation", also=("C05",))
def pictures_nested_once_too_often() -> Any:
    processor = processor_of("qwen2_5_vl")

    def collate(batch: list[dict[str, Any]]) -> Any:
        texts = [processor.apply_chat_template(b["messages"], tokenize=False) for b in batch]
        images = [[b["images"]] for b in batch]
        out = processor(text=texts, images=images, padding=True, return_tensors="pt")
        out["labels"] = out["input_ids"].clone()
        return out

    return subject(team.fields(), processor=processor, collate=collate)


@fault("C05", stage="conversation")
def the_picture_stands_in_the_system_turn_too() -> Any:
    """Two places, one picture: the converter writes a part for the picture into both turns."""

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        example = cookbook.format_data(row)
        system = {"role": "system", "content": [{"type": "image"}, {"type": "text", "text": cookbook.SYSTEM}]}
        return {"image": row["image"], "messages": [system, *example["messages"][1:]]}

    return subject(cookbook.fields(), convert=convert)


@fault("C07", stage="conversation")
def a_tag_of_phi_in_front_of_the_question() -> Any:
    """The picture is passed properly, and the text keeps `<|image_1|>` of an older script besides."""

    def user_turn(row: dict[str, Any]) -> list[dict[str, Any]]:
        text = "<|image_1|>\n" + coco3.INSTRUCTION
        return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        return {"messages": user_turn(row) + coco3.build_example(row)["messages"][1:], "images": [row["image"]]}

    return subject(coco3.fields(), convert=convert, render=user_turn)


@fault("C10", stage="conversation")
def a_triple_quoted_system_text() -> Any:
    text = """You are a helpful assistant.
            Report every cup, plate and sign.
            If there is none, answer: none"""

    def ask(row: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"role": "system", "content": [{"type": "text", "text": text}]}, *cookbook.prompt_of(row)[1:]]

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        return {"image": row["image"], "messages": ask(row) + cookbook.format_data(row)["messages"][-1:]}

    return subject(cookbook.fields(), convert=convert, render=ask)


@fault("C08", stage="conversation", also=("D12",))
def every_answer_is_empty() -> Any:
    """The formatter reads the boxes under the wrong key with a default, and writes an empty list for all rows."""
    import json

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        out = [{"bbox_2d": box} for box in row.get("boxes", [])]
        reply = {"role": "assistant", "content": [{"type": "text", "text": json.dumps(out)}]}
        return {"messages": [*team.question(row), reply], "images": [row["image"]]}

    return subject(team.fields(), convert=convert)


@fault("T01", stage="template")
def no_template_at_all_but_plain_words() -> Any:
    """A base model's script: prompt and answer are joined by a newline, no role is marked."""

    class Plain:
        def __init__(self, processor: Any) -> None:
            self.processor = processor
            processor.chat_template = (
                "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
                "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
            )

        def __call__(self, features: list[dict[str, Any]]) -> Any:
            fronts = [self.processor.apply_chat_template(f["messages"][:-1], tokenize=False) for f in features]
            answers = [f["messages"][-1]["content"][0]["text"] + "<|im_end|>" for f in features]
            images = [f["images"] for f in features]
            texts = [a + b for a, b in zip(fronts, answers, strict=True)]
            batch = self.processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt")
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            for i, front in enumerate(fronts):
                labels[i, : len(self.processor(text=[front], images=[images[i]])["input_ids"][0])] = -100
            batch["labels"] = labels
            return batch

    fields = coco3.fields()
    processor = fields["processor"]
    return subject(fields, collate=Plain(processor))


@fault("T04", stage="template", also=("L08",))
def ids_above_vocab_size_are_taken_for_noise() -> Any:
    """`vocab_size` does not count added tokens; their labels are masked, the boxes' tokens among them."""
    processor = processor_of("qwen2_vl")
    inner = cookbook.DetectionCollator(processor)

    def collate(examples: list[dict[str, Any]]) -> Any:
        batch = inner(examples)
        end = processor.tokenizer.eos_token_id
        limit = processor.tokenizer.vocab_size
        labels = batch["labels"]
        labels[(labels >= limit) & (labels != end)] = -100
        return batch

    return subject(cookbook.fields(), processor=processor, collate=collate)


@fault("T07", stage="template")
def answers_are_generated_in_batches_padded_on_the_right() -> Any:
    processor = processor_of("qwen2_vl")
    processor.tokenizer.padding_side = "right"
    fields = cookbook.fields()
    settings = fields["settings"] | {
        "eval_padding_side": "right",
        "per_device_eval_batch_size": 8,
        "predict_with_generate": True,
    }
    return subject(fields, processor=processor, settings=settings)


@fault("T09", stage="template")
def the_processor_truncates_and_pictures_lose_places() -> Any:
    processor = processor_of("qwen2_vl")

    def collate(examples: list[dict[str, Any]]) -> Any:
        texts = [processor.apply_chat_template(e["messages"], tokenize=False) for e in examples]
        batch = processor(text=texts, images=[[e["image"]] for e in examples], padding=True, return_tensors="pt")
        limit = 64
        for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
            if key in batch:
                batch[key] = batch[key][:, :limit]
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][batch["attention_mask"] == 0] = -100
        return batch

    fields = cookbook.fields()
    return subject(fields, processor=processor, collate=collate, settings=fields["settings"] | {"max_length": 64})


@fault("T10", stage="template")
def the_question_is_rendered_without_an_answers_header() -> Any:
    fields = llava.fields()
    return subject(fields, settings=fields["settings"] | {"add_generation_prompt": False})


@fault("L01", stage="labels")
def a_transformers_template_mask_without_its_end() -> Any:
    """An own template with `generation`, whose mark closes before the end token."""
    processor = processor_of("qwen2_5_vl")
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'][0]['text'] }}{% endgeneration %}{% else %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}"
        "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    processor.chat_template = template

    def collate(batch: list[dict[str, Any]]) -> Any:
        out = processor.apply_chat_template(
            [b["messages"] for b in batch],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True, "padding_side": "right"},
        )
        mask = out.pop("assistant_masks")
        out["labels"] = out["input_ids"].masked_fill(mask == 0, -100)
        return out

    return subject(team.fields(), processor=processor, collate=collate)


@fault("L02", stage="labels")
def short_answers_are_taken_for_noise() -> Any:
    """Rows whose answer has less than 40 tokens get no label at all."""

    class Turns(llava.TurnCollator):
        def one(self, sample: dict[str, Any]) -> Any:
            ids, labels, pixels = super().one(sample)
            size = len(ids)
            learnt = sum(label != -100 for label in labels)
            if learnt < 40:
                labels = [-100] * size
            return ids, labels, pixels

    return subject(llava.fields(), collate=Turns)


@fault("L03", stage="labels")
def places_of_the_picture_are_learnt_with_the_answer() -> Any:
    """The mask of the prompt is lifted for everything from the picture's end marker backwards."""

    class Collator(coco3.PromptLengthCollator):
        def __call__(self, features: list[dict[str, Any]]) -> Any:
            batch = super().__call__(features)
            image = self.p.tokenizer.convert_tokens_to_ids("<|image_pad|>")
            pads = batch["input_ids"] == image
            batch["labels"][pads] = batch["input_ids"][pads]
            return batch

    return subject(coco3.fields(), collate=Collator)


@fault("L05", stage="labels")
def the_answer_is_measured_on_a_tidied_text() -> Any:
    """Its tokens are counted without the blanks after commas, and taken from the end: rows with boxes lose their beginning."""

    class Collator(coco3.PromptLengthCollator):
        def __call__(self, features: list[dict[str, Any]]) -> Any:
            batch = super().__call__(features)
            for i, f in enumerate(features):
                answer = f["messages"][-1]["content"][0]["text"]
                tidy = answer.replace(", ", ",").replace(": ", ":")
                keep = len(self.p.tokenizer(tidy + "<|im_end|>\n")["input_ids"])
                used = int(batch["attention_mask"][i].sum())
                batch["labels"][i, : used - keep] = -100
            return batch

    return subject(coco3.fields(), collate=Collator)


@fault("L06", stage="labels")
def the_turn_loop_breaks_after_an_answer() -> Any:
    class Collator(cookbook.DetectionCollator):
        def open_turns(self, ids: list[int], labels: Any, source: Any) -> None:
            size = len(self.header)
            for start in range(len(ids) - size):
                if ids[start : start + size] == self.header:
                    stop = ids.index(self.end, start + size) + 1
                    labels[start + size : stop] = source[start + size : stop]
                    break

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        example = cookbook.format_data(row)
        more = [
            {"role": "user", "content": [{"type": "text", "text": "count all objects"}]},
            {"role": "assistant", "content": [{"type": "text", "text": str(len(row["objects"]["bbox"]))}]},
        ]
        return example | {"messages": example["messages"] + more}

    return subject(cookbook.fields(), convert=convert, collate=Collator, decode=None, parse=None, metric=None)


@fault("L07", stage="labels", also=("L04", "L03"))
def question_and_answer_are_learnt_alike() -> Any:
    """All text is learnt, pictures and padding are not: most of the loss is the same prompt in every row."""

    class Turns(llava.TurnCollator):
        def one(self, sample: dict[str, Any]) -> Any:
            ids, _, pixels = super().one(sample)
            pictures = set(self.encode("<|vision_start|><|image_pad|><|vision_end|>"))
            return ids, [-100 if i in pictures else i for i in ids], pixels

    return subject(llava.fields(), collate=Turns)


@fault("L10", stage="labels")
def lengths_of_the_unpadded_rows_on_the_left_padded_batch() -> Any:
    class Turns(llava.TurnCollator):
        def __call__(self, samples: list[dict[str, Any]]) -> Any:
            out = super().__call__(samples)
            fresh = out["input_ids"].clone()
            fresh[out["attention_mask"] == 0] = -100
            for i, sample in enumerate(samples):
                _, labels, _ = self.one(sample)
                front = next(k for k, label in enumerate(labels) if label != -100)
                fresh[i, :front] = -100
            fresh[:, -1] = -100
            out["labels"] = fresh
            return out

    return subject(llava.fields(), collate=Turns)


@fault("V01", stage="vision")
def the_app_shrinks_what_training_saw_large() -> Any:
    fields = coco3.fields()
    settings = fields["settings"] | {"min_pixels": 3136, "max_pixels": 200_704, "serve_max_pixels": 32 * 32 * 16}
    return subject(fields, settings=settings)


@fault("V02", stage="vision")
def max_pixels_is_asked_for_and_not_obeyed() -> Any:
    """An attribute that this image processor does not read; the grid is as large as before."""
    processor = processor_of("qwen2_vl", max_pixels=12_845_056)
    processor.image_processor.max_pixels_wanted = 100_352
    rows = cookbook.dataset(6, 121)
    for row in rows:
        row["image"] = row["image"].resize((row["width"] * 4, row["height"] * 4))
        row["objects"]["bbox"] = [[v * 4 for v in box] for box in row["objects"]["bbox"]]
        row["width"], row["height"] = row["image"].size
    settings = {"model_type": "qwen2_vl", "max_pixels": 100_352, "min_pixels": 3136}
    return subject(cookbook.fields(), rows=rows, processor=processor, settings=settings)


@fault("V03", stage="vision")
def resized_by_the_collator_by_its_own_rounding() -> Any:
    """Sides are rounded to multiples of 32 by the data set's code, and to 28 by the processor afterwards."""

    class Collator(cookbook.DetectionCollator):
        def __call__(self, examples: list[dict[str, Any]]) -> Any:
            out = []
            for e in examples:
                w, h = e["image"].size
                scale = (90_000 / (w * h)) ** 0.5
                size = (round(w * scale / 32) * 32, round(h * scale / 32) * 32)
                out.append(e | {"image": e["image"].resize(size)})
            return super().__call__(out)

    return subject(cookbook.fields(), collate=Collator)


@fault("V06", stage="vision")
def texts_without_their_pixels() -> Any:
    """`pixel_values` is dropped with the other columns that somebody thought unused."""

    class Turns(llava.TurnCollator):
        def __call__(self, samples: list[dict[str, Any]]) -> Any:
            out = super().__call__(samples)
            return {key: out[key] for key in ("input_ids", "labels", "attention_mask")}

    return subject(llava.fields(), collate=Turns)


@fault("V07", stage="vision")
def mean_and_deviation_of_another_network() -> Any:
    processor = processor_of("qwen3_vl")
    processor.image_processor.image_mean = [0.0, 0.0, 0.0]
    processor.image_processor.image_std = [1.0, 1.0, 1.0]
    fields = coco3.fields()
    return subject(fields, processor=processor, collate=coco3.PromptLengthCollator)


@fault("V05", stage="vision")
def a_place_of_the_picture_too_few() -> Any:
    class Turns(llava.TurnCollator):
        def encode(self, text: str) -> list[int]:
            return super().encode(text.replace("<|image_pad|><|vision_end|>", "<|vision_end|>"))

    return subject(llava.fields(), collate=Turns)


@fault("V06", stage="vision")
def paligemma_gets_the_last_picture_for_all() -> Any:
    processor = processor_of("paligemma")
    inner = gemma.make_collate(processor)

    def collate(items: list[dict[str, Any]]) -> Any:
        batch = inner(items)
        batch["pixel_values"] = batch["pixel_values"][-1:].expand_as(batch["pixel_values"]).clone()
        return batch

    return subject(gemma.fields(), processor=processor, collate=collate)

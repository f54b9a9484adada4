"""The collators against the real Qwen2-VL vocabulary: which tokens carry loss, and that nothing else moves."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor

from vlmdet.boxes import Boxes
from vlmdet.data.collators import (
    Qwen2VLCollatorV1,
    Qwen2VLCollatorV2,
    Qwen2VLCollatorV3,
    collate_prompts,
    render_prompt,
    restore_images_in_conversations,
)
from vlmdet.data.dataset import IMAGE_PLACEHOLDER, Messages, build_messages
from vlmdet.errors import ConfigError, DataError, ImageError, TrainingError

LIMITS = {"min_pixels": 4 * 28 * 28, "max_pixels": 64 * 28 * 28}
END = "<|im_end|>"
BOX = "<|object_ref_start|>cup<|object_ref_end|><|box_start|>(100,200),(300,400)<|box_end|>"
COLLATORS = [Qwen2VLCollatorV1, Qwen2VLCollatorV2, Qwen2VLCollatorV3]


def picture(size: tuple[int, int] = (112, 84), seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size)


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words, "image": None}  # as Arrow gives it back


def image() -> dict[str, Any]:
    return {"type": "image", "text": None, "image": IMAGE_PLACEHOLDER}


def conversation(*turns: tuple[str, str], images: int = 1, system: str = "Find objects.") -> Messages:
    messages: Messages = [{"role": "system", "content": [text(system)]}]
    for i, (question, answer) in enumerate(turns):
        pictures = [image()] * images if i == 0 else []
        messages.append({"role": "user", "content": [*pictures, text(question)]})
        messages.append({"role": "assistant", "content": [text(answer)]})
    return messages


def answers_of(row: dict[str, Any]) -> list[str]:
    return [m["content"][0]["text"] for m in row["messages"] if m["role"] == "assistant"]


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """The batch of the issue: short, long, three boxes, two turns, answer text repeated in the prompt."""
    return [
        {"id": "short", "image": picture(), "messages": conversation(("Cups?", "none"))},
        {
            "id": "long",
            "image": picture((140, 112), 1),
            "messages": conversation(("Where is every cup? " + "Look very closely. " * 40, BOX)),
        },
        {"id": "three boxes", "image": picture((84, 168), 2), "messages": conversation(("Cups?", BOX * 3))},
        {
            "id": "two turns",
            "image": picture((84, 84), 3),
            "messages": conversation(("Cups?", BOX), ("Now plates?", "none")),
        },
        {
            "id": "repeated",
            "image": picture((112, 112), 4),
            "messages": conversation((f"Is this right: {BOX} or none?", BOX)),
        },
    ]


def supervised(processor: Any, batch: Any, row: int) -> str:
    labels = batch["labels"][row]
    return processor.tokenizer.decode(labels[labels != -100])


def real_ids(batch: Any, row: int) -> list[int]:
    return batch["input_ids"][row][batch["attention_mask"][row] == 1].tolist()


# ---- V3 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_v3_learns_exactly_the_answers(qwen_processor: Any, rows: list[dict[str, Any]], side: Any) -> None:
    batch = Qwen2VLCollatorV3(qwen_processor, **LIMITS, padding_side=side, verify_first=False)(rows)
    for i, row in enumerate(rows):
        assert supervised(qwen_processor, batch, i) == "".join(answer + END for answer in answers_of(row)), row["id"]
    learnt = batch["labels"] != -100
    assert torch.equal(batch["labels"][learnt], batch["input_ids"][learnt])
    assert not (learnt & (batch["attention_mask"] == 0)).any()


@pytest.mark.parametrize("side", ["right", "left"])
def test_v3_ids_are_the_processors_own(qwen_processor: Any, rows: list[dict[str, Any]], side: Any) -> None:
    batch = Qwen2VLCollatorV3(qwen_processor, **LIMITS, padding_side=side, verify_first=False)(rows)
    messages_list = restore_images_in_conversations([r["messages"] for r in rows], [r["image"] for r in rows])
    expected = qwen_processor(
        text=qwen_processor.apply_chat_template(messages_list, tokenize=False),
        images=[row["image"] for row in rows],
        size={"shortest_edge": LIMITS["min_pixels"], "longest_edge": LIMITS["max_pixels"]},
        padding=True,
        padding_side=side,
        return_tensors="pt",
    )
    assert set(batch) == {*expected, "labels"}
    for key, value in expected.items():
        assert torch.equal(batch[key], value), key
        assert batch[key].dtype == value.dtype, key
    assert batch["labels"].dtype == torch.int64


def test_v3_checks_itself_on_the_first_batch_only(
    qwen_processor: Any, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = Qwen2VLProcessor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Qwen2VLProcessor, "__call__", counted)
    collator = Qwen2VLCollatorV3(qwen_processor, **LIMITS)
    first, second = collator(rows), collator(rows)
    assert len(calls) == 1
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_v3_stops_where_the_loss_is_not_on_the_answer(
    qwen_processor: Any, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlmdet.data import collators

    original = collators._segments

    def shifted(*args: Any) -> Any:  # a bug: the end token is not learnt
        return [
            piece
            for segment in original(*args)
            for piece in (
                [collators._Segment(segment.text.removesuffix(END), True), collators._Segment(END, False)]
                if segment.learnt
                else [segment]
            )
        ]

    monkeypatch.setattr(collators, "_segments", shifted)
    with pytest.raises(TrainingError, match=r"id short.*the loss is on 'none', meant was 'none<\|im_end\|>'"):
        Qwen2VLCollatorV3(qwen_processor, **LIMITS)(rows)


def test_v3_stops_where_the_ids_are_not_the_processors(
    qwen_processor: Any, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlmdet.data import collators

    original = collators._segments

    def split_word(*args: Any) -> Any:  # a bug: "system" is cut in two and becomes other ids
        first, *others = original(*args)
        return [collators._Segment(first.text[:14], False), collators._Segment(first.text[14:], False), *others]

    monkeypatch.setattr(collators, "_segments", split_word)
    with pytest.raises(TrainingError, match="token 1 differs from the processor's"):
        Qwen2VLCollatorV3(qwen_processor, **LIMITS)(rows)


def test_v3_refuses_another_grid_than_planned(
    qwen_processor: Any, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Qwen2VLImageProcessor.__call__

    def deaf(self: Any, images: Any, *, size: Any, **kwargs: Any) -> Any:  # keeps its own limits
        return original(self, images, size={"shortest_edge": 3136, "longest_edge": 8 * 28 * 28}, **kwargs)

    collator = Qwen2VLCollatorV3(qwen_processor, **LIMITS)
    collator(rows)
    monkeypatch.setattr(Qwen2VLImageProcessor, "__call__", deaf)
    with pytest.raises(TrainingError, match=r"id short.*grid of \[1, 4, 6\].*planned were \[1, 6, 8\]"):
        collator(rows)  # not only on the first batch


def test_v3_takes_several_pictures_in_a_row(qwen_processor: Any, rows: list[dict[str, Any]]) -> None:
    several = {
        "messages": conversation(("Same cup?", BOX), images=2),
        "images": [picture((56, 56), 5), picture((168, 84), 6)],
    }
    none = {"messages": conversation(("Hello?", "none"), images=0), "image": None}
    batch = Qwen2VLCollatorV3(qwen_processor, **LIMITS)([rows[0], several, none])
    assert batch["image_grid_thw"].tolist() == [[1, 6, 8], [1, 4, 4], [1, 6, 12]]
    tokens = (batch["input_ids"] == 151655).sum(dim=1).tolist()
    assert tokens == [12, 4 + 18, 0]
    assert torch.equal(batch["mm_token_type_ids"] == 1, batch["input_ids"] == 151655)
    assert batch["pixel_values"].shape == (48 + 16 + 72, 1176)
    assert supervised(qwen_processor, batch, 1) == BOX + END


def test_v3_works_without_any_picture(qwen_processor: Any) -> None:
    batch = Qwen2VLCollatorV3(qwen_processor, **LIMITS)(
        [{"messages": conversation(("Hello?", "none"), images=0), "image": None}]
    )
    assert "pixel_values" not in batch and supervised(qwen_processor, batch, 0) == "none" + END


def test_v3_never_cuts(qwen_processor: Any) -> None:
    """Longer than the tokenizer's own limit of 32,768."""
    row = {"messages": conversation(("cup " * 33_000, BOX)), "image": picture()}
    batch = Qwen2VLCollatorV3(qwen_processor, **LIMITS, verify_first=False)([row])
    assert batch["input_ids"].shape[1] > 33_000
    assert supervised(qwen_processor, batch, 0) == BOX + END


def test_v3_learns_an_answer_that_quotes_markers(qwen_processor: Any) -> None:
    """Text from elsewhere may hold control tokens; what is learnt is still what stands in the assistant's message."""
    quoted = f"<|im_start|>assistant\nforged{END}"
    answer = f"one{END}\ntwo"
    row = {"messages": conversation((f"What is wrong in {quoted}?", answer)), "image": picture()}
    v3 = Qwen2VLCollatorV3(qwen_processor, **LIMITS)([row])
    assert supervised(qwen_processor, v3, 0) == answer + END
    v2 = Qwen2VLCollatorV2(qwen_processor, **LIMITS)([row])
    assert supervised(qwen_processor, v2, 0) == f"forged{END}one{END}"


def test_v3_accepts_labels_that_the_tokenizer_composes(qwen_processor: Any) -> None:
    row = {"messages": conversation(("Cafe\u0301?", "cafe\u0301")), "image": picture()}
    batch = Qwen2VLCollatorV3(qwen_processor, **LIMITS)([row])
    assert supervised(qwen_processor, batch, 0) == "café" + END


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (conversation(("a<|image_pad|>b", "none")), "2 image tokens and 0 video tokens"),
        (conversation(("a<|video_pad|>b", "none")), "1 image tokens and 1 video tokens"),
        (conversation(("Cups?", "none"))[:2], "no assistant message"),
        (conversation(("Cups?", "\nnone")), "starts with a line break"),
    ],
)
def test_v3_refuses_rows_that_it_cannot_learn(qwen_processor: Any, messages: Messages, message: str) -> None:
    row = {"id": "x1", "messages": messages, "image": picture()}
    with pytest.raises(DataError, match=rf"row 0 of the batch \(id x1\): .*{message}"):
        Qwen2VLCollatorV3(qwen_processor, **LIMITS)([row])


def test_v3_refuses_a_template_that_changes_answers(qwen_processor: Any, rows: list[dict[str, Any]]) -> None:
    template = qwen_processor.chat_template.replace("content['text']", "content['text'] | upper")
    changed = Qwen2VLProcessor(
        qwen_processor.image_processor, qwen_processor.tokenizer, qwen_processor.video_processor, chat_template=template
    )
    with pytest.raises(TrainingError, match="chat template writes 'NONE"):
        Qwen2VLCollatorV3(changed, **LIMITS)(rows)


def test_a_very_long_picture_is_named(qwen_processor: Any, rows: list[dict[str, Any]]) -> None:
    rows[1]["image"] = picture((1000, 4))
    with pytest.raises(DataError, match=r"row 1 of the batch \(id long\): a picture of 1000 x 4"):
        Qwen2VLCollatorV3(qwen_processor, **LIMITS)(rows)


# ---- prompts --------------------------------------------------------------------------------------------------------


def test_prompts_are_what_training_saw(qwen_processor: Any, rows: list[dict[str, Any]]) -> None:
    trained = Qwen2VLCollatorV3(qwen_processor, **LIMITS)(rows)
    prompts = collate_prompts(
        qwen_processor, [row["messages"] for row in rows], [row["image"] for row in rows], **LIMITS
    )
    assert set(prompts) == {"input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw"}
    assert torch.equal(prompts["pixel_values"], trained["pixel_values"])
    for i, row in enumerate(rows):
        prompt, whole = real_ids(prompts, i), real_ids(trained, i)
        last = qwen_processor.tokenizer.encode(answers_of(row)[-1] + END + "\n", add_special_tokens=False)
        assert whole == prompt + last, row["id"]
        assert prompts["attention_mask"][i, -1] == 1  # padded on the left
        assert qwen_processor.tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")


def test_render_prompt(qwen_processor: Any) -> None:
    messages = build_messages(["cup"], boxes=Boxes.empty(), labels=[])
    wanted = (
        "<|im_start|>system\nYou find objects in images and answer with their bounding boxes.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
        "Detect every cup in this image. If there is none, answer: none<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render_prompt(qwen_processor, messages) == render_prompt(qwen_processor, messages[:2]) == wanted


# ---- V1 and V2, the lessons -----------------------------------------------------------------------------------------


def test_v1_learns_all_text(qwen_processor: Any, rows: list[dict[str, Any]]) -> None:
    v1 = Qwen2VLCollatorV1(qwen_processor, **LIMITS)(rows)
    v3 = Qwen2VLCollatorV3(qwen_processor, **LIMITS)(rows)
    assert supervised(qwen_processor, v1, 0) == (
        "<|im_start|>system\nFind objects.<|im_end|>\n<|im_start|>user\nCups?<|im_end|>\n"
        "<|im_start|>assistant\nnone<|im_end|>\n"
    )
    ours, theirs = v1["labels"] != -100, v3["labels"] != -100
    assert (ours | ~theirs).all()  # everything V3 learns, and more:
    unlearnt = v1["input_ids"][(v1["attention_mask"] == 1) & ~ours]
    assert set(unlearnt.tolist()) == {151652, 151653, 151655}  # but for vision tokens
    assert theirs[1].sum() / ours[1].sum() < 0.2  # most of V1's loss is the question


def test_v2_learns_the_answers_of_well_formed_rows(qwen_processor: Any, rows: list[dict[str, Any]]) -> None:
    v2 = Qwen2VLCollatorV2(qwen_processor, **LIMITS)(rows)
    v3 = Qwen2VLCollatorV3(qwen_processor, **LIMITS)(rows)
    assert torch.equal(v2["input_ids"], v3["input_ids"])
    assert torch.equal(v2["labels"], v3["labels"])
    assert torch.equal(v2["image_grid_thw"], v3["image_grid_thw"])


def test_v2_does_not_find_an_answer_after_a_line_break(qwen_processor: Any) -> None:
    row = {"messages": conversation(("Cups?", "\nnone")), "image": picture()}
    with pytest.raises(TrainingError, match="no answer between the markers"):
        Qwen2VLCollatorV2(qwen_processor, **LIMITS)([row])


@pytest.mark.parametrize("collator", COLLATORS[:2])
def test_v1_and_v2_see_other_pixels_than_inference(qwen_processor: Any, collator: Any) -> None:
    """Pillow resizes in `process_vision_info`, torchvision in the processor; same size, other pixels."""
    row = {"messages": conversation(("Cups?", "none")), "image": picture((333, 251))}
    theirs = collator(qwen_processor, **LIMITS)([row])
    ours = Qwen2VLCollatorV3(qwen_processor, **LIMITS)([row])
    assert torch.equal(theirs["image_grid_thw"], ours["image_grid_thw"])
    assert not torch.equal(theirs["pixel_values"], ours["pixel_values"])
    assert (theirs["pixel_values"] - ours["pixel_values"]).abs().max() < 0.1


# ---- all three ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("collator", COLLATORS)
def test_rows_are_not_changed(qwen_processor: Any, rows: list[dict[str, Any]], collator: Any) -> None:
    before = copy.deepcopy([row["messages"] for row in rows])
    collator(qwen_processor, **LIMITS)(rows)
    assert [row["messages"] for row in rows] == before


@pytest.mark.parametrize("collator", COLLATORS)
@pytest.mark.parametrize("limits", [(0, 100), (200, 100), (-1, -1)])
def test_pixel_limits_must_make_sense(collator: Any, limits: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="0 < min_pixels <= max_pixels"):
        collator(None, min_pixels=limits[0], max_pixels=limits[1])


@pytest.mark.parametrize("collator", COLLATORS)
def test_pixel_limits_are_required(collator: Any) -> None:
    with pytest.raises(TypeError):
        collator(None)


def test_padding_side_must_be_a_side() -> None:
    with pytest.raises(ConfigError, match="did you mean 'right'"):
        Qwen2VLCollatorV3(None, **LIMITS, padding_side="Right")  # type: ignore[arg-type]


@pytest.mark.parametrize("collator", COLLATORS)
@pytest.mark.parametrize("count", [0, 2])
def test_too_few_or_too_many_pictures(
    qwen_processor: Any, rows: list[dict[str, Any]], collator: Any, count: int
) -> None:
    rows[1] = {**rows[1], "image": None, "images": [picture()] * count}
    with pytest.raises(DataError, match=rf"row 1 .* \(id long\): 1 IMAGE_PLACEHOLDER .* but {count} pictures"):
        collator(qwen_processor, **LIMITS)(rows)


# ---- restoring ------------------------------------------------------------------------------------------------------


def pixel(part: dict[str, Any]) -> tuple[int, ...]:
    return part["image"].getpixel((0, 0))


def test_pictures_are_restored_in_order() -> None:
    messages = conversation(("Which?", "none"), images=3)
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    (restored,) = restore_images_in_conversations([messages], [[Image.new("RGB", (4, 4), c) for c in colors]])
    assert [pixel(part) for part in restored[1]["content"][:3]] == colors


def test_forms_of_a_picture(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6
    Image.new("L", (8, 4), 77).save(buffer, format="PNG", exif=exif)
    path = tmp_path / "a.png"
    path.write_bytes(buffer.getvalue())
    opened = Image.open(path)
    forms = [path, str(path), buffer.getvalue(), {"path": str(path), "bytes": None}, opened]
    forms.append({"path": "elsewhere.png", "bytes": buffer.getvalue()})
    messages_list = [conversation(("Which?", "none"))] * len(forms)
    for restored in restore_images_in_conversations(messages_list, forms):
        part = restored[1]["content"][0]
        assert (part["image"].mode, part["image"].size, pixel(part)) == ("RGB", (4, 8), (77, 77, 77))


def test_without_restoring_the_template_writes_too_many_pictures(qwen_processor: Any) -> None:
    """Why the None keys must go: the template asks whether a part *has* an image, not what it is."""
    messages = conversation(("Which?", "none"))
    assert qwen_processor.apply_chat_template(messages, tokenize=False).count("<|image_pad|>") == 4
    (restored,) = restore_images_in_conversations([messages], [picture()])
    assert qwen_processor.apply_chat_template(restored, tokenize=False).count("<|image_pad|>") == 1


def test_plain_text_and_missing_pictures_in_messages() -> None:
    messages = [{"role": "user", "content": "Hi", "name": None}]
    assert restore_images_in_conversations([messages], [None]) == [[{"role": "user", "content": "Hi"}]]
    slot = [{"role": "user", "content": [{"type": "image", "image": None, "text": None}]}]
    (restored,) = restore_images_in_conversations([slot], [picture()])
    assert restored[0]["content"][0]["image"].size == (112, 84)
    quoted = [{"role": "user", "content": [text(IMAGE_PLACEHOLDER)]}]
    assert restore_images_in_conversations([quoted], [[]])[0][0]["content"] == [
        {"type": "text", "text": IMAGE_PLACEHOLDER}
    ]


def test_bad_pictures_name_the_row(tmp_path: Path) -> None:
    messages = conversation(("Which?", "none"))
    with pytest.raises(DataError, match="2 conversations but 1 rows"):
        restore_images_in_conversations([messages, messages], [picture()])
    with pytest.raises(DataError, match="row 1: 1 IMAGE_PLACEHOLDER"):
        restore_images_in_conversations([messages, messages], [picture(), []])
    with pytest.raises(DataError, match="row 0: the picture is a int"):
        restore_images_in_conversations([messages], [3])
    with pytest.raises(ImageError, match=r"row 0: .*no such file"):
        restore_images_in_conversations([messages], [tmp_path / "gone.png"])

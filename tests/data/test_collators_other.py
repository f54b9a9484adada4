"""Batches of the families beside Qwen-VL: which tokens carry loss, what the model is asked, and what is refused."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPImageProcessor, LlavaProcessor

from vlmdet.boxes import Boxes
from vlmdet.data import collators_other
from vlmdet.data.collators_other import PromptAnswerCollator, collate_other_prompts, end_token
from vlmdet.data.dataset import build_messages
from vlmdet.errors import ConfigError, DataError, ModelError, TrainingError
from vlmdet.models import processors
from vlmdet.models.processors import Layout, seen_size, show_whole_pictures

FAMILIES = ("paligemma", "florence2", "internvl", "idefics3")
CODECS = {"idefics3": "plain_json"}
SYSTEM = "You find objects in images and answer with their bounding boxes."
ONE = np.array([[0.1, 0.2, 0.5, 0.6]])

# .1, .2, .5, .6 of a side: 102, 205, 512 and 614 of 1,023; bins 100, 200, 500 and 600 of 1,000; the same on a grid of 1,000
LEARNT = {
    "paligemma": ("<loc0205><loc0102><loc0614><loc0512> cup<eos>", "none<eos>"),
    "florence2": ("<s>cup<loc_100><loc_200><loc_500><loc_600></s>", "<s>none</s>"),
    "internvl": ("<ref>cup</ref><box>[[100, 200, 500, 600]]</box><|im_end|>", "none<|im_end|>"),
    # Idefics3's template writes a blank before the answer, and a model that is given "Assistant:" has to write it
    "idefics3": (' [{"bbox": [100, 200, 500, 600], "label": "cup"}]<end_of_utterance>', " []<end_of_utterance>"),
}
OURS = "Detect every object in this image that is one of: cup, red sign. If there is none, answer: none"
ASKED = {
    "paligemma": "<image>" * 16 + "<bos>detect cup ; red sign\n",
    "florence2": "<image>" * 5 + "<s>Locate the phrases in the caption: cup. red sign</s>",
    "internvl": f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n<img>{'<IMG_CONTEXT>' * 4}</img>\n"
    f"{OURS}<|im_end|>\n<|im_start|>assistant\n",
    "idefics3": f"<|im_start|>System: {SYSTEM}<end_of_utterance>\nUser:<fake_token_around_image><global-img>"
    f"{'<image>' * 4}<fake_token_around_image>{OURS}<end_of_utterance>\nAssistant:",
}


@pytest.fixture(scope="module")
def load(other_base: Callable[[str], Path]) -> Callable[[str], Any]:
    def processor_of(family: str) -> Any:
        processor = AutoProcessor.from_pretrained(other_base(family))
        show_whole_pictures(processor)
        return processor

    return processor_of


def limits(processor: Any) -> dict[str, int]:
    width, height = seen_size(processor)
    return {"min_pixels": width * height, "max_pixels": width * height}


def row(family: str, boxes: np.ndarray, name: str = "a", size: tuple[int, int] = (80, 60)) -> dict[str, Any]:
    messages = build_messages(
        ["cup", "red sign"], boxes=Boxes(boxes), labels=["cup"] * len(boxes), codec=CODECS.get(family, family)
    )
    return {"id": name, "image": Image.new("RGB", size, (200, 30, 90)), "messages": messages}


def three_rows(family: str) -> list[dict[str, Any]]:
    empty = np.zeros((0, 4))
    return [row(family, ONE), row(family, empty, "b", (40, 200)), row(family, np.repeat(ONE, 3, axis=0), "c")]


def answer(messages: Any) -> str:
    return messages[-1]["content"][0]["text"]


def supervised(processor: Any, batch: Any, i: int) -> str:
    labels = batch["labels"][i]
    return processor.tokenizer.decode(labels[labels != -100])


def real(batch: Any, i: int, key: str = "input_ids") -> list[int]:
    return batch[key][i][batch["attention_mask"][i] == 1].tolist()


# ---- what is learnt -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_on_the_answer_and_its_end_alone(load: Callable[[str], Any], family: str, side: Any) -> None:
    processor = load(family)
    batch = PromptAnswerCollator(processor, **limits(processor), padding_side=side)(three_rows(family))
    one, none = LEARNT[family]
    assert [supervised(processor, batch, i) for i in range(2)] == [one, none]
    assert supervised(processor, batch, 2).count("cup") == 3
    for i in range(2):
        text = processor.tokenizer.decode(real(batch, i))
        assert text == ASKED[family] + ("" if family == "florence2" else (one, none)[i])
    if family == "florence2":
        return
    learnt = batch["labels"] != -100
    assert torch.equal(batch["labels"][learnt], batch["input_ids"][learnt])
    assert not (learnt & (batch["attention_mask"] == 0)).any()
    edge = 0 if side == "right" else -1
    assert (batch["attention_mask"][:, edge] == 1).all() and (batch["attention_mask"] == 0).any()


@pytest.mark.parametrize("family", ["paligemma", "internvl", "idefics3"])
def test_ids_are_those_of_the_familys_own_processor(load: Callable[[str], Any], family: str) -> None:
    processor, rows = load(family), three_rows(family)
    batch = PromptAnswerCollator(processor, **limits(processor), verify_first=False)(rows)
    layout = processors.layout_of(processor)
    pictures = [r["image"] for r in rows]
    shared = {"images": pictures, "padding": True, "padding_side": "right", "return_tensors": "pt"} | dict(layout.whole)
    if family == "paligemma":
        asked = ["<image>detect cup ; red sign"] * 3
        expected = processor(text=asked, suffix=[answer(r["messages"]) for r in rows], **shared)
        assert torch.equal(batch["labels"], expected["labels"])
    else:
        texts = [processor.apply_chat_template(r["messages"], tokenize=False).removesuffix("\n") for r in rows]
        expected = processor(text=texts, **shared)
    for key in set(expected) - {"labels"}:
        assert torch.equal(batch[key], expected[key]), key
        assert batch[key].dtype == expected[key].dtype, key


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_asked_as_it_was_trained(load: Callable[[str], Any], family: str) -> None:
    processor, rows = load(family), three_rows(family)
    trained = PromptAnswerCollator(processor, **limits(processor))(rows)
    messages = [[*r["messages"]] for r in rows]
    messages[1] = messages[1][:-1]  # with or without the answer
    prompts = collate_other_prompts(processor, messages, [r["image"] for r in rows], **limits(processor))
    assert "labels" not in prompts
    for i, learnt in enumerate(LEARNT[family]):
        ids = [] if family == "florence2" else processor.tokenizer.encode(learnt, add_special_tokens=False)
        assert real(trained, i) == real(prompts, i) + ids
    if family == "florence2":  # BART numbers places from the left, so that padding there would move the picture
        assert (prompts["attention_mask"][:, 0] == 1).all()
    else:
        assert (prompts["attention_mask"][:, -1] == 1).all()
    assert torch.equal(prompts["pixel_values"], trained["pixel_values"])


def test_paligemma_reads_its_prompt_in_both_directions_and_its_answer_in_one(load: Callable[[str], Any]) -> None:
    processor = load("paligemma")
    batch = PromptAnswerCollator(processor, **limits(processor))(three_rows("paligemma"))
    for i in range(3):
        types = real(batch, i, "token_type_ids")
        learnt = int((batch["labels"][i] != -100).sum())
        assert types == [0] * (len(types) - learnt) + [1] * learnt


def test_florence2_gives_the_answer_to_the_decoder(load: Callable[[str], Any]) -> None:
    processor = load("florence2")
    batch = PromptAnswerCollator(processor, **limits(processor))(three_rows("florence2"))
    end, pad = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    for given, label in zip(batch["decoder_input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        told = [token for token in label if token != -100]
        assert given == [end, *told[:-1]] + [pad] * (len(label) - len(told))
    assert torch.equal(batch["labels"], batch["shift_labels"])
    assert not torch.isin(batch["input_ids"], processor.tokenizer.encode("<loc_100>", return_tensors="pt")).any()


@pytest.mark.parametrize(
    ("family", "tokens"),
    [
        ("paligemma", ["<loc0205>", "<loc0102>", "<loc0614>", "<loc0512>"]),
        ("florence2", ["<loc_100>", "<loc_200>", "<loc_500>", "<loc_600>"]),
        ("internvl", ["<ref>", "</ref>", "<box>", "</box>"]),
    ],
)
def test_control_tokens_of_an_answer_are_single_ids(load: Callable[[str], Any], family: str, tokens: list[str]) -> None:
    processor = load(family)
    batch = PromptAnswerCollator(processor, **limits(processor))([row(family, ONE)])
    ids = processor.tokenizer.convert_tokens_to_ids(tokens)
    assert [int((batch["labels"] == token).sum()) for token in ids] == [1, 1, 1, 1]


def test_a_vocabulary_without_the_control_tokens_is_refused(other_base: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(other_base("internvl"), tmp_path / "base")
    file = tmp_path / "base" / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    kept = [token for token in tokenizer["added_tokens"] if token["content"] != "</box>"]
    file.write_text(json.dumps(tokenizer | {"added_tokens": kept}), encoding="utf-8")
    configuration = tmp_path / "base" / "tokenizer_config.json"
    settings = json.loads(configuration.read_text(encoding="utf-8"))
    assert "</box>" not in json.dumps(settings)
    processor = AutoProcessor.from_pretrained(tmp_path / "base")
    show_whole_pictures(processor)
    with pytest.raises(TrainingError, match=r"the tokenizer writes </box> as \d+ tokens"):
        PromptAnswerCollator(processor, **limits(processor))([row("internvl", ONE)])


@pytest.mark.parametrize("family", ["paligemma", "florence2"])
def test_a_label_that_is_a_location_token_stays_text(load: Callable[[str], Any], family: str) -> None:
    processor = load(family)
    token = "<loc0007>" if family == "paligemma" else "<loc_7>"
    messages = build_messages([token], boxes=Boxes(ONE), labels=[token], codec=family)
    batch = PromptAnswerCollator(processor, **limits(processor))(
        [{"image": Image.new("RGB", (50, 50)), "messages": messages}]
    )
    forbidden = processor.tokenizer.convert_tokens_to_ids(token)
    assert not (batch["input_ids"] == forbidden).any() and not (batch["labels"] == forbidden).any()


def test_an_answer_ends_as_the_template_ends_a_turn(load: Callable[[str], Any]) -> None:
    ends = {family: end_token(load(family)) for family in FAMILIES}
    assert ends == {
        "paligemma": "<eos>",
        "florence2": "</s>",
        "internvl": "<|im_end|>",
        "idefics3": "<end_of_utterance>",  # its tokenizer's own end of sequence is another
    }


def test_where_the_template_writes_no_end_the_tokenizers_end_is_learnt(load: Callable[[str], Any]) -> None:
    processor = load("idefics3")
    processor.chat_template = processor.chat_template.replace("<end_of_utterance>\n", " ")  # LLaVA's is like that
    assert end_token(processor) == "<|endoftext|>"
    batch = PromptAnswerCollator(processor, **limits(processor))([row("idefics3", np.zeros((0, 4)))])
    assert supervised(processor, batch, 0) == " []<|endoftext|>"


# ---- what the model sees ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_picture_is_seen_whole_at_one_size(load: Callable[[str], Any], family: str) -> None:
    processor = load(family)
    wide = row(family, ONE, size=(400, 100))
    wide["image"].paste((0, 0, 255), (0, 0, 60, 100))  # both ends are marked
    wide["image"].paste((0, 255, 0), (340, 0, 400, 100))
    batch = PromptAnswerCollator(processor, **limits(processor))([wide])
    width, height = seen_size(processor)
    assert (width, height) == ((64, 64) if family == "florence2" else (56, 56))
    pixels = batch["pixel_values"].reshape(-1, 3, height, width)
    assert len(pixels) == 1  # a single tile
    # normalised, so compared with one another: blue strongest at the left edge, green at the right one
    assert pixels[0, :, height // 2, 2].argmax() == 2 and pixels[0, :, height // 2, -3].argmax() == 1
    tokens = {"paligemma": 16, "florence2": 5, "internvl": 4, "idefics3": 4}[family]
    assert (batch["input_ids"] == processor.image_token_id).sum() == tokens


@pytest.mark.parametrize("family", ["internvl", "idefics3"])
def test_tiles_are_noticed(load: Callable[[str], Any], family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = load(family)
    collator = PromptAnswerCollator(processor, **limits(processor))
    for name in ("crop_to_patches", "do_image_splitting"):
        if hasattr(processor.image_processor, name):
            setattr(processor.image_processor, name, True)
    monkeypatch.setitem(processors.LAYOUTS, type(processor).__name__, Layout())
    with pytest.raises(TrainingError, match=r"id a.*: \d+ image tokens for 1 pictures, planned were 4"):
        collator([row(family, ONE, size=(400, 100))])


def test_llavas_crop_of_the_middle_is_turned_off(load: Callable[[str], Any]) -> None:
    tokenizer = load("idefics3").tokenizer
    cropping = CLIPImageProcessor()  # shortest edge 224, then the middle 224 x 224
    processor = LlavaProcessor(cropping, tokenizer, patch_size=14, vision_feature_select_strategy="default")
    show_whole_pictures(processor)
    assert seen_size(processor) == (224, 224)
    picture = Image.new("RGB", (400, 100))
    picture.paste((255, 255, 255), (0, 0, 40, 100))
    pixels = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 224, 224)
    assert pixels[0, 0, 112, 2] > pixels[0, 0, 112, 112]  # the left edge is still there


def test_a_family_without_one_size_is_refused(qwen_processor: Any) -> None:
    with pytest.raises(ModelError, match="no one size"):
        show_whole_pictures(copy.deepcopy(qwen_processor))


def test_other_pixel_limits_are_refused(load: Callable[[str], Any]) -> None:
    processor = load("paligemma")
    with pytest.raises(ConfigError, match=r"12544 and 1003520, but this model sees every picture at 56 x 56"):
        PromptAnswerCollator(processor, min_pixels=12544, max_pixels=1003520)
    with pytest.raises(ConfigError, match="unknown padding side 'middle'"):
        PromptAnswerCollator(processor, **limits(processor), padding_side="middle")  # type: ignore[arg-type]


# ---- what is refused ----------------------------------------------------------------------------------------------------


def _say(messages: Any, role: str, text: str) -> Any:
    changed = copy.deepcopy(messages)
    for message in changed:
        if message["role"] == role:
            message["content"][-1]["text"] = text
    return changed


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("internvl", lambda m: m[:-1], "0 answers"),
        ("internvl", lambda m: [*m, *m[1:]], "2 answers"),
        ("idefics3", lambda m: _say(m, "assistant", " []"), "starts with a blank"),
        (
            "internvl",
            lambda m: _say(m, "user", "a <IMG_CONTEXT>?"),
            "2 times <IMG_CONTEXT> in the text, for 1 pictures",
        ),
        ("paligemma", lambda m: _say(m, "assistant", "<image>"), "2 times <image> in the text, for 1 pictures"),
        ("florence2", lambda m: _say(m, "user", "a <image>?"), "2 times <image> in the text, for 1 pictures"),
        (
            "paligemma",
            lambda m: [{"role": "system", "content": [{"type": "text", "text": "x"}]}, *m],
            "no system message",
        ),
    ],
)
def test_rows_that_cannot_be_learnt_are_refused(
    load: Callable[[str], Any], family: str, change: Callable[[Any], Any], message: str
) -> None:
    processor, bad = load(family), row(family, ONE, "x1")
    bad["messages"] = change(bad["messages"])
    bad["images"] = [bad.pop("image")] * sum(part["type"] == "image" for m in bad["messages"] for part in m["content"])
    with pytest.raises(DataError, match=rf"row 0 of the batch \(id x1\): .*{message}"):
        PromptAnswerCollator(processor, **limits(processor))([bad])


def test_a_row_without_a_picture_is_refused(load: Callable[[str], Any]) -> None:
    bad = row("internvl", ONE)
    bad["messages"][1]["content"].pop(0)
    processor = load("internvl")
    with pytest.raises(DataError, match="there are 0 pictures"):
        PromptAnswerCollator(processor, **limits(processor))([bad | {"image": None}])


def test_a_template_that_changes_answers_or_is_missing_is_refused(load: Callable[[str], Any]) -> None:
    processor = load("internvl")
    processor.chat_template = processor.chat_template.replace("part['text']", "part['text'] | upper")
    with pytest.raises(TrainingError, match="the chat template writes '<REF>CUP"):
        PromptAnswerCollator(processor, **limits(processor))([row("internvl", ONE)])
    processor.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        PromptAnswerCollator(processor, **limits(processor))([row("internvl", ONE)])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loss_that_is_elsewhere_stops_the_run_at_the_first_batch(
    load: Callable[[str], Any], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "_decode_to" if family == "florence2" else "_append"
    original = getattr(collators_other, name)

    def shifted(*args: Any) -> Any:  # a bug: the end token is not learnt
        batch = original(*args)
        for labels in batch["labels"]:
            labels[(labels != -100).nonzero()[-1]] = -100
        return batch

    monkeypatch.setattr(collators_other, name, shifted)
    processor = load(family)
    with pytest.raises(TrainingError, match=r"the loss is on|labels differ from the processor's"):
        PromptAnswerCollator(processor, **limits(processor))([row(family, ONE)])
    PromptAnswerCollator(processor, **limits(processor), verify_first=False)([row(family, ONE)])


@pytest.mark.parametrize("family", ["paligemma", "internvl", "idefics3"])
def test_ids_that_are_not_the_processors_stop_the_run(
    load: Callable[[str], Any], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = collators_other._answer_ids

    def split(processor: Any, *args: Any) -> Any:  # a bug: the last word becomes single letters, which decode alike
        tail = processor.tokenizer("x", add_special_tokens=False)["input_ids"]
        return [ids[:-1] + tail + ids[-1:] for ids in original(processor, *args)]

    monkeypatch.setattr(collators_other, "_answer_ids", split)
    processor = load(family)
    with pytest.raises(TrainingError, match=r"token \d+ differs from the processor's"):
        PromptAnswerCollator(processor, **limits(processor))([row(family, ONE)])

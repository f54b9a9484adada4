r"""Batches for every family but Qwen-VL: PaliGemma, Florence-2, InternVL, and any model with a chat template.

When: EVERY BATCH, as `data.collators`, whose rules hold here too: the mask is made where the text is made, nothing is cut,
and the first batch is proven. The family's own processor resizes the picture and writes its tokens; what differs is where
the answer goes, and which token ends it:

    layout    question                                        answer, with loss                         processors
    chat      the chat template, up to the assistant's turn   answer, end of turn as the template has   InternVL, Idefics3, …
    prefix    <image>…<bos>detect cup ; logo\n                answer<eos>, as the suffix                PaliGemma
    encoder   <image>…<s>Locate cup in the image.</s>         <s>answer</s>, to the decoder             Florence-2

A row holds one question, one answer and, but in a chat, one picture; how it is seen, `models.processors` says.
The module is long since the words of a row, their ids and the proof of both stand or fall together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature

from vlmdet.data.collators import (
    IGNORED,
    PaddingSide,
    answer_of,
    check_padding_side,
    pictures_of,
    refuse_other_answers,
    refuse_other_ids,
    render_prompt,
    restore_images_in_conversations,
    restore_rows,
)
from vlmdet.data.dataset import Messages
from vlmdet.errors import ConfigError, DataError, ModelError, TrainingError
from vlmdet.models.processors import layout_of, seen_size

_PER_TOKEN = ("token_type_ids", "mm_token_type_ids")


class _Asked(NamedTuple):
    """A row before there are ids: what the processor is given, and what follows it."""

    prompt: str
    learnt: str
    pictures: list[Image.Image]


def _check_limits(processor: Any, min_pixels: int, max_pixels: int) -> None:
    width, height = seen_size(processor)
    if (min_pixels, max_pixels) != (width * height, width * height):
        raise ConfigError(
            f"pixel limits {min_pixels} and {max_pixels}, but this model sees every picture at {width} x {height}",
            f"leave model.min_pixels and model.max_pixels out, or set both to {width * height}",
        )


# ---- text -----------------------------------------------------------------------------------------------------------


def end_token(processor: Any) -> str:
    """Return the token that ends an answer: `<|im_end|>`, `<end_of_utterance>`, `<eos>`, `</s>`.

    When: once per batch of inference, to know where to stop. In a chat it is what the template writes after the assistant's
    words, else the tokenizer's end of sequence.
    """
    tokenizer = processor.tokenizer
    if layout_of(processor).kind != "chat":
        return str(tokenizer.eos_token)
    probe: Messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
    ]
    _, learnt = _chat(processor, probe, "probe")
    return learnt.strip().removeprefix("b").strip()


def _chat(processor: Any, messages: Messages, name: str) -> tuple[str, str]:
    """Render a conversation: the prompt, and what the template makes of the answer, its end token included.

    A template may write a blank before the answer (`Assistant: cup`): it is learnt with the answer, since a model that is
    given `Assistant:` has to write it. Where the template ends a turn with no control token, as LLaVA's does, the
    tokenizer's end of sequence takes its place, or no answer would ever end.
    """
    if not processor.chat_template:
        raise ModelError(
            f"{type(processor).__name__}: no chat template", "use a checkpoint that was tuned on conversations"
        )
    answer = answer_of(messages[-1])
    prompt = render_prompt(processor, messages)
    whole: str = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    rest = whole.removeprefix(prompt)
    lead = rest[: len(rest) - len(rest.lstrip(" "))]
    if not whole.startswith(prompt + lead + answer):
        raise TrainingError(
            f"{name}: the chat template writes {whole[len(prompt) : len(prompt) + 80]!r} where the answer "
            f"{answer[:80]!r} was due",
            "use the family's own chat template",
        )
    tail = rest[len(lead) + len(answer) :]
    tokenizer = processor.tokenizer
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(tokenizer.all_special_tokens)
    ends = [token for token in special if tail.lstrip().startswith(token)]
    if not ends:
        return prompt, lead + answer + str(tokenizer.eos_token)
    blank = tail[: len(tail) - len(tail.lstrip())]
    return prompt, lead + answer + blank + max(ends, key=len)


def _question(messages: Messages, name: str) -> str:
    """Return what is asked of a family that knows neither system message nor turns."""
    asked = [message for message in messages if message["role"] != "assistant"]
    if [message["role"] for message in asked] != ["user"]:
        raise DataError(
            f"{name}: this family takes one question and no {asked[0]['role'] if asked else 'empty'} message",
            "leave model.codec at auto: the family's own codec asks as it was trained",
        )
    return answer_of(asked[0])


def _ask(processor: Any, messages: Messages, name: str, *, answered: bool) -> _Asked:
    """Word a row for the processor.

    Raises:
        DataError: no picture or too many, no or several answers, an answer that starts with a blank, or an image token in a text.
        TrainingError: the chat template does not write the answer.
    """
    kind, tokenizer = layout_of(processor).kind, processor.tokenizer
    pictures = pictures_of(messages)
    answers = [message for message in messages if message["role"] == "assistant"]
    if answered and (len(answers) != 1 or messages[-1]["role"] != "assistant"):
        raise DataError(f"{name}: {len(answers)} answers", "this family learns one question and one answer in a row")
    if answered and answer_of(answers[0])[:1].isspace():  # nobody could tell it from the template's own blank
        raise DataError(f"{name}: an answer starts with a blank: {answer_of(answers[0])[:60]!r}", "strip the answer")
    if not pictures or (kind != "chat" and len(pictures) > 1):
        raise DataError(f"{name}: there are {len(pictures)} pictures", "this family needs one in each row")
    image = processor.image_token
    learnt = ""
    if kind != "chat":
        prompt = image + _question(messages, name)
        if answered:
            learnt = answer_of(answers[0]) + tokenizer.eos_token
            learnt = tokenizer.bos_token + learnt if kind == "encoder" else learnt
    elif answered:
        prompt, learnt = _chat(processor, messages, name)
    else:
        prompt = render_prompt(processor, messages)
    if (prompt.count(image), learnt.count(image)) != (len(pictures), 0):
        raise DataError(
            f"{name}: {prompt.count(image) + learnt.count(image)} times {image} in the text, for {len(pictures)} pictures",
            "a text holds a control token; pass labels through grounding.codec.guard_label",
        )
    # Florence-2's processor puts <image> itself
    return _Asked(prompt.removeprefix(image) if kind == "encoder" else prompt, learnt, pictures)


# ---- ids ------------------------------------------------------------------------------------------------------------


def _process(
    processor: Any, prompts: Sequence[str], rows: Sequence[_Asked], *, side: PaddingSide, **text: Any
) -> BatchFeature:
    """Give pictures and texts to the family's own processor: one resize, its own tokens, padding on `side`."""
    bos = processor.tokenizer.bos_token
    if layout_of(processor).kind == "chat" and bos and prompts[0].startswith(bos):
        text["add_special_tokens"] = False  # the template wrote it already
    return processor(
        text=list(prompts),
        images=[image for row in rows for image in row.pictures],
        padding=True,
        padding_side=side,
        return_tensors="pt",
        **layout_of(processor).whole,
        **text,
    )


def _count_image_tokens(processor: Any, batch: BatchFeature, rows: Sequence[_Asked], names: Sequence[str]) -> None:
    """Hold the image tokens of each row, as expanded, to what its pictures take.

    Raises:
        TrainingError: there are more or fewer; the model would be fed another picture's features, or stop.
    """
    lengths = ("image_seq_length", "image_seq_len", "num_image_tokens")
    each = next((getattr(processor, key) for key in lengths if hasattr(processor, key)), None)
    found = (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist()
    for row, count, name in zip(rows, found, names, strict=True):
        planned = None if each is None else each * len(row.pictures)
        if count == 0 or (planned is not None and count != planned):
            raise TrainingError(
                f"{name}: {count} image tokens for {len(row.pictures)} pictures, planned were {planned or 'some'}",
                "the processor cuts pictures into tiles, or is another model's",
            )


def _answer_ids(processor: Any, rows: Sequence[_Asked], names: Sequence[str]) -> list[list[int]]:
    """Turn answers into ids as they stand after their prompt.

    A chat's answer is read behind its prompt, since some tokenizers write a word otherwise at the start of a text; a suffix
    and a decoder's text do start one.

    Raises:
        TrainingError: prompt and answer melt into one token.
    """
    tokenizer = processor.tokenizer
    heads = [row.prompt if layout_of(processor).kind == "chat" else "" for row in rows]

    def ids(texts: list[str]) -> list[list[int]]:
        encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return encoded

    before, both = ids(heads), ids([head + row.learnt for head, row in zip(heads, rows, strict=True)])
    for head, whole, name in zip(before, both, names, strict=True):
        if whole[: len(head)] != head:
            raise TrainingError(
                f"{name}: prompt and answer share a token: {tokenizer.decode(whole[len(head) - 1 : len(head) + 3])!r}",
                "a model would be asked with other tokens than it was trained with",
            )
    return [whole[len(head) :] for head, whole in zip(before, both, strict=True)]


def _padded(rows: Sequence[Sequence[int]], value: int, side: PaddingSide) -> torch.Tensor:
    """Pad lists of ids to the longest: (n, longest) int64."""
    longest = max(len(row) for row in rows)
    array = np.full((len(rows), longest), value, dtype=np.int64)
    for i, row in enumerate(rows):
        array[i, slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)] = row
    return torch.from_numpy(array)


def _append(processor: Any, asked: BatchFeature, answers: Sequence[Sequence[int]], side: PaddingSide) -> BatchFeature:
    """Put each answer behind its prompt, and loss on it."""
    kept = asked["attention_mask"] == 1
    prompts = [ids[mask].tolist() for ids, mask in zip(asked["input_ids"], kept, strict=True)]
    batch = dict(asked)
    pairs = list(zip(prompts, answers, strict=True))
    batch["input_ids"] = _padded([[*prompt, *answer] for prompt, answer in pairs], _pad(processor), side)
    batch["attention_mask"] = _padded([[1] * (len(prompt) + len(answer)) for prompt, answer in pairs], 0, side)
    batch["labels"] = _padded([[IGNORED] * len(prompt) + [*answer] for prompt, answer in pairs], IGNORED, side)
    for key in _PER_TOKEN:
        if key in batch:  # PaliGemma reads 0 in both directions, 1 as a suffix; elsewhere 1 is an image token
            types = [row[mask].tolist() for row, mask in zip(asked[key], kept, strict=True)]
            of_answer = int(layout_of(processor).kind == "prefix")
            rows = [[*row, *[of_answer] * len(answer)] for row, answer in zip(types, answers, strict=True)]
            batch[key] = _padded(rows, 0, side)
    return BatchFeature(batch)


def _decode_to(processor: Any, asked: BatchFeature, answers: Sequence[Sequence[int]]) -> BatchFeature:
    """Give each answer to the decoder, which starts from the end token: `</s><s>cup<loc_1>…` -> `<s>cup<loc_1>…</s>`.

    `shift_labels` says to TRL's loss that position t already predicts label t; it would shift `labels` once more.
    """
    start = processor.tokenizer.eos_token_id
    labels = _padded(answers, IGNORED, "right")
    given = _padded([[start, *answer[:-1]] for answer in answers], _pad(processor), "right")
    return BatchFeature(dict(asked) | {"decoder_input_ids": given, "labels": labels, "shift_labels": labels})


def _pad(processor: Any) -> int:
    return int(processor.tokenizer.pad_token_id)


def count_row_tokens(processor: Any, messages_list: Sequence[Messages]) -> np.ndarray:
    """Count the tokens of rows without their pictures.

    When: once per run; `training.lengths` does it for all rows.

    Input: n conversations with an answer, placeholders in place of pictures.
    Output: (n, 3) int64: text, prompt and answer; image; of the text, those with loss. A picture is seen at one size, so one
    blank picture says what all take. Of an encoder-decoder, text counts both sides.

    Raises:
        DataError, TrainingError: as `PromptAnswerCollator`.
    """
    names = [f"row {i}" for i in range(len(messages_list))]
    rows = [_ask(processor, messages, name, answered=True) for messages, name in zip(messages_list, names, strict=True)]
    answers = [len(ids) for ids in _answer_ids(processor, rows, names)]
    prompts: dict[tuple[str, int], tuple[int, int]] = {}  # one question in a run, so one entry
    for row in rows:
        key = (row.prompt, len(row.pictures))
        if key not in prompts:
            blank = row._replace(pictures=[Image.new("RGB", (64, 64))] * len(row.pictures))
            ids = _process(processor, [row.prompt], [blank], side="right")["input_ids"][0]
            image = int((ids == processor.image_token_id).sum())
            prompts[key] = (len(ids) - image, image)
    counts = [
        (text + answer, image, answer)
        for (text, image), answer in zip((prompts[row.prompt, len(row.pictures)] for row in rows), answers, strict=True)
    ]
    return np.asarray(counts, dtype=np.int64).reshape(-1, 3)


def in_one_row(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Put the answers of an encoder-decoder's batch behind its prompts, to look at; any other batch comes back as it is.

    When: once per run, for the page of the first batch.

    Output: `input_ids`, `attention_mask` and `labels` (n, longest prompt + longest answer) int64.
    """
    if "decoder_input_ids" not in batch:
        return batch
    learnt = batch["labels"] != IGNORED
    parts = {
        "input_ids": batch["labels"].masked_fill(~learnt, 0),
        "attention_mask": learnt.long(),
        "labels": batch["labels"],
    }
    before = {**batch, "labels": torch.full_like(batch["input_ids"], IGNORED)}
    return {**batch, **{key: torch.cat([before[key], part], dim=1) for key, part in parts.items()}}


def collate_other_prompts(
    processor: Any,
    messages_list: Sequence[Messages],
    images_list: Sequence[Any],
    *,
    min_pixels: int,
    max_pixels: int,
) -> BatchFeature:
    """Make a batch of prompts to generate from: `data.collators.collate_prompts` for these families.

    When: every batch of inference.

    Input: as there; the limits must be the one size of the model.
    Output: `input_ids`, `attention_mask` (n, longest) int64 and what the family's processor makes of the pictures. Padded on
    the left, so that every row ends with its prompt; for an encoder on the right, since it numbers its places from the left.
    The ids are those of the same row in `PromptAnswerCollator` up to the answer.

    Raises:
        DataError, TrainingError, ModelError, ConfigError: as `PromptAnswerCollator`.
    """
    _check_limits(processor, min_pixels, max_pixels)
    names = [f"prompt {i}" for i in range(len(messages_list))]
    restored = restore_images_in_conversations(messages_list, images_list)
    rows = [_ask(processor, messages, name, answered=False) for messages, name in zip(restored, names, strict=True)]
    side: PaddingSide = "right" if layout_of(processor).kind == "encoder" else "left"
    batch = _process(processor, [row.prompt for row in rows], rows, side=side)
    batch.pop("labels", None)  # PaliGemma's processor makes some, all without loss
    _count_image_tokens(processor, batch, rows, names)
    return batch


class PromptAnswerCollator:
    """Put loss on the answers of one question each, for every family but Qwen-VL.

    When: every batch of training.

    Input: rows with `messages` and `image` or `images` (`id` is used in messages), as `data.dataset` makes them.
    Output: `input_ids`, `attention_mask`, `labels` (n, longest) int64 and what the family's processor makes of the pictures,
    `pixel_values` (n, 3, 224, 224) float32 for PaliGemma; `token_type_ids` where the family has them. For an encoder-decoder
    `input_ids` are the prompts alone, and `labels`, `shift_labels` and `decoder_input_ids` (n, longest answer) the answers;
    its own `forward` takes `labels`, TRL's loss `shift_labels`.

    Checked on every batch: image tokens, as expanded, are those of the row's pictures. Checked on the first batch
    (`verify_first`): the ids are those of the processor for the whole text, the decoded supervised tokens are exactly the
    answer and its end token, and each control token of the answer (`<loc0512>`) is a single id.

    Args:
        processor: the family's, after `models.processors.show_whole_pictures`.
        min_pixels: area of the pictures that the model sees; this family has one size.
        max_pixels: the same.
        padding_side: `right` for training; ignored by an encoder-decoder.
        verify_first: check the first batch that this object makes; costs one more pass of the processor.
    """

    def __init__(
        self,
        processor: Any,
        *,
        min_pixels: int,
        max_pixels: int,
        padding_side: PaddingSide = "right",
        verify_first: bool = True,
    ) -> None:
        _check_limits(processor, min_pixels, max_pixels)
        check_padding_side(padding_side)
        self.processor = processor
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self._encoder = layout_of(processor).kind == "encoder"
        self.padding_side: PaddingSide = "right" if self._encoder else padding_side
        self._verify = verify_first

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> BatchFeature:
        """Make a batch.

        Raises:
            DataError: a row has no picture, no or several answers, or a text that holds an image token.
            ImageError: a picture is broken.
            TrainingError: the batch is not what was meant; the message shows the difference.
        """
        messages_list, names = restore_rows(rows)
        asked = [
            _ask(self.processor, messages, name, answered=True)
            for messages, name in zip(messages_list, names, strict=True)
        ]
        prompts = _process(self.processor, [row.prompt for row in asked], asked, side=self.padding_side)
        answers = _answer_ids(self.processor, asked, names)
        if self._encoder:
            batch = _decode_to(self.processor, prompts, answers)
        else:
            batch = _append(self.processor, prompts, answers, self.padding_side)
        _count_image_tokens(self.processor, batch, asked, names)
        if self._verify:
            self._verify_control(asked, names)
            self._verify_ids(batch, asked, names)
            refuse_other_answers(self.processor.tokenizer, batch, [row.learnt for row in asked], names)
            self._verify = False
        return batch

    def _verify_control(self, asked: Sequence[_Asked], names: Sequence[str]) -> None:
        """Check that the tokenizer knows the control tokens of the answers."""
        control, tokenizer = layout_of(self.processor).control, self.processor.tokenizer
        for row, name in zip(asked, names, strict=True):
            for token in dict.fromkeys(re.findall(control, row.learnt) if control else ()):
                ids = tokenizer(token, add_special_tokens=False)["input_ids"]
                if len(ids) != 1:
                    raise TrainingError(
                        f"{name}: the tokenizer writes {token} as {len(ids)} tokens",
                        "its vocabulary lacks the family's control tokens; train with model.codec=plain_json",
                    )

    def _verify_ids(self, batch: BatchFeature, asked: Sequence[_Asked], names: Sequence[str]) -> None:
        """Compare with what the processor makes of the whole text; an encoder's prompts are the processor's already."""
        if self._encoder:
            return
        side, tokenizer = self.padding_side, self.processor.tokenizer
        if layout_of(self.processor).kind == "prefix":
            suffix = [row.learnt.removesuffix(tokenizer.eos_token) for row in asked]  # it puts that token itself
            expected = _process(self.processor, [row.prompt for row in asked], asked, side=side, suffix=suffix)
        else:
            expected = _process(self.processor, [row.prompt + row.learnt for row in asked], asked, side=side)
        refuse_other_ids(tokenizer, batch, expected, names)
        for key in (key for key in (*_PER_TOKEN, "labels") if key in expected):
            if not torch.equal(batch[key], expected[key]):
                raise TrainingError(
                    f"{key} differ from the processor's", "an update of transformers changed the family"
                )

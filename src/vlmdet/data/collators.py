"""Make a batch of conversations and pictures: token ids, pixels, and the loss mask.

When: EVERY BATCH, in the data loader's workers; the first code after `data.dataset` that needs torch. Three collators
stand side by side for a learner to compare. They differ in which tokens carry loss (`labels`, -100 where none):

    <|im_start|>system … <|im_end|>  <|im_start|>user <|vision_start|><|image_pad|>…<|vision_end|> … <|im_end|>
    V1: loss                         V1: loss, but for the vision tokens
    <|im_start|>assistant\n <|object_ref_start|>logo… <|im_end|> \n
    V1: loss                V1, V2, V3: loss                     V1: loss

A row is a dict with `messages` (system, user with IMAGE_PLACEHOLDER, assistant) and `image` or `images`. Prompts of
inference are made here too (`collate_prompts`), by the same functions, so that a model is asked as it was trained.

Long, because the three are there to be read side by side, over the same functions.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature

from vlmdet.data.dataset import IMAGE_PLACEHOLDER, Messages
from vlmdet.errors import ConfigError, DataError, TrainingError, did_you_mean
from vlmdet.grounding import View
from vlmdet.grounding.sizes import plan_view
from vlmdet.images import open_image, to_upright_rgb

IGNORED = -100
"""Label of a token without loss (the default of torch's cross entropy)."""

END_TOKEN = "<|im_end|>"
"""Ends every turn; the last token that is learnt. The newline after it belongs to the template."""

PaddingSide = Literal["right", "left"]


@dataclass(frozen=True)
class EncodedPicture:
    """Stands for a picture whose features are known (`training.vision_cache`): of it, only the grid of patches is needed."""

    frames: int
    rows: int
    columns: int


class _Segment(NamedTuple):
    """A piece of a rendered conversation; `learnt` when it is an answer and its end token."""

    text: str
    learnt: bool


# ---- messages -------------------------------------------------------------------------------------------------------


def restore_images_in_conversations(
    messages_list: Sequence[Messages],
    images_list: Sequence[Any],
    *,
    names: Sequence[str] | None = None,
) -> list[Messages]:
    """Put the pictures back where the placeholders stand.

    When: every batch, before the chat template.

    Input: n conversations as Arrow returns them, e.g. a part `{"type": "text", "text": "…", "image": None}`; n times a
    picture or a list of pictures (PIL, path, bytes, or the storage form `{"path", "bytes"}`); `names` of the rows, for
    messages. The input is not changed.
    Output: n new conversations. Every placeholder is an upright RGB PIL image, in order; keys that are None are gone,
    for the template asks for presence (`'image' in content`).

    Raises:
        DataError: a row has more or fewer pictures than placeholders; the message names the row.
        ImageError: a picture is broken.
    """
    names = names or [f"row {i}" for i in range(len(messages_list))]
    if len(messages_list) != len(images_list):
        raise DataError(f"{len(messages_list)} conversations but {len(images_list)} rows of pictures")
    return [_restore(*row) for row in zip(messages_list, images_list, names, strict=True)]


def _restore(messages: Messages, images: Any, name: str) -> Messages:
    given = [] if images is None else list(images) if isinstance(images, (list, tuple)) else [images]
    slots = sum(_is_slot(part) for message in messages for part in _parts(message))
    if slots != len(given):
        raise DataError(
            f"{name}: {slots} {IMAGE_PLACEHOLDER} in the messages but {len(given)} pictures",
            "give one picture for each placeholder",
        )
    pictures = iter([_open(image, name) for image in given])

    def fill(part: Mapping[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in part.items() if value is not None}
        if _is_slot(part):
            kept["image"] = next(pictures)
        elif "image" in kept:
            kept["image"] = _open(kept["image"], name)
        return kept

    restored = []
    for message in messages:
        kept = {key: value for key, value in message.items() if value is not None}
        if not isinstance(message["content"], str):
            kept["content"] = [fill(part) for part in _parts(message)]
        restored.append(kept)
    return restored


def _parts(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    content = message["content"]
    return () if content is None or isinstance(content, str) else content


def _is_slot(part: Mapping[str, Any]) -> bool:
    image = part.get("image")
    return (isinstance(image, str) and image == IMAGE_PLACEHOLDER) or (part.get("type") == "image" and image is None)


def _open(image: Any, name: str) -> Image.Image | EncodedPicture:
    if isinstance(image, EncodedPicture):
        return image
    if isinstance(image, Image.Image):
        return to_upright_rgb(image)
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") else image.get("path")
    if isinstance(image, (bytes, str, Path)):
        return open_image(Path(image) if isinstance(image, str) else image, name=f"{name}: {str(image)[:80]}")
    raise DataError(f"{name}: the picture is a {type(image).__name__}", "give a PIL image, a path or {'path', 'bytes'}")


def pictures_of(messages: Messages) -> list[Any]:
    return [part["image"] for message in messages for part in _parts(message) if "image" in part]


def restore_rows(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Messages], list[str]]:
    """Return the restored conversations of a batch of rows, and the rows' names."""
    names = [f"row {i} of the batch" + (f" (id {row['id']})" if row.get("id") else "") for i, row in enumerate(rows)]
    images = [row["images"] if row.get("images") is not None else row.get("image") for row in rows]
    return restore_images_in_conversations([row["messages"] for row in rows], images, names=names), names


# ---- text -----------------------------------------------------------------------------------------------------------


def render_prompt(processor: Any, messages: Messages) -> str:
    r"""Render the text that a model is given before it answers.

    When: every batch of inference; `Qwen2VLCollatorV3` renders each turn with it.

    Input: `messages`; where the last one is the assistant's, it is left out.
    Output: `"<|im_start|>system\n…<|im_end|>\n<|im_start|>user\n…<|im_end|>\n<|im_start|>assistant\n"`.
    """
    asked = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
    text: str = processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    return text


def _render(processor: Any, messages: Messages) -> str:
    text: str = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    return text


def answer_of(message: Mapping[str, Any]) -> str:
    """Return the text of an assistant's message, whose content is a text or a list of parts."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in _parts(message))


def _segments(processor: Any, messages: Messages, name: str) -> list[_Segment]:
    """Render a conversation turn by turn: what is asked, what is learnt, alternating; joined they are the whole text.

    Raises:
        DataError: there is no answer to learn, or one starts with a line break.
        TrainingError: the chat template does not write an answer as its text and `<|im_end|>`.
    """
    whole = _render(processor, messages)
    segments: list[_Segment] = []
    done = 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        answer = answer_of(message)
        if re.match(r"\s*[\r\n]", answer):  # would melt into one token with the template's newline before it
            raise DataError(f"{name}: an answer starts with a line break: {answer[:60]!r}", "strip the answer")
        before = render_prompt(processor, messages[: i + 1])
        learnt = answer + END_TOKEN
        if not whole.startswith(before + learnt):
            at = len(before)
            raise TrainingError(
                f"{name}: the chat template writes {whole[at : at + 80]!r} where the answer {learnt[:80]!r} was due",
                "use the family's own chat template, without a place for thoughts",
            )
        segments += [_Segment(whole[done : len(before)], False), _Segment(learnt, True)]
        done = len(before) + len(learnt)
    if not segments:
        raise DataError(f"{name}: there is no assistant message, so nothing to learn", "add the answer to the messages")
    segments.append(_Segment(whole[done:], False))
    return segments


# ---- pictures -------------------------------------------------------------------------------------------------------


def _check_limits(min_pixels: int, max_pixels: int) -> None:
    if not 0 < min_pixels <= max_pixels:
        raise ConfigError(
            f"pixel limits: min_pixels is {min_pixels}, max_pixels is {max_pixels}", "0 < min_pixels <= max_pixels"
        )


def _size(min_pixels: int, max_pixels: int) -> dict[str, int]:
    """Word the pixel limits as transformers does; its names mean areas here, not edges."""
    return {"shortest_edge": min_pixels, "longest_edge": max_pixels}


def _plan(processor: Any, image: Image.Image, name: str, *, min_pixels: int, max_pixels: int) -> View:
    factor = processor.image_processor.patch_size * processor.image_processor.merge_size
    try:
        return plan_view(*image.size, min_pixels=min_pixels, max_pixels=max_pixels, factor=factor)
    except DataError as error:
        raise DataError(f"{name}: {error.message}", error.hint) from error


def _process_pictures(
    processor: Any, pictures: Sequence[Sequence[Any]], names: Sequence[str], *, min_pixels: int, max_pixels: int
) -> dict[str, torch.Tensor]:
    """Resize and cut up the pictures of a batch, once, and check the sizes against the plan.

    Output: `pixel_values` (patches, 3 * 2 * patch size squared) float32 and `image_grid_thw` (pictures, 3) int64: frames,
    rows and columns of patches; nothing where the batch has no picture.

    Raises:
        TrainingError: the processor made another grid than `grounding.sizes` planned.
    """
    flat = [(image, name) for row, name in zip(pictures, names, strict=True) for image in row]
    if not flat:
        return {}
    if all(isinstance(image, EncodedPicture) for image, _ in flat):
        return {"image_grid_thw": torch.tensor([astuple(image) for image, _ in flat])}
    limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    views = [_plan(processor, image, name, **limits) for image, name in flat]
    made = processor.image_processor([image for image, _ in flat], size=_size(**limits), return_tensors="pt")
    patch = processor.image_processor.patch_size
    for view, grid, (_, name) in zip(views, made["image_grid_thw"].tolist(), flat, strict=True):
        planned = [1, view.resized_height // patch, view.resized_width // patch]
        if grid != planned:
            raise TrainingError(
                f"{name}: the processor made a grid of {grid} patches of a picture of {view.width} x {view.height}, "
                f"planned were {planned} ({view.resized_width} x {view.resized_height} pixels)",
                "the boxes would be off; compare the processor's settings with min_pixels and max_pixels",
            )
    return {"pixel_values": made["pixel_values"], "image_grid_thw": made["image_grid_thw"]}


def _as_image(processor: Any, picture: Image.Image | EncodedPicture) -> Image.Image:
    """Return a picture as it is; for one of which only the grid is known, a black one of that size."""
    if isinstance(picture, EncodedPicture):
        patch = processor.image_processor.patch_size
        return Image.new("RGB", (picture.columns * patch, picture.rows * patch))
    return picture


# ---- ids ------------------------------------------------------------------------------------------------------------


def _collate(
    processor: Any,
    rows: Sequence[Sequence[_Segment]],
    pictures: Sequence[Sequence[Any]],
    names: Sequence[str],
    *,
    min_pixels: int,
    max_pixels: int,
    padding_side: PaddingSide,
) -> BatchFeature:
    """Make the batch of n rendered conversations; the way of training and of inference.

    1. pictures -> patches and grids, one resize;
    2. segments -> ids, each with a picture's single `<|image_pad|>`;
    3. every `<|image_pad|>` repeated as often as its picture has tokens (patches / merge size squared), mask alongside;
    4. rows padded to the longest; nothing is ever cut.

    Output: `input_ids`, `attention_mask`, `mm_token_type_ids` (1 at image tokens), `labels`, all (n, longest) int64,
    with `pixel_values` and `image_grid_thw`.
    """
    vision = _process_pictures(processor, pictures, names, min_pixels=min_pixels, max_pixels=max_pixels)
    merge = processor.image_processor.merge_size**2
    tokens = vision["image_grid_thw"].prod(dim=1).numpy() // merge if vision else np.zeros(0, dtype=np.int64)
    flat = [segment.text for row in rows for segment in row]
    encoded = iter(processor.tokenizer(flat, add_special_tokens=False, return_attention_mask=False)["input_ids"])

    ids_of_rows, learnt_of_rows, first = [], [], 0
    for segments, images, name in zip(rows, pictures, names, strict=True):
        pieces = [np.asarray(next(encoded), dtype=np.int64) for _ in segments]
        ids = np.concatenate(pieces)
        learnt = np.repeat([segment.learnt for segment in segments], [len(piece) for piece in pieces])
        slots = ids == processor.image_token_id
        if slots.sum() != len(images) or (ids == processor.video_token_id).any():
            raise DataError(
                f"{name}: {slots.sum()} image tokens and {(ids == processor.video_token_id).sum()} video tokens in the "
                f"text, for {len(images)} pictures",
                "a text part holds a control token; pass labels through grounding.codec.escape_label",
            )
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[slots] = tokens[first : first + len(images)]
        first += len(images)
        ids_of_rows.append(np.repeat(ids, repeats))
        learnt_of_rows.append(np.repeat(learnt, repeats))

    longest = max(len(ids) for ids in ids_of_rows)
    shape = (len(rows), longest)
    input_ids = np.full(shape, processor.tokenizer.pad_token_id, dtype=np.int64)
    mask, labels = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
    for i, (ids, learnt) in enumerate(zip(ids_of_rows, learnt_of_rows, strict=True)):
        place = slice(0, len(ids)) if padding_side == "right" else slice(longest - len(ids), longest)
        input_ids[i, place] = ids
        mask[i, place] = 1
        labels[i, place] = np.where(learnt, ids, IGNORED)
    arrays = {
        "input_ids": input_ids,
        "attention_mask": mask,
        "mm_token_type_ids": (input_ids == processor.image_token_id).astype(np.int64),
        "labels": labels,
    }
    return BatchFeature({key: torch.from_numpy(array) for key, array in arrays.items()} | vision)


def collate_prompts(
    processor: Any,
    messages_list: Sequence[Messages],
    images_list: Sequence[Any],
    *,
    min_pixels: int,
    max_pixels: int,
) -> BatchFeature:
    r"""Make a batch of prompts to generate from.

    When: every batch of inference, and of the evaluation during training.

    Input: n conversations (a last answer is left out) and n times a picture or a list of them, as for
    `restore_images_in_conversations`; the pixel limits of the training.
    Output: `input_ids`, `attention_mask`, `mm_token_type_ids` (n, longest) int64, padded on the left so that every row
    ends with `<|im_start|>assistant\n`; `pixel_values`, `image_grid_thw`. The ids are those of the same row in
    `Qwen2VLCollatorV3` up to the answer.

    Raises:
        DataError, TrainingError: as `Qwen2VLCollatorV3`.
    """
    _check_limits(min_pixels, max_pixels)
    restored = restore_images_in_conversations(messages_list, images_list)
    batch = _collate(
        processor,
        [[_Segment(render_prompt(processor, messages), False)] for messages in restored],
        [pictures_of(messages) for messages in restored],
        [f"prompt {i}" for i in range(len(restored))],
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        padding_side="left",
    )
    del batch["labels"]
    return batch


# ---- proofs of the first batch --------------------------------------------------------------------------------------


def check_padding_side(side: str) -> None:
    """Refuse a padding side that is none."""
    if side not in ("right", "left"):
        raise ConfigError(f"unknown padding side '{side}'", did_you_mean(side, ("right", "left")))


def refuse_other_ids(
    tokenizer: Any, batch: Mapping[str, Any], expected: Mapping[str, Any], names: Sequence[str]
) -> None:
    """Compare the ids of a batch with those that the processor makes of the whole texts, row by row, without padding.

    When: once per collator, on its first batch.

    Raises:
        TrainingError: a row differs; the message shows the first difference.
    """
    for i, name in enumerate(names):
        ours = batch["input_ids"][i][batch["attention_mask"][i] == 1].tolist()
        theirs = expected["input_ids"][i][expected["attention_mask"][i] == 1].tolist()
        if ours != theirs:
            at = next((k for k, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), -1)
            raise TrainingError(
                f"{name}: token {at} differs from the processor's: {tokenizer.decode(ours[at : at + 8])!r}, "
                f"processor {tokenizer.decode(theirs[at : at + 8])!r} ({len(ours)} and {len(theirs)} tokens)",
                "the model would be asked otherwise than it was trained",
            )


def refuse_other_answers(tokenizer: Any, batch: Mapping[str, Any], wanted: Sequence[str], names: Sequence[str]) -> None:
    """Compare the decoded supervised tokens of each row with the text that is to be learnt, end token included.

    When: once per collator, on its first batch.

    Raises:
        TrainingError: a row differs; the message shows both texts.
    """
    for labels, text, name in zip(batch["labels"], wanted, names, strict=True):
        found = tokenizer.decode(
            labels[labels != IGNORED], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        # Qwen's tokenizer writes composed characters (NFC), whatever it is given.
        if found not in (text, unicodedata.normalize("NFC", text)):
            raise TrainingError(f"{name}: the loss is on {found[:200]!r}, meant was {text[:200]!r}")


# ---- the three collators --------------------------------------------------------------------------------------------


class Qwen2VLCollatorV1:
    """Put loss on all text: the simplest collator, and a poor one.

    When: every batch, for comparison.

    What it gets wrong: the system prompt and the question are the same in every row, but they are most of the text
    tokens, so they dominate the loss: it falls quickly while the boxes are still guesses, and the model is trained to
    write questions. The newline after the last `<|im_end|>` is learnt as well. `process_vision_info` resizes each
    picture with Pillow, and the processor looks at its size again: two owners of one rule, and other pixels than in
    inference.
    What it gets right: no answer can be missed, and pad is masked by place, not by id.

    Args:
        processor: that of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL.
        min_pixels: smallest picture area after the resize.
        max_pixels: largest.
    """

    def __init__(self, processor: Any, *, min_pixels: int, max_pixels: int) -> None:
        _check_limits(min_pixels, max_pixels)
        self.processor, self.min_pixels, self.max_pixels = processor, min_pixels, max_pixels

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> BatchFeature:
        """Make a batch: keys as `Qwen2VLCollatorV3`, padded on the right."""
        messages_list, _ = restore_rows(rows)
        batch = _by_vision_info(self.processor, messages_list, min_pixels=self.min_pixels, max_pixels=self.max_pixels)
        labels = batch["input_ids"].clone()
        labels[batch["attention_mask"] == 0] = IGNORED
        vision = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
        vision_ids = self.processor.tokenizer.convert_tokens_to_ids(vision)
        labels[torch.isin(labels, torch.tensor(vision_ids))] = IGNORED
        batch["labels"] = labels
        return batch


class Qwen2VLCollatorV2:
    r"""Put loss on the assistant's answers, found by a search for their markers in the ids.

    When: every batch, for comparison.

    What it gets right: only what stands between `<|im_start|>assistant\n` and `<|im_end|>`, with that end token, is
    learnt, in every turn. What it gets wrong: the mask is guessed from the ids afterwards. A question that quotes a
    conversation with its markers is learnt as an answer; an answer that quotes `<|im_end|>` is learnt up to there; an
    answer that starts with a line break melts into the marker, which is then not found (here an error, elsewhere a row
    without loss). The pictures are resized as in V1.

    Args:
        processor: that of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL.
        min_pixels: smallest picture area after the resize.
        max_pixels: largest.
    """

    def __init__(self, processor: Any, *, min_pixels: int, max_pixels: int) -> None:
        _check_limits(min_pixels, max_pixels)
        self.processor, self.min_pixels, self.max_pixels = processor, min_pixels, max_pixels

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> BatchFeature:
        """Make a batch: keys as `Qwen2VLCollatorV3`, padded on the right.

        Raises:
            TrainingError: no answer was found in a row.
        """
        messages_list, names = restore_rows(rows)
        batch = _by_vision_info(self.processor, messages_list, min_pixels=self.min_pixels, max_pixels=self.max_pixels)
        tokenizer = self.processor.tokenizer
        marker = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
        end_id = tokenizer.convert_tokens_to_ids(END_TOKEN)
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for i, name in enumerate(names):
            spans = list(_between(batch["input_ids"][i].numpy(), marker, end_id))
            if not spans:
                raise TrainingError(f"{name}: no answer between the markers", "use Qwen2VLCollatorV3")
            for start, stop in spans:
                labels[i, start:stop] = batch["input_ids"][i, start:stop]
        batch["labels"] = labels
        return batch


class Qwen2VLCollatorV3:
    """Put loss on the answers, with the mask made where the text is made: the default.

    When: every batch of training.

    The conversation is rendered turn by turn, so which text is an answer is known before there are ids, whatever the
    text says; answers become ids on their own, as they do when a model generates them. Several turns and pictures,
    right or left padding; one resize, in the processor; nothing is ever cut.

    Input: rows with `messages` and `image` or `images` (`id` is used in messages), as `data.dataset` makes them.
    Output: `input_ids`, `attention_mask`, `mm_token_type_ids`, `labels` (n, longest) int64; `pixel_values` (patches,
    1176) float32, of Qwen3-VL's larger patches (patches, 1536); `image_grid_thw` (pictures, 3) int64. Two rows of 24 and 15
    text tokens, a picture of 280 x 280 each (100 image tokens of 28 x 28): (2, 124), 800 patches, [[1, 20, 20], [1, 20, 20]].

    Checked on every batch: the grids are those that `grounding.sizes` planned; each row has as many image tokens as
    pictures. Checked on the first batch (`verify_first`): the ids are those of the processor for the whole text, and
    the decoded supervised tokens are exactly answer + `<|im_end|>`.

    Args:
        processor: that of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL.
        min_pixels: smallest picture area after the resize; required, since the processor's own default allows
            pictures of up to 12.8 megapixels in some checkpoints.
        max_pixels: largest.
        padding_side: `right` for training; `left` where a batch is generated from.
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
        _check_limits(min_pixels, max_pixels)
        check_padding_side(padding_side)
        self.processor = processor
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.padding_side: PaddingSide = padding_side
        self._verify = verify_first

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> BatchFeature:
        """Make a batch.

        Raises:
            DataError: pictures and placeholders differ in number, a row has no answer, or a text holds a vision token.
            ImageError: a picture is broken.
            TrainingError: the batch is not what was meant; the message shows the difference.
        """
        messages_list, names = restore_rows(rows)
        segments = [
            _segments(self.processor, messages, name) for messages, name in zip(messages_list, names, strict=True)
        ]
        pictures = [pictures_of(messages) for messages in messages_list]
        batch = _collate(
            self.processor,
            segments,
            pictures,
            names,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
            padding_side=self.padding_side,
        )
        if self._verify:
            self._verify_ids(batch, messages_list, pictures, names)
            self._verify_answers(batch, messages_list, names)
            self._verify = False
        return batch

    def _verify_ids(
        self,
        batch: BatchFeature,
        messages_list: Sequence[Messages],
        pictures: Sequence[Sequence[Any]],
        names: Sequence[str],
    ) -> None:
        """Compare with what the processor makes of the whole text."""
        expected = self.processor(
            text=[_render(self.processor, messages) for messages in messages_list],
            images=[_as_image(self.processor, image) for row in pictures for image in row] or None,
            size=_size(self.min_pixels, self.max_pixels),
            padding=True,
            padding_side=self.padding_side,
            return_tensors="pt",
        )
        refuse_other_ids(self.processor.tokenizer, batch, expected, names)

    def _verify_answers(self, batch: BatchFeature, messages_list: Sequence[Messages], names: Sequence[str]) -> None:
        """Compare the decoded supervised tokens of each row with answer + end token."""
        wanted = [
            "".join(answer_of(message) + END_TOKEN for message in messages if message["role"] == "assistant")
            for messages in messages_list
        ]
        refuse_other_answers(self.processor.tokenizer, batch, wanted, names)


def _by_vision_info(
    processor: Any, messages_list: Sequence[Messages], *, min_pixels: int, max_pixels: int
) -> BatchFeature:
    """Take the path of most tutorials: chat template -> `process_vision_info` -> processor (V1 and V2)."""
    from qwen_vl_utils import process_vision_info

    limited = [[_with_limits(message, min_pixels, max_pixels) for message in messages] for messages in messages_list]
    pictures, _ = process_vision_info(limited, image_patch_size=processor.image_processor.patch_size)
    return processor(
        text=[_render(processor, messages) for messages in messages_list],
        images=pictures,
        size=_size(min_pixels, max_pixels),
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )


def _with_limits(message: dict[str, Any], min_pixels: int, max_pixels: int) -> dict[str, Any]:
    limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    if isinstance(message["content"], str):
        return message
    return message | {"content": [part | limits if "image" in part else part for part in message["content"]]}


def _between(ids: np.ndarray, marker: Sequence[int], end_id: int) -> Iterator[tuple[int, int]]:
    """Yield start and stop of what follows each marker, up to and with the next end token."""
    windows = np.lib.stride_tricks.sliding_window_view(ids, len(marker))
    starts = np.flatnonzero((windows == np.asarray(marker)).all(axis=1)) + len(marker)
    ends = np.flatnonzero(ids == end_id)
    for start in starts:
        later = ends[ends >= start]
        if len(later):
            yield int(start), int(later[0]) + 1

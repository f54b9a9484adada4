"""Count the tokens of every training row before the run, without opening a picture, and refuse rows that are too long.

When: PER RUN, after the rows are made, and in `vlmdet plan`. Nothing is ever cut to a length: a row whose answer or picture
lost its end would teach the model to stop early, or would not fit its picture any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from vlmdet.contract import Contract
from vlmdet.data.collators import END_TOKEN
from vlmdet.data.collators_other import count_row_tokens
from vlmdet.errors import DataError
from vlmdet.grounding.sizes import plan_view
from vlmdet.models.processors import is_other_family
from vlmdet.records import Sample
from vlmdet.settings import Settings

BATCH = 1000
"""Rows that are read and tokenised at once, so that memory does not grow with the number of rows."""


@dataclass(frozen=True, eq=False)
class RowTokens:
    """Tokens of n rows, as the default collator makes them.

    Attributes:
        ids: the rows' ids.
        sizes: (n, 2) int64, width and height of the upright pictures in pixels.
        text: (n,) int64, tokens that no picture pads: system, question, answer, template.
        image: (n,) int64, tokens of the picture.
        answer: (n,) int64, of `text`, those that carry loss: the answer and its end token.
    """

    ids: tuple[str, ...]
    sizes: np.ndarray
    text: np.ndarray
    image: np.ndarray
    answer: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """Tokens of each row, (n,) int64."""
        return self.text + self.image

    def enlarged(self, times: int, *, min_pixels: int, max_pixels: int, factor: int) -> RowTokens:
        """Return the same rows with pictures of so many times their sides; for Qwen-VL, whose tokens follow the size."""
        limits = {"min_pixels": min_pixels, "max_pixels": max_pixels, "factor": factor}
        sizes = self.sizes * times
        image = [_image_tokens((int(w), int(h)), name, **limits) for (w, h), name in zip(sizes, self.ids, strict=True)]
        return replace(self, sizes=sizes, image=np.asarray(image, dtype=np.int64))


def count_tokens(
    rows: Any, sizes: Sequence[tuple[int, int]], processor: Any, *, min_pixels: int, max_pixels: int
) -> RowTokens:
    """Count the tokens of training rows; no picture is opened.

    When: once per run.

    Input: n `rows` as `build_rows` makes them, a data set of `datasets` (whose transform is not run) or a list, with `id` and
    `messages`, one picture each; `sizes`, width and height of their upright pictures in pixels; the pixel limits of the run.
    Output: `RowTokens`; a row of 24 text tokens and a picture of 280 x 280 pixels has 24 and 100.

    Raises:
        DataError: a picture is over 200 times as long as wide.
        ValueError: rows and sizes differ in number.
    """
    if len(rows) != len(sizes):
        raise ValueError(f"{len(rows)} rows, {len(sizes)} sizes")
    ids: list[str] = []
    shape = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
    if is_other_family(processor):  # every picture at one size
        counts = np.zeros((len(rows), 3), dtype=np.int64)
        for chunk in tqdm(_chunks(rows), "tokens", -(-len(rows) // BATCH), delay=2, leave=False, disable=None):
            found = count_row_tokens(processor, [_plain(row["messages"]) for row in chunk])
            counts[len(ids) : len(ids) + len(chunk)] = found
            ids += [str(row["id"] or "") for row in chunk]
        return RowTokens(tuple(ids), shape, *counts.T)
    factor = processor.image_processor.patch_size * processor.image_processor.merge_size
    text, answer = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
    for chunk in tqdm(_chunks(rows), "tokens", -(-len(rows) // BATCH), delay=2, leave=False, disable=None):
        place = slice(len(ids), len(ids) + len(chunk))
        ids += [str(row["id"] or "") for row in chunk]
        messages_list = [_plain(row["messages"]) for row in chunk]
        whole = [processor.apply_chat_template(messages, tokenize=False) for messages in messages_list]
        # a picture stands in the text as one token, which the processor then repeats
        text[place] = _lengths(processor.tokenizer, whole) - 1
        learnt = [
            [_text(one) + END_TOKEN for one in messages if one["role"] == "assistant"] for messages in messages_list
        ]
        each = iter(_lengths(processor.tokenizer, [turn for turns in learnt for turn in turns]).tolist())
        answer[place] = [sum(next(each) for _ in turns) for turns in learnt]
    image = [
        _image_tokens(size, name, min_pixels=min_pixels, max_pixels=max_pixels, factor=factor)
        for size, name in zip(sizes, ids, strict=True)
    ]
    return RowTokens(tuple(ids), shape, text, np.asarray(image, dtype=np.int64), answer)


def read_lengths(
    rows: Any, samples: Sequence[Sample], processor: Any, settings: Settings, contract: Contract, *, config: Any
) -> RowTokens:
    """Count the tokens of a run's rows, and refuse those that are too long.

    When: once per run, before the first step, and in `vlmdet plan`.

    Input: `rows` of `samples`, in the same order; `config` of the model, which says what it can read. Where augmentation shrinks
    pictures onto a ground of up to twice their sides, they are judged as if it always did.

    Raises:
        DataError: see `refuse_long_rows`.
    """
    limits = {"min_pixels": contract.min_pixels, "max_pixels": contract.max_pixels}
    tokens = count_tokens(rows, [(sample.width, sample.height) for sample in samples], processor, **limits)
    limit = settings.training.max_tokens or context_of(config)
    if limit is not None:
        judged = tokens
        if settings.augment.shrink and not is_other_family(processor):
            judged = tokens.enlarged(2, factor=contract.size_factor, **limits)
        refuse_long_rows(judged, limit=limit, factor=contract.size_factor, **limits)
    return tokens


def refuse_long_rows(tokens: RowTokens, *, limit: int, min_pixels: int, max_pixels: int, factor: int = 28) -> None:
    """Stop before the run where rows have more tokens than the model can read, or than the settings allow.

    When: once per run, before the first step.

    Input: `limit`, `training.max_tokens` or the model's `max_position_embeddings` (see `context_of`); the pixel limits of the
    run; `factor`, side in pixels of one image token.

    Raises:
        DataError: it names the first few rows with their tokens, how many there are, and the largest `max_pixels` under
            which all of them fit, where there is one.
    """
    over = np.flatnonzero(tokens.total > limit)
    if not len(over):
        return
    first = ", ".join(
        f"{tokens.ids[i]} ({tokens.total[i]:,}: {tokens.image[i]:,} image, {tokens.text[i]:,} text)" for i in over[:3]
    )
    one_size = min_pixels == max_pixels == factor**2  # of a family that sees every picture so, in any number of tokens
    limits = {"min_pixels": min_pixels, "max_pixels": max_pixels, "factor": factor}
    fitting = None if one_size else fitting_max_pixels(tokens, limit=limit, **limits)
    if fitting is not None:
        hint = f"model.max_pixels={fitting} fits them all; nothing is ever cut"
    elif one_size or (tokens.text[over] >= limit).any():
        hint = "the text alone is too long: ask for fewer classes, or leave those rows out; nothing is ever cut"
    else:
        hint = f"not even model.max_pixels={min_pixels}, the smallest allowed, fits them: lower model.min_pixels too"
    raise DataError(
        f"{len(over):,} of {len(tokens.ids):,} rows have more than {limit:,} tokens: {first}{', …' if len(over) > 3 else ''}",
        hint,
    )


def fitting_max_pixels(
    tokens: RowTokens, *, limit: int, min_pixels: int, max_pixels: int, factor: int = 28
) -> int | None:
    """Return the largest `max_pixels`, a multiple of one token's pixels, under which no row is over the limit.

    When: in the message of `refuse_long_rows`.

    Output: never over `max_pixels` and never under `min_pixels`; None where even `min_pixels` leaves a row too long. A lower
    `max_pixels` never makes a picture larger, so it is found by halving, and what is returned was tried on every row.
    """
    token = factor * factor
    over = np.flatnonzero(tokens.total > limit)
    pairs = [(tuple(tokens.sizes[i].tolist()), limit - int(tokens.text[i])) for i in over]

    def fits(pixels: int) -> bool:
        limits = {"min_pixels": min_pixels, "max_pixels": pixels, "factor": factor}
        return all(_image_tokens(size, "", **limits) <= room for size, room in pairs)

    low, high = -(-min_pixels // token), max_pixels // token  # in image tokens
    if low > high or not fits(low * token):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * token) else (low, middle - 1)
    return low * token


def context_of(config: Any) -> int | None:
    """Return how many tokens a model can read, by its configuration; None where it does not say."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if length is None else int(length)


def _chunks(rows: Any) -> Iterator[list[Mapping[str, Any]]]:
    if hasattr(
        rows, "with_format"
    ):  # Arrow: these columns alone, so that no picture is decoded and no transform is run
        rows = rows.with_format(None).select_columns(["id", "messages"])
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            yield [{"id": i, "messages": m} for i, m in zip(part["id"], part["messages"], strict=True)]
    else:
        for start in range(0, len(rows), BATCH):
            yield list(rows[start : start + BATCH])


def _plain(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Take away the keys that Arrow filled with None: the template asks for presence."""
    return [
        {**message, "content": [{key: value for key, value in part.items() if value is not None} for part in content]}
        if not isinstance(content := message["content"], str)
        else dict(message)
        for message in messages
    ]


def _text(message: Mapping[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _lengths(tokenizer: Any, texts: list[str]) -> np.ndarray:
    if not texts:
        return np.zeros(0, dtype=np.int64)
    ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return np.asarray([len(row) for row in ids], dtype=np.int64)


def _image_tokens(size: tuple[int, int], name: str, *, min_pixels: int, max_pixels: int, factor: int) -> int:
    try:
        view = plan_view(*size, min_pixels=min_pixels, max_pixels=max_pixels, factor=factor)
    except DataError as error:
        raise DataError(f"{name}: {error.message}", error.hint) from error
    return view.resized_width * view.resized_height // factor**2

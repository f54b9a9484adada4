"""Decode greedily, many pictures at once, for the Qwen-VL families: the ids of transformers' `generate`, for less a step.

When: PER RUN, batch by batch, from `inference.generate_answers`.

    prefix     what every prompt starts with, up to the picture, is encoded once for all; its keys and values are shared
    prompt     [prefix][padding][picture, question]: the padding lies between, where nothing attends to it, so that the columns
               of the prefix are the same in each row; positions are those of the row alone (multimodal rotary positions)
    step       one token a row, through the language model and the head alone
    end        a row that has written its end token leaves the batch, once a quarter of the rows have

What `generate` does besides at each step (criteria, processors, keyword arguments, masks anew) costs more than the model where
that is small. `benchmarks/predict.py` measures it; `tests/models/test_decoding.py` holds that the ids are the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache

LOOPED = frozenset({"qwen2_vl", "qwen2_5_vl", "qwen3_vl"})
"""Model types for which this loop is tested against `generate`; every other one goes through that."""

Choose = Callable[[torch.Tensor, Sequence[int], Sequence[Sequence[int]]], torch.Tensor]
"""From logits (rows, vocabulary) float32, the rows' numbers in the batch, and their ids so far, to logits."""


class Decoded(NamedTuple):
    """What was written for one row.

    Attributes:
        ids: the end token included.
        logprobs: the natural logarithm of each one's probability, or nothing.
        ended: the last one is an end token; else the limit was reached.
    """

    ids: list[int]
    logprobs: list[float]
    ended: bool


def can_loop(model: Any) -> bool:
    """Tell whether this loop is for a model: of a tested family, its weights whole in this process, without sliding windows."""
    config = model.config
    if config.model_type not in LOOPED or config._attn_implementation != "sdpa":
        return False
    windows = set(getattr(config.text_config, "layer_types", None) or ()) - {"full_attention"}
    ways = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    return not windows and not any(os.environ.get(way, "").lower() in ("1", "true", "yes") for way in ways)


def decode(
    model: Any,
    batch: dict[str, Any],
    *,
    ends: Sequence[int],
    max_new_tokens: int,
    logprobs: bool = False,
    choose: Choose | None = None,
) -> list[Decoded]:
    """Decode one batch of prompts greedily.

    When: once per batch of prediction.

    Input: a Qwen-VL, with or without an adapter, in evaluation mode; `batch` of `collate_prompts` on its device, padded on the
    left; `ends`, ids of which each ends an answer; `logprobs`, give those of the chosen tokens, computed in float32 from the
    logits as the model gives them, before `choose`; `choose` changes logits before the highest one is taken.
    Output: n rows in the order of the batch.
    """
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    text, head = core.model.language_model, core.get_output_embeddings()
    batch = dict(batch)
    positions, deltas = core.model.get_rope_index(
        batch["input_ids"],
        mm_token_type_ids=batch["mm_token_type_ids"],
        image_grid_thw=batch.get("image_grid_thw"),
        attention_mask=batch["attention_mask"],
    )
    lengths = batch["attention_mask"].sum(dim=1)
    cache, logits, mask = _prefill(core, batch, positions)
    rows = list(range(len(lengths)))  # of the batch, those that are still in it
    ids: list[list[int]] = [[] for _ in rows]
    chances: list[list[float]] = [[] for _ in rows]
    place = lengths + deltas[:, 0]  # of the first token of each answer
    stop, seen = set(ends), mask.shape[1]
    room = torch.ones((len(rows), max_new_tokens), dtype=torch.bool, device=mask.device)
    visible = None if bool(mask.all()) else torch.cat([mask.bool(), room], dim=1)[:, None, None, :]
    while True:
        logits = logits.float()
        wanted = choose(logits, rows, [ids[row] for row in rows]) if choose is not None else logits
        tokens = wanted.argmax(dim=-1)
        chosen = tokens.tolist()
        known = logits.log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0].tolist() if logprobs else []
        left = []
        for i, row in enumerate(rows):
            if ids[row] and ids[row][-1] in stop:  # has ended, and has not left the batch yet
                continue
            ids[row].append(chosen[i])
            if logprobs:
                chances[row].append(known[i])
            if chosen[i] not in stop and len(ids[row]) < max_new_tokens:
                left.append(i)
        if not left:
            return [Decoded(*row, row[0][-1] in stop) for row in zip(ids, chances, strict=True)]
        if len(left) <= 0.75 * len(rows):
            keep = torch.tensor(left, device=tokens.device)
            cache.batch_select_indices(keep)
            rows = [rows[i] for i in left]
            tokens, place = tokens[keep], place[keep]
            visible = visible[keep] if visible is not None else None
        seen += 1
        hidden = text(
            inputs_embeds=core.get_input_embeddings()(tokens[:, None]),
            attention_mask=None if visible is None else visible[..., :seen],
            position_ids=place[None, :, None].expand(3, -1, 1),
            cache=cache,
            use_cache=True,
        ).last_hidden_state
        place = place + 1
        logits = head(hidden[:, -1])


@contextmanager
def _linear_patches(visual: Any) -> Iterator[None]:
    """Embed patches by a matrix product while this lasts: a convolution whose stride is its kernel is one, only slower."""
    conv = visual.patch_embed.proj
    if type(conv) is not nn.Conv3d or conv.kernel_size != conv.stride or any(conv.padding):
        yield
        return

    def forward(patches: torch.Tensor) -> torch.Tensor:
        rows = nn.functional.linear(patches.flatten(1), conv.weight.flatten(1), conv.bias)
        return rows[:, :, None, None, None]

    conv.forward = forward
    try:
        yield
    finally:
        del conv.forward


def _prefill(
    core: Any, batch: dict[str, Any], positions: torch.Tensor
) -> tuple[DynamicCache, torch.Tensor, torch.Tensor]:
    """Run the prompts; returns their keys and values, the logits behind them (n, vocabulary), and the mask (n, columns)."""
    vision = {key: batch[key] for key in ("pixel_values", "image_grid_thw") if key in batch}
    shared = _shared(batch)
    cache = DynamicCache(config=core.config)
    if shared:
        batch, positions = _move_padding(batch, positions, shared)
        core.model.language_model(
            input_ids=batch["input_ids"][:1, :shared],
            position_ids=positions[:, :1, :shared],
            cache=cache,
            use_cache=True,
        )
        cache.batch_repeat_interleave(len(batch["input_ids"]))
    with _linear_patches(core.model.visual):
        output = core(
            input_ids=batch["input_ids"][:, shared:],
            attention_mask=batch["attention_mask"],
            mm_token_type_ids=batch["mm_token_type_ids"][:, shared:],
            position_ids=positions[..., shared:],
            cache=cache,
            use_cache=True,
            logits_to_keep=1,
            **vision,
        )
    return cache, output.logits[:, -1], batch["attention_mask"]


def _shared(batch: dict[str, Any]) -> int:
    """Count the tokens with which all rows start; of one row, none: there is nobody to share with."""
    ids, mask, types = batch["input_ids"], batch["attention_mask"], batch["mm_token_type_ids"]
    if len(ids) == 1:
        return 0
    longest = ids.shape[1]
    starts = (longest - mask.sum(dim=1)).tolist()
    least = longest - max(starts)
    first = [ids[row, start : start + least] for row, start in enumerate(starts)]
    seen = torch.stack([types[row, start : start + least] for row, start in enumerate(starts)])
    same = (torch.stack(first) == first[0]).all(dim=0) & (seen == 0).all(dim=0)
    differs = (~same).nonzero()
    return int(differs[0]) if len(differs) else 0


def _move_padding(batch: dict[str, Any], positions: torch.Tensor, shared: int) -> tuple[dict[str, Any], torch.Tensor]:
    """Put the padding of each row behind its first `shared` tokens."""
    longest = batch["input_ids"].shape[1]
    starts = longest - batch["attention_mask"].sum(dim=1)
    columns = torch.arange(longest, device=starts.device)[None, :].expand(len(starts), -1)
    source = torch.where(
        columns < shared,
        columns + starts[:, None],
        torch.where(columns < shared + starts[:, None], columns - shared, columns),
    )
    moved = {key: batch[key].gather(1, source) for key in ("input_ids", "attention_mask", "mm_token_type_ids")}
    return {**batch, **moved}, positions.gather(2, source[None].expand(3, -1, -1))

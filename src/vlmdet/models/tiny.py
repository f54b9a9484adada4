"""The embedded base `tiny`: a Qwen2-VL of about 5 million parameters that runs anywhere.

When: PER RUN, wherever a model is named `tiny`; `scripts/build_tiny_base.py` calls the `build_*` functions once.

It has the family's real architecture (`Qwen2VLForConditionalGeneration`: vision tower with 2-D rotary positions, 2x2
patch merger, decoder with multimodal rotary positions), its control tokens and its chat template. Three things are
smaller: width and depth, the vocabulary (about 1,800 pieces), and the pictures (at most 49 image tokens).

One thing differs on purpose. Qwen2-VL splits numbers into digits; here every number from 0 to 999 is one token, and the
rows of the embedding that belong to numbers start as a smooth curve (Fourier features of the value), so that a small
model learns *where* on the scale a coordinate lies rather than ten thousand combinations of digits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

TINY_DIR = Path(__file__).parent / "tiny_base"
"""Where the shipped weights, tokenizer and processor files lie (safetensors, under 12 MB)."""

TINY_MIN_PIXELS = 16 * 28 * 28
TINY_MAX_PIXELS = 49 * 28 * 28
"""The pixel limits that the base was trained under: 16 to 49 image tokens of 28 x 28 pixels."""

CONTROL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Qwen2-VL's control tokens in the order of its ids 151643 to 151656."""

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer(corpus: Iterable[str], *, vocab_size: int = 1800) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE of the tiny base.

    When: once, by `scripts/build_tiny_base.py`.

    Input: `corpus`, text lines whose words shall become pieces; `vocab_size`, pieces in all, control tokens included.
    Output: a tokenizer that can write any Unicode text; every number 0-999 is a single token.
    """
    numbers = [str(value) for value in range(1000)]
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(CONTROL_TOKENS) - 990,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend = Tokenizer(BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.train_from_iterator(corpus, trainer)
    vocab, merges = _with_numbers(backend, numbers)
    backend.model = BPE(vocab=vocab, merges=merges)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(CONTROL_TOKENS),
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def _with_numbers(backend: Tokenizer, numbers: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return vocabulary and merges of a trained BPE with one piece added for each number of two or three digits."""
    import json

    model = json.loads(backend.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    merges = [tuple(pair) for pair in model["merges"]]
    for number in numbers:
        if number not in vocab:
            vocab[number] = len(vocab)
    known = set(merges)
    for number in numbers:
        # both ways to split it: in "910" the pair "10" may be merged before "91" is
        for cut in range(1, len(number)):
            pair = (number[:cut], number[cut:])
            if pair[0] in vocab and pair[1] in vocab and pair not in known:
                merges.append(pair)
    return vocab, merges


def build_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLConfig:
    """Size the tiny Qwen2-VL for a tokenizer.

    When: once, by the build script, and in tests that want an untrained model.
    """
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in CONTROL_TOKENS}
    return Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 256,
            "intermediate_size": 640,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            # The last 12 frequencies carry the column. With the family's theta of 1,000,000 they turn by less than a
            # thousandth of a radian from one edge of so small a picture to the other; with 10, by two radians.
            "rope_parameters": {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [8, 12, 12]},
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 4,
            "embed_dim": 192,
            "num_heads": 4,
            "mlp_ratio": 3,
            "hidden_size": 256,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast, chat_template: str) -> Qwen2VLProcessor:
    """Join tokenizer, picture processor and chat template; the pixel limits are those of the base."""
    size = {"shortest_edge": TINY_MIN_PIXELS, "longest_edge": TINY_MAX_PIXELS}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size),
        chat_template=chat_template,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, *, seed: int = 0) -> Qwen2VLForConditionalGeneration:
    """Make an untrained tiny model whose number tokens start on a smooth curve.

    When: once, by the build script.

    Input: the tokenizer of `build_tokenizer`.
    Output: a float32 model in which the cosine between the embeddings of numbers a and b falls smoothly with |a - b|
    (random Fourier features; Rahimi and Recht, 2007).
    """
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(build_config(tokenizer))
    embedding = model.get_input_embeddings().weight
    ids, values = number_ids(tokenizer)
    hidden = embedding.shape[1]
    periods = torch.logspace(math.log10(2.0), math.log10(80.0), hidden // 4)  # cycles over the scale of 1,000
    phase = 2 * math.pi * values[:, None] / 1000 * periods[None, :] / 2
    curve = torch.cat([phase.cos(), phase.sin()], dim=1)
    basis = torch.linalg.qr(torch.randn(hidden, hidden))[0][: curve.shape[1]]
    with torch.no_grad():
        rows = curve @ basis
        embedding[ids] = rows / rows.norm(dim=1, keepdim=True) * embedding.norm(dim=1).median() * 2
        model.model.language_model.norm.weight.fill_(2.5)  # number tokens are near one another: logits must be steep
    give_positions(model)
    return model


@torch.no_grad()
def give_positions(model: Qwen2VLForConditionalGeneration) -> None:
    """Set the first layer's heads of the language model so that image tokens know their row and column from the start.

    When: once, in `build_model`. Rotary positions are relative, and values carry none, so a token learns where it lies
    only through *how much* it attends to something at a known place: here `<|vision_start|>`, which always stands right
    before the picture. Heads 0 and 1 fade with the column, heads 2 and 3 with the row, one of each pair from the left or
    top and the other from the right or bottom. Without this start the coordinates of answers stayed at their marginal
    distribution for over 700 steps (experiments/LOG.md).
    """
    config = model.config.text_config
    attention = model.model.language_model.layers[0].self_attn
    half = config.hidden_size // config.num_attention_heads // 2
    marker = model.get_input_embeddings().weight[model.config.vision_start_token_id]
    unit = marker / marker.norm()
    loud = math.sqrt(config.hidden_size)  # length of any vector after RMSNorm
    rows = torch.arange(16, 20)  # the four lowest frequencies of the row section: one half turn in about ten rows
    columns = torch.arange(20, 32)
    rate = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(half) / half)
    strength, farthest = 4.5, 9.0
    for group, bands in enumerate((columns, rows)):
        key = torch.zeros(2 * half)
        key[bands] = 1.0
        place = slice(group * 2 * half, (group + 1) * 2 * half)
        attention.k_proj.weight[place] = torch.outer(key, unit) / loud * 4
        attention.v_proj.weight[place] = torch.outer(torch.randn(2 * half), unit) / loud * 2
        for side in range(2):
            head = slice((2 * group + side) * 2 * half, (2 * group + side + 1) * 2 * half)
            turn = rate[bands] * (farthest if side else 0.0)
            query = torch.zeros(2 * half)
            query[bands], query[bands + half] = turn.cos(), -turn.sin()
            scale = strength * math.sqrt(2 * half) / (4 * len(bands))
            attention.q_proj.weight[head].mul_(0.5)
            attention.q_proj.bias[head] = query * scale
            attention.o_proj.weight[:, head].normal_(0, 0.05)


def number_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """List the tokens that are numbers: ids (1000,) int64 and their values (1000,) float32."""
    values = list(range(1000))
    ids = tokenizer.convert_tokens_to_ids([str(value) for value in values])
    return torch.tensor(ids), torch.tensor(values, dtype=torch.float32)

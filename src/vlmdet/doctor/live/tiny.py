"""A small random model of the user's architecture: real classes and names, his vocabulary, hardly any weights.

When: for checks of a built model; nothing is downloaded. `small_config` cuts any configuration down: it keeps ids, patch
sizes and the
shape of the parts, and makes width and depth small.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig

from vlmdet.doctor.calls import NotAvailable
from vlmdet.doctor.evidence import Evidence, family_name

SMALL_ENOUGH = 60_000_000
"""A model of the user's with no more parameters is copied and used as it is."""

CLASSES = {
    "qwen2_vl": "Qwen2VL",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen3_vl": "Qwen3VL",
    "paligemma": "PaliGemma",
    "internvl": "InternVL",
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM",
    "llava": "Llava",
    "florence2": "Florence2",
}
"""Model type to the first part of its class names in transformers."""


@dataclass(frozen=True)
class Tiny:
    """A small model.

    Attributes:
        model: in evaluation mode, float32.
        kind: its model type.
        own: whether it is a copy of the user's own (small) model.
    """

    model: nn.Module
    kind: str
    own: bool


def make_tiny(evidence: Evidence) -> Tiny:
    """Make the small model of a subject.

    Raises:
        NotAvailable: neither the model nor the processor nor the settings say of which architecture.
    """
    subject = evidence.subject
    model = subject.model
    if isinstance(model, nn.Module):
        if sum(one.numel() for one in model.parameters()) <= SMALL_ENOUGH:
            return Tiny(copy.deepcopy(model).float(), str(getattr(model.config, "model_type", "")), True)
        config = model.config
    else:
        config = config_for(model, evidence)
    small = small_config(config, subject.processor)
    return Tiny(random_model(class_of(small), small).eval(), str(small.model_type), False)


def config_for(name: Any, evidence: Evidence) -> PretrainedConfig:
    """Return a configuration of the architecture: of a local directory, else the default one of the family.

    Raises:
        NotAvailable: the family is unknown.
    """
    if isinstance(name, (str, Path)) and (Path(name) / "config.json").is_file():
        values = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
        kind = values.get("model_type")
        if kind in transformers.CONFIG_MAPPING:
            return transformers.CONFIG_MAPPING[kind].from_dict(values)
    kind = family_name(evidence.options, name, evidence.subject.processor)
    if kind not in CLASSES:
        raise NotAvailable("settings['model_name'] or model, of a family that is known")
    return getattr(transformers, f"{CLASSES[kind]}Config")()


def class_of(config: PretrainedConfig) -> type[Any]:
    """Return the class that generates with a configuration."""
    for mapping in ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"):
        try:
            return getattr(transformers, mapping)._model_mapping[type(config)]
        except KeyError:
            continue
    raise NotAvailable(f"a model that generates; {type(config).__name__} has none")


def random_model(kind: type[Any], config: PretrainedConfig) -> Any:
    """Make a model with random weights, the same each time, without touching the random state of the caller."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = copy.deepcopy(config)
        config._attn_implementation = "sdpa" if getattr(kind, "_supports_sdpa", True) else "eager"
        return kind(config)


_WIDTHS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_window_layers": 2,
}


def small_config(config: PretrainedConfig, processor: Any) -> PretrainedConfig:
    """Cut a configuration down: width 64, two layers; ids and vocabulary of the user's processor."""
    small = copy.deepcopy(config)
    tokenizer = getattr(processor, "tokenizer", processor)
    text = getattr(small, "text_config", small)
    vision = getattr(small, "vision_config", None)
    for holder in {id(one): one for one in (text, small)}.values():
        for name, value in _WIDTHS.items():
            if isinstance(getattr(holder, name, None), int):
                setattr(holder, name, value)
        if getattr(holder, "layer_types", None):
            holder.layer_types = list(holder.layer_types)[:2]
        if (
            tokenizer is not None
            and hasattr(tokenizer, "__len__")
            and isinstance(getattr(holder, "vocab_size", None), int)
        ):
            holder.vocab_size = len(tokenizer)
    if "qwen" in str(getattr(small, "model_type", "")):
        text.rope_parameters = {**(getattr(text, "rope_parameters", None) or {}), "mrope_section": [2, 3, 3]}
        text.rope_parameters.setdefault("rope_type", "default")
        text.rope_parameters.setdefault("rope_theta", 10_000.0)
    if vision is not None:
        _small_vision(vision, str(getattr(small, "model_type", "")))
        patch = getattr(getattr(processor, "image_processor", None), "patch_size", None)
        if isinstance(patch, int) and isinstance(getattr(vision, "patch_size", None), int):
            vision.patch_size = patch  # patches are cut by the processor, whichever release of the family it is of
    for name in ("projection_dim", "vision_feature_dim"):
        if isinstance(getattr(small, name, None), int):
            setattr(small, name, 64)
    if vision is not None and isinstance(getattr(vision, "projection_dim", None), int):
        vision.projection_dim = 64
    _set_ids(small, text, processor, tokenizer)
    small.tie_word_embeddings = text.tie_word_embeddings = True
    return small


def _small_vision(vision: Any, kind: str) -> None:
    if kind == "qwen2_vl":
        vision.depth, vision.embed_dim, vision.num_heads, vision.mlp_ratio, vision.hidden_size = 2, 32, 2, 2, 64
    elif kind in ("qwen2_5_vl", "qwen3_vl", "qwen2_5_vl_vision"):
        vision.depth, vision.hidden_size, vision.num_heads, vision.intermediate_size, vision.out_hidden_size = (
            2,
            32,
            2,
            48,
            64,
        )
        if hasattr(vision, "fullatt_block_indexes"):
            vision.fullatt_block_indexes = [1]
        if hasattr(vision, "deepstack_visual_indexes"):
            vision.deepstack_visual_indexes = [0]
    else:
        for name, value in {**_WIDTHS, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}.items():
            if isinstance(getattr(vision, name, None), int):
                setattr(vision, name, value)


def _set_ids(small: Any, text: Any, processor: Any, tokenizer: Any) -> None:
    if tokenizer is None:
        return
    known = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    words = {
        "image_token_id": ("<|image_pad|>", "<IMG_CONTEXT>", "<image>"),
        "image_token_index": ("<image>", "<|image_pad|>"),
        "video_token_id": ("<|video_pad|>",),
        "vision_start_token_id": ("<|vision_start|>",),
        "vision_end_token_id": ("<|vision_end|>",),
    }
    for name, options in words.items():
        if hasattr(small, name):
            own = getattr(processor, name, None)
            value = own if isinstance(own, int) else next((known[word] for word in options if word in known), None)
            if value is not None:
                setattr(small, name, value)
    for holder in (small, text):
        for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
            setattr(holder, name, getattr(tokenizer, name, None))

"""Load a model and its processor: the embedded base, a base of any family, or what a run has tuned, stage upon stage.

When: PER RUN. Weights are read as safetensors only; remote code is never run.

Long, because what is loaded is held here against what a contract says of it: weights, 4-bit areas, processor, fingerprint.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

import vlmdet
from vlmdet.contract import SCHEMA, Contract, permitted, refuse_mismatch
from vlmdet.errors import ConfigError, ModelError
from vlmdet.grounding import PIXEL_CODECS, get_codec
from vlmdet.grounding.questions import question_of
from vlmdet.models.families import AREA_PATTERNS, FAMILIES, area_of, codec_of, is_quantised
from vlmdet.models.fingerprint import fingerprint, weight_files
from vlmdet.models.lora import merge_adapter, refuse_zero_adapter
from vlmdet.models.processors import is_other_family, pixel_limits, seen_size, show_whole_pictures
from vlmdet.models.stages import stages_of
from vlmdet.models.tiny import TINY_DIR

Quantization = Literal["none", "nf4"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

SEEING = ("vision", "merger", "deepstack")
"""Areas that stay unquantised unless asked: a tower in 4 bits sees worse, and boxes are the first to show it."""


@dataclass(frozen=True)
class Loaded:
    """A model ready for use.

    Attributes:
        model: in evaluation mode, on its device.
        processor: with the pixel limits of `min_pixels` and `max_pixels`.
        base: id or path of the base; `tiny` for the embedded one; of a run, what its contract names; of a stage that was
            loaded `as_base`, its folder.
        base_fingerprint: hash of that base's files, as found now; for a fully tuned model, whose base is not at hand, the one
            that its contract names.
        contract: what the run assumed that tuned it; None for a base.
    """

    model: Any
    processor: Any
    base: str
    base_fingerprint: str
    contract: Contract | None = None


def load(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    attention: str = "sdpa",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    quantization: Quantization = "none",
    quantize_vision: bool = False,
    as_base: bool = False,
) -> Loaded:
    """Load a base or a tuned model by what a user types.

    When: once per run.

    Input: `name`, `tiny`, a hub id, a folder of weights, a run or a checkpoint; `dtype`, `auto` is float32 on a CPU and
    bfloat16 on a GPU that has it; `device`, `auto` is this process's GPU, else the CPU, and `cuda` that GPU; `attention`,
    `sdpa`, `eager` or `flash_attention_2`; pixel limits, needed for a base other than `tiny`; a run brings its own.
    `quantization`, `nf4` holds the linear layers of the language model in 4 bits (double quantisation, arithmetic in `dtype`),
    and with `quantize_vision` those of the vision tower and its mergers; head and embeddings never. `as_base`, what is named is
    the base of a next stage: an adapter on it is merged into it, its contract is not handed on, and pixel limits that are given
    hold.
    Output: of a run whose base is a run: stages below are merged in memory, and the named one's adapter lies on top.

    Raises:
        ModelError: not found, no model that reads pictures, weights that are no safetensors or quantised already, no pixel
            limits, bitsandbytes missing, or a base that is not the one that a contract names.
        ConfigError: 4 bits were asked for below an adapter that must be merged first.
        TrainingError: the adapter of a run is empty or all zero.
    """
    stages = stages_of(name)
    run = stages.folders[-1] if stages.folders else None
    contract = Contract.read(run) if run else None
    if contract is not None and not (as_base and min_pixels and max_pixels):
        min_pixels, max_pixels = contract.min_pixels, contract.max_pixels
    below = stages.adapters if as_base else stages.adapters[:-1]
    if quantization != "none" and below:
        raise ConfigError(
            f"{name}: the adapter {below[-1]} lies under what is asked for, and an adapter is never merged into 4-bit weights",
            f"run `vlmdet merge {below[-1]}` first and name its result, or use model.quantization=none",
        )
    where = _device(device)
    model = _load_weights(
        stages.weights,
        dtype=_dtype(dtype, where),
        device=where,
        attention=attention,
        quantization=quantization,
        quantize_vision=quantize_vision,
    )
    for folder in below:
        model = merge_adapter(_with_adapter(model, folder))
    if run is not None and run in stages.adapters:
        assert contract is not None
        found = fingerprint(contract.base_model)
        if found != contract.base_fingerprint:
            raise ModelError(
                f"{name} was tuned on a base with fingerprint {contract.base_fingerprint}, but {contract.base_model} now has "
                f"{found}",
                "restore the base that the contract names",
            )
        if not as_base:
            model = _with_adapter(model, run)
    if contract is not None and not as_base:
        base, found = contract.base_model, contract.base_fingerprint
    else:
        base = name if run is None else str(run)
        contract, found = None, fingerprint(base)
    processor = load_processor(str(run or name), min_pixels=min_pixels, max_pixels=max_pixels)
    return Loaded(model.to(where).eval(), processor, base, found, contract)


def load_without_weights(name: str, *, min_pixels: int | None = None, max_pixels: int | None = None) -> Loaded:
    """Load what is known of a base or a tuned model but its weights: for one that a server has.

    When: once per run with `--engine openai`; no weights are read, and none are needed on this disk.

    Input: as `load`. Output: as `load`; of the model, `config` alone. `base_fingerprint` is what the contract names; of a base,
    "": nobody looks at its files.

    Raises:
        ModelError, ContractError: as `load`.
    """
    stages = stages_of(name)
    run = stages.folders[-1] if stages.folders else None
    contract = Contract.read(run) if run else None
    if contract is not None:
        min_pixels, max_pixels = contract.min_pixels, contract.max_pixels
    _, config = _config_of(stages.weights)
    processor = load_processor(str(run or name), min_pixels=min_pixels, max_pixels=max_pixels)
    model = SimpleNamespace(config=config)
    if contract is None:
        return Loaded(model, processor, name, "")
    return Loaded(model, processor, contract.base_model, contract.base_fingerprint, contract)


def _with_adapter(model: Any, folder: Path) -> Any:
    """Lay the adapter of a checkpoint on a model."""
    weight_files(str(folder), adapter=True)  # PEFT would read a pickle where there are no safetensors
    wrapped = PeftModel.from_pretrained(model, str(folder), config=PeftConfig.from_pretrained(str(folder)))
    refuse_zero_adapter(wrapped, str(folder))
    return wrapped


def _load_weights(
    name: str,
    *,
    dtype: torch.dtype,
    device: str,
    attention: str,
    quantization: Quantization,
    quantize_vision: bool,
) -> Any:
    path, _ = _config_of(name)
    four_bits: dict[str, Any] = {}
    if quantization == "nf4":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ModelError(
                "4-bit weights need bitsandbytes, which is not installed", "pip install 'vlmdet[quantization]'"
            )
        kept = [area for area in AREA_PATTERNS if not (quantize_vision and area in SEEING)]
        four_bits = {
            "device_map": {"": device},
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
                # Matched from the start of a module's name: "visual" alone would leave out nothing of `model.visual`.
                llm_int8_skip_modules=[f".*({AREA_PATTERNS[area]})" for area in kept],
            ),
        }
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, attn_implementation=attention, use_safetensors=True, trust_remote_code=False, **four_bits
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"{name}: cannot be loaded ({' '.join(str(error).split())[:300]})") from error
    _check_four_bits(model, name, asked=quantization == "nf4", quantize_vision=quantize_vision)
    if model.config.is_encoder_decoder:
        _take_shift_labels(model)
    return model


def _take_shift_labels(model: Any) -> None:
    """Let an encoder-decoder be called with `shift_labels` too: TRL's loss needs them, and Florence-2's own stumbles over them.

    There they equal `labels`, which its `forward` takes as they are (transformers 5.24 passes `shift_labels` on twice).
    """
    own = model.forward

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(*args: Any, shift_labels: Any = None, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    model.forward = forward


def _check_four_bits(model: nn.Module, name: str, *, asked: bool, quantize_vision: bool) -> None:
    """Look which layers really are in 4 bits: the library's list of exceptions fails silently."""
    areas: dict[str, str] = {}
    for key, weight in model.named_parameters():
        if is_quantised(weight):
            areas.setdefault(area_of(key), key)
    wrong = set(areas) - ({"language"} if asked else set()) - (set(SEEING) if quantize_vision else set())
    if wrong:
        area = min(wrong)
        raise ModelError(
            f"{name}: {areas[area]} is in 4 bits, and the area '{area}' was not to be quantised",
            "set model.quantize_vision=true if the vision tower shall be" if area in SEEING else "report this as a bug",
        )
    if asked and "language" not in areas:
        raise ModelError(
            f"{name}: 4 bits were asked for, and no layer of its language model is", "use quantization=none"
        )


def _config_of(name: str) -> tuple[str, Any]:
    """Return where a base lies and its configuration.

    Raises:
        ModelError: there is none, it reads no pictures, or its weights are quantised already.
    """
    path = str(TINY_DIR) if name == "tiny" else name
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise ModelError(f"{name}: no config.json in that folder", f"it holds {_listing(Path(path))}")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{name}: cannot be loaded ({' '.join(str(error).split())[:300]})") from error
    if config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ModelError(
            f"{name} is a '{config.model_type}', which reads no pictures",
            f"take a {', '.join(FAMILIES)}, or another that does",
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{name}: its weights are quantised already, so that neither its fingerprint nor a merge would be of the true ones",
            "name the unquantised base, with model.quantization=nf4",
        )
    return path, config


def build_skeleton(name: str, *, quantization: Quantization = "none", quantize_vision: bool = False) -> Any:
    """Build a model of the true architecture without weights, to count and to resolve names.

    When: per plan; seconds and no memory even for the largest model.

    Input: `tiny`, a hub id, or a folder that may hold a `config.json` alone; a run or checkpoint counts as its base.
    `quantization`, `quantize_vision` as in `load`: weights that would be held in 4 bits are marked, so that
    `parameters_by_area` counts them as quantised; bitsandbytes is not needed.
    Output: a model on torch's `meta` device. An adapter goes on by `get_peft_model(…, low_cpu_mem_usage=True)`, at once.

    Raises:
        ModelError: as `load`.
    """
    _, config = _config_of(stages_of(name).weights)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    model.tie_weights()
    if quantization == "nf4":
        areas = ("language", *SEEING) if quantize_vision else ("language",)
        for key, module in model.named_modules():
            if isinstance(module, nn.Linear) and area_of(f"{key}.weight") in areas:
                module.weight.planned_nf4 = True
                module.weight.requires_grad_(False)
    return model


def load_processor(name: str, *, min_pixels: int | None, max_pixels: int | None) -> Any:
    """Load the processor of a base or run, with explicit pixel limits; of a family with one size, without.

    Raises:
        ModelError: there is none, or limits are missing for another Qwen-VL than `tiny`, or differ from a family's one size.
    """
    if name == "tiny":
        name = str(TINY_DIR)
        size = json.loads((TINY_DIR / "processor_config.json").read_text(encoding="utf-8"))["image_processor"]["size"]
        min_pixels = size["shortest_edge"] if min_pixels is None else min_pixels
        max_pixels = size["longest_edge"] if max_pixels is None else max_pixels
    try:
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"{name}: no processor ({' '.join(str(error).split())[:300]})") from error
    if is_other_family(processor):
        show_whole_pictures(processor)
        width, height = seen_size(processor)
        for limit in (min_pixels, max_pixels):
            if limit is not None and limit != width * height:
                raise ModelError(
                    f"{name} sees every picture at {width} x {height}, so that a limit of {limit} pixels cannot hold",
                    "leave model.min_pixels and model.max_pixels out",
                )
        processor.tokenizer.padding_side = "right"
        return processor
    if min_pixels is None or max_pixels is None:
        raise ModelError(
            f"{name}: no pixel limits; the processor's own limit lets one picture cost up to 16,384 tokens",
            "set model.min_pixels and model.max_pixels, e.g. 12544 and 1003520",
        )
    processor.image_processor.size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    processor.tokenizer.padding_side = "right"
    return processor


def make_contract(
    loaded: Loaded,
    *,
    labels: Sequence[str],
    codec: str = "auto",
    box_order: str,
    max_new_tokens: int,
    data_fingerprint: str,
) -> Contract:
    """Write down what a run with this model assumes.

    When: once when training is prepared, and again at every later use, to be compared with what was written then.

    Input: a loaded model; `labels` that are asked for; `codec`, `auto` for the family's own; the rest as it goes into the
    contract.

    Raises:
        ConfigError: the codec writes pixels as Qwen-VL resizes, and the model is another.
    """
    processor = loaded.processor
    codec = codec_of(loaded.model, codec)
    if codec in PIXEL_CODECS and is_other_family(processor):
        raise ConfigError(
            f"{codec} writes pixels of the picture as Qwen-VL resizes it, and {loaded.base} is a "
            f"{loaded.model.config.model_type}",
            "leave model.codec at auto",
        )
    system_prompt, user_prompt = question_of(codec, labels)
    min_pixels, max_pixels, size_factor = pixel_limits(processor)
    return Contract(
        schema=SCHEMA,
        system_prompt=system_prompt,
        user_prompt=user_prompt,
        template_sha256=hashlib.sha256((processor.chat_template or "").encode()).hexdigest(),
        codec=codec,
        codec_version=get_codec(codec).VERSION,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        size_factor=size_factor,
        box_order=box_order,
        labels=tuple(labels),
        base_model=loaded.base,
        base_fingerprint=loaded.base_fingerprint,
        data_fingerprint=data_fingerprint,
        decoding={"do_sample": False, "max_new_tokens": max_new_tokens},
        versions={"python": platform.python_version(), "vlmdet": vlmdet.__version__}
        | {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
    )


def refuse_other_contract(
    loaded: Loaded, contract: Contract, *, allow: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Stop where a model, its processor or this version of the tool would ask or read otherwise than a contract says.

    When: per run, before a model that was tuned, or the base beside it, is asked anything.

    Input: `allow`, fields that the user permits to differ. Output: of these, both values: see `contract.permitted`.

    Raises:
        ContractError: see `contract.refuse_mismatch`.
    """
    now = make_contract(
        loaded,
        labels=contract.labels,
        codec=contract.codec,
        box_order=contract.box_order,
        max_new_tokens=int(contract.decoding["max_new_tokens"]),
        data_fingerprint=contract.data_fingerprint,
    )
    refuse_mismatch(contract, now, allow=allow)
    return permitted(contract, now, allow)


def _device(device: str) -> str:
    if device == "auto" and not torch.cuda.is_available():
        return "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"device {device}: no CUDA device is usable here", "use model.device=cpu")
    # each process that a launcher starts has a GPU of its own
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device in ("auto", "cuda") else device


def _dtype(dtype: str, device: str) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if device.startswith("cuda") and torch.cuda.is_bf16_supported() else torch.float32
    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype '{dtype}'", f"there is: auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _listing(folder: Path) -> str:
    names = sorted(child.name for child in folder.iterdir())
    return ", ".join(names[:8]) + (" …" if len(names) > 8 else "") or "nothing"

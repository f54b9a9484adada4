"""Load a model and its processor: the embedded base, any Qwen2-VL, or what a run has tuned.

When: PER RUN. Weights are read as safetensors only; remote code is never run.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration
from transformers.utils import logging as transformers_logging

import vlmdet
from vlmdet.contract import SCHEMA, Contract
from vlmdet.errors import ModelError
from vlmdet.grounding import get_codec
from vlmdet.grounding.codec import escape_label
from vlmdet.grounding.prompts import SYSTEM_PROMPT, build_user_prompt
from vlmdet.models.families import codec_of
from vlmdet.models.lora import refuse_zero_adapter
from vlmdet.models.tiny import TINY_DIR
from vlmdet.runs import find_run

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Loaded:
    """A model ready for use.

    Attributes:
        model: in evaluation mode, on its device.
        processor: with the pixel limits of `min_pixels` and `max_pixels`.
        base: id or path of the base; `tiny` for the embedded one.
        base_fingerprint: hash of the base's tensors, as found now for a base or an adapter's base; for a fully tuned model,
            whose base is not at hand, the one that its contract names.
        contract: what the run assumed that tuned it; None for a base.
    """

    model: Any
    processor: Any
    base: str
    base_fingerprint: str
    contract: Contract | None = None


def checkpoint_of(name: str) -> Path | None:
    """Find the weights that a user means by the name of a run or of a checkpoint folder; None where it is neither."""
    if name == "tiny":  # always the embedded base, whatever lies in ./tiny or runs/tiny
        return None
    folder = Path(name)
    if (folder / "contract.json").is_file() and any(
        (folder / f).is_file() for f in ("config.json", "adapter_config.json")
    ):
        return folder
    run = find_run(name)
    return (run / "checkpoints" / "best").resolve() if run else None


def load(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    attention: str = "sdpa",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> Loaded:
    """Load a base or a tuned model by what a user types.

    When: once per run.

    Input: `name`, `tiny`, a hub id, a folder of weights, or a run; `dtype`, `auto` is float32 on a CPU and bfloat16 on a
    GPU that has it; `device`, `auto` is the first GPU, else the CPU; `attention`, `sdpa`, `eager` or
    `flash_attention_2`; pixel limits, needed for a base other than `tiny`; a run brings its own.

    Raises:
        ModelError: not found, not a Qwen2-VL, weights that are no safetensors, or no pixel limits.
        TrainingError: the adapter of a run is empty or all zero.
    """
    run = checkpoint_of(name)
    contract = Contract.read(run) if run else None
    if contract is not None:
        min_pixels, max_pixels = contract.min_pixels, contract.max_pixels
    base = contract.base_model if contract is not None else name
    adapter = run is not None and (run / "adapter_config.json").is_file()
    weights = base if run is None or adapter else str(run)
    where = _device(device)
    model = _load_base(weights, dtype=_dtype(dtype, where), attention=attention)
    found = contract.base_fingerprint if contract is not None and not adapter else fingerprint(model)
    if contract is not None and run is not None and adapter:
        if found != contract.base_fingerprint:
            raise ModelError(
                f"{name} was tuned on a base with fingerprint {contract.base_fingerprint}, but {base} now has {found}",
                "restore the base that the contract names",
            )
        if not (run / "adapter_model.safetensors").is_file():
            raise ModelError(f"{name}: {run} holds no adapter_model.safetensors", "other weight files are never read")
        model = PeftModel.from_pretrained(model, str(run), config=PeftConfig.from_pretrained(str(run)))
        refuse_zero_adapter(model, name)
    processor = load_processor(str(run) if run else base, min_pixels=min_pixels, max_pixels=max_pixels)
    return Loaded(model.to(where).eval(), processor, base, found, contract)


def _load_base(name: str, *, dtype: torch.dtype, attention: str) -> Any:
    path = str(TINY_DIR) if name == "tiny" else name
    config = Path(path) / "config.json"
    if Path(path).is_dir():
        if not config.is_file():
            raise ModelError(f"{name}: no config.json in that folder", f"it holds {_listing(Path(path))}")
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
        if kind != "qwen2_vl":
            raise ModelError(f"{name} is a '{kind}', not a qwen2_vl", "only Qwen2-VL is supported so far")
    elif Path(path).is_absolute() or path.startswith((".", "runs/")):
        raise ModelError(
            f"{name}: no such folder, or no finished run in it", "name a run, a folder of weights or a hub id"
        )
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        return Qwen2VLForConditionalGeneration.from_pretrained(
            path, dtype=dtype, attn_implementation=attention, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{name}: cannot be loaded ({' '.join(str(error).split())[:300]})") from error


def load_processor(name: str, *, min_pixels: int | None, max_pixels: int | None) -> Any:
    """Load the processor of a base or run, with explicit pixel limits.

    Raises:
        ModelError: there is none, or limits are missing for another base than `tiny`.
    """
    if name == "tiny":
        name = str(TINY_DIR)
        size = json.loads((TINY_DIR / "processor_config.json").read_text(encoding="utf-8"))["image_processor"]["size"]
        min_pixels = size["shortest_edge"] if min_pixels is None else min_pixels
        max_pixels = size["longest_edge"] if max_pixels is None else max_pixels
    if min_pixels is None or max_pixels is None:
        raise ModelError(
            f"{name}: no pixel limits; the processor's own limit lets one picture cost up to 16,384 tokens",
            "set model.min_pixels and model.max_pixels, e.g. 12544 and 1003520",
        )
    try:
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{name}: no processor ({' '.join(str(error).split())[:300]})") from error
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
    """
    processor = loaded.processor
    return Contract(
        schema=SCHEMA,
        system_prompt=SYSTEM_PROMPT,
        user_prompt=build_user_prompt([escape_label(label) for label in labels]),
        template_sha256=hashlib.sha256(processor.chat_template.encode()).hexdigest(),
        codec=codec_of(loaded.model, codec),
        codec_version=get_codec(codec_of(loaded.model, codec)).VERSION,
        min_pixels=processor.image_processor.size["shortest_edge"],
        max_pixels=processor.image_processor.size["longest_edge"],
        size_factor=processor.image_processor.patch_size * processor.image_processor.merge_size,
        box_order=box_order,
        labels=tuple(labels),
        base_model=loaded.base,
        base_fingerprint=loaded.base_fingerprint,
        data_fingerprint=data_fingerprint,
        decoding={"do_sample": False, "max_new_tokens": max_new_tokens},
        versions={"python": platform.python_version(), "vlmdet": vlmdet.__version__}
        | {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
    )


def fingerprint(model: Any) -> str:
    """Hash some of a base's tensors, the first values of each, so that a changed base is noticed.

    Output: 16 hexadecimal digits. The values are rounded to bfloat16 first, so that the data type in which a checkpoint is
    loaded does not matter.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.endswith(("norm.weight", "proj.weight", "qkv.weight", "embed_tokens.weight")):
            head = tensor.detach().flatten()[:64].to("cpu", torch.bfloat16).view(torch.int16)
            digest.update(name.encode() + head.numpy().tobytes())
    return digest.hexdigest()[:16]


def _device(device: str) -> str:
    if device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"device {device}: no CUDA device is usable here", "use model.device=cpu")
    return device


def _dtype(dtype: str, device: str) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if device.startswith("cuda") and torch.cuda.is_bf16_supported() else torch.float32
    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype '{dtype}'", f"there is: auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _listing(folder: Path) -> str:
    names = sorted(child.name for child in folder.iterdir())
    return ", ".join(names[:8]) + (" …" if len(names) > 8 else "") or "nothing"

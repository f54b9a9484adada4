"""A hash of a base by its files, so that a changed base is noticed under whatever name it lies.

When: PER RUN, when a model is loaded. Read from the files and not from the loaded model: 4-bit weights, the data type, the
device and the names that a version of transformers gives to modules change nothing. Only safetensors are read.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from vlmdet.errors import ModelError
from vlmdet.models.stages import stages_of
from vlmdet.models.tiny import TINY_DIR

HEAD = 64
"""Values that are read of each tensor: any training moves all tensors, and 64 of each are found in milliseconds."""


def fingerprint(name: str) -> str:
    """Hash the weights that a name stands for.

    When: once per load; the files are there by then.

    Input: `tiny`, a hub id whose files are in the cache or can be fetched, a folder of weights, a run or a checkpoint.
    Output: 16 hexadecimal digits. Of a base or a fully tuned stage they come from its own files; of adapters on top, from those
    and each adapter's, in order.

    Raises:
        ModelError: there are no safetensors, or they are broken.
    """
    stages = stages_of(name)
    hashes = [_hash_files(weight_files(stages.weights))]
    hashes += [_hash_files(weight_files(str(folder), adapter=True)) for folder in stages.adapters]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:16]


def weight_files(name: str, *, adapter: bool = False) -> list[Path]:
    """Find the safetensors of a base or adapter: one file, or those that an index lists.

    Input: `tiny`, a hub id, or a folder.

    Raises:
        ModelError: there are none.
    """
    where = str(TINY_DIR) if name == "tiny" else name
    one = "adapter_model.safetensors" if adapter else "model.safetensors"
    single = _find(where, one)
    if single is not None:
        return [single]
    index = None if adapter else _find(where, f"{one}.index.json")
    if index is None:
        raise ModelError(f"{name}: holds no {one}", "other weight files are never read")
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: is no index of weights", "download the base again") from error
    found = [None if Path(shard).name != shard else _find(where, shard) for shard in shards]
    if None in found:
        raise ModelError(f"{name}: {shards[found.index(None)]} is listed and not there", "download the base again")
    return [file for file in found if file is not None]


def _find(where: str, file: str) -> Path | None:
    try:
        found = cached_file(where, file, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{where}: {file} cannot be reached ({' '.join(str(error).split())[:200]})") from error
    return None if found is None else Path(found)


def _hash_files(files: list[Path]) -> str:
    """Hash name and first values of every tensor, rounded to bfloat16, in the order of their names."""
    heads: dict[str, bytes] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118  # it is no dict
                    piece = tensors.get_slice(key)
                    sides = piece.get_shape()
                    head = (
                        piece[(slice(0, 1),) * (len(sides) - 1) + (slice(0, HEAD),)]
                        if sides
                        else tensors.get_tensor(key)
                    )
                    values = head.flatten().to(torch.bfloat16).view(torch.int16)
                    heads[_plain_name(key)] = values.numpy().tobytes()
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{file}: cannot be read ({error})", "it is cut off or no safetensors; copy it again"
            ) from error
    if heads.get("lm_head.weight") == heads.get("embed_tokens.weight"):
        heads.pop("lm_head.weight", None)  # tied: written by some, left out by others
    digest = hashlib.sha256()
    for name, values in sorted(heads.items()):
        digest.update(name.encode() + b"\0" + values)
    return digest.hexdigest()[:16]


def _plain_name(key: str) -> str:
    """Take off what transformers 4.52 moved about: `model.visual.x` is `visual.x`, `model.language_model.x` is `model.x`."""
    return re.sub(r"^(model\.|language_model\.)+", "", key)

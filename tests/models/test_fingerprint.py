"""The fingerprint follows the weights: not how they are stored, named, split or loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmdet.errors import ModelError
from vlmdet.models.fingerprint import fingerprint, weight_files


@pytest.fixture
def tensors(family_base: Callable[[str], Path]) -> dict[str, torch.Tensor]:
    return load_file(family_base("qwen3_vl") / "model.safetensors")


def folder_of(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    return str(path)


def test_data_type_and_prefixes_do_not_count(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    first = fingerprint(folder_of(tmp_path / "a", tensors))
    assert len(first) == 16
    assert int(first, 16) >= 0
    short = {key: tensor.to(torch.bfloat16) for key, tensor in tensors.items()}
    assert fingerprint(folder_of(tmp_path / "b", short)) == first
    # as hubs have them from before transformers 4.52
    old = {
        key.replace("model.visual.", "visual.").replace("model.language_model.", "model."): tensor
        for key, tensor in tensors.items()
    }
    assert set(old) != set(tensors)
    assert fingerprint(folder_of(tmp_path / "c", old)) == first
    tied = old | {"lm_head.weight": tensors["model.language_model.embed_tokens.weight"].clone()}
    assert fingerprint(folder_of(tmp_path / "d", tied)) == first
    untied = old | {"lm_head.weight": tensors["model.language_model.embed_tokens.weight"] * 2}
    assert fingerprint(folder_of(tmp_path / "e", untied)) != first


@pytest.mark.parametrize("key", ["model.visual.blocks.1.attn.qkv.weight", "model.visual.blocks.0.norm1.bias"])
def test_a_changed_tensor_counts(tmp_path: Path, tensors: dict[str, torch.Tensor], key: str) -> None:
    first = fingerprint(folder_of(tmp_path / "a", tensors))
    changed = tensors[key].clone()
    changed.view(-1)[0] += 1
    assert fingerprint(folder_of(tmp_path / "b", tensors | {key: changed})) != first


def test_a_base_in_parts_is_the_same_base(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    whole = folder_of(tmp_path / "whole", tensors)
    parts = tmp_path / "parts"
    parts.mkdir()
    names = sorted(tensors)
    shards = {
        "model-00001-of-00002.safetensors": names[:20],
        "model-00002-of-00002.safetensors": names[20:],
    }
    for file, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, parts / file)
    index = {"weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (parts / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [path.name for path in weight_files(str(parts))] == list(shards)
    assert fingerprint(str(parts)) == fingerprint(whole)

    (parts / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors is listed and not there"):
        fingerprint(str(parts))
    index["weight_map"][names[0]] = "../../whole/model.safetensors"
    (parts / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="is listed and not there"):
        fingerprint(str(parts))
    (parts / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match="is no index of weights"):
        fingerprint(str(parts))


def test_what_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"holds no model\.safetensors; other weight files are never read"):
        fingerprint(str(folder))
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read"):
        fingerprint(str(folder))


def test_the_embedded_base_is_itself_under_another_path(tmp_path: Path) -> None:
    from vlmdet.models.tiny import TINY_DIR

    shutil.copytree(TINY_DIR, tmp_path / "copy")
    assert fingerprint(str(tmp_path / "copy")) == fingerprint("tiny")

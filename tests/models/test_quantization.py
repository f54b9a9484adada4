"""NF4 for real, on the CPU: what is in 4 bits, what is not, and that adapters learn through it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from torch import nn

from vlmdet.boxes import Boxes
from vlmdet.data.collators import Qwen2VLCollatorV3
from vlmdet.data.dataset import build_messages
from vlmdet.errors import ModelError, TrainingError
from vlmdet.grounding import View
from vlmdet.models import loader
from vlmdet.models.families import is_quantised, parameters_by_area, resolve_targets
from vlmdet.models.loader import Loaded, load
from vlmdet.models.lora import build_lora_config, format_areas, train_only

pytest.importorskip("bitsandbytes")

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
JOINT = ("language.attn", "language.mlp", "vision.attn", "vision.mlp")
LIMITS: dict[str, Any] = {"min_pixels": 4096, "max_pixels": 16384}


def four_bit(model: nn.Module) -> list[str]:
    return [name.removesuffix(".weight") for name, weight in model.named_parameters() if is_quantised(weight)]


def batch_of(loaded: Loaded, model_type: str) -> Any:
    rng = np.random.default_rng(0)
    rows = []
    for width, height in ((90, 60), (64, 128)):
        messages = build_messages(
            ["sign"],
            boxes=Boxes(np.array([[0.1, 0.2, 0.6, 0.7]])),
            labels=["sign"],
            view=View(width, height, width, height),
            codec=model_type,
        )
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        rows.append({"messages": messages, "image": picture})
    return Qwen2VLCollatorV3(loaded.processor, **LIMITS)(rows)


@pytest.mark.parametrize("model_type", QWEN)
def test_the_language_model_alone_is_in_four_bits(family_base: Callable[[str], Path], model_type: str) -> None:
    folder = str(family_base(model_type))
    plain = load(folder, **LIMITS)
    loaded = load(folder, quantization="nf4", **LIMITS)
    assert four_bit(loaded.model) == resolve_targets(loaded.model, ["language.attn", "language.mlp"])
    assert loaded.base_fingerprint == plain.base_fingerprint
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.float32, torch.uint8}
    weights = dict(plain.model.named_parameters())
    for name, weight in loaded.model.named_parameters():
        if not is_quantised(weight):  # not a bit of what stays is changed
            assert torch.equal(weight, weights[name]), name

    counts = parameters_by_area(loaded.model.requires_grad_(False).named_parameters())
    # two layers of width 64, a key-value head of 32, an MLP of 128; two values in each byte
    assert counts["language"]["quantised"] == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert not any(count["quantised"] for area, count in counts.items() if area != "language")
    table = [line.split() for line in format_areas(counts).splitlines()]
    assert table[0] == ["area", "trainable", "frozen", "quantised"]
    assert next(line for line in table if line[0] == "language")[3] == "73,728"
    assert table[-1][0] == "all"
    assert sum(int(number.replace(",", "")) for number in table[-1][1:]) == sum(map(torch.numel, weights.values()))


@pytest.mark.parametrize("model_type", QWEN)
def test_the_vision_tower_is_quantised_when_asked_and_the_head_never(
    family_base: Callable[[str], Path], model_type: str
) -> None:
    loaded = load(str(family_base(model_type)), quantization="nf4", quantize_vision=True, **LIMITS)
    roles = [*JOINT, "merger", *(["deepstack"] if model_type == "qwen3_vl" else [])]
    assert four_bit(loaded.model) == resolve_targets(loaded.model, roles)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", QWEN)
def test_every_matrix_of_r4_learns_over_a_four_bit_base(
    family_base: Callable[[str], Path], model_type: str, dtype: str
) -> None:
    loaded = load(str(family_base(model_type)), dtype=dtype, quantization="nf4", **LIMITS)
    config = build_lora_config(loaded.model, rank=4, alpha=8, dropout=0.0, targets=JOINT)
    targets, seeing = resolve_targets(loaded.model, JOINT), resolve_targets(loaded.model, ["vision.attn", "vision.mlp"])
    before = {name: weight.detach().clone() for name, weight in loaded.model.named_parameters()}
    model = get_peft_model(loaded.model, config).train()
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # zero at first, and A then learns nothing in the first step
            nn.init.normal_(weight, std=0.02)
    batch = batch_of(loaded, model_type)
    batch["pixel_values"] = batch["pixel_values"].to(loaded.model.dtype)
    loss = model(**batch).loss
    assert torch.isfinite(loss)
    loss.backward()
    matrices = [(name, weight) for name, weight in model.named_parameters() if "lora_" in name]
    assert len(matrices) == 2 * len(targets)
    assert sum("visual" in name for name, _ in matrices) == 2 * len(seeing) > 0
    for name, weight in matrices:
        assert weight.grad is not None and torch.isfinite(weight.grad).all() and weight.grad.any(), name
    torch.optim.AdamW([weight for _, weight in matrices], lr=1e-3).step()
    for name, weight in model.named_parameters():
        if "lora_" not in name:
            assert weight.grad is None and not weight.requires_grad
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(weight, before[plain]), name
    if dtype == "float32":  # steps of bfloat16 logits are larger than one step of training
        with torch.no_grad():
            assert model(**batch).loss < loss


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("model_type", QWEN)
def test_gradients_are_the_same_when_activations_are_recomputed(
    family_base: Callable[[str], Path], model_type: str, method: str
) -> None:
    """Frozen embeddings, under an adapter a frozen patch embedding too: nothing that enters the blocks carries a gradient."""
    loaded = load(str(family_base(model_type)), **LIMITS)
    batch = batch_of(loaded, model_type)
    model = loaded.model
    torch.manual_seed(0)
    if method == "lora":
        config = build_lora_config(model, rank=4, alpha=8, dropout=0.0, targets=[*JOINT, "merger"])
        model = get_peft_model(model, config)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.02)
    else:
        train_only(model, ["vision", "merger", *(["deepstack"] if model_type == "qwen3_vl" else [])])
    model.train()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**batch).loss.backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}

    kept = gradients()
    model.activation_checkpointing_enable()
    assert sum(getattr(module, "gradient_checkpointing", False) for module in model.modules()) >= 4  # blocks and layers
    recomputed = gradients()
    assert all(gradient.any() for gradient in kept.values())
    torch.testing.assert_close(recomputed, kept)


def test_a_vision_tower_that_slipped_into_four_bits_is_refused(
    family_base: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = loader.BitsAndBytesConfig

    def forgetful(
        **options: Any,
    ) -> Any:  # a list of names that matches nothing, as `visual` does not match `model.visual`
        return settings(**options | {"llm_int8_skip_modules": ["visual", "lm_head"]})

    monkeypatch.setattr(loader, "BitsAndBytesConfig", forgetful)
    folder = str(family_base("qwen2_vl"))
    with pytest.raises(ModelError, match=r"in 4 bits, and the area '(merger|vision)' was not.*quantize_vision=true"):
        load(folder, quantization="nf4", **LIMITS)
    load(folder, quantization="nf4", quantize_vision=True, **LIMITS)
    monkeypatch.setattr(
        loader, "BitsAndBytesConfig", lambda **options: settings(**options | {"llm_int8_skip_modules": ["model"]})
    )
    with pytest.raises(ModelError, match="no layer of its language model is"):
        load(folder, quantization="nf4", **LIMITS)


def test_without_bitsandbytes_the_install_line_is_given(
    family_base: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'vlmdet\[quantization\]'"):
        load(str(family_base("qwen2_vl")), quantization="nf4", **LIMITS)


def test_a_base_that_is_quantised_already_is_refused(family_base: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "four"
    shutil.copytree(family_base("qwen2_vl"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"its weights are quantised already.*name the unquantised base"):
        load(str(folder), **LIMITS)


def test_four_bit_weights_are_not_trained_themselves(family_base: Callable[[str], Path]) -> None:
    model = load(str(family_base("qwen3_vl")), quantization="nf4", **LIMITS).model
    with pytest.raises(TrainingError, match=r"q_proj\.weight is in 4 bits.*quantization=none"):
        train_only(model, ["language"])
    counts = train_only(model, ["vision", "merger", "deepstack"])  # these are whole
    assert {area for area, count in counts.items() if count["trainable"]} == {"vision", "merger", "deepstack"}

"""Roles and areas of each family, by the names that the real architectures have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForImageTextToText

from vlmdet.errors import ConfigError
from vlmdet.grounding import CODECS
from vlmdet.models.families import FAMILIES, area_of, codec_of, parameters_by_area, resolve_targets
from vlmdet.models.lora import build_lora_config

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
VISION_MLP = {
    "qwen2_vl": ["mlp.fc1", "mlp.fc2"],
    "qwen2_5_vl": ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    "qwen3_vl": ["mlp.linear_fc1", "mlp.linear_fc2"],
}


@pytest.fixture(scope="module")
def models(family_base: Callable[[str], Path]) -> dict[str, nn.Module]:
    return {name: AutoModelForImageTextToText.from_pretrained(family_base(name)) for name in QWEN}


def written_out(model_type: str) -> dict[str, list[str]]:
    """Every linear layer of two decoder layers and two vision blocks, by role, written from the families' papers."""
    blocks, layers = (
        [f"model.visual.blocks.{i}." for i in (0, 1)],
        [f"model.language_model.layers.{i}." for i in (0, 1)],
    )
    last = ["linear_fc1", "linear_fc2"] if model_type == "qwen3_vl" else ["mlp.0", "mlp.2"]
    roles = {
        "language.attn": [f"{layer}self_attn.{letter}_proj" for layer in layers for letter in "qkvo"],
        "language.mlp": [f"{layer}mlp.{word}_proj" for layer in layers for word in ("gate", "up", "down")],
        "vision.attn": [f"{block}attn.{word}" for block in blocks for word in ("qkv", "proj")],
        "vision.mlp": [f"{block}{word}" for block in blocks for word in VISION_MLP[model_type]],
        "merger": [f"model.visual.merger.{word}" for word in last],
    }
    if model_type == "qwen3_vl":
        roles["deepstack"] = [f"model.visual.deepstack_merger_list.0.{word}" for word in last]
    return roles


@pytest.mark.parametrize("model_type", QWEN)
def test_every_role_names_its_own_layers_and_no_others(models: dict[str, nn.Module], model_type: str) -> None:
    model, expected = models[model_type], written_out(model_type)
    assert set(FAMILIES[model_type].roles) == set(expected)
    for role, names in expected.items():
        assert sorted(resolve_targets(model, [role])) == sorted(names)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    assert resolve_targets(model, [*expected, "language.attn"]) == linear  # in the model's order, each once


@pytest.mark.parametrize("model_type", QWEN)
def test_targets_resolve_under_an_adapter_too(models: dict[str, nn.Module], model_type: str, tmp_path: Path) -> None:
    model = AutoModelForImageTextToText.from_config(models[model_type].config)
    before = resolve_targets(model, ["language.mlp", "vision.mlp"])
    wrapped = get_peft_model(model, build_lora_config(model, rank=2, alpha=2, dropout=0.0, targets=["language.mlp"]))
    assert resolve_targets(wrapped, ["language.mlp", "vision.mlp"]) == [f"base_model.model.{name}" for name in before]


def test_a_pattern_is_searched_in_names(models: dict[str, nn.Module]) -> None:
    assert resolve_targets(models["qwen2_vl"], [r"layers\.1\.self_attn\.(q|v)_proj$"]) == [
        "model.language_model.layers.1.self_attn.q_proj",
        "model.language_model.layers.1.self_attn.v_proj",
    ]


@pytest.mark.parametrize(
    ("model_type", "target", "message"),
    [
        ("qwen2_vl", "language.atn", r"did you mean 'language\.attn'"),
        ("qwen2_vl", "deepstack", r"qwen2_vl has no layers of the role 'deepstack'; it has language\.attn.*qwen3_vl"),
        ("qwen2_5_vl", "deepstack", r"no layers of the role 'deepstack'"),
        ("qwen2_5_vl", r"self_attn\.q_porj$", r"near it: model\.language_model\.layers\.0\.self_attn\.q_proj"),
        ("qwen3_vl", r"visual.*mlp\.fc1$", r"near it: .*model\.visual\.blocks\.0\.mlp\.linear_fc1"),
        ("qwen2_vl", r"visual.*mlp\.linear_fc1$", r"near it: .*model\.visual\.blocks\.0\.mlp\.fc1"),
        ("qwen2_vl", "zzz", r"near it: model\.visual\.blocks\.0\.attn\.qkv"),
        ("qwen2_vl", "norm1$", r"model\.visual\.blocks\.0\.norm1, a LayerNorm; .*linear layers only"),
        (
            "qwen2_vl",
            r"visual.*\.proj",
            r"patch_embed\.proj, a Conv3d; .*near to it: model\.visual\.blocks\.0\.attn\.proj",
        ),
        ("qwen2_vl", "self_attn", r"self_attn, a Qwen2VLAttention; .*near to it: .*self_attn\.q_proj"),
        ("qwen2_vl", "self_attn.(q", "is no pattern"),
    ],
)
def test_a_target_that_names_no_linear_layer_is_refused(
    models: dict[str, nn.Module], model_type: str, target: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_targets(models[model_type], ["language.mlp", target])


@pytest.mark.parametrize(
    ("name", "area"),
    [
        ("model.visual.patch_embed.proj.weight", "vision"),
        ("visual.blocks.3.attn.qkv.bias", "vision"),
        ("model.visual.pos_embed.weight", "vision"),
        ("model.visual.merger.ln_q.weight", "merger"),
        ("base_model.model.model.visual.merger.mlp.0.lora_A.default.weight", "merger"),
        ("model.visual.deepstack_merger_list.2.norm.weight", "deepstack"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "language"),
        ("model.language_model.norm.weight", "language"),
        ("model.language_model.embed_tokens.weight", "embeddings"),
        ("lm_head.weight", "head"),
        ("model.vision_tower.encoder.layers.0.mlp.fc1.weight", "vision"),  # PaliGemma
        ("model.multi_modal_projector.linear.weight", "merger"),
    ],
)
def test_areas(name: str, area: str) -> None:
    assert area_of(name) == area


@pytest.mark.parametrize("model_type", QWEN)
def test_areas_hold_each_parameter_once(models: dict[str, nn.Module], model_type: str) -> None:
    model = models[model_type]
    counts = parameters_by_area(model.named_parameters())
    assert sum(sum(count.values()) for count in counts.values()) == sum(weight.numel() for weight in model.parameters())
    vocabulary = model.config.text_config.vocab_size * 64
    assert counts["embeddings"]["trainable"] == vocabulary
    # tied to the embeddings in all but one of the fixtures, and counted there
    assert counts["head"]["trainable"] == (vocabulary if model_type == "qwen2_5_vl" else 0)
    # a merger over 2 x 2 patches of width 64: norm, 256 x 256 + 256, 256 x 64 + 64; Qwen2.5's RMSNorm has no bias
    layers = 256 * 256 + 256 + 256 * 64 + 64
    assert counts["merger"]["trainable"] == layers + {"qwen2_vl": 128, "qwen2_5_vl": 64, "qwen3_vl": 128}[model_type]
    # a deepstack merger normalises after it has joined the patches
    assert counts["deepstack"]["trainable"] == (layers + 512 if model_type == "qwen3_vl" else 0)


def test_each_family_has_its_own_codec(models: dict[str, nn.Module]) -> None:
    for model_type, family in FAMILIES.items():
        assert family.codec in CODECS
        assert codec_of(model_type) == family.codec == model_type
    assert codec_of(models["qwen2_5_vl"]) == "qwen2_5_vl"
    assert codec_of(models["qwen2_5_vl"], "plain_json") == "plain_json"
    assert codec_of("llava") == "plain_json"
    with pytest.raises(ConfigError, match="did you mean 'qwen3_vl'"):
        codec_of("qwen2_vl", "qwen3vl")

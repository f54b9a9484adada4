"""Areas and roles of parameters, and the models that a trainer must not be given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import nn
from trl import SFTConfig, SFTTrainer

from vlmdet.errors import ConfigError, TrainingError
from vlmdet.models.families import AREAS, parameters_by_area, resolve_targets
from vlmdet.models.loader import load
from vlmdet.models.lora import build_lora_config, format_areas, refuse_untrainable, refuse_zero_adapter, train_only

LIMITS = {"min_pixels": 4 * 28 * 28, "max_pixels": 16 * 28 * 28}


def lora(model: nn.Module, *targets: str) -> object:
    return build_lora_config(model, rank=2, alpha=4, dropout=0.0, targets=targets)


def test_an_adapter_trains_the_named_area_alone_and_the_table_says_so(small_base: Path) -> None:
    model = load(str(small_base), **LIMITS).model
    total = sum(weight.numel() for weight in model.parameters())
    plain = parameters_by_area(model.named_parameters())
    assert tuple(plain) == AREAS
    assert sum(sum(count.values()) for count in plain.values()) == total
    assert not any(plain["head"].values())  # tied to the embeddings, counted there
    wrapped = get_peft_model(model, lora(model, "merger"))
    counts = refuse_untrainable(wrapped)
    # merger: two linear layers, (256, 256) and (256, 64); an adapter of rank r adds r x (in + out) to each
    assert {area: count["trainable"] for area, count in counts.items() if count["trainable"]} == {
        "merger": 2 * (256 + 256) + 2 * (256 + 64)
    }
    assert sum(count["frozen"] for count in counts.values()) == total
    line = next(line for line in format_areas(counts).splitlines() if line.startswith("merger"))
    assert line.split()[1] == "1,664"


def test_doubly_wrapped_models_are_refused_by_us_and_by_the_trainer(small_base: Path, tmp_path: Path) -> None:
    model = load(str(small_base), **LIMITS).model
    config = lora(model, "language.attn")
    wrapped = get_peft_model(model, config)
    for given in (wrapped, model):  # `model` itself now holds LoRA layers, without being a PeftModel
        with pytest.raises(TrainingError, match="wrapped twice"):
            lora(given, "language.attn")
    with pytest.raises(ValueError, match="`PeftModel` instance together with a `peft_config`"):
        SFTTrainer(
            model=wrapped,
            args=SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", bf16=False),
            train_dataset=Dataset.from_dict({"text": ["a"]}),
            processing_class=load(str(small_base), **LIMITS).processor.tokenizer,
            peft_config=config,
        )


def test_a_frozen_and_a_doing_nothing_model_are_refused(small_base: Path) -> None:
    model = load(str(small_base), **LIMITS).model
    refuse_untrainable(model)
    with pytest.raises(TrainingError, match="no LoRA layer"):
        refuse_zero_adapter(model, "run")
    with pytest.raises(TrainingError, match="no parameter of the model is trainable"):
        refuse_untrainable(model.requires_grad_(False))
    wrapped = get_peft_model(model, lora(model, "language.attn"))
    with pytest.raises(TrainingError, match="every update of the adapter is zero"):
        refuse_zero_adapter(wrapped, "run")
    with torch.no_grad():
        next(weight for name, weight in wrapped.named_parameters() if "lora_B" in name)[0, 0] = 1e-6
    refuse_zero_adapter(wrapped, "run")
    wrapped.add_adapter("second", wrapped.peft_config["default"])
    with pytest.raises(TrainingError, match="2 adapters"):
        refuse_untrainable(wrapped)


def test_a_rank_of_its_own_keeps_the_scale_of_the_update(family_base: Callable[[str], Path]) -> None:
    model = load(str(family_base("qwen3_vl")), **LIMITS).model
    targets, ranks = (
        ["language.attn", "vision.attn", "merger"],
        {"vision.attn": 2, r"blocks\.1\.attn\.qkv$": 16, "merger": 8},
    )
    for rslora in (False, True):
        base = load(str(family_base("qwen3_vl")), **LIMITS).model
        config = build_lora_config(base, rank=8, alpha=16, dropout=0.0, targets=targets, ranks=ranks, rslora=rslora)
        layers = {
            name.removeprefix("base_model.model."): module
            for name, module in get_peft_model(base, config).named_modules()
            if hasattr(module, "lora_A") and hasattr(module, "scaling")
        }
        assert set(layers) == set(resolve_targets(model, targets))
        for name, layer in layers.items():
            expected = 8
            if "visual.blocks" in name:  # the later of two that match a layer
                expected = 16 if name.endswith("blocks.1.attn.qkv") else 2
            assert layer.r["default"] == expected == layer.lora_A["default"].weight.shape[0], name
            assert layer.scaling["default"] == pytest.approx(16 / 8**0.5 if rslora else 16 / 8), name


def test_dora_learns_lengths_too(family_base: Callable[[str], Path]) -> None:
    model = load(str(family_base("qwen2_vl")), **LIMITS).model
    config = build_lora_config(model, rank=2, alpha=4, dropout=0.0, targets=["merger"], dora=True)
    counts = refuse_untrainable(get_peft_model(model, config))
    # one length for each of the 256 and the 64 outputs
    assert counts["merger"]["trainable"] == 2 * (256 + 256) + 2 * (256 + 64) + 256 + 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": {"vision.attn": 4}}, r"a rank is given for 'vision\.attn', and none of its layers gets an adapter"),
        ({"ranks": {"language.atn": 4}}, r"did you mean 'language\.attn'"),
        ({"ranks": {"language.attn": 0}}, r"the rank of 'language\.attn' is 0"),
        ({"targets": ["lm_head"]}, "match the head, lm_head"),
    ],
)
def test_an_adapter_that_cannot_be_is_refused(
    family_base: Callable[[str], Path], options: dict[str, Any], message: str
) -> None:
    model = load(str(family_base("qwen2_5_vl")), **LIMITS).model
    with pytest.raises(ConfigError, match=message):
        build_lora_config(model, **{"rank": 2, "alpha": 4, "dropout": 0.0, "targets": ["language.attn"]} | options)


def test_a_full_fine_tune_trains_its_areas_alone(family_base: Callable[[str], Path]) -> None:
    model = load(str(family_base("qwen3_vl")), **LIMITS).model
    counts = train_only(model, ["merger", "deepstack"])
    assert [area for area in AREAS if counts[area]["trainable"]] == ["merger", "deepstack"]
    assert {name.split(".")[2] for name, weight in model.named_parameters() if weight.requires_grad} == {
        "merger",
        "deepstack_merger_list",
    }
    train_only(model, [])
    assert all(weight.requires_grad for weight in model.parameters())
    with pytest.raises(ConfigError, match="unknown area 'vison'; did you mean 'vision'"):
        train_only(model, ["vison"])
    with pytest.raises(ConfigError, match=r"area 'head'; its head is tied to the embeddings; name embeddings"):
        train_only(model, ["vision", "head"])
    plain = load(str(family_base("qwen2_5_vl")), **LIMITS).model
    with pytest.raises(ConfigError, match="area 'deepstack'; it has: vision, merger, language, embeddings, head"):
        train_only(plain, ["deepstack"])
    wrapped = get_peft_model(plain, lora(plain, "merger"))
    with pytest.raises(TrainingError, match="carries an adapter already"):
        train_only(wrapped, ["vision"])

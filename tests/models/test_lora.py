"""Areas and roles of parameters, and the models that a trainer must not be given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import nn
from trl import SFTConfig, SFTTrainer

from vlmdet.errors import TrainingError
from vlmdet.models.families import AREAS, parameters_by_area
from vlmdet.models.loader import load
from vlmdet.models.lora import build_lora_config, format_areas, refuse_untrainable, refuse_zero_adapter

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

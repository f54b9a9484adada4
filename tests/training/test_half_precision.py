"""A tower that is trained whole beside a language model in bfloat16: what trains is exact, what is frozen is not touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from vlmdet.config import load_settings
from vlmdet.training.prepare import prepare
from vlmdet.training.train import train


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_vl"])
def test_areas_train_in_float32_beside_bfloat16(
    family_base: Callable[[str], Path], model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    picture = Image.new("RGB", (160, 96), (200, 220, 240))
    ImageDraw.Draw(picture).rectangle((20, 20, 90, 70), fill=(180, 30, 60))
    Path("set").mkdir()
    for name in "abc":
        picture.save(f"set/{name}.png")
    coco = {
        "images": [{"id": i, "file_name": f"{name}.png", "width": 160, "height": 96} for i, name in enumerate("abc")],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [20, 20, 70, 50], "area": 3500} for i in range(3)
        ],
        "categories": [{"id": 1, "name": "sign"}],
    }
    Path("set/annotations.json").write_text(json.dumps(coco))
    settings = load_settings(
        None,
        [
            "data.source=set",
            "name=half",
            f"model.name={family_base(model_type)}",
            "model.dtype=bfloat16",
            "model.min_pixels=4096",
            "model.max_pixels=16384",
            "training.method=full",
            "training.areas=[vision, merger]",
            "training.gradient_checkpointing=true",
            "training.max_steps=2",
            "training.eval_every=2",
            "training.batch_size=2",
            "training.overfit_gate=false",
            "evaluation.max_new_tokens=4",
        ],
    )
    prepared = prepare(settings, say=lambda text: None)
    before = {name: weight.detach().clone() for name, weight in prepared.base.model.named_parameters()}
    train(prepared, say=lambda text: None)
    model = prepared.base.model
    for name, weight in model.named_parameters():
        trained = "visual." in name and "deepstack" not in name
        assert weight.dtype == (torch.float32 if trained else torch.bfloat16), name
        if not trained:
            assert torch.equal(weight, before[name]), name
    moved = [
        name
        for name, weight in model.named_parameters()
        if not torch.equal(weight.to(before[name].dtype), before[name])
    ]
    assert moved
    saved = load_file(prepared.folder / "checkpoints" / "best" / "model.safetensors")
    assert any(torch.isfinite(weight).all() and weight.dtype == torch.float32 for weight in saved.values())

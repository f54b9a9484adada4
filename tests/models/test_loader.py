"""What can be loaded is loaded as named; what cannot is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from vlmdet.contract import Contract
from vlmdet.errors import ModelError, TrainingError, VlmdetError
from vlmdet.models.loader import load, make_contract
from vlmdet.models.lora import build_lora_config

LIMITS = {"min_pixels": 4 * 28 * 28, "max_pixels": 16 * 28 * 28}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(*args: str, **limits: int) -> str:
    with pytest.raises(VlmdetError) as caught:
        load(*args, **limits)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_is_a_base_with_explicit_pixel_limits(small_base: Path) -> None:
    loaded = load(str(small_base), **LIMITS)
    assert loaded.contract is None
    assert not loaded.model.training
    assert loaded.processor.image_processor.size == {"shortest_edge": 3136, "longest_edge": 12544}
    assert "pixel limits" in refusal(str(small_base))
    assert "pixel limits" in refusal(str(small_base), min_pixels=3136)


def test_bad_folders_are_refused(here: Path) -> None:
    assert "no such folder" in refusal(str(here / "absent"), **LIMITS)
    (here / "set").mkdir()
    (here / "set" / "picture.jpg").touch()
    assert "no config.json" in (text := refusal("./set", **LIMITS))
    assert "picture.jpg" in text
    (here / "set" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "'llama', which reads no pictures; take a qwen2_vl" in refusal("./set", **LIMITS)
    (here / "set" / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    torch.save({}, here / "set" / "pytorch_model.bin")  # a pickle is no weights
    assert "cannot be loaded" in refusal("./set", **LIMITS)


def test_tiny_is_the_embedded_base_even_beside_a_run_of_that_name(here: Path) -> None:
    (here / "runs" / "tiny" / "001" / "checkpoints" / "best").mkdir(parents=True)
    assert load("tiny").contract is None


def test_an_adapter_needs_its_own_base_and_updates_that_do_something(small_base: Path, here: Path) -> None:
    base = load(str(small_base), **LIMITS)
    ids = torch.arange(40)[None]
    plain = base.model(input_ids=ids).logits
    contract = make_contract(
        base, labels=["sign"], codec="qwen2_vl", box_order="raster", max_new_tokens=8, data_fingerprint="0"
    )
    wrapped = get_peft_model(
        base.model, build_lora_config(base.model, rank=2, alpha=4, dropout=0.0, targets=["language.mlp"])
    )

    def save() -> None:
        wrapped.save_pretrained("adapter")
        base.processor.save_pretrained("adapter")
        contract.write(Path("adapter"))

    save()
    with pytest.raises(TrainingError, match="every update of the adapter is zero"):
        load("adapter")
    with torch.no_grad():
        next(weight for name, weight in wrapped.named_parameters() if "lora_B" in name).fill_(0.5)
    save()
    tuned = load("adapter")
    assert tuned.contract == contract
    assert tuned.base_fingerprint == base.base_fingerprint
    torch.testing.assert_close(tuned.model(input_ids=ids).logits, wrapped.eval()(input_ids=ids).logits)
    assert not torch.allclose(tuned.model(input_ids=ids).logits, plain)

    values = json.loads(Path("adapter/contract.json").read_text())
    values["base_fingerprint"] = "0" * 16
    Path("adapter/contract.json").write_text(json.dumps(values))
    assert Contract.read(Path("adapter")).base_fingerprint == "0" * 16
    with pytest.raises(ModelError, match=f"{'0' * 16}, but .* now has {base.base_fingerprint}"):
        load("adapter")

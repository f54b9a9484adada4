"""What can be loaded is loaded as named; what cannot is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from vlmdet.contract import Contract
from vlmdet.errors import ConfigError, ModelError, TrainingError, VlmdetError
from vlmdet.models.families import is_quantised
from vlmdet.models.fingerprint import fingerprint
from vlmdet.models.loader import Loaded, _device, load, make_contract
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


def tune(model: nn.Module, *targets: str, seed: int) -> PeftModel:
    """Put an adapter on a model whose updates do something."""
    wrapped = get_peft_model(model, build_lora_config(model, rank=2, alpha=4, dropout=0.0, targets=targets))
    torch.manual_seed(seed)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.3)
    return wrapped.eval()


def save_stage(folder: str, model: nn.Module, base: Loaded) -> None:
    """Write a checkpoint as training does, the contract last."""
    model.save_pretrained(folder)
    base.processor.save_pretrained(folder)
    contract = make_contract(base, labels=["sign"], box_order="raster", max_new_tokens=8, data_fingerprint="0")
    contract.write(Path(folder))


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_adapters_are_loaded_stage_upon_stage(family_base: Callable[[str], Path], model_type: str, here: Path) -> None:
    ids = torch.arange(40)[None]
    root = str(family_base(model_type))
    first = load(root, as_base=True, **LIMITS)
    assert (first.base, first.contract) == (root, None)
    one = tune(first.model, "vision.attn", "language.attn", seed=1)
    save_stage("one", one, first)
    second = load("one", as_base=True)
    assert (second.base, second.contract) == ("one", None)
    assert second.processor.image_processor.size["longest_edge"] == 12544  # the stage's limits, where none are given
    assert not any("lora" in name for name, _ in second.model.named_parameters())
    torch.testing.assert_close(second.model(input_ids=ids).logits, one(input_ids=ids).logits, atol=1e-5, rtol=1e-4)
    two = tune(second.model, "language.mlp", seed=2)
    save_stage("two", two, second)

    tuned = load("two")
    assert tuned.contract is not None
    assert (tuned.base, tuned.contract.base_model, tuned.contract.codec) == ("one", "one", model_type)
    assert tuned.base_fingerprint == second.base_fingerprint == fingerprint("one") != fingerprint(root)
    torch.testing.assert_close(tuned.model(input_ids=ids).logits, two(input_ids=ids).logits, atol=1e-5, rtol=1e-4)
    assert {name.split(".")[-5] for name, _ in tuned.model.named_parameters() if "lora_A" in name} == {"mlp"}


def test_a_fully_tuned_stage_is_the_base_of_the_next(family_base: Callable[[str], Path], here: Path) -> None:
    ids = torch.arange(40)[None]
    first = load(str(family_base("qwen3_vl")), **LIMITS)
    with torch.no_grad():
        for weight in first.model.model.language_model.layers[0].parameters():
            weight.mul_(1.5)
    expected = first.model(input_ids=ids).logits
    save_stage("full", first.model, first)
    whole = load("full")
    torch.testing.assert_close(whole.model(input_ids=ids).logits, expected)
    assert (whole.base, whole.base_fingerprint) == (first.base, first.base_fingerprint)  # as its contract names it
    base = load("full", as_base=True, min_pixels=4096, max_pixels=8192)
    assert (base.base, base.base_fingerprint) == ("full", fingerprint("full"))
    assert base.processor.image_processor.size == {"shortest_edge": 4096, "longest_edge": 8192}
    two = tune(base.model, "language.mlp", seed=2)
    save_stage("two", two, base)
    torch.testing.assert_close(load("two").model(input_ids=ids).logits, two(input_ids=ids).logits)
    pytest.importorskip("bitsandbytes")
    four = load("two", quantization="nf4").model  # over whole weights 4 bits are as good as over a base
    assert any(is_quantised(weight) for weight in four.parameters())


def test_what_lies_below_a_stage_may_not_change(family_base: Callable[[str], Path], here: Path) -> None:
    first = load(str(family_base("qwen2_vl")), **LIMITS)
    save_stage("one", tune(first.model, "language.attn", seed=1), first)
    second = load("one", as_base=True)
    save_stage("two", tune(second.model, "language.mlp", seed=2), second)
    for name, as_base in (("two", False), ("one", True)):
        with pytest.raises(ConfigError, match=r"adapter one lies under .* run `vlmdet merge one` first"):
            load(name, quantization="nf4", as_base=as_base)
    other = load(str(family_base("qwen2_vl")), **LIMITS)
    tune(other.model, "language.attn", seed=3).save_pretrained("one")  # trained again since
    with pytest.raises(ModelError, match=r"two was tuned on a base with fingerprint \w+, but one now has \w+"):
        load("two")
    Path("one/adapter_model.safetensors").unlink()
    torch.save({}, "one/adapter_model.bin")
    with pytest.raises(
        ModelError, match=r"one: holds no adapter_model\.safetensors; other weight files are never read"
    ):
        load("two")


def test_a_process_of_several_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [_device(one) for one in ("auto", "cpu")] == ["cpu", "cpu"]
    with pytest.raises(ModelError, match="no CUDA device"):
        _device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [_device(one) for one in ("auto", "cuda", "cuda:2", "cpu")] == ["cuda:0", "cuda:0", "cuda:2", "cpu"]
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [_device(one) for one in ("auto", "cuda", "cuda:2", "cpu")] == ["cuda:3", "cuda:3", "cuda:2", "cpu"]

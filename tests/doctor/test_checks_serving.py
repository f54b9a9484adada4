"""Checks of what was saved and how it is served, on files made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from vlmdet.doctor.checks import saved_adapters, serving
from vlmdet.doctor.evidence import Evidence
from vlmdet.doctor.examine import run_check
from vlmdet.doctor.subject import Subject

CHECKS = (*saved_adapters.CHECKS, *serving.CHECKS)
LAYER = "model.language_model.layers.0.self_attn.q_proj"
VISION = "model.visual.blocks.0.attn.qkv"
RNG = np.random.default_rng(0)
BASE = {f"{name}.weight": RNG.normal(size=(6, 6)).astype(np.float32) for name in (LAYER, VISION)}
BASE["model.language_model.embed_tokens.weight"] = RNG.normal(size=(9, 6)).astype(np.float32)
BASE["model.language_model.norm.weight"] = RNG.normal(size=(16,)).astype(np.float32)
DOWN, UP = RNG.normal(size=(2, 6)).astype(np.float32), RNG.normal(size=(6, 2)).astype(np.float32)
SCALE = 2.0  # alpha 4, rank 2


def look(**fields: Any) -> dict[str, list[dict[str, Any]]]:
    evidence = Evidence(Subject(**fields))
    said: dict[str, list[dict[str, Any]]] = {"finding": [], "checked": [], "not_run": []}
    for check in CHECKS:
        for kind, values in run_check(check, evidence):
            said[kind].append(values)
    return said


def names(**fields: Any) -> list[str]:
    return [one["id"] for one in look(**fields)["finding"]]


def write_base(folder: Path, weights: dict[str, np.ndarray] = BASE, name: str = "Qwen/Qwen2-VL-2B-Instruct") -> Path:
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_vl", "_name_or_path": name}))
    return folder


def write_adapter(
    folder: Path, *, up: np.ndarray = UP, module: str = LAYER, base: str = "Qwen/Qwen2-VL-2B-Instruct"
) -> Path:
    folder.mkdir()
    tensors = {f"base_model.model.{module}.lora_A.weight": DOWN, f"base_model.model.{module}.lora_B.weight": up}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"base_model_name_or_path": base, "r": 2, "lora_alpha": 4, "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merge(**changed: np.ndarray) -> dict[str, np.ndarray]:
    weights = {**BASE, f"{LAYER}.weight": BASE[f"{LAYER}.weight"] + SCALE * UP @ DOWN}
    return {**weights, **changed}


def test_adapter_and_exact_merge_have_a_clean_bill(tmp_path: Path) -> None:
    artefacts = {
        "base": write_base(tmp_path / "base"),
        "adapter": write_adapter(tmp_path / "adapter"),
        "merged": write_base(tmp_path / "merged", merge()),
    }
    said = look(artefacts=artefacts)
    assert said["finding"] == []
    told = {one["id"]: one["figures"] for one in said["checked"]}
    assert "|merged - base| is 1.000" in told["S01"] and "1 modules" in told["M10"]


ROUNDED = np.round(BASE[f"{LAYER}.weight"] + SCALE * UP @ DOWN).astype(np.float32)  # as few bits would leave it


@pytest.mark.parametrize(
    ("weights", "identifier"),
    [
        (BASE, "S01"),
        (merge(**{name: value + 1 for name, value in BASE.items() if name != f"{LAYER}.weight"}), "S01"),
        (merge(**{f"{LAYER}.weight": ROUNDED}), "S02"),
    ],
)
def test_merges_that_are_none(tmp_path: Path, weights: dict[str, np.ndarray], identifier: str) -> None:
    artefacts = {
        "base": write_base(tmp_path / "base"),
        "adapter": write_adapter(tmp_path / "adapter"),
        "merged": write_base(tmp_path / "merged", weights),
    }
    assert names(artefacts=artefacts)[0] == identifier


def test_the_last_adapter_of_a_chain_alone(tmp_path: Path) -> None:
    first = write_adapter(tmp_path / "first", up=-3 * UP[::-1].copy())
    artefacts = {
        "base": write_base(tmp_path / "base"),
        "adapters": [first, write_adapter(tmp_path / "second")],
        "merged": write_base(tmp_path / "merged", merge()),
    }
    said = look(artefacts=artefacts)
    assert [one["id"] for one in said["finding"]] == ["S01"]
    assert "only adapters[1] of 2" in said["finding"][0]["cause"]


def test_adapters_that_do_nothing(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    assert names(artefacts={"base": base, "adapter": write_adapter(tmp_path / "zero", up=0 * UP)})[0] == "M10"
    other = write_adapter(tmp_path / "renamed", module="model.decoder.block.0.attention.query")
    assert names(artefacts={"base": base, "adapter": other})[0] == "M10"
    empty = write_adapter(tmp_path / "empty")
    (empty / "adapter_model.safetensors").unlink()
    assert names(artefacts={"base": base, "adapter": empty})[0] == "M10"


def test_names_of_before_the_renaming(tmp_path: Path) -> None:
    old = {name.replace("language_model.", "").replace("model.visual", "visual"): value for name, value in BASE.items()}
    base = write_base(tmp_path / "base", old)  # as it lies on disk to this day
    assert names(artefacts={"base": base, "adapter": write_adapter(tmp_path / "new")}) == []
    adapter = write_adapter(tmp_path / "old", module=LAYER.replace("language_model.", ""))
    assert names(artefacts={"base": base, "adapter": adapter}) == ["M10"]


def test_another_base(tmp_path: Path) -> None:
    base, adapter = write_base(tmp_path / "base", name="Qwen/Qwen2-VL-7B-Instruct"), write_adapter(tmp_path / "adapter")
    assert names(artefacts={"base": base, "adapter": adapter}) == ["M11"]
    assert names(artefacts={"adapter": adapter}, settings={"model_name": "Qwen/Qwen2.5-VL-3B-Instruct"}) == ["M11"]
    assert names(artefacts={"adapter": adapter}, settings={"model_name": "/cache/Qwen2-VL-2B-Instruct/"}) == []
    wide = write_adapter(tmp_path / "wide", up=RNG.normal(size=(8, 2)).astype(np.float32))
    assert names(artefacts={"base": write_base(tmp_path / "same"), "adapter": wide})[0] == "M11"


def test_shards(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "merged")
    index = {"metadata": {"total_size": sum(one.nbytes for one in BASE.values())}}
    index["weight_map"] = dict.fromkeys(BASE, "model.safetensors")  # type: ignore[assignment]
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps(index))
    assert names(artefacts={"merged": folder}) == []
    file.write_text(
        json.dumps({**index, "weight_map": {**dict.fromkeys(BASE, "model.safetensors"), "x": "model-2.safetensors"}})
    )
    assert names(artefacts={"merged": folder}) == ["S03"]
    file.write_text(json.dumps({**index, "metadata": {"total_size": 10**9}}))
    assert names(artefacts={"merged": folder}) == ["S03"]
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "S03" in names(artefacts={"merged": folder})


def write_processor(folder: Path, low: int, high: int, template: str = "{{ messages }}") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps({"min_pixels": low, "max_pixels": high}))
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_saved_processors(tmp_path: Path) -> None:
    train = write_processor(tmp_path / "train", 3136, 50176)
    merged = write_processor(write_base(tmp_path / "merged"), 3136, 12845056)
    assert names(artefacts={"train_processor": train, "merged": merged}) == ["S04"]
    same = write_processor(tmp_path / "same", 3136, 50176)
    assert names(artefacts={"train_processor": train, "processor": same}) == []
    other = write_processor(tmp_path / "other", 3136, 1003520)
    assert names(artefacts={"train_processor": train, "processor": other}) == ["T06"]
    words = write_processor(tmp_path / "words", 3136, 50176, "{{ other }}")
    assert names(artefacts={"train_processor": train, "processor": words}) == ["T06"]
    server = {"mm_processor_kwargs": {"min_pixels": 3136, "max_pixels": 50176}}
    assert names(artefacts={"train_processor": train, "server_config": server}) == []


def test_prompts_of_a_server() -> None:
    train = {"system_prompt": "You find objects.", "user_prompt": "Find every cup."}
    assert names(settings={**train, "serve": dict(train)}) == []
    assert names(settings={**train, "serve": {"system_prompt": "", "user_prompt": "Find every cup."}}) == ["S05"]
    request = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Find every cup."}]}]}
    assert names(settings=train, artefacts={"request": request}) == ["S05"]
    assert names(settings=train, artefacts={"server_config": {"endpoint": "/v1/completions"}}) == ["S05"]


def test_vision_adapters_are_not_served(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", module=VISION)
    assert names(artefacts={"adapter": adapter, "server_config": {"enable_lora": True}}) == ["S06"]
    words = write_adapter(tmp_path / "words")
    assert names(artefacts={"adapter": words, "server_config": {"enable_lora": True}}) == []


def test_the_end_token_of_a_server(tmp_path: Path) -> None:
    merged = write_base(tmp_path / "merged")
    tokens = {"added_tokens_decoder": {"7": {"content": "<|im_end|>"}, "6": {"content": "<|endoftext|>"}}}
    (merged / "tokenizer_config.json").write_text(json.dumps(tokens))
    generation = merged / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [7, 6]}))
    assert names(artefacts={"merged": merged}) == []
    generation.write_text(json.dumps({"eos_token_id": 6}))
    assert names(artefacts={"merged": merged}) == ["S07"]
    assert names(artefacts={"merged": merged, "server_config": {"stop_token_ids": [7]}}) == []
    generation.unlink()
    assert names(artefacts={"merged": merged}) == ["S07"]


def test_quantised_models(tmp_path: Path) -> None:
    quantised = {"quant_method": "gptq", "bits": 4}
    assert names(artefacts={"quantized": {"quantization_config": quantised}}) == ["S08"]
    left = {**quantised, "ignore": ["re:visual.*", "lm_head"]}
    assert names(artefacts={"quantized": {"quantization_config": left}}) == []
    plain = {**left, "calibration_samples": ["Find every cup in the picture."]}
    assert names(artefacts={"quantized": {"quantization_config": plain}}) == ["S08"]


def test_load_tests() -> None:
    def requests(pictures: int, failed: int) -> dict[str, Any]:
        rows = [
            {"image": f"{i % pictures}.jpg", "latency": 0.1, "status": 500 if i < failed else 200} for i in range(40)
        ]
        return {"load": {"requests": rows}}

    assert names(artefacts=requests(40, 0)) == []
    assert names(artefacts=requests(1, 0)) == ["S09"]
    assert names(artefacts=requests(40, 9)) == ["S09"]


def test_a_changed_environment() -> None:
    assert names(settings={"versions_before": {"torch": "2.8.0"}, "versions_after": {"torch": "2.7.1"}}) == ["S10"]
    assert names(settings={"versions_before": {"torch": "2.8.0"}, "versions_after": {"torch": "2.8.0"}}) == []

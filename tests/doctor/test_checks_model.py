"""Checks of the stage model, on trainers as users build them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.numpy import save_file
from transformers import BitsAndBytesConfig, Trainer, TrainerCallback

from tests.doctor.user_training import ALL, NAME, PROCESSOR, SEEING, adapted, base, rows, trainer
from vlmdet.doctor.checks import Check, checks_of
from vlmdet.doctor.checks.model import CHECKS
from vlmdet.doctor.evidence import Evidence
from vlmdet.doctor.examine import run_check
from vlmdet.doctor.subject import Subject

NAMED = {one.name: one for one in CHECKS}


def say(check: str | Check, **subject: Any) -> dict[str, dict[str, Any]]:
    """Run one check; return findings by id."""
    one = NAMED[check] if isinstance(check, str) else check
    results = list(run_check(one, Evidence(Subject(**{"processor": PROCESSOR, **subject}))))
    broken = [fields["needs"] for kind, fields in results if kind == "not_run" and "itself failed" in fields["needs"]]
    assert not broken
    return {fields["id"]: fields for kind, fields in results if kind == "finding"}


def test_the_stage_holds_its_ids() -> None:
    ids = {one for check in checks_of("model") for one in check.ids}
    assert ids >= {f"M{number:02}" for number in range(1, 16)} | {"T05", "T07"}


# ---- after the trainer is built -----------------------------------------------------------------------------------------


def healthy() -> Trainer:
    return trainer(adapted(), gradient_checkpointing=True)


def healthy_full() -> Trainer:
    return trainer(base(), learning_rate=1e-5)


def frozen() -> Trainer:
    model = adapted()
    for one in model.parameters():
        one.requires_grad = False
    return trainer(model)


def loaded_again() -> Trainer:
    model = base()
    adapted(model)
    model = base()
    return trainer(model)


def beneath_the_adapter() -> Trainer:
    return trainer(adapted().get_base_model())


def two_adapters() -> Trainer:
    model = adapted()
    model.add_adapter("second", LoraConfig(r=4, target_modules=ALL))
    model.set_adapter("second")
    return trainer(model)


def trained_before() -> Trainer:
    model = adapted()
    for name, one in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(one, 0.01)
    return trainer(model)


@pytest.mark.parametrize(
    ("build", "identifier"),
    [
        (healthy, None),
        (healthy_full, None),
        (frozen, "M01"),
        (loaded_again, "M02"),
        (beneath_the_adapter, "M02"),
        (two_adapters, "M03"),
        (trained_before, "M03"),
    ],
)
def test_after_building(build: Any, identifier: str | None) -> None:
    found = say("after_building", build_trainer=build)
    assert set(found) == ({identifier} if identifier else set())


def test_the_table_of_parameters_is_the_evidence() -> None:
    assert "language 0 of" in say("after_building", build_trainer=frozen)["M01"]["evidence"]


@pytest.mark.parametrize(
    ("version", "quantised", "hit"), [("0.22.1", True, True), ("0.23.1", True, False), ("0.22.1", False, False)]
)
def test_releases_of_trl_that_freeze(version: str, quantised: bool, hit: bool) -> None:
    found = say(
        "after_building", settings={"trl_version": version, "load_in_4bit": quantised, "lora_rank": 8}, processor=None
    )
    assert ("M01" in found) == hit


# ---- patterns -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "identifiers"),
    [
        (ALL, set()),
        ("all-linear", set()),
        (SEEING, set()),
        ([*ALL, r"visual\.blocks\.\d+\.attn\.qkv"], {"M04"}),
        (r"visual\.blocks\.\d+\.attn\.qkv", {"M04"}),
        (r".*(vision_tower|language_model).*(qkv|q_proj)", {"M04"}),
        (["q_proj", "v_proj", "proj"], {"M05", "M14"}),
        (r".*self_attn.*", {"M05"}),
        ([*ALL, "attn.qkv"], {"M14"}),
        (r".*language_model\.layers\.(2[0-7])\..*q_proj", set()),
        (["layers.27.self_attn.q_proj"], set()),
    ],
)
def test_target_patterns(targets: Any, identifiers: set[str]) -> None:
    assert set(say("target_patterns", target_modules=targets, settings={"model_name": NAME})) == identifiers


def test_an_expression_in_a_list_is_named_with_what_it_would_match() -> None:
    found = say(
        "target_patterns", target_modules=[*ALL, r"visual\.blocks\.\d+\.attn\.qkv"], settings={"model_name": NAME}
    )["M04"]
    assert "no module" in found["evidence"] and "as one expression it would match 2 modules" in found["evidence"]
    assert found["severity"] == 4


def by_an_old_name() -> Trainer:
    model = base()
    for name, one in model.named_parameters():
        if name.startswith("visual."):
            one.requires_grad = False
    return trainer(model)


def by_todays_name() -> Trainer:
    model = base()
    for name, one in model.named_parameters():
        one.requires_grad = not name.startswith("model.visual.")
    return trainer(model)


@pytest.mark.parametrize(("build", "hit"), [(by_an_old_name, True), (by_todays_name, False), (healthy_full, False)])
def test_a_freeze_policy_without_effect_is_seen(build: Any, hit: bool) -> None:
    assert ("M06" in say("freeze_policy", build_trainer=build)) == hit


@pytest.mark.parametrize(
    ("settings", "hit"),
    [
        ({"freeze": ["model.layers."]}, True),
        ({"freeze_prefixes": ["visual."]}, True),
        ({"freeze": ["model.visual."]}, False),
        ({"freeze": ["vision_tower"]}, True),
        ({"freeze": "visual"}, False),
        ({"freeze": ["model.language_model.layers.27."]}, False),
        ({"unfreeze": ["model.layers.27"]}, True),
    ],
)
def test_patterns_of_a_policy(settings: dict[str, Any], hit: bool) -> None:
    assert ("M06" in say("freeze_policy", settings={"model_name": NAME, **settings})) == hit


# ---- precision, devices, tokens -----------------------------------------------------------------------------------------


def test_four_bits_under_the_vision_tower() -> None:
    def build(skip: list[str] | None) -> Any:
        return lambda: trainer(
            adapted(base(quantization_config=BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skip)))
        )

    found = say("quantised_vision", build_trainer=build(None))["M07"]
    assert "model.visual.blocks.N.attn.qkv" in found["evidence"]
    assert not say("quantised_vision", build_trainer=build([".*visual", "lm_head"]))
    assert not say("quantised_vision", build_trainer=healthy)


@pytest.mark.parametrize(
    ("settings", "hit"),
    [
        ({"num_gpus": 4, "world_size": 1}, True),
        ({"num_gpus": 4, "world_size": 4}, False),
        ({"num_gpus": 1, "world_size": 1}, False),
        ({"num_gpus": 2, "world_size": 2, "device_map": "auto"}, True),
        ({"num_gpus": 2, "world_size": 1, "device_map": "auto"}, False),
    ],
)
def test_devices(settings: dict[str, Any], hit: bool) -> None:
    assert ("M09" in say("several_devices", settings=settings)) == hit


@pytest.mark.parametrize("saved", [False, True])
def test_rows_of_new_tokens(saved: bool) -> None:
    import copy

    def build() -> Trainer:
        processor = copy.deepcopy(PROCESSOR)
        processor.tokenizer.add_tokens(["<loc_1>", "<loc_2>"])
        model = base()
        model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
        model = adapted(model, modules_to_save=["embed_tokens"] if saved else None)
        return trainer(model, more={"processing_class": processor})

    assert ("T05" in say("new_tokens", build_trainer=build)) != saved


def test_a_tokenizer_that_is_larger_than_the_embeddings() -> None:
    import copy

    processor = copy.deepcopy(PROCESSOR)
    processor.tokenizer.add_tokens(["<loc_1>"])
    found = say("new_tokens", build_trainer=lambda: trainer(adapted(), more={"processing_class": processor}))
    assert "'<loc_1>'" in found["T05"]["evidence"]


# ---- three steps ---------------------------------------------------------------------------------------------------------


def under_no_grad() -> Trainer:
    model = adapted(targets=SEEING)
    tower = model.get_base_model().model.visual
    forward = tower.forward

    def seen(*args: Any, **keywords: Any) -> Any:
        with torch.no_grad():
            return forward(*args, **keywords)

    tower.forward = seen
    return trainer(model)


def cut_by_recomputation() -> Trainer:
    built = trainer(adapted(), gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    inner = built.model.get_base_model()
    inner.enable_input_require_grads = lambda *args, **keywords: None
    inner.disable_input_require_grads()
    return built


def optimiser_before_adapter() -> Trainer:
    model = base()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return trainer(adapted(model), more={"optimizers": (optimizer, None)})


def warming_up() -> Trainer:
    model = adapted()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 4, 1.0))  # 0 at the first step
    return trainer(model, more={"optimizers": (optimizer, schedule)})


def without_rate() -> Trainer:
    return trainer(adapted(), learning_rate=0.0)


@pytest.mark.parametrize(
    ("build", "identifier"),
    [
        (healthy, None),
        (warming_up, None),
        (under_no_grad, "M13"),
        (cut_by_recomputation, "M08"),
        (optimiser_before_adapter, "M15"),
        (without_rate, "M15"),
    ],
)
def test_three_steps(build: Any, identifier: str | None) -> None:
    found = say("three_steps", build_trainer=build)
    assert set(found) == ({identifier} if identifier else set())


# ---- generation ----------------------------------------------------------------------------------------------------------


class Writes(TrainerCallback):
    """Generates answers for three pictures after each evaluation."""

    def __init__(self, *, training: bool, side: str) -> None:
        self.training, self.side = training, side

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.training:
            model.train()
        PROCESSOR.tokenizer.padding_side = self.side
        users = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["text"]}]}
            for row in rows()[:3]
        ]
        texts = [PROCESSOR.apply_chat_template([user], tokenize=False, add_generation_prompt=True) for user in users]
        batch = PROCESSOR(text=texts, images=[[row["image"]] for row in rows()[:3]], return_tensors="pt", padding=True)
        model.generate(**batch, max_new_tokens=4)


@pytest.mark.parametrize(
    ("training", "side", "identifiers"), [(False, "left", set()), (True, "left", {"M12"}), (False, "right", {"T07"})]
)
def test_how_callbacks_generate(training: bool, side: str, identifiers: set[str]) -> None:
    kept = PROCESSOR.tokenizer.padding_side
    try:
        found = say(
            "generation",
            build_trainer=lambda: trainer(adapted(), more={"callbacks": [Writes(training=training, side=side)]}),
        )
    finally:
        PROCESSOR.tokenizer.padding_side = kept
    assert set(found) == identifiers


@pytest.mark.parametrize(
    ("settings", "identifier"),
    [
        ({"generation": {"use_cache": False}}, "M12"),
        ({"generation": {"padding_side": "right", "batch_size": 8}}, "T07"),
        ({"generation": {"padding_side": "left", "batch_size": 8}}, None),
        ({"padding_side": "right"}, None),
    ],
)
def test_settings_of_generation(settings: dict[str, Any], identifier: str | None) -> None:
    assert set(say("generation", settings=settings)) == ({identifier} if identifier else set())


# ---- saved adapters --------------------------------------------------------------------------------------------------------

LAYER = "model.language_model.layers.0.self_attn.q_proj"


def save_adapter(
    folder: Path, *, layer: str = LAYER, value: float = 0.1, named: str = "", base_name: str = NAME, seed: int = 0
) -> Path:
    folder.mkdir()
    drawn = np.random.default_rng(seed).normal(size=(4, 64)).astype(np.float32)
    tensors = {"A": drawn, "B": np.full((64, 4), value, np.float32)}
    save_file(
        {f"base_model.model.{layer}.lora_{key}{named}.weight": one for key, one in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "base_model_name_or_path": base_name, "target_modules": ["q_proj"], "r": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("changes", "hit"),
    [
        ({}, False),
        ({"value": 0.0}, True),
        ({"named": ".default"}, True),
        ({"layer": "model.layers.0.self_attn.q_proj"}, True),
    ],
)
def test_a_saved_adapter_acts(tmp_path: Path, changes: dict[str, Any], hit: bool) -> None:
    folder = save_adapter(tmp_path / "adapter", **changes)
    assert ("M10" in say("adapter_acts", artefacts={"adapter": folder}, settings={"model_name": NAME})) == hit


def test_an_adapter_without_weights(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    assert "M10" in say("adapter_acts", artefacts={"adapter": folder})


@pytest.mark.parametrize(
    ("used", "hit"),
    [
        (NAME, False),
        ("/models/Qwen2-VL-2B-Instruct", False),
        ("Qwen/Qwen2-VL-2B", True),
        ("Qwen/Qwen2.5-VL-3B-Instruct", True),
        ("/data/base", False),
    ],
)
def test_the_base_of_an_adapter(tmp_path: Path, used: str, hit: bool) -> None:
    folder = save_adapter(tmp_path / "adapter")
    assert ("M11" in say("adapter_on_its_base", artefacts={"adapter": folder}, settings={"model_name": used})) == hit


def test_another_base_of_the_same_name_is_told_by_its_weights(tmp_path: Path) -> None:
    bases = [tmp_path / "one", tmp_path / "other"]
    for number, folder in enumerate(bases):
        folder.mkdir()
        save_file({"model.norm.weight": np.full(4, number, np.float32)}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
    adapter = save_adapter(tmp_path / "adapter", base_name=str(bases[0]))
    assert "M11" in say("adapter_on_its_base", artefacts={"adapter": adapter, "base": bases[1]})
    assert "M11" not in say("adapter_on_its_base", artefacts={"adapter": adapter, "base": bases[0]})

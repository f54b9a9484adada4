"""Which modules a target pattern matches, on names written by hand."""

from __future__ import annotations

import pytest

from vlmdet.doctor.checks.targets import (
    area_of,
    dead_alternatives,
    deeper,
    layer_of,
    matches,
    near,
    plain_name,
    split_alternatives,
    table,
)

NAMES = [
    "model.visual.patch_embed.proj",
    "model.visual.blocks.0.attn.qkv",
    "model.visual.blocks.0.attn.proj",
    "model.visual.merger.mlp.0",
    "model.language_model.layers.0.self_attn.q_proj",
    "model.language_model.layers.1.self_attn.q_proj",
    "lm_head",
]


@pytest.mark.parametrize(
    ("name", "area"),
    [
        ("model.visual.blocks.3.attn.qkv.weight", "vision"),
        ("model.visual.merger.mlp.0.weight", "merger"),
        ("model.visual.deepstack_merger_list.0.linear_fc1.weight", "deepstack"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "language"),
        ("model.language_model.embed_tokens.weight", "embeddings"),
        ("lm_head.weight", "head"),
        ("model.multi_modal_projector.linear.weight", "merger"),
        ("model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", "vision"),
        ("model.connector.modality_projection.proj.weight", "merger"),
    ],
)
def test_area(name: str, area: str) -> None:
    assert area_of(name) == area


def test_names_without_wrappers() -> None:
    name = "base_model.model.model.visual.blocks.0.attn.qkv.lora_A.default.weight"
    assert plain_name(name) == "model.visual.blocks.0.attn.qkv.lora_A.default.weight"
    assert layer_of(name) == "model.visual.blocks.0.attn.qkv"
    assert plain_name("base_model.model.lm_head.base_layer.weight") == "lm_head.weight"
    assert plain_name("base_model.model.lm_head.modules_to_save.default.weight") == "lm_head.weight"


def test_an_entry_of_a_list_is_an_ending_and_no_expression() -> None:
    q, expression, proj = matches(["q_proj", r"visual.*qkv", "proj"], NAMES)
    assert q.counts == {"language": 2}
    assert expression.names == () and expression.expression
    assert proj.names == ("model.visual.patch_embed.proj", "model.visual.blocks.0.attn.proj")
    assert expression.line == "'visual.*qkv': no module"


def test_one_text_fits_whole_names() -> None:
    (part,) = matches(r"visual\..*qkv", NAMES)
    (whole,) = matches(r".*visual\..*qkv", NAMES)
    assert part.names == () and whole.names == ("model.visual.blocks.0.attn.qkv",)


def test_alternatives_are_split_outside_groups() -> None:
    assert split_alternatives(r"a|b(c|d)|[|]e\|") == ["a", "b(c|d)", r"[|]e\|"]


def test_alternatives_that_add_nothing() -> None:
    assert dead_alternatives(r".*(vision_tower|language_model).*(q|x)_proj", NAMES) == ["vision_tower"]
    assert dead_alternatives(r".*vision_tower.*qkv|.*q_proj", NAMES) == [".*vision_tower.*qkv"]
    assert dead_alternatives(r".*(visual|language_model).*(qkv|q_proj)", NAMES) == []


def test_table_counts_trainable_and_all() -> None:
    counted = table(
        [("model.visual.blocks.0.a", 10, True), ("model.visual.blocks.0.b", 5, False), ("lm_head.weight", 7, False)]
    )
    assert counted == {"vision": (10, 15), "head": (0, 7)}


def test_names_near_to_one_that_matches_nothing() -> None:
    assert near("visual.blocks.attn.qkv", NAMES)[0] == "model.visual.blocks.N.attn.qkv"
    assert near("xyz", NAMES) == []


def test_blocks_that_a_small_model_has_not() -> None:
    deep = deeper(NAMES)
    assert deep["model.language_model.layers.27.self_attn.q_proj"] == "model.language_model.layers.0.self_attn.q_proj"
    assert deep["model.language_model.layers.1.self_attn.q_proj"] == "model.language_model.layers.1.self_attn.q_proj"
    assert deep["model.visual.merger.mlp.0"] == "model.visual.merger.mlp.0"

"""Recipes counted on the real configurations, without weights, against formulas over the published dimensions."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from peft import get_peft_model

from vlmdet.config import find_recipe, load_settings
from vlmdet.errors import ModelError
from vlmdet.models.families import parameters_by_area
from vlmdet.models.loader import build_skeleton, load
from vlmdet.models.lora import build_lora_config, train_only
from vlmdet.settings import Settings


class Published(NamedTuple):
    """Dimensions and parameters of a model as its makers give them."""

    family: str
    hidden: int
    mlp: int
    layers: int
    query: int  # heads x head dimension
    key: int  # key-value heads x head dimension
    tied: bool
    vocabulary: int
    parameters: int


MODELS = {
    "Qwen2-VL-2B-Instruct": Published("qwen2", 1536, 8960, 28, 1536, 256, True, 151936, 2_208_985_600),
    "Qwen2-VL-7B-Instruct": Published("qwen2", 3584, 18944, 28, 3584, 512, False, 152064, 8_291_375_616),
    "Qwen2.5-VL-3B-Instruct": Published("qwen2.5", 2048, 11008, 36, 2048, 256, True, 151936, 3_754_622_976),
    "Qwen2.5-VL-7B-Instruct": Published("qwen2.5", 3584, 18944, 28, 3584, 512, False, 152064, 8_292_166_656),
    "Qwen3-VL-2B-Instruct": Published("qwen3", 2048, 6144, 28, 2048, 1024, True, 151936, 2_127_532_032),
    "Qwen3-VL-4B-Instruct": Published("qwen3", 2560, 9728, 36, 4096, 1024, True, 151936, 4_437_815_808),
}
DEPTH = {"qwen2": 32, "qwen2.5": 32, "qwen3": 24}
WIDTH = {"qwen2": 1280, "qwen2.5": 1280, "qwen3": 1024}


def language_pairs(model: Published) -> list[tuple[int, int]]:
    """Inputs and outputs of the linear layers of one decoder layer: q, k, v, o, gate, up, down."""
    return [
        (model.hidden, model.query),
        (model.hidden, model.key),
        (model.hidden, model.key),
        (model.query, model.hidden),
        (model.hidden, model.mlp),
        (model.hidden, model.mlp),
        (model.mlp, model.hidden),
    ]


def vision_pairs(model: Published) -> list[tuple[int, int]]:
    """Inputs and outputs of the linear layers of one vision block: qkv, proj, and its MLP's."""
    width = WIDTH[model.family]
    middle = {"qwen2": 5120, "qwen2.5": 3420, "qwen3": 4096}[model.family]
    mlp = [(width, middle), (middle, width)]
    if model.family == "qwen2.5":  # gated
        mlp = [(width, middle), *mlp]
    return [(width, 3 * width), (width, width), *mlp]


def whole(pairs: list[tuple[int, int]]) -> int:
    """Weights and biases of linear layers."""
    return sum(before * after + after for before, after in pairs)


def vision_tower(model: Published) -> int:
    """Parameters of the tower without its merger."""
    width = WIDTH[model.family]
    patch = {"qwen2": 14, "qwen2.5": 14, "qwen3": 16}[model.family]
    stem = 3 * 2 * patch * patch * width
    if model.family == "qwen3":  # a bias, and learnt positions on a grid of 48 x 48
        stem += width + 48 * 48 * width
    norms = 2 * width * (1 if model.family == "qwen2.5" else 2)  # RMSNorm has no bias
    return stem + DEPTH[model.family] * (whole(vision_pairs(model)) + norms)


def merger(model: Published, *, deepstack: bool = False) -> int:
    """Parameters of one merger over 2 x 2 patches; those of deepstack normalise after the patches are joined."""
    width = WIDTH[model.family]
    norm = width * (1 if model.family == "qwen2.5" else 2) * (4 if deepstack else 1)
    return norm + whole([(4 * width, 4 * width), (4 * width, model.hidden)])


def lora_numbers(rank: int, pairs: list[tuple[int, int]]) -> int:
    return sum(rank * (before + after) for before, after in pairs)


def recipe(name: str) -> Settings:
    return load_settings(find_recipe(name))


@cache
def adapted(folder: Path, name: str) -> dict[str, dict[str, int]]:
    settings = recipe(name)
    model = build_skeleton(str(folder), quantization=settings.model.quantization)
    lora = settings.lora
    config = build_lora_config(
        model,
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        targets=lora.targets,
        ranks=lora.ranks,
        dora=lora.dora,
        rslora=lora.rslora,
    )
    return parameters_by_area(get_peft_model(model, config, low_cpu_mem_usage=True).named_parameters())


def trained(counts: dict[str, dict[str, int]]) -> int:
    return sum(count["trainable"] for count in counts.values())


@pytest.fixture
def configurations(shared: Path) -> Path:
    return shared / "data" / "qwen" / "configs" / "reconstructed"


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_of_the_published_models_has_its_area(configurations: Path, name: str) -> None:
    published = MODELS[name]
    skeleton = build_skeleton(str(configurations / name))
    assert all(weight.is_meta for weight in skeleton.parameters())
    counts = {area: count["trainable"] for area, count in parameters_by_area(skeleton.named_parameters()).items()}
    assert sum(counts.values()) == published.parameters
    assert counts["vision"] == vision_tower(published)
    assert counts["merger"] == merger(published)
    assert counts["deepstack"] == (3 * merger(published, deepstack=True) if published.family == "qwen3" else 0)
    assert counts["embeddings"] == published.vocabulary * published.hidden
    assert counts["head"] == (0 if published.tied else published.vocabulary * published.hidden)


@pytest.mark.parametrize("name", MODELS)
def test_r4(configurations: Path, name: str) -> None:
    published = MODELS[name]
    language = published.layers * lora_numbers(64, language_pairs(published))
    vision = DEPTH[published.family] * lora_numbers(64, vision_pairs(published))
    counts = adapted(configurations / name, "r4-joint")
    assert (counts["language"]["trainable"], counts["vision"]["trainable"]) == (language, vision)
    assert trained(counts) == language + vision
    quantised = published.layers * sum(before * after for before, after in language_pairs(published))
    assert sum(count["quantised"] for count in counts.values()) == counts["language"]["quantised"] == quantised
    assert sum(count["frozen"] for count in counts.values()) + quantised == published.parameters


@pytest.mark.parametrize("name", ["Qwen2-VL-7B-Instruct", "Qwen3-VL-4B-Instruct"])
def test_r1(configurations: Path, name: str) -> None:
    published = MODELS[name]
    language = published.layers * lora_numbers(64, language_pairs(published))
    if name == "Qwen2-VL-7B-Instruct":
        assert language == 161_480_704
    assert trained(adapted(configurations / name, "r1-llm-only")) == language


@pytest.mark.parametrize("name", MODELS)
def test_areas_of_a_full_fine_tune(configurations: Path, name: str) -> None:
    published = MODELS[name]
    skeleton = build_skeleton(str(configurations / name))
    three = ["deepstack"] if published.family == "qwen3" else []
    extra = 3 * merger(published, deepstack=True) if three else 0
    assert recipe("r2-vision-only").training.areas == ("vision", "merger")
    assert recipe("merger-only").training.areas == ("merger",)
    two = train_only(skeleton, ["vision", "merger", *three])
    assert trained(two) == vision_tower(published) + merger(published) + extra
    assert trained(train_only(skeleton, ["merger"])) == merger(published)
    assert trained(train_only(skeleton, recipe("full").training.areas)) == published.parameters


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("name", ["r1-llm-only", "r4-joint", "lora-light", "lora-heavy"])
def test_lora_recipes_resolve_on_each_family(family_base: Callable[[str], Path], model_type: str, name: str) -> None:
    counts = adapted(family_base(model_type), name)
    areas = {area for area, count in counts.items() if count["trainable"]}
    expected = {"r1-llm-only": {"language"}, "r4-joint": {"language", "vision"}, "lora-light": {"language"}}
    assert areas == expected.get(name, {"language", "vision", "merger"})


@pytest.mark.parametrize("vision", [False, True])
@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_what_a_skeleton_says_is_what_is_loaded(
    family_base: Callable[[str], Path], model_type: str, vision: bool
) -> None:
    pytest.importorskip("bitsandbytes")
    asked: dict[str, Any] = {"quantization": "nf4", "quantize_vision": vision}
    folder = str(family_base(model_type))
    loaded = load(folder, min_pixels=4096, max_pixels=16384, **asked).model.requires_grad_(False)
    skeleton = build_skeleton(folder, **asked).requires_grad_(False)
    counts = parameters_by_area(loaded.named_parameters())
    assert parameters_by_area(skeleton.named_parameters()) == counts
    total = sum(weight.numel() for weight in build_skeleton(folder).parameters())
    assert sum(sum(count.values()) for count in counts.values()) == total


def test_a_skeleton_needs_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(ModelError, match=r"no config\.json in that folder; it holds a\.txt"):
        build_skeleton(str(tmp_path))
    tiny = build_skeleton("tiny")
    assert sum(weight.numel() for weight in tiny.parameters()) == sum(
        weight.numel() for weight in load("tiny").model.parameters()
    )

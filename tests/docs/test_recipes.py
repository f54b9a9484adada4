"""The pages of the recipes: one each, with commands that parse, links that lead somewhere, and counts that are right."""

from __future__ import annotations

import re
import shlex
from functools import cache
from math import prod
from pathlib import Path

import pytest

from vlmdet.cli import parse
from vlmdet.config import find_recipe, load_stages
from vlmdet.settings import Settings

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "recipes"
PAGES = sorted(path for path in FOLDER.glob("*.md") if path.name != "README.md")
ALL = [*PAGES, FOLDER / "README.md"]
RECIPES = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
MODELS = ("Qwen2-VL-2B-Instruct", "Qwen2-VL-7B-Instruct")

name_of = pytest.mark.parametrize("page", ALL, ids=lambda path: path.stem)


def commands(text: str) -> list[list[str]]:
    """Words of each command of a page: of indented lines and of code within a line that begin with `vlmdet `."""
    lines = re.findall(r"^    (vlmdet .+)$", text, re.MULTILINE) + re.findall(r"`(vlmdet [^`]+)`", text)
    return [shlex.split(line)[1:] for line in lines]


def test_every_recipe_has_a_page_and_every_page_a_recipe() -> None:
    assert {page.stem for page in PAGES} == RECIPES


def test_the_index_links_every_page_once() -> None:
    links = re.findall(r"\]\(([\w.-]+\.md)\)", (FOLDER / "README.md").read_text(encoding="utf-8"))
    assert sorted(links) == sorted(page.name for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_a_page_names_its_recipe_and_has_every_part(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# {page.stem}\n")
    parts = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert parts == ["When to use it", "What it trains", "Memory", "Measured here"]
    own = [words for words in commands(text) if words[0] == "train"]
    assert any(page.stem in words for words in own)


@name_of
def test_commands_parse_and_name_recipes_that_exist(page: Path) -> None:
    found = commands(page.read_text(encoding="utf-8"))
    assert found
    for words in found:
        args = parse(words)  # an unknown verb or flag ends the process
        if hasattr(args, "recipe"):
            assert args.recipe in RECIPES
            load_stages(find_recipe(args.recipe), args.overrides)


def test_the_commands_are_found() -> None:
    text = "See `vlmdet env`.\n\n    vlmdet train FOLDER --recipe full a.b=1\n\nvlmdet is a word here.\n"
    assert commands(text) == [["train", "FOLDER", "--recipe", "full", "a.b=1"], ["env"]]


@name_of
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    targets = [link.partition("#")[0] for link in links if not link.startswith(("http://", "https://", "#"))]
    assert [target for target in targets if not (page.parent / target).is_file()] == []


def stated(page: Path, model: str) -> list[int]:
    """Trainable parameters that a page states for a model: one number for each stage."""
    text = page.read_text(encoding="utf-8")
    rows = re.findall(rf"^\| {re.escape(model)}[^|]*\| ([\d,]+) \|", text, re.MULTILINE)
    return [int(number.replace(",", "")) for number in rows]


@cache
def linear_sizes(folder: str, target: str) -> tuple[int, ...]:
    """Inputs plus outputs of each layer of a role: what an adapter of rank 1 trains there."""
    from vlmdet.models.families import resolve_targets

    model = skeleton(folder)
    return tuple(sum(model.get_submodule(name).weight.shape) for name in resolve_targets(model, [target]))


@cache
def skeleton(folder: str):  # type: ignore[no-untyped-def]
    from vlmdet.models.loader import build_skeleton

    return build_skeleton(folder)


def counted(folder: str, settings: Settings) -> int:
    """Trainable parameters by the sizes of layers: rank x (inputs + outputs), or all numbers of the areas."""
    from vlmdet.models.families import area_of

    if settings.training.method == "lora":
        lora = settings.lora
        return sum(
            lora.ranks.get(target, lora.rank) * size for target in lora.targets for size in linear_sizes(folder, target)
        )
    areas = settings.training.areas
    return sum(
        prod(weight.shape)
        for name, weight in skeleton(folder).named_parameters()
        if not areas or area_of(name) in areas
    )


@pytest.mark.parametrize("model", MODELS)
def test_trainable_parameters_are_right(shared: Path, model: str) -> None:
    folder = str(shared / "data" / "qwen" / "configs" / "reconstructed" / model)
    for page in PAGES:
        if page.stem != "tiny":
            stages = load_stages(find_recipe(page.stem))
            assert stated(page, model) == [counted(folder, settings) for settings in stages], page.name


def test_trainable_parameters_of_tiny_are_right() -> None:
    (settings,) = load_stages(find_recipe("tiny"))
    assert stated(FOLDER / "tiny.md", "tiny") == [counted("tiny", settings)]

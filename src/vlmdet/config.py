"""Read the settings of a run: a recipe, its stages, and what a command line lays over them.

When: ALWAYS; no torch. Read once, before anything else runs:

    defaults  <-  base  <-  the YAML file  <-  overrides such as `training.epochs=5`

The classes are in `settings`, what they must hold to in `limits`, how YAML is bound to them in `binding`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vlmdet.binding import apply_override, as_plain, bind, read_yaml
from vlmdet.errors import ConfigError, did_you_mean
from vlmdet.limits import check
from vlmdet.settings import Settings


def load_settings(
    path: Path | None, overrides: Sequence[str] = (), base: Settings | Mapping[str, Any] | None = None
) -> Settings:
    """Read the settings of a run and check that they can work.

    When: once, first of all.

    Input: `path` of a YAML file with some or all keys, or None; `overrides` such as `["training.epochs=5",
    "data.classes=[WBC]", "data.rename.WBC=white blood cell"]`, each value read as YAML; `base`, where to start from
    instead of the defaults.
    Output: settings in which overrides win over the file, and the file over `base`. A mapping or list is replaced as a
    whole, except by `data.rename.KEY=…`, which sets one key.

    Raises:
        ConfigError: the file is missing or no YAML, a key is unknown, a value has the wrong type or cannot work.
    """
    settings = base if isinstance(base, Settings) else bind(Settings(), base or {}, where="")
    if path is not None:
        settings = bind(settings, read_yaml(path), where=f"{path}: ")
    for override in overrides:
        settings = apply_override(settings, override)
    check(settings)
    return settings


def load_stages(path: Path, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None) -> list[Settings]:
    """Read the settings of a recipe, one for each of its stages; most recipes have one.

    When: once per command.

    Input: `path` of a recipe; `flags`, nested settings that a command line gave, laid over the recipe; `overrides`, over both.
    Output: settings without `stages`. Of several stages all but the last are named `NAME-1-RECIPE`, `NAME-2-RECIPE`, …; each
    but the first trains on the result of the one before, which whoever runs them fills in as `model.name`.

    Raises:
        ConfigError: as `load_settings`; or a stage has stages itself.
    """
    whole = load_settings(path)
    if not whole.stages:
        return [load_settings(None, overrides, base=lay_over(as_plain(whole), flags or {}))]
    common = {key: value for key, value in read_yaml(path).items() if key != "stages"}
    result = []
    for number, recipe in enumerate(whole.stages, 1):
        stage = load_settings(find_recipe(recipe))
        if stage.stages:
            raise ConfigError(f"{path}: the stage '{recipe}' has stages itself", "name its stages instead")
        plain = lay_over(lay_over(as_plain(stage), common), flags or {})
        settings = load_settings(None, overrides, base=plain)
        last = number == len(whole.stages)
        result.append(
            settings if last else dataclasses.replace(settings, name=f"{settings.name}-{number}-{stage.name}")
        )
    return result


def lay_over(plain: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Lay nested changes over plain settings, section by section; neither is changed."""
    result = dict(plain)
    for key, value in changes.items():
        section = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = {**result[key], **value} if section else value
    return result


def to_yaml(settings: Settings) -> str:
    """Write settings as YAML, every key in the order of the classes; `load_settings` reads the same settings back."""
    plain = as_plain(settings)
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=1000)
    if yaml.safe_load(text) != plain:  # PyYAML loses a next-line character (U+0085) unless everything is escaped
        text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=False, width=1000)
    return text


def find_recipe(name: str) -> Path:
    """Find the file of a recipe by its name, such as `tiny`, or by a path, such as `mine/cells.yaml`.

    When: once, where a command names a recipe. Recipes lie in `configs/` of a checkout, or within an installed package.

    Raises:
        ConfigError: there is none; the message lists those that are.
    """
    if Path(name).suffix in {".yaml", ".yml"} or len(Path(name).parts) > 1:
        path = Path(name)
        if path.is_file():
            return path
        beside = [str(other) for other in sorted(path.parent.glob("*.y*ml"))]
        raise ConfigError(f"there is no recipe file '{name}'", did_you_mean(name, beside or _recipes()))
    recipes = _recipes()
    if name not in recipes:
        raise ConfigError(f"unknown recipe '{name}'", did_you_mean(name, recipes))
    return recipes[name]


def _recipes() -> dict[str, Path]:
    """List the recipes by name: of the installed package, else of the checkout that this file lies in."""
    package = Path(__file__).parent
    folders = (package / "configs", package.parents[1] / "configs")
    folder = next((folder for folder in folders if folder.is_dir()), folders[-1])
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}

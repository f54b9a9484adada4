"""From YAML and dotted overrides to typed settings, without guessing: any tree of frozen dataclasses.

When: ALWAYS, by `config`; no torch. An unknown key or a value of the wrong type is a `ConfigError` that names the dotted key and
the way out. No text is ever evaluated.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from vlmdet.errors import ConfigError, did_you_mean

T = TypeVar("T")


def read_yaml(path: Path) -> Mapping[Any, Any]:
    """Read one YAML file whose top is a mapping, and in which no key stands twice."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        beside = [str(other) for other in sorted(path.parent.glob("*.y*ml"))]
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", did_you_mean(str(path), beside)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not a text file in UTF-8", "name a YAML file") from error
    values = parse_yaml(text, where=f"{path}: ")
    if values is None:
        raise ConfigError(f"{path}: holds no settings", "leave it out to use the defaults")
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: is a {type(values).__name__}, not a mapping", "write `key: value` lines")
    return values


def parse_yaml(text: str, *, where: str) -> Any:
    """Parse YAML, as plain values only.

    PyYAML answers text such as `2020-13-45` or `!!int ''` with errors of Python's own, hence the long list.
    """
    try:
        _refuse_duplicate_keys(yaml.compose(text, Loader=yaml.SafeLoader), where=where)
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        detail = str(error)
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        detail = f"a value cannot be read: {error}"
    except RecursionError:
        detail = "it is nested too deeply"
    raise ConfigError(f"{where}is no valid YAML: {detail}", "check indentation and quotes")


def _refuse_duplicate_keys(root: yaml.Node | None, *, where: str) -> None:
    """Refuse a mapping that holds a key twice: `safe_load` would keep the last without a word."""
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen:  # an alias can point to a node again
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting.extend(node.value)
        elif isinstance(node, yaml.MappingNode):
            keys = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if (key.tag, key.value) in keys:
                        line = key.start_mark.line + 1
                        raise ConfigError(f"{where}line {line}: the key '{key.value}' stands twice", "keep one of them")
                    keys.add((key.tag, key.value))
                waiting.append(value)


def apply_override(settings: T, override: str) -> T:
    """Return a copy of settings with one key set by `dotted.key=value`.

    Raises:
        ConfigError: there is no such key, or the value is none for it.
    """
    dotted, equals, text = override.partition("=")
    parts = dotted.strip().split(".")
    if not equals:
        raise ConfigError(f"the override '{override}' has no '='", "write it as training.epochs=5")
    hint: Any = type(settings)
    for depth, part in enumerate(parts):
        if not dataclasses.is_dataclass(hint):
            if get_origin(hint) is dict:  # a class name or a role may hold dots itself
                stage, name, key = getattr(settings, parts[0]), parts[depth - 1], ".".join(parts[depth:])
                entry = {**getattr(stage, name), key: _override_value(text, get_args(hint)[1], dotted)}
                return bind(settings, {parts[0]: {name: entry}}, where="")
            raise ConfigError(f"'{'.'.join(parts[:depth])}' has no keys below it", f"write {'.'.join(parts[:depth])}=…")
        hint = _field_type(
            hint, part, prefix="".join(f"{parent}." for parent in parts[:depth]), where="", root=type(settings)
        )
    value = _override_value(text, hint, dotted)
    for part in reversed(parts):
        value = {part: value}
    return bind(settings, value, where="")


def _override_value(text: str, hint: Any, dotted: str) -> Any:
    """Read the value of an override as YAML; where text is wanted, `007`, `no` and `null` stay what was typed."""
    if hint is str or get_origin(hint) is Literal:
        quoted = text[:1] in {"'", '"'}
        return parse_yaml(text, where=f"{dotted}: ") if quoted else text
    return parse_yaml(text, where=f"{dotted}: ")


def bind(current: T, values: Mapping[Any, Any], *, where: str, prefix: str = "", root: Any = None) -> T:
    """Return a copy of a settings object with some of its fields replaced by checked values.

    Input: `where` stands before a message, such as `mine.yaml: `; `prefix` and `root`, the dotted way here and the class at the
    top, are for sections.

    Raises:
        ConfigError: an unknown key, or a value of the wrong type; with the dotted key and the way out.
    """
    root = root or type(current)
    changes: dict[str, Any] = {}
    for key, value in values.items():
        hint = _field_type(type(current), key, prefix=prefix, where=where, root=root)
        if dataclasses.is_dataclass(hint):
            if value is None or isinstance(value, Mapping):  # a section with nothing but comments reads as None
                inner = getattr(current, key)
                changes[key] = bind(inner, value or {}, where=where, prefix=f"{prefix}{key}.", root=root)
            else:
                raise ConfigError(f"{where}{prefix}{key} is {show(value)}, not a section", "write its keys below it")
        else:
            changes[key] = _convert(value, hint, key=f"{prefix}{key}", where=where)
    return dataclasses.replace(current, **changes)  # type: ignore[type-var]


def _field_type(owner: Any, key: Any, *, prefix: str, where: str, root: Any) -> Any:
    """Return the annotated type of a field, or refuse a key that is none."""
    hints = get_type_hints(owner)
    if key not in hints:
        # A key of another section is the likelier mistake than a spelling: `epochs` at the top is `training.epochs`.
        elsewhere = [name for name in _dotted_names(root) if name.split(".")[-1] == key]
        choices = [f"{prefix}{name}" for name in hints]
        hint = did_you_mean(elsewhere[0] if elsewhere else f"{prefix}{key}", elsewhere or choices)
        raise ConfigError(f"{where}unknown key '{prefix}{key}'", hint)
    return hints[key]


def _dotted_names(root: Any) -> list[str]:
    stages = {name: hint for name, hint in get_type_hints(root).items() if dataclasses.is_dataclass(hint)}
    return [f"{stage}.{entry.name}" for stage, hint in stages.items() for entry in dataclasses.fields(hint)]


def _convert(value: Any, hint: Any, *, key: str, where: str) -> Any:
    """Return `value` as the annotated type, without guessing.

    Raises:
        ConfigError: it is not of that type; names key, value and what is expected.
    """
    for expected in get_args(hint) if get_origin(hint) in {Union, types.UnionType} else (hint,):
        reader = _READERS.get(expected)
        good, result = reader(value) if reader else (value in get_args(expected), value)
        if good:
            return result
    raise ConfigError(f"{where}{key} is {show(value)}", f"expected {_describe(hint)}")


def _as_float(value: Any) -> tuple[bool, Any]:
    """Read a finite number; a text too, since YAML 1.1 takes `1e-4` for one."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False, value
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return False, value
    return math.isfinite(number), number


def _as_names(value: Any) -> tuple[bool, Any]:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        return False, value
    return True, tuple(value)


def _as_renames(value: Any) -> tuple[bool, Any]:
    good = isinstance(value, Mapping) and all(isinstance(text, str) for pair in value.items() for text in pair)
    return good, dict(value) if good else value


def _as_ranks(value: Any) -> tuple[bool, Any]:
    good = isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(rank, int) and not isinstance(rank, bool) for name, rank in value.items()
    )
    return good, dict(value) if good else value


_READERS: dict[Any, Callable[[Any], tuple[bool, Any]]] = {
    str: lambda value: (isinstance(value, str), value),
    bool: lambda value: (isinstance(value, bool), value),
    int: lambda value: (isinstance(value, int) and not isinstance(value, bool), value),
    float: _as_float,
    type(None): lambda value: (value is None, value),
    tuple[str, ...]: _as_names,
    dict[str, str]: _as_renames,
    dict[str, int]: _as_ranks,
}
"""How a plain YAML value becomes a field's type: whether it can, and the value."""

_WORDS = {
    str: "text (quote it if it looks like a number or like yes or no)",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    type(None): "null",
    tuple[str, ...]: "a list of texts such as [a, b] (quote what looks like a number or like yes or no)",
    dict[str, int]: "texts to whole numbers such as {vision.attn: 8}",
    dict[str, str]: "texts to texts such as {a: b} (quote what looks like a number or like yes or no)",
}


def _describe(hint: Any) -> str:
    if get_origin(hint) in {Union, types.UnionType}:
        return " or ".join(_describe(part) for part in get_args(hint))
    return _WORDS.get(hint) or f"one of: {', '.join(str(choice) for choice in get_args(hint))}"


def show(value: Any) -> str:
    """Write a value for a message: short, whatever it is."""
    if isinstance(value, Mapping):
        return f"a mapping of {len(value)}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if any(not isinstance(item, str) for item in value) else str(list(value))[:100]
    return repr(value)[:100]


def as_plain(value: Any) -> Any:
    """Turn a settings object into mappings and lists, as YAML has them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {entry.name: as_plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value

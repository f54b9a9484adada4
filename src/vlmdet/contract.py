"""What one run assumed, as `contract.json` beside its weights and predictions.

When: ALWAYS; no torch. Training writes it; every later step makes its own and refuses to go on under another:

    trained = Contract.read(run_folder)
    refuse_mismatch(trained, now, allow=["max_pixels"])     # --allow max_pixels

This module stores and compares what others compute. Which fields must agree is decided here:

    must agree       why
    system_prompt    the answer depends on the words of the question
    user_prompt      the same
    labels           they are asked for, and answers outside of them are off-list
    template_sha256  another template sets other tokens around the same words
    codec            another codec reads other boxes out of the same text
    codec_version    the same
    min_pixels       the size at which the model sees a picture
    max_pixels       the same
    size_factor      the same
    base_fingerprint an adapter on another base is noise; the name of a base is no proof

    for information  why
    base_model       the same weights may lie under another path; the fingerprint decides
    box_order        shapes the training targets; neither parsing nor scoring depends on it
    data_fingerprint a tuned model is for other data; it says what it was tuned on
    decoding         how long an answer may grow is the caller's choice; it goes with every figure
    versions         a library moves on; it says where to look when figures differ

Two files of predictions whose figures are set against each other should agree in `decoding` too: pass `fields`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vlmdet.errors import ConfigError, ContractError, did_you_mean
from vlmdet.files import write_whole

FILE_NAME = "contract.json"
SCHEMA = 1

MUST_AGREE = (
    "system_prompt",
    "user_prompt",
    "labels",
    "template_sha256",
    "codec",
    "codec_version",
    "min_pixels",
    "max_pixels",
    "size_factor",
    "base_fingerprint",
)
"""The fields that `refuse_mismatch` holds equal unless told otherwise."""


@dataclass(frozen=True, kw_only=True)
class Contract:
    """What one run assumed.

    Attributes:
        system_prompt: the system message, "" for none.
        user_prompt: the question beside the picture.
        template_sha256: SHA-256 of the chat template's text, in hexadecimal.
        codec: how boxes are written: `qwen2_vl`.
        codec_version: its version.
        min_pixels: below it a picture is enlarged.
        max_pixels: above it a picture is shrunk.
        size_factor: both sides of a resized picture are multiples of it, in pixels: 28 for Qwen2-VL.
        box_order: order of the boxes in the training answers: `raster`, `as_given`, `large_first` or `shuffle`.
        labels: class names as asked for and written, in order.
        base_model: the base's name, id or path.
        base_fingerprint: a hash over tensors of the base.
        data_fingerprint: a hash over the training rows.
        decoding: how answers were generated: `{"max_new_tokens": 256, "do_sample": false}`.
        versions: versions of the libraries that matter: `{"transformers": "5.23.0"}`.
        schema: version of this list of fields.
    """

    system_prompt: str
    user_prompt: str
    template_sha256: str
    codec: str
    codec_version: str
    min_pixels: int
    max_pixels: int
    size_factor: int
    box_order: str
    labels: tuple[str, ...]
    base_model: str
    base_fingerprint: str
    data_fingerprint: str
    decoding: dict[str, Any]
    versions: dict[str, str]
    schema: int = SCHEMA

    def write(self, folder: Path) -> None:
        """Write `contract.json` into a folder, which is made; never leaves half a file.

        When: once per adapter, prediction file or merged model.
        """
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False, allow_nan=False)
        write_whole(folder / FILE_NAME, text + "\n")

    @classmethod
    def read(cls, folder: Path) -> Contract:
        """Read `contract.json` of a folder.

        When: per run, before a model is loaded.

        Raises:
            ContractError: it is missing or broken, or of another schema.
        """
        path = folder / FILE_NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ContractError(
                f"{path}: cannot be read: {error.strerror}",
                "name the folder of a run, or of weights or predictions that vlmdet wrote",
            ) from error
        except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or nested without end
            raise ContractError(f"{path}: is no JSON: {error}", "restore the file, or train again") from error
        return cls(**_checked(values, path=path))


class Difference(NamedTuple):
    """One field in which two contracts differ: `first` and `second` hold its two values."""

    field: str
    first: Any
    second: Any


def compare(first: Contract, second: Contract, *, ignore: Iterable[str] = ()) -> list[Difference]:
    """List the fields in which two contracts differ, in the order of `Contract`.

    When: per run. `ignore` names fields to leave out.

    Raises:
        ConfigError: `ignore` names what is no field.
    """
    left_out = set(check_fields(ignore))
    return [
        Difference(entry.name, getattr(first, entry.name), getattr(second, entry.name))
        for entry in dataclasses.fields(Contract)
        if entry.name not in left_out and getattr(first, entry.name) != getattr(second, entry.name)
    ]


def refuse_mismatch(
    trained: Contract, now: Contract, *, allow: Iterable[str] = (), fields: Iterable[str] = MUST_AGREE
) -> None:
    """Stop where a step would use a model under other assumptions than it was trained with.

    When: per run, before anything is generated or scored.

    Input: the contract that was read and the one of this step; `allow`, fields that the user permits to differ;
    `fields`, those that must agree.

    Raises:
        ContractError: a field differs; the message names each such field, both values, and the flag that permits it.
        ConfigError: `allow` or `fields` names what is no field.
    """
    required = set(check_fields(fields)) - set(check_fields(allow))
    differences = [difference for difference in compare(trained, now) if difference.field in required]
    if differences:
        parts = [
            "{} was {}, now {}".format(difference.field, *_show_pair(difference.first, difference.second))
            for difference in differences
        ]
        flags = " ".join(f"--allow {difference.field}" for difference in differences)
        raise ContractError(f"the contract differs: {', and '.join(parts)}", f"use what was trained, or pass {flags}")


def permitted(trained: Contract, now: Contract, allow: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return both values of each field that the user permits to differ, for the record of what is made under it.

    When: per run with `--allow FIELD`, after `refuse_mismatch`.

    Output: `{"max_pixels": {"trained": 38416, "now": 50176}}`, with a field that does not differ too; JSON values.
    """
    pairs = {name: (getattr(trained, name), getattr(now, name)) for name in check_fields(allow)}
    return {
        name: {
            word: list(value) if isinstance(value, tuple) else value
            for word, value in zip(("trained", "now"), pair, strict=True)
        }
        for name, pair in pairs.items()
    }


def adopt(contract: Contract, allowed: dict[str, dict[str, Any]]) -> Contract:
    """Return the contract of a step that goes on under what is now, where the user permits it: see `permitted`.

    A field that this contract has otherwise than it was trained, such as the question of a base in its own words, is kept.
    """
    now: dict[str, Any] = {
        name: tuple(values["now"]) if name == "labels" else values["now"]
        for name, values in allowed.items()
        if getattr(contract, name) == (tuple(values["trained"]) if name == "labels" else values["trained"])
    }
    return dataclasses.replace(contract, **now)


def tell_permitted(allowed: dict[str, dict[str, Any]]) -> list[str]:
    """Say of each field of `permitted`, in a line, what was let pass."""
    lines = []
    for name, values in allowed.items():
        if values["trained"] == values["now"]:
            lines.append(f"--allow {name}: it does not differ")
        else:
            lines.append("--allow {}: was {}, now {}".format(name, *_show_pair(values["trained"], values["now"])))
    return lines


def check_fields(names: Iterable[str]) -> list[str]:
    """Return the names, or refuse one that is no field of a contract.

    Raises:
        ConfigError: it is none; says which one may be meant.
    """
    known = [entry.name for entry in dataclasses.fields(Contract)]
    listed = list(names)
    for name in listed:
        if name not in known:
            raise ConfigError(f"'{name}' is no field of a contract", did_you_mean(name, known))
    return listed


def _checked(values: Any, *, path: Path) -> dict[str, Any]:
    """Return the fields of a contract that was read, each of its type."""
    if not isinstance(values, dict):
        raise ContractError(f"{path}: is no contract but a {type(values).__name__}", "restore the file, or train again")
    if values.get("schema") != SCHEMA or isinstance(values["schema"], bool):
        raise ContractError(
            f"{path}: its schema is {str(values.get('schema', 'missing'))[:40]}, this version reads {SCHEMA}",
            "use the version of vlmdet that wrote it, or train again",
        )
    names = [entry.name for entry in dataclasses.fields(Contract)]
    missing, unknown = [name for name in names if name not in values], [name for name in values if name not in names]
    if missing or unknown:
        what = f"lacks {', '.join(missing)}" if missing else f"has the unknown field '{unknown[0]}'"
        raise ContractError(f"{path}: {what}", "restore the file, or train again")
    for entry in dataclasses.fields(Contract):
        if not _has_type(values[entry.name], entry.type):
            raise ContractError(
                f"{path}: {entry.name} is {_shorten(repr(values[entry.name]))}, expected {entry.type}",
                "restore the file, or train again",
            )
    return {**values, "labels": tuple(values["labels"])}


def _has_type(value: Any, annotation: Any) -> bool:
    """Tell whether a JSON value fits the written annotation of a field."""
    if annotation == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation == "tuple[str, ...]":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if annotation == "dict[str, str]":
        return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())
    return isinstance(value, dict if annotation == "dict[str, Any]" else str)


def _shorten(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:78]} …"


def _show_pair(first: Any, second: Any) -> tuple[str, str]:
    """Write two values for a message; of long ones the part in which they differ."""
    one, other = repr(first), repr(second)
    if max(len(one), len(other)) <= 80:
        return one, other
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    start = max(0, same - 20)
    lead = "… " if start else ""
    return lead + _shorten(one[start:]), lead + _shorten(other[start:])

"""`contract.json`: written, read back, compared, and refused when it does not fit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from vlmdet.contract import (
    FILE_NAME,
    MUST_AGREE,
    Contract,
    Difference,
    adopt,
    compare,
    permitted,
    refuse_mismatch,
    tell_permitted,
)
from vlmdet.errors import ConfigError, ContractError

TRAINED = Contract(
    system_prompt="You find objects.",
    user_prompt="Detect every café table. “Quoted”",
    template_sha256="ab" * 32,
    codec="qwen2_vl",
    codec_version="qwen2_vl-1",
    min_pixels=12544,
    max_pixels=1003520,
    size_factor=28,
    box_order="raster",
    labels=("café table", "chair"),
    base_model="tiny",
    base_fingerprint="0123abcd",
    data_fingerprint="4567cdef",
    decoding={"do_sample": False, "max_new_tokens": 256, "stop": None},
    versions={"transformers": "5.23.0"},
)

OTHER: dict[str, Any] = {
    "system_prompt": "You look.",
    "user_prompt": "Where?",
    "template_sha256": "cd" * 32,
    "codec": "plain_json",
    "codec_version": "qwen2_vl-2",
    "min_pixels": 1,
    "max_pixels": 2,
    "size_factor": 32,
    "box_order": "as_given",
    "labels": ("chair", "café table"),
    "base_model": "other",
    "base_fingerprint": "ffff",
    "data_fingerprint": "eeee",
    "decoding": {"do_sample": True},
    "versions": {},
}
INFORMATIONAL = ("base_model", "box_order", "data_fingerprint", "decoding", "versions")


def test_a_contract_comes_back_as_it_was_written(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "001"
    TRAINED.write(folder)
    assert Contract.read(folder) == TRAINED
    assert [path.name for path in folder.iterdir()] == [FILE_NAME]  # no half-written file stays
    text = (folder / FILE_NAME).read_text(encoding="utf-8")
    assert "café" in text
    assert json.loads(text)["schema"] == 1


def test_a_second_write_replaces_the_first(tmp_path: Path) -> None:
    TRAINED.write(tmp_path)
    later = dataclasses.replace(TRAINED, max_pixels=7)
    later.write(tmp_path)
    assert Contract.read(tmp_path) == later


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"schema": 2}, "its schema is 2, this version reads 1"),
        ({"schema": True}, "its schema is True"),
        ({"schema": None}, "its schema is None"),
        ({"max_pixels": "big"}, "max_pixels is 'big', expected int"),
        ({"max_pixels": True}, "max_pixels is True, expected int"),
        ({"labels": "chair"}, "labels is 'chair', expected tuple"),
        ({"labels": [1]}, "labels is [1], expected tuple"),
        ({"codec": None}, "codec is None, expected str"),
        ({"decoding": []}, "decoding is [], expected dict"),
        ({"versions": {"a": 1}}, "versions is {'a': 1}, expected dict[str, str]"),
        ({"colour": 1}, "has the unknown field 'colour'"),
    ],
)
def test_a_broken_contract_is_refused_by_file_and_field(change: dict[str, Any], expected: str, tmp_path: Path) -> None:
    TRAINED.write(tmp_path)
    path = tmp_path / FILE_NAME
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(ContractError) as caught:
        Contract.read(tmp_path)
    assert str(caught.value).startswith(str(path))
    assert expected in str(caught.value)


@pytest.mark.parametrize("name", [entry.name for entry in dataclasses.fields(Contract)])
def test_a_missing_field_is_named(name: str, tmp_path: Path) -> None:
    TRAINED.write(tmp_path)
    path = tmp_path / FILE_NAME
    values = json.loads(path.read_text(encoding="utf-8"))
    del values[name]
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ContractError, match="schema is missing" if name == "schema" else f"lacks {name}"):
        Contract.read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null", b"[" * 100_000])
def test_what_is_no_contract_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(ContractError, match="is no "):
        Contract.read(tmp_path)


def test_a_missing_contract_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"contract\.json: cannot be read: No such file"):
        Contract.read(tmp_path / "nowhere")


def test_equal_contracts_do_not_differ() -> None:
    assert compare(TRAINED, dataclasses.replace(TRAINED)) == []
    refuse_mismatch(TRAINED, dataclasses.replace(TRAINED))


@pytest.mark.parametrize("name", list(OTHER))
def test_each_field_is_compared_and_can_be_left_out(name: str) -> None:
    now = dataclasses.replace(TRAINED, **{name: OTHER[name]})
    assert compare(TRAINED, now) == [Difference(name, getattr(TRAINED, name), OTHER[name])]
    assert compare(TRAINED, now, ignore=[name]) == []


@pytest.mark.parametrize("name", MUST_AGREE)
def test_what_must_agree_is_refused_with_both_values_and_the_flag(name: str) -> None:
    now = dataclasses.replace(TRAINED, **{name: OTHER[name]})
    with pytest.raises(ContractError) as caught:
        refuse_mismatch(TRAINED, now)
    assert f"{name} was {getattr(TRAINED, name)!r}, now {OTHER[name]!r}" in caught.value.message
    assert caught.value.hint.endswith(f"--allow {name}")
    refuse_mismatch(TRAINED, now, allow=[name])


@pytest.mark.parametrize("name", INFORMATIONAL)
def test_what_is_for_information_is_let_pass_unless_asked_for(name: str) -> None:
    now = dataclasses.replace(TRAINED, **{name: OTHER[name]})
    refuse_mismatch(TRAINED, now)
    with pytest.raises(ContractError, match=name):
        refuse_mismatch(TRAINED, now, fields=(*MUST_AGREE, name))


def test_every_field_is_decided() -> None:
    names = {entry.name for entry in dataclasses.fields(Contract)}
    assert names == {*MUST_AGREE, *INFORMATIONAL, "schema"}  # another schema is refused at reading


def test_allowing_one_difference_does_not_allow_another() -> None:
    now = dataclasses.replace(TRAINED, codec="plain_json", max_pixels=2)
    with pytest.raises(ContractError) as caught:
        refuse_mismatch(TRAINED, now)
    assert caught.value.hint.endswith("--allow codec --allow max_pixels")
    with pytest.raises(ContractError) as caught:
        refuse_mismatch(TRAINED, now, allow=["codec"])
    assert "codec" not in str(caught.value)


def test_of_long_values_the_part_that_differs_is_shown() -> None:
    first = dataclasses.replace(TRAINED, user_prompt="same " * 100 + "END ONE")
    second = dataclasses.replace(TRAINED, user_prompt="same " * 100 + "END TWO")
    with pytest.raises(ContractError) as caught:
        refuse_mismatch(first, second)
    assert "END ONE" in str(caught.value)
    assert "END TWO" in str(caught.value)
    assert len(str(caught.value)) < 300


def test_an_unknown_field_is_met_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'max_pixel' is no field of a contract; did you mean 'max_pixels'\?"):
        refuse_mismatch(TRAINED, TRAINED, allow=["max_pixel"])
    with pytest.raises(ConfigError):
        compare(TRAINED, TRAINED, ignore=["x"])


def test_what_a_user_permits_is_recorded_told_and_then_holds() -> None:
    now = dataclasses.replace(TRAINED, max_pixels=2, labels=("chair",), template_sha256="cd" * 32)
    allowed = permitted(TRAINED, now, ["max_pixels", "labels", "codec"])
    assert allowed == {
        "max_pixels": {"trained": 1003520, "now": 2},
        "labels": {"trained": ["café table", "chair"], "now": ["chair"]},
        "codec": {"trained": "qwen2_vl", "now": "qwen2_vl"},
    }
    json.dumps(allowed)
    assert tell_permitted(allowed) == [
        "--allow max_pixels: was 1003520, now 2",
        "--allow labels: was ['café table', 'chair'], now ['chair']",
        "--allow codec: it does not differ",
    ]
    assert adopt(TRAINED, allowed) == dataclasses.replace(TRAINED, max_pixels=2, labels=("chair",))
    own = dataclasses.replace(TRAINED, user_prompt="detect chair")  # a base in its own words keeps them
    asked = permitted(TRAINED, dataclasses.replace(TRAINED, user_prompt="Where?"), ["user_prompt"])
    assert (adopt(TRAINED, asked).user_prompt, adopt(own, asked)) == ("Where?", own)
    assert permitted(TRAINED, now, []) == {} and adopt(TRAINED, {}) == TRAINED
    with pytest.raises(ConfigError, match="did you mean 'max_pixels'"):
        permitted(TRAINED, now, ["max_pixel"])

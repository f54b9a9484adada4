"""The way from a tuned model to its base is read from contracts, link by link; what is missing or circular is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from vlmdet.contract import Contract
from vlmdet.errors import ContractError, ModelError
from vlmdet.models.stages import checkpoint_of, stages_of

CONTRACT = Contract(
    system_prompt="",
    user_prompt="Detect cup.",
    template_sha256="0" * 64,
    codec="qwen2_vl",
    codec_version="1",
    min_pixels=3136,
    max_pixels=12544,
    size_factor=28,
    box_order="raster",
    labels=("cup",),
    base_model="tiny",
    base_fingerprint="0" * 16,
    data_fingerprint="0" * 16,
    decoding={},
    versions={},
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stage(folder: str, base: str, *, file: str = "adapter_config.json") -> Path:
    """Make what `stages_of` looks at: a contract, and the file that tells an adapter from whole weights."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / file).write_text("{}")
    dataclasses.replace(CONTRACT, base_model=base).write(path)
    return path


def run(name: str, base: str, *, file: str = "adapter_config.json") -> Path:
    """Make a finished run, `runs/NAME/001`, and return its best checkpoint."""
    path = stage(f"runs/{name}/001/checkpoints/checkpoint-7", base, file=file)
    (path.parent / "best").symlink_to(path.name)
    return path.resolve()


def test_a_base_has_no_stages(here: Path) -> None:
    (here / "weights").mkdir()
    for name in ("tiny", "Qwen/Qwen2-VL-2B-Instruct", "weights", str(here / "weights")):
        found = stages_of(name)
        assert (found.base, found.folders, found.weights, found.adapters) == (name, (), name, ())


def test_a_run_is_named_in_four_ways() -> None:
    best = run("cells", "tiny")
    for name in ("cells", "runs/cells", "runs/cells/001", str(best)):
        found = stages_of(name)
        assert (found.base, found.folders, found.weights, found.adapters) == ("tiny", (best,), "tiny", (best,))


def test_adapters_are_laid_one_on_another_in_the_order_of_training() -> None:
    first = run("one", "Qwen/Qwen2-VL-2B-Instruct")
    second = run("two", str(first))
    third = run("three", "runs/two")  # a run's name as well as a folder
    found = stages_of("three")
    assert found.base == found.weights == "Qwen/Qwen2-VL-2B-Instruct"
    assert found.folders == found.adapters == (first, second, third)


def test_a_fully_tuned_stage_is_loaded_whole_and_the_first_base_is_still_known() -> None:
    first = run("one", "tiny")
    second = run("two", str(first), file="config.json")
    third = run("three", str(second))
    fourth = run("four", str(third))
    found = stages_of("four")
    assert (found.base, found.folders) == ("tiny", (first, second, third, fourth))
    assert (found.weights, found.adapters) == (str(second), (third, fourth))
    assert stages_of("two").adapters == ()


def test_below_whole_weights_nothing_need_be_there_but_below_an_adapter_it_must() -> None:
    gone = "runs/gone/001/checkpoints/checkpoint-7"
    whole = run("one", gone, file="config.json")
    assert stages_of("one").base == gone
    run("two", str(whole))
    assert stages_of("two").weights == str(whole)
    third = run("three", gone)
    with pytest.raises(ModelError, match="no such folder") as caught:
        stages_of("three")
    assert gone in str(caught.value) and str(third) in str(caught.value)


@pytest.mark.parametrize("name", ["runs/gone", "/gone/weights", "./gone", "a/b/c", "~/weights", "no such name"])
def test_a_path_to_nothing_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        stages_of(name)


def test_a_circle_is_refused() -> None:
    stage("a", "b")
    stage("b", "c")
    stage("c", "b")
    with pytest.raises(ModelError, match="circle: a -> b -> c -> b"):
        stages_of("a")
    stage("d", "./d")
    with pytest.raises(ModelError, match="circle"):
        stages_of("d")


def test_an_adapter_without_a_contract_is_no_base() -> None:
    (stage("half", "tiny") / "contract.json").unlink()
    with pytest.raises(ModelError, match="without a contract"):
        stages_of("half")
    run("two", "half")
    with pytest.raises(ModelError, match=r"half, the base of .*without a contract"):
        stages_of("two")


def test_a_broken_contract_is_named() -> None:
    path = stage("broken", "tiny") / "contract.json"
    path.write_text("{")
    with pytest.raises(ContractError, match=r"broken/contract\.json"):
        stages_of("broken")


def test_tiny_is_the_embedded_base_whatever_lies_beside() -> None:
    stage("tiny", "elsewhere")
    run("tiny", "elsewhere")
    assert checkpoint_of("tiny") is None
    assert stages_of("tiny").folders == ()

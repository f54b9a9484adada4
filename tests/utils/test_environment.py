"""`vlmdet env`: complete, short, and never a secret."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vlmdet.utils import environment
from vlmdet.utils.environment import PACKAGES, VARIABLES, describe_environment, format_environment


def test_it_holds_versions_machine_and_gpus() -> None:
    found = describe_environment(environ={})
    assert list(found) == ["vlmdet", "python", "platform", "cpus", "memory_gib", "gpus", "packages", "variables"]
    assert found["packages"]["numpy"] == np.__version__
    assert list(found["packages"]) == list(PACKAGES)
    assert found["cpus"] >= 1
    assert found["variables"] == {}
    json.dumps(found)


def test_secrets_are_never_shown() -> None:
    secrets = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HF_ENDPOINT", "PATH")
    environ = dict.fromkeys(secrets, "hunter2") | {"HF_HUB_OFFLINE": "1"}
    found = describe_environment(environ=environ)
    assert found["variables"] == {"HF_HUB_OFFLINE": "1"}
    assert "hunter2" not in format_environment(found)


@pytest.mark.parametrize("word", ["TOKEN", "KEY", "SECRET", "PASS", "ENDPOINT", "PROXY", "URL"])
def test_no_variable_on_the_list_can_hold_a_secret(word: str) -> None:
    assert [name for name in VARIABLES if word in name and name != "TOKENIZERS_PARALLELISM"] == []


def test_a_home_folder_does_not_show_who_asks() -> None:
    environ = {"HF_HOME": str(Path.home() / "models")}
    if len(str(Path.home())) <= 1:
        pytest.skip("the home folder is the root")
    assert describe_environment(environ=environ)["variables"] == {"HF_HOME": "~/models"}


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PACKAGES", ("numpy", "no-such-package-here"))
    found = describe_environment(environ={})
    assert found["packages"]["no-such-package-here"] is None
    assert "no-such-package-here: not found" in format_environment(found)


def test_the_block_is_aligned_lines() -> None:
    block = format_environment(
        {"vlmdet": "1.0", "memory_gib": 7.04, "packages": {"numpy": None}, "variables": {"A": "b"}}
    )
    assert block == "vlmdet:     1.0\nmemory_gib: 7.0\nnumpy:      not found\nA:          b"

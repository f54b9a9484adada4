"""What must run on any laptop in seconds imports no torch; found module by module, so that a new file is held to it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "vlmdet"
LIGHT = (
    "vlmdet",
    "vlmdet.boxes",
    "vlmdet.cli",
    "vlmdet.binding",
    "vlmdet.config",
    "vlmdet.limits",
    "vlmdet.settings",
    "vlmdet.contract",
    "vlmdet.data",
    "vlmdet.doctor.checks.data",
    "vlmdet.errors",
    "vlmdet.evaluation",
    "vlmdet.files",
    "vlmdet.grounding",
    "vlmdet.images",
    "vlmdet.models.answers",
    "vlmdet.models.stages",
    "vlmdet.records",
    "vlmdet.report",
    "vlmdet.runs",
    "vlmdet.utils",
)
"""Modules, and packages with all that lies in them, that do without torch."""

HEAVY_WITHIN = (
    "vlmdet.data.augment",
    "vlmdet.data.collators",
    "vlmdet.data.collators_other",
    "vlmdet.evaluation.evaluate",
    "vlmdet.evaluation.rendering",
)
"""The exceptions: they run a model, or prepare its input."""

HEAVY = ("torch", "torchvision", "transformers", "trl", "peft", "accelerate")


def modules() -> list[str]:
    """List the modules under `src` that must be light."""
    names = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("vlmdet", *path.relative_to(PACKAGE).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name in LIGHT or any(name.startswith(f"{light}.") for light in LIGHT[1:]):
            names.append(name)
    return [name for name in names if name not in HEAVY_WITHIN]


def loaded_by(*names: str) -> list[str]:
    """Return which heavy packages a fresh interpreter holds after it imported modules."""
    code = f"import sys, {', '.join(names)}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_light_modules_import_nothing_heavy() -> None:
    names = modules()
    assert "vlmdet.config" in names
    assert "vlmdet.grounding.qwen2_vl" in names
    if loaded_by(*names):  # slower, but names the culprit
        culprits = {name: found for name in names if (found := loaded_by(name))}
        pytest.fail(f"these import what they must not: {culprits}")


def test_the_check_sees_torch() -> None:
    assert loaded_by("torch") == ["torch"]


def test_the_command_line_starts_with_next_to_nothing() -> None:
    names = ("numpy", "PIL", "yaml", "rich", "datasets", "pandas", "pyarrow", "torch")
    code = f"import sys, vlmdet.cli; print(*[name for name in {names!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []

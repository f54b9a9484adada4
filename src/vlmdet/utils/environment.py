"""What a command runs on, as a block to paste in an issue.

When: once, by `vlmdet env`, and by each run for its `env.txt`. Versions are read from package metadata, so nothing
heavy is imported. Environment variables are shown only if they are on a list: a token can never be among them.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from vlmdet.utils.gpu import GIB, describe_gpus

PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "tokenizers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "qwen-vl-utils",
    "supervision",
    "pillow",
    "numpy",
    "safetensors",
    "nvidia-ml-py",
)
"""The packages whose versions change results."""

VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "TOKENIZERS_PARALLELISM",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "VLMDET_SHARED",
)
"""The environment variables that change behaviour and can hold no secret. No URL is here: one may hold a password."""


def describe_environment(*, environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Collect versions, machine, GPUs and the variables that change behaviour.

    Output: `{"vlmdet": "0.1.0", "python": "3.11.7", "platform": …, "cpus": 2, "memory_gib": 23.4, "gpus": "none: …",
    "packages": {"torch": "2.14.1", …}, "variables": {"HF_HUB_OFFLINE": "1"}}`; plain JSON values. `cpus` are those that
    this process may use; the version of a missing package is None, and so is `memory_gib` where the system does not
    tell. A home folder is written `~`.
    """
    return {
        "vlmdet": _version("vlmdet"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": _usable_cpus(),
        "memory_gib": _memory_gib(),
        "gpus": describe_gpus(environ=environ),
        "packages": {name: _version(name) for name in PACKAGES},
        "variables": {name: _without_home(environ[name]) for name in VARIABLES if name in environ},
    }


def format_environment(environment: Mapping[str, Any]) -> str:
    """Write what `describe_environment` collected as aligned `name: value` lines, without a line end at the end."""
    rows: list[tuple[str, str]] = []
    for name, value in environment.items():
        if isinstance(value, Mapping):
            rows += [(inner, _text(entry)) for inner, entry in value.items()]
        else:
            rows.append((name, _text(value)))
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name + ':':<{width + 1}} {text}" for name, text in rows)


def _text(value: Any) -> str:
    if value is None:
        return "not found"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _usable_cpus() -> int:
    """Count the CPUs that this process may run on, which in a container or under a scheduler are not all."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _memory_gib() -> float | None:
    """Return the machine's memory in GiB; None on a system that does not tell, such as Windows."""
    names = getattr(os, "sysconf_names", {})
    if "SC_PAGE_SIZE" not in names or "SC_PHYS_PAGES" not in names:
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def _without_home(text: str) -> str:
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text

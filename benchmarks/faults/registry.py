"""Register faults and healthy set-ups by a decorator, and build their subjects."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STAGES = (
    "data",
    "conversation",
    "template",
    "labels",
    "vision",
    "model",
    "optimisation",
    "evaluation",
    "serving",
)


@dataclass(frozen=True)
class Case:
    """One set-up: `id` is the catalogue's row that must be named, empty for a healthy one."""

    id: str
    stage: str
    half: int
    name: str
    build: Callable[..., Any]
    also: tuple[str, ...] = ()

    def subject(self, folder: Path) -> Any:
        """Build the subject; `folder` is an empty directory for those that write files."""
        return self.build(folder) if inspect.signature(self.build).parameters else self.build()


FAULTS: list[Case] = []
HEALTHY: list[Case] = []


def fault(id: str, *, stage: str, also: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function that returns a Subject with one fault; `also` are ids that are equally right."""

    def register(build: Callable[..., Any]) -> Callable[..., Any]:
        half = 1 if ".first." in build.__module__ else 2
        FAULTS.append(Case(id, stage, half, build.__name__, build, also))
        return build

    return register


def healthy(build: Callable[..., Any]) -> Callable[..., Any]:
    """Register a function that returns a Subject in which nothing is wrong."""
    HEALTHY.append(Case("", "", 0, build.__name__, build))
    return build


def subject(fields: dict[str, Any], **changes: Any) -> Any:
    """Make a Subject of a home's fields with some replaced; a change to None leaves that field out."""
    from vlmdet.doctor import Subject

    return Subject(**{key: value for key, value in (fields | changes).items() if value is not None})


def read_all() -> tuple[list[Case], list[Case]]:
    """Import every module of `first`, `second` and `healthy`; return faults and healthy set-ups."""
    here = Path(__file__).parent
    for folder in ("first", "second", "healthy"):
        for path in sorted((here / folder).glob("[a-z]*.py")):
            importlib.import_module(f"{__package__}.{folder}.{path.stem}")
    return FAULTS, HEALTHY

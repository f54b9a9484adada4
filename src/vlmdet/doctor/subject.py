"""What is examined: whatever a user has of rows, functions, objects and files.

When: once per examination. Every field may be absent; a check runs when its inputs are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, eq=False)
class Subject:
    """The parts of a user's own project.

    Attributes:
        rows: list of raw rows (dicts) or a `datasets.Dataset`; pictures as PIL, path, bytes or `{"bytes", "path"}`; annotations
            under usual names, or rows that hold `messages` already.
        splits: `{"train": rows, "val": rows, …}`.
        box_format: `"xyxy/pixel"`, `"yxyx/fraction"`, … as declared by the user.
        convert: raw row -> `{"messages": […], "image" or "images": …}`.
        processor: of the user's model.
        collate: list of converted examples -> batch; or a class built from (processor, model) or (processor).
        render: raw row -> messages used at inference.
        decode: token ids -> text, as in the user's evaluation.
        parse: text, or text, width, height -> list of boxes, or of `{"bbox" | "box" | "bbox_2d", "label"}`.
        metric: predictions, truths -> float or dict of floats; both lists (one entry per picture) of lists of boxes.
        model: a model, or the name or directory of one.
        build_trainer: () -> `transformers.Trainer`; it is run on a tiny random model of the same architecture.
        target_modules: list or text, as PEFT takes them.
        settings: the user's options under their usual names.
        run_dir: directory as written by any Trainer.
        artefacts: name -> path ("adapter", "base", "merged", "processor", …), or one directory.
    """

    rows: Any = None
    splits: Mapping[str, Any] | None = None
    box_format: Any = None
    convert: Callable[..., Any] | None = None
    processor: Any = None
    collate: Any = None
    render: Callable[..., Any] | None = None
    decode: Callable[..., Any] | None = None
    parse: Callable[..., Any] | None = None
    metric: Callable[..., Any] | None = None
    model: Any = None
    build_trainer: Callable[..., Any] | None = None
    target_modules: Any = None
    settings: Any = None
    run_dir: str | Path | None = None
    artefacts: Any = None

    def given(self) -> frozenset[str]:
        """Return the names of the fields that are there."""
        return frozenset(one.name for one in fields(self) if getattr(self, one.name) is not None)

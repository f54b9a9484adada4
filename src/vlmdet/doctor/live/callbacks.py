"""How a user's own callbacks generate: in which mode, with a cache or without, padded on which side.

When: for M12 and T07. Events of the user's callbacks are called on the built trainer with `generate` replaced by one
that notes how it was called and returns the question, so that nothing is generated; the working directory is a
temporary one.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import GenerationMixin

from vlmdet.doctor.calls import UserCodeError, call
from vlmdet.doctor.live.trainer import Built, _heard

MOST = 8
"""Calls that are noted for each event; the event then ends."""

STEPS = (1, 2, 10, 50, 100, 500, 1000)
"""Steps at which an event is tried, until it generates."""


@dataclass(frozen=True)
class Generation:
    """One call of `generate`: by which callback and event, in which mode, and how many rows are padded at their end."""

    caller: str
    training: bool
    use_cache: bool
    sampled: bool
    rows: int
    padded_right: int
    padded_left: int


class _Enough(Exception):  # noqa: N818  ends the event
    pass


def watch_callbacks(built: Built) -> list[Generation]:
    """Call the user's callbacks and return how they generated; what they raise is passed over."""
    trainer = built.trainer
    own = [one for one in trainer.callback_handler.callbacks if not _of_library(one)]
    noted: list[Generation] = []
    for callback in own:
        for event in ("on_evaluate", "on_step_end", "on_epoch_end", "on_save", "on_log"):
            method = getattr(type(callback), event, None)
            if method is None or _of_library(method):
                continue
            built.model.train(event != "on_evaluate")  # as the trainer leaves it at this event
            keywords = {"model": built.model, "metrics": {"eval_loss": 1.0}, "logs": {"loss": 1.0},
                        "processing_class": getattr(trainer, "processing_class", None),
                        "tokenizer": getattr(trainer, "processing_class", None)}  # fmt: skip
            begun = len(noted)
            step = trainer.state.global_step
            for at in dict.fromkeys((step, 0, *STEPS)):  # many generate at some steps only
                trainer.state.global_step = at
                with (
                    _watched(noted, f"{type(callback).__name__}.{event}", begun + MOST),
                    _heard(),
                    contextlib.suppress(UserCodeError, _Enough),
                ):
                    call("trainer", getattr(callback, event), trainer.args, trainer.state, trainer.control, **keywords)
                if len(noted) > begun:
                    break
            trainer.state.global_step = step
    return noted


def _of_library(thing: Any) -> bool:
    module = getattr(thing, "__module__", "") or ""
    return module.split(".")[0] in ("transformers", "trl", "peft", "accelerate", "builtins")


@contextlib.contextmanager
def _watched(noted: list[Generation], caller: str, limit: int) -> Iterator[None]:
    original = GenerationMixin.generate

    def generate(self: Any, *args: Any, **keywords: Any) -> Any:
        ids = keywords.get("input_ids", args[0] if args and isinstance(args[0], torch.Tensor) else None)
        mask = keywords.get("attention_mask")
        config = keywords.get("generation_config") or self.generation_config
        cache, sample = (keywords.get(name, getattr(config, name, None)) for name in ("use_cache", "do_sample"))
        rows = 0 if ids is None else int(ids.shape[0])
        right, left = (0, 0) if mask is None or mask.ndim != 2 else (int((mask[:, i] == 0).sum()) for i in (-1, 0))
        noted.append(Generation(caller, bool(self.training), cache is not False, bool(sample), rows, right, left))
        if len(noted) >= limit:
            raise _Enough
        return torch.zeros((1, 1), dtype=torch.long) if ids is None else ids

    here = os.getcwd()
    with tempfile.TemporaryDirectory(prefix="vlmdet-doctor-") as folder:
        GenerationMixin.generate = generate  # type: ignore[method-assign]
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(here)
            GenerationMixin.generate = original  # type: ignore[method-assign]

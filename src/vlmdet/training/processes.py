"""One run on several processes: who writes, what all must know, and what they were launched as.

When: PER RUN. `accelerate launch -m vlmdet train …` or `vlmdet train … --num-processes N` starts the processes, each of which
runs the same code; accelerate owns how gradients are shared. On one process every function here does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from vlmdet.errors import ConfigError, VlmdetError

T = TypeVar("T")

KINDS = {
    "none": {"NO"},
    "ddp": {"MULTI_GPU", "MULTI_CPU", "MULTI_NPU", "MULTI_XPU"},
    "fsdp": {"FSDP"},
    "deepspeed": {"DEEPSPEED"},
}
"""A word of `training.distributed` to accelerate's distributed types."""


def world_size() -> int:
    """Return the number of processes that were launched together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Tell whether this process writes files and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def join(*, cpu: bool) -> None:
    """Let the processes find one another; nothing on a single one.

    When: before the first `from_main`. Input: `cpu`, whether the model runs on the CPU (gloo) or on GPUs (nccl).
    """
    if world_size() > 1:
        PartialState(cpu=cpu)


def leave() -> None:
    """Part from the other processes; nothing on a single one.

    When: last, after a run that came to its end. A process that exits while the group's threads still stand may be aborted.
    """
    if world_size() > 1 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def from_main(make: Callable[[], T]) -> T:
    """Call a function on the main process alone, and give every process what it returned.

    Raises:
        VlmdetError: what the function raised, on every process, so that none waits for the others for ever.
    """
    if world_size() == 1:
        return make()
    told: list[Any] = [None, None]
    if is_main():
        try:
            told[0] = make()
        except VlmdetError as error:
            told[1] = error
    broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    result: T = told[0]
    return result


def gather(value: T) -> list[T]:
    """Give the values of all processes to each of them, in order; all must come here. On a single one, its own."""
    if world_size() == 1:
        return [value]
    gathered: list[T] = gather_object([value])
    return gathered


def refuse_other_device(placed: Any, taken: Any) -> None:
    """Refuse a run whose model lies on another device than the one to which the trainer would move it.

    When: once per run, before the trainer is built. The trainer takes a process's own GPU, the first where there is one process,
    whatever `model.device` says.

    Input: two `torch.device`, of the model and of the trainer's arguments; a missing number is 0, and a CPU has none.

    Raises:
        ConfigError: they differ.
    """
    other = placed.type != "cpu" and (placed.index or 0) != (taken.index or 0)
    if placed.type != taken.type or other:
        raise ConfigError(
            f"the model lies on {placed}, and the trainer would move it to {taken}",
            "leave model.device at auto, and choose a GPU with CUDA_VISIBLE_DEVICES",
        )


def check_launched(asked: str, accelerator: Any) -> str:
    """Compare how the work is shared with what was asked for.

    When: once per run, when the trainer stands.

    Input: `asked`, `training.distributed`; `auto` is what the launcher's environment says. `accelerator`, the trainer's.
    Output: a line for the user.

    Raises:
        ConfigError: accelerate does otherwise: it ignores FSDP and DeepSpeed on a CPU, for example.
    """
    if asked == "auto":
        asked = "none" if world_size() == 1 else "ddp"
        for word, variable in (("fsdp", "ACCELERATE_USE_FSDP"), ("deepspeed", "ACCELERATE_USE_DEEPSPEED")):
            if os.environ.get(variable, "").lower() in {"1", "true", "yes"}:
                asked = word
    found = accelerator.distributed_type.name
    if found not in KINDS[asked]:
        raise ConfigError(
            f"asked for was {asked}, accelerate's distributed type is {found} on {accelerator.num_processes} processes",
            "launch it with a file of configs/accelerate on devices that can do it, or set training.distributed",
        )
    return f"devices: {accelerator.device.type}, distributed type {found}, {accelerator.num_processes} processes"

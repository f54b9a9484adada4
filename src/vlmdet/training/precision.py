"""The number formats of a run: what trains is kept in float32, and the arithmetic is that of `model.dtype`.

When: PER RUN, when it is set up, and around whatever computes beside the trainer: the gate, the measured step, the answers.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def keep_exact(model: Any) -> None:
    """Keep what trains in float32: in half precision a step of a small rate is less than the last digit, and lost."""
    for weight in model.parameters():
        if weight.requires_grad and weight.dtype in (torch.bfloat16, torch.float16):
            weight.data = weight.data.float()


def in_half(model: Any) -> bool:
    """Tell whether a run of this model computes in bfloat16: as it was loaded, whatever `keep_exact` has widened since."""
    loaded = getattr(model.config, "dtype", None) == torch.bfloat16
    return loaded or any(weight.dtype == torch.bfloat16 for weight in model.parameters())


def as_the_run(model: Any) -> AbstractContextManager[Any]:
    """Compute as the trainer does in its steps, within `with as_the_run(model):`."""
    return torch.autocast(model.device.type, torch.bfloat16) if in_half(model) else nullcontext()

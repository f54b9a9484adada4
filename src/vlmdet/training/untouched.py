"""Try something on the very model of a run, and leave the model and every source of chance exactly as they were.

When: PER RUN, before the first step: around the overfit gate and around the measured step.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def untouched(model: nn.Module, *, weights: bool) -> Iterator[None]:
    """Put a model back, bit for bit, after a block that trained it, ran it or generated with it.

    When: once around each trial before a run.

    Input: `model`, as the trainer holds it; `weights`, copy the trainable parameters and all buffers to the CPU first and back
    afterwards; a block that takes no optimiser step does not need that.
    What is put back, also after an error: trainable weights and buffers, gradients (within the block there are none), the mode of
    every module, `use_cache`, what a Qwen-VL remembers of its last prompt (`rope_deltas`), and the state of the random
    numbers of Python, numpy and torch, on the CPU and on every GPU.
    """
    tensors = [one for one in model.parameters() if one.requires_grad] + list(model.buffers()) if weights else []
    copies = [one.detach().to("cpu", copy=True) for one in tensors]
    gradients = [(one, one.grad) for one in model.parameters()]
    modes = [(one, one.training) for one in model.modules()]
    notes = [(one, one.rope_deltas) for one in model.modules() if hasattr(one, "rope_deltas")]
    config: Any = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    python, numbers = random.getstate(), np.random.get_state()
    for one, _ in gradients:
        one.grad = None
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
        with torch.no_grad():
            for one, copy in zip(tensors, copies, strict=True):
                one.copy_(copy)
        for one, gradient in gradients:
            one.grad = gradient
        for module, training in modes:
            module.training = training
        for module, deltas in notes:
            module.rope_deltas = deltas
        if config is not None and cache is not None:
            config.use_cache = cache

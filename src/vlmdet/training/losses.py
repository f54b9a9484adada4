"""Logits only where labels are: the loss of TRL's trainer, without scoring prompts and image tokens.

When: PER RUN, once the trainer is built; the replaced forward then runs EVERY STEP.

TRL 1.16 never builds the logits of a whole batch: `SFTTrainer` gives the model a forward (`add_fused_lm_head`) that scores
in tiles. On CUDA and XPU it first picks the positions whose next token has a label, so nothing is left to gain there. On
any other device it scores every position, and sets what has no label to zero afterwards, so that tiles keep one shape on
devices that compile for a shape. A CPU does not, and an answer is an eighth of a row or less: the rest is picked out here.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import nn
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import FusedCausalLMOutput

QWEN_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Families whose logits are the plain product with the head: no cap, no scale."""

_VOCABULARY_TILE = 32_768  # TRL's own: entries of the vocabulary in one tile


def score_supervised_only(model: nn.Module) -> bool:
    """Let a model in TRL's `SFTTrainer` compute logits only at positions whose next token carries loss.

    When: once, after the trainer is built (it must have given the model its fused forward) and before `trainer.train()`:
    `score_supervised_only(trainer.model)`. Called twice, it does nothing the second time.

    Input: `trainer.model`, plain or wrapped by PEFT, not yet by DDP.
    Output: whether anything was changed: not on CUDA or XPU, where TRL does the same, nor for families outside `QWEN_FAMILIES`.
    Loss, gradients, entropy and token accuracy are those of TRL: the same kernel, fewer rows. Generation is untouched.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = next(base.parameters()).device.type
    if device in ("cuda", "xpu") or base.config.model_type not in QWEN_FAMILIES:
        return False
    theirs = base.forward
    if getattr(theirs, "scores_supervised_only", False):
        return False

    # the class's own signature stays visible: `generate` checks its arguments against it
    @functools.wraps(type(base).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head or "shift_labels" in kwargs:  # generation; rows that are split over devices
            return theirs(*args, **({"fused_lm_head": True} if fused_lm_head else {}), **kwargs)
        return _score(self, *args, **kwargs)

    forward.scores_supervised_only = True  # type: ignore[attr-defined]
    base.forward = types.MethodType(forward, base)
    return True


def _score(model: Any, *args: Any, labels: torch.Tensor, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
    """Run the model without its head, then the head at supervised positions.

    1. hidden states (n, length, width) of all tokens; the last one predicts nothing;
    2. `labels` (n, length) int64 moved by one: position i is scored when token i + 1 has a label;
    3. of those m positions (m, width) the log-probability of the label, in tiles of the vocabulary;
    4. laid back into (n, length - 1), 0 where there is no label.
    """
    kwargs["use_cache"] = False
    hidden = model.base_model(*args, **kwargs).last_hidden_state[:, :-1]
    head = model.get_output_embeddings()
    mask = labels[:, 1:] != -100
    scored = ChunkedLogProbFunction.apply(
        hidden[mask],
        head.weight,
        head.bias,
        labels[:, 1:][mask],
        1.0,
        _VOCABULARY_TILE,
        None,
        1.0,
        ("log_probs", "entropy", "is_top1"),
    )
    # masked_scatter keeps the graph where no position is supervised: the loss is then 0 and has a gradient of 0
    log_probs, entropy, is_top1 = (scored[i].new_zeros(mask.shape).masked_scatter(mask, scored[i]) for i in (0, 1, 4))
    count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return FusedCausalLMOutput(
        loss=-log_probs.sum() / count, log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=mask
    )

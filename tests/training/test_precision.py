"""What trains is kept in float32; the gate, the measured step and the answers compute as the run does all the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vlmdet.models.loader import load
from vlmdet.training.precision import as_the_run, in_half, keep_exact


@pytest.mark.parametrize(("dtype", "half"), [("bfloat16", True), ("float32", False)])
def test_a_run_of_every_weight_computes_as_it_was_loaded(small_base: Path, dtype: str, half: bool) -> None:
    model = load(str(small_base), dtype=dtype, device="cpu", min_pixels=3136, max_pixels=12544).model
    keep_exact(model)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert in_half(model) is half
    one = torch.ones(2, 2)
    with as_the_run(model):
        assert (one @ one).dtype == (torch.bfloat16 if half else torch.float32)

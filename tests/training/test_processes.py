"""What a process is told about the others and about its device; several real ones are in `test_distributed.py`."""

from __future__ import annotations

import pytest
import torch

from vlmdet.errors import ConfigError
from vlmdet.training.processes import refuse_other_device


@pytest.mark.parametrize(
    ("placed", "taken"), [("cpu", "cpu"), ("cpu", "cpu:1"), ("cuda:1", "cuda:1"), ("cuda", "cuda:0"), ("mps", "mps:0")]
)
def test_a_model_that_stays_where_it_is_may_train(placed: str, taken: str) -> None:
    assert refuse_other_device(torch.device(placed), torch.device(taken)) is None  # and no error


@pytest.mark.parametrize(("placed", "taken"), [("cuda:1", "cuda:0"), ("cuda", "cuda:1"), ("cpu", "cuda:0")])
def test_a_model_that_the_trainer_would_move_is_refused(placed: str, taken: str) -> None:
    with pytest.raises(ConfigError, match=f"the model lies on {placed}, and the trainer would move it to {taken}"):
        refuse_other_device(torch.device(placed), torch.device(taken))

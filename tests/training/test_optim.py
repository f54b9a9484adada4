"""Muon: matrices are made orthogonal, and each parameter goes to one of the two groups."""

from __future__ import annotations

import torch
from torch import nn

from vlmdet.training.optim import Muon, muon_groups, orthogonal


def test_orthogonal_brings_singular_values_near_one() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(40, 24), iterations=5))
    assert values.min() > 0.5
    assert values.max() < 1.4


def test_hidden_matrices_go_to_muon_and_all_else_to_adamw() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "hidden": nn.Linear(4, 3), "norm": nn.LayerNorm(3)})
    matrices, others = muon_groups(model, lr=0.1, weight_decay=0.0)
    assert [tuple(weight.shape) for weight in matrices["params"]] == [(3, 4)]
    assert len(others["params"]) == 4  # embedding, bias, and the norm's two
    assert (matrices["muon"], others["muon"]) == (True, False)
    assert others["lr"] == matrices["lr"] / 10


def test_a_step_goes_downhill_in_both_groups() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    x = torch.randn(32, 4)
    target = x.sum(dim=1, keepdim=True)
    optimizer = Muon(muon_groups(model, lr=0.02, weight_decay=0.0), lr=0.02)
    losses = []
    for _ in range(100):
        loss = (model(x) - target).square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 2

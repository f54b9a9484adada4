"""Rules of rates, budgets, schedules and checkpoints."""

from __future__ import annotations

import pytest

from vlmdet.doctor.checks.rates import judge_rate, judge_saving, judge_warmup, planned_steps


@pytest.mark.parametrize(
    ("rate", "steps", "adapter", "identifier"),
    [
        (2e-7, 500, True, "O01"),
        (2e-7, None, False, "O01"),
        (2e-7, None, None, "O01"),
        (1e-5, 100, True, "O01"),
        (1e-5, 2000, True, None),
        (1e-4, 100, True, None),
        (2e-4, 3, True, None),
        (1e-5, 100, False, None),
        (5e-5, None, False, None),
        (2e-4, 1000, False, "O02"),
        (5e-3, 1000, True, "O02"),
        (1e-2, None, None, "O02"),
        (1e-4, None, None, None),
        (0.0, 10, True, None),
    ],
)
def test_rate(rate: float, steps: float | None, adapter: bool | None, identifier: str | None) -> None:
    verdict = judge_rate(rate, steps, adapter=adapter)
    assert (verdict.id if verdict else None) == identifier


def test_rates_of_other_optimisers_are_not_judged() -> None:
    assert judge_rate(0.1, 100, adapter=False, optimizer="sgd") is None


def test_planned_steps() -> None:
    # 1,000 rows, 4 at a time on 2 processes: 125 batches; 8 accumulated: 16 steps; 3 epochs: 48
    assert planned_steps(rows=1000, batch=4, accumulation=8, world=2, epochs=3, most=None) == 48
    assert planned_steps(rows=1000, batch=4, accumulation=8, world=2, epochs=3, most=20) == 20
    assert planned_steps(rows=None, batch=4, accumulation=1, world=1, epochs=3, most=None) is None
    assert planned_steps(rows=10, batch=2, accumulation=8, world=1, epochs=0.5, most=None) == 1


def saving(**values: object) -> list[str]:
    usual: dict[str, object] = {
        "save": 100,
        "evaluate": 50,
        "steps": 1000,
        "best": True,
        "keep": 2,
        "metric": None,
        "greater": None,
    }
    return [one.cause for one in judge_saving(**{**usual, **values})]  # type: ignore[arg-type]


def test_saving_where_nothing_was_evaluated() -> None:
    assert saving() == []
    assert "nothing was evaluated" in saving(save=75)[0]
    assert saving(save=50, evaluate=100, best=False) == []  # every evaluated step has a checkpoint
    assert "no checkpoint is saved" in saving(save=2000)[0]
    assert "nothing is evaluated in 40 steps" in saving(steps=40)[0]


def test_the_worst_is_kept_as_the_best() -> None:
    assert "the worst" in saving(metric="eval_iou", greater=False)[0]
    assert "the worst" in saving(metric="eval_loss", greater=True)[0]
    assert saving(metric="eval_f1", greater=True) == [] and saving(metric="loss", greater=False) == []
    assert "deleted" in saving(metric="eval_f1", greater=True, best=False, keep=1)[0]


def test_warmup() -> None:
    share = judge_warmup(steps=100, warmup=50, ratio=None)
    assert share is not None and share[0] == 0.5
    assert judge_warmup(steps=None, warmup=50, ratio=None) is None
    assert judge_warmup(steps=None, warmup=None, ratio=0.03) == (0.03, "warmup_ratio=0.03")

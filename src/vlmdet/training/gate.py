"""The overfit gate: learn four rows by heart and generate them back, before a long run starts.

When: PER RUN, just before the first step, where `training.overfit_gate` is on. A set-up that cannot learn four rows will not
learn four thousand; and only generating shows that prompt, template, mask, codec and decoding of the training fit those of
the use. It takes the trainer's own model, so it trains exactly what the run would train, and puts everything back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from vlmdet.boxes import FRACTIONS, Boxes
from vlmdet.contract import Contract
from vlmdet.data.dataset import build_messages
from vlmdet.errors import TrainingError
from vlmdet.evaluation.match import match_boxes
from vlmdet.grounding import get_codec
from vlmdet.grounding.sizes import plan_view
from vlmdet.images import to_upright_rgb
from vlmdet.models.families import area_of
from vlmdet.models.inference import generate_answers
from vlmdet.settings import TrainingSettings
from vlmdet.training.optim import rates_by_area
from vlmdet.training.precision import as_the_run
from vlmdet.training.untouched import untouched

logger = logging.getLogger(__name__)

ROWS = 4
STEPS = 100
STOP_LOSS = 0.02
"""Mean loss of a supervised token below which no more steps are taken."""
LEARNT_LOSS = 0.1
"""Below it a failed gate says that the rows were learnt: the right token then has nine tenths of the probability."""
LEAST_IOU = 0.8
"""Of each generated box with its true one. Rounding to the codec's grid costs nothing here, since the truth is rounded as well;
a coordinate that is off by a tenth of the box's side gives .82 or more, a box of another place or another order under .8."""
SKIP = "or skip this check with training.overfit_gate=false"


@dataclass(frozen=True)
class GateRow:
    """One row of the gate: what was due, what was generated, and how well its boxes fit (the lowest IoU of a pair)."""

    id: str
    wanted: str
    generated: str
    lowest_iou: float
    good: bool


@dataclass(frozen=True)
class GateResult:
    """What the overfit gate found.

    Attributes:
        steps: optimiser steps that it took, at most `STEPS`.
        first_loss: mean loss over the supervised tokens before the first step.
        last_loss: after the last one.
        rows: one entry per row.
        seconds: wall time, all in all.
        answers_due: something of the language model trains, so that its answers must be right. A frozen one that is only shown
            other pictures may take longer to say what is new to it (a label that it has never seen): there it is enough that
            the loss halves.
    """

    steps: int
    first_loss: float
    last_loss: float
    rows: tuple[GateRow, ...]
    seconds: float
    answers_due: bool = True

    @property
    def passed(self) -> bool:
        """Whether every row was generated back, or, where answers are not due, at least the loss was halved."""
        halved = self.last_loss < self.first_loss / 2
        return all(row.good for row in self.rows) or (halved and not self.answers_due)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields and `passed`, ready for JSON."""
        return asdict(self) | {"passed": self.passed}


def choose_rows(rows: Any, *, count: int = ROWS) -> list[int]:
    """Choose the rows of the gate: short answers with boxes that differ from one another, the first such ones.

    When: once per run; opens no picture.

    Input: n training rows with `boxes`, as `build_rows` makes them: a data set of `datasets`, or a list.
    Output: at most `count` numbers of rows, ascending; always the same ones for the same rows. Rows with boxes
    come first, few before many, then those without a box; rows whose boxes repeat those of a chosen one come last: a model
    that answers the same to every picture must not pass.
    """
    plain = rows.with_format(None).select_columns(["boxes"])["boxes"] if hasattr(rows, "with_format") else None
    boxes = list(plain) if plain is not None else [row["boxes"] for row in rows]
    seen: set[str] = set()
    repeated = []
    for row in boxes:
        repeated.append(str(row) in seen)
        seen.add(str(row))
    return sorted(sorted(range(len(boxes)), key=lambda i: (repeated[i], not boxes[i], len(boxes[i]), i))[:count])


def gate_rates(training: TrainingSettings) -> dict[str, float]:
    """Return the rates of the gate by area: ten times the run's own, but not over 1e-3 where the run is not.

    When: once per run.

    A run has hundreds of steps and the gate at most a hundred, in each of which AdamW moves a weight by about the rate. On the
    embedded base 1e-3 learnt four rows in 20 steps with every weight trained and in 100 with an adapter of rank 16; 3e-4 took
    46 steps. Of `muon`, whose rate is for whole matrices, a tenth is taken, as `optim.muon_groups` does for all other weights.
    """
    own = rates_by_area(training)
    if training.optimizer == "muon":
        own = dict.fromkeys(own, training.learning_rate / 10)
    return {area: max(rate, min(10 * rate, 1e-3)) for area, rate in own.items()}


def overfit_gate(
    model: Any,
    processor: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    collator: Any,
    contract: Contract,
    learning_rates: Mapping[str, float],
    steps: int = STEPS,
    batch_size: int = ROWS,
    fused: bool = False,
) -> GateResult:
    """Train the trainable parameters on a few rows, generate the rows' answers, and put the model back as it was.

    When: once per run, before the first step; `choose_rows` says which rows.

    Input: the trainer's own `model`, adapter included; `rows` as the collator takes them, with `boxes` and `labels`; `collator`,
    one of its own, since it may verify the first batch that it makes; the run's `contract`, under which answers are generated and
    read, as after the training; `learning_rates` by area, see `gate_rates`; `steps` at most;
    `batch_size`, rows of one forward pass, as in the run; `fused`, the model has TRL's fused head, which needs less memory.
    Output: `GateResult`, in which every row is good: as many boxes as in the truth and of the same labels, paired one to one at
    an IoU of at least .8 with the truth as the codec writes it; or no box where there is none. Of a run that trains nothing of
    the language model it is enough that the loss halves, see `GateResult.answers_due`.

    Raises:
        TrainingError: a row was not generated back; the message says whether the loss fell, and what that means.
    """
    started = time.perf_counter()
    batches = [collator(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    with untouched(model, weights=True):
        taken, first, last = _learn(model, batches, learning_rates, steps=steps, fused=fused)
        judged = _generate(model, processor, rows, contract, longest=_longest(batches))
    trains = {area_of(name) for name, weight in model.named_parameters() if weight.requires_grad}
    result = GateResult(
        taken,
        first,
        last,
        tuple(judged),
        time.perf_counter() - started,
        answers_due=not trains <= {"vision", "merger", "deepstack"},
    )
    if not result.passed:
        raise _refusal(result)
    return result


def format_gate(result: GateResult) -> str:
    """Say in one line what the gate found."""
    good = sum(row.good for row in result.rows)
    halved = "" if result.answers_due or good == len(result.rows) else " (enough, since the language model is frozen)"
    return (
        f"overfit gate: {good} of {len(result.rows)} rows generated back after {result.steps} steps, "
        f"loss {result.first_loss:.3f} -> {result.last_loss:.3f}{halved}, {result.seconds:.1f} s"
    )


def _learn(
    model: Any, batches: Sequence[Any], rates: Mapping[str, float], *, steps: int, fused: bool = False
) -> tuple[int, float, float]:
    """Take AdamW steps over all rows at once until the loss is small; returns steps taken, first and last loss."""
    groups: list[dict[str, Any]] = [
        {"params": [weight], "lr": rates[area_of(name)]}
        for name, weight in model.named_parameters()
        if weight.requires_grad
    ]
    if not groups:
        raise TrainingError(
            "overfit gate: no parameter of the model is trainable",
            "choose what trains: training.method, lora.targets, areas",
        )
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    batches = [batch.to(model.device) for batch in batches]
    model.train()
    for module in model.modules():  # learning by heart is what dropout is there to hinder
        if isinstance(module, nn.Dropout):
            module.eval()
    model.config.use_cache = False
    losses: list[float] = []
    while True:
        losses.append(_accumulate(model, batches, fused=fused))
        if losses[-1] < STOP_LOSS or len(losses) > steps:
            return len(losses) - 1, losses[0], losses[-1]
        torch.nn.utils.clip_grad_norm_([group["params"][0] for group in groups], 1.0)
        optimiser.step()
        optimiser.zero_grad()


def _accumulate(model: Any, batches: Sequence[Any], *, fused: bool) -> float:
    """Add up the gradients of all batches; returns their mean loss."""
    total = 0.0
    head = {"fused_lm_head": True} if fused else {}
    for batch in batches:
        with as_the_run(model):
            loss = model(**batch, **head).loss / len(batches)
        loss.backward()
        total += float(loss.detach())
    return total


def _longest(batches: Sequence[Any]) -> int:
    return max(int((batch["labels"] != -100).sum(dim=1).max()) for batch in batches)


def _generate(
    model: Any, processor: Any, rows: Sequence[Mapping[str, Any]], contract: Contract, *, longest: int
) -> list[GateRow]:
    with as_the_run(model):
        answers = generate_answers(
            model,
            processor,
            [build_messages(contract.labels, codec=contract.codec)] * len(rows),
            [row["image"] for row in rows],
            min_pixels=contract.min_pixels,
            max_pixels=contract.max_pixels,
            max_new_tokens=longest + 8,
        )
    return [judge_answer(row, answer.text, contract) for row, answer in zip(rows, answers, strict=True)]


def judge_answer(row: Mapping[str, Any], text: str, contract: Contract) -> GateRow:
    """Compare a generated text with a row's truth, as the contract's codec writes it and reads it back.

    When: once per row of the gate.

    Input: a `row` with `image` (an opened picture), `boxes`, `labels`, `messages`; the generated `text`.
    Output: `GateRow`; `lowest_iou` is 0 where a true box has no partner.
    """
    codec = get_codec(contract.codec)
    limits = {"min_pixels": contract.min_pixels, "max_pixels": contract.max_pixels}
    view = plan_view(*to_upright_rgb(row["image"]).size, **limits, factor=contract.size_factor)
    boxes = Boxes.from_array(row["boxes"], FRACTIONS, 1, 1) if row["boxes"] else Boxes.empty()
    truth = codec.parse(codec.encode(row["labels"], boxes, view), view)
    found = codec.parse(text, view)
    names = [label or "" for label in truth.labels]
    matching = match_boxes(truth.boxes, names, found.boxes, found.labels, labels_asked=contract.labels)
    _, fp, fn = (int(count[0]) for count in matching.count([LEAST_IOU]))
    lowest = float(matching.iou.min(initial=1.0)) if len(matching.iou) == len(names) else 0.0
    good = not fp and not fn and found.status == truth.status
    return GateRow(str(row.get("id") or ""), _answer(row), text, lowest, good)


def _answer(row: Mapping[str, Any]) -> str:
    return "".join(part.get("text") or "" for part in row["messages"][-1]["content"])


def _refusal(result: GateResult) -> TrainingError:
    """Word a failed gate: what was seen, what it means, what to look at."""
    bad = next(row for row in result.rows if not row.good)
    count = sum(not row.good for row in result.rows)
    seen = f"overfit gate: {count} of {len(result.rows)} rows were not generated back after {result.steps} steps"
    if result.last_loss >= LEARNT_LOSS:
        fell = (
            f"the loss went from {result.first_loss:.3f} to {result.last_loss:.3f} only, so they were not even learnt"
        )
        return TrainingError(
            f"{seen}; {fell}",
            "look at training.learning_rate, at what is trainable, and at the labels in train/first_batch.html; "
            + SKIP,
        )
    return TrainingError(
        f"{seen}, though the loss fell to {result.last_loss:.3f}: what is generated is not what was learnt; "
        f"{bad.id}: wanted {bad.wanted[:120]!r}, generated {bad.generated[:120]!r}",
        "prompt, chat template, loss mask, codec or end token differ between training and generation; " + SKIP,
    )

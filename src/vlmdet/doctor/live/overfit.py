"""A small model learns one row of the user's collator by heart, and writes it: does loss on these labels lead to this answer?

When: for L11 and what else makes a falling loss lead nowhere.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from vlmdet.doctor.calls import NotAvailable, UserCodeError, call
from vlmdet.doctor.evidence import Evidence
from vlmdet.doctor.gather.batches import IGNORED
from vlmdet.doctor.live.trainer import small_pictures

STEPS = 160
SECONDS = 30.0
ENOUGH = 0.03


@dataclass(frozen=True)
class Overfit:
    """What came of it.

    Attributes:
        losses: of each step; steps: how many.
        written: what the model then writes greedily after the question; target: the answer of the row.
        ended: whether it stopped by an end token; where: the row.
    """

    losses: tuple[float, ...]
    written: str
    target: str
    ended: bool
    where: str

    @property
    def learnt(self) -> bool:
        """Did the loss fall to nearly nothing?"""
        return self.losses[-1] < 0.1


def overfit_one(evidence: Evidence) -> Overfit:
    """Let the small model learn the shortest row by heart.

    Raises:
        NotAvailable: no collator, no labels, or no model.
        UserCodeError: collator or model raised.
    """
    raw, where, answers = evidence.awkward()["short"]
    holder = evidence.collator()
    with small_pictures(evidence.subject.processor, getattr(holder, "processor", None)):
        batch = evidence.collate([raw], "overfit", [where], [answers])
    if batch.labels is None:
        raise NotAvailable("labels in the batch")
    learnt = [i for i, one in enumerate(batch.labels[0]) if one != IGNORED]
    if not learnt:
        raise NotAvailable("a row with tokens that carry loss")
    tiny = evidence.tiny()
    model: Any = tiny.model
    inputs = {key: value for key, value in dict(batch.raw).items() if hasattr(value, "to")}
    try:
        losses = call("model", _learn, model, inputs)
    except UserCodeError as error:
        if "image tokens" in error.text.lower():
            raise
        raise NotAvailable(f"a batch that the model takes; it raised {error.text[:200]}") from error
    ids = batch.ids[0]
    start = _answer_start(evidence, ids, answers, learnt[0])
    given = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask", "labels")}
    given = {
        key: value for key, value in given.items() if getattr(value, "shape", (0, 0))[:2] != torch.Size((1, len(ids)))
    }
    given |= {key: inputs[key][:, :start] for key in ("mm_token_type_ids", "token_type_ids") if key in inputs}
    room = len(ids) - start + 8
    with torch.no_grad():
        model.eval()
        if hasattr(model, "rope_deltas"):
            model.rope_deltas = None
        out = call(
            "model",
            model.generate,
            input_ids=inputs["input_ids"][:, :start],
            attention_mask=torch.ones_like(inputs["input_ids"][:, :start]),
            max_new_tokens=room,
            do_sample=False,
            eos_token_id=sorted(evidence.end_ids()) or None,
            **given,
        )
    new = out[0, start:].tolist()
    ends = evidence.end_ids()
    text = evidence.tokenizer.decode([one for one in new if one not in ends], skip_special_tokens=False)
    return Overfit(tuple(losses), text.strip(), answers[-1].strip(), bool(new) and new[-1] in ends, where)


def _answer_start(evidence: Evidence, ids: list[int], answers: tuple[str, ...], supervised: int) -> int:
    """Return where the answer begins: by its text in the decoded row; where it is not found, the first supervised token."""
    tokenizer = evidence.tokenizer
    answer = answers[-1].strip() if answers else ""
    for start in range(len(ids) - 1, 0, -1):
        text = tokenizer.decode(ids[start:], skip_special_tokens=False).lstrip()
        if answer and text.startswith(answer):
            return start
    return supervised


def _learn(model: Any, inputs: dict[str, Any]) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    for one in model.parameters():
        one.requires_grad_(one.is_floating_point())
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=4e-3, weight_decay=0.0)
    losses: list[float] = []
    until = time.monotonic() + SECONDS
    model.train()
    for _ in range(STEPS):
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if losses[-1] < ENOUGH or time.monotonic() > until:
            break
    return losses

"""Score one model on one split: predict, store, measure.

When: AFTER training; base and tuned go through the same function with the same contract, the base once more in its own words.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

import vlmdet
from vlmdet.contract import Contract, adopt, tell_permitted
from vlmdet.evaluation.native import map_label
from vlmdet.evaluation.predict import MAX_ERROR_SHARE, Gather, predict, print_progress, truth_row
from vlmdet.evaluation.scores import TOKEN_SOURCES, ScoreSource, score_boxes, score_consistency
from vlmdet.evaluation.scoring import score_and_write
from vlmdet.evaluation.selftest import FIRST_ROWS, self_test
from vlmdet.grounding import Parsed, View, get_codec
from vlmdet.models.answers import Answer, Engine
from vlmdet.models.inference import hf_engine
from vlmdet.models.loader import Loaded, refuse_other_contract
from vlmdet.records import Sample


def evaluate(
    loaded: Loaded,
    samples: Sequence[Sample],
    *,
    contract: Contract,
    folder: Path,
    name: str,
    split: str,
    batch_size: int = 32,
    max_new_tokens: int = 256,
    scores: ScoreSource | Literal["none"] = "token_probability",
    consistency_samples: int = 5,
    constrain: bool = False,
    max_errors: float = MAX_ERROR_SHARE,
    resamples: int = 1000,
    seed: int = 0,
    native: Contract | None = None,
    new: bool = False,
    gather: Gather | None = None,
    allow: Sequence[str] = (),
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Predict a split with a model in this process, and write predictions and scores.

    Input: a model; its samples; the `contract` that says prompt, pixels and codec; `folder`, e.g. `runs/x/001/eval/test/base`;
    `name`, `base`, `base_native` or `tuned`; the settings of `evaluation` in `settings.py`; `native`, the contract by which a
    base is asked in its own words (`native.native_contract`): its answers' labels are mapped to those of `contract`; `new`,
    predict again where the same rows are there already; `gather`, where several processes do this together; `allow`, fields of
    the contract that may differ from what is found now, which then holds, stands in `meta`, and is told to `say`.
    Output: the figures, `{"f1_50": {"value", "low", "high", "n"}, …}`; in the folder `predictions.jsonl` and what
    `scoring.score_and_write` writes.

    Raises:
        ContractError: the model, its processor or this version of the tool would ask or read otherwise than the contract.
        DataError: too many pictures could not be run.
    """
    allowed = refuse_other_contract(loaded, contract, allow=allow)
    if say is not None:
        for line in tell_permitted(allowed):
            say(f"{name}: {line}")
    asked = adopt(native or contract, allowed)
    engine = hf_engine(
        loaded,
        contract=asked,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        logprobs=scores in TOKEN_SOURCES,
        constrain=constrain,
        samples=consistency_samples if scores == "consistency" else 0,
        seed=seed,
    )
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    return evaluate_engine(
        engine,
        samples,
        contract=asked,
        folder=folder,
        meta={"name": name, "split": split, "engine": "hf", "dtype": dtype, "weights": _digest(loaded.model)}
        | ({"allow": allowed} if allowed else {}),
        max_new_tokens=max_new_tokens,
        scores=scores,
        consistency_samples=consistency_samples,
        constrain=constrain,
        max_errors=max_errors,
        resamples=resamples,
        seed=seed,
        map_labels=native is not None,
        new=new,
        gather=gather,
    )


def evaluate_engine(
    engine: Engine,
    samples: Sequence[Sample],
    *,
    contract: Contract,
    folder: Path,
    meta: dict[str, Any],
    max_new_tokens: int,
    scores: ScoreSource | Literal["none"],
    consistency_samples: int,
    constrain: bool,
    max_errors: float,
    resamples: int,
    seed: int,
    map_labels: bool = False,
    new: bool = False,
    gather: Gather | None = None,
) -> dict[str, Any]:
    """Predict a split with any engine, and write predictions and scores.

    Input: as `evaluate`; the engine does already what `scores`, `constrain` and `max_new_tokens` say; `meta`, `name` and `split`,
    and what else says which model answers: rows that are there under the same `meta` are not asked for again.
    Output: as `evaluate`.
    """
    decoding = f"greedy, at most {max_new_tokens} tokens" + (", constrained to the notation" if constrain else "")
    self_test([truth_row(sample) for sample in samples[:FIRST_ROWS]], labels_asked=contract.labels)
    made = {**meta, "decoding": decoding, "scores": scores, "version": vlmdet.__version__}
    if scores == "consistency":
        made |= {"consistency_samples": consistency_samples, "seed": seed}
    path = folder / "predictions.jsonl"
    main = gather is None or os.environ.get("RANK", "0") == "0"
    if new and main:
        for old in folder.glob("predictions.*"):
            old.unlink()
    if new and gather is not None:
        gather(None)  # none reads what is about to be deleted
    rows = predict(
        engine,
        samples,
        contract=contract,
        path=path,
        made_with=made,
        max_errors=max_errors,
        score=scorer(scores, contract),
        score_source=scores,
        map_label=(lambda label: map_label(label, contract.labels)) if map_labels else None,
        gather=gather,
        progress=print_progress(f"{meta['name']} on {meta['split']}") if main else None,
    )
    if not main:
        return {}
    contract.write(folder)
    results = score_and_write(
        rows, folder, labels_asked=contract.labels, contract=contract, meta=made, resamples=resamples, seed=seed
    )
    figures: dict[str, Any] = results["figures"]
    return figures


def scorer(
    source: ScoreSource | Literal["none"], contract: Contract
) -> Callable[[Parsed, Answer, View], list[float]] | None:
    """Return what scores the boxes of an answer, None for `none`.

    Input: `source`, one of `scores.SCORE_SOURCES`, or `none`.
    """
    if source == "none":
        return None
    codec = get_codec(contract.codec)

    def score(parsed: Parsed, answer: Answer, view: View) -> list[float]:
        if source == "consistency":
            return score_consistency(parsed, [codec.parse(text, view) for text in answer.samples])
        return score_boxes(parsed, answer.text, answer.tokens, answer.logprobs, source=source)

    return score


def _digest(model: Any) -> str:
    """Hash the first values of every tensor of a model, as it lies in memory: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for key, weight in sorted(model.named_parameters()):
        head = weight.detach().flatten()[:64]
        values = head.cpu() if head.dtype == torch.uint8 else head.float().cpu()
        digest.update(key.encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]

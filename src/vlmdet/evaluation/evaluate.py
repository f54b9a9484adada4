"""Score one model on one split: predict, store, measure.

When: AFTER training; base and tuned go through the same function with the same contract.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmdet.contract import Contract
from vlmdet.evaluation.files import write_predictions, write_results
from vlmdet.evaluation.metrics import per_image, score_rows
from vlmdet.evaluation.predict import predict, print_progress
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
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Predict a split and write predictions and scores.

    Input: a model; its samples; the `contract` that says prompt, pixels and codec; `folder`, e.g. `runs/x/001/eval/test/base`;
    `name`, `base` or `tuned`; `resamples` of the bootstrap.
    Output: the figures, `{"f1_50": {"value", "low", "high", "n"}, …}`; in the folder `predictions.jsonl`, `results.json`,
    `results.csv` and `per_image.csv`.

    Raises:
        ContractError: the model, its processor or this version of the tool would ask or read otherwise than the contract.
        DataError: too many pictures could not be opened.
    """
    refuse_other_contract(loaded, contract)
    engine = hf_engine(loaded, contract=contract, batch_size=batch_size, max_new_tokens=max_new_tokens)
    rows = predict(
        engine,
        samples,
        contract=contract,
        progress=print_progress(f"{name} on {split}"),
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_predictions(folder / "predictions.jsonl", rows)
    figures = score_rows(rows, labels_asked=contract.labels, resamples=resamples, seed=seed)
    meta = {
        "name": name,
        "split": split,
        "n": len(rows),
        "codec": contract.codec_version,
        "user_prompt": contract.user_prompt,
        "min_pixels": contract.min_pixels,
        "max_pixels": contract.max_pixels,
        "decoding": f"greedy, at most {max_new_tokens} tokens",
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "resamples": resamples,
        "seed": seed,
    }
    write_results(folder, figures, meta, images=per_image(rows, labels_asked=contract.labels))
    contract.write(folder)
    return figures


def format_comparison(figures: dict[str, dict[str, Any]], names: Sequence[str]) -> str:
    """Lay figures of several models side by side: one line a metric, value and 95 % interval."""
    shown = (
        "mean_best_iou", "f1_50", "f1", "precision_50", "recall_50", "mean_matched_iou", "boxes_per_image", "count_error",
        "detection_rate", "parse_failure_rate", "off_list_rate", "correct_empty_rate", "truncation_rate", "error_rate",
    )  # fmt: skip
    lines = [f"{'':<20}" + "".join(f"{name:>26}" for name in names)]
    for metric in shown:
        cells = [format_figure(figures[name].get(metric)) for name in names]
        lines.append(f"{metric:<20}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(lines)


def format_figure(figure: dict[str, Any] | None) -> str:
    """Write a figure as `0.713 (0.668 to 0.754)`; `-` where it is undefined."""
    if figure is None or figure["value"] is None:
        return "-"
    if figure["low"] is None:
        return f"{figure['value']:.3f}"
    return f"{figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"


def format_difference(metric: str, change: Mapping[str, Any]) -> str:
    """Write a paired difference as `tuned - base, f1_50: +0.301 (+0.204 to +0.398)`, and whether it is separable from 0."""
    return f"tuned - base, {metric}: {format_change(change)}"


def format_change(change: Mapping[str, Any]) -> str:
    """Write a paired difference as `+0.301 (+0.204 to +0.398), paired, n = 96`; `undefined` where there is none."""
    if change["value"] is None or change["low"] is None:
        return "undefined"
    verdict = "" if change["separable"] else ", not separable"
    interval = f"({change['low']:+.3f} to {change['high']:+.3f})"
    return f"{change['value']:+.3f} {interval}, paired, n = {change['n']}{verdict}"

"""Measure stored rows and write down what came out: figures, tables, and what became of each box.

When: AFTER prediction, and again whenever stored rows are to be scored (`vlmdet eval --from`); no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmdet.contract import Contract
from vlmdet.evaluation.coco import coco_figures, constant_scores, rows_to_coco, write_coco_predictions
from vlmdet.evaluation.files import write_evaluation
from vlmdet.evaluation.metrics import per_image
from vlmdet.evaluation.results import list_matches, summarise
from vlmdet.evaluation.selftest import self_test
from vlmdet.grounding.questions import version_of_question


def score_and_write(
    rows: Sequence[Mapping[str, Any]],
    folder: Path,
    *,
    labels_asked: Sequence[str],
    contract: Contract | None,
    meta: Mapping[str, Any],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure rows of `predictions.jsonl`, and write everything but the rows themselves.

    When: once per model and split.

    Input: rows; the folder to write into; the labels that were asked for; the contract, None where it is not known; `meta`, what
    the figures are of, JSON values; `resamples` of the bootstrap and its `seed`.
    Output: what `results.json` holds; in the folder `results.json`, `results.csv`, `per_class.csv`, `per_image.csv`,
    `matches.jsonl` and `predictions.coco.json`. COCO's figures are there where boxes have scores that tell them apart.

    Raises:
        ConfigError, DataError: see `results.summarise`; the metric itself is broken.
    """
    plain = [dict(row) for row in rows]
    checked = self_test(plain, labels_asked=labels_asked)
    results = summarise(
        plain,
        labels_asked=labels_asked,
        contract=contract,
        resamples=resamples,
        seed=seed,
        meta={
            "score_calibrated": False,
            **meta,
            **(_asked(contract) if contract is not None else {}),
            "resamples": resamples,
            "seed": seed,
            "n": len(rows),
            "self_test": f"{len(checked)} figures as they must be",
        },
    )
    results["coco"] = _coco(plain, labels_asked)
    write_coco_predictions(folder / "predictions.coco.json", plain, labels_asked=labels_asked)
    write_evaluation(
        folder,
        results,
        images=per_image(plain, labels_asked=labels_asked),
        matches=list_matches(plain, labels_asked=labels_asked),
    )
    return results


def _asked(contract: Contract) -> dict[str, Any]:
    """Return what the pictures were asked under, for the record of the figures."""
    asked = (contract.system_prompt, contract.user_prompt)
    return {
        "base_model": contract.base_model,
        "codec": contract.codec_version,
        "system_prompt": contract.system_prompt,
        "user_prompt": contract.user_prompt,
        "prompt_version": version_of_question(contract.codec, contract.labels, asked),
        "min_pixels": contract.min_pixels,
        "max_pixels": contract.max_pixels,
    }


def _coco(rows: Sequence[dict[str, Any]], labels_asked: Sequence[str]) -> dict[str, float] | None:
    """Compute COCO's figures, None without scores: AP is a matter of order, and nothing would give one."""
    _, results = rows_to_coco(rows, labels_asked=labels_asked)
    if constant_scores(results) or any("score" not in entry for entry in results):
        return None
    return coco_figures(rows, labels_asked=labels_asked)


def format_comparison(figures: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> str:
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


def format_figure(figure: Mapping[str, Any] | None) -> str:
    """Write a figure as `0.713 (0.668 to 0.754)`; `-` where it is undefined."""
    if figure is None or figure["value"] is None:
        return "-"
    if figure["low"] is None:
        return f"{figure['value']:.3f}"
    return f"{figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"


def format_difference(metric: str, change: Mapping[str, Any], *, names: str = "tuned - base") -> str:
    """Write a paired difference as `tuned - base, f1_50: +0.301 (+0.204 to +0.398)`, and whether it is separable from 0."""
    return f"{names}, {metric}: {format_change(change)}"


def format_change(change: Mapping[str, Any]) -> str:
    """Write a paired difference as `+0.301 (+0.204 to +0.398), paired, n = 96`; `undefined` where there is none."""
    if change["value"] is None or change["low"] is None:
        return "undefined"
    verdict = "" if change["separable"] else ", not separable"
    interval = f"({change['low']:+.3f} to {change['high']:+.3f})"
    return f"{change['value']:+.3f} {interval}, paired, n = {change['n']}{verdict}"

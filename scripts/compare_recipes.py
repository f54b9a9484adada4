"""Train the four recipes on the embedded base, three seeds each, and lay their scores side by side.

When: by hand; about an hour on two cores. A run of the right name that is there is taken as it is, whatever it was trained
with, so that the script can be stopped at any time: delete runs/ after a change.

    python scripts/compare_recipes.py drawn bccd --seeds 0 1 2
    python scripts/compare_recipes.py bccd --source ../shared/data/bccd --recipes r1-llm-only r2-vision-only --seeds 0

The recipes are those of `configs/` but for what a base of 5.7 million weights needs, the same for all of them: a higher rate,
more pictures a step, other numbers of passes (`SMALL`, `RATE`, `EPOCHS`; experiments/LOG.md has the runs that chose the rate).
Every model is scored on the test split at the step that did best on validation pictures. Figures are pooled over the seeds; an
interval draws images, each with its answers of all seeds, and the range over seeds stands beside it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmdet.config import find_recipe, load_stages
from vlmdet.contract import Contract
from vlmdet.data.synthetic.packages import write_drawn_set
from vlmdet.evaluation.evaluate import evaluate
from vlmdet.evaluation.files import read_predictions
from vlmdet.evaluation.metrics import FORMULAS, count_images, interval, resample, sort_rows
from vlmdet.models.loader import load
from vlmdet.runs import RUNS, find_run, is_done
from vlmdet.training.prepare import read_data
from vlmdet.training.train import train_stages

RECIPES = ("r1-llm-only", "r2-vision-only", "r3-two-stage", "r4-joint")
METRICS = ("f1_50", "mean_best_iou")

SMALL = (
    "training.batch_size=16", "training.gradient_accumulation=1", "training.gradient_checkpointing=false",
    "training.eval_every=0", "training.eval_rows=48", "training.sample_rows=0", "training.loader_workers=0",
    "training.overfit_gate=false", "training.report_to=[]", "evaluation.batch_size=48", "evaluation.max_new_tokens=96",
)  # fmt: skip
RATE = 3e-3
"""Of AdamW, for every recipe: of 1e-3, 3e-3 and 1e-2 the one with the highest F1@0.5 on validation pictures, seed 0."""
EPOCHS = {"drawn": 2, "bccd": 6}
NAMES = {"drawn": {"nutrition-table": "text block"}, "bccd": {"WBC": "purple blob"}}
"""Words that the embedded base knows: with a name that it never read, a recipe that leaves the language model alone (r2) cannot
say the answer, whatever it sees. A large base knows `nutrition table` and `white blood cell`."""


def settings_of(data: str, recipe: str, seed: int, source: Path, more: Sequence[str]) -> list[Any]:
    """Return the settings of each stage of one run."""
    flags: dict[str, Any] = {
        "data": {"source": str(source)},
        "model": {"name": "tiny", "min_pixels": None, "max_pixels": None},
        "name": f"{data}-{recipe}-seed{seed}",
    }
    overrides = [f"training.seed={seed}", f"training.epochs={EPOCHS[data]}", f"training.learning_rate={RATE}"]
    flags["data"]["rename"] = NAMES[data]
    if data == "bccd":
        flags["data"]["classes"] = ["WBC"]
        overrides += ["augment.flip_horizontal=0.5", "augment.flip_vertical=0.5", "augment.crop=0.5"]
    return load_stages(find_recipe(recipe), [*SMALL, *overrides, *more], flags)


def score(model: str, folder: Path, contract: Contract, samples: Sequence[Any], split: str) -> list[dict[str, Any]]:
    """Return the rows of a model's predictions, made once."""
    if not (folder / "results.json").is_file():
        loaded = load(model, min_pixels=contract.min_pixels, max_pixels=contract.max_pixels)
        evaluate(
            loaded,
            samples,
            contract=contract,
            folder=folder,
            name=folder.name,
            split=split,
            batch_size=48,
            max_new_tokens=96,
        )
    return read_predictions(folder / "predictions.jsonl")


def pooled(rows_of_seeds: Sequence[list[dict[str, Any]]], labels: Sequence[str]) -> Any:
    """Add up the counts of all seeds, image by image."""
    counts = [count_images(sort_rows(rows), labels_asked=labels) for rows in rows_of_seeds]
    return {key: np.sum([count[key] for count in counts], axis=0) for key in counts[0]}


def main() -> None:
    """Train what is missing, score it, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", nargs="+", choices=("drawn", "bccd"))
    parser.add_argument("--source", type=Path, default=Path("../shared/data/bccd"), help="where BCCD lies")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--split", default="test")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args, rest = parser.parse_known_args()
    more = [*args.overrides, *rest]
    for data in args.data:
        source = args.source
        if data == "drawn":
            source = RUNS / "compare-drawn"
            if not source.is_dir():
                write_drawn_set(source.with_suffix(".part"), train=512, val=48, test=96, seed=0).rename(source)
        rows: dict[str, list[list[dict[str, Any]]]] = {"base": []}
        for recipe in args.recipes:
            for seed in args.seeds:
                stages = settings_of(data, recipe, seed, source, more)
                run = find_run(stages[-1].name)
                if run is None or not is_done(run):
                    run, _ = train_stages(stages, command="scripts/compare_recipes.py", say=print)
                contract = Contract.read(run)
                samples = list(read_data(stages[-1], lambda text: None).splits[args.split])
                place = run / "eval" / args.split
                rows.setdefault(recipe, []).append(score(str(run), place / "tuned", contract, samples, args.split))
                if not rows["base"]:
                    rows["base"] = [score("tiny", place / "base", contract, samples, args.split)]
                labels = contract.labels
        print(
            json.dumps(
                {"data": data, "split": args.split, "n": len(samples), "seeds": args.seeds, **table(rows, labels)}
            )
        )


def table(rows: dict[str, list[list[dict[str, Any]]]], labels: Sequence[str]) -> dict[str, Any]:
    """Return figures of each recipe and their paired differences, with intervals and ranges over the seeds."""
    sums = {name: resample(pooled(of, labels), resamples=2000, seed=0) for name, of in rows.items()}
    alone = {
        name: [resample(pooled([one], labels), resamples=0, seed=0) for one in of] for name, of in rows.items()
    }  # the figures of each seed
    result: dict[str, Any] = {"figures": {}, "differences": {}}
    for metric in METRICS:
        formula = FORMULAS[metric]
        for name in rows:
            value, low, high = interval(formula(sums[name]))
            seeds = [round(float(formula(one)[0]), 3) for one in alone[name]]
            result["figures"].setdefault(name, {})[metric] = {"value": value, "low": low, "high": high, "seeds": seeds}
        names = list(rows)
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                value, low, high = interval(formula(sums[b]) - formula(sums[a]))
                separable = low is not None and high is not None and not low <= 0 <= high
                result["differences"].setdefault(f"{b} - {a}", {})[metric] = {
                    "value": value, "low": low, "high": high, "separable": separable
                }  # fmt: skip
    return result


if __name__ == "__main__":
    main()

"""The whole way once, on drawn pictures and the embedded base: base score, fine-tune, tuned score, pictures.

When: `vlmdet demo`; it composes what the other verbs do, and nothing here is needed by them.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vlmdet.config import find_recipe, load_settings
from vlmdet.data.synthetic.packages import write_drawn_set
from vlmdet.doctor.ours import check_before
from vlmdet.evaluation.compare import paired_difference
from vlmdet.evaluation.comparison import write_comparison
from vlmdet.evaluation.evaluate import evaluate
from vlmdet.evaluation.files import read_predictions
from vlmdet.evaluation.scoring import format_comparison, format_difference
from vlmdet.models.loader import load
from vlmdet.report import write_report
from vlmdet.training.callbacks import draw_rows
from vlmdet.training.prepare import prepare
from vlmdet.training.train import train

TRAIN, VAL, TEST = 2048, 48, 96
"""Pictures drawn for each split; the test pictures are seen by nothing but the two scores."""

EPOCHS = 2
"""Pictures are cheap to draw, and new ones teach more than the same ones more often."""


def run_demo(
    *, name: str = "demo", seed: int = 0, overrides: tuple[str, ...] = (), say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Draw a data set, score the base, fine-tune it, score it again, draw the answers.

    When: `vlmdet demo`.

    Input: `name` of the run and of the drawn set; `seed` of the drawing; `overrides`, dotted settings on top of the recipe.
    Output: `{"base": figures, "tuned": figures, "difference": {metric: …}, "seconds": …, "run": folder, "picture": file}`.
    """
    started = time.monotonic()
    source = Path("runs") / name / f"drawn-{seed}"
    if not source.is_dir():  # drawn beside and then renamed, so that a folder of this name is always whole
        part = source.with_name(f"{source.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        write_drawn_set(part, train=TRAIN, val=VAL, test=TEST, seed=seed).rename(source)
    say(f"drew {TRAIN + VAL + TEST} pictures of food packages into {source} ({time.monotonic() - started:.0f} s)")

    settings = load_settings(
        find_recipe("tiny"),
        [
            f"data.source={source}",
            f"name={name}",
            f"training.epochs={EPOCHS}",
            "training.eval_every=0",
            "training.overfit_gate=false",
            *overrides,
        ],
    )
    prepared = prepare(settings, command=f"vlmdet demo --seed {seed}", new=True, say=say)
    model_type = prepared.base.model.config.model_type
    check_before(
        prepared.dataset, settings, prepared.base.processor, model_type=model_type, folder=prepared.folder, say=say
    )
    samples = prepared.dataset.splits["test"]
    folder = prepared.folder / "eval" / "test"
    common: dict[str, Any] = {
        "contract": prepared.contract,
        **asdict(replace(settings.evaluation, split="test")),
    }
    say(f"\nscoring the untuned base on {len(samples)} test pictures …")
    base = evaluate(prepared.base, samples, folder=folder / "base", name="base", **common)

    say("\nfine-tuning …")
    train(prepared, say=say)

    say("\nscoring the tuned model on the same pictures …")
    tuned = evaluate(load(str(prepared.folder)), samples, folder=folder / "tuned", name="tuned", **common)

    rows = {which: read_predictions(folder / which / "predictions.jsonl") for which in ("base", "tuned")}
    difference = {
        metric: paired_difference(rows["base"], rows["tuned"], metric=metric, labels_asked=prepared.contract.labels)
        for metric in ("mean_best_iou", "f1_50")
    }
    write_comparison(folder, labels_asked=prepared.contract.labels, seed=settings.evaluation.seed)
    picture = prepared.folder / "eval" / "test" / "tuned.png"
    draw_rows(samples[:12], rows["tuned"], columns=4).save(picture)
    write_report(prepared.folder, say=say)
    seconds = time.monotonic() - started

    say(f"\nbase and tuned, same prompt, pixels and parser, {len(samples)} unseen drawn pictures, 95 % intervals")
    say(format_comparison({"base": base, "tuned": tuned}, ["base", "tuned"]))
    for metric, change in difference.items():
        say(format_difference(metric, change))
    say(f"\npictures, truth dashed green, prediction solid red: {picture}")
    say(f"took {seconds:.0f} s; run folder: {prepared.folder}")
    say(f"next:\n  vlmdet predict YOUR_PICTURE.jpg --model {prepared.folder}")
    say(f"  vlmdet train {source} --recipe tiny --name mine")
    return {
        "base": base,
        "tuned": tuned,
        "difference": difference,
        "seconds": round(seconds, 1),
        "run": str(prepared.folder),
        "picture": str(picture),
    }

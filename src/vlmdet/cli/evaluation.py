"""Verbs on a trained model: eval and predict.

When: after `vlmdet VERB` is known; a verb imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vlmdet.cli.common import (
    add_json,
    add_verb,
    make_say,
)
from vlmdet.errors import ConfigError


def add_eval(verbs: Any) -> None:
    """Describe `vlmdet eval`."""
    evaluation = add_verb(
        verbs, "eval", _eval, "score a run on a split, and its untuned base with --base",
        ["vlmdet eval runs/demo --base", "vlmdet eval runs/demo --split val", "vlmdet eval runs/demo --json"],
    )  # fmt: skip
    evaluation.add_argument("run_name", metavar="RUN", help="runs/NAME, runs/NAME/NNN, or what vlmdet merge wrote")
    evaluation.add_argument("--split", default=None, help="default: the run's evaluation.split")
    evaluation.add_argument("--base", action="store_true", help="score the untuned base too, under the same contract")
    evaluation.add_argument("--limit", type=int, help="score this many pictures only")
    add_json(evaluation)


def _eval(args: argparse.Namespace) -> None:
    from dataclasses import asdict, replace

    from vlmdet.runs import need_run

    folder = Path(args.run_name)
    if not (folder / "merge.json").is_file():  # merged weights bring settings and contract like a run
        folder = need_run(args.run_name)

    from vlmdet.config import load_settings
    from vlmdet.contract import Contract
    from vlmdet.data.select import check_places, write_problems
    from vlmdet.errors import DataError, did_you_mean
    from vlmdet.evaluation.compare import paired_difference
    from vlmdet.evaluation.evaluate import evaluate, format_comparison, format_difference
    from vlmdet.evaluation.files import read_predictions
    from vlmdet.models.loader import load
    from vlmdet.training.callbacks import draw_rows
    from vlmdet.training.prepare import read_data

    say = make_say(args)
    settings = load_settings(folder / "config.yaml")
    contract = Contract.read(folder)
    dataset = read_data(settings, say)
    split = args.split or settings.evaluation.split
    if split not in dataset.splits:
        raise DataError(f"{settings.data.source}: there is no split '{split}'", did_you_mean(split, dataset.splits))
    samples, misplaced = check_places(list(dataset.splits[split])[: args.limit])
    if misplaced:
        where = write_problems(folder / "eval" / split / "problems.jsonl", misplaced)
        say(f"{len(misplaced)} pictures are not scored, since their boxes would lie elsewhere: {where}")
    if not samples:
        raise DataError(f"{settings.data.source}: no picture of the split '{split}' is left to score")
    names = {"base": contract.base_model, "tuned": str(folder)} if args.base else {"tuned": str(folder)}
    figures, rows = {}, {}
    for which, model in names.items():
        loaded = load(model, min_pixels=contract.min_pixels, max_pixels=contract.max_pixels)
        place = folder / "eval" / split / which
        figures[which] = evaluate(
            loaded,
            samples,
            contract=contract,
            folder=place,
            name=which,
            **asdict(replace(settings.evaluation, split=split)),
        )
        rows[which] = read_predictions(place / "predictions.jsonl")
        draw_rows(samples[:12], rows[which], columns=4).save(place.with_suffix(".png"))
    say(f"split {split}, {len(samples)} pictures, 95 % intervals")
    say(format_comparison(figures, list(names)))
    result: dict[str, Any] = dict(figures)
    if args.base:
        result["difference"] = {
            metric: paired_difference(rows["base"], rows["tuned"], metric=metric, labels_asked=contract.labels)
            for metric in ("mean_best_iou", "f1_50")
        }
        for metric, change in result["difference"].items():
            say(format_difference(metric, change))
    say(f"predictions and pictures: {folder / 'eval' / split}")
    if args.json:
        print(json.dumps(result))


def add_predict(verbs: Any) -> None:
    """Describe `vlmdet predict`."""
    predict = add_verb(
        verbs, "predict", _predict, "find objects in pictures: JSON lines, and the pictures with boxes drawn",
        [
            "vlmdet predict photo.jpg --model runs/demo",
            "vlmdet predict *.jpg --model runs/demo --out drawn/",
            'vlmdet predict photo.jpg --model tiny --classes "red star"',
        ],
    )  # fmt: skip
    predict.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    predict.add_argument("--model", required=True, help="a run, tiny, a hub id, or a folder of weights")
    predict.add_argument("--classes", action="append", metavar="NAME", help="what to look for; a run brings its own")
    predict.add_argument("--out", type=Path, default=Path("predictions"), help="folder of the drawn pictures")
    predict.add_argument("--min-pixels", type=int, help="for a base other than tiny")
    predict.add_argument("--max-pixels", type=int, help="for a base other than tiny")


def _predict(args: argparse.Namespace) -> None:
    from vlmdet.images import open_image

    sizes = [open_image(path).size for path in args.images]

    from vlmdet.boxes import Boxes
    from vlmdet.contract import refuse_mismatch
    from vlmdet.evaluation.predict import predict
    from vlmdet.models.inference import MAX_NEW_TOKENS, hf_engine
    from vlmdet.models.loader import load, make_contract
    from vlmdet.records import Sample
    from vlmdet.utils.visualization import visualize_bbox_on_image

    loaded = load(args.model, min_pixels=args.min_pixels, max_pixels=args.max_pixels)
    labels = tuple(args.classes or (loaded.contract.labels if loaded.contract else ()))
    if not labels:
        raise ConfigError(f"{args.model} is no run, so it does not know what to look for", "name it with --classes")
    contract = make_contract(
        loaded,
        labels=labels,
        codec=loaded.contract.codec if loaded.contract else "auto",
        box_order="raster",
        max_new_tokens=MAX_NEW_TOKENS,
        data_fingerprint="",
    )
    if loaded.contract is not None:
        refuse_mismatch(loaded.contract, contract)
    samples = [
        Sample(str(path), path, width, height, Boxes.empty(), (), source=str(path))
        for path, (width, height) in zip(args.images, sizes, strict=True)
    ]
    rows = predict(hf_engine(loaded, contract=contract), samples, contract=contract)
    args.out.mkdir(parents=True, exist_ok=True)
    taken: set[Path] = set()
    for row, path in zip(rows, args.images, strict=True):
        drawn = args.out / f"{path.stem}.png"
        while drawn in taken:  # two pictures of one name from different folders
            drawn = drawn.with_stem(f"{drawn.stem}-again")
        taken.add(drawn)
        visualize_bbox_on_image(open_image(path), row["boxes"], row["labels"]).save(drawn)
        print(json.dumps({**{key: value for key, value in row.items() if key != "truth"}, "drawn": str(drawn)}))

"""The verb eval: a run, and its untuned base, scored on a split; or stored predictions scored again.

When: after `vlmdet eval` is known; it imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vlmdet.cli.common import add_allow, add_json, add_verb, allowed_fields, make_say, say_nothing
from vlmdet.cli.engine import add_engine, contract_asked, engine_overrides, make_server
from vlmdet.errors import ConfigError


def add_eval(verbs: Any) -> None:
    """Describe `vlmdet eval`."""
    evaluation = add_verb(
        verbs, "eval", _eval, "score a run on a split, and its untuned base with --base",
        [
            "vlmdet eval runs/demo --base",
            "vlmdet eval runs/demo --split val --json",
            "vlmdet eval --from runs/demo/001/eval/test/tuned/predictions.jsonl --out scored/",
        ],
    )  # fmt: skip
    evaluation.add_argument(
        "run_name", metavar="RUN", nargs="?", help="runs/NAME, runs/NAME/NNN, or what vlmdet merge wrote"
    )
    evaluation.add_argument("--split", default=None, help="default: the run's evaluation.split")
    evaluation.add_argument(
        "--base", action="store_true", help="score the untuned base too, under the same contract and in its own words"
    )
    evaluation.add_argument("--limit", type=int, help="score this many pictures only")
    evaluation.add_argument("--new", action="store_true", help="predict again what is there already")
    evaluation.add_argument(
        "--from", dest="stored", type=Path, metavar="FILE", help="score stored predictions again; no model is loaded"
    )
    evaluation.add_argument("--out", type=Path, metavar="FOLDER", help="with --from (default: the folder of FILE)")
    evaluation.add_argument(
        "--calibrate-on",
        type=Path,
        metavar="FILE",
        help="with --from: make scores probabilities, as fitted on these predictions of another split",
    )
    evaluation.add_argument("--classes", action="append", metavar="NAME", help="with --from, where no contract lies by")
    add_allow(evaluation)
    add_engine(evaluation)
    add_json(evaluation)


def _eval(args: argparse.Namespace) -> None:
    if (args.run_name is None) == (args.stored is None):
        raise ConfigError("eval needs a RUN, or --from FILE, and not both", "e.g. vlmdet eval runs/demo --base")
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit {args.limit}", "give the number of pictures to score, at least 1")
    allow = allowed_fields(args)
    if args.stored is not None:
        if allow:
            raise ConfigError("--allow is for a RUN: scoring stored predictions compares no contracts", "leave it out")
        _score_stored(args)
        return
    if args.calibrate_on is not None:
        raise ConfigError("--calibrate-on is for stored predictions", "add --from …/predictions.jsonl")

    from vlmdet.runs import need_run

    folder = Path(args.run_name)
    if not (folder / "merge.json").is_file():  # merged weights bring settings and contract like a run
        folder = need_run(args.run_name)
    if args.engine == "openai" and args.base:
        raise ConfigError("--base with --engine openai: the server has one model", "score the base with --engine hf")
    if args.baseline and args.engine != "openai":
        raise ConfigError("--baseline is of a model behind a server", "add --engine openai --url … --served-name …")

    from vlmdet.config import load_settings
    from vlmdet.contract import Contract
    from vlmdet.data.select import check_places, write_problems
    from vlmdet.errors import DataError, did_you_mean
    from vlmdet.report import write_report

    settings = load_settings(folder / "config.yaml", engine_overrides(args))
    contract = Contract.read(folder)

    from vlmdet.training.prepare import read_data
    from vlmdet.training.processes import gather, is_main, join, leave, world_size

    say = make_say(args) if is_main() else say_nothing
    dataset = read_data(settings, say)
    split = args.split or settings.evaluation.split
    if split not in dataset.splits:
        raise DataError(f"{settings.data.source}: there is no split '{split}'", did_you_mean(split, dataset.splits))
    samples, misplaced = check_places(list(dataset.splits[split])[: args.limit])
    if misplaced and is_main():
        where = write_problems(folder / "eval" / split / "problems.jsonl", misplaced)
        say(f"{len(misplaced)} pictures are not scored, since their boxes would lie elsewhere: {where}")
    if not samples:
        raise DataError(f"{settings.data.source}: no picture of the split '{split}' is left to score")
    if world_size() > 1:
        import torch

        join(cpu=not torch.cuda.is_available())
    together = gather if world_size() > 1 else None
    figures = _predict_all(args, folder, settings, contract, samples, split, together, allow, say)
    if is_main():
        _tell_all(args, folder / "eval" / split, contract, samples, figures, settings, say)
        write_report(folder, say=say)
    leave()


def _predict_all(
    args: argparse.Namespace,
    folder: Path,
    settings: Any,
    contract: Any,
    samples: Any,
    split: str,
    gather: Any,
    allow: list[str],
    say: Any,
) -> dict[str, Any]:
    """Predict and score base, base in its own words, and tuned model, or what a server has."""
    from dataclasses import asdict, replace

    from vlmdet.contract import adopt, tell_permitted
    from vlmdet.evaluation.evaluate import evaluate, evaluate_engine
    from vlmdet.evaluation.native import native_contract
    from vlmdet.models.families import codec_of
    from vlmdet.models.loader import load, load_without_weights, refuse_other_contract

    place = folder / "eval" / split
    more = "_constrained" if settings.evaluation.constrain else ""  # beside the plain ones, to be compared
    common = asdict(replace(settings.evaluation, split=split))
    limits = {"min_pixels": contract.min_pixels, "max_pixels": contract.max_pixels}
    if args.engine == "openai":
        known = load_without_weights(str(folder))
        allowed = refuse_other_contract(known, contract, allow=allow)
        for line in tell_permitted(allowed):
            say(line)
        contract = contract_asked(args, adopt(contract, allowed))
        engine = make_server(args, known.processor, contract, settings.evaluation)
        name = f"{'baseline' if args.baseline else 'openai'}{more}"
        meta = {"name": name, "split": split, "engine": "openai", "url": args.url, "served_name": args.served_name}
        meta |= {"allow": allowed} if allowed else {}
        del common["split"], common["batch_size"]
        found = evaluate_engine(
            engine,
            samples,
            contract=contract,
            folder=place / name,
            meta=meta,
            map_labels=args.baseline is not None,
            new=args.new,
            gather=gather,
            **common,
        )
        return {name: found}
    figures = {}
    common |= {"contract": contract, "new": args.new, "gather": gather, "allow": allow, "say": say}

    def score(loaded: Any, which: str, **own: Any) -> None:
        name = which + more
        figures[name] = evaluate(loaded, samples, folder=place / name, name=name, **common, **own)

    if args.base:
        base = load(contract.base_model, **limits)
        score(base, "base")
        score(base, "base_native", native=native_contract(contract, codec_of(base.model)))
        del base
    score(load(str(folder), **limits), "tuned")
    return figures


def _tell_all(
    args: argparse.Namespace,
    place: Path,
    contract: Any,
    samples: Any,
    figures: dict[str, Any],
    settings: Any,
    say: Any,
) -> None:
    """Draw the first pictures, compare, and print."""
    from vlmdet.evaluation.compare import paired_difference
    from vlmdet.evaluation.files import read_predictions
    from vlmdet.evaluation.scoring import format_comparison, format_difference
    from vlmdet.training.callbacks import draw_rows

    rows = {which: read_predictions(place / which / "predictions.jsonl") for which in figures}
    for which in figures:
        draw_rows(samples[:12], rows[which], columns=4).save(place / f"{which}.png")
    say(f"split {place.name}, {len(samples)} pictures, 95 % intervals")
    say(format_comparison(figures, list(figures)))
    result: dict[str, Any] = dict(figures)
    for other, key in zip(list(figures)[:-1], ("difference", "difference_to_native"), strict=False):
        last = list(figures)[-1]
        result[key] = {
            metric: paired_difference(rows[other], rows[last], metric=metric, labels_asked=contract.labels)
            for metric in ("mean_best_iou", "f1_50")
        }
        for metric, change in result[key].items():
            say(format_difference(metric, change, names=f"{last} - {other}"))
    _compare(place, contract, figures, settings)
    say(f"predictions and pictures: {place}")
    if args.json:
        print(json.dumps(result))


def _compare(place: Path, contract: Any, figures: dict[str, Any], settings: Any) -> None:
    """Write `comparison.json` of the split anew, or delete one that is of other predictions than are there now."""
    from vlmdet.errors import DataError
    from vlmdet.evaluation.comparison import write_comparison

    evaluation = settings.evaluation
    if "tuned" not in figures:
        return
    try:
        write_comparison(place, labels_asked=contract.labels, resamples=evaluation.resamples, seed=evaluation.seed)
    except DataError:  # the base was scored on other pictures, or not at all
        if "base" in figures:
            raise
        (place / "comparison.json").unlink(missing_ok=True)


def _score_stored(args: argparse.Namespace) -> None:
    """Score a file of predictions again; needs no torch."""
    from vlmdet.contract import FILE_NAME, Contract
    from vlmdet.evaluation.files import read_predictions
    from vlmdet.evaluation.parts import read_made_with
    from vlmdet.evaluation.scoring import format_comparison, score_and_write

    file: Path = args.stored
    rows = read_predictions(file)
    contract = Contract.read(file.parent) if (file.parent / FILE_NAME).is_file() else None
    labels = tuple(args.classes or (contract.labels if contract else ()))
    if not labels:
        raise ConfigError(f"{file}: no {FILE_NAME} lies beside it", "name what was asked for with --classes")
    folder = args.out or file.parent
    # what the rows were made with, where that is known, and who scores them now
    meta = {**read_made_with(file), "name": folder.name, "scored_from": str(file)}
    if args.calibrate_on is not None:
        rows, meta["score_calibrated"] = _calibrate(rows, args.calibrate_on, labels)
    results = score_and_write(rows, folder, labels_asked=labels, contract=contract, meta=meta)
    say = make_say(args)
    say(f"{len(rows)} stored rows, 95 % intervals")
    say(format_comparison({folder.name: results["figures"]}, [folder.name]))
    say(f"figures: {folder / 'results.json'}")
    if args.json:
        print(json.dumps(results["figures"]))


def _calibrate(rows: list[Any], on: Path, labels: tuple[str, ...]) -> tuple[list[Any], dict[str, Any]]:
    """Return rows with calibrated scores, and what `results.json` says of it."""
    from dataclasses import asdict

    from vlmdet.evaluation.calibration import calibrate_rows, calibration_error, fit_from_file, scored_hits

    fitted = fit_from_file(on, labels_asked=labels, scored=rows)
    changed = calibrate_rows(rows, fitted)
    before, after = (calibration_error(*scored_hits(some, labels_asked=labels)) for some in (rows, changed))
    errors = {"error_before": before, "error_after": after} if before == before else {}  # without a box there is none
    return changed, {"method": "platt", **asdict(fitted), **errors}

"""The command line: one verb, one function; nothing heavy is imported before the verb is known.

When: `vlmdet …` and `python -m vlmdet …`. A user's mistake is one line on stderr and exit code 2; a bug is a traceback.

Long, because every verb's flags stand in one place, beside the few lines that pass them on.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlmdet.errors import ConfigError, Stopped, VlmdetError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, or 2 for a user's mistake."""
    args = parse(argv)
    # the libraries' own notes about themselves; ours are printed, errors are raised
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\.")
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # it misses an optional kernel, and says so at every import
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        try:
            print(flush=True)  # fails where it is stdout that is closed
        except BrokenPipeError:  # `| head` has read enough; the interpreter's own flush at the end must not fail either
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        raise  # another pipe, such as a worker's: a bug
    except VlmdetError as error:
        _tell(f"vlmdet {args.verb}: {error}")
        return 2
    except Stopped as stopped:
        _tell(f"vlmdet {args.verb}: {stopped}")
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print(f"vlmdet {args.verb}: stopped", file=sys.stderr)
        return 130
    return 0


def _tell(text: str) -> None:
    """Print a line on stderr, once where several processes run the same command."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read a command line; settings such as `training.epochs=5` may stand before or after flags.

    argparse gives a list of positionals to one place only, so those behind a flag come back as unknown.
    """
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    odd = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(args, "overrides")]
    if odd:
        parser.error(f"unrecognized arguments: {' '.join(odd)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def build_parser() -> argparse.ArgumentParser:
    """Describe every verb."""
    parser = argparse.ArgumentParser(
        prog="vlmdet",
        description="Fine-tune a vision-language model to detect objects, and prove that it learned to.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="start here:\n  vlmdet demo\n  vlmdet train FOLDER --recipe tiny\n  vlmdet predict PICTURE.jpg --model runs/demo",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    demo = _verb(
        verbs, "demo", _demo, "the whole way once, on drawn pictures and the embedded base",
        ["vlmdet demo", "vlmdet demo --seed 1", "vlmdet demo --json"],
    )  # fmt: skip
    demo.add_argument("--seed", type=int, default=0, help="seed of the drawn pictures")
    _add_overrides(demo)
    _add_json(demo)

    train = _verb(
        verbs, "train", _train, "fine-tune a base on a data set",
        [
            "vlmdet train FOLDER --recipe tiny",
            'vlmdet train bccd --recipe tiny --classes WBC --rename WBC="white blood cell"',
            "vlmdet train FOLDER --recipe r4-joint --model Qwen/Qwen2-VL-2B-Instruct training.epochs=5",
        ],
    )  # fmt: skip
    train.add_argument("source", metavar="SOURCE", help="a folder, a file, or the id of a hub data set")
    train.add_argument("--recipe", default="tiny", help="name or file of a recipe (default: tiny)")
    train.add_argument("--model", help="tiny, a hub id, or a folder of weights")
    train.add_argument("--name", help="the run's folder is runs/NAME/NNN")
    train.add_argument(
        "--num-processes", type=int, metavar="N", help="share the work among N processes (docs/devices.md)"
    )
    train.add_argument("--new", action="store_true", help="start another run where an equal one was stopped")
    _add_selection(train)
    train.add_argument("--max-problems", type=float, metavar="SHARE", help="share of broken rows above which to stop")
    _add_overrides(train)
    _add_json(train)

    plan = _verb(
        verbs, "plan", _plan, "what a run would read, train, need and take; nothing is started",
        [
            "vlmdet plan FOLDER --recipe tiny",
            "vlmdet plan --recipe r1-llm-only --model FOLDER",
            "vlmdet plan FOLDER --recipe r4-joint --model Qwen/Qwen2-VL-2B-Instruct --json",
        ],
    )  # fmt: skip
    plan.add_argument(
        "source", metavar="SOURCE", nargs="?", help="as for train; without it only what concerns the model"
    )
    plan.add_argument("--recipe", default="tiny", help="name or file of a recipe (default: tiny)")
    plan.add_argument("--model", help="tiny, a hub id, a folder of weights, or one of a configuration alone")
    plan.add_argument("--num-processes", type=int, metavar="N", help="processes that would share the work")
    _add_selection(plan)
    _add_overrides(plan)
    _add_json(plan)

    inspect = _verb(
        verbs, "inspect", _inspect, "what is in a data set: one screen, and a page of pictures with their boxes",
        [
            "vlmdet inspect FOLDER",
            "vlmdet inspect FOLDER --model tiny --html look.html",
            "vlmdet inspect bccd --classes WBC --json",
        ],
    )  # fmt: skip
    inspect.add_argument("source", metavar="SOURCE", help="a folder, a file, or the id of a hub data set")
    inspect.add_argument(
        "--model", metavar="FAMILY", default="qwen2-vl", help="whose resize: tiny, qwen2-vl, qwen2.5-vl or qwen3-vl"
    )
    inspect.add_argument("--min-pixels", type=int, help="smallest picture area after the resize, other than usual")
    inspect.add_argument("--max-pixels", type=int, help="largest picture area after the resize, other than usual")
    inspect.add_argument("--factor", type=int, help="side in pixels of one image token: 28, or 32 for Qwen3-VL")
    inspect.add_argument("--html", type=Path, metavar="OUT", help="the page (default: inspect-NAME.html)")
    _add_selection(inspect)
    _add_json(inspect)

    convert = _verb(
        verbs, "convert", _convert, "write a data set in another layout, or as training files for another trainer",
        [
            "vlmdet convert FOLDER yolo-set --to yolo",
            'vlmdet convert bccd coco-set --to coco --classes WBC --rename WBC="white blood cell" --limit 20',
            "vlmdet convert FOLDER swift-set --to swift --codec qwen2_5_vl",
        ],
    )  # fmt: skip
    convert.add_argument("source", metavar="SRC", help="a folder, a file, or the id of a hub data set")
    convert.add_argument("folder", metavar="DST", type=Path, help="a folder that is not there yet, or is empty")
    convert.add_argument(
        "--to", required=True, metavar="TARGET", help="coco, yolo, voc, jsonl, parquet, swift, llamafactory, or trl"
    )
    convert.add_argument("--link", action="store_true", help="link to picture files instead of copying them")
    convert.add_argument("--codec", help="training files: how the model family writes boxes (default: qwen2_vl)")
    convert.add_argument("--min-pixels", type=int, help="training files: what the trainer's processor will be set to")
    convert.add_argument("--max-pixels", type=int, help="training files: what the trainer's processor will be set to")
    _add_selection(convert)
    convert.add_argument("--max-problems", type=float, metavar="SHARE", help="share of broken rows above which to stop")
    _add_json(convert)

    evaluation = _verb(
        verbs, "eval", _eval, "score a run on a split, and its untuned base with --base",
        ["vlmdet eval runs/demo --base", "vlmdet eval runs/demo --split val", "vlmdet eval runs/demo --json"],
    )  # fmt: skip
    evaluation.add_argument("run_name", metavar="RUN", help="runs/NAME, runs/NAME/NNN, or what vlmdet merge wrote")
    evaluation.add_argument("--split", default=None, help="default: the run's evaluation.split")
    evaluation.add_argument("--base", action="store_true", help="score the untuned base too, under the same contract")
    evaluation.add_argument("--limit", type=int, help="score this many pictures only")
    _add_json(evaluation)

    predict = _verb(
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

    merging = _verb(
        verbs, "merge", _merge, "add a run's adapter into its base's weights, verified, for plain transformers",
        ["vlmdet merge runs/demo", "vlmdet merge runs/demo --dtype bfloat16 --out served/", "vlmdet merge runs/demo --json"],
    )  # fmt: skip
    merging.add_argument("run_name", metavar="RUN", help="runs/NAME, or runs/NAME/NNN")
    merging.add_argument("--out", type=Path, metavar="FOLDER", help="absent or empty (default: RUN/merged)")
    merging.add_argument(
        "--dtype",
        default="auto",
        help="of the written weights: float32 (exact), bfloat16 or float16 (half the size, rounded; the effect is "
        "measured); auto: what the base has on disk, float32 for tiny",
    )
    merging.add_argument("--skip-eval", action="store_true", help="do not score against the 4-bit base of the training")
    _add_json(merging)

    environment = _verb(
        verbs, "env", _env, "what to paste into an issue", ["vlmdet env", "vlmdet env --json", "vlmdet env > env.txt"]
    )
    _add_json(environment)
    return parser


def _verb(verbs: Any, name: str, run: Callable[[argparse.Namespace], None], summary: str, examples: list[str]) -> Any:
    parser = verbs.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n" + "\n".join(f"  {example}" for example in examples),
    )
    parser.set_defaults(run=run)
    return parser


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, everything else on stderr")


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, e.g. training.epochs=5")


def _add_selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--classes", action="append", metavar="NAME", help="class to look for; repeat for several")
    parser.add_argument("--rename", action="append", metavar="OLD=NEW", help='e.g. WBC="white blood cell"')
    parser.add_argument("--limit", type=int, metavar="N", help="keep N rows of each split")
    parser.add_argument("--format", metavar="LAYOUT", help="auto (default), coco, yolo, voc, jsonl, hub, or csv")
    parser.add_argument(
        "--box-format",
        metavar="ORDER/UNIT",
        help="xyxy, yxyx, xywh or cxcywh / pixel, fraction or per_mille; else decided",
    )
    parser.add_argument("--exif", choices=("applied", "ignored"), help="were boxes drawn on pictures turned upright?")


def _say(args: argparse.Namespace) -> Callable[[str], None]:
    stream = sys.stderr if args.json else sys.stdout

    def say(text: str) -> None:
        print(text, file=stream, flush=True)

    return say


def _say_nothing(text: str) -> None:
    """Print nothing: one process of several speaks."""


def _selection(args: argparse.Namespace) -> dict[str, Any]:
    """Turn --classes, --rename and --limit into settings."""
    data: dict[str, Any] = {}
    if args.classes:
        data["classes"] = args.classes
    if args.rename:
        pairs = [text.partition("=") for text in args.rename]
        odd = [text for text, (old, _, new) in zip(args.rename, pairs, strict=True) if not old or not new]
        if odd:
            raise ConfigError(f"--rename {odd[0]}", 'write it as OLD=NEW, e.g. --rename WBC="white blood cell"')
        data["rename"] = {old: new for old, _, new in pairs}
    if args.limit is not None:
        data["limit"] = args.limit
    return data


def _reading(args: argparse.Namespace) -> dict[str, Any]:
    """Turn --format, --box-format and --exif into settings, which are arguments of `open_dataset` too."""
    return {key: value for key in ("format", "box_format", "exif") if (value := getattr(args, key)) is not None}


def _demo(args: argparse.Namespace) -> None:
    from vlmdet.demo import run_demo

    result = run_demo(seed=args.seed, overrides=tuple(args.overrides), say=_say(args))
    if args.json:
        print(json.dumps(result))


def _stages(args: argparse.Namespace, source: str, overrides: Sequence[str], **flags: Any) -> list[Any]:
    """Read the settings of each stage of the recipe that the flags name, with what other flags lay over it."""
    from vlmdet.config import find_recipe, load_stages

    data = {"source": source, **_reading(args), **_selection(args), **flags.pop("data", {})}
    if args.model:
        flags["model"] = {"name": args.model}
        if args.model == "tiny":  # a recipe's limits are those of large models; the embedded base brings its own
            flags["model"] |= {"min_pixels": None, "max_pixels": None}
    return load_stages(find_recipe(args.recipe), overrides, {"data": data, **flags})


def _train(args: argparse.Namespace) -> None:
    from vlmdet.limits import check

    name = args.name or Path(args.source).resolve().name.replace(" ", "-")
    stages = _stages(args, args.source, args.overrides, name=name, data=_given(args, "max_problems"))
    for settings in stages:
        check(settings, needs_data=True)

    launched = os.environ.get("WORLD_SIZE")  # each process that `launch` starts comes by here again
    if launched is None and args.num_processes not in (None, 1):
        from vlmdet.training.launch import launch

        sys.exit(launch(args.num_processes, sys.argv[1:], device=settings.model.device))
    if launched is not None and args.num_processes not in (None, int(launched)):
        raise ConfigError(
            f"--num-processes is {args.num_processes}, and another launcher has started {launched}",
            "use --num-processes, or accelerate launch, not both",
        )

    from vlmdet.training.processes import is_main, leave
    from vlmdet.training.train import train_stages

    say = _say(args) if is_main() else _say_nothing
    command = shlex.join(["vlmdet", *sys.argv[1:]])
    folder, prepared = train_stages(stages, command=command, new=args.new, say=say)
    leave()
    split = settings.evaluation.split
    say(f"next:\n  vlmdet eval {folder} --base" + ("" if split in prepared.dataset.splits else " --split val"))
    say(f"  vlmdet predict PICTURE.jpg --model {folder}")
    if args.json and is_main():
        print(json.dumps({"run": str(folder)}))


def _plan(args: argparse.Namespace) -> None:
    overrides, source = list(args.overrides), args.source
    if source and "=" in source and not Path(source).exists():  # no SOURCE, and a setting in its place
        overrides, source = [source, *overrides], None
    stages = _stages(args, source or "", overrides)

    from vlmdet.training.plan import format_plan
    from vlmdet.training.preflight import preflight

    say = _say(args)
    plans = {}
    for settings in stages:
        plans[settings.name] = preflight(settings, processes=args.num_processes, say=say)
        say((f"stage {settings.name}\n" if len(stages) > 1 else "") + format_plan(plans[settings.name]))
    if args.json:
        whole = [{"stage": name, **plan.as_dict()} for name, plan in plans.items()]
        print(json.dumps(plans[settings.name].as_dict() if len(stages) == 1 else {"stages": whole}))


def _inspect(args: argparse.Namespace) -> None:
    from dataclasses import replace
    from itertools import chain

    from vlmdet.data.explore import FAMILIES, check_limits, format_summary, summarise
    from vlmdet.data.explore.page import write_page
    from vlmdet.data.pictures import look_over
    from vlmdet.data.readers import open_dataset
    from vlmdet.data.select import select, write_problems
    from vlmdet.errors import did_you_mean

    if args.model not in FAMILIES:
        raise ConfigError(f"unknown model family '{args.model}'", did_you_mean(args.model, FAMILIES))
    limits = check_limits(FAMILIES[args.model]._replace(**_given(args, "min_pixels", "max_pixels", "factor")))
    path = args.html or Path(f"inspect-{Path(args.source).resolve().name.replace(' ', '-')}.html")
    if path.is_dir():
        raise ConfigError(f"--html {path} is a folder", f"name a file, e.g. --html {path / 'inspect.html'}")
    say = _say(args)
    dataset = select(open_dataset(args.source, **_reading(args)), **_selection(args))
    splits = dataset.splits.values()
    looked = look_over(chain.from_iterable(splits), total=sum(map(len, splits)))
    dataset = replace(dataset, problems=[*dataset.problems, *looked.problems])
    summary = summarise(dataset, limits=limits)
    problems = write_problems(path.with_suffix(".problems.jsonl"), dataset.problems)
    write_page(path, summary, dataset, twins=looked.twins)
    say(f"{format_summary(summary)}\n\npage: {path}\nevery problem: {problems}")
    if args.json:
        print(json.dumps({**summary.as_dict(), "page": str(path), "problems_file": str(problems)}))


def _convert(args: argparse.Namespace) -> None:
    from vlmdet.data.readers import open_dataset
    from vlmdet.data.select import refuse_above, select
    from vlmdet.data.writers import Training, format_report, write_dataset

    say = _say(args)
    dataset = open_dataset(args.source, **_reading(args))
    rows = sum(map(len, dataset.splits.values())) + sum(one.action == "row_dropped" for one in dataset.problems)
    share = _given(args, "max_problems")
    refuse_above(dataset.problems, rows, *share.values())
    dataset = select(dataset, **_selection(args))
    training = Training(**_given(args, "codec", "min_pixels", "max_pixels"))
    folder = write_dataset(dataset, args.folder, to=args.to, link=args.link, training=training, **share)
    say(format_report(folder))
    if args.json:
        report = json.loads((folder / "conversion.json").read_text(encoding="utf-8"))
        print(json.dumps({"folder": str(folder), **report}))


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the flags that were given; the others keep the default of what they are passed to."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}


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

    say = _say(args)
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


def _predict(args: argparse.Namespace) -> None:
    from vlmdet.images import open_image

    sizes = [open_image(path).size for path in args.images]

    from vlmdet.boxes import Boxes
    from vlmdet.contract import refuse_mismatch
    from vlmdet.evaluation.predict import predict
    from vlmdet.models.inference import MAX_NEW_TOKENS
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
    rows = predict(loaded.model, loaded.processor, samples, contract=contract)
    args.out.mkdir(parents=True, exist_ok=True)
    taken: set[Path] = set()
    for row, path in zip(rows, args.images, strict=True):
        drawn = args.out / f"{path.stem}.png"
        while drawn in taken:  # two pictures of one name from different folders
            drawn = drawn.with_stem(f"{drawn.stem}-again")
        taken.add(drawn)
        visualize_bbox_on_image(open_image(path), row["boxes"], row["labels"]).save(drawn)
        print(json.dumps({**{key: value for key, value in row.items() if key != "truth"}, "drawn": str(drawn)}))


def _merge(args: argparse.Namespace) -> None:
    from vlmdet.runs import need_run

    need_run(args.run_name)  # before ten seconds of imports

    from vlmdet.training.merge import merge_run

    say = _say(args)
    result = merge_run(args.run_name, out=args.out, dtype=args.dtype, skip_eval=args.skip_eval, say=say)
    say(f"next:\n  vlmdet predict PICTURE.jpg --model {result['merged']}")
    if args.json:
        print(json.dumps(result))


def _env(args: argparse.Namespace) -> None:
    from vlmdet.utils.environment import describe_environment, format_environment

    found = describe_environment()
    print(json.dumps(found) if args.json else format_environment(found))

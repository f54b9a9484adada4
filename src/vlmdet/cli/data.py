"""Verbs on a data set: inspect and convert.

When: after `vlmdet VERB` is known; a verb imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vlmdet.cli.common import (
    add_json,
    add_selection,
    add_verb,
    given,
    make_say,
    reading,
    selection,
)
from vlmdet.errors import ConfigError


def add_inspect(verbs: Any) -> None:
    """Describe `vlmdet inspect`."""
    inspect = add_verb(
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
    add_selection(inspect)
    add_json(inspect)


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
    limits = check_limits(FAMILIES[args.model]._replace(**given(args, "min_pixels", "max_pixels", "factor")))
    path = args.html or Path(f"inspect-{Path(args.source).resolve().name.replace(' ', '-')}.html")
    if path.is_dir():
        raise ConfigError(f"--html {path} is a folder", f"name a file, e.g. --html {path / 'inspect.html'}")
    say = make_say(args)
    dataset = select(open_dataset(args.source, **reading(args)), **selection(args))
    splits = dataset.splits.values()
    looked = look_over(chain.from_iterable(splits), total=sum(map(len, splits)))
    dataset = replace(dataset, problems=[*dataset.problems, *looked.problems])
    summary = summarise(dataset, limits=limits)
    problems = write_problems(path.with_suffix(".problems.jsonl"), dataset.problems)
    write_page(path, summary, dataset, twins=looked.twins)
    say(f"{format_summary(summary)}\n\npage: {path}\nevery problem: {problems}")
    if args.json:
        print(json.dumps({**summary.as_dict(), "page": str(path), "problems_file": str(problems)}))


def add_convert(verbs: Any) -> None:
    """Describe `vlmdet convert`."""
    convert = add_verb(
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
    add_selection(convert)
    convert.add_argument("--max-problems", type=float, metavar="SHARE", help="share of broken rows above which to stop")
    add_json(convert)


def _convert(args: argparse.Namespace) -> None:
    from vlmdet.data.readers import open_dataset
    from vlmdet.data.select import refuse_above, select
    from vlmdet.data.writers import Training, format_report, write_dataset

    say = make_say(args)
    dataset = open_dataset(args.source, **reading(args))
    rows = sum(map(len, dataset.splits.values())) + sum(one.action == "row_dropped" for one in dataset.problems)
    share = given(args, "max_problems")
    refuse_above(dataset.problems, rows, *share.values())
    dataset = select(dataset, **selection(args))
    training = Training(**given(args, "codec", "min_pixels", "max_pixels"))
    folder = write_dataset(dataset, args.folder, to=args.to, link=args.link, training=training, **share)
    say(format_report(folder))
    if args.json:
        report = json.loads((folder / "conversion.json").read_text(encoding="utf-8"))
        print(json.dumps({"folder": str(folder), **report}))

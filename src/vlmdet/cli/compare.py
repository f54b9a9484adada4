"""The verb compare: runs and result files of other tools against each other, without torch.

When: after `vlmdet compare` is known.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vlmdet.cli.common import add_json, add_verb, make_say
from vlmdet.errors import ConfigError

_IMAGE_WAYS = ("id", "name", "stem", "number")
_CATEGORY_WAYS = ("id", "name", "from-0", "from-1")


def add_compare(verbs: Any) -> None:
    """Describe `vlmdet compare`."""
    compare = add_verb(
        verbs, "compare", _compare, "tell whether runs, or result files of other tools, differ by more than chance",
        [
            "vlmdet compare runs/demo",
            "vlmdet compare runs/demo/001 runs/demo/002 --all-pairs",
            "vlmdet compare --truth GT.json A.json B.json --json",
        ],
    )  # fmt: skip
    compare.add_argument("sources", nargs="+", metavar="RUN", help="a run, a predictions.jsonl, or a COCO result file")
    compare.add_argument("--truth", type=Path, metavar="FILE", help="COCO file with the true boxes, for result files")
    compare.add_argument("--split", help="of a run (default: test)")
    compare.add_argument(
        "--classes", action="append", metavar="NAME", help="what was asked for; a contract says it too"
    )
    compare.add_argument("--all-pairs", action="store_true", help="else every one is set against the first")
    compare.add_argument("--allow", action="append", default=[], metavar="FIELD", help="of contracts, that may differ")
    compare.add_argument(
        "--min-score", type=float, metavar="S", help="boxes below it are left out of all but COCO's figures"
    )
    compare.add_argument(
        "--allow-constant-scores", action="store_true", help="AP over 100 orders where all scores are equal"
    )
    compare.add_argument("--image-ids", choices=_IMAGE_WAYS, help="what image_id is in result files (default: decided)")
    compare.add_argument("--category-ids", choices=_CATEGORY_WAYS, help="what category_id is (default: decided)")
    compare.add_argument("--box-format", metavar="ORDER/UNIT", help="of result files (default: xywh/pixel)")
    compare.add_argument("--drop-unusable", action="store_true", help="leave out and count what cannot be read")
    compare.add_argument("--resamples", type=int, default=1000, metavar="N", help="of the bootstrap (default: 1000)")
    compare.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    add_json(compare)


def _compare(args: argparse.Namespace) -> None:
    if args.resamples < 1:
        raise ConfigError(f"--resamples {args.resamples}", "give at least 1")
    if args.seed < 0:
        raise ConfigError(f"--seed {args.seed}", "give 0 or more")

    from vlmdet.evaluation.coco import SHUFFLES, constant_scores
    from vlmdet.evaluation.comparison import compare_entries, format_document, read_entries, without_scores

    entries, labels = read_entries(
        args.sources,
        truth=args.truth,
        split=args.split,
        labels_asked=args.classes or (),
        image_ids=args.image_ids,
        category_ids=args.category_ids,
        box_format=args.box_format,
        drop_unusable=args.drop_unusable,
    )
    say = make_say(args)
    for entry in entries:
        for note in entry.notes:
            say(note)
        if args.min_score is not None and without_scores(entry.rows):
            say(f"{entry.name}: its boxes have no scores, so --min-score leaves all of them in")
        if args.allow_constant_scores and entry.coco is not None and constant_scores(entry.coco[1]):
            boxes = len(entry.coco[1])
            say(f"{entry.name}: {boxes} boxes in {SHUFFLES} orders, some seconds for every thousand boxes")
    document = compare_entries(
        entries,
        labels_asked=labels,
        allow=args.allow,
        allow_constant_scores=args.allow_constant_scores,
        min_score=args.min_score,
        all_pairs=args.all_pairs,
        resamples=args.resamples,
        seed=args.seed,
    )
    part = "every box counts" if args.min_score is None else f"boxes with a score of at least {args.min_score:g} count"
    say(f"{len(entries[0].rows)} pictures, 95 % intervals; in all but COCO's figures {part}")
    say(format_document(document))
    pairs = {(pair["a"], pair["b"]) for pair in document["pairs"]}
    if len(pairs) > 1:
        say(f"{len(pairs)} pairs: intervals are not corrected for their number, of 20 one excludes 0 by chance")
    if args.json:
        print(json.dumps(document))

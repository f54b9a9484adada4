"""What several verbs share: their flags, and how these become settings.

When: ALWAYS, with the command line; nothing heavy is imported here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from vlmdet.errors import ConfigError


def add_verb(
    verbs: Any, name: str, run: Callable[[argparse.Namespace], None], summary: str, examples: list[str]
) -> Any:
    """Describe one verb: its line of help, and examples that run."""
    parser = verbs.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n" + "\n".join(f"  {example}" for example in examples),
    )
    parser.set_defaults(run=run)
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, everything else on stderr")


def add_allow(parser: argparse.ArgumentParser) -> None:
    """Add --allow; its names are checked by `allowed_fields`."""
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="FIELD",
        help="of the run's contract, that may differ; repeat for several",
    )


def allowed_fields(args: argparse.Namespace) -> list[str]:
    """Return the fields of --allow, each once.

    Raises:
        ConfigError: one is no field of a contract.
    """
    from vlmdet.contract import check_fields

    return list(dict.fromkeys(check_fields(args.allow)))


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the dotted settings at the end of a command."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, e.g. training.epochs=5")


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Add the flags of whatever reads a data set."""
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


def make_say(args: argparse.Namespace) -> Callable[[str], None]:
    """Return the function that prints for the user: on stdout, or on stderr where stdout is for JSON."""
    stream = sys.stderr if args.json else sys.stdout

    def say(text: str) -> None:
        print(text, file=stream, flush=True)

    return say


def say_nothing(text: str) -> None:
    """Print nothing: one process of several speaks."""


def selection(args: argparse.Namespace) -> dict[str, Any]:
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


def reading(args: argparse.Namespace) -> dict[str, Any]:
    """Turn --format, --box-format and --exif into settings, which are arguments of `open_dataset` too."""
    return {key: value for key in ("format", "box_format", "exif") if (value := getattr(args, key)) is not None}


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the flags that were given; the others keep the default of what they are passed to."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def read_stages(args: argparse.Namespace, source: str, overrides: Sequence[str], **flags: Any) -> list[Any]:
    """Read the settings of each stage of the recipe that the flags name, with what other flags lay over it."""
    from vlmdet.config import find_recipe, load_stages

    data = {"source": source, **reading(args), **selection(args), **flags.pop("data", {})}
    if args.model:
        flags["model"] = {"name": args.model}
        if args.model == "tiny":  # a recipe's limits are those of large models; the embedded base brings its own
            flags["model"] |= {"min_pixels": None, "max_pixels": None}
    return load_stages(find_recipe(args.recipe), overrides, {"data": data, **flags})

"""The command line: one verb, one function; nothing heavy is imported before the verb is known.

When: `vlmdet …` and `python -m vlmdet …`. A user's mistake is one line on stderr and exit code 2; a bug is a traceback.
Each module beside this one describes a few verbs and runs them; `common.py` has what they share.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from vlmdet.cli.compare import add_compare
from vlmdet.cli.data import add_convert, add_inspect
from vlmdet.cli.doctor import add_doctor
from vlmdet.cli.evaluation import add_eval
from vlmdet.cli.other import add_demo, add_env
from vlmdet.cli.predict import add_predict
from vlmdet.cli.report import add_report
from vlmdet.cli.training import add_merge, add_plan, add_train
from vlmdet.errors import Stopped, VlmdetError

VERBS = (
    add_demo,
    add_train,
    add_plan,
    add_doctor,
    add_inspect,
    add_convert,
    add_eval,
    add_compare,
    add_predict,
    add_report,
    add_merge,
    add_env,
)
"""In the order of the help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 1 for what the doctor found, or 2 for a user's mistake."""
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
    for add in VERBS:
        add(verbs)
    return parser

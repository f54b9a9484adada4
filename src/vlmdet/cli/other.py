"""Verbs that need nothing: demo and env.

When: after `vlmdet VERB` is known; a verb imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from vlmdet.cli.common import (
    add_json,
    add_overrides,
    add_verb,
    make_say,
)


def add_demo(verbs: Any) -> None:
    """Describe `vlmdet demo`."""
    demo = add_verb(
        verbs, "demo", _demo, "the whole way once, on drawn pictures and the embedded base",
        ["vlmdet demo", "vlmdet demo --seed 1", "vlmdet demo --json"],
    )  # fmt: skip
    demo.add_argument("--seed", type=int, default=0, help="seed of the drawn pictures")
    add_overrides(demo)
    add_json(demo)


def _demo(args: argparse.Namespace) -> None:
    from vlmdet.demo import run_demo

    result = run_demo(seed=args.seed, overrides=tuple(args.overrides), say=make_say(args))
    if args.json:
        print(json.dumps(result))


def add_env(verbs: Any) -> None:
    """Describe `vlmdet env`."""
    environment = add_verb(
        verbs, "env", _env, "what to paste into an issue", ["vlmdet env", "vlmdet env --json", "vlmdet env > env.txt"]
    )
    add_json(environment)


def _env(args: argparse.Namespace) -> None:
    from vlmdet.utils.environment import describe_environment, format_environment

    found = describe_environment()
    print(json.dumps(found) if args.json else format_environment(found))

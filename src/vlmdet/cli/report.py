"""The verb report.

When: after `vlmdet report` is known; no torch.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from vlmdet.cli.common import add_json, add_verb, given, make_say
from vlmdet.errors import ConfigError


def add_report(verbs: Any) -> None:
    """Describe `vlmdet report`."""
    report = add_verb(
        verbs, "report", _report, "write what an evaluation found as one page that opens from disk",
        ["vlmdet report runs/demo", "vlmdet report runs/demo --split test", "vlmdet report runs/demo --json"],
    )  # fmt: skip
    report.add_argument("run_name", metavar="RUN", help="runs/NAME, runs/NAME/NNN, or a folder with results.json")
    report.add_argument("--split", default=None, help="show this split only")
    report.add_argument("--pictures", type=int, metavar="N", help="show at most N pictures of a split (default 1000)")
    add_json(report)


def _report(args: argparse.Namespace) -> None:
    from vlmdet.report import write_report
    from vlmdet.report.reading import find_scored

    if args.pictures is not None and args.pictures < 0:
        raise ConfigError(f"--pictures {args.pictures}", "name a number of pictures, 0 or more")
    path = write_report(find_scored(args.run_name), split=args.split, say=make_say(args), **given(args, "pictures"))
    if args.json:
        print(json.dumps({"report": str(path), "bytes": path.stat().st_size}))

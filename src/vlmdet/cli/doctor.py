"""The verb doctor.

When: after `vlmdet doctor` is known; what it needs is imported when it runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vlmdet.cli.common import add_json, add_overrides, add_selection, add_verb, reading, selection
from vlmdet.errors import ConfigError

OWN = {
    "convert": "raw row -> {'messages', 'image'}",
    "collator": "list of converted examples -> batch, or a class built from (processor, model)",
    "parse": "text -> boxes",
    "metric": "predictions, truths -> figures",
    "trainer": "() -> Trainer; runs on a tiny random model of your architecture",
}
"""Flag to what the function named by it does."""


def add_doctor(verbs: Any) -> None:
    """Describe `vlmdet doctor`."""
    doctor = add_verb(
        verbs, "doctor", _doctor, "say why a fine-tune fails, with evidence, before it costs a GPU hour",
        [
            "vlmdet doctor FOLDER --model tiny",
            "vlmdet doctor rows.jsonl --convert train.py:convert --collator train.py:Collator --html doctor.html",
            "vlmdet doctor --run runs/demo --json",
        ],
    )  # fmt: skip
    doctor.add_argument("source", metavar="SOURCE", nargs="?", help="a folder, a file, or the id of a hub data set")
    doctor.add_argument("--config", metavar="C", help="a recipe's name or file: its model, limits and prompts")
    doctor.add_argument("--model", metavar="M", help="tiny (default), a hub id, a folder or a run")
    doctor.add_argument(
        "--run", dest="run_dir", metavar="RUN", help="a finished run of any Trainer; alone, its logs are read"
    )
    for flag, what in OWN.items():
        doctor.add_argument(f"--{flag}", metavar="file.py:NAME", help=f"your own: {what}")
    doctor.add_argument("--stage", metavar="STAGE,…", help="data, conversation, template, labels, vision, model, …")
    doctor.add_argument("--only", metavar="ID,…", help="ids of the catalogue, e.g. L01,D01")
    doctor.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds for all checks (120)")
    doctor.add_argument("--html", type=Path, metavar="OUT", help="a page with pictures")
    add_selection(doctor)
    add_overrides(doctor)
    add_json(doctor)


def _doctor(args: argparse.Namespace) -> None:
    from functools import partial

    from vlmdet.config import find_recipe, load_settings
    from vlmdet.doctor import examine
    from vlmdet.doctor.ours import make_subject
    from vlmdet.doctor.show import print_report, write_report

    names = {field: getattr(args, flag) for field, flag in zip(FIELDS, OWN, strict=True) if getattr(args, flag)}
    run = _run_folder(args.run_dir)
    if args.source is not None and "=" in args.source and not Path(args.source).exists():
        args.overrides, args.source = [args.source, *args.overrides], None
    if args.source is None and run is None and not names:
        raise ConfigError(
            "nothing to examine", "name a data set, --run RUN, or your own code, e.g. --collator train.py:Collator"
        )
    base: dict[str, Any] = {"data": {"source": args.source or "none", **reading(args), **selection(args)}}
    overrides = [*args.overrides, *([f"model.name={args.model}"] if args.model else [])]
    if not args.config:
        base["model"] = {"name": args.model or "tiny"}
    settings = load_settings(find_recipe(args.config) if args.config else None, overrides, base)

    def read() -> Any:
        from vlmdet.data.readers import open_dataset
        from vlmdet.data.select import select

        return select(open_dataset(args.source, **reading(args)), **selection(args))

    build = partial(make_subject, args.source, settings=settings, names=names, run_dir=run, read=read)
    report = examine(build, stages=_listed(args.stage), only=_listed(args.only), timeout=args.timeout)
    if args.html:
        write_report(args.html, report, title=f"Doctor: {args.source or run or 'your code'}")
    if args.json:
        print(json.dumps(report.as_dict()))
    print_report(report, sys.stderr if args.json else sys.stdout)
    if args.html:
        print(f"page: {args.html}", file=sys.stderr if args.json else sys.stdout)
    if report.worst >= 3:
        sys.stdout.flush()
        sys.exit(1)


FIELDS = ("convert", "collate", "parse", "metric", "build_trainer")
"""Fields of the subject, in the order of `OWN`."""

RUN_FILES = (".json", ".jsonl", ".safetensors", ".bin", ".log", ".csv", ".yaml")
"""Endings of what runs leave behind."""


def _listed(text: str | None) -> list[str] | None:
    return [one.strip() for one in text.split(",") if one.strip()] if text else None


def _run_folder(name: str | None) -> str | None:
    if name is None:
        return None
    path = Path(name)
    if not path.is_dir():
        raise ConfigError(f"--run {name}: no such folder")
    if not any(one.suffix in RUN_FILES for one in path.rglob("*")):
        raise ConfigError(
            f"--run {name}: nothing of a run is in it",
            "a run has trainer_state.json, checkpoint-N/, predictions (*.jsonl) or saved weights",
        )
    runs = sorted(one for one in path.iterdir() if one.is_dir() and one.name.isdigit())
    return str(runs[-1] if runs and not (path / "trainer_state.json").exists() else path)

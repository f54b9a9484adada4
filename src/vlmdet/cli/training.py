"""Verbs on a run: train, plan and merge.

When: after `vlmdet VERB` is known; a verb imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from vlmdet.cli.common import (
    add_allow,
    add_json,
    add_overrides,
    add_selection,
    add_verb,
    allowed_fields,
    given,
    make_say,
    read_stages,
    say_nothing,
)
from vlmdet.errors import ConfigError


def add_train(verbs: Any) -> None:
    """Describe `vlmdet train`."""
    train = add_verb(
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
    train.add_argument("--force", action="store_true", help="train although the doctor found what is silent and fatal")
    add_selection(train)
    train.add_argument("--max-problems", type=float, metavar="SHARE", help="share of broken rows above which to stop")
    add_overrides(train)
    add_json(train)


def _train(args: argparse.Namespace) -> None:
    from vlmdet.limits import check

    name = args.name or Path(args.source).resolve().name.replace(" ", "-")
    stages = read_stages(args, args.source, args.overrides, name=name, data=given(args, "max_problems"))
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

    from vlmdet.doctor.ours import check_before
    from vlmdet.training.prepare import Prepared
    from vlmdet.training.processes import is_main, leave
    from vlmdet.training.train import train_stages

    say = make_say(args) if is_main() else say_nothing
    command = shlex.join(["vlmdet", *sys.argv[1:]])

    def examine(prepared: Prepared) -> None:
        check_before(
            prepared.dataset, prepared.settings, prepared.base.processor,
            model_type=prepared.base.model.config.model_type, folder=prepared.folder, force=args.force, say=say,
        )  # fmt: skip

    folder, prepared = train_stages(stages, command=command, new=args.new, before=examine, say=say)
    leave()
    split = settings.evaluation.split
    say(f"next:\n  vlmdet eval {folder} --base" + ("" if split in prepared.dataset.splits else " --split val"))
    say(f"  vlmdet predict PICTURE.jpg --model {folder}")
    if args.json and is_main():
        print(json.dumps({"run": str(folder)}))


def add_plan(verbs: Any) -> None:
    """Describe `vlmdet plan`."""
    plan = add_verb(
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
    add_selection(plan)
    add_overrides(plan)
    add_json(plan)


def _plan(args: argparse.Namespace) -> None:
    overrides, source = list(args.overrides), args.source
    if source and "=" in source and not Path(source).exists():  # no SOURCE, and a setting in its place
        overrides, source = [source, *overrides], None
    stages = read_stages(args, source or "", overrides)

    from vlmdet.training.plan import format_plan
    from vlmdet.training.preflight import preflight

    say = make_say(args)
    plans = {}
    for settings in stages:
        plans[settings.name] = preflight(settings, processes=args.num_processes, say=say)
        say((f"stage {settings.name}\n" if len(stages) > 1 else "") + format_plan(plans[settings.name]))
    if args.json:
        whole = [{"stage": name, **plan.as_dict()} for name, plan in plans.items()]
        print(json.dumps(plans[settings.name].as_dict() if len(stages) == 1 else {"stages": whole}))


def add_merge(verbs: Any) -> None:
    """Describe `vlmdet merge`."""
    merging = add_verb(
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
    add_allow(merging)
    add_json(merging)


def _merge(args: argparse.Namespace) -> None:
    from vlmdet.runs import need_run

    allow = allowed_fields(args)
    need_run(args.run_name)  # before ten seconds of imports

    from vlmdet.training.merge import merge_run

    say = make_say(args)
    result = merge_run(args.run_name, out=args.out, dtype=args.dtype, skip_eval=args.skip_eval, allow=allow, say=say)
    say(f"next:\n  vlmdet predict PICTURE.jpg --model {result['merged']}")
    if args.json:
        print(json.dumps(result))

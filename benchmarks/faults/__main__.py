"""Examine every fault and every healthy set-up, and print what was named, found, missed and wrongly alarmed.

python -m benchmarks.faults
python -m benchmarks.faults --only L01,T08 --half 2
python -m benchmarks.faults --stage labels --json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from benchmarks.faults.registry import STAGES, Case, read_all

MOST_FINDINGS = 5


def examine_here(case: Case) -> dict[str, Any]:
    """Build one subject and examine it; return findings as plain values."""
    from vlmdet.doctor import examine

    with tempfile.TemporaryDirectory(prefix="vlmdet-fault-") as folder:
        report = examine(case.subject(Path(folder)))
    return {
        "findings": [
            {
                "id": finding.id,
                "severity": finding.severity,
                "title": finding.title,
                "consequence": finding.consequence_of is not None,
            }
            for finding in report.findings
        ]
    }


def in_child(case: Case, pipe: Connection) -> None:
    """Run in a forked process of its own group; everything it prints is dropped."""
    os.setsid()
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text("10")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    try:
        result = examine_here(case)
    except BaseException as error:
        result = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    pipe.send(result)
    pipe.close()
    os._exit(0)


def run(cases: list[Case], *, limit: float, workers: int) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Examine cases in forked processes, `workers` at once; one over `limit` seconds is ended."""
    fork = multiprocessing.get_context("fork")
    todo, busy = list(reversed(cases)), {}
    while todo or busy:
        while todo and len(busy) < workers:
            case = todo.pop()
            ours, theirs = fork.Pipe(duplex=False)
            process = fork.Process(target=in_child, args=(case, theirs))
            process.start()
            theirs.close()
            busy[ours] = (case, process, time.monotonic())
        ready = wait(list(busy), timeout=0.5)
        for pipe in list(busy):
            case, process, begun = busy[pipe]
            spent = time.monotonic() - begun
            if pipe in ready:
                try:
                    result = pipe.recv()
                except EOFError:
                    result = {"error": "the process died"}
            elif spent > limit:
                result = {"error": f"ended after {limit:.0f} s"}
            else:
                continue
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.join()
            del busy[pipe]
            yield case, result | {"seconds": round(spent, 1)}


def verdict(case: Case, result: dict[str, Any]) -> str:
    """Say "named" (right id first or second), "detected" (right id further down) or "missed"."""
    ids = [finding["id"] for finding in result.get("findings", [])]
    right = {case.id, *case.also}
    if right & set(ids[:2]):
        return "named"
    return "detected" if right & set(ids) else "missed"


def table(results: list[tuple[Case, dict[str, Any]]]) -> str:
    """One line per stage, both halves side by side: faults, named, detected (named ones too), missed."""
    head = f"{'stage':<14}" + "".join(
        f"| {f'half {half}':<8}{'named':>6}{'detected':>10}{'missed':>8} " for half in (1, 2)
    )
    lines = [head, "-" * len(head)]
    for stage in (*STAGES, "all"):
        line = f"{stage:<14}"
        for half in (1, 2):
            said = [verdict(c, r) for c, r in results if c.half == half and stage in (c.stage, "all")]
            named, missed = said.count("named"), said.count("missed")
            line += f"| {len(said):<8}{named:>6}{len(said) - missed:>10}{missed:>8} "
        lines.append(line)
    return "\n".join(lines)


def shown(result: dict[str, Any]) -> str:
    if "error" in result:
        return str(result["error"])
    found = [f"{f['id']}({f['severity']}{'c' if f['consequence'] else ''})" for f in result["findings"]]
    return " ".join(found) or "nothing"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--only", default="", help="ids of the catalogue or names of set-ups, separated by commas")
    parser.add_argument("--half", type=int, choices=(1, 2), help="faults of this half alone, and no healthy set-ups")
    parser.add_argument("--stage", default="", help="faults of these stages, or `healthy`, separated by commas")
    parser.add_argument("--json", action="store_true", help="JSON lines; the last one holds the counts")
    parser.add_argument("--timeout", type=float, default=150.0, help="seconds for one set-up")
    parser.add_argument("--workers", type=int, default=2)
    chosen = parser.parse_args(argv)
    os.environ.update(
        HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error"
    )
    faults, well = read_all()
    only, stages = set(filter(None, chosen.only.split(","))), set(filter(None, chosen.stage.split(",")))
    cases = [
        case
        for case in [*faults, *well]
        if (not only or {case.id, case.name} & only)
        and (not stages or (case.stage or "healthy") in stages)
        and (chosen.half is None or case.half == chosen.half)
    ]
    # what every child would import, once
    import peft  # noqa: F401
    import torch
    import trl  # noqa: F401

    import vlmdet.doctor  # noqa: F401
    from benchmarks.faults.bases import folder_of

    torch.set_num_threads(1)
    for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "paligemma", "florence2", "idefics3"):
        folder_of(family)
    begun = time.monotonic()
    results = []
    for case, result in run(cases, limit=chosen.timeout, workers=chosen.workers):
        results.append((case, result))
        if chosen.json:
            kept = {"id": case.id, "name": case.name, "stage": case.stage or "healthy", "half": case.half}
            print(json.dumps(kept | ({"verdict": verdict(case, result)} if case.id else {}) | result), flush=True)
    sick = [(c, r) for c, r in results if c.id]
    sound = [(c, r) for c, r in results if not c.id]
    said = [verdict(c, r) for c, r in sick]
    alarms = [(c, r) for c, r in sound if "error" in r or any(f["severity"] >= 3 for f in r["findings"])]
    if chosen.json:
        counts = {
            "faults": len(sick),
            "named": said.count("named"),
            "detected": len(said) - said.count("missed"),
            "healthy": len(sound),
            "false_alarms": len(alarms),
        }
        print(json.dumps(counts))
        return 0
    print(table(sick))
    for case, result in sick:
        if (word := verdict(case, result)) != "named":
            right = "/".join((case.id, *case.also))
            print(f"{word}: {right} {case.stage}, half {case.half}: {case.name}: {shown(result)}")
    print(f"\nhealthy set-ups: {len(sound)}, with an alarm of severity 3 or 4: {len(alarms)}")
    for case, result in alarms:
        print(f"false alarm: {case.name}: {shown(result)}")
    own = [sum(not f["consequence"] for f in r.get("findings", [])) for _, r in sick]
    if own:
        many = [c.name for (c, _), n in zip(sick, own, strict=True) if n > MOST_FINDINGS]
        print(f"findings per fault apart from consequences: {sum(own) / len(own):.1f} on average, {max(own)} at most")
        if many:
            print(f"more than {MOST_FINDINGS}: {', '.join(many)}")
    print(f"{time.monotonic() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

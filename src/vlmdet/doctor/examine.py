"""One pass over a subject: every check runs, or is told as not run with what it needs.

When: WHEN WRONG, or before a run. Foreign code runs in a forked process with a memory limit and a time-out where that is
possible;
what is found comes back as JSON lines, so that a crash loses no more than the check that it happened in.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from vlmdet.doctor.calls import NotAvailable, UserCodeError
from vlmdet.doctor.catalogue import ENTRIES
from vlmdet.doctor.checks import STAGES, Check, all_checks, checks_of
from vlmdet.doctor.evidence import Evidence
from vlmdet.doctor.findings import Checked, Finding, NotRun, Report, finding_from_dict, rank
from vlmdet.doctor.foreign import foreign_finding
from vlmdet.doctor.subject import Subject
from vlmdet.errors import ConfigError, VlmdetError, did_you_mean

MEMORY = 6 * 2**30
"""Bytes that a forked examination may use beyond what its parent has."""

RESTARTS = 3


def examine(
    subject: Subject | Callable[[], Subject],
    *,
    stages: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    timeout: float = 120,
    isolate: bool = True,
) -> Report:
    """Examine a subject: what is wrong, what was not run and why, what was checked.

    Input: `subject`, or a function that makes one (it is called where the checks run: user code named on a command line is
    imported there); `stages` and `only` (ids) choose checks; `timeout` in seconds for all of them; `isolate=False` stays
    in this process.
    Output: a `Report`. User code that raises becomes a finding at its own line; no exception of it comes out.

    Raises:
        ConfigError: an unknown stage or id.
    """
    begun = time.monotonic()
    chosen = _choose(stages, only)
    why_not = _no_fork() if isolate else "as asked"
    if why_not:
        results = _in_process(subject, chosen, timeout)
        isolation = f"process ({why_not})"
    else:
        results = _forked(subject, chosen, timeout)
        isolation = f"fork (memory limit {MEMORY / 2**30:.0f} GiB above the parent's, {timeout:.0f} s)"
    wanted = {name.upper() for name in only} if only else None
    return _report(results, chosen, wanted, time.monotonic() - begun, isolation)


def _choose(stages: Sequence[str] | None, only: Sequence[str] | None) -> list[Check]:
    for stage in stages or ():
        if stage not in STAGES:
            raise ConfigError(f"unknown stage '{stage}'", did_you_mean(stage, STAGES))
    wanted = {one.upper() for one in only} if only else None
    for one in wanted or ():
        if one not in ENTRIES:
            raise ConfigError(f"unknown id '{one}'", did_you_mean(one, ENTRIES))
    checks = [one for stage in STAGES if not stages or stage in stages for one in checks_of(stage)]
    return [one for one in checks if wanted is None or wanted & set(one.ids)]


def _no_fork() -> str:
    """Return why this process cannot be forked; "" where it can."""
    if not hasattr(os, "fork"):
        return "this system cannot fork"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return "CUDA is in use, which a forked process cannot share"
    if torch is not None and _autograd_ran(torch):
        return "autograd has run on a device of this process, which a forked process cannot share"
    return ""


def _autograd_ran(torch: Any) -> bool:
    return bool(torch.cuda.is_available())  # its threads start with the first backward; without a device there are none


# ---- one check ------------------------------------------------------------------------------------------------------

_Result = tuple[str, dict[str, Any]]


def run_check(check: Check, evidence: Evidence) -> Iterator[_Result]:
    """Run one check and yield what it says: ("finding" | "checked" | "not_run", fields)."""
    missing = check.missing(evidence.subject.given())
    if missing:
        for one in check.ids:
            yield "not_run", asdict(NotRun(one, ENTRIES[one].title, ", ".join(m.replace("|", " or ") for m in missing)))
        return
    settled: set[str] = set()
    try:
        for said in check.run(evidence):
            settled.add(said.id)
            kind = {Finding: "finding", Checked: "checked", NotRun: "not_run"}[type(said)]
            yield kind, asdict(said)
    except NotAvailable as error:
        for one_id in set(check.ids) - settled:
            yield "not_run", asdict(NotRun(one_id, ENTRIES[one_id].title, str(error)))
        return
    except UserCodeError as error:
        if error.made:
            text = f"{error.what} that takes a row of the doctor's make ({error.text})"
            for one_id in set(check.ids) - settled:
                yield "not_run", asdict(NotRun(one_id, ENTRIES[one_id].title, text))
            return
        yield "finding", asdict(foreign_finding(error))
        for one_id in set(check.ids) - settled:
            yield "not_run", asdict(NotRun(one_id, ENTRIES[one_id].title, f"{error.what} that does not raise"))
        return
    except TimeoutError as error:
        for one_id in set(check.ids) - settled:
            yield "not_run", asdict(NotRun(one_id, ENTRIES[one_id].title, f"more time: {error}"))
        return
    except VlmdetError as error:
        for one_id in set(check.ids) - settled:
            yield "not_run", asdict(NotRun(one_id, ENTRIES[one_id].title, str(error)))
        return
    except Exception as error:  # a bug of the check must not hide what the others find
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = f"the check '{check.name}' itself failed: {type(error).__name__}: {str(error)[:200]} ({place.name}:{place.lineno})"
        for one_id in set(check.ids) - settled:
            yield "not_run", asdict(NotRun(one_id, ENTRIES[one_id].title, text))
        return
    for one_id in set(check.ids) - settled:
        yield "checked", asdict(Checked(one_id, ENTRIES[one_id].title, ""))


# ---- where they run -------------------------------------------------------------------------------------------------


def _made(subject: Subject | Callable[[], Subject]) -> Subject:
    return subject if isinstance(subject, Subject) else subject()


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread after so many seconds; elsewhere nothing is done."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(*_: Any) -> None:
        raise TimeoutError(f"over {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _run_all(
    subject: Subject | Callable[[], Subject],
    checks: Sequence[Check],
    until: float,
    tell: Callable[[str, dict[str, Any]], None],
) -> None:
    evidence = Evidence(_made(subject))
    for check in checks:
        tell("begin", {"check": check.name})
        left = until - time.monotonic()
        if left <= 0:
            for one in check.ids:
                tell("not_run", asdict(NotRun(one, ENTRIES[one].title, "more time")))
            continue
        try:
            with _alarm(left if left < 20 else max(20.0, left * 0.6)):
                for kind, fields in run_check(check, evidence):
                    tell(kind, fields)
        except TimeoutError as error:  # between two results
            for one in check.ids:
                tell("not_run", asdict(NotRun(one, ENTRIES[one].title, f"more time: {error}")))
        tell("end", {"check": check.name})


def _in_process(subject: Subject | Callable[[], Subject], checks: Sequence[Check], timeout: float) -> list[_Result]:
    results: list[_Result] = []
    with contextlib.redirect_stdout(io.StringIO()):
        _run_all(subject, checks, time.monotonic() + timeout, lambda kind, fields: results.append((kind, fields)))
    return results


def _forked(subject: Subject | Callable[[], Subject], checks: Sequence[Check], timeout: float) -> list[_Result]:
    until = time.monotonic() + timeout
    results: list[_Result] = []
    remaining = list(checks)
    begun_once = False
    for _ in range(RESTARTS + 1):
        if not remaining:
            break
        got, status = _one_fork(subject, remaining, until)
        results += got
        done = {fields["check"] for kind, fields in got if kind == "end"}
        begun_once |= any(kind == "begin" for kind, _ in got)
        begun = [fields["check"] for kind, fields in got if kind == "begin"]
        stuck = [name for name in begun if name not in done]
        told = {fields["id"] for kind, fields in got if kind in ("finding", "checked", "not_run")}
        for check in remaining:
            if check.name in stuck:
                needs = "more time" if status == "time-out" else f"a process that lives: {status}"
                results += [
                    ("not_run", asdict(NotRun(one, ENTRIES[one].title, needs))) for one in check.ids if one not in told
                ]
        if not stuck and status != "ended":
            error = next((fields for kind, fields in got if kind == "error"), None)
            if error is not None and error["hint"] is not None:
                raise ConfigError(error["message"], error["hint"])
            if error is not None:
                raise RuntimeError(error["message"])
            if not begun_once:
                raise ConfigError(
                    f"the examination did not begin: {status}",
                    "importing your code or reading the rows ends its process or takes too long; raise --timeout",
                )
            break  # no time was left to begin anew
        remaining = [check for check in remaining if check.name not in done and check.name not in stuck]
        if time.monotonic() > until:
            break
    results += [
        ("not_run", asdict(NotRun(one, ENTRIES[one].title, "more time"))) for check in remaining for one in check.ids
    ]
    return results


def _one_fork(
    subject: Subject | Callable[[], Subject], checks: Sequence[Check], until: float
) -> tuple[list[_Result], str]:
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        code = 1
        try:
            _child(subject, checks, until, writer)
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    lines = _read_until(reader, until + 5)
    os.close(reader)
    timed_out = lines is None
    if timed_out:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    got = [] if lines is None else lines
    results = [(kind, fields) for kind, fields in _LAST if timed_out] if timed_out else got
    if timed_out:
        return results, "time-out"
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return results, f"it was ended by {name}" + (" (out of memory?)" if name in ("SIGKILL", "SIGABRT") else "")
    return results, "ended" if os.WEXITSTATUS(status) == 0 else f"it ended with code {os.WEXITSTATUS(status)}"


_LAST: list[_Result] = []
"""What the last forked process said before it was ended."""


def _read_until(reader: int, until: float) -> list[_Result] | None:
    """Read JSON lines until the other end closes; None (and what came in `_LAST`) where that takes too long."""
    import select

    _LAST.clear()
    held = b""
    while True:
        left = until - time.monotonic()
        if left <= 0 or not select.select([reader], [], [], left)[0]:
            return None
        data = os.read(reader, 1 << 16)
        if not data:
            return list(_LAST)
        held += data
        *whole, held = held.split(b"\n")
        _LAST.extend((kind, fields) for kind, fields in map(json.loads, whole))


def _child(subject: Subject | Callable[[], Subject], checks: Sequence[Check], until: float, writer: int) -> None:
    """Run the checks in a forked process; nothing of it is printed, and nothing of the parent's is cleaned up."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads did not come along
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives
    _limit_memory()
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)  # OpenMP's threads did not come along either
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def tell(kind: str, fields: dict[str, Any]) -> None:
        data = json.dumps([kind, fields], default=str).encode() + b"\n"
        while data:
            data = data[os.write(writer, data) :]

    try:
        _run_all(subject, checks, until, tell)
    except VlmdetError as error:
        tell("error", {"message": error.message, "hint": error.hint})
        raise
    except Exception:  # told where somebody can read it
        tell("error", {"message": traceback.format_exc(), "hint": None})
        raise


def _limit_memory() -> None:
    try:
        import resource

        pages = int(open("/proc/self/statm").read().split()[0])  # noqa: SIM115  one line
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (ImportError, OSError, ValueError):
        return


# ---- the report -----------------------------------------------------------------------------------------------------


def _report(
    results: Iterable[_Result], checks: Sequence[Check], only: set[str] | None, seconds: float, isolation: str
) -> Report:
    found_all = [finding_from_dict(fields) for kind, fields in results if kind == "finding"]
    # a finding of user code that raised is told even where only other ids were asked for
    wanted = [one for one in found_all if only is None or one.id in only or one.cause.startswith("your ")]
    findings, further = rank(wanted)
    ids = {one.id for one in found_all}
    checked: dict[str, Checked] = {}
    for kind, fields in results:
        if kind == "checked" and fields["id"] not in ids:
            old = checked.get(fields["id"])
            figures = "; ".join(dict.fromkeys(text for text in (old.figures if old else "", fields["figures"]) if text))
            checked[fields["id"]] = Checked(fields["id"], fields["title"], figures)
    not_run: dict[str, NotRun] = {}
    for kind, fields in results:
        if kind == "not_run" and fields["id"] not in ids and fields["id"] not in checked:
            not_run.setdefault(fields["id"], NotRun(**fields))
    known = {one for check in checks for one in check.ids}
    if only is None:
        stages = {ENTRIES[one].stage for one in known}
        known |= {one for check in all_checks() for one in check.ids}  # of stages that were not asked for
        for entry in ENTRIES.values():
            if entry.id not in known and entry.stage in stages:
                not_run.setdefault(
                    entry.id, NotRun(entry.id, entry.title, entry.unchecked or "a check: this row has none yet")
                )

    def keep(one: Any) -> bool:
        return only is None or one.id in only

    order = {one: i for i, one in enumerate(ENTRIES)}
    return Report(
        findings=findings,
        not_run=tuple(sorted(filter(keep, not_run.values()), key=lambda one: order[one.id])),
        checked=tuple(sorted(filter(keep, checked.values()), key=lambda one: order[one.id])),
        seconds=seconds,
        isolation=isolation,
        further=further,
    )

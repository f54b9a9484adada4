"""Checks of a finished run: its log, and its answers against the truth.

When: WHEN WRONG; from a directory as any trainer left it. What they settle belongs to several stages of the catalogue, since a
run shows the consequence of a mistake that was made anywhere. `forensics.py` does the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmdet.doctor.calls import NotAvailable
from vlmdet.doctor.checks import Check, Outcome, check, found, looked, skipped
from vlmdet.doctor.checks.forensics import (
    Clue,
    constant_box_iou,
    curve,
    look_at_answers,
    look_at_log,
    mean_iou,
    same_answers,
)
from vlmdet.doctor.gather.answers import Answered, answers_of, role_of
from vlmdet.doctor.gather.files import read_artefact

if TYPE_CHECKING:
    from vlmdet.doctor.evidence import Evidence

_CAUSES = {
    "O10": "the weights that the loss depends on are not changed by the optimiser",
    "M01": "no parameter is trainable when training starts: a freeze policy, or a second preparation of a 4-bit model, undid it",
    "L02": "no token of any row carries loss: a mask that finds no answer, or rows cut before it",
    "O01": "the learning rate is too low for so few steps, or what trains cannot change the answer",
    "O02": "the rate is too high, or the data too few, for what trains: it learns the training rows by heart",
    "O03": "numbers overflow, mostly float16 with weights that were trained in bfloat16",
    "O08": "the loss measures the words, most of them format; the boxes are wrong all the same",
    "D01": "x and y are swapped in the training targets, or where answers are read",
    "D03": "targets or answers are in another space than the truth: pixels of another size, or a grid of another range",
    "E14": "answers are turned into pixels with another size than they were written for",
    "C08": "the model answers the same whatever it sees: targets hardly vary, or the picture does not reach it",
    "E07": "the end token was never trained, or generation does not stop at it",
}


def _tell(clue: Clue, where: str) -> Outcome:
    yield found(clue.id, where=where, evidence=clue.evidence, cause=_CAUSES[clue.id], certainty=clue.certainty)


@check("O10", "M01", "O01", "O02", "O03", "O08", "L02", needs=("run_dir",))
def training_log(evidence: Evidence) -> Outcome:
    """Read the curves of a trainer's log: frozen, flat, rising, not finite, or falling beside a figure that does not rise."""
    run = evidence.run()
    if not run.log:
        raise NotAvailable("trainer_state.json with a log_history, or a log.jsonl")
    clues = look_at_log(run.log, evidence.options.flat)
    where = f"{run.path}: log of {run.state.get('global_step', len(run.log))} steps"
    for clue in clues:
        yield from _tell(clue, where)
    _, loss = curve(run.log, "loss")
    _, evaluated = curve(run.log, "eval_loss")
    told = f"{len(loss)} training losses" + (f" from {loss[0]:.3f} to {loss[-1]:.3f}" if len(loss) else "")
    told += f", {len(evaluated)} evaluation losses" + (
        f" from {evaluated[0]:.3f} to {evaluated[-1]:.3f}" if len(evaluated) else ""
    )
    for identifier in {"O10", "M01", "O01", "O02", "O03", "L02"} - {clue.id for clue in clues}:
        yield looked(identifier, told)
    if "O08" not in {clue.id for clue in clues}:
        task = [
            key for row in run.log for key in row if "iou" in key.lower() or "f1" in key.lower() or "map" in key.lower()
        ]
        yield looked("O08", told) if task else skipped("O08", "a figure of the task itself, such as IoU, in the log")


@check("O05", "O06", "O11", needs=("run_dir",))
def steps_as_planned(evidence: Evidence) -> Outcome:
    """Compare the steps of a run with those that its settings plan, and the steps at which it saved and evaluated."""
    run = evidence.run()
    state, options = run.state, evidence.options
    if not state:
        raise NotAvailable("trainer_state.json")
    saved, scored = state.get("save_steps"), state.get("eval_steps")
    best = state.get("best_model_checkpoint")
    wrong = isinstance(saved, int) and isinstance(scored, int) and saved > 1 and scored >= 1 and saved % scored
    if wrong:
        yield found(
            "O05", where=f"{run.path}/trainer_state.json", evidence=f"saved every {saved} steps, evaluated every {scored}"
            + (f"; best_model_checkpoint is {best}" if best else ""),
            cause="a checkpoint is saved at steps at which nothing was evaluated, so the best one may never have been saved",
        )  # fmt: skip
    else:
        yield looked("O05", f"saved every {saved} steps, evaluated every {scored}")
    rates = curve(run.log, "learning_rate")
    planned = state.get("max_steps") or state.get("global_step") or 0
    if len(rates[1]) >= 4 and planned:
        peak = float(rates[0][int(rates[1].argmax())])
        if peak > 0.25 * planned and rates[1][0] < rates[1].max() * 0.9:
            yield found(
                "O06", where=f"{run.path}/trainer_state.json",
                cause="the warm-up is long for so few steps, or was reckoned for more",
                evidence=f"the learning rate rises until step {peak:.0f} of {planned}",
            )  # fmt: skip
        else:
            yield looked("O06", f"the learning rate is highest at step {peak:.0f} of {planned}")
    rows, batch = options.number("num_samples"), options.number("per_device_train_batch_size")
    if rows and batch and planned:
        world = options.number("world_size", 1) or 1
        accumulated = options.number("gradient_accumulation_steps", 1) or 1
        wanted = np.ceil(rows / (batch * accumulated * world)) * (options.number("num_train_epochs", 3) or 3)
        if options.number("max_steps") is None and abs(planned - wanted) > max(0.1 * wanted, 2):
            yield found(
                "O11", where=f"{run.path}/trainer_state.json",
                evidence=f"{planned} steps were made, {wanted:.0f} follow from the settings",
                cause="the batch was shared among another number of devices, or accumulated otherwise, than was believed",
            )  # fmt: skip
        else:
            yield looked("O11", f"{planned} steps, {wanted:.0f} planned")


@check("D01", "D03", "C08", "E14", "E07", needs=("run_dir",))
def answers_against_truth(evidence: Evidence) -> Outcome:
    """Fit predicted boxes on true ones along each axis; count repeats and answers that end at the limit."""
    sets = _answers(evidence)
    limit = evidence.options.number("max_new_tokens")
    seen: set[str] = set()
    for name, answers in sets.items():
        if role_of(name) == "base":
            continue
        for clue in look_at_answers(answers, limit=int(limit) if limit else None):
            if clue.id not in seen:
                seen.add(clue.id)
                yield from _tell(clue, f"{evidence.run().path}: {name} ({len(answers)} answers)")
    told = "; ".join(
        f"{name}: {len(answers)} answers, mean best IoU {mean_iou(answers):.3f}" for name, answers in sets.items()
    )
    for identifier in {"D01", "D03", "C08", "E14", "E07"} - seen:
        yield looked(identifier, told)


@check("E16", "E08", "E11", needs=("run_dir",))
def base_against_tuned(evidence: Evidence) -> Outcome:
    """Compare the answers of two sets: equal ones were made by one model; a base that sees nothing was asked wrongly."""
    sets = _answers(evidence)
    run = evidence.run()
    base = next((name for name in sets if role_of(name) == "base"), None)
    # a base that was asked in its own words too is another question on purpose; where one says that it is tuned, it is that
    tuned = [name for name in sets if role_of(name) == "tuned"]
    others = tuned or [name for name in sets if name != base and "native" not in name]
    pairs = [(base, name) for name in others] if base else list(combinations(sets, 2))
    if not pairs:
        raise NotAvailable("answers of two models on the same pictures")
    for one, other in pairs:
        same, n = same_answers(sets[one], sets[other])
        if n >= 8 and same > 0.95:
            yield found(
                "E16", where=f"{run.path}: {one} and {other}",
                evidence=f"{same:.0%} of {n} answers are the same, letter by letter",
                cause="both were made by one model: the adapter is missing, switched off, or another path was loaded",
            )  # fmt: skip
        elif n >= 8:
            yield looked("E16", f"{one} and {other}: {same:.0%} of {n} answers are the same")
        else:
            yield skipped("E16", f"eight pictures that {one} and {other} have in common; there are {n}")
    yield from _manifests(run.path, [name for pair in pairs for name in pair])
    if base is not None and others:
        yield from _no_information(sets, base, others[0], str(run.path))
    one, other = pairs[0]
    yield from _interval(sets[one], sets[other], f"{run.path}: {one} and {other}")


_OF_THE_MODEL = ("model", "adapter", "checkpoint", "weights", "name", "path", "fingerprint", "date", "time", "seconds", "figures",
                 "score", "iou", "f1", "precision", "recall", "map", "ap50", "run", "hash", "loss", "acc")  # fmt: skip


def _manifests(path: Path, names: Sequence[str]) -> Outcome:
    """Compare what lies beside each set of answers of how they were made: every field but those of weights and results."""
    held = {name: _manifest((path / name).parent) for name in dict.fromkeys(names)}
    known = {name: fields for name, fields in held.items() if fields}
    if len(known) < 2:
        return
    (one, first), (other, second) = list(known.items())[:2]
    shared = [key for key in first if key in second and not any(word in key.lower() for word in _OF_THE_MODEL)]
    differ = [f"{key}: {one} {first[key]!r}, {other} {second[key]!r}" for key in shared if first[key] != second[key]]
    if differ:
        yield found(
            "E08", where=f"{path}: {one} and {other}", evidence="\n".join(differ[:8]),
            cause="the two were evaluated under different conditions, so their difference is not that of the models",
        )  # fmt: skip
    elif shared:
        yield looked("E08", f"{one} and {other}: equal in {', '.join(shared[:8])}")


def _manifest(folder: Path) -> dict[str, Any]:
    """Return the plain fields of the small JSON files of a folder, `meta` and `config` within them opened."""
    fields: dict[str, Any] = {}
    for file in sorted(folder.glob("*.json"))[:10]:
        content = read_artefact(file.stem, file).configs.get(file.name)
        for part in (
            content,
            *(content.get(key) for key in ("meta", "config", "settings", "args") if isinstance(content, dict)),
        ):
            if isinstance(part, dict):
                fields |= {key: one for key, one in part.items() if isinstance(one, (str, int, float, bool))}
    return fields


def _no_information(sets: dict[str, list[Answered]], base: str, tuned: str, path: str) -> Outcome:
    """Suspect a base whose boxes are no better than one box for all pictures, beside a tuned model that is far above it."""
    low, high, level = mean_iou(sets[base]), mean_iou(sets[tuned]), constant_box_iou(sets[base])
    told = f"mean best IoU: {base} {low:.3f}, {tuned} {high:.3f}; the same box for every picture would have {level:.3f}"
    if np.isfinite([low, high, level]).all() and low < level * 0.8 and high > level + 0.1:
        yield found(
            "E08", where=f"{path}: {base} and {tuned}", evidence=told, certainty=0.45, severity=2,
            cause="the base may have been asked at other pixels, with another prompt, or read by another parser",
        )  # fmt: skip
    else:
        yield looked("E08", told)


def _interval(one: list[Answered], other: list[Answered], where: str) -> Outcome:
    """Bootstrap the difference over pictures; few pictures cannot tell two models apart."""
    by_id = {answer.id: answer for answer in other}
    pairs = [(mean_iou([a]), mean_iou([by_id[a.id]])) for a in one if a.id in by_id and len(a.truth)]
    if len(pairs) < 2:
        return
    change = np.asarray([b - a for a, b in pairs])
    drawn = change[np.random.default_rng(0).integers(0, len(change), (1000, len(change)))].mean(axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    told = f"{len(change)} pictures, mean best IoU {change.mean():+.3f} ({low:+.3f} to {high:+.3f})"
    if low <= 0 <= high and len(change) < 200:
        yield found(
            "E11", where=where, evidence=told, certainty=0.9 if abs(change.mean()) > 0.005 else 0.5,
            cause="so few pictures cannot tell these two apart; a ranking by them is chance",
        )  # fmt: skip
    else:
        yield looked("E11", told)


def _answers(evidence: Evidence) -> dict[str, list[Answered]]:
    sets = {name: answers_of(rows) for name, rows in evidence.run().predictions.items()}
    sets = {name: answers for name, answers in sets.items() if any(len(one.truth) or one.text for one in answers)}
    if not sets:
        raise NotAvailable("a file of predictions with their truth (jsonl)")
    return sets


CHECKS: tuple[Check, ...] = (training_log, steps_as_planned, answers_against_truth, base_against_tuned)

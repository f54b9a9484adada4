"""Check of training in stages: does a later one start where the earlier ended?

When: as part of `checks.optimisation`; reads files and settings, no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmdet.doctor.calls import NotAvailable
from vlmdet.doctor.checks import Check, Outcome, check, found, looked
from vlmdet.doctor.checks.saved_adapters import CONFIG, READ

if TYPE_CHECKING:
    from vlmdet.doctor.evidence import Evidence
    from vlmdet.doctor.gather.files import Artefact

_STAGE = re.compile(r"(?:stage|phase|step|round|s)[ _-]?(\d+)", re.IGNORECASE)


@check("O09", needs=("artefacts|settings",))
def stages_follow(evidence: Evidence) -> Outcome:
    """Compare where each stage of several started with where the one before it ended."""
    stages = _stages(evidence) or []
    if len(stages) < 2:
        stages = _previous(evidence)
    if len(stages) < 2:
        raise NotAvailable("artefacts or settings of two stages (stage1, stage2; or previous_stage and adapter)")
    told: list[str] = []
    for (before, first), (after, second) in pairwise(stages):
        wrong = _breaks(first, second)
        if wrong:
            yield found(
                "O09",
                where=f"{before} and {after}",
                evidence=wrong,
                cause="the later stage starts from the raw base, and what the earlier learnt is lost",
            )
            return
        told.append(f"{after} starts where {before} ended")
    yield looked("O09", "; ".join(told))


def _stages(evidence: Evidence) -> list[tuple[str, dict[str, Any]]]:
    """Return stages in order: what their files and settings say, flat, with the artefact under `artefact`."""
    stages: dict[int, tuple[str, dict[str, Any]]] = {}
    if evidence.subject.artefacts is not None:
        for name, one in evidence.artefacts().items():
            match = _STAGE.search(name)
            if match and one.exists:
                number = int(match.group(1))
                _, values = stages.setdefault(number, (name, {}))
                for file, config in one.configs.items():
                    if isinstance(config, dict) and file not in (
                        "tokenizer_config.json",
                        "config.json",
                        "generation_config.json",
                    ):
                        values |= config
                if CONFIG in one.configs or one.tensors:
                    values["artefact"] = one
                values.setdefault("paths", []).append(str(one.path))
    listed = evidence.options.get("stages")
    entries = list(enumerate(listed)) if isinstance(listed, (list, tuple)) else []
    entries += [
        (int(match.group(1)), value)
        for key, value in evidence.options.flat.items()
        if isinstance(value, Mapping) and (match := _STAGE.fullmatch(key))
    ]
    for number, value in entries:
        if isinstance(value, Mapping):
            stages.setdefault(number, (f"stage {number}", {}))[1].update(value)
    return [stages[number] for number in sorted(stages)]


_EARLIER = (
    "previous_stage",
    "previous",
    "prior_stage",
    "earlier_stage",
    "parent",
    "parent_run",
    "stage_before",
    "continued_from",
)
_CONTINUES = ("init_from", "continue_from", "start_from", "resume_from_stage", "previous_stage", "parent")


def _previous(evidence: Evidence) -> list[tuple[str, dict[str, Any]]]:
    """Return the stage that a run says it continues, and what its adapter started from; [] where neither is told."""
    held = evidence.artefacts() if evidence.subject.artefacts is not None else {}
    paths = [str(held[name].path) for name in _EARLIER if name in held and held[name].exists]
    for key in _CONTINUES:
        if isinstance(value := evidence.options.flat.get(key), (str, Path)):
            paths.append(str(value))
    later = next((one for name, one in held.items() if name not in _EARLIER and CONFIG in one.configs), None)
    if not paths or later is None:
        return []
    base = later.configs[CONFIG].get("base_model_name_or_path")
    return [("the stage before", {"paths": paths, "base": base}), (later.name, {"base": base})]


_START = ("start_fingerprint", "base_fingerprint", "parent_fingerprint", "init_fingerprint", "start_hash", "base_hash")
_END = (
    "end_fingerprint",
    "final_fingerprint",
    "fingerprint",
    "weights_fingerprint",
    "output_fingerprint",
    "end_hash",
    "final_hash",
)
_FROM = (
    "base_model_name_or_path",
    "model_name_or_path",
    "model_name",
    "base_model",
    "model",
    "base",
    "start",
    "init_from",
    "model_path",
)
_TO = ("output_dir", "output", "merged", "merged_dir", "save_dir", "saved_to")
_ON = (
    "resume_from",
    "resume_from_checkpoint",
    "adapter",
    "adapter_path",
    "adapter_name_or_path",
    "init_adapter",
    "init_from",
    "start",
    "lora_path",
)


def _breaks(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Return how a stage does not start at the end of the one before; "" where it does, or nothing tells."""
    ended, started = _value(first, _END), _value(second, _START)
    if ended and started:
        return "" if ended == started else f"the earlier stage ended at {ended}, the later started at {started}"
    saved = [str(one) for one in (_value(first, _TO), *first.get("paths", ())) if one]
    origins = [
        str(second[name])
        for name in dict.fromkeys((*_FROM, *_ON))
        if isinstance(second.get(name), (str, Path)) and str(second[name])
    ]
    if any(
        origin == one or origin.startswith(f"{one}/") or Path(origin).name == Path(one).name
        for origin in origins
        for one in saved
    ):
        return ""
    similar = _likeness(first.get("artefact"), second.get("artefact"))
    if similar is not None and similar > 0.5:
        return ""
    base_before, base_after = _value(first, _FROM), _value(second, _FROM)
    if base_before and base_before == base_after:
        more = f"; their LoRA A are unlike (cosine {similar:.2f})" if similar is not None else ""
        return f"both stages start from {base_before}{more}"
    return ""


def _value(values: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((values[name] for name in names if values.get(name)), None)


def _likeness(one: Artefact | None, other: Artefact | None) -> float | None:
    """Return the cosine of the LoRA A of two adapters: near 1 where one was trained on from the other, near 0 where both
    began afresh."""
    if one is None or other is None:
        return None
    shared = [
        key
        for key in one.tensors
        if "lora_A" in key and key in other.tensors and one.tensors[key].shape == other.tensors[key].shape
    ]
    if not shared:
        return None
    pairs = [
        (one.tensors[key].read().ravel().astype(np.float64), other.tensors[key].read().ravel().astype(np.float64))
        for key in shared[:READ]
    ]
    a, b = (np.concatenate(values) for values in zip(*pairs, strict=True))
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / length if length else None


CHECKS: tuple[Check, ...] = (stages_follow,)

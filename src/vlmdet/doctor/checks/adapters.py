"""Checks of what an adapter sits on and what a freeze policy leaves: target patterns, policy patterns, areas.

When: as part of `checks.model`. Names are matched against the modules of the built trainer's model, else of a small
model of the same architecture, whose names are those of the real one.

Long, because four rows of the catalogue are told apart by what one set of patterns matches.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vlmdet.doctor.calls import NotAvailable
from vlmdet.doctor.checks import Outcome, check, found, looked, skipped
from vlmdet.doctor.checks.built import (
    carries_adapter,
    kind_of_module,
    model_of,
    modules_of,
    targets_of,
    trainer_of,
    uses_adapter,
    wishes,
)
from vlmdet.doctor.checks.targets import (
    AREAS,
    Matched,
    area_of,
    dead_alternatives,
    deeper,
    matches,
    near,
    plain_name,
    table,
    told,
)

if TYPE_CHECKING:
    from vlmdet.doctor.evidence import Evidence

ADAPTED = ("Linear", "Embedding", "Conv1D", "Linear4bit", "Linear8bitLt", "Params4bit", "MultiheadAttention")
"""Kinds of modules that are meant where a pattern of LoRA matches them."""

VISION_WORDS = re.compile(
    r"vis|vit|qkv|merger|projector|patch|connector|(^|\.)fc[12]|linear_fc|tower|blocks", re.IGNORECASE
)


def _shown(every: Sequence[Matched], most: int = 12) -> str:
    lines = [one.line for one in every[:most]]
    return "\n".join(lines + ([f"and {len(every) - most} more"] if len(every) > most else []))


@check("M04", "M05", "M14", needs=("target_modules|settings|build_trainer|model",))
def target_patterns(evidence: Evidence) -> Outcome:
    """Match each target against the model's modules: what matches nothing, what matches other modules than linear ones of
    the areas meant."""
    targets, where = targets_of(evidence)
    if not targets:
        raise NotAvailable("target_modules, or a trainer whose model carries an adapter")
    modules = modules_of(evidence)
    if targets == "all-linear":
        yield from _areas_meant(
            evidence, {area_of(name) for name, one in modules.items() if kind_of_module(one) in ADAPTED}, where
        )
        for identifier in ("M04", "M05", "M14"):
            yield looked(identifier, "all-linear: every linear layer but the head")
        return
    names = [name for name in modules if "." in name or name == "lm_head"]
    every = matches(targets, names)
    if not all(one.names for one in every):  # a pattern may name blocks that the small model has not
        deep = deeper(names)
        every = [
            one if one.names else replace(again, names=tuple(dict.fromkeys(deep[name] for name in again.names)))
            for one, again in zip(every, matches(targets, list(deep)), strict=True)
        ]
    dead = [one for one in every if not one.names]
    told_dead = list(_nothing_matched(evidence, targets, every, dead, names, where))
    yield from told_dead
    odd = list(_not_meant(evidence, every, modules, where))
    yield from odd
    areas = {area for one in every for area in one.counts}
    wished = [] if told_dead else list(_areas_meant(evidence, areas, where))
    yield from wished
    if not told_dead and not any(one.id == "M04" for one in wished):
        yield looked("M04", _shown(every, 6).replace("\n", "; "))
    if not odd:
        yield looked(
            "M05", f"{sum(len(one.names) for one in every)} modules matched, all linear and in the areas meant"
        )
    if carries_adapter(model_of(evidence)):
        areas |= {area for area, (some, _) in _trained(evidence).items() if some}
    kinds = _merger_layers(modules)
    if {"vision", "language"} <= areas and "merger" not in areas and not dead and kinds:
        yield found(
            "M14",
            where=where,
            evidence=f"{_shown(every)}\nlayers of the merger, none of them adapted: {', '.join(kinds[:4])}",
            cause="vision and language are adapted, and the projector between them is in no pattern and "
            "stays as it was",
        )
        return
    if not dead:
        yield looked("M14", f"areas adapted: {', '.join(area for area in AREAS if area in areas) or 'none'}")


def _merger_layers(modules: dict[str, Any]) -> list[str]:
    """Return the kinds of layers that an adapter may sit on in the projector."""
    names = [name for name, one in modules.items() if area_of(name) == "merger" and kind_of_module(one) in ADAPTED]
    return sorted({re.sub(r"\.\d+(?=\.|$)", ".N", name) for name in names})


def _trained(evidence: Evidence) -> dict[str, tuple[int, int]]:
    model = model_of(evidence)
    if model is None:
        return {}
    return table((name, one.numel(), one.requires_grad) for name, one in model.named_parameters())


def _nothing_matched(
    evidence: Evidence, targets: Any, every: list[Matched], dead: list[Matched], names: list[str], where: str
) -> Outcome:
    """Tell of entries that match no module, and of alternatives of one expression that add none."""
    alternatives = dead_alternatives(targets, list(deeper(names))) if isinstance(targets, str) and not dead else []
    if not dead and not alternatives:
        return
    shown = [one.entry for one in dead] or alternatives
    areas = {area for one in every for area in one.counts}
    hints = near(" ".join(shown), names)
    like = f"\nmodules of the model that are named like it: {', '.join(hints)}" if hints else ""
    expressions = [one for one in dead if one.listed and one.expression]
    patterns = ", ".join(map(repr, shown[:4]))
    if expressions:
        one = expressions[0]
        would = [name for name in names if _searches(one.entry, name)]
        cause = (
            f"PEFT compares each entry of a list with the end of a name, letter by letter; {one.entry!r} "
            "is an expression and equals none"
        )
        if would:
            like = f"\nas one expression it would match {len(would)} modules, such as {would[0]}"
        severity = 4
    elif all(one.listed for one in dead) and dead:
        cause = f"no module of this model ends in {patterns}; nothing is said as long as another entry matches"
        missed = any(VISION_WORDS.search(one) for one in shown) and not areas & {"vision", "merger"}
        severity = 4 if not areas or missed or any("." in one for one in shown) else 2
    else:
        cause = f"{patterns} fits no whole name of a module of this model"
        severity = 4
    yield found(
        "M04",
        where=where,
        evidence=f"{_shown(every)}{_alternatives(alternatives)}{like}",
        cause=cause,
        severity=severity,
    )


def _alternatives(alternatives: list[str]) -> str:
    return "".join(f"\nalternative {one!r}: no module" for one in alternatives[:4])


def _searches(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error:
        return False


def _not_meant(evidence: Evidence, every: list[Matched], modules: dict[str, Any], where: str) -> Outcome:
    """Tell of matched modules that are no linear layers, or lie in an area that the other entries or the settings leave out."""
    odd: dict[str, list[str]] = {}
    for one in every:
        for name in one.names:
            kind = kind_of_module(modules[name])
            explicit = kind == "Embedding" or (
                kind.startswith("Conv") and one.entry.rstrip("$").endswith("patch_embed.proj")
            )
            if kind not in ADAPTED and not explicit and not _is_linear(modules[name]):
                odd.setdefault(kind, []).append(f"{name} ({one.entry!r})")
    if odd:
        listed = "\n".join(f"{kind}: {len(names)}, such as {names[0]}" for kind, names in sorted(odd.items()))
        yield found(
            "M05",
            where=where,
            evidence=f"{_shown(every)}\nmatched modules that are no linear layers:\n{listed}",
            cause="the pattern is too broad: it fits convolutions, containers or activations beside the linear layers",
        )
        return
    frozen = {area: option for area, train, option in wishes(evidence) if not train}
    hit = Counter(area for one in every for area in one.counts if area in frozen)
    if hit:
        area = hit.most_common(1)[0][0]
        names = [name for one in every for name in one.names if area_of(name) == area]
        yield found(
            "M05",
            where=where,
            evidence=f"{_shown(every)}\n{frozen[area]}, and {len(names)} modules of the area {area} are "
            f"matched, such as {names[0]}",
            cause=f"a short ending fits layers of the {area} too, which was to stay frozen",
        )
        return
    beside = [one for one in every if one.listed and "." not in one.entry and {"language", "vision"} <= set(one.counts)]
    attention = [
        one
        for one in every
        if "vision" in one.counts
        and any(re.search(r"attn|attention", name) for name in one.names if area_of(name) == "vision")
    ]
    wanted = any(train and area == "vision" for area, train, _ in wishes(evidence))
    if beside and not attention and not wanted:
        names = [name for one in beside for name in one.names if area_of(name) == "vision"]
        yield found(
            "M05",
            where=where,
            severity=2,
            certainty=0.8,
            evidence=f"{_shown(every)}\nalso in the vision tower, though not its attention: {', '.join(names[:3])}",
            cause="these endings are those of the language model's MLP, and the vision blocks of this family "
            "have layers of the same name",
        )


def _is_linear(module: Any) -> bool:
    from torch import nn

    return isinstance(getattr(module, "base_layer", module), (nn.Linear, nn.Embedding))


def _areas_meant(evidence: Evidence, areas: set[str], where: str) -> Outcome:
    """Tell where the settings ask for an area that no pattern matches."""
    saved = evidence.options.get("modules_to_save") or ()
    for area, train, option in wishes(evidence):
        if (
            train
            and area not in areas
            and not any(area_of(str(one)) == area for one in ([saved] if isinstance(saved, str) else saved))
        ):
            identifier = "M14" if area == "merger" else "M04"
            yield found(
                identifier,
                where=where,
                evidence=f"{option}; areas with matched modules: {', '.join(sorted(areas)) or 'none'}",
                cause=f"no target lies in the area {area}, so the option has no effect",
                certainty=0.9,
            )
            return


# ---- freeze policies --------------------------------------------------------------------------------------------------


@check("M06", needs=("settings|build_trainer",))
def freeze_policy(evidence: Evidence) -> Outcome:
    """Match each pattern of a freeze policy against the parameters, and compare what trains with what the settings say."""
    patterns = _policy(evidence)
    wished = list(wishes(evidence))
    if not patterns and not wished and trainer_of(evidence) is None:
        raise NotAvailable("patterns of a freeze policy in the settings, or a trainer")
    model = model_of(evidence)
    live = model is not None
    if model is None and (patterns or wished):
        model = evidence.tiny().model
    named = (
        {plain_name(name): one for name, one in model.named_parameters() if "lora_" not in name}
        if model is not None
        else {}
    )
    names = list(named)
    deep = deeper(names)
    lines, dead = [], []
    for option, pattern, freezes in patterns:
        prefix = "prefix" in option or pattern.endswith(".") or pattern.startswith("model.")
        strict = [name for name in names if name.startswith(pattern)] or [
            deep[name] for name in deep if name.startswith(pattern)
        ][:1]
        loose = [name for name in names if _fits(pattern, name)] or [
            deep[name] for name in deep if _fits(pattern, name)
        ][:1]
        lines.append(
            f"{option} {pattern!r}: {len(strict or loose)} of {len(names)} parameters"
            + (f" begin with it, {len(loose)} hold it" if prefix and not strict else "")
        )
        if live and freezes and not loose and not _trained(evidence).get(area_of(pattern), (1, 1))[0]:
            continue  # a name of the area in the user's own words, and the area is frozen
        if (
            not loose
            or ("prefix" in option and not strict)
            or (live and freezes and not carries_adapter(model) and all(named[name].requires_grad for name in loose))
        ):
            dead.append((option, pattern, 1.0))
        elif prefix and not strict and not live:
            dead.append((option, pattern, 0.5))
    shown = "\n".join(lines)
    if dead:
        option, pattern, certainty = max(dead, key=lambda one: one[2])
        like = near(pattern, names)
        yield found(
            "M06",
            where=f"settings: {option}",
            certainty=certainty,
            severity=3 if certainty == 1 else 2,
            evidence=shown + (f"\nparameters that are named like it: {', '.join(like)}" if like else ""),
            cause=f"no parameter's name fits {pattern!r} as the policy reads it: names changed with a release "
            "of the library or the family",
        )
        return
    if live and trainer_of(evidence) is not None:
        trained = _trained(evidence)
        for area, train, option in wished:
            some, total = trained.get(area, (0, 0))
            if (
                not train
                and some
                and not any(
                    "lora_" in n and area_of(plain_name(n)) == area
                    for n, p in model.named_parameters()
                    if p.requires_grad
                )
            ):
                yield found(
                    "M06",
                    where="build_trainer",
                    evidence=f"{option}, and after the trainer is built: {told(trained)}",
                    cause=f"the code that freezes the area {area} finds no parameter of it by the name that "
                    "it looks for",
                )
                return
            if train and total and not some and uses_adapter(evidence) is False:
                yield found(
                    "M06",
                    where="build_trainer",
                    evidence=f"{option}, and after the trainer is built: {told(trained)}",
                    cause=f"the code that lets the area {area} train finds no parameter of it by the name "
                    "that it looks for",
                )
                return
        if not carries_adapter(model) and all(one.requires_grad for one in model.parameters()):
            from vlmdet.doctor.live.renamed import frozen_under_other_names

            meant = frozen_under_other_names(evidence)
            if meant is not None:
                areas = sorted({area_of(plain_name(name)) for name in meant[1]})
                yield found(
                    "M06",
                    where="build_trainer",
                    evidence=f"after the trainer is built everything trains: {told(trained)}\nwith names "
                    f"{meant[0]} the same code freezes "
                    f"{len(meant[1])} of {len(names)} parameters, in {', '.join(areas)}; today they are "
                    f"called {', '.join(meant[1][:2])}",
                    cause="the code that freezes looks for names that this model's parameters no longer have, "
                    "and finds none",
                )
                return
        shown = "; ".join(one for one in (shown, told(trained)) if one)
    if shown or wished:
        yield looked("M06", shown.replace("\n", "; ") or "; ".join(option for _, _, option in wished))
    else:
        yield skipped("M06", "patterns of a freeze policy in the settings")


@check("M14", needs=("build_trainer",))
def frozen_projector(evidence: Evidence) -> Outcome:
    """See whether the projector trains where whole weights of vision and language do."""
    model = evidence.trainer().model
    trained = _trained(evidence)
    if carries_adapter(model) or not all(trained.get(area, (0, 0))[0] for area in ("vision", "language")):
        raise NotAvailable("whole weights of vision and language that train")
    some, total = trained.get("merger", (0, 0))
    if total and not some:
        yield found(
            "M14",
            where="build_trainer",
            evidence=f"after the trainer is built: {told(trained)}",
            cause="vision and language train, and the projector between them is frozen",
        )
    else:
        yield looked("M14", told(trained))


def _policy(evidence: Evidence) -> list[tuple[str, str, bool]]:
    """Return (option, pattern, whether it freezes) of every pattern in the settings."""
    patterns: list[tuple[str, str, bool]] = []
    for name, freezes in (("freeze", True), ("trainable", False)):
        value = evidence.options.get(name)
        shown = evidence.options.shown(name).split("=")[0]
        if isinstance(value, dict):
            patterns += [(shown, str(one), bool(on) == freezes) for one, on in value.items()]
        elif isinstance(value, str):
            patterns += [
                (shown, one.strip(), freezes)
                for one in (value.split(",") if "(" not in value else [value])
                if one.strip()
            ]
        elif isinstance(value, (list, tuple, set, frozenset)):
            patterns += [(shown, str(one), freezes) for one in value]
    areas = {*AREAS, "llm", "vit", "all", "none", "full", "base"}
    return [one for one in patterns if one[1].lower() not in areas and "lora" not in one[1].lower()]


def _fits(pattern: str, name: str) -> bool:
    """Tell whether a name fits a pattern in any way in which policies read them: as a part, an expression, or with wildcards."""
    return pattern in name or _searches(pattern, name) or _globs(pattern, name)


def _globs(pattern: str, name: str) -> bool:
    from fnmatch import fnmatchcase

    return fnmatchcase(name, pattern)

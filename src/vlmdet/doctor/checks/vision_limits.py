"""Limits of picture sizes: what settings, processor and environment say, whether they are obeyed and saved, and their cost.

When: by `checks/vision.py`, for V02, V04 and V12. A large drawn picture goes through the user's own collator and processor.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmdet.doctor.calls import NotAvailable, UserCodeError
from vlmdet.doctor.checks import Outcome, found, looked, skipped
from vlmdet.doctor.checks.picture_paths import (
    Grid,
    Size,
    area,
    collate_drawn,
    far,
    merge_of,
    one_picture,
    patch_of,
    plain_picture,
    processor_grid,
    shown,
    size_keywords,
)
from vlmdet.doctor.evidence import once, processor_limits
from vlmdet.errors import VlmdetError
from vlmdet.grounding.sizes import qwen_size

if TYPE_CHECKING:
    from vlmdet.doctor.evidence import Evidence

PHASES = ("eval", "callback", "base", "serve")

OTHERS = (
    "image_size",
    "resolution",
    "max_side",
    "max_image_size",
    "longest_edge",
    "max_patches",
    "max_dynamic_patch",
    "max_num",
)
"""Options of sizes beside `min_pixels` and `max_pixels`."""


@dataclass(frozen=True)
class Told:
    """A limit that somebody was told: `name` of the option as the user wrote it, its value, and the path it is for."""

    path: str
    option: str
    value: float
    text: str


def told_limits(evidence: Evidence) -> list[Told]:
    """Return min_pixels, max_pixels and other sizes of the settings, by path; those without one are for training."""
    options = evidence.options
    out: list[Told] = []
    for option in ("min_pixels", "max_pixels", *OTHERS):
        for phase in ("train", *PHASES):
            value = options.number(option, phase=phase)
            if value:
                out.append(Told(phase, option, value, options.shown(option, phase=phase)))
        if not any(one.path == "train" and one.option == option for one in out):
            value = options.number(option)
            if value:
                out.append(Told("train", option, value, options.shown(option)))
    for key, value in options.flat.items():
        if not isinstance(value, Mapping) or not ("processor" in key or key.endswith("size")):
            continue
        phase = next((one for one in PHASES if key.startswith(one)), "serve" if "mm_processor" in key else "train")
        for name, number in _limits_in(value):
            if not any(one.path == phase and one.option == name for one in out):
                out.append(Told(phase, name, number, f"{options.names.get(key, key)}: {name}={number:.0f}"))
    return out


def _limits_in(value: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    inner = value.get("size") if isinstance(value.get("size"), Mapping) else {}
    for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        number = value.get(name) or value.get(edge) or (inner or {}).get(edge) or (inner or {}).get(name)
        if isinstance(number, (int, float)) and number > 2000:
            yield name, float(number)


def own_limit(evidence: Evidence, option: str) -> float | None:
    """Return the limit that the processor carries; an attribute comes before its `size`, as transformers 5 reads it."""
    images = getattr(evidence.subject.processor, "image_processor", None)
    value = vars(images).get(option) if hasattr(images, "__dict__") else None
    if isinstance(value, (int, float)) and value > 0:
        return float(value)
    low, high = processor_limits(evidence.subject.processor)
    return {"min_pixels": low, "max_pixels": high}.get(option)


def training_limit(evidence: Evidence, option: str) -> tuple[float, str] | None:
    """Return the limit of training and where it is told: in the settings, else by the processor."""
    told = next((one for one in told_limits(evidence) if one.path == "train" and one.option == option), None)
    if told is not None:
        return told.value, told.text
    own = own_limit(evidence, option)
    return None if own is None else (own, f"{option} of the processor={own:.0f}")


def differ(first: float, second: float) -> bool:
    """Tell whether two limits differ by more than one in a hundred."""
    return abs(first - second) > 0.01 * max(first, second)


def claimed(evidence: Evidence) -> tuple[float, str] | None:
    """Return the max_pixels that the user set for training: in settings, or as an attribute of the picture processor."""
    told = next((one for one in told_limits(evidence) if one.path == "train" and one.option == "max_pixels"), None)
    if told is not None:
        return told.value, told.text
    images = getattr(evidence.subject.processor, "image_processor", None)
    value = vars(images).get("max_pixels") if hasattr(images, "__dict__") else None
    if isinstance(value, (int, float)) and value > 0:
        return float(value), f"image_processor.max_pixels={value}"
    return None


@dataclass(frozen=True)
class Probe:
    """A large drawn picture through the collator and through the processor alone; a grid is None where that path is not there."""

    size: Size
    collated: Grid | None
    alone: Grid | None
    keywords: dict[str, Any]
    asked: dict[str, Any]


@once
def probe(evidence: Evidence) -> Probe:
    """Send a picture over every limit that is told through the collator and the processor.

    Raises:
        NotAvailable: neither can be had.
    """
    limits = [one.value for one in told_limits(evidence) if one.option == "max_pixels"]
    limits += [one for one in (own_limit(evidence, "max_pixels"), (claimed(evidence) or (0, ""))[0]) if one]
    wanted = 2.25 * max((one for one in limits if one <= 5_400_000), default=1_000_000)
    height = int((min(max(wanted, 300_000), 12_000_000) / (4 / 3)) ** 0.5)
    size = (height * 4 // 3, height)
    picture = plain_picture(*size, (60, 140, 200))
    collated: Grid | None = None
    keywords: dict[str, Any] = {}
    asked: dict[str, Any] = {}
    try:
        chosen = one_picture(evidence.examples())[:1]
        if chosen:
            batch, seen = collate_drawn(evidence, chosen, [picture], "a large drawn picture")
            collated = batch.grids[0] if batch.grids and len(batch.grids) == 1 else None
            keywords = size_keywords(seen.keywords[-1]) if seen.keywords else {}
            asked = size_keywords(seen.asked[-1]) if seen.asked else {}
    except (NotAvailable, UserCodeError):
        pass  # no collator, or one that cuts or refuses so long a row: other checks tell of that
    alone = processor_grid(evidence.subject.processor, picture) if evidence.subject.processor is not None else None
    if collated is None and alone is None:
        raise NotAvailable("a processor with image_grid_thw")
    return Probe(size, collated, alone, keywords, asked)


def limit_obeyed(evidence: Evidence) -> Outcome:
    """V02: a picture over max_pixels comes out within it."""
    told = claimed(evidence) or _asked(evidence)
    if told is None:
        yield skipped("V02", "settings['max_pixels'], or a collator that sets it")
        return
    patch = patch_of(evidence.subject.processor)
    if patch is None:
        raise NotAvailable("a processor with patches")
    limit, text = told
    seen = probe(evidence)
    grid = seen.collated or seen.alone
    assert grid is not None
    path = "your collator" if seen.collated else "the processor"
    pixels = area(grid, patch)
    lines = (
        f"{text}; a drawn picture of {seen.size[0]} x {seen.size[1]} through {path}: grid "
        f"{shown(grid, patch)} = {pixels:,} pixels"
    )
    own = processor_limits(evidence.subject.processor)[1]
    more = f"; size['longest_edge'] of its picture processor is {own:,.0f}" if own else ""
    tokens = pixels // (patch * merge_of(evidence.subject.processor)) ** 2
    if pixels > 1.1 * limit:
        yield found(
            "V02",
            where=text,
            evidence=f"{lines}, {tokens:,} image tokens{more}",
            cause=(
                "the option does not reach the resize: the picture processor goes by its `size`, or by its own default"
            ),
            certainty=1.0 if seen.collated else 0.7,
        )
    elif pixels < 0.5 * min(limit, seen.size[0] * seen.size[1]):
        yield found(
            "V02",
            where=text,
            evidence=f"{lines}, {tokens:,} image tokens{more}",
            cause="the option does not reach the resize: pictures become far smaller than it allows",
            severity=2,
            certainty=0.6,
        )
    else:
        yield looked("V02", lines)


def _asked(evidence: Evidence) -> tuple[float, str] | None:
    """Return the max_pixels that the collator asks the processor for."""
    try:
        asked = probe(evidence).asked
    except (NotAvailable, UserCodeError):
        return None
    for name, value in _limits_in(asked):
        if name == "max_pixels":
            return value, f"max_pixels={value:.0f} in your collator's call of the processor"
    return None


def outside_limits(evidence: Evidence) -> Iterator[tuple[str, float]]:
    """Yield limits that are set beside the processor: by environment variables and by variables of modules."""
    environment: dict[str, Any] = dict(os.environ)
    for key, value in evidence.options.flat.items():
        if key in ("env", "environment", "env_vars", "environ") and isinstance(value, Mapping):
            environment |= {str(name): one for name, one in value.items()}
        shown_name = evidence.options.names.get(key, key)
        if shown_name in ("MAX_PIXELS", "IMAGE_MAX_PIXELS"):
            environment[shown_name] = value
    for name in ("MAX_PIXELS", "IMAGE_MAX_PIXELS"):
        if (number := _number(environment.get(name))) is not None:
            yield f"environment variable {name}={environment[name]}", number
    factor = evidence.factor()
    if (number := _number(environment.get("IMAGE_MAX_TOKEN_NUM"))) is not None:
        yield f"environment variable IMAGE_MAX_TOKEN_NUM={environment['IMAGE_MAX_TOKEN_NUM']}", number * factor**2
    for name, module in list(sys.modules.items()):
        if name.rpartition(".")[2] != "vision_process" or module is None:
            continue
        for variable, unit, usual in (("MAX_PIXELS", 1, 16384 * 28 * 28), ("IMAGE_MAX_TOKEN_NUM", factor**2, 16384)):
            number = _number(vars(module).get(variable))
            if number is not None and number != usual:
                yield f"{name}.{variable}={number:.0f}", number * unit
    large: Probe | None = None
    with contextlib.suppress(NotAvailable, UserCodeError):
        large = probe(evidence)
    if large is None or large.collated is None or large.alone is None or not far(large.collated, large.alone):
        return  # a constant of the user's module counts only where training shows other sizes than the processor makes
    for function in (evidence.subject.collate, evidence.subject.convert):
        target = getattr(function, "func", function)
        name = getattr(target, "__module__", None) or type(target).__module__
        names = getattr(target, "__globals__", None) or vars(sys.modules.get(name, object))
        if (number := _number(names.get("MAX_PIXELS"))) is not None:
            yield f"{name}.MAX_PIXELS={number:.0f}", number
            return


def _number(value: Any) -> float | None:
    try:
        number = float(str(value).replace("_", "")) if value is not None else 0.0
    except ValueError:
        return None
    return number if number > 0 else None


def limit_saved(evidence: Evidence) -> Outcome:
    """V12: a limit set by environment or module variable is also in the processor that is saved."""
    with contextlib.suppress(NotAvailable, UserCodeError):
        evidence.batches()  # a collator may set the variable when it is made or called
    outside = list(outside_limits(evidence))
    own = own_limit(evidence, "max_pixels")
    saved: dict[str, float] = {} if own is None else {"your processor, as it is saved": own}
    bare: list[str] = []
    try:
        for name, artefact in evidence.artefacts().items():
            high = artefact.pixels()[1]
            if high:
                saved[f"{name} ({artefact.path})"] = float(high)
            elif not name.startswith("base") and any(
                file.startswith("preprocessor_config") for file in artefact.configs
            ):
                bare.append(f"{name} ({artefact.path})")
    except NotAvailable:
        pass
    for text, number in outside:
        wrong = {name: high for name, high in saved.items() if differ(high, number)}
        if wrong:
            lines = "; ".join(f"{name}: max_pixels {high:,.0f}" for name, high in wrong.items())
            yield found(
                "V12",
                where=text.partition("=")[0],
                evidence=f"{text}, and {lines}" + _measured(evidence),
                cause=(
                    "the limit lives in this process only: whoever loads the saved processor gets other picture sizes"
                ),
            )
            return
    told = training_limit(evidence, "max_pixels")
    if bare and told is not None:
        yield found(
            "V12",
            where=bare[0],
            evidence=(
                f"{told[1]} in training; {bare[0]} holds a preprocessor_config.json without size, "
                "min_pixels and max_pixels"
            ),
            cause="the limit was never written into the processor's configuration",
            certainty=0.7,
        )
        return
    yield looked("V12", "; ".join(text for text, _ in outside) or "no limit in environment or module variables")


def _measured(evidence: Evidence) -> str:
    patch = patch_of(evidence.subject.processor)
    try:
        seen = probe(evidence)
    except (NotAvailable, UserCodeError):
        return ""
    pairs = (("your collator", seen.collated), ("the processor alone", seen.alone))
    lines = [f"{name}: grid {shown(grid, patch)}" for name, grid in pairs if grid is not None]
    return f"\na drawn picture of {seen.size[0]} x {seen.size[1]} through " + "; through ".join(lines)


MANY = 2000


def tokens_per_picture(evidence: Evidence) -> Outcome:
    """V04: pictures are worth no more than some 2,000 tokens."""
    processor = evidence.subject.processor
    if processor is not None and patch_of(processor) is None:
        raise NotAvailable("a processor with patches")
    if processor is None and "qwen" not in evidence.family() and claimed(evidence) is None:
        raise NotAvailable("a processor, or settings['max_pixels']")
    sizes = [one.size for one in evidence.annotations() if one.size and min(one.size) > 0]
    if not sizes:
        raise NotAvailable("pictures whose size is known")
    factor = evidence.factor()
    low, high = evidence.limits()
    effective, source = high, f"max_pixels {high:,}"
    patch = patch_of(processor)
    if processor is not None and patch is not None:
        try:
            large = probe(evidence)
            grid = large.collated or large.alone
            if grid is not None:
                pixels = area(grid, patch)
                whole = large.size[0] * large.size[1]
                if pixels < 0.8 * whole:
                    effective, source = pixels, f"pictures become at most some {pixels:,} pixels"
                elif pixels > 1.1 * high:
                    effective, source = 16384 * factor**2, f"max_pixels {high:,} is not obeyed"
        except (NotAvailable, UserCodeError):
            pass
    tokens = []
    for size in sizes:
        try:
            width, height = qwen_size(*size, min_pixels=min(low, effective), max_pixels=effective, factor=factor)
        except VlmdetError:
            continue
        tokens.append(width * height // factor**2)
    if not tokens:
        raise NotAvailable("pictures that can be resized")
    middle, most = np.percentile(tokens, (50, 99))
    told = (
        f"{len(tokens)} pictures: {middle:,.0f} image tokens at the median, {most:,.0f} at the 99th "
        f"percentile ({source})"
    )
    if most > MANY:
        yield found(
            "V04",
            where=(claimed(evidence) or (0, "max_pixels of the processor"))[1],
            evidence=told + f"; largest picture {max(sizes, key=lambda size: size[0] * size[1])}",
            cause="the limit of pixels lets a picture cost more tokens than a detection task needs",
            certainty=1.0 if middle > MANY else 0.8,
        )
    else:
        yield looked("V04", told)

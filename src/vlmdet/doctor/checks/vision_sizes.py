"""Sizes of pictures through every path, training to server, and which limits are obeyed (V01 to V04, V12).

When: by `checks/vision.py`. Grids are measured through the user's own collator and processor; settings are compared with them.
Long, because these five failure modes look alike and are told apart by the same measurements.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmdet.doctor.calls import NotAvailable, UserCodeError, place_of
from vlmdet.doctor.checks import Outcome, found, looked, skipped
from vlmdet.doctor.checks.picture_paths import (
    Grid,
    Seen,
    Size,
    collate_drawn,
    converted_size,
    merge_of,
    one_picture,
    original_size,
    part_options,
    patch_of,
    plain_picture,
    processor_grid,
    watched,
)
from vlmdet.doctor.evidence import once, processor_limits
from vlmdet.doctor.gather.conversations import Example
from vlmdet.errors import VlmdetError
from vlmdet.grounding.sizes import qwen_size

if TYPE_CHECKING:
    from vlmdet.doctor.evidence import Evidence

ROWS = 6
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
class Passed:
    """One picture through the user's collator: sizes as (width, height).

    Attributes:
        example: its row; original: of the picture in the data; entered: as the picture processor got it, None where unknown.
        grid: (frames, rows, columns) in the batch; planned: what the processor alone makes of the original under the same call;
            alone: what it makes without the collator's arguments.
    """

    example: Example
    original: Size
    entered: Size | None
    keywords: dict[str, Any]
    grid: Grid
    planned: Grid | None
    alone: Grid | None


def shown(grid: Grid | None, patch: int | None) -> str:
    """Return `(1, 46, 34): 476 x 644 pixels`."""
    if grid is None:
        return "none"
    return f"{tuple(grid)}" + (f", {grid[2] * patch} x {grid[1] * patch} pixels" if patch else "")


def area(grid: Grid, patch: int) -> int:
    """Return the pixels of a grid."""
    return grid[1] * grid[2] * patch * patch


_SIZE_WORDS = ("min_pixels", "max_pixels", "size", "do_resize")


def _size_keywords(keywords: Mapping[str, Any]) -> dict[str, Any]:
    return {name: keywords[name] for name in _SIZE_WORDS if keywords.get(name) is not None}


@once
def passed(evidence: Evidence) -> list[Passed]:
    """Send some of the user's rows through his collator: those with the smallest and the largest pictures.

    Raises:
        NotAvailable: no collator, no processor, no grids, or no row with one picture.
        UserCodeError: the collator raised on every one.
    """
    processor = evidence.need("processor")
    sized = [(size, one) for one in one_picture(evidence.examples()) if (size := original_size(evidence, one))]
    if not sized:
        raise NotAvailable("rows with one picture")
    sized.sort(key=lambda pair: pair[0][0] * pair[0][1])
    chosen = [sized[int(i)] for i in np.unique(np.linspace(0, len(sized) - 1, ROWS).astype(int))]
    out: list[Passed] = []
    error: UserCodeError | None = None
    for size, one in chosen:
        try:
            with watched() as seen:
                batch = evidence.collate([one.raw], "one row", [one.where], [one.answers])
        except UserCodeError as raised:
            error = raised
            continue
        if batch.grids is None:
            raise NotAvailable("image_grid_thw in the batch: a family whose pictures have grids")
        if len(batch.grids) == 1:
            out.append(_passed(processor, one, size, seen, batch.grids[0]))
    if not out and error is not None:
        raise error
    if not out:
        raise NotAvailable("batches with one grid for each picture")
    return out


def _passed(processor: Any, example: Example, size: Size, seen: Seen, grid: Grid) -> Passed:
    entered = seen.sizes[-1] if seen.sizes else None
    keywords = _size_keywords(seen.keywords[-1]) if seen.keywords else {}
    planned = alone = None
    if keywords.get("do_resize", True) is not False and max(size) * 200 > 0:
        try:
            picture = plain_picture(*size, (90, 120, 150))
            alone = processor_grid(processor, picture)
            planned = processor_grid(processor, picture, **keywords) if keywords else alone
        except UserCodeError:
            planned = alone = None
    return Passed(example, size, entered, keywords, grid, planned, alone)


# ---- limits that are told -------------------------------------------------------------------------------------------


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


# ---- V02: is the limit obeyed? --------------------------------------------------------------------------------------


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
            keywords = _size_keywords(seen.keywords[-1]) if seen.keywords else {}
            asked = _size_keywords(seen.asked[-1]) if seen.asked else {}
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
    lines = f"{text}; a drawn picture of {seen.size[0]} x {seen.size[1]} through {path}: grid "
    f"{shown(grid, patch)} = {pixels:,} pixels"
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


# ---- V12: limits of the environment ---------------------------------------------------------------------------------


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
    if large is None or large.collated is None or large.alone is None or not _far(large.collated, large.alone):
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


# ---- V03: resized twice ---------------------------------------------------------------------------------------------


def resized_once(evidence: Evidence) -> Outcome:
    """V03: no picture is resized before the processor resizes it again."""
    patch = patch_of(evidence.subject.processor)
    rows = passed(evidence)
    if patch is None:
        raise NotAvailable("a processor with patches")
    bad = []
    for one in rows:
        entered = one.entered or converted_size(one.example)
        if entered is None or one.planned is None or one.grid == one.planned or set(entered) == set(one.original):
            continue
        final = (one.grid[2] * patch, one.grid[1] * patch)
        if final != entered:
            bad.append((one, entered, final, one.planned))
    if not bad:
        yield looked("V03", f"{len(rows)} pictures: resized by the processor alone, or to the size it would choose")
        return

    def loss(grid: Grid, planned: Grid) -> float:
        return float(abs(np.log(grid[1] * grid[2] / (planned[1] * planned[2]))))

    one, entered, final, planned = max(bad, key=lambda row: loss(row[0].grid, row[3]))
    before = converted_size(one.example)
    who = "your converter" if before is not None and set(before) != set(one.original) else "your collator"
    yield found(
        "V03",
        where=(
            f"{place_of(evidence.subject.convert if who == 'your converter' else evidence.subject.collate)}, "
            f"{one.example.where}"
        ),
        evidence=f"{one.original[0]} x {one.original[1]} in the data -> {entered[0]} x {entered[1]} by {who} -> "
        f"{final[0]} x {final[1]} by the "
        f"processor; resized once it is {planned[2] * patch} x {planned[1] * patch}. So on {len(bad)} of "
        f"{len(rows)} rows",
        cause=f"{who} resizes a picture that the processor resizes again, under other limits or rounding",
        severity=3 if _absolute(evidence) or loss(one.grid, planned) > 0.29 else 2,
        certainty=0.9,
    )


def _absolute(evidence: Evidence) -> bool:
    try:
        space = evidence.space()
    except (NotAvailable, UserCodeError):
        return False
    return space is not None and space.unit in ("pixel", "resized")


# ---- V01: the same picture through each path ------------------------------------------------------------------------


def same_everywhere(evidence: Evidence) -> Outcome:
    """V01: one picture has one grid through training, evaluation, server and saved processor."""
    findings = [*_told_differ(evidence), *_artefacts_differ(evidence)]
    figures: list[str] = []
    try:
        rows = passed(evidence)
        figures.append(f"{len(rows)} pictures through collator and processor")
        findings += _collator_differs(evidence, rows)
        findings += _render_differs(evidence, rows)
    except (NotAvailable, UserCodeError) as error:
        if not told_limits(evidence) and evidence.subject.artefacts is None:
            raise NotAvailable(str(error)) from None
    if findings:
        worst = max(findings, key=lambda one: one[0])
        more = [text for _, _, text, _ in findings if text != worst[2]]
        outside = any(True for _ in outside_limits(evidence))
        yield found(
            "V01",
            where=worst[1],
            evidence="\n".join([worst[2], *more[:3]]),
            cause=worst[3],
            certainty=worst[0],
            consequence_of="V12"
            if outside and own_limit(evidence, "max_pixels") and worst[1].startswith("your collator")
            else None,
        )
        return
    limits = [one.text for one in told_limits(evidence)]
    yield looked("V01", "; ".join(figures + limits[:6]))


_Difference = tuple[float, str, str, str]
"""Certainty, where, evidence, cause."""


def _told_differ(evidence: Evidence) -> Iterator[_Difference]:
    told = told_limits(evidence)
    for option in ("max_pixels", "min_pixels", *OTHERS):
        train = training_limit(evidence, option)
        others = [one for one in told if one.option == option and one.path != "train"]
        if train is None:  # not said for training: the other paths are compared with one another
            if len(others) < 2:
                continue
            train = (others[0].value, others[0].text)
        wrong = [one for one in others if differ(one.value, train[0])]
        if wrong:
            one = wrong[0]
            effect, certain = _both_grids(evidence, option, train[0], one.value)
            paths = ", ".join(each.text for each in wrong)
            yield (
                certain,
                f"{train[1]} and {one.text}",
                f"training: {train[1]}; {one.path}: {paths}{effect}",
                f"{option} of {', '.join(each.path for each in wrong)} is not that of training: the model sees "
                "objects at another size",
            )


def _both_grids(evidence: Evidence, option: str, train: float, other: float) -> tuple[str, float]:
    if option not in ("min_pixels", "max_pixels"):
        return "", 0.9
    low, high = evidence.limits()
    sizes: list[Size] = []
    with contextlib.suppress(NotAvailable, UserCodeError):
        sizes = [one.size for one in evidence.annotations() if one.size]
    sizes.sort(key=lambda size: size[0] * size[1])
    sample = [("your", size) for size in ([sizes[0], sizes[-1]] if sizes else [])] + [("a", (4000, 3000))]
    factor = evidence.factor()
    for whose, size in sample:
        grids = []
        for value in (train, other):
            limits = {"min_pixels": low, "max_pixels": max(high, low), option: int(value)}
            limits["max_pixels"] = max(limits["max_pixels"], limits["min_pixels"])
            try:
                grids.append(qwen_size(*size, factor=factor, **limits))
            except VlmdetError:
                break
        if len(grids) == 2 and grids[0] != grids[1]:
            (aw, ah), (bw, bh) = grids
            tokens = [w * h // factor**2 for w, h in grids]
            text = f"\n{whose} picture of {size[0]} x {size[1]}: {aw} x {ah} ({tokens[0]} tokens) and {bw} x "
            f"{bh} ({tokens[1]} tokens)"
            return text, 1.0 if whose == "your" else 0.8
    return "", 0.5


def _artefacts_differ(evidence: Evidence) -> Iterator[_Difference]:
    try:
        artefacts = evidence.artefacts()
    except NotAvailable:
        return
    for place, option in ((1, "max_pixels"), (0, "min_pixels")):
        train = training_limit(evidence, option)
        if train is None:
            continue
        for name, artefact in artefacts.items():
            saved = artefact.pixels()[place]
            if (
                name.startswith("base")
                or not isinstance(saved, (int, float))
                or saved < 2000
                or not differ(saved, train[0])
            ):
                continue
            effect, certain = _both_grids(evidence, option, train[0], float(saved))
            yield (
                min(certain, 0.9),
                f"{name}: {artefact.path}",
                f"training: {train[1]}; saved in {name}: {option}={saved:,.0f}{effect}",
                "the saved processor has other limits than training: whoever loads it shows the model other sizes",
            )
            break


def _collator_differs(evidence: Evidence, rows: list[Passed]) -> Iterator[_Difference]:
    patch = patch_of(evidence.subject.processor)
    bad = [
        one for one in rows if one.alone is not None and one.grid != one.alone and sorted(one.grid) != sorted(one.alone)
    ]
    large: Probe | None = None
    with contextlib.suppress(NotAvailable, UserCodeError):
        large = probe(evidence)
    if bad:
        one = max(bad, key=lambda row: abs(np.log((row.grid[1] * row.grid[2]) / (row.alone[1] * row.alone[2]))))  # type: ignore[index]
        assert one.alone is not None
        ratio = one.grid[1] * one.grid[2] / (one.alone[1] * one.alone[2])
        arguments = f"; it was called with {one.keywords}" if one.keywords else ""
        certain = 0.9 if not 0.8 < ratio < 1.25 else 0.5
        evidence_text = (
            f"{one.example.where}, {one.original[0]} x {one.original[1]}: your collator makes grid "
            f"{shown(one.grid, patch)}, your processor "
            f"by itself {shown(one.alone, patch)}{arguments}; so on {len(bad)} of {len(rows)} rows"
        )
        if certain < 0.6:
            return  # rounding of one cell: told as V03 where it is resized twice
    elif large is not None and large.collated and large.alone and _far(large.collated, large.alone):
        arguments = f"; it was called with {large.keywords}" if large.keywords else ""
        certain = 0.8
        evidence_text = (
            f"a drawn picture of {large.size[0]} x {large.size[1]}: your collator makes grid "
            f"{shown(large.collated, patch)}, your processor by "
            f"itself {shown(large.alone, patch)}{arguments}; your own pictures are too small to differ"
        )
    else:
        return
    yield (
        certain,
        f"your collator, {place_of(evidence.subject.collate)}",
        evidence_text,
        "training shows pictures at other sizes than the processor that evaluation and server load",
    )


def _far(first: Grid, second: Grid) -> bool:
    return not 0.8 < first[1] * first[2] / (second[1] * second[2]) < 1.25


def _render_differs(evidence: Evidence, rows: list[Passed]) -> Iterator[_Difference]:
    """Compare with the pictures of the messages of inference, where they hold pictures or say sizes."""
    try:
        asked = {one.index: one for one in evidence.asked()}
    except (NotAvailable, UserCodeError):
        return
    patch = patch_of(evidence.subject.processor)
    bad = []
    for one in rows:
        question = asked.get(one.example.index)
        if question is None or not question.messages:
            continue
        grid = _inference_grid(evidence, question.messages, question.raw, one)
        if grid is not None and _far(grid, one.grid):
            bad.append((one, grid, part_options(question.messages)))
    if bad:
        one, grid, options = bad[-1]
        told = f"; its messages say {options[0]}" if options and options[0] else ""
        yield (
            0.95,
            f"your render, {place_of(evidence.subject.render)}",
            f"{one.example.where}, {one.original[0]} x {one.original[1]}: in training grid "
            f"{shown(one.grid, patch)}, at inference "
            f"{shown(grid, patch)}{told}; so on {len(bad)} of {len(rows)} rows",
            "pictures are resized to other sizes at inference than in training",
        )


def _inference_grid(evidence: Evidence, messages: list[dict[str, Any]], raw: Any, one: Passed) -> Grid | None:
    from vlmdet.doctor.gather.annotations import open_stored
    from vlmdet.doctor.gather.conversations import pictures_of
    from vlmdet.images import BROKEN

    options = part_options(messages)
    if len(options) != 1:
        return None
    size = one.original
    pictures = pictures_of(raw) or pictures_of(messages)
    if pictures:
        try:
            size = open_stored(pictures[0]).size
        except (*BROKEN, AttributeError, TypeError, KeyError):
            return None
        if set(size) == set(one.original):
            size = one.original  # turned by EXIF or not: other checks look at that
    elif not options[0]:
        return None
    if options[0]:
        factor = evidence.factor()
        try:
            if "resized_height" in options[0] and "resized_width" in options[0]:
                size = (options[0]["resized_width"], options[0]["resized_height"])
            limits = {"min_pixels": 4 * factor**2, "max_pixels": 16384 * factor**2}
            limits |= {name: value for name, value in options[0].items() if name in limits}
            size = qwen_size(*size, factor=factor, **limits)
        except VlmdetError:
            return None
    try:
        return processor_grid(evidence.subject.processor, plain_picture(*size, (90, 120, 150)))
    except UserCodeError:
        return None


# ---- V04: tokens for each picture -----------------------------------------------------------------------------------

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
    told = f"{len(tokens)} pictures: {middle:,.0f} image tokens at the median, {most:,.0f} at the 99th "
    f"percentile ({source})"
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

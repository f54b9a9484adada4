"""Sizes of pictures through every path, from training to the server (V01), and how often they are resized (V03).

When: by `checks/vision.py`. Grids are measured through the user's own collator and processor; settings are compared with them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmdet.doctor.calls import NotAvailable, UserCodeError, place_of
from vlmdet.doctor.checks import Outcome, found, looked
from vlmdet.doctor.checks.picture_paths import (
    Grid,
    Seen,
    Size,
    converted_size,
    far,
    one_picture,
    original_size,
    part_options,
    patch_of,
    plain_picture,
    processor_grid,
    shown,
    size_keywords,
    watched,
)
from vlmdet.doctor.checks.vision_limits import (
    OTHERS,
    Probe,
    differ,
    outside_limits,
    own_limit,
    probe,
    told_limits,
    training_limit,
)
from vlmdet.doctor.evidence import once
from vlmdet.doctor.gather.conversations import Example
from vlmdet.errors import VlmdetError
from vlmdet.grounding.sizes import qwen_size

if TYPE_CHECKING:
    from vlmdet.doctor.evidence import Evidence


ROWS = 6


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
    keywords = size_keywords(seen.keywords[-1]) if seen.keywords else {}
    planned = alone = None
    if keywords.get("do_resize", True) is not False and max(size) * 200 > 0:
        try:
            picture = plain_picture(*size, (90, 120, 150))
            alone = processor_grid(processor, picture)
            planned = processor_grid(processor, picture, **keywords) if keywords else alone
        except UserCodeError:
            planned = alone = None
    return Passed(example, size, entered, keywords, grid, planned, alone)


def resized_once(evidence: Evidence) -> Outcome:
    """V03: no picture is resized before the processor resizes it again."""
    patch = patch_of(evidence.subject.processor)
    rows = passed(evidence)
    if patch is None:
        raise NotAvailable("a processor with patches")
    bad = []
    for one in rows:
        entered = one.entered or converted_size(one.example)
        if entered is None or one.planned is None or set(entered) == set(one.original):
            continue
        final = (one.grid[2] * patch, one.grid[1] * patch)
        raw, between, after = (float(np.prod(size)) for size in (one.original, entered, final))
        there_and_back = between < 0.9 * raw and after > 1.2 * between  # shrunk, then enlarged: the detail is gone
        if final != entered and (one.grid != one.planned or there_and_back):
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
        severity=3 if _absolute(evidence) or loss(one.grid, planned) > 0.29 or final[0] > entered[0] * 1.1 else 2,
        certainty=0.9,
    )


def _absolute(evidence: Evidence) -> bool:
    try:
        space = evidence.space()
    except (NotAvailable, UserCodeError):
        return False
    return space is not None and space.unit in ("pixel", "resized")


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
            text = (
                f"\n{whose} picture of {size[0]} x {size[1]}: {aw} x {ah} ({tokens[0]} tokens) and {bw} x "
                f"{bh} ({tokens[1]} tokens)"
            )
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
    elif large is not None and large.collated and large.alone and far(large.collated, large.alone):
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
        if grid is not None and far(grid, one.grid):
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

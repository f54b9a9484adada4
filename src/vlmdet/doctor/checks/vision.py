"""Checks of the stage vision: sizes, numbers and colours of pictures as the user's collator hands them to the model.

When: after the labels. Sizes are looked at in `vision_sizes` and `vision_limits`, positions and generation in `positions`;
here pictures are exchanged and coloured, and the batch must follow. Long, because it also lists every check of the stage.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmdet.doctor.calls import NotAvailable, UserCodeError, place_of
from vlmdet.doctor.checks import Check, Outcome, check, found, looked, positions, vision_limits, vision_sizes
from vlmdet.doctor.checks.picture_paths import channels, collate_drawn, merge_of, one_picture, pixel_rows, plain_picture
from vlmdet.doctor.gather.batches import IGNORED, Batch

if TYPE_CHECKING:
    from vlmdet.doctor.evidence import Evidence


@check("V02")
def limit_obeyed(evidence: Evidence) -> Outcome:
    """Send a drawn picture over max_pixels through the user's path."""
    yield from vision_limits.limit_obeyed(evidence)


@check("V12")
def limit_saved(evidence: Evidence) -> Outcome:
    """Look for limits in the environment and in modules that the processor does not carry."""
    yield from vision_limits.limit_saved(evidence)


@check("V03", needs=("rows|splits", "processor", "collate"))
def resized_once(evidence: Evidence) -> Outcome:
    """Compare sizes in the data, at the processor's entrance and in the batch."""
    yield from vision_sizes.resized_once(evidence)


@check("V01")
def same_everywhere(evidence: Evidence) -> Outcome:
    """Compare grids and limits of every path."""
    yield from vision_sizes.same_everywhere(evidence)


@check("V04", needs=("rows|splits",))
def tokens_per_picture(evidence: Evidence) -> Outcome:
    """Count image tokens of every picture under the limits that hold."""
    yield from vision_limits.tokens_per_picture(evidence)


# ---- V05: tokens and patches ----------------------------------------------------------------------------------------


@check("V05", needs=("rows|splits", "processor", "collate"))
def tokens_match_patches(evidence: Evidence) -> Outcome:
    """Count image tokens of each row against the patches of its pictures."""
    token = evidence.image_token_id()
    if token is None:
        raise NotAvailable("the id of the image token")
    merge = merge_of(evidence.subject.processor)
    looked_at, wrong = 0, []
    for batch in evidence.batches().values():
        if batch.grids is None or sum(batch.pictures) != len(batch.grids) or len(batch.pictures) != len(batch.ids):
            continue
        start = 0
        for i, count in enumerate(batch.pictures):
            grids = batch.grids[start : start + count]
            start += count
            wanted = sum(int(np.prod(one)) for one in grids) // merge**2
            have = sum(one == token for one in batch.ids[i])
            looked_at += 1
            if have != wanted:
                wrong.append((batch.where[i], batch.name, have, wanted, grids, len(batch.ids[i])))
        patches = sum(int(np.prod(one)) for one in batch.grids)
        if batch.pixels is not None and batch.pixels.ndim == 2 and len(batch.pixels) != patches:
            wrong.append(
                (", ".join(batch.where), batch.name, len(batch.pixels), patches, batch.grids, len(batch.ids[0]))
            )
    if not looked_at:
        raise NotAvailable("batches with image_grid_thw for each picture")
    if wrong:
        where, name, have, wanted, grids, length = max(wrong, key=lambda one: abs(one[2] - one[3]))
        yield found(
            "V05",
            where=f"{where} in batch '{name}'",
            evidence=f"{have} image tokens (or patches) where image_grid_thw {[tuple(one) for one in grids]} "
            f"with merge size {merge} makes {wanted}; "
            f"the row is {length} tokens long; so in {len(wrong)} of {looked_at} rows",
            cause="the row was cut, or the placeholders were not expanded to this picture's grid",
        )
    else:
        yield looked("V05", f"{looked_at} rows: image tokens equal the grid over {merge}²")


# ---- V06: does each row get its own picture? ------------------------------------------------------------------------

RED, BLUE = (200, 40, 60), (60, 40, 200)
SIZES = ((224, 168), (168, 280))


@check("V06", "V07", needs=("rows|splits", "processor", "collate"))
def pictures_arrive(evidence: Evidence) -> Outcome:
    """Exchange and colour the pictures of two rows; the pixels of the batch must follow, with the right values."""
    examples = one_picture(evidence.examples())
    if not examples:
        raise NotAvailable("rows with one picture")
    place = place_of(evidence.subject.collate)
    batches = evidence.batches()
    bare = [one for one in batches.values() if sum(one.pictures) and _pixels_of(one) is None]
    if bare:
        keys = ", ".join(sorted(map(str, bare[0].raw.keys())))
        yield found(
            "V06",
            where=f"{place}, batch '{bare[0].name}'",
            evidence=f"{sum(bare[0].pictures)} pictures in the row, no pixel_values in the batch (it has "
            f"{keys}); so in {len(bare)} of "
            f"{len(batches)} batches",
            cause="the collator does not hand pictures to the model",
        )
        return
    flat = [
        one for one in batches.values() if one.pixels is not None and one.pixels.size and float(np.ptp(one.pixels)) == 0
    ]
    if flat and len(flat) > len(batches) / 2 and not _flat_pictures(evidence):
        yield found(
            "V06",
            where=f"{place}, batch '{flat[0].name}'",
            evidence=f"every pixel value is {flat[0].pixels.ravel()[0]:.4g} in {len(flat)} of {len(batches)} batches",  # type: ignore[union-attr]
            cause="pixel values are a constant: the model sees no picture",
        )
        return
    strange = _other_rows_pictures(evidence)
    if strange is not None:
        yield found("V06", where=strange[0], evidence=strange[1], certainty=0.8,
                    cause="the converter gives rows the pictures of other rows")  # fmt: skip
    first, second = examples[0], examples[-1]
    pair = [first, second] if first is not second else [first, first]
    red, blue = (plain_picture(*size, colour) for size, colour in zip(SIZES, (RED, BLUE), strict=True))
    single = [
        collate_drawn(evidence, [one], [picture], "one row")[0] for one, picture in zip(pair, (red, blue), strict=True)
    ]
    if any(one.pixels is None for one in single):
        raise NotAvailable("pixel_values in the batch")
    values = [channels(one.pixels) for one in single if one.pixels is not None]
    told = f"red {RED} gives {_three(values[0])}, blue {BLUE} gives {_three(values[1])}"
    other = collate_drawn(evidence, pair[:1], [plain_picture(*SIZES[0], BLUE)], "one row")[0].pixels
    first_pixels = single[0].pixels
    if (
        other is not None
        and first_pixels is not None
        and other.shape == first_pixels.shape
        and np.allclose(other, first_pixels, atol=1e-3)
    ):
        yield found(
            "V06",
            where=place,
            evidence=(
                "a red and a blue picture of the same size, each alone through your collator: equal pixel "
                f"values ({told}, median of each channel)"
            ),
            cause="the picture of the row does not reach the batch: the same pixels whatever the picture is",
        )
        return
    if other is not None:
        blind = positions.sees_picture(
            evidence, single[0], collate_drawn(evidence, pair[:1], [plain_picture(*SIZES[0], BLUE)], "one row")[0]
        )
        if blind is not None:
            cause = (
                "the model refuses the batch"
                if blind[0] == "V05"
                else "the picture does not reach the text: masked out, or left aside by the model"
            )
            yield found(blind[0], where=f"{place}, on a small model", evidence=blind[1], cause=cause, certainty=0.9)
            if blind[0] == "V06":
                return
    with contextlib.suppress(NotAvailable):  # rows that cannot be put together are told as V11
        yield from _order(evidence, pair, red, blue, single, place)
    yield looked("V06", f"pixel values follow the picture: {told}")
    yield from _values(evidence, values, single, place, told)


def _pixels_of(batch: Batch) -> Any:
    if batch.pixels is not None:
        return batch.pixels
    raw: Mapping[str, Any] = batch.raw
    for key in list(raw.keys()):
        name = str(key).lower()
        if (
            any(word in name for word in ("pixel", "image", "vision", "flattened_patches"))
            and "grid" not in name
            and "mask" not in name
        ):
            value = raw[key]
            if value is not None and not (hasattr(value, "shape") and 0 in tuple(value.shape)):
                return value
    return None


def _flat_pictures(evidence: Evidence) -> bool:
    """Are the user's own pictures of one colour, as drawn test data may be?"""
    opened = [picture for one in evidence.examples()[:6] for picture in one.open()]
    return bool(opened) and all(len(picture.getcolors(4) or [0, 0]) == 1 for picture in opened)


def _three(values: np.ndarray | None) -> str:
    return "?" if values is None else "(" + ", ".join(f"{one:.2f}" for one in values) + ")"


def _order(evidence: Evidence, pair: list[Any], red: Any, blue: Any, single: list[Batch], place: str) -> Outcome:
    """Collate both rows together: each keeps its grid and its pixels."""
    batch = collate_drawn(evidence, pair, [red, blue], "two rows")[0]
    rows = pixel_rows(batch)
    wanted = [one.pixels for one in single]
    if batch.grids is not None and single[0].grids and single[1].grids and batch.pixels is not None:
        grids = [*single[0].grids, *single[1].grids]
        exchanged = [*single[1].grids, *single[0].grids]
        if batch.grids != grids and (batch.grids == exchanged or len(batch.grids) == len(grids)):
            yield found(
                "V06",
                where=place,
                evidence=f"a red picture of {red.size[0]} x {red.size[1]} in the first row and a blue one of "
                f"{blue.size[0]} x {blue.size[1]} in the "
                f"second: grids {batch.grids} together, {grids} alone",
                cause="pictures of a batch are not in the order of its rows"
                if batch.grids == exchanged
                else "a row gets another row's picture",
            )
            return
    if rows is None or len(rows) != 2:
        return
    got = [channels(one) for one in rows]
    alone = [channels(one) for one in wanted if one is not None]
    if any(one is None for one in (*got, *alone)):
        return
    distance = [[float(np.abs(a - b).max()) for b in alone] for a in got]  # type: ignore[operator]
    if distance[0][0] < 0.2 and distance[1][1] < 0.2:
        return
    swapped = distance[0][1] < 0.2 and distance[1][0] < 0.2
    same = float(np.abs(got[0] - got[1]).max()) < 0.05  # type: ignore[operator]
    yield found(
        "V06",
        where=place,
        evidence="a red picture in the first row and a blue one in the second, through your collator: first "
        f"row {_three(got[0])}, second "
        f"{_three(got[1])}; alone red is {_three(alone[0])}, blue {_three(alone[1])} (median of each channel)",
        cause="pictures of a batch are not in the order of its rows"
        if swapped
        else "all rows get the same picture"
        if same
        else "rows of a batch get other pixels than alone",
    )


def _other_rows_pictures(evidence: Evidence) -> tuple[str, str] | None:
    """Compare converted pictures with those of the data; return place and evidence where most are another row's."""
    from vlmdet.doctor.gather.annotations import PICTURE_KEYS, open_stored
    from vlmdet.images import BROKEN, to_upright_rgb

    thumbs: list[tuple[str, np.ndarray, np.ndarray]] = []
    annotations = evidence.annotations()
    for one in one_picture(evidence.examples())[:24]:
        annotation = annotations[one.index]
        row = evidence.splits()[annotation.split].raw(annotation.row)
        key = next((name for name in PICTURE_KEYS if isinstance(row, Mapping) and row.get(name) is not None), None)
        if key is None or not one.pictures:
            continue
        try:
            pictures = [to_upright_rgb(open_stored(value)) for value in (row[key], one.pictures[0])]
        except (*BROKEN, AttributeError, KeyError, TypeError):
            continue
        small = [np.asarray(picture.resize((16, 16)), np.float64).ravel() for picture in pictures]
        thumbs.append((one.where, small[0], small[1]))
    if len(thumbs) < 3:
        return None
    wrong = []
    for i, (where, _, converted) in enumerate(thumbs):
        distances = [float(np.abs(raw - converted).mean()) for _, raw, _ in thumbs]
        best = int(np.argmin(distances))
        if distances[best] < 4 and distances[i] > distances[best] + 12:
            wrong.append((where, thumbs[best][0]))
    if len(wrong) * 2 < len(thumbs):
        return None
    where, other = wrong[0]
    return where, f"its converted picture is the one of {other}; so on {len(wrong)} of {len(thumbs)} rows"


# ---- V07: values ----------------------------------------------------------------------------------------------------

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PUBLISHED = {
    "qwen2_vl": (CLIP,),
    "qwen2_5_vl": (CLIP,),
    "qwen3_vl": (HALF, CLIP),
    "paligemma": (HALF,),
    "internvl": (IMAGENET, CLIP),
    "florence2": (IMAGENET, CLIP),
    "idefics3": (HALF,),
    "smolvlm": (HALF,),
    "llava": (CLIP,),
}
"""Means and deviations of the published processors; where there are two, the class's own default is the second."""

_NAMES = {CLIP: "CLIP's", IMAGENET: "ImageNet's", HALF: "0.5 and 0.5"}


def _expected(evidence: Evidence) -> list[tuple[Any, Any]]:
    """Return the means and deviations that are right for this family; those of the processor's class where it is unknown."""
    images: Any = getattr(evidence.subject.processor, "image_processor", None)
    known = list(PUBLISHED.get(evidence.family(), ()))
    kind = type(images)
    if getattr(kind, "image_mean", None) is not None and getattr(kind, "image_std", None) is not None:
        known.append((tuple(kind.image_mean), tuple(kind.image_std)))
    own = getattr(images, "image_mean", None), getattr(images, "image_std", None)
    if not known and own[0] is not None and own[1] is not None:
        known.append((tuple(own[0]), tuple(own[1])))
    return known


def _values(evidence: Evidence, values: list[np.ndarray | None], single: list[Batch], place: str, told: str) -> Outcome:
    known = _expected(evidence)
    if not known or values[0] is None or values[1] is None:
        raise NotAvailable("pixel values in three channels, and the processor's mean and deviation")
    got = np.array(values)
    colours = np.array([RED, BLUE]) / 255

    def made(how: tuple[Any, Any], colour: np.ndarray = colours) -> np.ndarray:
        return (colour - np.array(how[0])) / np.array(how[1])

    right = min((float(np.abs(got - made(how)).max()), how) for how in known)
    if right[0] < 0.06:
        yield looked("V07", f"{told}: {_NAMES.get(right[1], 'the processor')} mean and deviation, RGB")
        return
    guesses: list[tuple[float, str]] = []
    for how in (*known, CLIP, IMAGENET, HALF):
        name = _NAMES.get(how, "the processor's")
        right_one = how in known
        for text, colour in (
            ("channels are in the order BGR", colours[:, ::-1]),
            ("values are divided by 255 twice", colours / 255),
            ("values are not divided by 255 before they are normalised", colours * 255),
        ):
            guesses.append(
                (
                    float(np.abs(got - made(how, colour)).max() / max(1, np.abs(got).max() / 3)),
                    text if right_one else f"{text}, and {name} mean",
                )
            )
        if not right_one:
            guesses.append((float(np.abs(got - made(how)).max()), f"mean and deviation are {name}, not the model's"))
        twice = made(how, made(how))
        guesses.append((float(np.abs(got - twice).max()), "values are normalised twice"))
    guesses.append((float(np.abs(got - colours).max()), "values are between 0 and 1, never normalised"))
    guesses.append(
        (float(np.abs(got - colours * 255).max() / 85), "values are between 0 and 255, neither rescaled nor normalised")
    )
    distance, cause = min(guesses, key=lambda one: one[0])
    again = _noise(evidence, values[0])
    if distance > 0.06:
        if again > 0.02:  # colours that change from call to call are augmentation
            yield looked("V07", f"{told}; colours change from call to call")
            return
        if np.abs(got - got.mean(axis=1, keepdims=True)).max() < 0.3 and right[0] > 0.5:
            cause = "all channels are alike: pictures lose their colour"
        else:
            cause = "mean, deviation or range are not those of the model"
    drawn = [one.pixels for one in single if one.pixels is not None]
    low, high = min(float(one.min()) for one in drawn), max(float(one.max()) for one in drawn)
    yield found(
        "V07",
        where=place,
        evidence=f"drawn pictures of one colour through your collator: {told} (median of each channel; all "
        f"values from {low:.2f} to {high:.2f}); "
        f"right are {_three(made(right[1])[0])} and {_three(made(right[1])[1])}",
        cause=cause,
        certainty=1.0 if distance < 0.06 else 0.9,
    )


def _noise(evidence: Evidence, before: np.ndarray | None) -> float:
    """Return how far the same picture differs when it is collated again."""
    examples = one_picture(evidence.examples())
    batch = collate_drawn(evidence, examples[:1], [plain_picture(*SIZES[0], RED)], "one row")[0]
    again = None if batch.pixels is None else channels(batch.pixels)
    return 0.0 if again is None or before is None else float(np.abs(again - before).max())


# ---- V11: rows together ---------------------------------------------------------------------------------------------


@check("V11", needs=("rows|splits", "processor", "collate"))
def rows_together(evidence: Evidence) -> Outcome:
    """Collate a short, a long and a row of several boxes together: each must stay as it is alone."""
    awkward = {name: one for name, one in evidence.awkward().items() if name in ("short", "long", "several")}
    place = place_of(evidence.subject.collate)
    alone: list[Batch] = []
    chosen = []
    for name, one in awkward.items():
        with contextlib.suppress(UserCodeError):
            alone.append(evidence.collate([one[0]], name, [one[1]], [one[2]]))
            chosen.append(one)
    if len(chosen) < 2:
        raise NotAvailable("rows that the collator takes one by one")
    names = [one[1] for one in chosen]
    if len(set(names)) < 2:
        raise NotAvailable("two different rows")
    try:
        batch = evidence.collate(
            [one[0] for one in chosen], "short, long and several", names, [one[2] for one in chosen]
        )
    except UserCodeError as error:
        yield found(
            "V11",
            where=error.where or place,
            evidence=f"each of {', '.join(names)} alone makes a batch; together your collator raised {error.text}"
            + (f" at: {error.line}" if error.line else ""),
            cause="the collator was only tried on one row, or on one row twice: rows of other lengths break it",
            severity=3,
        )
        return
    if len(batch.ids) != len(chosen):
        raise NotAvailable(f"a batch of {len(chosen)} rows; the collator made {len(batch.ids)}")
    token = evidence.image_token_id()  # how many of these there are goes by the picture: V05 and V06
    for i, one in enumerate(alone):
        kept, single = _real(batch, i, token), _real(one, 0, token)
        if kept[0] != single[0]:
            lengths = f"{len(single[0])} tokens alone, {len(kept[0])} in the batch"
            yield found(
                "V11",
                where=f"{place}, {names[i]}",
                evidence=(
                    f"{names[i]} together with {', '.join(names[:i] + names[i + 1 :])}: {lengths}; first "
                    f"difference at {_first(kept[0], single[0])}"
                ),
                cause="a row changes when rows of other lengths are beside it",
                severity=3,
            )
            return
        if kept[1] is not None and single[1] is not None and kept[1] != single[1]:
            counts = [sum(label != IGNORED for label in labels) for labels in (single[1], kept[1])]
            yield found(
                "V11",
                where=f"{place}, {names[i]}",
                evidence=(
                    f"{names[i]}: {counts[0]} tokens carry loss alone, {counts[1]} beside "
                    f"{', '.join(names[:i] + names[i + 1 :])}"
                ),
                cause="which tokens of a row carry loss depends on the rows beside it",
                certainty=0.6,
            )
            return
    yield looked(
        "V11",
        f"{len(chosen)} rows of {', '.join(str(sum(row)) for row in batch.mask)} tokens together are what they "
        "are alone",
    )


def _real(batch: Batch, row: int, token: int | None) -> tuple[list[int], list[int] | None]:
    """Return ids and labels of a row without its padding and image tokens."""
    places = [i for i, one in enumerate(batch.mask[row]) if one and batch.ids[row][i] != token]
    ids = [batch.ids[row][i] for i in places]
    if batch.labels is None or len(batch.labels[row]) != len(batch.mask[row]):
        return ids, None
    return ids, [batch.labels[row][i] for i in places]


def _first(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@check("V08", needs=("rows|splits", "processor", "collate"))
def positions_follow(evidence: Evidence) -> Outcome:
    """Look at positions of image tokens of a wide and a tall picture."""
    yield from positions.positions_follow(evidence)


@check("V09", needs=("rows|splits", "processor", "collate"))
def nothing_kept(evidence: Evidence) -> Outcome:
    """Ask a small model about two pictures in both orders."""
    yield from positions.nothing_kept(evidence)


@check("V10")
def not_packed(evidence: Evidence) -> Outcome:
    """Look whether rows with pictures are packed, and whether they then see one another."""
    yield from positions.not_packed(evidence)


CHECKS: tuple[Check, ...] = (
    limit_obeyed,
    limit_saved,
    resized_once,
    same_everywhere,
    tokens_per_picture,
    tokens_match_patches,
    pictures_arrive,
    positions_follow,
    nothing_kept,
    not_packed,
    rows_together,
)

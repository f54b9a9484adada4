"""Checks of placeholders and pictures: as many of one as of the other, each in its place, each picture its row's own.

When: with the stage conversation, whose list takes these in.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vlmdet.doctor.calls import NotAvailable, UserCodeError, place_of
from vlmdet.doctor.checks import Check, Outcome, check, found, looked
from vlmdet.doctor.evidence import Evidence
from vlmdet.doctor.findings import Finding
from vlmdet.doctor.foreign import foreign_finding
from vlmdet.doctor.gather.annotations import open_stored
from vlmdet.doctor.gather.conversations import Example, is_picture, parts_of
from vlmdet.images import BROKEN, to_upright_rgb

LITERAL = re.compile(
    r"<image>|<img>|</img>|<\|image_\d+\|>|<\|image\|>|\[IMG\]|<ImageHere>|<image_placeholder>|<image_\d+>",
    re.IGNORECASE,
)
"""Words that other frameworks put where a picture stands."""


def place_of_converter(evidence: Evidence) -> str:
    """Return where the user's converter is, or that the rows hold messages."""
    return place_of(evidence.subject.convert) if evidence.subject.convert is not None else "rows[…]['messages']"


@check("C05", "C06", "C07", needs=("rows|splits",))
def pictures_in_place(evidence: Evidence) -> Outcome:
    """Count placeholders and pictures; look for words that stay text, nested lists, the wrong picture."""
    examples = evidence.examples()
    place = place_of_converter(evidence)
    control = evidence.control() if evidence.subject.processor is not None else {}
    findings = [
        one
        for one in (
            _literal(evidence, examples, control, place),
            _counts(evidence, examples, control, place),
            _nested(evidence, examples, place),
            _wrong_picture(evidence, examples, place),
        )
        if one is not None
    ]
    yield from findings
    if not findings and evidence.subject.collate is not None and evidence.subject.processor is not None:
        findings = list(_batch_problems(evidence))
        yield from findings
    told = {one.id for one in findings}
    pictures = sum(len(one.pictures) for one in examples)
    figures = f"{len(examples)} rows, {pictures} pictures, as many placeholders, all in user turns"
    yield from (looked(one, figures) for one in ("C05", "C06", "C07") if one not in told)


def _literal(evidence: Evidence, examples: Sequence[Example], control: Mapping[str, int], place: str) -> Finding | None:
    """Find rows whose text holds a placeholder word that is no token of the tokenizer."""
    hits = []
    for one in examples:
        words = [
            word
            for message in one.messages
            for part in parts_of(message)
            for word in LITERAL.findall(str(part.get("text") or ""))
        ]
        if any(word not in control for word in words):
            hits.append((one, next(word for word in words if word not in control)))
    if not hits:
        return None
    one, word = hits[0]
    shown = " … ".join(
        str(part.get("text"))
        for message in one.messages
        for part in parts_of(message)
        if word in str(part.get("text") or "")
    )[:300]
    if evidence.subject.collate is not None:
        try:
            batches = evidence.batches()
        except (NotAvailable, UserCodeError):
            batches = {}
        texts = (
            [
                evidence.tokenizer.decode(ids, skip_special_tokens=False)
                for batch in batches.values()
                for ids in batch.ids
            ]
            if control
            else []
        )
        if texts and not any(word in text for text in texts):
            return None  # the collator puts the picture in its place
        if texts:
            shown = next(text for text in texts if word in text)[:500]
    return found(
        "C07",
        where=place,
        evidence=f"{len(hits)} of {len(examples)} rows hold {word!r} as text, e.g. {one.where}\n{shown}",
        cause=f"{word} is the tag of another framework; this tokenizer cuts it into ordinary pieces",
    )


def _placeholders(one: Example, control: Mapping[str, int]) -> Counter[str]:
    """Count placeholders by role: parts, and control words of pictures within texts."""
    counts: Counter[str] = Counter()
    words = [
        word
        for word in ("<|image_pad|>", "<image>", "<IMG_CONTEXT>", "<|image|>", "<image_soft_token>")
        if word in control
    ]
    for message in one.messages:
        role = str(message.get("role", message.get("from", "")))
        for part in parts_of(message):
            text = str(part.get("text") or "")
            counts[role] += 1 if is_picture(part) else sum(text.count(word) for word in words)
    return +counts


def _counts(evidence: Evidence, examples: Sequence[Example], control: Mapping[str, int], place: str) -> Finding | None:
    """Find rows whose placeholders and pictures differ in number, or whose placeholders stand in another turn than a user's."""
    rows = [(one, _placeholders(one, control), len(one.pictures)) for one in examples]
    if not any(row[2] for row in rows):
        return None  # the collator gets its pictures from elsewhere
    differ = [row for row in rows if sum(row[1].values()) != row[2] and not (sum(row[1].values()) == 0 and row[2] <= 1)]
    none = [row for row in rows if sum(row[1].values()) == 0 and row[2] == 1]
    if none and len(none) < len(rows) and not differ:
        differ = none
    if none and not differ and _needs_placeholder(evidence, none[0][0]):
        differ = none
    if differ:
        one, counts, pictures = differ[0]
        return found(
            "C05",
            where=place,
            cause="placeholders and pictures do not come in pairs",
            evidence=f"{len(differ)} of {len(rows)} rows, e.g. {one.where}: "
            f"placeholders by role {dict(counts)}, {pictures} pictures",
        )
    odd = [row for row in rows if any(role not in ("user", "human") for role in row[1])]
    if odd:
        one, counts, pictures = odd[0]
        return found(
            "C05",
            where=place,
            certainty=0.8,
            cause="templates and collators look for pictures in the user's turn",
            evidence=f"{len(odd)} of {len(rows)} rows, e.g. {one.where}: placeholders by role {dict(counts)}",
        )
    return None


def _needs_placeholder(evidence: Evidence, one: Example) -> bool:
    """Tell whether rows without placeholders stay without picture tokens: some collators put these in themselves."""
    if evidence.subject.collate is None:
        return evidence.subject.processor is not None and evidence.family().startswith(
            ("qwen", "internvl", "idefics", "smolvlm")
        )
    image = evidence.image_token_id()
    try:
        batch = next(iter(evidence.batches().values()))
    except (NotAvailable, UserCodeError):
        return True
    return (
        image is not None
        and batch.labels is not None
        and len(batch.ids[0]) == len(batch.labels[0])
        and image not in batch.ids[0]
    )


def _nested(evidence: Evidence, examples: Sequence[Example], place: str) -> Finding | None:
    """Find pictures that are a list within a list, unless the collator opens it."""
    hits = [
        one
        for one in examples
        if isinstance(one.raw, Mapping) and any(isinstance(picture, (list, tuple)) for picture in one.pictures)
    ]
    if not hits:
        return None
    if evidence.subject.collate is not None and evidence.subject.processor is not None:
        try:
            if not any(name in ("short+long", "short", "long") for name in evidence.batched()[1]):
                return None
        except (NotAvailable, UserCodeError):
            pass
    value = next(
        hits[0].raw[key]
        for key in ("images", "image", "img", "picture", "pictures")
        if hits[0].raw.get(key) is not None
    )
    return found(
        "C06",
        where=place,
        evidence=f"{len(hits)} of {len(examples)} rows; {hits[0].where}: {_shape(value)}",
        cause="the pictures of a row are a list within a list (what process_vision_info returns, put into one more list)",
    )


def _shape(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_shape(one) for one in value[:2]) + (", …" if len(value) > 2 else "") + "]"
    return type(value).__name__


def _wrong_picture(evidence: Evidence, examples: Sequence[Example], place: str) -> Finding | None:
    """Compare the picture of each converted row with that of its raw row and those of other rows."""
    annotations = evidence.annotations()
    used: list[tuple[Example, np.ndarray, np.ndarray]] = []
    for one in examples[:24]:
        annotation = annotations[one.index]
        key = annotation.keys.get("picture")
        row = evidence.raw_row(annotation)
        if key is None or not isinstance(row, Mapping) or len(one.pictures) != 1:
            continue
        given = one.open()
        try:
            own = to_upright_rgb(open_stored(row[key]))
        except (*BROKEN, AttributeError):
            continue
        if given:
            used.append((one, _small(given[0]), _small(own)))
    if len(used) < 3:
        return None
    wrong = []
    for one, given_pixels, own_pixels in used:
        if _apart(given_pixels, own_pixels) < 8:
            continue
        others = [
            (_apart(given_pixels, pixels), other)
            for other, _, pixels in used
            if other is not one and _apart(own_pixels, pixels) >= 8
        ]
        if others and min(others, key=lambda pair: pair[0])[0] < 2:
            wrong.append((one, min(others, key=lambda pair: pair[0])[1]))
    if not wrong:
        return None
    one, other = wrong[0]
    return found(
        "C05",
        where=place,
        evidence=f"{len(wrong)} of {len(used)} rows; the picture of {one.where} is that of {other.where}",
        cause="one picture is used for several rows, or pictures and rows are paired in another order",
    )


def _small(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX), dtype=np.float64)


def _apart(first: np.ndarray, second: np.ndarray) -> float:
    """Return the mean difference of two small pictures, in grey levels."""
    return float(np.abs(first - second).mean())


def _batch_problems(evidence: Evidence) -> Iterator[Finding]:
    """Report what the collator raised on some rows, and rows without picture tokens."""
    batches, errors = evidence.batched()
    real = {
        name: error
        for name, error in errors.items()
        if name.startswith(("row ", "short", "long", "several")) and ", " not in name
    }
    if real:
        yield foreign_finding(next(iter(real.values())))
        return
    image = evidence.image_token_id()
    for batch in batches.values():
        for where, ids, pictures in zip(batch.where, batch.ids, batch.pictures, strict=False):
            if (
                pictures
                and image is not None
                and image not in ids
                and batch.labels is not None
                and len(batch.labels[0]) == len(ids)
            ):
                yield found(
                    "C05",
                    where=place_of(evidence.subject.collate),
                    certainty=0.8,
                    cause="the collator finds no picture for this row, or no place for it",
                    evidence=f"{where}: {pictures} pictures, no picture token among {len(ids)} ids\n"
                    f"{evidence.tokenizer.decode(ids)[:400]}",
                )
                return
    yield from _one_picture_for_all(evidence)


def _one_picture_for_all(evidence: Evidence) -> Iterator[Finding]:
    """Compare the pixels of a batch of two with those of its rows alone."""
    batches = evidence.batches()
    pair, short, long = (batches.get(name) for name in ("short+long", "short", "long"))
    if pair is None or short is None or long is None or any(one.pixels is None for one in (pair, short, long)):
        return
    assert pair.pixels is not None and short.pixels is not None and long.pixels is not None
    if pair.grids is not None and short.grids is not None and long.grids is not None:
        wanted = [*short.grids, *long.grids]
        if pair.grids == wanted:
            both = np.concatenate([short.pixels, long.pixels])
            if both.shape == pair.pixels.shape and np.allclose(both, pair.pixels, atol=1e-3):
                return
        if len(pair.grids) != len(wanted):
            yield found(
                "C05",
                where=place_of(evidence.subject.collate),
                cause="the collator leaves out pictures of a batch, or takes some twice",
                evidence=f"{short.where[0]} and {long.where[0]}: {len(wanted)} pictures alone, {len(pair.grids)} in one batch",
            )
            return
        half = short.grids[0][0] * short.grids[0][1] * short.grids[0][2]
        first = short.pixels[:half]
        if (
            pair.grids[-1] == short.grids[0]
            and pair.pixels.shape[0] >= 2 * half
            and np.allclose(pair.pixels[-half:], first, atol=1e-3)
        ):
            yield _same_pixels(evidence, short.where[0], long.where[0])
    elif (
        (
            pair.pixels.shape[0] == 2
            and short.pixels.shape[0] == long.pixels.shape[0] == 1
            and pair.pixels.shape[1:] == short.pixels.shape[1:]
        )
        and np.allclose(pair.pixels[1], short.pixels[0], atol=1e-3)
        and not np.allclose(short.pixels, long.pixels, atol=1e-3)
    ):
        yield _same_pixels(evidence, short.where[0], long.where[0])


def _same_pixels(evidence: Evidence, first: str, second: str) -> Finding:
    return found(
        "C05",
        where=place_of(evidence.subject.collate),
        cause="the collator takes one row's picture for all rows of a batch",
        evidence=f"in a batch of {first} and {second} the pixels of the second are those of the first; alone they are its own",
        certainty=0.9,
    )


CHECKS: tuple[Check, ...] = (pictures_in_place,)

"""Checks of the stage conversation: what the converter writes, against the rows, the pictures and the question at inference."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vlmdet.doctor.calls import NotAvailable, UserCodeError, place_of
from vlmdet.doctor.checks import Check, Outcome, check, found, looked, questions
from vlmdet.doctor.evidence import PICTURE_WORDS, Evidence
from vlmdet.doctor.findings import Finding
from vlmdet.doctor.gather import conversations
from vlmdet.doctor.gather.annotations import open_stored
from vlmdet.doctor.gather.conversations import Example, is_picture, parts_of
from vlmdet.doctor.gather.text_boxes import boxes_in
from vlmdet.images import BROKEN, to_upright_rgb

LITERAL = re.compile(
    r"<image>|<img>|</img>|<\|image_\d+\|>|<\|image\|>|\[IMG\]|<ImageHere>|<image_placeholder>|<image_\d+>",
    re.IGNORECASE,
)
"""Words that other frameworks put where a picture stands."""

TURN_WORDS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<eos>", "<bos>", "</s>", "<|eot_id|>", "<|end_of_text|>",
              "<|begin_of_text|>", "<start_of_turn>", "<end_of_turn>", "<end_of_utterance>", "<|end|>")  # fmt: skip


def _place(evidence: Evidence) -> str:
    return place_of(evidence.subject.convert) if evidence.subject.convert is not None else "rows[…]['messages']"


# ---- C01 ------------------------------------------------------------------------------------------------------------


@check("C01", needs=("rows|splits", "processor"))
def keys_of_arrow(evidence: Evidence) -> Outcome:
    """Render the messages as they are, and without the keys that are None: Arrow gives every part all keys, and templates ask for presence."""
    examples = evidence.examples()
    try:
        texts = evidence.texts()
    except UserCodeError as error:
        stripped = _stripped_renders(evidence, examples[0])
        if stripped is None:
            raise
        yield _arrow(evidence, f"the template raises {error.text}", stripped, "raises", 1, len(examples))
        return
    changed = [
        (one, text, clean)
        for one, text in list(zip(examples, texts, strict=True))[:200]
        if (clean := _stripped_renders(evidence, one)) is not None and clean != text
    ]
    if changed and _collator_copes(evidence):
        yield looked(
            "C01",
            f"keys that are None change what the template writes in {len(changed)} rows; the collator removes them",
        )
        return
    if changed:
        one, text, clean = changed[0]
        yield _arrow(evidence, f"{one.where}, as it is\n{text[-600:]}", clean, "changes", len(changed), len(examples))
        return
    after = evidence.texts_after_arrow()
    differ = [(one, text, later) for one, text, later in zip(examples, texts, after, strict=False) if text != later]
    if differ:
        one, text, later = differ[0]
        yield found(
            "C01", where=_place(evidence), severity=2, certainty=0.5,
            evidence=f"{one.where}, as converted\n{text[-400:]}\nafter Dataset.from_list\n{later[-400:]}",
            cause="the template asks whether a key is there; rows that are stored in a Dataset have every key, None where it was not set",
        )  # fmt: skip
        return
    lost = [
        one for one, text in zip(examples, texts, strict=True) if one.answer.strip() and one.answer.strip() not in text
    ]
    if lost and len(lost) > len(examples) / 2 and not _collator_copes(evidence):
        text = texts[examples.index(lost[0])]
        yield found(
            "C01", where=_place(evidence), evidence=f"{len(lost)} of {len(examples)} answers are not in what the template writes\n{lost[0].where}\n{text[-500:]}",
            cause="the template does not write the answer in the form in which the messages hold it", certainty=0.7,
        )  # fmt: skip
        return
    yield looked(
        "C01", f"{len(texts)} rows render alike with and without keys that are None; every answer is in its text"
    )


def _arrow(evidence: Evidence, shown: str, clean: str, what: str, number: int, of: int) -> Finding:
    return found(
        "C01", where=_place(evidence), evidence=f"{number} of {of} rows\n{shown}\nwithout the keys that are None\n{clean[-600:]}",
        cause=f"the messages hold keys that are None ('image', 'text'), and the template asks whether a key is there: that {what} the text",
    )  # fmt: skip


def _stripped_renders(evidence: Evidence, one: Example) -> str | None:
    """Render a row without the keys that are None; None where it has none of these, or does not render either."""
    if not any(value is None for message in one.messages for part in parts_of(message) for value in part.values()):
        return None
    clean = []
    for message in one.messages:
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            content = [
                {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else part
                for part in content
            ]
        clean.append({**message, "content": content})
    try:
        return evidence.render_text(clean)
    except (UserCodeError, NotAvailable):
        return None


def _collator_copes(evidence: Evidence) -> bool:
    """Do the collator's own ids hold the answers, and a picture where there is one?"""
    if evidence.subject.collate is None:
        return False
    try:
        batches = evidence.batches()
    except (NotAvailable, UserCodeError):
        return False
    image = evidence.image_token_id()
    for batch in batches.values():
        for ids, answers, pictures in zip(batch.ids, batch.answers, batch.pictures, strict=False):
            text = evidence.tokenizer.decode(ids, skip_special_tokens=False)
            if not all(answer.strip() in text for answer in answers) or (
                pictures and image is not None and image not in ids
            ):
                return False
            if image is not None and pictures and _runs(ids, image) > max(1, pictures) and batch.grids is not None:
                return False
    return True


def _runs(ids: Sequence[int], token: int) -> int:
    return sum(one == token and (i == 0 or ids[i - 1] != token) for i, one in enumerate(ids))


# ---- C02, C03 -------------------------------------------------------------------------------------------------------


@check("C02", "C03", needs=("rows|splits", "render|settings"))
def asked_as_trained(evidence: Evidence) -> Outcome:
    """Compare the question of training with that of evaluation, callback and settings, system message and user text apart."""
    yield from questions.compare(evidence, _place(evidence))


# ---- C04 ------------------------------------------------------------------------------------------------------------


@check("C04", needs=("rows|splits",))
def format_asked(evidence: Evidence) -> Outcome:
    """Compare the format that the question asks for with that of the target, and the target with the family's own."""
    examples = [one for one in evidence.examples() if boxes_in(one.answer)]
    if not examples:
        raise NotAvailable("targets with boxes")
    yield from questions.format_of(evidence, examples, _place(evidence))


# ---- C05, C06, C07 --------------------------------------------------------------------------------------------------


@check("C05", "C06", "C07", needs=("rows|splits",))
def pictures_in_place(evidence: Evidence) -> Outcome:
    """Count placeholders and pictures per row and role; look for placeholder words that stay text, nested lists, the wrong picture."""
    examples = evidence.examples()
    place = _place(evidence)
    control = evidence.control() if evidence.subject.processor is not None else {}
    findings = [
        one for one in (
            _literal(evidence, examples, control, place),
            _counts(evidence, examples, control, place),
            _nested(evidence, examples, place),
            _wrong_picture(evidence, examples, place),
        ) if one is not None
    ]  # fmt: skip
    yield from findings
    if not findings and evidence.subject.collate is not None and evidence.subject.processor is not None:
        findings = list(_batch_problems(evidence))
        yield from findings
    told = {one.id for one in findings}
    figures = f"{len(examples)} rows, {sum(len(one.pictures) for one in examples)} pictures, as many placeholders, all in user turns"
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
        "C07", where=place, evidence=f"{len(hits)} of {len(examples)} rows hold {word!r} as text, e.g. {one.where}\n{shown}",
        cause=f"{word} is the tag of another framework; this tokenizer cuts it into ordinary pieces",
    )  # fmt: skip


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
    differ = [row for row in rows if sum(row[1].values()) != row[2] and not (sum(row[1].values()) == 0 and row[2] <= 1)]
    none = [row for row in rows if sum(row[1].values()) == 0 and row[2] == 1]
    if none and len(none) < len(rows) and not differ:
        differ = none
    if none and not differ and _needs_placeholder(evidence, none[0][0]):
        differ = none
    if differ:
        one, counts, pictures = differ[0]
        return found(
            "C05", where=place, cause="placeholders and pictures do not come in pairs",
            evidence=f"{len(differ)} of {len(rows)} rows, e.g. {one.where}: {dict(counts)} placeholders by role, {pictures} pictures",
        )  # fmt: skip
    odd = [row for row in rows if any(role not in ("user", "human") for role in row[1])]
    if odd:
        one, counts, pictures = odd[0]
        return found(
            "C05", where=place, certainty=0.8, cause="templates and collators look for pictures in the user's turn",
            evidence=f"{len(odd)} of {len(rows)} rows, e.g. {one.where}: placeholders by role {dict(counts)}",
        )  # fmt: skip
    return None


def _needs_placeholder(evidence: Evidence, one: Example) -> bool:
    """Tell whether rows without placeholders end without picture tokens: families and collators that put them in themselves do not need any."""
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
        "C06", where=place, evidence=f"{len(hits)} of {len(examples)} rows; {hits[0].where}: {_shape(value)}",
        cause="the pictures of a row are a list within a list (what process_vision_info returns, put into one more list)",
    )  # fmt: skip


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
        "C05", where=place, evidence=f"{len(wrong)} of {len(used)} rows; the picture of {one.where} is that of {other.where}",
        cause="one picture is used for several rows, or pictures and rows are paired in another order",
    )  # fmt: skip


def _small(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX), dtype=np.float64)


def _apart(first: np.ndarray, second: np.ndarray) -> float:
    """Return the mean difference of two small pictures, in grey levels."""
    return float(np.abs(first - second).mean())


def _batch_problems(evidence: Evidence) -> Iterator[Finding]:
    """Report what the collator raised on some rows, and rows without picture tokens."""
    from vlmdet.doctor.examine import foreign_finding

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
                    "C05", where=place_of(evidence.subject.collate), certainty=0.8, cause="the collator finds no picture for this row, or no place for it",
                    evidence=f"{where}: {pictures} pictures, no picture token among {len(ids)} ids\n{evidence.tokenizer.decode(ids)[:400]}",
                )  # fmt: skip
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
                "C05", where=place_of(evidence.subject.collate), cause="the collator leaves out pictures of a batch, or takes some twice",
                evidence=f"{short.where[0]} and {long.where[0]}: {len(wanted)} pictures alone, {len(pair.grids)} in one batch",
            )  # fmt: skip
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
        "C05", where=place_of(evidence.subject.collate), cause="the collator takes one row's picture for all rows of a batch",
        evidence=f"in a batch of {first} and {second} the pixels of the second are those of the first; alone they are its own", certainty=0.9,
    )  # fmt: skip


# ---- C08, C09, C10 --------------------------------------------------------------------------------------------------


@check("C08", needs=("rows|splits",))
def constant_targets(evidence: Evidence) -> Outcome:
    """Count different targets, and how well one constant box would do."""
    examples = evidence.examples()
    texts = [one.answer.strip() for one in examples]
    empty = [one for one in examples if not one.answer.strip()]
    common, times = Counter(texts).most_common(1)[0]
    place = _place(evidence)
    if len(empty) > 0.2 * len(texts):
        yield found(
            "C08", where=place, evidence=f"{len(empty)} of {len(texts)} targets are empty, e.g. {empty[0].where}",
            cause="the converter writes no answer for these rows", severity=3 if len(empty) > 0.9 * len(texts) else 2,
        )  # fmt: skip
        return
    if len(texts) >= 4 and times > 0.9 * len(texts) and _rows_differ(evidence):
        yield found(
            "C08", where=place, evidence=f"{times} of {len(texts)} targets are {common[:200]!r}",
            cause="the target does not depend on the row, or the data have hardly any variety",
        )  # fmt: skip
        return
    first = [np.asarray(boxes[0].numbers) for text in texts if (boxes := boxes_in(text))]
    if len(first) >= 8:
        from vlmdet.doctor.gather.text_boxes import paired_iou

        stacked = np.stack(first)
        middle: np.ndarray = np.median(stacked, axis=0)
        iou = float(paired_iou(stacked, np.broadcast_to(middle, stacked.shape)).mean())
        if iou > 0.9:
            yield found(
                "C08", where=place, evidence=f"{len(first)} first boxes; the constant box {middle.round(2).tolist()} has a mean IoU of {iou:.2f} with them",
                cause="targets are nearly the same in every row", certainty=0.8,
            )  # fmt: skip
            return
    yield looked(
        "C08",
        f"{len(texts)} targets, {len(set(texts))} different, {len(empty)} empty; the most frequent one {times} times",
    )


def _rows_differ(evidence: Evidence) -> bool:
    """Do the raw rows hold boxes that differ, or none at all to compare with?"""
    boxes = [tuple(one.boxes.ravel().tolist()) for one in evidence.annotations() if one.boxes is not None]
    return not boxes or len(set(boxes)) > 1 or all(not one for one in boxes) or len(boxes) > 3


@check("C09", needs=("rows|splits",))
def control_tokens_in_data(evidence: Evidence) -> Outcome:
    """Scan labels and texts for control tokens that are not the syntax of the targets."""
    control = dict(evidence.control()) if evidence.subject.processor is not None else {}
    turns = [word for word in TURN_WORDS if not control or word in control]
    pictures = [word for word in PICTURE_WORDS if word in control and word != "<image>"]
    hits: list[tuple[str, str, str]] = []
    annotations = evidence.annotations()
    for one in annotations:
        for label in one.labels:
            word = next(
                (word for word in (*turns, *pictures, *control) if label and len(word) > 2 and word in label), None
            )
            if word:
                hits.append((one.where, word, f"label {label!r}"))
                break
    labelled = {where for where, _, _ in hits}
    try:
        examples = evidence.examples()
    except (NotAvailable, UserCodeError):
        examples = []
    for example in examples:
        if example.where in labelled:
            continue
        hit = _control_in(example, turns, pictures)
        if hit:
            hits.append((example.where, *hit))
    if hits:
        where, word, _text = hits[0]
        yield found(
            "C09", where=where, evidence="\n".join(f"{at}: {found_word} in {shown[:160]}" for at, found_word, shown in hits[:3]) + f"\n{len(hits)} rows in all",
            cause=f"the tokenizer reads {word} as a control token wherever it stands",
        )  # fmt: skip
    else:
        yield looked(
            "C09",
            f"{sum(len(one.labels) for one in annotations)} labels and {len(examples)} conversations without control tokens",
        )


def _control_in(one: Example, turns: Sequence[str], pictures: Sequence[str]) -> tuple[str, str] | None:
    slots = sum(conversations.placeholders(one.messages).values())
    for message in one.messages:
        answer = message.get("role", message.get("from")) in ("assistant", "model", "gpt")
        for part in parts_of(message):
            text = str(part.get("text") or "")
            within = text.strip()
            for word in turns:
                if answer and within.endswith(word):
                    within = within[: -len(word)].rstrip()  # an end token that the converter writes itself
                if word in within:
                    return word, repr(text[max(0, text.index(word) - 60) : text.index(word) + 60])
            if answer or slots:  # where there are no parts of pictures, the words are the placeholders
                for word in pictures:
                    if word in text:
                        return word, repr(text[max(0, text.index(word) - 60) : text.index(word) + 60])
    return None


@check("C10", needs=("rows|splits",))
def indented_prompt(evidence: Evidence) -> Outcome:
    """Look for leading blanks in every line of a prompt."""
    examples = evidence.examples()
    for one in examples[:50]:
        for name, text in (("system message", one.system or ""), ("question", one.prompt)):
            lines = [line for line in text.split("\n")[1:] if line.strip()]
            indents = [len(line) - len(line.lstrip(" \t")) for line in lines]
            if (
                indents
                and min(indents) >= (1 if "\t" in "".join(lines) else 2)
                and (len(indents) > 1 or indents[0] >= 4)
            ):
                yield found(
                    "C10", where=_place(evidence), evidence=f"{one.where}, {name}:\n{text[:300]!r}",
                    cause=f"text in triple quotes keeps the indentation of the code: {min(indents)} blanks before each line",
                )  # fmt: skip
                return
    yield looked("C10", f"{len(examples)} rows, no prompt is indented line by line")


CHECKS: tuple[Check, ...] = (
    keys_of_arrow,
    asked_as_trained,
    format_asked,
    pictures_in_place,
    constant_targets,
    control_tokens_in_data,
    indented_prompt,
)

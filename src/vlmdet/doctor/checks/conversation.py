"""Checks of the stage conversation: what the converter writes, against the rows, the pictures and the question at inference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from vlmdet.doctor.calls import NotAvailable, UserCodeError
from vlmdet.doctor.checks import Check, Outcome, check, found, looked, placeholders, questions
from vlmdet.doctor.checks.placeholders import place_of_converter
from vlmdet.doctor.evidence import PICTURE_WORDS, Evidence
from vlmdet.doctor.findings import Finding
from vlmdet.doctor.gather import conversations
from vlmdet.doctor.gather.conversations import Example, parts_of
from vlmdet.doctor.gather.text_boxes import boxes_in

TURN_WORDS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<eos>",
    "<bos>",
    "</s>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|begin_of_text|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<|end|>",
)


# ---- C01 ------------------------------------------------------------------------------------------------------------


@check("C01", needs=("rows|splits", "processor"))
def keys_of_arrow(evidence: Evidence) -> Outcome:
    """Render the messages as they are and without keys that are None: Arrow gives every part all keys."""
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
    later = _after_arrow(evidence, examples[0])
    if later is not None:
        stored = "cached_rows" in evidence.options
        yield found(
            "C01",
            where=place_of_converter(evidence),
            severity=4 if stored else 2,
            certainty=0.9 if stored else 0.5,
            evidence=f"{examples[0].where}, as converted\n{texts[0][-400:]}\nafter Dataset.from_list\n{later[-400:]}",
            cause="the template asks whether a key is there; rows in a Dataset have every key, None where it was not set",
        )
        return
    lost = [
        one for one, text in zip(examples, texts, strict=True) if one.answer.strip() and one.answer.strip() not in text
    ]
    if lost and len(lost) > len(examples) / 2 and not _collator_copes(evidence):
        text = texts[examples.index(lost[0])]
        yield found(
            "C01",
            where=place_of_converter(evidence),
            evidence=f"{len(lost)} of {len(examples)} answers are not in the rendered text\n{lost[0].where}\n{text[-500:]}",
            cause="the template does not write the answer in the form in which the messages hold it",
            certainty=0.7,
        )
        return
    yield looked(
        "C01", f"{len(texts)} rows render alike with and without keys that are None; every answer is in its text"
    )


def _arrow(evidence: Evidence, shown: str, clean: str, what: str, number: int, of: int) -> Finding:
    return found(
        "C01",
        where=place_of_converter(evidence),
        evidence=f"{number} of {of} rows\n{shown}\nwithout the keys that are None\n{clean[-600:]}",
        cause=f"messages hold keys that are None, and the template asks whether a key is there: that {what} the text",
    )


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


def _after_arrow(evidence: Evidence, one: Example) -> str | None:
    """Return what becomes of a row that is stored in a Dataset; None where it stays the same, or where nothing is stored."""
    held = evidence.subject.rows
    if not hasattr(held, "features") and "cached_rows" not in evidence.options:
        return None
    later = conversations.after_arrow(one.messages)
    raw = conversations.with_messages(one.raw, later) if isinstance(one.raw, Mapping) else later
    try:
        if evidence.subject.collate is not None:
            before = evidence.collate([one.raw], "as converted", [one.where], [one.answers]).ids
            after = evidence.collate([raw], "after Arrow", [one.where], [one.answers]).ids
            return None if before == after else evidence.tokenizer.decode(after[0], skip_special_tokens=False)
        text = evidence.render_text(later)
        return None if text == evidence.render_text(one.messages) else text
    except UserCodeError as error:
        return f"raises {error.text}"
    except NotAvailable:
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
            if (
                not all(answer.strip() in text for answer in answers)
                or ("None" in text and not any("None" in one for one in answers))
                or (pictures and image is not None and image not in ids)
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
    yield from questions.compare(evidence, place_of_converter(evidence))


# ---- C04 ------------------------------------------------------------------------------------------------------------


@check("C04", needs=("rows|splits",))
def format_asked(evidence: Evidence) -> Outcome:
    """Compare the format that the question asks for with that of the target, and the target with the family's own."""
    examples = [one for one in evidence.examples() if boxes_in(one.answer)]
    if not examples:
        raise NotAvailable("targets with boxes")
    yield from questions.format_of(evidence, examples, place_of_converter(evidence))


# ---- C08, C09, C10 --------------------------------------------------------------------------------------------------


@check("C08", needs=("rows|splits",))
def constant_targets(evidence: Evidence) -> Outcome:
    """Count different targets, and how well one constant box would do."""
    examples = evidence.examples()
    texts = [one.answer.strip() for one in examples]
    empty = [one for one in examples if not one.answer.strip()]
    common, times = Counter(texts).most_common(1)[0]
    place = place_of_converter(evidence)
    if len(empty) > 0.2 * len(texts):
        yield found(
            "C08",
            where=place,
            evidence=f"{len(empty)} of {len(texts)} targets are empty, e.g. {empty[0].where}",
            cause="the converter writes no answer for these rows",
            severity=3 if len(empty) > 0.9 * len(texts) else 2,
        )
        return
    if len(texts) >= 4 and times > 0.9 * len(texts) and _rows_differ(evidence):
        yield found(
            "C08",
            where=place,
            evidence=f"{times} of {len(texts)} targets are {common[:200]!r}",
            cause="the target does not depend on the row, or the data have hardly any variety",
        )
        return
    first = [np.asarray(boxes[0].numbers) for text in texts if (boxes := boxes_in(text))]
    if len(first) >= 8:
        from vlmdet.doctor.gather.text_boxes import paired_iou

        stacked = np.stack(first)
        middle: np.ndarray = np.median(stacked, axis=0)
        iou = float(paired_iou(stacked, np.broadcast_to(middle, stacked.shape)).mean())
        if iou > 0.9:
            yield found(
                "C08",
                where=place,
                evidence=f"{len(first)} first boxes have a mean IoU of {iou:.2f} with the one box {middle.round(2).tolist()}",
                cause="targets are nearly the same in every row",
                certainty=0.8,
            )
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
            "C09",
            where=where,
            evidence="\n".join(f"{at}: {found_word} in {shown[:160]}" for at, found_word, shown in hits[:3])
            + f"\n{len(hits)} rows in all",
            cause=f"the tokenizer reads {word} as a control token wherever it stands",
        )
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
                    "C10",
                    where=place_of_converter(evidence),
                    evidence=f"{one.where}, {name}:\n{text[:300]!r}",
                    cause=f"text in triple quotes keeps the indentation of the code: {min(indents)} blanks before each line",
                )
                return
    yield looked("C10", f"{len(examples)} rows, no prompt is indented line by line")


CHECKS: tuple[Check, ...] = (
    keys_of_arrow,
    asked_as_trained,
    format_asked,
    *placeholders.CHECKS,
    constant_targets,
    control_tokens_in_data,
    indented_prompt,
)

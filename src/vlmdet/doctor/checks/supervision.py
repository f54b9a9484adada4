"""Which failure mode explains the labels of the user's batches: one verdict, of ids in the stages labels and template.

When: WHEN WRONG, of `supervised_rows`: rows alone, the same rows padded, a row whose question holds its answer, a row of two
turns. Faults that look alike are told apart by what else they do:

    end token without loss, and it is the padding token              T08, else L01
    answer or end cut in rows that are as long as max_length         T09
    masked are exactly ids at or above vocab_size                    T04 (then L08)
    prompt with loss in every row                                    L04 (L12 where assistant_only_loss is set), pictures too L03
    wrong in some rows, or only where the question holds the answer  L05
    wrong in a padded batch alone                                    L10, padding itself L03

Long, because the order in which they are asked is the diagnosis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlmdet.doctor.calls import NotAvailable, UserCodeError, place_of
from vlmdet.doctor.checks import found, looked, mask
from vlmdet.doctor.checks.supervised_rows import MADE, Seen, rows_of_batches
from vlmdet.doctor.evidence import Evidence, once
from vlmdet.doctor.findings import Checked, Finding
from vlmdet.doctor.gather.conversations import messages_of

IDS = ("L01", "L02", "L03", "L04", "L05", "L06", "L07", "L08", "L09", "L10", "L11", "L12", "T04", "T08", "T09")


@dataclass(frozen=True)
class Verdict:
    """What explains the labels; `figures` of what was looked at."""

    findings: tuple[Finding, ...]
    figures: str


# ---- the verdict ----------------------------------------------------------------------------------------------------


def source(evidence: Evidence) -> Evidence:
    """Return the evidence whose batches are judged: the user's collator, else that of the trainer that he builds.

    Raises:
        NotAvailable: neither, or the trainer's data set holds no conversations.
        UserCodeError: building the trainer raised.
    """
    subject = evidence.subject
    if subject.collate is not None:
        return evidence
    trainer = evidence.trainer().trainer
    rows = getattr(trainer, "train_dataset", None)
    if rows is None or not hasattr(rows, "__getitem__") or not hasattr(rows, "__len__"):
        raise NotAvailable("collate, or a trainer with a data set that can be indexed")
    chosen = [rows[i] for i in range(min(len(rows), 32))]
    if not any(messages_of(one) for one in chosen):
        raise NotAvailable("collate, or a trainer whose data set holds messages")
    held = getattr(trainer, "processing_class", None)
    return Evidence(
        replace(
            subject,
            rows=chosen,
            splits=None,
            convert=None,
            collate=trainer.data_collator,
            build_trainer=None,
            model=evidence.tiny().model,
            processor=subject.processor if subject.processor is not None else held,
            settings={**evidence.trainer().arguments, **evidence.options.flat},
        )
    )


@once
def verdict(evidence: Evidence) -> Verdict:
    """Return what explains the labels of all batches.

    Raises:
        NotAvailable: there are no batches with labels and answers.
        UserCodeError: every batch raised.
    """
    evidence = source(evidence)
    seen = rows_of_batches(evidence)
    alone = [one for one in seen if "+" not in one.batch and one.batch not in MADE]
    alone = list({one.where: one for one in alone}.values())
    side = evidence.options.get("padding_side", phase="train") or evidence.options.get("padding_side")
    padded = [one for one in seen if one.batch in ("short+long", "shortest+longest", f"short+long, {side}")]
    made = {one.batch: one for one in seen if one.batch in MADE}
    place = place_of(evidence.subject.collate) if evidence.subject.collate is not None else "the trainer's collator"
    supervised = sorted(one.difference.supervised for one in alone)
    middle = supervised[len(supervised) // 2] if supervised else 0
    findings = tuple(_explain(evidence, alone, padded, made, place))
    figures = (
        f"{len(alone)} rows alone and {len(padded)} padded"
        + ("" if findings else ": answer and end token carry loss, nothing else")
        + f"; {middle} tokens with loss in the median row, {supervised[0] if supervised else 0} in the least"
    )
    return Verdict(findings, figures)


def _explain(
    evidence: Evidence, alone: list[Seen], padded: list[Seen], made: dict[str, Seen], place: str
) -> Iterator[Finding]:
    cut = _cut_rows(evidence, alone)
    if cut:
        yield _cut(evidence, cut, alone, place)
    rest = [one for one in alone if one not in cut]
    if not rest:
        return
    told = list(_masks(evidence, rest, place))
    yield from told
    if told:
        return
    if padded and any(one.wrong and not one.cut for one in padded):
        yield from _only_padded([one for one in padded if one.wrong and not one.cut], place)
        return
    question = made.get("answer in the question")
    if question is not None and question.wrong and _twice(question):
        yield found(
            "L05",
            where=place,
            evidence=question.told(),
            cause="the answer is looked for by its text: where the question holds the same text, that is taken for the answer",
        )
        return
    yield from _turns(rest, made.get("two turns"), place)


def _twice(question: Seen) -> bool:
    """Does the answer stand in the question and behind it? A row that is cut at max_length has lost the second."""
    if not question.row.ids:
        return not question.cut
    text, _ = mask.texts_of(question.row.ids, question.tokens)
    return text.count(question.row.answers[-1].strip()) > 1


def _cut_rows(evidence: Evidence, alone: list[Seen]) -> list[Seen]:
    """Return the rows whose answer or end token was cut away: they are as long as the limit, and no row is longer."""
    broken = [one for one in alone if one.cut and one.row.ids]
    if not broken:
        return []
    limit = evidence.options.number("max_length")
    longest = max(one.length for one in alone)
    at_limit = [one for one in broken if one.length in (limit, longest)]
    equal = sum(one.length == longest for one in alone)
    if limit is not None and longest <= limit and any(one.length == limit for one in broken):
        return [one for one in broken if one.length == limit]
    if len(at_limit) == len(broken) and (len(broken) > 1 or equal == 1) and (len(alone) > len(broken) or equal > 2):
        return at_limit if limit is None or longest <= limit or len(broken) < len(alone) else []
    return []


def _cut(evidence: Evidence, cut: list[Seen], alone: list[Seen], place: str) -> Finding:
    worst = max(cut, key=lambda one: one.difference.lost)
    none = sum(one.difference.none for one in cut)
    option = evidence.options.shown("max_length")
    return found(
        "T09",
        where=f"{option}, {place}" if "=" in option else place,
        evidence=(
            f"{len(cut)} of {len(alone)} rows have {worst.length} tokens each and end within the answer or before it"
            + (f"; {none} of them carry no loss at all" if none else "")
            + f"\n{worst.told()}"
        ),
        cause=f"rows are cut at {worst.length} tokens, and their answers go on behind that",
    )


def _share(rows: Sequence[Seen], test: Callable[[Seen], Any]) -> tuple[list[Seen], float]:
    hits = [one for one in rows if test(one)]
    return hits, len(hits) / len(rows)


def _many(hits: Sequence[Seen], rows: Sequence[Seen]) -> str:
    return f"{len(hits)} of {len(rows)} rows"


def _masks(evidence: Evidence, rows: list[Seen], place: str) -> Iterator[Finding]:
    """Explain rows alone: none, shifted, other ids, then what of the answer is masked, then what else carries loss."""
    none, share = _share(rows, lambda one: one.difference.none)
    if none and share <= 0.5:
        yield from _none_in_some(evidence, none, rows, place)
        return
    if none:
        if _only_answers(evidence):
            yield found(
                "L12",
                where="assistant_only_loss=True",
                evidence=none[0].told(),
                cause="the template or the collator gives no mask of the assistant's turns, so nothing is left to learn",
            )
        yield found(
            "L02",
            where=place,
            evidence=f"{_many(none, rows)} without any token that carries loss\n{none[0].told()}",
            cause="the mark before the answer is not found in what the template writes, or everything is masked",
        )
        return
    rows = [one for one in rows if not one.difference.lost]
    if not rows:
        raise NotAvailable("answers that are found in the token ids")
    shifted, share = _share(rows, lambda one: one.difference.shifted)
    if share > 0.5:
        way = "next" if shifted[0].difference.shifted > 0 else "previous"
        yield found(
            "L11",
            where=place,
            evidence=f"{_many(shifted, rows)}: each label is the id of the {way} position\n{_pairs(shifted[0])}",
            cause="the model shifts labels by one itself: shifted twice, each token is taught the wrong successor",
        )
        return
    other, share = _share(rows, lambda one: one.difference.other)
    if other:
        lines = f"{_many(other, rows)}: labels hold other ids than the row has at their place\n{_pairs(other[0])}"
        if share > 0.8:
            yield found(
                "L04",
                where=place,
                evidence=lines,
                cause="labels were made of a row of another length than the ids: pictures not expanded, or another prompt",
            )
        yield found(
            "L05",
            where=place,
            evidence=lines,
            certainty=1.0 if share <= 0.8 else 0.6,
            cause="prompt and answer were tokenised apart: where they meet, other tokens come out than in the whole text",
        )
        return
    several = [one for one in rows if len(one.answers) > 1]
    partly = [one for one in several if any(one.difference.turns) and not all(one.difference.turns)]
    if partly and len(partly) > 0.5 * len(several):
        yield _one_turn(partly[0], f"{_many(partly, several)} of several turns", place)
        return
    told = list(_within_answers(evidence, rows, place))
    yield from told
    if not any(one.id in ("L08", "L09", "T04") for one in told):
        yield from _beyond_answers(evidence, rows, place)


def _none_in_some(evidence: Evidence, none: list[Seen], rows: list[Seen], place: str) -> Iterator[Finding]:
    """Explain rows without loss among others that have some: a mask that is shifted swallows short answers whole."""
    others = list(_masks(evidence, [one for one in rows if not one.difference.none], place))
    yield from others[:2]
    if len(others) < 2:
        yield found(
            "L02",
            where=place,
            certainty=0.7 if others else 1.0,
            consequence_of=others[0].id if others else None,
            evidence=f"{_many(none, rows)} without any token that carries loss\n{none[0].told()}",
            cause="the answer is not found in these rows, and in the others it is",
        )
    if not others:
        yield found(
            "L05",
            where=place,
            certainty=0.9,
            evidence=f"{_many(none, rows)} are masked whole\n{none[0].told()}",
            consequence_of="L02",
            cause="the answer is looked for by ids that were made from its text alone: in these rows it is cut into other tokens",
        )


def _only_answers(evidence: Evidence) -> bool:
    """Is assistant_only_loss set, in the settings or in the arguments of the user's trainer?"""
    value = evidence.options.get("assistant_only_loss")
    if value is None and evidence.subject.build_trainer is not None:
        try:
            value = evidence.trainer().arguments.get("assistant_only_loss")
        except (NotAvailable, UserCodeError):
            return False
    return bool(value)


def _pairs(one: Seen) -> str:
    places = [i for i, label in enumerate(one.row.labels) if label != mask.IGNORED][:10]
    lines = [
        f"{i}: id {one.tokens.pieces(one.row.ids[i])!r}, label {one.tokens.pieces(one.row.labels[i])!r}" for i in places
    ]
    return f"{one.where}\n" + "\n".join(lines)


def _within_answers(evidence: Evidence, rows: list[Seen], place: str) -> Iterator[Finding]:
    masked, _ = _share(rows, lambda one: one.difference.missing and one.row.ids)
    kinds = {id(one): mask.control_masked(one.row, one.tokens, one.difference) for one in masked}
    digits = [one for one in masked if kinds[id(one)][1] or _numbers_alone(one)]
    control = [one for one in masked if kinds[id(one)][0]]
    if digits and len(digits) > 0.8 * len(masked):
        yield found(
            "L09",
            where=place,
            evidence=f"{_many(digits, rows)}: only digits carry loss\n{digits[0].told()}",
            cause="the mask lets numbers through and nothing else: labels, syntax and end token are not taught",
        )
        return
    if control and len(control) > 0.8 * len(masked):
        ended = sum(bool(one.difference.ends) for one in control)
        lines = f"{_many(control, rows)}: control tokens of the answer carry no loss" + (
            f", the end token neither in {ended}" if ended else ""
        )
        names = sorted({one.tokens.pieces(one.row.ids[i]) for one in control for i in one.difference.missing})
        lines += f" ({', '.join(names[:6])})\n{control[0].told()}"
        high = [one for one in control if mask.above_ordinary(one.row, one.tokens, one.difference)]
        if len(high) == len(control):
            yield found(
                "T04",
                where=place,
                evidence=f"vocab_size={control[0].tokens.ordinary}, len(tokenizer)={len(evidence.tokenizer)}\n{lines}",
                cause="exactly the ids at or above vocab_size are masked: control tokens lie there",
            )
            yield found(
                "L08",
                where=place,
                evidence=lines,
                certainty=0.9,
                cause="every special token is masked, those of the answer too",
                consequence_of="T04",
            )
        else:
            yield found("L08", where=place, evidence=lines, cause="special tokens are masked, those of the answer too")
        return
    yield from _ends(evidence, rows, place)
    if masked:
        worst = max(masked, key=lambda one: len(one.difference.missing))
        lengths = {len(one.difference.missing) for one in masked}
        shifted = len(masked) > 0.8 * len(rows)  # by one number of tokens everywhere, or by each row's own
        first, second = ("L04", "L05") if shifted and len(lengths) == 1 else ("L05", "L04")
        lines = (
            f"{_many(masked, rows)}: part of the answer carries no loss ({len(worst.difference.missing)} tokens here)"
        )
        cause = "the mask begins or ends at another place than the answer"
        yield found(first, where=place, evidence=f"{lines}\n{worst.told()}", cause=cause)
        if shifted:
            yield found(second, where=place, evidence=lines, cause=cause, certainty=0.6, consequence_of=first)


def _numbers_alone(one: Seen) -> bool:
    """Is all of the answer that carries loss made of digits and the signs between them, with letters masked?"""
    spans = [span for span in mask.find_answers(one.row, one.tokens) if span is not None]
    inside = [i for span in spans for i in range(span.start, span.stop)]
    hidden = set(one.difference.missing)
    kept = "".join(one.tokens.pieces(one.row.ids[i]) for i in inside if i not in hidden)
    lost = "".join(one.tokens.pieces(one.row.ids[i]) for i in hidden)
    return (
        any(sign.isdigit() for sign in kept)
        and not any(sign.isalpha() for sign in kept)
        and any(sign.isalpha() for sign in lost)
    )


def _ends(evidence: Evidence, rows: list[Seen], place: str) -> Iterator[Finding]:
    ends, share = _share(rows, lambda one: one.difference.ends)
    absent, absent_share = _share(rows, lambda one: one.difference.absent)
    if absent and absent_share > 0.5:
        yield found(
            "L01",
            where=place,
            evidence=f"{_many(absent, rows)}: no end token follows the answer\n{absent[0].told()}",
            cause="the text that is tokenised ends with the answer: neither template nor collator writes an end token",
        )
        return
    if not ends:
        return
    tokenizer = evidence.tokenizer
    names = sorted({name for one in ends for name in _end_names(one)})
    named = f"the end token {', '.join(names)}".rstrip()
    lines = f"{_many(ends, rows)}: {named} behind the answer carries no loss\n{ends[0].told()}"
    pad = getattr(tokenizer, "pad_token_id", None)
    same = pad is not None and all(pad in _end_ids(one) for one in ends)
    if same:
        yield found(
            "T08",
            where=place,
            evidence=f"pad_token={tokenizer.pad_token!r} (id {pad}) is the end token\n{lines}",
            cause="labels equal to the padding id are masked, and the end token has that id",
        )
    yield found(
        "L01",
        where=place,
        evidence=lines,
        certainty=0.9 if same else 1.0,
        cause="the mask ends before the end token"
        if share > 0.5
        else "the mask ends before the end token on some rows",
    )
    ordinary = ends[0].tokens.ordinary
    if (
        not same
        and names
        and ordinary is not None
        and all(one >= ordinary for row in ends for one in _end_ids(row))
        and not any(
            token in row.tokens.control
            for row in ends
            for span in mask.find_answers(row.row, row.tokens)
            if span is not None
            for token in row.row.ids[span.start : span.stop]
        )
    ):
        yield found(
            "T04",
            where=place,
            evidence=f"vocab_size={ordinary}, and the masked end token lies above it\n{lines}",
            certainty=0.5,
            cause="it may be masked because its id is not below vocab_size",
        )


def _end_ids(one: Seen) -> set[int]:
    """Return the ids of the end tokens behind the answers that carry no loss."""
    spans = (
        [span for span in mask.find_answers(one.row, one.tokens) if span is not None and span.end is not None]
        if one.row.ids
        else []
    )
    return {
        one.row.ids[span.end] for span in spans if span.end is not None and one.row.labels[span.end] == mask.IGNORED
    }


def _end_names(one: Seen) -> set[str]:
    return {one.tokens.pieces(token) for token in _end_ids(one)}


def _beyond_answers(evidence: Evidence, rows: list[Seen], place: str) -> Iterator[Finding]:
    """Explain supervised tokens outside of answers."""
    prompt, share = _share(rows, lambda one: one.prompt)
    pictures, _ = _share(rows, lambda one: one.difference.pictures)
    padding, _ = _share(rows, lambda one: one.difference.padding)
    if prompt:
        worst = max(prompt, key=lambda one: len(one.prompt) + len(one.difference.pictures))
        lines = (
            f"{_many(prompt, rows)}: {len(worst.prompt)} tokens of the prompt"
            + (f" and {len(worst.difference.pictures)} picture tokens" if worst.difference.pictures else "")
            + f" carry loss, {worst.difference.supervised} in all\n{worst.told()}"
        )
        if share <= 0.8:
            yield found(
                "L05",
                where=place,
                evidence=lines,
                cause="the answer is not found at its place in these rows, and in the others it is",
            )
            return
        only_answers = _only_answers(evidence)
        if only_answers:
            yield found(
                "L12",
                where="assistant_only_loss=True",
                evidence=lines,
                cause="the option is set and the collator that is used does not obey it",
            )
        whole = all(_first_real(one) in {*one.prompt, *one.difference.pictures} for one in prompt)
        yield found(
            "L04",
            where=place,
            evidence=lines,
            certainty=0.9 if only_answers else 1.0,
            cause="nothing of the prompt is masked"
            if whole
            else "the measured prompt is shorter than that of the row (pictures not expanded, another system message)",
        )
        if only_answers:
            return
        image = evidence.image_token_id()
        heavy = (
            [one for one in pictures if any(one.row.ids[i] == image for i in one.difference.pictures)]
            if image is not None
            else pictures
        )
        if heavy:
            yield found(
                "L03",
                where=place,
                evidence=f"{_many(pictures, rows)} with loss on picture tokens "
                f"({len(pictures[0].difference.pictures)} here)\n{pictures[0].told()}",
                cause="picture tokens carry loss together with the prompt",
                certainty=1.0 if whole else 0.7,
            )
        elif whole:
            same = mask.constant_share([one.row for one in rows])
            if same > 0.4:
                yield found(
                    "L07",
                    where=place,
                    evidence=f"{100 * same:.0f} % of the tokens with loss are the same in all {len(rows)} rows\n{worst.told()}",
                    cause="the loss is an average over mostly constant tokens of the prompt, which are learnt at once",
                )
        return
    if pictures or padding:
        hits = pictures or padding
        what = "picture" if pictures else "padding"
        yield found(
            "L03",
            where=place,
            evidence=f"{_many(hits, rows)} with loss on {what} tokens\n{hits[0].told()}",
            cause=f"{what} tokens are not masked",
        )
        return
    header, share = _share(rows, lambda one: one.header)
    if header and share > 0.5:
        yield found(
            "L04",
            where=place,
            evidence=f"{_many(header, rows)}: the header of the answer's turn carries loss\n{header[0].told()}",
            cause="the prompt was measured without the generation prompt: a few constant tokens are taught beside the answer",
            severity=2,
            certainty=0.7,
        )


def _first_real(one: Seen) -> int:
    return next((i for i, real in enumerate(one.row.mask) if real), 0)


def _only_padded(wrong: list[Seen], place: str) -> Iterator[Finding]:
    padding = [one for one in wrong if one.difference.padding]
    other = [
        one
        for one in wrong
        if one.prompt
        or one.difference.missing
        or one.difference.ends
        or one.difference.none
        or one.difference.pictures
        or one.difference.other
        or one.difference.shifted
    ]
    if other:
        left = any(one.row.mask and not one.row.mask[0] for one in other)
        yield found(
            "L10",
            where=place,
            evidence=f"right alone, wrong in a batch padded on the {'left' if left else 'right'}\n{other[0].told()}",
            cause="the mask counts from position 0, and padding has moved the row"
            if left
            else "the mask is right for one row alone",
        )
        if left:
            yield found(
                "T07",
                where=place,
                evidence="the rows are padded on the left in training",
                certainty=0.6,
                consequence_of="L10",
                cause="the collator's mask supposes that a row begins at position 0",
            )
    elif padding:
        yield found(
            "L03",
            where=place,
            evidence=f"{len(padding[0].difference.padding)} padding tokens carry loss\n{padding[0].told()}",
            cause="padding is not masked in a batch of rows of different length",
        )


def _turns(rows: list[Seen], second: Seen | None, place: str) -> Iterator[Finding]:
    """Explain a row of two turns that was made; the user's own were looked at before."""
    several = any(len(one.answers) > 1 for one in rows)
    if second is not None and not several and not second.difference.lost and len(second.answers) > 1:
        turns = second.difference.turns
        if not all(turns) and any(turns):
            only_last = turns[-1]
            yield _one_turn(
                second,
                "a row of yours with a second question; your own rows have one turn each",
                place,
                severity=1 if only_last else 2,
                certainty=0.4 if only_last else 0.8,
            )


def _one_turn(one: Seen, told: str, place: str, **more: Any) -> Finding:
    learnt = [i + 1 for i, turn in enumerate(one.difference.turns) if turn]
    return found(
        "L06",
        where=place,
        evidence=f"{told}: of {len(one.row.answers)} answers those of turn {learnt} carry loss\n{one.told()}",
        cause="the mask is made for one answer",
        **more,
    )


def of_stage(evidence: Evidence, letter: str) -> Iterator[Finding | Checked]:
    """Yield the verdict's findings of the ids that begin with a letter, and the figures for the others."""
    judged = verdict(evidence)
    told = {one.id for one in judged.findings}
    yield from (one for one in judged.findings if one.id.startswith(letter))
    yield from (looked(one, judged.figures) for one in IDS if one.startswith(letter) and one not in told)

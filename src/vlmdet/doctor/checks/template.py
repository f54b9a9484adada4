"""Checks of the stage template: the chat template, control tokens, padding and length, as the rows come out of them.

T04, T08 and T09 are part of the verdict on labels (`supervision`); T05 and T06 look at files (`saved`).

Long, because templates and tokens are looked at in every row of one stage.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from vlmdet.doctor.calls import NotAvailable, UserCodeError, call, place_of
from vlmdet.doctor.checks import Check, Outcome, check, found, looked, skipped, supervision
from vlmdet.doctor.evidence import PICTURE_WORDS, Evidence
from vlmdet.doctor.findings import Finding
from vlmdet.doctor.gather import conversations

WITHOUT_TEMPLATE = ("paligemma", "florence2", "")
"""Families whose processors need none, and an unknown one."""

MARKERS = re.compile(
    r"<\|(?:im_start|im_end|start_header_id|end_header_id|eot_id|begin_of_text|user|assistant|system|end|endoftext)\|>"
    r"|<(?:start_of_turn|end_of_turn|end_of_utterance)>|\[/?INST\]|<</?SYS>>"
)
"""What chat templates write around turns."""

FAMILY_MARKERS = {
    "qwen": "<|im_start|>",
    "internvl": "<|im_start|>",
    "idefics": "<end_of_utterance>",
    "smolvlm": "<end_of_utterance>",
}
REFERENCE_QUESTION = "Where is the cup?"
REFERENCE_ANSWER = "It is on the table"
CONTROL = re.compile(r"<\|[a-zA-Z0-9_]{1,40}\|>|<loc_?\d{1,4}>|</?(?:box|ref|quad|poly)>")
"""Strings of a target that are meant as single tokens."""


def _reference(picture: bool = True) -> list[dict[str, Any]]:
    question = [{"type": "text", "text": REFERENCE_QUESTION}]
    return [
        {"role": "user", "content": [{"type": "image"}, *question] if picture else question},
        {"role": "assistant", "content": [{"type": "text", "text": REFERENCE_ANSWER}]},
    ]


def has_template(evidence: Evidence) -> bool:
    """Has the processor or its tokenizer a chat template?"""
    return bool(
        getattr(evidence.need("processor"), "chat_template", None) or getattr(evidence.tokenizer, "chat_template", None)
    )


def generation_header(evidence: Evidence) -> str:
    """Return what the template adds to let the model answer, `<|im_start|>assistant` and a newline; "" where it adds nothing."""
    question = _reference()[:1]
    asked = evidence.render_text(question, generation_prompt=True)
    plain = evidence.render_text(question)
    return asked[len(plain) :] if asked.startswith(plain) else ""


@check("T01", needs=("processor",))
def chat_template(evidence: Evidence) -> Outcome:
    """Render a reference conversation, and look whether turns are marked by tokens that the tokenizer knows."""
    family = evidence.family()
    ids = _some_ids(evidence)
    if not has_template(evidence):
        if any(family.startswith(one) for one in WITHOUT_TEMPLATE if one) or not family:
            if family:
                yield looked("T01", f"{family} has no chat template, and needs none")
                return
            raise NotAvailable("a chat template, or the model's type")
        marker = _marker_of(family)
        if ids is not None and marker and marker in evidence.tokenizer.decode(ids):
            yield looked("T01", "the processor has no template, and the collator writes the markers itself")
            return
        yield found(
            "T01",
            where="processor.chat_template",
            evidence=f"neither the processor nor its tokenizer has a chat template; family {family}",
            cause="the processor of a pretrained base, or one that was saved without its template",
        )
        return
    problem = _template_problem(evidence, family)
    if problem is None and ids is not None:
        marker = _marker_of(family)
        text = evidence.tokenizer.decode(ids, skip_special_tokens=False)
        if marker and evidence.tokenizer.convert_tokens_to_ids(marker) not in ids:
            problem = (
                "the collator builds its text without the chat template",
                f"no {marker} among the ids of a row:\n{text[:400]}",
            )
    if problem is not None:
        cause, shown = problem
        yield found("T01", where="processor.chat_template", evidence=shown, cause=cause)
    else:
        yield looked("T01", f"a reference conversation renders to {evidence.render_text(_reference())[:300]!r}")


def _marker_of(family: str) -> str | None:
    return next(
        (marker for name, marker in FAMILY_MARKERS.items() if family.startswith(name) and family != "qwen_vl"), None
    )


def _template_problem(evidence: Evidence, family: str) -> tuple[str, str] | None:
    """Return cause and evidence of what is wrong with the template itself."""
    text = evidence.render_text(_reference())
    shown = f"a reference conversation is rendered as\n{text[:600]}"
    tokenizer = evidence.tokenizer
    for wanted, what in ((REFERENCE_QUESTION, "question"), (REFERENCE_ANSWER, "answer")):
        if wanted not in text:
            return f"the template leaves out the {what}", shown
    if "'type': 'text'" in text or '"type": "text"' in text:
        return "the template writes the list of parts as Python shows it: it is one for text alone", shown
    unknown = sorted(
        {one for one in MARKERS.findall(text) if one.startswith("<") and len(_pieces(tokenizer, one)) != 1}
    )
    known = _marker_of(family)
    if unknown and not (known and known in text and len(_pieces(tokenizer, known)) == 1):  # its own marks are there
        return (
            f"the template writes {', '.join(unknown)}, which this tokenizer cuts into pieces: it belongs to another family",
            shown,
        )
    marker = _marker_of(family)
    if marker and marker not in text:
        return f"the template writes no {marker}, which {family} was trained with", shown
    image = evidence.image_token_id()
    if image is not None and marker and not any(word in text for word in PICTURE_WORDS if word in evidence.control()):
        return "the template puts no picture where a message has one", shown
    behind = text[text.rindex(REFERENCE_ANSWER) + len(REFERENCE_ANSWER) :].lstrip()
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"] if behind else []
    if marker and (not ids or ids[0] not in evidence.end_ids()):
        return "the template writes no end token behind an answer", shown
    return None


def _pieces(tokenizer: Any, word: str) -> list[int]:
    return list(tokenizer(word, add_special_tokens=False)["input_ids"])


def _some_ids(evidence: Evidence) -> list[int] | None:
    """Return the ids of one row of the user's collator; None where there is none."""
    if evidence.subject.collate is None:
        return None
    try:
        return next((batch.ids[0] for batch in evidence.batches().values() if batch.ids), None)
    except (NotAvailable, UserCodeError):
        return None


@check("T02", needs=("rows|splits", "processor", "collate"))
def doubled(evidence: Evidence) -> Outcome:
    """Look for two equal begin, end or turn marks one after the other."""
    tokenizer = evidence.tokenizer
    names = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
    watched = {value for name in names if isinstance(value := getattr(tokenizer, name, None), int)} | set(
        evidence.end_ids()
    )
    watched |= {one for word, one in evidence.control().items() if MARKERS.fullmatch(word)}
    watched -= evidence.picture_ids()
    hits: dict[str, str] = {}
    rows = 0
    for batch in evidence.batches().values():
        for where, ids, real in zip(batch.where, batch.ids, batch.mask, strict=False):
            rows += 1
            kept = [one for one, on in zip(ids, real, strict=True) if on]
            kept = _without_padding(kept, getattr(tokenizer, "pad_token_id", None))
            for i in range(len(kept) - 1):
                if kept[i] == kept[i + 1] and kept[i] in watched:
                    hits.setdefault(where, tokenizer.decode(kept[max(0, i - 8) : i + 10], skip_special_tokens=False))
                    break
    if hits:
        where, text = next(iter(hits.items()))
        yield found(
            "T02",
            where=place_of(evidence.subject.collate),
            evidence=f"{len(hits)} rows, e.g. {where}: … {text} …",
            cause="the template writes the token, and the tokenizer or the collator adds it once more",
        )
    else:
        yield looked("T02", f"{rows} rows of batches, no begin, end or turn token twice in a row")


def _without_padding(ids: list[int], pad: int | None) -> list[int]:
    """Cut runs of two or more padding tokens off both ends, for batches whose mask does not tell."""
    start, stop = 0, len(ids)
    while pad is not None and stop - start > 1 and ids[stop - 1] == pad and ids[stop - 2] == pad:
        stop -= 1
    while pad is not None and stop - start > 1 and ids[start] == pad and ids[start + 1] == pad and pad != ids[stop - 1]:
        start += 1
    return ids[start:stop]


@check("T03", needs=("rows|splits", "processor"))
def control_strings(evidence: Evidence) -> Outcome:
    """Encode each control string of the targets: it must be one token, also in the collator's ids."""
    tokenizer = evidence.tokenizer
    strings: dict[str, int] = {}
    for text in evidence.targets():
        for one in set(CONTROL.findall(text)):
            strings[one] = strings.get(one, 0) + 1
    if not strings:
        yield looked("T03", "targets hold no control strings")
        return
    split = {one: pieces for one in strings if len(pieces := _pieces(tokenizer, one)) != 1}
    sure = {one: pieces for one, pieces in split.items() if not re.fullmatch(r"</?[a-z]+>", one)}
    for chosen, severity in ((sure, 4), (split, 2)):
        if chosen:
            lines = [
                f"{one} → {' | '.join(tokenizer.decode([i]) for i in pieces)}  ({strings[one]} targets)"
                for one, pieces in list(chosen.items())[:6]
            ]
            yield found(
                "T03",
                where="processor.tokenizer",
                evidence=f"{len(chosen)} of {len(strings)} control strings\n" + "\n".join(lines),
                cause="this tokenizer does not know them: it is that of another model, or they were never added",
                severity=severity,
            )
            return
    row = _lost_in_batch(evidence, strings)
    if row is not None:
        yield row
        return
    yield looked(
        "T03", f"{len(strings)} control strings of the targets, each one token: {', '.join(sorted(strings)[:6])}"
    )


def _lost_in_batch(evidence: Evidence, strings: dict[str, int]) -> Finding | None:
    """Find a row of the collator whose answer has a control string, and whose ids have its letters but not its token."""
    if evidence.subject.collate is None:
        return None
    try:
        batches = evidence.batches()
    except (NotAvailable, UserCodeError):
        return None
    tokenizer = evidence.tokenizer
    for batch in batches.values():
        for where, answers, ids in zip(batch.where, batch.answers, batch.ids, strict=False):
            for one in strings:
                token = _pieces(tokenizer, one)[0]
                if (
                    one in "".join(answers)
                    and token not in ids
                    and one in (text := tokenizer.decode(ids, skip_special_tokens=False))
                ):
                    at = text.index(one)
                    return found(
                        "T03",
                        where=place_of(evidence.subject.collate),
                        evidence=f"{where}: {one} is one token (id {token}), and the collator's ids spell it out:\n"
                        f"… {text[max(0, at - 80) : at + 80]} …",
                        cause="the collator tokenises with another tokenizer, or with split_special_tokens",
                    )
    return None


@check("T04", "T08", "T09", needs=("rows|splits|build_trainer", "processor|build_trainer", "collate|build_trainer"))
def masks_by_token(evidence: Evidence) -> Outcome:
    """What the verdict on labels says of vocab_size, of padding that is the end token, and of rows that are cut."""
    yield from supervision.of_stage(evidence, "T")


@check("T09", needs=("settings", "rows|splits", "processor"))
def length_set(evidence: Evidence) -> Outcome:
    """Compare max_length with the lengths of rows as the processor makes them, where there is no collator to ask."""
    if evidence.subject.collate is not None or evidence.subject.build_trainer is not None:
        return  # what these cut is seen in their rows
    limit = evidence.options.number("max_length")
    if limit is None:
        raise NotAvailable("collate, or max_length in the settings")
    lengths = []
    examples = sorted(evidence.examples(), key=lambda one: -len(one.answer))[:12]
    for one in examples:
        pictures = one.open()
        text = evidence.render_text(conversations.bare(one.messages))
        made = call("model", evidence.subject.processor, text=[text], images=[pictures] if pictures else None)
        lengths.append(len(made["input_ids"][0]))
    over = sum(length > limit for length in lengths)
    told = f"{evidence.options.shown('max_length')}; {len(lengths)} rows have up to {max(lengths)} tokens with their pictures"
    if over:
        yield found(
            "T09",
            where=evidence.options.shown("max_length"),
            evidence=f"{told}; {over} are longer",
            cause="rows are cut where they are longer than the limit: their answers, which come last, first of all",
            certainty=0.9,
        )
    else:
        yield looked("T09", told)


@check("T07", needs=("settings|processor",))
def padding_side(evidence: Evidence) -> Outcome:
    """Look on which side prompts are padded where answers are generated in batches."""
    options = evidence.options
    tokenizer_side = (
        getattr(evidence.tokenizer, "padding_side", None) if evidence.subject.processor is not None else None
    )
    batch = next(
        (
            value
            for phase in ("eval", "callback", "base")
            if (value := options.number("per_device_train_batch_size", phase=phase)) is not None
        ),
        options.number("per_device_eval_batch_size"),
    )
    for phase in ("eval", "callback", "base", "serve"):
        side = options.get("padding_side", phase=phase)
        if side == "right" and (batch is None or batch > 1):
            yield found(
                "T07",
                where=options.shown("padding_side", phase=phase),
                cause="generation goes on behind the padding of the shorter prompts",
                evidence=f"{options.shown('padding_side', phase=phase)}"
                + (f", batches of {batch:.0f}" if batch else ""),
            )
            return
        if side == "left":
            yield looked("T07", options.shown("padding_side", phase=phase))
            return
    side = options.get("padding_side")
    generates = "max_new_tokens" in options
    if side == "right" and generates and batch is not None and batch > 1:
        yield found(
            "T07",
            where=options.shown("padding_side"),
            certainty=0.7,
            cause="the same side is used where answers are generated in batches",
            evidence=f"{options.shown('padding_side')}, {options.shown('max_new_tokens')}, batches of {batch:.0f} in evaluation",
        )
    elif side is None and tokenizer_side == "right" and generates and batch is not None and batch > 1:
        yield found(
            "T07",
            where="processor.tokenizer.padding_side",
            certainty=0.5,
            severity=2,
            cause="unless the evaluation sets the side itself, generation goes on behind the padding of the shorter prompts",
            evidence=f"padding_side='right', {options.shown('max_new_tokens')}, batches of {batch:.0f} in evaluation",
        )
    elif side is None and batch is None and not generates:
        yield skipped("T07", "padding side and batch size of the evaluation in the settings")
    else:
        yield looked(
            "T07",
            f"padding_side={side or tokenizer_side!r}, batches of {int(batch) if batch else 'unknown size'} in evaluation",
        )


@check("T10", needs=("processor", "rows|splits"))
def generation_prompt(evidence: Evidence) -> Outcome:
    """The question at inference ends with the header of the answer's turn; a row of training does not."""
    if not has_template(evidence):
        raise NotAvailable("a chat template")
    header = generation_header(evidence).strip()
    if not header:
        yield looked("T10", "the template writes no header before an answer")
        return
    seen: list[str] = []
    yield from _trained_header(evidence, header, seen)
    flag = evidence.options.get("add_generation_prompt", phase="eval")
    flag = flag if flag is not None else evidence.options.get("add_generation_prompt", phase="serve")
    if flag is False:
        yield found(
            "T10",
            where="add_generation_prompt=False",
            evidence="settings of inference: add_generation_prompt=False",
            cause="the model must first write the header of its own turn",
        )
        return
    if evidence.subject.render is not None:
        asked = evidence.asked()
        whole = [one for one in asked if isinstance(one.raw, str)]
        without = [one for one in whole if not one.text.rstrip().endswith(header)]
        if without and len(without) > len(whole) / 2:
            yield found(
                "T10",
                where=place_of(evidence.subject.render),
                cause="add_generation_prompt is not set at inference",
                evidence=f"{without[0].where}: the question ends with …{without[0].text[-80:]!r}\nshould end with {header!r}",
            )
            return
        if whole:
            seen.append(f"{len(whole)} questions of inference end with {header!r}")
    if not seen:
        raise NotAvailable("collate, or a render that returns text")
    yield looked("T10", "; ".join(seen))


def _trained_header(evidence: Evidence, header: str, seen: list[str]) -> Iterator[Finding]:
    """Look whether rows of training end with an open turn."""
    if evidence.subject.collate is None:
        return
    tokenizer = evidence.tokenizer
    rows = open_turn = 0
    shown = ""
    for batch in evidence.batches().values():
        for where, ids, real in zip(batch.where, batch.ids, batch.mask, strict=False):
            kept = _without_padding(
                [one for one, on in zip(ids, real, strict=True) if on], getattr(tokenizer, "pad_token_id", None)
            )
            text = tokenizer.decode(kept[-40:], skip_special_tokens=False)
            pad = getattr(tokenizer, "pad_token", None)
            text = text.rstrip().removesuffix(pad or "\0").rstrip()
            rows += 1
            if text.endswith(header):
                open_turn += 1
                shown = shown or f"{where}: the row ends with …{text[-120:]!r}"
    if rows and open_turn > rows / 2:
        yield found(
            "T10",
            where=place_of(evidence.subject.collate),
            evidence=f"{open_turn} of {rows} rows\n{shown}",
            cause="add_generation_prompt is set in training: an empty turn follows each answer",
        )
    else:
        seen.append(f"{rows} rows of training end with their answer's turn")


CHECKS: tuple[Check, ...] = (
    chat_template,
    doubled,
    control_strings,
    masks_by_token,
    length_set,
    padding_side,
    generation_prompt,
)

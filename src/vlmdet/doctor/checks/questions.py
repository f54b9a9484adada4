"""The question of training against that of inference, and against the format of the target.

When: for C02, C03 and C04. A question that varies from row to row (labels, paraphrases) is compared with that
of the same row, then with all questions of training.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vlmdet.doctor.calls import NotAvailable, UserCodeError, place_of
from vlmdet.doctor.checks import found, looked
from vlmdet.doctor.evidence import Asked, Evidence
from vlmdet.doctor.findings import Checked, Finding
from vlmdet.doctor.gather.conversations import Example, is_picture, parts_of, text_of
from vlmdet.doctor.gather.text_boxes import syntax_of

PROBE = "⁂"
"""Stands for a question in a reference conversation."""


@dataclass(frozen=True)
class Question:
    """What the model is told before it answers: effective system text, user text, and where the pictures stand in it."""

    system: str
    user: str
    order: tuple[bool, ...]


def default_system(evidence: Evidence) -> str:
    """Return what the template writes before a first user turn: the default system message of some families."""
    if evidence.subject.processor is None:
        return ""
    try:
        text = evidence.render_text([{"role": "user", "content": [{"type": "text", "text": PROBE}]}])
        again = evidence.render_text(
            [
                {"role": "system", "content": [{"type": "text", "text": PROBE}]},
                {"role": "user", "content": [{"type": "text", "text": PROBE}]},
            ]
        )
    except (UserCodeError, NotAvailable):
        return ""
    head, _, rest = again.partition(PROBE)
    middle = rest.partition(PROBE)[0]
    before = text.partition(PROBE)[0]
    if middle and before.startswith(head) and before.endswith(middle) and len(before) > len(head) + len(middle):
        return before[len(head) : len(before) - len(middle)].strip()
    return ""


def question_of(messages: Sequence[dict[str, object]], default: str) -> Question:
    """Read the question of a conversation: all but its last answers."""
    roles = [(str(one.get("role", one.get("from", ""))), one) for one in messages]
    while roles and roles[-1][0] in ("assistant", "model", "gpt"):
        roles.pop()
    system = next((text_of(one).strip() for role, one in roles if role == "system"), default)  # "" is written as it is
    users = [one for role, one in roles if role in ("user", "human")]
    order = tuple(is_picture(part) for one in users for part in parts_of(one) if is_picture(part) or part.get("text"))
    return Question(system, "".join(text_of(one) for one in users[-1:]).strip(), order)


def compare(evidence: Evidence, place: str) -> Iterator[Finding | Checked]:
    """Yield C02 and C03 where system message or user text differ between training and inference."""
    examples = evidence.examples()
    default = default_system(evidence)
    trained = {one.index: question_of(one.messages, default) for one in examples}
    told: dict[str, Finding] = {}
    seen: list[str] = []
    if evidence.subject.render is not None:
        asked = [one for one in evidence.asked() if one.index in trained]
        if asked:
            seen.append(f"{len(asked)} questions of render")
            for one in _rendered(evidence, examples, asked, trained, default):
                told.setdefault(one.id, one)
    for one in _settings(evidence, trained, seen, place):
        told.setdefault(one.id, one)
    if not seen:
        raise NotAvailable("render, or system_prompt and user_prompt of training and evaluation in the settings")
    yield from told.values()
    for identifier in ("C02", "C03"):
        if identifier not in told:
            yield looked(identifier, f"{'; '.join(seen)}: as in training")


def _rendered(
    evidence: Evidence, examples: Sequence[Example], asked: Sequence[Asked], trained: dict[int, Question], default: str
) -> Iterator[Finding]:
    where = place_of(evidence.subject.render)
    with_messages = [one for one in asked if one.messages]
    if with_messages:
        pairs = [(one, trained[one.index], question_of(one.messages, default)) for one in with_messages]
        for identifier, name in (("C02", "system"), ("C03", "user")):
            every = {getattr(question, name) for question in trained.values()}
            differ = [
                pair
                for pair in pairs
                if getattr(pair[1], name) != getattr(pair[2], name) and getattr(pair[2], name) not in every
            ]
            if len(differ) > 0.05 * len(pairs):
                one, train, infer = differ[0]
                yield found(
                    identifier,
                    where=where,
                    cause=_cause(getattr(train, name), getattr(infer, name), name),
                    evidence=f"{len(differ)} of {len(pairs)} rows, e.g. {one.where}\ntraining   {getattr(train, name)!r}\n"
                    f"inference  {getattr(infer, name)!r}{_default_note(evidence, one, name)}",
                )
                return
        orders = {question.order for question in trained.values()}
        moved = [
            pair
            for pair in pairs
            if pair[2].order != pair[1].order and pair[2].order not in orders and any(pair[2].order)
        ]
        if len(moved) > len(pairs) / 2:
            one, train, infer = moved[0]
            yield found(
                "C03",
                where=where,
                cause="the picture stands at another place among the texts",
                evidence=f"{len(moved)} of {len(pairs)} rows; training {_order(train)}, inference {_order(infer)}",
            )
        return
    yield from _whole_texts(evidence, examples, asked, where)


def _order(question: Question) -> str:
    return ", ".join("picture" if one else "text" for one in question.order)


def _cause(train: str, infer: str, name: str) -> str:
    what = "system message" if name == "system" else "question"
    if train and not infer:
        return f"there is a {what} in training and none at inference"
    if infer and not train:
        return f"there is a {what} at inference and none in training"
    if train in infer or infer in train:
        return f"a sentence of the {what} is there on one side only"
    return f"the {what} is written in two places, and they have come apart"


def _default_note(evidence: Evidence, one: Asked, name: str) -> str:
    if name != "system" or not one.text or any(message.get("role") == "system" for message in one.messages):
        return ""
    return f"\n(no system message in the row; the template writes: {one.text[:120]!r})"


def _whole_texts(
    evidence: Evidence, examples: Sequence[Example], asked: Sequence[Asked], where: str
) -> Iterator[Finding]:
    """Compare whole texts, where `render` returns text: up to the answer they must be equal."""
    texts = dict(zip((one.index for one in examples), evidence.texts(), strict=True))
    answers = {one.index: one.answer.strip() for one in examples}
    prefixes = {
        index: text[: text.rfind(answers[index])] if answers[index] and answers[index] in text else text
        for index, text in texts.items()
    }
    flat = {" ".join(prefix.split()) for prefix in prefixes.values()}
    differ = [one for one in asked if " ".join(one.text.split()) not in flat]
    header = _header(evidence)
    differ = [
        one for one in differ if not any(_same_without(" ".join(one.text.split()), prefix, header) for prefix in flat)
    ]
    if len(differ) <= 0.05 * len(asked):
        return
    one = differ[0]
    train = prefixes[one.index]
    marks = _system_of(train), _system_of(one.text)
    ids = []
    if marks[0] != marks[1]:
        ids.append("C02")
    if marks == (None, None) or _without_system(train) != _without_system(one.text):
        ids.append("C03")
    shown = "\n".join(
        difflib.unified_diff(train.splitlines(), one.text.splitlines(), "training", "inference", lineterm="", n=1)
    )
    for identifier in ids or ["C03"]:
        yield found(
            identifier,
            where=where,
            evidence=f"{len(differ)} of {len(asked)} rows, e.g. {one.where}\n{shown[:900]}",
            cause="the text at inference is not that of training up to the answer",
        )


def _header(evidence: Evidence) -> str:
    from vlmdet.doctor.checks.template import generation_header

    try:
        return generation_header(evidence).strip()
    except (UserCodeError, NotAvailable):
        return ""


def _same_without(text: str, prefix: str, header: str) -> bool:
    """Are two texts equal but for a generation header (which is T10's)?"""
    return bool(header) and text.removesuffix(header).strip() == prefix.removesuffix(header).strip()


_SYSTEM = re.compile(r"<\|im_start\|>system\s(.*?)<\|im_end\|>", re.DOTALL)


def _system_of(text: str) -> str | None:
    match = _SYSTEM.search(text)
    return match.group(1).strip() if match else None


def _without_system(text: str) -> str:
    return " ".join(_SYSTEM.sub("", text).split())


def _settings(evidence: Evidence, trained: dict[int, Question], seen: list[str], place: str) -> Iterator[Finding]:
    """Compare prompts of the settings by phase with those of training: as converted, and as set."""
    options = evidence.options
    for option, identifier, name in (("system_prompt", "C02", "system"), ("user_prompt", "C03", "user")):
        every = {getattr(question, name) for question in trained.values()}
        set_for_training = options.get(option, phase="train")
        for phase in ("eval", "callback"):
            value = options.get(option, phase=phase)
            if value is None:
                continue
            value = str(value).strip()
            seen.append(options.shown(option, phase=phase)[:80])
            if value in every or (set_for_training is not None and value == str(set_for_training).strip()):
                continue
            if "{" in value and any(_fits(value, one) for one in every):
                continue
            example = next(iter(every), "")
            yield found(
                identifier,
                where=options.shown(option, phase=phase)[:160],
                cause=_cause(example, value, name),
                evidence=f"training   {example!r} (from {place})\n{phase:<10} {value!r}",
            )
            break


def _fits(pattern: str, text: str) -> bool:
    """Does a text fit a prompt with `{names}` in it?"""
    parts = [re.escape(one) for one in re.split(r"\{[^{}]*\}", pattern)]
    return re.fullmatch("(?:.{0,2000})".join(parts), text, re.DOTALL) is not None


# ---- C04 ------------------------------------------------------------------------------------------------------------

NATIVE: dict[str, tuple[str, ...]] = {
    "qwen2_vl": ("qwen2_vl", "json"),
    "qwen2_5_vl": ("json",),
    "qwen3_vl": ("json",),
    "paligemma": ("paligemma",),
    "florence2": ("florence2",),
    "internvl": ("internvl", "json"),
}
"""Family to the syntaxes that it was pretrained with."""

_JSON = re.compile(r"\bJSON\b", re.IGNORECASE)
_KEYS = re.compile(r"[\"'`](bbox_2d|bbox|box_2d|box|boxes)[\"'`]|\b(bbox_2d|box_2d)\b")
_ORDERS = (
    (
        "xywh",
        re.compile(
            r"\[?\(?\s*x(?:_?min|1)?\s*,\s*y(?:_?min|1)?\s*,\s*w(?:idth)?\s*,\s*h(?:eight)?\b|\bxywh\b", re.IGNORECASE
        ),
    ),
    (
        "cxcywh",
        re.compile(
            r"\bc(?:enter_?)?x\s*,\s*c(?:enter_?)?y\s*,\s*w|x_?center\s*,\s*y_?center|\bcxcywh\b", re.IGNORECASE
        ),
    ),
    (
        "yxyx",
        re.compile(
            r"\[?\(?\s*y_?(?:min|1)\s*,\s*x_?(?:min|1)\s*,\s*y_?(?:max|2)|\byxyx\b|top\s*,\s*left\s*,\s*bottom\s*,\s*right",
            re.IGNORECASE,
        ),
    ),
    (
        "xyxy",
        re.compile(
            r"x_?(?:min|1)\s*,\s*y_?(?:min|1)\s*\)?\s*,\s*\(?\s*x_?(?:max|2)|\bxyxy\b|left\s*,\s*top\s*,\s*right\s*,\s*bottom",
            re.IGNORECASE,
        ),
    ),
)
_UNITS = (
    (
        "fraction",
        re.compile(
            r"\b(?:between|from|range|in|to)\s*:?\s*[\[(]?\s*0(?:\.0)?\s*(?:and|to|-|–|,)\s*1(?:\.0)?\b(?!\d|[.,]\d)"
            r"|\b0\s*-\s*1\b(?!\d)",
            re.IGNORECASE,
        ),
    ),
    (
        "per_mille",
        re.compile(r"\b0\s*(?:and|to|-|–|,)\s*(?:1[,.]?000|999)\b|\b1000\s*[x×]\s*1000\b|per[- ]mille", re.IGNORECASE),
    ),
    ("pixel", re.compile(r"\bpixels?\b|absolute coordinates", re.IGNORECASE)),
)
_TAGS = re.compile(r"<\|box_start\|>|<loc_?\d*>|<box>", re.IGNORECASE)
_PAREN = re.compile(r"\(\s*x_?1?(?:min)?\s*,\s*y_?1?(?:min)?\s*\)\s*,?\s*\(", re.IGNORECASE)
_LIST = re.compile(r"\[\s*(?:x|y|left)_?(?:1|min)?\s*,\s*\w+\s*,\s*\w+\s*,\s*\w+\s*\]", re.IGNORECASE)


def format_of(evidence: Evidence, examples: Sequence[Example], place: str) -> Iterator[Finding | Checked]:
    """Yield C04 where the question asks for another format than the target has, or the target is foreign to the family."""
    clashes = [(one, clash) for one in examples if (clash := _clash(evidence, one))]
    if len(clashes) > len(examples) / 2:
        one, clash = clashes[0]
        yield found(
            "C04",
            where=place,
            cause=f"the question asks for {clash[0]}, and the target is {clash[1]}",
            evidence=f"{len(clashes)} of {len(examples)} rows, e.g. {one.where}\n"
            f"question  {((one.system or '') + ' ' + one.prompt).strip()[:500]!r}\n"
            f"target    {one.answer[:300]!r}",
        )
        return
    family = evidence.family()
    syntaxes = sorted({str(syntax_of(one.answer)) for one in examples})
    native = next((value for name, value in NATIVE.items() if family.startswith(name)), None)
    foreign = [
        one
        for one in examples
        if syntax_of(one.answer) in ("parentheses", "qwen_vl", "internvl", "paligemma", "florence2", "qwen2_vl")
    ]
    foreign = [one for one in foreign if native is not None and syntax_of(one.answer) not in native]
    if len(foreign) > len(examples) / 2 and native is not None:
        one = foreign[0]
        yield found(
            "C04",
            where=place,
            severity=2,
            certainty=0.8,
            cause=f"{family} was pretrained to write boxes as {' or '.join(native)}",
            evidence=f"{len(foreign)} of {len(examples)} targets are written as {syntax_of(one.answer)}, "
            f"e.g. {one.where}: {one.answer[:200]!r}",
        )
        return
    yield looked(
        "C04", f"{len(examples)} targets with boxes ({', '.join(syntaxes)}); no question asks for another format"
    )


def _clash(evidence: Evidence, one: Example) -> tuple[str, str] | None:
    """Return what the question asks for and what the target is, where these differ."""
    asked = f"{one.system or ''}\n{one.prompt}"
    syntax = syntax_of(one.answer)
    structured = one.answer.strip().removeprefix("```json").strip().startswith(("[", "{"))
    if _JSON.search(asked) and not structured and syntax != "json":
        return "JSON", f"no JSON ({syntax})"
    keys = {first or second for first, second in _KEYS.findall(asked)}
    used = {
        key for key in ("bbox_2d", "bbox", "box_2d", "box", "boxes") if re.search(rf"[\"']{key}[\"']\s*:", one.answer)
    }
    if keys and used and not keys & used:
        return f"the key {sorted(keys)[0]!r}", f"written with {sorted(used)[0]!r}"
    tags = {re.sub(r"\d|_", "", tag.lower()) for tag in _TAGS.findall(asked)}
    if tags and not any(tag in re.sub(r"\d|_", "", one.answer.lower()) for tag in tags) and structured:
        return " and ".join(sorted(tags)), f"written as {syntax}"
    if _PAREN.search(asked) and structured and "(" not in one.answer:
        return "points in parentheses", f"written as {syntax}"
    if _LIST.search(asked) and syntax in ("qwen2_vl", "paligemma", "florence2", "parentheses", "qwen_vl"):
        return "a list [x1, y1, x2, y2]", f"written as {syntax}"
    return _space_clash(evidence, asked)


def _space_clash(evidence: Evidence, asked: str) -> tuple[str, str] | None:
    try:
        space = evidence.space()
    except (NotAvailable, UserCodeError):
        return None
    if space is None or space.iou < 0.8:
        return None
    other = space.runner_up.replace("resized", "pixel").replace("bins", "per_mille")
    if space.iou - space.runner_up_iou < 0.1 and other != str(space).replace("resized", "pixel").replace(
        "bins", "per_mille"
    ):
        return None  # two readings do as well, and they differ
    orders = [name for name, pattern in _ORDERS if pattern.search(asked)]
    if len(orders) == 1 and orders[0] != space.order:
        return f"boxes as {orders[0]}", f"written as {space.order}"
    units = [name for name, pattern in _UNITS if pattern.search(asked)]
    same = {"bins": "per_mille", "resized": "pixel"}.get(space.unit, space.unit)
    if len(units) == 1 and units[0] != same and space.unit in ("per_mille", "bins", "fraction", "pixel", "resized"):
        return f"numbers in {units[0]}", f"in {space.unit}"
    return None

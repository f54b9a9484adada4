"""Converted examples in one form, whatever the user's converter returns.

When: after `annotations`. No torch. A converted row is `{"messages": […], "image" | "images": …}`, or TRL's `{"prompt": […],
"completion": […], "images": […]}`; contents are text or lists of parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from vlmdet.doctor.calls import NotAvailable
from vlmdet.doctor.gather.annotations import open_stored
from vlmdet.images import BROKEN, to_upright_rgb

PICTURE_TYPES = ("image", "image_url", "img")
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Example:
    """One converted row.

    Attributes:
        where: `train[3] (a.jpg)`; index: of its annotation.
        raw: what the converter returned.
        messages: all turns, as the user's converter wrote them.
        system, prompt, answer: texts of the first system turn, the last user turn and the last assistant turn.
        answers: texts of all assistant turns.
    """

    where: str
    index: int
    raw: Any = field(repr=False)
    messages: Messages = field(repr=False)
    system: str | None
    prompt: str
    answer: str
    answers: tuple[str, ...]

    @property
    def written(self) -> str:
        """Answers of all turns, one a line: what is learnt of the row."""
        return "\n".join(self.answers)

    @property
    def questions(self) -> str:
        """Questions of all turns, one a line."""
        return "\n".join(
            text_of(one) for one in self.messages if str(one.get("role", one.get("from", ""))) in ("user", "human")
        )

    @property
    def pictures(self) -> list[Any]:
        """Pictures as the converter gave them: beside the messages, else those within them."""
        return pictures_of(self.raw)

    def open(self) -> list[Image.Image]:
        """Open the pictures upright and RGB; those that cannot be opened are left out."""
        opened = []
        for one in self.pictures:
            try:
                opened.append(to_upright_rgb(open_stored(one)))
            except (*BROKEN, AttributeError):
                continue
        return opened


def make_example(raw: Any, where: str, index: int) -> Example:
    """Read what a converter returned.

    Raises:
        NotAvailable: it holds no conversation.
    """
    messages = messages_of(raw)
    if not messages:
        raise NotAvailable("a converter that returns messages")
    texts = [(str(one.get("role", one.get("from", ""))), text_of(one)) for one in messages]
    answers = tuple(text for role, text in texts if role in ("assistant", "model", "gpt"))
    users = [text for role, text in texts if role in ("user", "human")]
    system = next((text for role, text in texts if role == "system"), None)
    return Example(
        where, index, raw, messages, system, users[-1] if users else "", answers[-1] if answers else "", answers
    )


def messages_of(raw: Any) -> Messages:
    """Return the turns of a converted row; `[]` where there are none."""
    if isinstance(raw, Mapping):
        for key in ("messages", "conversations", "conversation"):
            if isinstance(raw.get(key), (list, tuple)):
                return [dict(one) for one in raw[key] if isinstance(one, Mapping)]
        prompt, completion = raw.get("prompt"), raw.get("completion")
        if isinstance(prompt, (list, tuple)) and isinstance(completion, (list, tuple)):
            return [dict(one) for one in (*prompt, *completion)]
        if isinstance(prompt, str) and isinstance(completion, str):
            return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        question = raw.get("prefix") if isinstance(raw.get("prefix"), str) else prompt
        answer = next(
            (raw[key] for key in ("suffix", "answer", "response", "target") if isinstance(raw.get(key), str)), None
        )
        if isinstance(question, str) and answer is not None:
            return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if isinstance(raw, (list, tuple)) and raw and all(isinstance(one, Mapping) and "role" in one for one in raw):
        return [dict(one) for one in raw]
    return []


def parts_of(message: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the parts of a turn; text alone is one part."""
    content = message.get("content", message.get("value"))
    if isinstance(content, str):
        yield {"type": "text", "text": content}
    elif isinstance(content, Mapping):
        yield content
    elif isinstance(content, (list, tuple)):
        for one in content:
            yield one if isinstance(one, Mapping) else {"type": "text", "text": str(one)}


def text_of(message: Mapping[str, Any]) -> str:
    """Return the texts of a turn, joined."""
    return "".join(str(part["text"]) for part in parts_of(message) if part.get("text") is not None)


def is_picture(part: Mapping[str, Any]) -> bool:
    """Is this part a picture or its placeholder?"""
    return part.get("type") in PICTURE_TYPES or ("type" not in part and part.get("image") is not None)


def placeholders(messages: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Count the parts that are pictures, by role."""
    counts: dict[str, int] = {}
    for message in messages:
        number = sum(map(is_picture, parts_of(message)))
        if number:
            role = str(message.get("role", ""))
            counts[role] = counts.get(role, 0) + number
    return counts


def pictures_of(raw: Any) -> list[Any]:
    """Return the pictures of a converted row: those beside the messages, else those within them."""
    if isinstance(raw, Mapping):
        for key in ("images", "image", "img", "picture", "pictures"):
            value = raw.get(key)
            if value is not None:
                return list(value) if isinstance(value, (list, tuple)) else [value]
    within = []
    for message in messages_of(raw):
        for part in parts_of(message):
            value = part.get("image") if part.get("image") is not None else part.get("image_url")
            if is_picture(part) and value is not None:
                within.append(value.get("url") if isinstance(value, Mapping) and "url" in value else value)
    return within


def bare(messages: Sequence[Mapping[str, Any]]) -> Messages:
    """Copy messages with each picture as the mere placeholder `{"type": "image"}`; other keys stay."""
    copied = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            content = [{"type": "image"} if isinstance(one, Mapping) and is_picture(one) else one for one in content]
        copied.append({**message, "content": content})
    return copied


def after_arrow(messages: Sequence[Mapping[str, Any]]) -> Messages:
    """Copy messages as Arrow returns them: every part has every key of any part, None where it had none.

    Source: `datasets.Dataset.from_list` gives all structs of a list one type (architecture of Arrow).
    """
    keys: dict[str, None] = {}
    for message in messages:
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            for part in content:
                if isinstance(part, Mapping):
                    keys.update(dict.fromkeys(part))
    turns: dict[str, None] = {}
    for message in messages:
        turns.update(dict.fromkeys(message))
    copied = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            content = [{key: part.get(key) for key in keys} if isinstance(part, Mapping) else part for part in content]
        copied.append({key: (content if key == "content" else message.get(key)) for key in turns})
    return copied


def copied(value: Any) -> Any:
    """Copy the dicts and lists of a converted row, and no picture: collators that change their examples change a copy."""
    if isinstance(value, dict):
        return {key: copied(one) for key, one in value.items()}
    return [copied(one) for one in value] if isinstance(value, list) else value


def with_messages(raw: Mapping[str, Any], messages: Messages) -> Any:
    """Return a converted row with other turns.

    Raises:
        NotAvailable: the row holds its turns in no known form.
    """
    return _change(raw, lambda _: messages)


def with_prompt(example: Example, more: str) -> Any:
    """Return the raw converted row with a sentence added to its last question."""
    return _change(example.raw, lambda messages: _add_to_last(messages, ("user", "human"), more))


def with_second_turn(example: Example, question: str, answer: str) -> Any:
    """Return the raw converted row with one more question and answer, as text, at its end."""

    def add(messages: Messages) -> Messages:
        listed = isinstance(messages[-1].get("content"), (list, tuple))
        first = [one for one in messages if one.get("role") in ("user", "assistant", "model")]
        turns = [("user", question), (first[-1]["role"] if first else "assistant", answer)]
        return messages + [
            {"role": role, "content": [{"type": "text", "text": text}] if listed else text} for role, text in turns
        ]

    return _change(example.raw, add)


def _change(raw: Any, change: Any) -> Any:
    if not isinstance(raw, Mapping):
        return change(messages_of(raw))
    for key in ("messages", "conversations", "conversation"):
        if isinstance(raw.get(key), (list, tuple)):
            return {**raw, key: change(messages_of(raw))}
    if isinstance(raw.get("prompt"), (list, tuple)) and isinstance(raw.get("completion"), (list, tuple)):
        messages = change(messages_of(raw))
        count = len(messages) - len(raw["completion"]) if len(messages) == len(messages_of(raw)) else len(messages) - 1
        return {**raw, "prompt": messages[:count], "completion": messages[count:]}
    raise NotAvailable("a converter that returns messages")


def _add_to_last(messages: Messages, roles: tuple[str, ...], text: str) -> Messages:
    places = [i for i, one in enumerate(messages) if one.get("role", one.get("from")) in roles]
    if not places:
        raise NotAvailable("a conversation with a question and an answer")
    message = dict(messages[places[-1]])
    key = "content" if "content" in message else "value"
    content = message[key]
    if isinstance(content, str):
        message[key] = f"{content} {text}"
    else:
        parts = list(content)
        texts = [i for i, one in enumerate(parts) if isinstance(one, Mapping) and one.get("text") is not None]
        if not texts:
            parts.append({"type": "text", "text": text})
        else:
            old = parts[texts[-1]]
            parts[texts[-1]] = {**old, "text": f"{old['text']} {text}"}
        message[key] = parts
    return [*messages[: places[-1]], message, *messages[places[-1] + 1 :]]

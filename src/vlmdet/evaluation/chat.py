"""Ask a server about one picture: the request, and what its answer is held against.

When: AFTER training, per picture, in the threads of `evaluation.server`; no torch.
"""

from __future__ import annotations

import base64
import io
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from PIL import Image

from vlmdet.contract import Contract
from vlmdet.errors import ConfigError, ContractError, DataError, ModelError
from vlmdet.evaluation.completions import Choice, Completion, Token, chat_message, read_completion, texts_of
from vlmdet.evaluation.connection import KEY_VARIABLE, Connection, RequestFailed
from vlmdet.grounding import PIXEL_CODECS, View
from vlmdet.grounding.sizes import plan_view
from vlmdet.models.answers import Answer, Ask, RowError

logger = logging.getLogger(__name__)

_GREEDY_VLLM = {  # a checkpoint's generation_config.json would fill in its own
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
FIELDS: dict[str, dict[str, Any]] = {
    "vllm": {
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "return_token_ids": True,
        **_GREEDY_VLLM,
    },
    "sglang": {"skip_special_tokens": False, **_GREEDY_VLLM},
}
DRAWN = {"vllm": {"top_k": 0}, "sglang": {"top_k": -1}}
"""Fields beyond OpenAI's, also for answers that are drawn, by what `/v1/models` says owns the model. `transformers serve` refuses
fields that it does not know."""


class Rendered(Protocol):
    """What a run's own processor makes of prompts and pictures; `evaluation.rendering.Rendering`."""

    image_token_id: int

    def ids(self, messages: list[dict[str, Any]], view: View) -> tuple[int, ...]: ...

    def picture(self, image: Image.Image) -> Image.Image | None: ...

    def texts(self, ids: Sequence[int]) -> tuple[str, ...]: ...

    def text(self, ids: Sequence[int]) -> str: ...


_SERVE_MERGED = "serve what `vlmdet merge` wrote, with its chat template and processor"


class UnansweredError(RowError):
    """A row that the server did not answer; other `RowError`s never got as far."""


class Chat:
    """One server and what it is asked; its `answer` runs in several threads at once."""

    def __init__(
        self,
        connection: Connection,
        kind: str,
        fields: dict[str, Any],
        drawn: dict[str, Any],
        contract: Contract,
        rendering: Rendered | None,
        constrain: Callable[[View], str] | None,
    ) -> None:
        self.connection, self.kind, self.fields, self.drawn = connection, kind, fields, drawn
        self.contract, self.rendering, self.constrain = contract, rendering, constrain
        self.said: set[str] = set()
        self.tokenized = rendering is None  # whether /tokenize was asked, where there is something to compare

    def answer(self, ask: Ask) -> Answer | RowError:
        """Send one picture and read what comes back.

        Raises:
            ModelError: no other row will do better: the server is gone, refuses the key or has lost the model.
            ContractError: it reads another prompt than the model was trained with.
        """
        try:
            picture, seen = self._picture(ask)
        except DataError as error:
            return RowError(str(error))
        messages = [chat_message(message, picture) for message in ask.messages]
        body = self.fields | {"messages": messages}
        if self.constrain is not None:
            pattern = self.constrain(ask.view)
            body |= {"structured_outputs": {"regex": pattern}} if self.kind == "vllm" else {"regex": pattern}
        if not self.tokenized:
            self._compare_tokenized(ask, seen, messages)
            self.tokenized = True
        started = time.perf_counter()
        try:
            said = self.connection.post("/chat/completions", body)
            spent = (time.perf_counter() - started) * 1000
            further = self.connection.post("/chat/completions", body | self.drawn) if self.drawn else None
        except RequestFailed as failure:
            if failure.status in (401, 403, 404) or not failure.connected:
                raise lost(self.connection, failure) from failure
            return UnansweredError(f"the server gave no answer: {failure.reason}")
        try:
            answer = self._read(ask, seen, read_completion(said), spent)
            return replace(answer, samples=self._drawn(read_completion(further))) if self.drawn else answer
        except ValueError as error:
            return UnansweredError(f"the server sent {error}")

    def _drawn(self, completion: Completion) -> tuple[str, ...]:
        """Return the texts of the further answers.

        Raises:
            ConfigError: they are fewer than were asked for.
        """
        if len(completion.choices) < self.drawn["n"]:
            raise ConfigError(
                f"the server at {self.connection.base} draws {len(completion.choices)} answers where {self.drawn['n']} were "
                "asked for",
                "ask with --scores token_probability or none, or serve the model with vLLM",
            )
        return tuple(choice.message.content or "" for choice in completion.choices)

    def _picture(self, ask: Ask) -> tuple[str, View]:
        """Return a picture at the size that the model sees, as a data URL of a PNG, and that size.

        Raises:
            DataError: it cannot be opened, is not what its row says where that matters, or would be resized once more on arrival.
        """
        image = ask.sample.image
        limits = {"min_pixels": self.contract.min_pixels, "max_pixels": self.contract.max_pixels}
        if self.rendering is not None:
            seen = self.rendering.picture(image)
        else:
            view = plan_view(*image.size, **limits, factor=self.contract.size_factor)
            size = (view.resized_width, view.resized_height)
            again = plan_view(*size, **limits, factor=self.contract.size_factor)
            seen = image.resize(size, Image.Resampling.BICUBIC) if again == View(*size, *size) else None
        if seen is None:
            raise DataError(
                f"a picture of {image.width} x {image.height} pixels does not keep its size in a second resize",
                "raise max_pixels, or ask the model without a server",
            )
        if self.contract.codec in PIXEL_CODECS and seen.size != (ask.view.resized_width, ask.view.resized_height):
            raise DataError(
                f"the picture is {image.width} x {image.height}, and its row says {ask.view.width} x {ask.view.height}"
            )
        buffer = io.BytesIO()
        seen.save(buffer, "PNG", compress_level=1)
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        return url, View(*image.size, *seen.size)

    def _compare_tokenized(self, ask: Ask, seen: View, messages: list[dict[str, Any]]) -> None:
        """Compare ids where the server has `/tokenize`: before anything is generated."""
        assert self.rendering is not None
        try:
            body = {"model": self.fields["model"], "messages": messages}
            said = self.connection.post("/tokenize", body, at_root=True, retries=0)
        except RequestFailed:  # there is none, or it takes other requests; every answer says how many tokens were read
            return
        theirs = said.get("tokens") if isinstance(said, dict) else None
        if not isinstance(theirs, list) or not theirs:
            return
        image, ours = self.rendering.image_token_id, self.rendering.ids(ask.messages, seen)
        once = [token for i, token in enumerate(ours) if token != image or i == 0 or ours[i - 1] != image]
        if theirs != once:  # some leave a picture as one token there
            self._refuse_other_prompt(ask, seen, theirs)

    def _refuse_other_prompt(self, ask: Ask, seen: View, theirs: list[int]) -> None:
        """Stop where the ids that a server read are not those of the training."""
        assert self.rendering is not None
        ours = list(self.rendering.ids(ask.messages, seen))
        if ours == theirs:
            return
        at = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        shown = [self.rendering.text(ids[at : at + 8]) for ids in (ours, theirs)]
        raise ContractError(
            f"{ask.sample.id}: the server reads another prompt than the model was trained with: {len(theirs)} tokens instead of "
            f"{len(ours)}, and token {at} begins {shown[1]!r} instead of {shown[0]!r}",
            _SERVE_MERGED,
        )

    def _read(self, ask: Ask, seen: View, completion: Completion, milliseconds: float) -> Answer:
        """Read the answer, and hold the prompt that the server read against the training's.

        Raises:
            ValueError: its tokens are not its text.
            ConfigError: token probabilities were asked for, and it has none.
            ContractError: as `answer`.
        """
        choice, usage = completion.choices[0], completion.usage
        image_tokens = 0
        if self.rendering is not None:
            wanted = self.rendering.ids(ask.messages, seen)
            if completion.prompt_token_ids:
                self._refuse_other_prompt(ask, seen, completion.prompt_token_ids)
            elif usage is None:
                self._say_once("the server does not say how many tokens it reads, so the prompt is not compared")
            elif usage.prompt_tokens != len(wanted):
                raise ContractError(
                    f"{ask.sample.id}: the server reads a prompt of {usage.prompt_tokens} tokens, the model was trained with one "
                    f"of {len(wanted)}",
                    _SERVE_MERGED,
                )
            image_tokens = wanted.count(self.rendering.image_token_id)
        text = choice.message.content or ""
        tokens: tuple[str, ...] = ()
        values: list[float] = []
        if "logprobs" in self.fields:
            entries = choice.logprobs.content if choice.logprobs else None
            if entries is None:
                raise ConfigError(
                    f"the server at {self.connection.base} sends no token probabilities, so that boxes have no scores",
                    "ask with --scores none, or serve the model with vLLM",
                )
            found = self._texts(choice, entries, text)
            if found is None:
                raise ValueError(f"tokens that do not make up its text: {text[:120]!r}")
            tokens, text = found, "".join(found)
            values = [entry.logprob for entry in entries[: len(tokens)]]
        return Answer(
            text=text,
            prompt_tokens=usage.prompt_tokens if usage else 0,
            image_tokens=image_tokens,
            answer_tokens=usage.completion_tokens if usage else 0,
            truncated=choice.finish_reason == "length",
            milliseconds=milliseconds,
            tokens=tokens,
            logprobs=tuple(values),
        )

    def _say_once(self, text: str) -> None:
        if text not in self.said:
            self.said.add(text)
            logger.warning("%s: %s", self.connection.base, text)

    def _texts(self, choice: Choice, entries: Sequence[Token], text: str) -> tuple[str, ...] | None:
        """Return the texts of an answer's tokens, without the end token; None where they are not its text."""
        if choice.token_ids is None or self.rendering is None:
            return texts_of(entries, text)
        ids = choice.token_ids if choice.finish_reason == "length" else choice.token_ids[:-1]
        # made here: of a character that is spread over several tokens the server shows only marks
        return self.rendering.texts(ids) if len(choice.token_ids) == len(entries) else None


def lost(connection: Connection, failure: RequestFailed) -> ConfigError | ModelError:
    """Word a failure that no other row will be spared."""
    if failure.status in (401, 403):
        return ModelError(
            f"the server at {connection.base} refuses the key: {failure.reason}", f"set {KEY_VARIABLE} to a valid key"
        )
    if failure.status is not None:
        return ConfigError(
            f"the server at {connection.base} answers {failure.reason}",
            "look at the URL and at --served-name; the URL usually ends in /v1",
        )
    return ModelError(
        f"no server answers at {connection.base}: {failure.reason}",
        "start it, wait until it has loaded the model, and run the same command again: it goes on where it stopped",
    )

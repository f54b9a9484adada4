"""Ask a model behind an OpenAI-compatible server: vLLM, SGLang, `transformers serve`, or one far away as a baseline.

When: AFTER training, in place of a model in this process; no torch. `openai_engine` makes an engine for `evaluation.predict`,
which stores rows as they come and goes on where it was interrupted.

What makes the answers comparable with those of a model in this process:

    prompt    where the run's processor is at hand (`rendering`), the ids that it makes of each prompt are compared with what
              the server says that it read: token by token where it shows them (vLLM, and any server's `/tokenize`), else
              their number (`usage.prompt_tokens`). A difference stops the run.
    pixels    each picture is sent as PNG at the size that the model sees, so that the server's own limits change nothing.
    answer    greedy; control tokens are kept where the server can keep them (vLLM, SGLang); the codec's parser reads both.

    server               control tokens   token probabilities   constrained   prompt compared by
    vLLM 0.32            yes              yes                   yes           ids of every answer, and /tokenize
    SGLang               yes              yes                   yes           number (not run here: written from its documents)
    transformers serve   by its version   no                    no            number
    any other            as it likes      where it has them     no            number

The flags of `vlmdet eval` and `vlmdet predict` that choose all this: `--engine openai --url URL --served-name MODEL`, with
`--concurrency`, `--timeout`, `--retries`; a key is read from the environment variable OPENAI_API_KEY and from nowhere else.
"""

from __future__ import annotations

import base64
import io
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

import httpx2
from PIL import Image

from vlmdet.contract import Contract
from vlmdet.errors import ConfigError, ContractError, DataError, ModelError, did_you_mean
from vlmdet.evaluation.completions import Choice, Token, chat_message, read_completion, texts_of
from vlmdet.evaluation.connection import KEY_VARIABLE, Connection, RequestFailed, base_url
from vlmdet.grounding import PIXEL_CODECS, View
from vlmdet.grounding.sizes import plan_view
from vlmdet.models.answers import Answer, Ask, Engine, RowError

logger = logging.getLogger(__name__)

PROBES = 3
"""As many rows that fail before any has an answer stop the run: then it is not the rows."""

_GREEDY_VLLM = {  # a checkpoint's generation_config.json would fill in its own
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
_FIELDS: dict[str, dict[str, Any]] = {
    "vllm": {
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "return_token_ids": True,
        **_GREEDY_VLLM,
    },
    "sglang": {"skip_special_tokens": False, **_GREEDY_VLLM},
}
"""Fields beyond OpenAI's, by what `/v1/models` says owns the model; `transformers serve` refuses fields that it does not know."""


class Rendered(Protocol):
    """What a run's own processor makes of prompts and pictures; `evaluation.rendering.Rendering`."""

    image_token_id: int

    def ids(self, messages: list[dict[str, Any]], view: View) -> tuple[int, ...]: ...

    def picture(self, image: Image.Image) -> Image.Image | None: ...

    def texts(self, ids: Sequence[int]) -> tuple[str, ...]: ...

    def text(self, ids: Sequence[int]) -> str: ...


def openai_engine(
    url: str,
    model: str,
    *,
    contract: Contract,
    rendering: Rendered | None = None,
    max_new_tokens: int,
    concurrency: int = 8,
    timeout: float = 120.0,
    retries: int = 5,
    logprobs: bool = False,
    constrain: Callable[[View], str] | None = None,
    wait_for: Callable[[float], object] | None = None,
    transport: httpx2.BaseTransport | None = None,
) -> Engine:
    """Make an engine that asks a server, after a look that it is there and has the model.

    When: once per run.

    Input: `url`, `http://127.0.0.1:8000` or with `/v1`; `model`, the name under which the server has it; `contract`, of the run;
    `rendering`, what the run's own processor makes of prompts and pictures, None only where that is not at hand (a baseline far
    away): then nothing is compared; `max_new_tokens` per answer; `concurrency`, requests at once; `timeout` in seconds of one
    attempt; `retries` after the first attempt, see `evaluation.connection`; `logprobs`, ask for the probability of each token;
    `constrain`, from a view to a regular expression that the whole answer must match (`grounding.grammar.answer_pattern`);
    `wait_for` and `transport` replace the clock and the network in tests.
    Output: an engine. A row that fails after all attempts, or whose picture cannot be opened, gives a `RowError`.

    Raises:
        ConfigError: the URL is none, the server does not have the model, or cannot do what is asked (whether it sends token
            probabilities shows when the engine runs).
        ModelError: nothing answers at the URL, or the key is refused. While the engine runs: the server is gone, or no row of
            the first ones gets an answer.
        ContractError: while the engine runs: the server reads another prompt than the model was trained with.
    """
    base = base_url(url)

    def connect() -> Connection:
        return Connection(base, timeout=timeout, retries=retries, wait=wait_for, transport=transport)

    with connect() as connection:
        kind = _find_model(connection, model)
    if constrain is not None and kind not in _FIELDS:
        raise ConfigError(
            f"the server at {base} is neither vLLM nor SGLang, and knows no way to constrain an answer to a pattern",
            "leave --constrain out, or serve the model with vLLM",
        )
    fields: dict[str, Any] = {"model": model, "temperature": 0, "seed": 0, "max_tokens": max_new_tokens}
    fields |= _FIELDS.get(kind, {}) | ({"logprobs": True} if logprobs else {})

    def engine(asks: Sequence[Ask]) -> Iterator[tuple[int, Answer | RowError]]:
        with connect() as connection:
            server = _Server(connection, kind, fields, contract, rendering, constrain)
            yield from _run(server, connection, asks, concurrency)

    return engine


def _find_model(connection: Connection, model: str) -> str:
    """Return what the server says owns a model, in small letters: `vllm`; "" where it lists no models.

    Raises:
        ConfigError, ModelError: as `openai_engine`.
    """
    try:
        listed = connection.get("/models", retries=0)  # a person is waiting
    except RequestFailed as failure:
        if failure.status in (404, 405, 501):  # some do not list them: the first picture shows whether the URL is right
            return ""
        raise _fatal(connection, failure) from failure
    entries = listed.get("data") if isinstance(listed, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "id" in entry for entry in entries):
        raise ConfigError(
            f"{connection.base}/models lists no models, so that is no OpenAI-compatible server", "look at the URL"
        )
    names = [str(entry["id"]) for entry in entries]
    if names and model not in names:
        raise ConfigError(f"the server at {connection.base} has no model '{model}'", did_you_mean(model, names))
    return next((str(entry.get("owned_by", "")).lower() for entry in entries if entry["id"] == model), "")


def _fatal(connection: Connection, failure: RequestFailed) -> ConfigError | ModelError:
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


def _run(
    server: _Server, connection: Connection, asks: Sequence[Ask], concurrency: int
) -> Iterator[tuple[int, Answer | RowError]]:
    """Ask one by one until there is an answer, then many at once."""
    rest = iter(asks)
    failed: list[str] = []
    for ask in rest:
        result = server.answer(ask)
        yield ask.index, result
        if isinstance(result, Answer):
            break
        if isinstance(result, _UnansweredError):
            failed.append(result.reason)
        if len(failed) == PROBES:
            raise ModelError(
                f"none of the first {PROBES} pictures got an answer; the last: {failed[-1]}",
                "look at the server's log; nothing more was asked",
            )
    pool = ThreadPoolExecutor(concurrency, thread_name_prefix="ask")
    try:
        # twice as many as run at once: pictures are opened and sent while others are answered, and not all held in memory
        running: dict[Future[Answer | RowError], int] = {}
        while True:
            for ask in itertools.islice(rest, 2 * concurrency - len(running)):
                running[pool.submit(server.answer, ask)] = ask.index
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=lambda future: future.exception() is not None):  # no answer is lost
                yield running.pop(future), future.result()
    finally:
        connection.stop()
        pool.shutdown(wait=False, cancel_futures=True)


_SERVE_MERGED = "serve what `vlmdet merge` wrote, with its chat template and processor"


class _UnansweredError(RowError):
    """A row that the server did not answer; other `RowError`s never got as far."""


class _Server:
    """One server and what it is asked; its `answer` runs in several threads at once."""

    def __init__(
        self,
        connection: Connection,
        kind: str,
        fields: dict[str, Any],
        contract: Contract,
        rendering: Rendered | None,
        constrain: Callable[[View], str] | None,
    ) -> None:
        self.connection, self.kind, self.fields = connection, kind, fields
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
        except RequestFailed as failure:
            if failure.status in (401, 403, 404) or not failure.connected:
                raise _fatal(self.connection, failure) from failure
            return _UnansweredError(f"the server gave no answer: {failure.reason}")
        return self._read(ask, seen, said, (time.perf_counter() - started) * 1000)

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
        if self.kind != "vllm":
            return
        try:
            said = self.connection.post(
                "/tokenize", {"model": self.fields["model"], "messages": messages}, at_root=True
            )
        except RequestFailed:  # switched off, or not passed on; every answer has the ids too
            return
        if isinstance(said, dict) and isinstance(said.get("tokens"), list):
            self._refuse_other_prompt(ask, seen, said["tokens"])

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

    def _read(self, ask: Ask, seen: View, said: Any, milliseconds: float) -> Answer | RowError:
        """Read a chat completion.

        Raises:
            ConfigError: token probabilities were asked for, and it has none.
            ContractError: as `answer`.
        """
        try:
            completion = read_completion(said)
        except ValueError as error:
            return _UnansweredError(f"the server sent {error}")
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
                    "ask without scores, or serve the model with vLLM",
                )
            found = self._texts(choice, entries, text)
            if found is None:
                return _UnansweredError(f"the server sent tokens that do not make up its text: {text[:120]!r}")
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

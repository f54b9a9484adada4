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
    vLLM 0.32            yes              yes                   yes           ids of every request, and /tokenize
    SGLang               yes              yes                   yes           number (not run here: written from its documents)
    transformers serve   no               no                    no            number
    any other            as it likes      where it has them     no            number

The flags of `vlmdet eval` and `vlmdet predict` that choose all this: `--engine openai --url URL --served-name MODEL`, with
`--concurrency`, `--timeout`, `--retries`; a key is read from the environment variable OPENAI_API_KEY and from nowhere else.
"""

from __future__ import annotations

import base64
import codecs
import io
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

import httpx2
from PIL import Image

from vlmdet.contract import Contract
from vlmdet.errors import ConfigError, ContractError, DataError, ModelError, did_you_mean
from vlmdet.evaluation.connection import KEY_VARIABLE, Connection, RequestFailed, base_url
from vlmdet.grounding import View
from vlmdet.grounding.sizes import plan_view
from vlmdet.models.answers import Answer, Ask, Engine, RowError

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
            for future in done:
                yield running.pop(future), future.result()
    finally:
        connection.stop()
        pool.shutdown(wait=False, cancel_futures=True)


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
        self.tokenized = rendering is None  # whether /tokenize was asked, where there is something to compare

    def answer(self, ask: Ask) -> Answer | RowError:
        """Send one picture and read what comes back.

        Raises:
            ModelError: no other row will do better: the server is gone, refuses the key or has lost the model.
            ContractError: it reads another prompt than the model was trained with.
        """
        try:
            picture = self._picture(ask)
        except DataError as error:
            return RowError(str(error))
        messages = [chat_message(message, picture) for message in ask.messages]
        body = self.fields | {"messages": messages}
        if self.constrain is not None:
            pattern = self.constrain(ask.view)
            body |= {"structured_outputs": {"regex": pattern}} if self.kind == "vllm" else {"regex": pattern}
        if not self.tokenized:
            self._compare_tokenized(ask, messages)
            self.tokenized = True
        started = time.perf_counter()
        try:
            said = self.connection.post("/chat/completions", body)
        except RequestFailed as failure:
            if failure.status in (401, 403, 404) or not failure.connected:
                raise _fatal(self.connection, failure) from failure
            return _UnansweredError(f"the server gave no answer: {failure.reason}")
        return self._read(ask, said, (time.perf_counter() - started) * 1000)

    def _picture(self, ask: Ask) -> str:
        """Return a picture at the size that the model sees, as a data URL of a PNG.

        Raises:
            DataError: it cannot be opened, or would be resized once more on arrival.
        """
        image = ask.sample.image
        size = (ask.view.resized_width, ask.view.resized_height)
        if self.rendering is not None:
            seen = self.rendering.picture(image)
        else:
            limits = {"min_pixels": self.contract.min_pixels, "max_pixels": self.contract.max_pixels}
            again = plan_view(*size, **limits, factor=self.contract.size_factor)
            seen = image.resize(size, Image.Resampling.BICUBIC) if again == View(*size, *size) else None
        if seen is None:
            raise DataError(
                f"a picture of {image.width} x {image.height} pixels does not keep its size in a second resize",
                "raise max_pixels, or ask the model without a server",
            )
        buffer = io.BytesIO()
        seen.save(buffer, "PNG", compress_level=1)
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

    def _compare_tokenized(self, ask: Ask, messages: list[dict[str, Any]]) -> None:
        """Compare ids where the server has `/tokenize`: before anything is generated."""
        if self.kind != "vllm":
            return
        try:
            said = self.connection.post(
                "/tokenize", {"model": self.fields["model"], "messages": messages}, at_root=True
            )
        except (
            RequestFailed
        ):  # switched off, or behind something that does not pass it on; every answer has the ids too
            return
        if isinstance(said, dict) and isinstance(said.get("tokens"), list):
            self._refuse_other_prompt(ask, said["tokens"])

    def _refuse_other_prompt(self, ask: Ask, theirs: list[int]) -> None:
        """Stop where the ids that a server read are not those of the training."""
        assert self.rendering is not None
        ours = list(self.rendering.ids(ask.messages, ask.view))
        if ours == theirs:
            return
        at = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        shown = [self.rendering.text(ids[at : at + 8]) for ids in (ours, theirs)]
        raise ContractError(
            f"{ask.sample.id}: the server reads another prompt than the model was trained with: {len(theirs)} tokens instead of "
            f"{len(ours)}, and token {at} begins {shown[1]!r} instead of {shown[0]!r}",
            "serve what `vlmdet merge` wrote, with its chat template and processor",
        )

    def _read(self, ask: Ask, said: Any, milliseconds: float) -> Answer | RowError:
        """Read a chat completion.

        Raises:
            ContractError, ModelError: as `answer`.
        """
        try:
            choice, usage = said["choices"][0], said["usage"]
            text = choice["message"]["content"] or ""
            prompt_tokens, answer_tokens = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
            finish = choice["finish_reason"]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            return _UnansweredError(
                f"the server sent no chat completion: {type(error).__name__} {error} in {str(said)[:120]!r}"
            )
        if finish not in ("stop", "length"):
            return _UnansweredError(f"the server gave up the answer: finish_reason is {str(finish)[:40]!r}")
        ids: list[int] | None = None
        image_tokens = 0
        if self.rendering is not None:
            wanted = self.rendering.ids(ask.messages, ask.view)
            if said.get("prompt_token_ids"):
                self._refuse_other_prompt(ask, said["prompt_token_ids"])
            elif prompt_tokens != len(wanted):
                raise ContractError(
                    f"{ask.sample.id}: the server reads a prompt of {prompt_tokens} tokens, the model was trained with one of "
                    f"{len(wanted)}",
                    "serve what `vlmdet merge` wrote, with its chat template and processor",
                )
            image_tokens = wanted.count(self.rendering.image_token_id)
            ids = choice.get("token_ids")
        tokens: tuple[str, ...] = ()
        values: tuple[float, ...] = ()
        if "logprobs" in self.fields:
            entries = (choice.get("logprobs") or {}).get("content")
            if not isinstance(entries, list):
                raise ConfigError(
                    f"the server at {self.connection.base} sends no token probabilities, so that boxes have no scores",
                    "ask without scores, or serve the model with vLLM",
                )
            found = self._texts(entries, text, ids if finish == "length" or ids is None else ids[:-1])
            if found is None:
                return _UnansweredError(f"the server sent tokens that do not make up its text: {text[:120]!r}")
            tokens = found
            values = tuple(float(entry["logprob"]) for entry in entries[: len(tokens)])
        return Answer(
            text="".join(tokens) or text,
            prompt_tokens=prompt_tokens,
            image_tokens=image_tokens,
            answer_tokens=answer_tokens,
            truncated=finish == "length",
            milliseconds=milliseconds,
            tokens=tokens,
            logprobs=values,
        )

    def _texts(self, entries: list[dict[str, Any]], text: str, ids: list[int] | None) -> tuple[str, ...] | None:
        """Return the texts of an answer's tokens without the end token, which together are its text; None where they are not."""
        if ids is not None and self.rendering is not None and len(ids) <= len(entries):
            return self.rendering.texts(ids)  # of a character in several tokens the server shows only marks
        shown = [str(entry["token"]) for entry in entries]
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoded = [decoder.decode(bytes(entry.get("bytes") or ())) for entry in entries]
        for texts in (shown, decoded):
            for count in (len(texts), len(texts) - 1):  # the end token may be listed, and is not in the text
                if "".join(texts[: max(count, 0)]) == text:
                    return tuple(texts[: max(count, 0)])
        return None


def chat_message(message: dict[str, Any], picture: str) -> dict[str, Any]:
    """Word a message as OpenAI does: a text alone is a string, beside a picture it is a part."""
    parts = message["content"]
    if all("image" not in part for part in parts):
        return {"role": message["role"], "content": "".join(part["text"] for part in parts)}
    return {
        "role": message["role"],
        "content": [
            {"type": "image_url", "image_url": {"url": picture}}
            if "image" in part
            else {"type": "text", "text": part["text"]}
            for part in parts
        ],
    }

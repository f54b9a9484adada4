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
`--concurrency`, `--timeout`, `--retries`, and `--baseline CODEC` for a model that is not the run's. A key is read from the
environment variable OPENAI_API_KEY and from nowhere else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import httpx2

from vlmdet.contract import Contract
from vlmdet.errors import ConfigError, ModelError, did_you_mean
from vlmdet.evaluation.chat import DRAWN, FIELDS, Chat, Rendered, UnansweredError, lost
from vlmdet.evaluation.connection import Connection, RequestFailed, base_url
from vlmdet.grounding import View
from vlmdet.models.answers import Answer, Ask, Engine, RowError

PROBES = 3
"""As many rows that fail before any has an answer stop the run: then it is not the rows."""


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
    samples: int = 0,
    seed: int = 0,
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
    `samples`, further answers to each question, drawn from the model's own distribution under `seed`, in a request of their own;
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
    if constrain is not None and kind not in FIELDS:
        raise ConfigError(
            f"the server at {base} is neither vLLM nor SGLang, and knows no way to constrain an answer to a pattern",
            "leave --constrain out, or serve the model with vLLM",
        )
    fields: dict[str, Any] = {"model": model, "temperature": 0, "seed": 0, "max_tokens": max_new_tokens}
    fields |= FIELDS.get(kind, {}) | ({"logprobs": True} if logprobs else {})
    drawn = {"temperature": 1, "top_p": 1, "n": samples, "seed": seed} | DRAWN.get(kind, {}) if samples else {}

    def engine(asks: Sequence[Ask]) -> Iterator[tuple[int, Answer | RowError]]:
        with connect() as connection:
            server = Chat(connection, kind, fields, drawn, contract, rendering, constrain)
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
        raise lost(connection, failure) from failure
    entries = listed.get("data") if isinstance(listed, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "id" in entry for entry in entries):
        raise ConfigError(
            f"{connection.base}/models lists no models, so that is no OpenAI-compatible server", "look at the URL"
        )
    names = [str(entry["id"]) for entry in entries]
    if names and model not in names:
        raise ConfigError(f"the server at {connection.base} has no model '{model}'", did_you_mean(model, names))
    return next((str(entry.get("owned_by", "")).lower() for entry in entries if entry["id"] == model), "")


def _run(
    server: Chat, connection: Connection, asks: Sequence[Ask], concurrency: int
) -> Iterator[tuple[int, Answer | RowError]]:
    """Ask one by one until there is an answer, then many at once."""
    rest = iter(asks)
    failed: list[str] = []
    for ask in rest:
        result = server.answer(ask)
        yield ask.index, result
        if isinstance(result, Answer):
            break
        if isinstance(result, UnansweredError):
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

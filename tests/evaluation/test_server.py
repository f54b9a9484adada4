"""The engine `openai`: what is sent, how answers are read, and what happens when a server does not answer as it should."""

from __future__ import annotations

import base64
import collections
import dataclasses
import io
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image

from vlmdet.boxes import Boxes
from vlmdet.contract import Contract
from vlmdet.data.dataset import build_messages
from vlmdet.errors import ConfigError, ContractError, ModelError
from vlmdet.evaluation.server import openai_engine
from vlmdet.grounding import View
from vlmdet.grounding.sizes import plan_view
from vlmdet.models.answers import Answer, Ask, RowError
from vlmdet.records import Sample

URL = "http://127.0.0.1:9"
LIMITS = {"min_pixels": 4 * 28 * 28, "max_pixels": 16 * 28 * 28}
CONTRACT = Contract(
    system_prompt="You find objects.",
    user_prompt="Detect every sign.",
    template_sha256="0",
    codec="qwen2_vl",
    codec_version="1",
    **LIMITS,
    size_factor=28,
    box_order="raster",
    labels=("sign",),
    base_model="tiny",
    base_fingerprint="0",
    data_fingerprint="0",
    decoding={"max_new_tokens": 8, "do_sample": False},
    versions={},
)
Handle = Callable[[httpx2.Request], httpx2.Response]


def make(folder: Path, count: int, *, width: int = 90, height: int = 60) -> list[Ask]:
    """Pictures of one grey each, 10 times their number, so that a request tells which one it asks about."""
    asks = []
    for number in range(count):
        path = folder / f"{number}.png"
        Image.new("RGB", (width, height), (10 * number,) * 3).save(path)
        sample = Sample(f"picture-{number}", path, width, height, Boxes.empty(), ())
        asks.append(Ask(number, sample, build_messages(["sign"]), plan_view(width, height, **LIMITS)))
    return asks


def pixels(body: dict[str, Any]) -> np.ndarray:
    (url,) = [
        part["image_url"]["url"]
        for message in body["messages"]
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "image_url"
    ]
    kind, _, data = url.partition(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        return np.asarray(image)


def number_of(body: dict[str, Any]) -> int:
    return int(pixels(body)[0, 0, 0]) // 10


def completion(text: str, *, finish: str = "stop", prompt: int = 20, **choice: Any) -> dict[str, Any]:
    return {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish, **choice}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": 5, "total_tokens": prompt + 5},
    }


class Fake(httpx2.MockTransport):
    """A server with one model that answers `answer N` about picture N, unless `say` gives something else."""

    def __init__(
        self, say: Callable[[int, dict[str, Any]], Any] | None = None, *, owner: str = "someone", model: str = "m"
    ) -> None:
        super().__init__(self.handle)
        self.say, self.owner, self.model = say, owner, model
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []

    def handle(self, request: httpx2.Request) -> httpx2.Response:
        self.paths.append(request.url.path)
        if request.url.path == "/v1/models":
            return httpx2.Response(200, json={"data": [{"id": self.model, "owned_by": self.owner}]})
        if request.url.path != "/v1/chat/completions":
            return httpx2.Response(404)
        body = json.loads(request.content)
        self.bodies.append(body)
        number = number_of(body)
        said = self.say(number, body) if self.say else None
        if isinstance(said, Exception):
            raise said
        if isinstance(said, httpx2.Response):
            return said
        return httpx2.Response(200, json=completion(f"answer {number}") if said is None else said)


def engine_of(transport: httpx2.BaseTransport, **settings: Any) -> Any:
    values = {"contract": CONTRACT, "max_new_tokens": 8, "retries": 2, "concurrency": 3, "wait_for": lambda pause: None}
    return openai_engine(URL, "m", transport=transport, **(values | settings))


# ---- what is sent ---------------------------------------------------------------------------------------------------


def test_each_picture_is_answered_once_whatever_the_order(tmp_path: Path) -> None:
    fake = Fake()
    results = list(engine_of(fake)(make(tmp_path, 12)))
    assert sorted(index for index, _ in results) == list(range(12))
    for index, result in results:
        assert isinstance(result, Answer)
        assert (result.text, result.prompt_tokens, result.answer_tokens, result.truncated) == (
            f"answer {index}", 20, 5, False,
        )  # fmt: skip
        assert result.milliseconds > 0 and result.tokens == result.logprobs == ()


def test_the_request_is_greedy_and_holds_the_prompt_and_the_picture_as_the_model_sees_it(tmp_path: Path) -> None:
    fake = Fake()
    (ask,) = make(tmp_path, 1, width=400, height=100)
    list(engine_of(fake)([ask]))
    (body,) = fake.bodies
    assert pixels(body).shape == (56, 224, 3)  # 400 x 100 within 16 x 28 x 28, by the rule of grounding.sizes
    system, user = body.pop("messages")
    assert system == {"role": "system", "content": ask.messages[0]["content"][0]["text"]}
    assert user["role"] == "user"
    assert [part["type"] for part in user["content"]] == ["image_url", "text"]
    assert user["content"][1] == ask.messages[1]["content"][1]
    # nothing that `transformers serve` would refuse
    assert body == {"model": "m", "temperature": 0, "seed": 0, "max_tokens": 8}


def test_vllm_is_asked_for_control_tokens_ids_and_no_penalty(tmp_path: Path) -> None:
    fake = Fake(owner="vllm")
    list(engine_of(fake, constrain=lambda view: f"{view.width}x{view.height}")(make(tmp_path, 1)))
    (body,) = fake.bodies
    assert body["skip_special_tokens"] is False and body["spaces_between_special_tokens"] is False
    assert body["return_token_ids"] is True and body["repetition_penalty"] == 1
    assert body["structured_outputs"] == {"regex": "90x60"} and "logprobs" not in body

    fake = Fake(owner="sglang")
    list(engine_of(fake, constrain=lambda view: "none")(make(tmp_path, 1)))
    assert fake.bodies[0]["regex"] == "none" and "structured_outputs" not in fake.bodies[0]


def test_no_more_requests_run_at_once_than_allowed_and_pictures_are_opened_late(tmp_path: Path) -> None:
    running, most, lock = 0, 0, threading.Lock()
    both = threading.Barrier(3)

    def say(number: int, body: dict[str, Any]) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        if number:  # the first goes alone; then three meet, again and again
            both.wait(timeout=20)
        with lock:
            running -= 1

    opened: list[int] = []
    asks = []
    for ask in make(tmp_path, 19):
        path, number = ask.sample.picture, ask.index
        assert isinstance(path, Path)

        def read(path: Path = path, number: int = number) -> bytes:
            opened.append(number)
            return path.read_bytes()

        asks.append(Ask(number, Sample(str(number), read, 90, 60, Boxes.empty(), ()), ask.messages, ask.view))
    results = engine_of(Fake(say), concurrency=3)(asks)
    next(results)
    assert opened == [0]
    next(results)
    assert len(opened) <= 1 + 2 * 3 + 3
    assert len(list(results)) == 17
    assert most == 3


def test_an_engine_that_is_left_asks_no_further(tmp_path: Path) -> None:
    fake = Fake()
    results = engine_of(fake, concurrency=1)(make(tmp_path, 12))
    next(results)
    results.close()
    assert len(fake.bodies) == 1


# ---- rows that fail -------------------------------------------------------------------------------------------------


def test_a_row_that_fails_is_an_error_with_its_reason_and_the_others_are_not(tmp_path: Path) -> None:
    trouble: dict[int, Any] = {
        2: httpx2.Response(503, json={"error": {"message": "overloaded"}}),
        3: httpx2.ReadTimeout("slow"),
        4: httpx2.RemoteProtocolError("peer closed connection"),
        5: httpx2.Response(400, json={"error": {"message": "prompt too long"}}),
        6: httpx2.Response(200, content=b'{"choices": [{'),
        7: {"choices": []},
        8: completion("", finish="content_filter"),
        9: {"error": {"message": "out of memory"}},
        10: completion("x") | {"usage": "none"},
        11: ["odd"],
        12: completion("x") | {"choices": [{"message": {"content": 7}, "finish_reason": "stop"}]},
    }
    fake = Fake(lambda number, body: trouble.get(number))
    asks = make(tmp_path, 16)
    assert isinstance(asks[14].sample.picture, Path)
    asks[14].sample.picture.write_bytes(b"no picture")
    results = dict(engine_of(fake)(asks))
    errors = {index: result.reason for index, result in results.items() if isinstance(result, RowError)}
    assert sorted(errors) == [*range(2, 13), 14]
    assert errors[2] == "the server gave no answer: HTTP 503: overloaded (attempt 3)"
    assert "no answer in time" in errors[3] and "(attempt 3)" in errors[3]
    assert "peer closed connection" in errors[4]
    assert errors[5] == "the server gave no answer: HTTP 400: prompt too long"
    assert "no JSON" in errors[6]
    assert "length >= 1" in errors[7]
    assert "content_filter" in errors[8]
    assert "out of memory" in errors[9]
    assert "picture-14" in errors[14] or "14.png" in errors[14]
    assert all("\n" not in reason for reason in errors.values())
    assert sum(number_of(body) == 2 for body in fake.bodies) == 3
    assert sum(number_of(body) == 5 for body in fake.bodies) == 1


def test_a_row_is_answered_after_trouble_that_passes(tmp_path: Path) -> None:
    left = {1: 2, 2: 1}

    def say(number: int, body: dict[str, Any]) -> Any:
        if left.get(number, 0):
            left[number] -= 1
            return httpx2.Response(429, headers={"retry-after": "3"}) if number == 1 else httpx2.ReadError("reset")
        return None

    pauses: list[float] = []
    results = dict(engine_of(Fake(say), wait_for=pauses.append)(make(tmp_path, 4)))
    assert all(isinstance(result, Answer) for result in results.values())
    assert pauses.count(3) == 2 and len(pauses) == 3


def test_a_server_that_answers_none_of_the_first_rows_stops_the_run(tmp_path: Path) -> None:
    fake = Fake(lambda number, body: httpx2.Response(400, json={"error": "no pictures, please"}))
    results = engine_of(fake)(make(tmp_path, 9))
    with pytest.raises(
        ModelError, match=r"none of the first 3 pictures got an answer; the last: .*no pictures, please"
    ):
        list(results)
    assert len(fake.bodies) == 3


def test_pictures_that_cannot_be_opened_do_not_count_against_the_server(tmp_path: Path) -> None:
    asks = make(tmp_path, 6)
    for ask in asks[:4]:
        assert isinstance(ask.sample.picture, Path)
        ask.sample.picture.unlink()
    results = dict(engine_of(Fake())(asks))
    assert [isinstance(results[index], Answer) for index in range(6)] == [False] * 4 + [True] * 2


@pytest.mark.parametrize(
    ("trouble", "error", "message"),
    [
        (httpx2.ConnectError("refused"), ModelError, "no server answers at http://127.0.0.1:9/v1: .*refused"),
        (httpx2.Response(401, json={"error": {"message": "bad key"}}), ModelError, "refuses the key: .*OPENAI_API_KEY"),
        (httpx2.Response(404, json={"error": {"message": "unloaded"}}), ConfigError, "HTTP 404: unloaded"),
    ],
)
def test_a_server_that_is_lost_on_the_way_stops_the_run(
    tmp_path: Path, trouble: Any, error: type[Exception], message: str
) -> None:
    fake = Fake(lambda number, body: trouble if number == 4 else None)
    results = engine_of(fake, concurrency=1)(make(tmp_path, 12))
    done: set[int] = set()
    with pytest.raises(error, match=message):
        collections.deque((done.add(index) for index, _ in results), maxlen=0)
    assert {0, 1, 2, 3} <= done  # what was answered before is not lost
    assert 4 not in done and len(fake.bodies) < 9


def test_a_strip_that_would_be_resized_twice_is_a_row_error(tmp_path: Path) -> None:
    (ask,) = make(tmp_path, 1)
    Image.new("RGB", (3000, 20)).save(tmp_path / "strip.png")
    strip = Sample("strip", tmp_path / "strip.png", 3000, 20, Boxes.empty(), ())
    results = dict(engine_of(Fake())([ask, Ask(1, strip, ask.messages, plan_view(3000, 20, **LIMITS))]))
    error = results[1]
    assert isinstance(error, RowError) and "3000 x 20 pixels does not keep its size" in error.reason


def test_a_picture_of_another_size_than_its_row_is_an_error_where_answers_are_in_pixels(tmp_path: Path) -> None:
    (ask,) = make(tmp_path, 1)
    Image.new("RGB", (60, 90)).save(tmp_path / "0.png")  # turned since it was read
    contract = dataclasses.replace(CONTRACT, codec="qwen2_5_vl")
    ((_, result),) = engine_of(Fake(), contract=contract)([ask])
    assert isinstance(result, RowError) and "is 60 x 90, and its row says 90 x 60" in result.reason


# ---- before anything is asked ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "error", "message"),
    [
        (httpx2.ConnectError("refused"), ModelError, r"no server answers at http://127\.0\.0\.1:9/v1: .*start it"),
        (httpx2.ReadTimeout("slow"), ModelError, "no answer in time"),
        (httpx2.Response(401), ModelError, "refuses the key"),
        (httpx2.Response(400, text="Bad Request"), ConfigError, "HTTP 400: Bad Request; look at the URL"),
        (httpx2.Response(200, text="<html>"), ConfigError, "no JSON"),
        (httpx2.Response(200, json={"models": []}), ConfigError, "no OpenAI-compatible server"),
        (httpx2.Response(200, json=[1]), ConfigError, "no OpenAI-compatible server"),
        (httpx2.Response(200, json={"data": [{"id": "vlmdet"}]}), ConfigError, "no model 'm'; there is: vlmdet"),
        (httpx2.Response(200, json={"data": [{"id": "n"}, {"id": "mm"}]}), ConfigError, "did you mean 'mm'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_work_is_said_before_any_picture_is_opened(
    reply: Any, error: type[Exception], message: str
) -> None:
    paths: list[str] = []

    def handle(request: httpx2.Request) -> httpx2.Response:
        paths.append(request.url.path)
        if isinstance(reply, Exception):
            raise reply
        return reply

    with pytest.raises(error, match=message):
        engine_of(httpx2.MockTransport(handle))
    assert paths == ["/v1/models"]  # once: a person is waiting


def test_a_server_that_lists_no_models_is_asked_all_the_same(tmp_path: Path) -> None:
    fake = Fake()
    handle = fake.handle
    fake.handler = lambda request: httpx2.Response(404) if request.url.path == "/v1/models" else handle(request)
    assert len(list(engine_of(fake)(make(tmp_path, 2)))) == 2
    nothing = engine_of(httpx2.MockTransport(lambda request: httpx2.Response(404, text="Not Found")))
    with pytest.raises(ConfigError, match="HTTP 404: Not Found; look at the URL"):
        list(nothing(make(tmp_path, 2)))


def test_a_server_without_patterns_is_not_asked_for_one() -> None:
    with pytest.raises(ConfigError, match="leave --constrain out"):
        engine_of(Fake(owner="someone"), constrain=lambda view: "none")


def test_nothing_listens_on_a_closed_port() -> None:
    with pytest.raises(ModelError, match="no server answers"):
        openai_engine("http://127.0.0.1:9", "m", contract=CONTRACT, max_new_tokens=8, timeout=5)


# ---- token probabilities --------------------------------------------------------------------------------------------


def listed(*tokens: str | list[int]) -> dict[str, Any]:
    """Logprobs as OpenAI sends them: -0.5, -1.5, …; a token of bytes alone is shown as a mark."""
    entries = [
        {
            "token": token if isinstance(token, str) else "\ufffd",
            "bytes": list(token.encode()) if isinstance(token, str) else token,
            "logprob": -0.5 - place,
            "top_logprobs": [],
        }
        for place, token in enumerate(tokens)
    ]
    return {"logprobs": {"content": entries}}


@pytest.mark.parametrize(
    ("text", "tokens", "texts"),
    [
        ("(1,2)", ["(", "1", ",", "2", ")"], ("(", "1", ",", "2", ")")),
        ("(1)", ["(", "1", ")", "<|im_end|>"], ("(", "1", ")")),
        ("", ["<|im_end|>"], ()),
        ("", [], ()),
        # the three bytes of a character in two tokens: the last one has it
        ("a桌b", ["a", [0xE6, 0xA1], [0x8C], "b"], ("a", "", "桌", "b")),
        ("a桌", ["a", [0xE6, 0xA1], [0x8C], "<end>"], ("a", "", "桌")),
    ],
)
def test_tokens_make_up_the_text_without_the_end_token(
    tmp_path: Path, text: str, tokens: list[Any], texts: tuple[str, ...]
) -> None:
    fake = Fake(lambda number, body: completion(text, **listed(*tokens)))
    ((_, result),) = engine_of(fake, logprobs=True)(make(tmp_path, 1))
    assert isinstance(result, Answer) and fake.bodies[0]["logprobs"] is True
    assert (result.text, result.tokens) == (text, texts)
    assert result.logprobs == tuple(-0.5 - place for place in range(len(texts)))


def test_tokens_that_are_not_the_text_are_an_error(tmp_path: Path) -> None:
    odd = {1: completion("(1,2)", **listed("(", "1", ")")), 2: completion("ab", **listed("a", "b", "c", "d"))}
    nan = listed("a")
    nan["logprobs"]["content"][0]["logprob"] = float("-inf")
    odd[3] = completion("a", **nan)

    def say(number: int, body: dict[str, Any]) -> Any:
        return httpx2.Response(200, content=json.dumps(odd.get(number, completion("a", **listed("a")))).encode())

    results = dict(engine_of(Fake(say), logprobs=True)(make(tmp_path, 5)))
    errors = {index: result.reason for index, result in results.items() if isinstance(result, RowError)}
    assert sorted(errors) == [1, 2, 3]
    assert "tokens that do not make up its text: '(1,2)'" in errors[1]
    assert "-inf" in errors[3]


def test_a_server_without_probabilities_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sends no token probabilities"):
        list(engine_of(Fake(), logprobs=True)(make(tmp_path, 3)))


def test_further_answers_are_drawn_in_a_request_of_their_own(tmp_path: Path) -> None:
    def say(number: int, body: dict[str, Any]) -> Any:
        if body["temperature"] == 0:
            return completion("likely", **listed("likely"))
        said = completion("")
        return said | {
            "choices": [{"message": {"content": f"drawn {i}"}, "finish_reason": "stop"} for i in range(body["n"])]
        }

    fake = Fake(say, owner="vllm")
    ((_, result),) = engine_of(fake, samples=3, seed=5)(make(tmp_path, 1))
    assert (result.text, result.samples) == ("likely", ("drawn 0", "drawn 1", "drawn 2"))
    greedy, drawn = fake.bodies
    changed = {key: value for key, value in drawn.items() if greedy.get(key) != value}
    assert changed == {"temperature": 1, "top_p": 1, "top_k": 0, "n": 3, "seed": 5}

    lazy = Fake(lambda number, body: completion("one"))  # knows no n
    with pytest.raises(ConfigError, match="draws 1 answers where 3 were asked for"):
        list(engine_of(lazy, samples=3)(make(tmp_path, 1)))


# ---- the prompt -----------------------------------------------------------------------------------------------------


class Ids:
    """Stands for `Rendering`: a prompt of ids 1, 2, 3 and as many 9 as the picture has tokens."""

    image_token_id = 9

    def ids(self, messages: list[dict[str, Any]], view: View) -> tuple[int, ...]:
        return (1, 2, 3, *[9] * (view.resized_width * view.resized_height // 28**2))

    def picture(self, image: Image.Image) -> Image.Image:
        return image.resize((84, 56))

    def texts(self, ids: Sequence[int]) -> tuple[str, ...]:
        return tuple(f"<{i}>" for i in ids)

    def text(self, ids: Sequence[int]) -> str:
        return "".join(self.texts(ids))


def test_the_number_of_prompt_tokens_must_be_that_of_the_training(tmp_path: Path) -> None:
    fake = Fake(lambda number, body: completion("none", prompt=9 if number != 2 else 10))
    results = engine_of(fake, rendering=Ids(), concurrency=1)(make(tmp_path, 4))
    index, first = next(results)
    assert (index, first.prompt_tokens, first.image_tokens) == (0, 9, 6)
    with pytest.raises(ContractError, match=r"picture-2: .* of 10 tokens, the model was trained with one of 9"):
        list(results)


def test_a_server_that_counts_no_tokens_is_said_to_be_unchecked_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake = Fake(lambda number, body: completion("none") | {"usage": None})
    results = list(engine_of(fake, rendering=Ids(), concurrency=1)(make(tmp_path, 4)))
    assert all(isinstance(result, Answer) and result.image_tokens == 6 for _, result in results)
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "http://127.0.0.1:9/v1: the server does not say how many tokens it reads, so the prompt is not compared"
    ]


def test_ids_are_compared_where_the_server_shows_them(tmp_path: Path) -> None:
    def say(number: int, body: dict[str, Any]) -> Any:
        ids = [1, 2, 3, 9, 9, 9, 9, 9, 9] if number != 1 else [1, 7, 3, 9, 9, 9, 9, 9, 9]
        return completion("none", prompt=9) | {"prompt_token_ids": ids}

    results = engine_of(Fake(say), rendering=Ids(), concurrency=1)(make(tmp_path, 3))
    with pytest.raises(ContractError, match=r"token 1 begins '<7><3><9>.* instead of '<2><3><9>") as caught:
        list(results)  # rows come as they are done, in any order
    assert "vlmdet merge" in caught.value.hint


def test_tokenize_is_asked_once_and_before_anything_is_generated(tmp_path: Path) -> None:
    fake = Fake(lambda number, body: completion("none", prompt=9))
    handle = fake.handle
    sent: list[dict[str, Any]] = []
    tokens = [1, 2, 3, 9, 9, 9, 9, 9, 9]

    def with_tokenize(request: httpx2.Request) -> httpx2.Response:
        if request.url.path == "/tokenize":
            fake.paths.append("/tokenize")
            sent.append(json.loads(request.content))
            return httpx2.Response(200, json={"tokens": tokens})
        return handle(request)

    fake.handler = with_tokenize
    assert len(list(engine_of(fake, rendering=Ids())(make(tmp_path, 5)))) == 5
    assert fake.paths.count("/tokenize") == 1 and fake.paths.index("/tokenize") == 1
    assert sent[0] == {"model": "m", "messages": fake.bodies[0]["messages"]}
    fake.bodies.clear()
    tokens.append(4)
    with pytest.raises(ContractError, match="10 tokens instead of 9, and token 9 begins '<4>' instead of ''"):
        list(engine_of(fake, rendering=Ids())(make(tmp_path, 5)))
    assert fake.bodies == []
    tokens[:] = [1, 2, 3, 9]  # a server that leaves a picture as one token there; the number is compared all the same
    assert len(list(engine_of(fake, rendering=Ids())(make(tmp_path, 5)))) == 5
    tokens[:] = []  # one that wants another request
    assert len(list(engine_of(fake, rendering=Ids())(make(tmp_path, 5)))) == 5


@pytest.mark.parametrize("status", [400, 404, 422, 500])
def test_a_server_without_tokenize_is_held_to_the_number(tmp_path: Path, status: int) -> None:
    fake = Fake(lambda number, body: completion("none", prompt=9))
    handle = fake.handle
    fake.handler = lambda request: httpx2.Response(status) if request.url.path == "/tokenize" else handle(request)
    assert len(list(engine_of(fake, rendering=Ids())(make(tmp_path, 3)))) == 3


def test_token_ids_of_an_answer_are_decoded_here(tmp_path: Path) -> None:
    def say(number: int, body: dict[str, Any]) -> Any:
        finish = "stop" if number == 0 else "length"
        return completion("\ufffd", prompt=9, finish=finish, token_ids=[5, 6, 7], **listed("\ufffd", "", "<end>"))

    results = dict(engine_of(Fake(say), rendering=Ids(), logprobs=True)(make(tmp_path, 2)))
    assert (results[0].text, results[0].tokens, results[0].logprobs) == ("<5><6>", ("<5>", "<6>"), (-0.5, -1.5))
    assert (results[1].tokens, results[1].truncated) == (("<5>", "<6>", "<7>"), True)

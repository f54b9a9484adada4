"""Answers of a real vLLM, recorded by `scripts/check_vllm.sh`, read by the engine and held against the base in this process.

The folder `recorded/` has three pictures at the size that the model sees, and each request with what the server replied; a
picture in a request is a hash of its pixels. A request that was not recorded is refused.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from PIL import Image

from vlmdet.boxes import Boxes
from vlmdet.data.collators import collate_prompts
from vlmdet.data.dataset import build_messages
from vlmdet.errors import ConfigError
from vlmdet.evaluation.connection import Connection, RequestFailed
from vlmdet.evaluation.rendering import Rendering
from vlmdet.evaluation.server import openai_engine
from vlmdet.grounding import get_codec
from vlmdet.grounding.sizes import plan_view
from vlmdet.models.answers import Answer, Ask, RowError
from vlmdet.models.loader import Loaded, load, make_contract
from vlmdet.records import Sample

FOLDER = Path(__file__).parent / "recorded"
URL = "http://recorded"
LABELS = ("cross",)


def without_pixels(body: Any) -> Any:
    if isinstance(body, list):
        return [without_pixels(part) for part in body]
    if isinstance(body, dict):
        return {key: without_pixels(value) for key, value in body.items()}
    if isinstance(body, str) and body.startswith("data:image/png;base64,"):
        with Image.open(io.BytesIO(base64.b64decode(body.partition(",")[2]))) as image:
            return f"sha256 of pixels: {hashlib.sha256(image.tobytes()).hexdigest()}"
    return body


class Replay(httpx2.MockTransport):
    """Gives back what was recorded; `paths` are those that were asked."""

    def __init__(self) -> None:
        super().__init__(self.handle)
        self.exchanges = json.loads((FOLDER / "vllm.json").read_text(encoding="utf-8"))["exchanges"]
        self.paths: list[str] = []

    def handle(self, request: httpx2.Request) -> httpx2.Response:
        self.paths.append(request.url.path)
        body = without_pixels(json.loads(request.content)) if request.content else None
        for exchange in self.exchanges:
            if (exchange["method"], exchange["path"], exchange["body"]) == (request.method, request.url.path, body):
                return httpx2.Response(exchange["status"], json=exchange["reply"])
        return httpx2.Response(418, json={"error": f"not recorded: {request.url.path} {json.dumps(body)}"})


@pytest.fixture(scope="module")
def tiny() -> Loaded:
    return load("tiny", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def asks() -> list[Ask]:
    paths = sorted(FOLDER.glob("*.png"))
    assert len(paths) == 3
    found = []
    for index, path in enumerate(paths):
        width, height = Image.open(path).size
        view = plan_view(width, height, min_pixels=16 * 28 * 28, max_pixels=49 * 28 * 28)
        assert (view.resized_width, view.resized_height) == (width, height)
        sample = Sample(path.stem, path, width, height, Boxes.empty(), ())
        found.append(Ask(index, sample, build_messages(LABELS), view))
    return found


def ask_recorded(tiny: Loaded, asks: Sequence[Ask], **settings: Any) -> tuple[list[Answer | RowError], Replay]:
    contract = make_contract(tiny, labels=LABELS, box_order="raster", max_new_tokens=128, data_fingerprint="")
    replay = Replay()
    (model,) = [entry["id"] for entry in replay.exchanges[0]["reply"]["data"]]
    engine = openai_engine(
        URL,
        model,
        contract=contract,
        rendering=Rendering(tiny.processor, contract),
        wait_for=lambda pause: None,
        transport=replay,
        **({"max_new_tokens": 128} | settings),
    )
    results = dict(engine(asks))
    return [results[ask.index] for ask in asks], replay


def forced(tiny: Loaded, ask: Ask, ids: list[int]) -> torch.Tensor:
    """Logarithms (tokens, vocabulary) of the base's own probabilities, given the answer that the server gave."""
    limits = {"min_pixels": 16 * 28 * 28, "max_pixels": 49 * 28 * 28}
    batch = collate_prompts(tiny.processor, [ask.messages], [ask.sample.image], **limits)
    prompt = batch["input_ids"].shape[1]
    batch["input_ids"] = torch.cat([batch["input_ids"], torch.tensor([ids])], dim=1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["mm_token_type_ids"] = torch.nn.functional.pad(batch["mm_token_type_ids"], (0, len(ids)))
    with torch.inference_mode():
        logits = tiny.model(**batch).logits[0, prompt - 1 : -1]
    return logits.log_softmax(dim=-1)


def test_answers_and_probabilities_are_those_of_the_base_in_this_process(tiny: Loaded, asks: list[Ask]) -> None:
    answers, replay = ask_recorded(tiny, asks, logprobs=True)
    assert replay.paths.count("/tokenize") == 1 and replay.paths.count("/v1/chat/completions") == 3
    for ask, answer in zip(asks, answers, strict=True):
        assert isinstance(answer, Answer), answer
        assert "".join(answer.tokens) == answer.text and len(answer.tokens) == len(answer.logprobs) > 0
        assert answer.image_tokens == 25 and not answer.truncated  # 140 x 140 pixels are 5 x 5 tokens
        ids = tiny.processor.tokenizer(answer.text)["input_ids"]
        assert answer.answer_tokens == len(ids) + 1 == len(answer.tokens) + 1  # the end token
        chances = forced(tiny, ask, ids)
        assert chances.argmax(dim=-1).tolist() == ids  # greedy, here as there
        own = chances[torch.arange(len(ids)), torch.tensor(ids)].tolist()
        assert answer.logprobs == pytest.approx(own, abs=1e-3)
        parsed = get_codec("qwen2_vl").parse(answer.text, ask.view)
        assert (parsed.status, parsed.labels, parsed.problems) == ("ok", ["cross"], [])


def test_a_constrained_answer_keeps_to_its_pattern(tiny: Loaded, asks: list[Ask]) -> None:
    (exchange,) = [
        exchange["body"]["structured_outputs"]
        for exchange in Replay().exchanges
        if "structured_outputs" in (exchange["body"] or {})
    ][:1]
    free, _ = ask_recorded(tiny, asks, logprobs=True)
    held, _ = ask_recorded(tiny, asks, logprobs=True, constrain=lambda view: exchange["regex"])
    assert exchange["regex"].endswith("{2}")
    for ask, answer, other in zip(asks, held, free, strict=True):
        assert isinstance(answer, Answer) and isinstance(other, Answer)
        parsed = get_codec("qwen2_vl").parse(answer.text, ask.view)
        assert (parsed.status, parsed.labels, parsed.problems) == ("ok", ["cross", "cross"], [])
        assert answer.text != other.text and len(answer.logprobs) == len(answer.tokens)


def test_an_answer_at_the_limit_is_truncated(tiny: Loaded, asks: list[Ask]) -> None:
    (answer,), _ = ask_recorded(tiny, asks[:1], max_new_tokens=6)
    assert isinstance(answer, Answer)
    assert (answer.truncated, answer.answer_tokens) == (True, 6)
    assert answer.text.startswith("<|object_ref_start|>cross<|object_ref_end|><|box_start|>(")


def test_further_answers_are_drawn(tiny: Loaded, asks: list[Ask]) -> None:
    (answer,), _ = ask_recorded(tiny, asks[:1], samples=3, seed=1)
    assert isinstance(answer, Answer) and len(answer.samples) == 3
    assert len({answer.text, *answer.samples}) > 1  # else nothing was drawn


def test_what_vllm_says_about_a_request_that_it_refuses_is_the_reason_of_the_row(tiny: Loaded, asks: list[Ask]) -> None:
    (error,), _ = ask_recorded(tiny, asks[:1], max_new_tokens=5000)
    assert isinstance(error, RowError)
    assert error.reason.startswith(
        "the server gave no answer: HTTP 400: max_tokens=5000 cannot be greater than max_model_len"
    )


def test_a_model_that_is_not_served_is_named(tiny: Loaded) -> None:
    contract = make_contract(tiny, labels=LABELS, box_order="raster", max_new_tokens=8, data_fingerprint="")
    with pytest.raises(ConfigError, match="has no model 'another'"):
        openai_engine(URL, "another", contract=contract, max_new_tokens=8, transport=Replay())
    connection = Connection(URL + "/v1", timeout=1, retries=0, transport=Replay())
    with connection, pytest.raises(RequestFailed, match="HTTP 404: The model `another` does not exist"):
        connection.post("/chat/completions", {"model": "another", "messages": build_messages(LABELS)[:1]})

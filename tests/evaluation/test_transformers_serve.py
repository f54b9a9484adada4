"""A real OpenAI-compatible server, `transformers serve` with the embedded base, gives the boxes of the base in this process.

It gives no probabilities and takes no pattern: text and parsing only. It runs in a thread of this process, on the loopback.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from vlmdet.boxes import Boxes
from vlmdet.data.dataset import build_messages
from vlmdet.data.synthetic.shapes import draw_scene
from vlmdet.errors import ConfigError, ContractError
from vlmdet.evaluation.rendering import Rendering
from vlmdet.evaluation.server import openai_engine
from vlmdet.grounding import get_codec
from vlmdet.grounding.codec import strip_control
from vlmdet.grounding.sizes import plan_view
from vlmdet.models.answers import Answer, Ask
from vlmdet.models.inference import generate_answers
from vlmdet.models.loader import load, make_contract
from vlmdet.models.tiny import TINY_DIR
from vlmdet.records import Sample

pytest.importorskip("uvicorn", reason="pip install 'transformers[serving]'")
pytest.importorskip("fastapi", reason="pip install 'transformers[serving]'")

LIMITS = {"min_pixels": 16 * 28 * 28, "max_pixels": 49 * 28 * 28}


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    """URL of the server; it is up when this returns, or the test fails after 60 seconds."""
    from transformers.cli.serve import Serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Serve(
        force_model=str(TINY_DIR), host="127.0.0.1", port=port, device="cpu", dtype="float32", non_blocking=True
    )
    try:
        up = threading.Event()
        for _ in range(600):
            if server.server.started:
                up.set()
                break
            up.wait(0.1)
        assert up.is_set(), "the server did not start"
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill_server()


def test_boxes_are_those_of_the_base_in_this_process(served: str, tmp_path: Path) -> None:
    loaded = load("tiny", dtype="float32", device="cpu")
    labels = ("cross", "star")
    contract = make_contract(loaded, labels=labels, box_order="raster", max_new_tokens=64, data_fingerprint="")
    rendering = Rendering(loaded.processor, contract)
    asks = []
    for seed, (width, height) in enumerate(((300, 200), (150, 150), (180, 320), (400, 400))):
        scene = draw_scene(np.random.default_rng(seed), width, height, objects=3, smallest=0.25, largest=0.6)
        path = tmp_path / f"{seed}.png"
        scene.image.save(path)
        sample = Sample(str(seed), path, width, height, Boxes.empty(), ())
        asks.append(Ask(seed, sample, build_messages([labels[seed % 2]]), plan_view(width, height, **LIMITS)))

    common: dict[str, Any] = {"contract": contract, "rendering": rendering, "concurrency": 2, "retries": 0}
    results = dict(openai_engine(served, str(TINY_DIR), max_new_tokens=64, **common)(asks))
    own = generate_answers(
        loaded.model, loaded.processor, [ask.messages for ask in asks], [ask.sample.image for ask in asks], **LIMITS,
        max_new_tokens=64,
    )  # fmt: skip
    codec, found = get_codec(contract.codec), 0
    for ask, answer in zip(asks, own, strict=True):
        theirs = results[ask.index]
        assert isinstance(theirs, Answer), theirs
        # whether that server keeps control tokens depends on its version and the family: they are read both ways
        assert strip_control(theirs.text).strip() == strip_control(answer.text).strip()
        assert (theirs.prompt_tokens, theirs.image_tokens) == (answer.prompt_tokens, answer.image_tokens)
        assert (theirs.answer_tokens, theirs.truncated) == (answer.answer_tokens, answer.truncated)
        parsed, expected = codec.parse(theirs.text, ask.view), codec.parse(answer.text, ask.view)
        assert parsed.boxes.tolist() == expected.boxes.tolist()
        assert (parsed.labels, parsed.status) == (expected.labels, expected.status)
        found += len(parsed.boxes)
    assert found >= 3

    # the picture has as many tokens as planned, or nothing goes on: here the limits of another run
    other = load("tiny", dtype="float32", device="cpu", min_pixels=4 * 28 * 28, max_pixels=9 * 28 * 28)
    smaller = make_contract(other, labels=labels, box_order="raster", max_new_tokens=64, data_fingerprint="")
    common |= {"contract": smaller, "rendering": Rendering(other.processor, smaller)}
    with pytest.raises(
        ContractError, match=r"the server reads a prompt of \d+ tokens, the model was trained with one of"
    ):
        list(openai_engine(served, str(TINY_DIR), max_new_tokens=8, **common)(asks[:1]))

    common |= {"contract": contract, "rendering": rendering}
    with pytest.raises(ConfigError, match="sends no token probabilities"):
        list(openai_engine(served, str(TINY_DIR), max_new_tokens=8, logprobs=True, **common)(asks[:1]))
    with pytest.raises(ConfigError, match="leave --constrain out"):
        openai_engine(served, str(TINY_DIR), max_new_tokens=8, constrain=lambda view: "none", **common)
    with pytest.raises(ConfigError, match="has no model 'Qwen/Qwen2-VL-2B-Instruct'"):
        openai_engine(served, "Qwen/Qwen2-VL-2B-Instruct", max_new_tokens=8, **common)
    assert httpx2.get(f"{served}/health").status_code == 200

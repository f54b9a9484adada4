"""`--engine openai` as a user meets it: rows from a server, and one line with exit code 2 where that cannot be."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmdet.cli import main
from vlmdet.data.collators import collate_prompts
from vlmdet.data.dataset import build_messages
from vlmdet.models.loader import load_processor
from vlmdet.models.tiny import TINY_MAX_PIXELS, TINY_MIN_PIXELS

BOX = "<|object_ref_start|>cross<|object_ref_end|><|box_start|>(100,250),(500,750)<|box_end|>"


class StandIn:
    """A server with the model `m` that gives one text to every picture; `bodies` are the requests."""

    def __init__(self) -> None:
        self.text, self.prompt_tokens, self.owner = BOX, 0, "me"
        self.bodies: list[dict[str, Any]] = []
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply({"data": [{"id": "m", "owned_by": stand_in.owner}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                if self.path != "/v1/chat/completions":
                    self.send_error(404)
                    return
                stand_in.bodies.append(body)
                message = {"role": "assistant", "content": stand_in.text}
                usage = {"prompt_tokens": stand_in.prompt_tokens, "completion_tokens": 9}
                self.reply({"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage})

            def reply(self, value: Any) -> None:
                data = json.dumps(value).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    made = StandIn()
    threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def words(tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of a `predict` about one picture of 140 x 140 pixels that works."""
    monkeypatch.chdir(tmp_path)
    picture = Image.new("RGB", (140, 140), (200, 30, 30))
    picture.save(tmp_path / "photo.png")
    processor = load_processor("tiny", min_pixels=None, max_pixels=None)
    limits = {"min_pixels": TINY_MIN_PIXELS, "max_pixels": TINY_MAX_PIXELS}
    stand_in.prompt_tokens = collate_prompts(processor, [build_messages(["cross"])], [picture], **limits)[
        "input_ids"
    ].shape[1]
    asked = ["predict", "photo.png", "--model", "tiny", "--classes", "cross", "--out", "drawn"]
    return [*asked, "--engine", "openai", "--url", stand_in.url, "--served-name", "m", "--scores", "none"]


def test_predict_gives_the_rows_of_a_server(
    words: list[str], stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["boxes"] == [pytest.approx([0.1, 0.25, 0.5, 0.75])] and row["labels"] == ["cross"]
    assert row["tokens"] == {"prompt": stand_in.prompt_tokens, "image": 25, "answer": 9}
    assert len(stand_in.bodies) == 1


def test_no_weights_are_read_for_a_model_that_a_server_has(
    words: list[str], stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AutoModelForImageTextToText", "fingerprint"):
        monkeypatch.setattr(f"vlmdet.models.loader.{name}", None)
    assert main(words) == 0
    assert len(stand_in.bodies) == 1


def test_a_constrained_server_gets_as_many_boxes_as_there_is_room_for(
    words: list[str], stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.owner = "vllm"
    assert main([*words, "--constrain"]) == 0
    pattern = re.compile(stand_in.bodies[0]["structured_outputs"]["regex"])
    tokenizer = load_processor("tiny", min_pixels=None, max_pixels=None).tokenizer
    room = stand_in.bodies[0]["max_tokens"] - 1  # the end token is one
    longest = BOX.replace("100,250", "998,998").replace("500,750", "999,999")
    counts = [count for count in range(1, 100) if pattern.fullmatch(longest * count)]
    assert counts == list(range(1, len(counts) + 1)) and 1 < len(counts) < 99
    assert len(tokenizer(longest * len(counts))["input_ids"]) <= room
    assert len(tokenizer(longest * (len(counts) + 1))["input_ids"]) > room


def test_a_baseline_is_asked_in_its_own_words_and_its_prompt_is_not_compared(
    words: list[str], stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.text, stand_in.prompt_tokens = '[{"bbox": [100, 250, 500, 750], "label": "cross"}]', 1
    assert main([*words, "--baseline", "plain_json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["boxes"] == [pytest.approx([0.1, 0.25, 0.5, 0.75])] and row["status"] == "ok"
    (message,) = stand_in.bodies[0]["messages"]  # no system message of ours
    assert message["content"][1]["text"].startswith("Find every cross in this image. Answer with a JSON list")


def test_what_cannot_be_is_one_line_and_exit_code_2(
    words: list[str], stand_in: StandIn, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    own = stand_in.prompt_tokens
    for changed, said in (
        (["--url", "http://127.0.0.1:9"], "no server answers at http://127.0.0.1:9/v1"),
        (["--url", "somewhere"], "'somewhere' is no http or https URL"),
        (["--served-name", "other"], "has no model 'other'; there is: m"),
        (["--scores", "token_probability"], "--scores none"),
        (["--constrain"], "leave --constrain out"),
        (["--concurrency", "0"], "--concurrency 0; give at least 1"),
        (["--timeout", "nan"], "--timeout nan"),
        (["--retries", "-1"], "--retries -1"),
        (["--baseline", "plain"], "did you mean 'plain_json'"),
    ):
        assert main([*words, *changed]) == 2
        captured = capsys.readouterr()
        assert said in captured.err and len(captured.err.splitlines()) == 1 and "secret" not in captured.err
        assert captured.out == ""
    stand_in.prompt_tokens = own + 3
    assert main(words) == 2
    assert f"a prompt of {own + 3} tokens, the model was trained with one of {own}" in capsys.readouterr().err

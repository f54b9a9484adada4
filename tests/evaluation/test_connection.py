"""Requests are tried again where that may help, with growing pauses, and the key is never shown."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx2
import pytest

from vlmdet.errors import ConfigError
from vlmdet.evaluation.connection import Connection, RequestFailed, base_url

BASE = "http://127.0.0.1:9/v1"
Reply = httpx2.Response | Exception


def connect(replies: list[Reply], *, retries: int = 5) -> tuple[Connection, list[httpx2.Request], list[float]]:
    """A connection to a script of replies; the requests that it gets, and the pauses between them."""
    requests: list[httpx2.Request] = []
    pauses: list[float] = []

    def handle(request: httpx2.Request) -> httpx2.Response:
        requests.append(request)
        reply = replies[len(requests) - 1]
        if isinstance(reply, Exception):
            raise reply
        return reply

    connection = Connection(
        BASE, timeout=1, retries=retries, wait=pauses.append, transport=httpx2.MockTransport(handle)
    )
    return connection, requests, pauses


def busy(status: int = 503, **headers: str) -> httpx2.Response:
    return httpx2.Response(
        status, json={"error": {"message": "busy"}}, headers={k.replace("_", "-"): v for k, v in headers.items()}
    )


FINE = httpx2.Response(200, json={"fine": True})


@pytest.mark.parametrize(
    "trouble",
    [
        busy(429),
        busy(408),
        busy(500),
        busy(503),
        httpx2.ConnectError("refused"),
        httpx2.ReadTimeout("slow"),
        httpx2.RemoteProtocolError("gone"),
        httpx2.ReadError("reset"),
        httpx2.Response(200, content=b'{"choices": ['),
        httpx2.Response(200, content=b"\xff\xfe"),
        httpx2.Response(200, content=b"[" * 100_000),
    ],
    ids=str,
)
def test_trouble_that_may_pass_is_tried_again(trouble: Reply) -> None:
    connection, requests, pauses = connect([trouble, trouble, trouble, FINE])
    with connection:
        assert connection.post("/chat/completions", {"model": "m"}) == {"fine": True}
    assert [request.url.path for request in requests] == ["/v1/chat/completions"] * 4
    assert len({request.content for request in requests}) == 1
    for pause, longest in zip(pauses, (0.5, 1.0, 2.0), strict=True):
        assert longest / 2 <= pause <= longest


def test_pauses_stop_growing_at_half_a_minute_and_differ() -> None:
    connection, _, pauses = connect([busy()] * 12, retries=11)
    with connection, pytest.raises(RequestFailed, match=r"^HTTP 503: busy \(attempt 12\)$") as caught:
        connection.get("/models")
    assert caught.value.status == 503
    assert all(15 <= pause <= 30 for pause in pauses[6:])
    assert len(set(pauses[6:])) > 1


@pytest.mark.parametrize("status", [400, 401, 404, 422, 302, 204])
def test_a_refusal_is_not_tried_again(status: int) -> None:
    connection, requests, pauses = connect([busy(status), FINE])
    with connection, pytest.raises(RequestFailed, match=f"^HTTP {status}: ") as caught:
        connection.get("/models")
    assert (len(requests), pauses, caught.value.status) == (1, [], status)


def test_the_pause_that_a_server_asks_for_is_kept() -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    connection, _, pauses = connect([busy(429, retry_after="7"), busy(429, retry_after=later), busy(429), FINE])
    with connection:
        connection.get("/models")
    assert pauses[0] == 7
    assert 60 < pauses[1] <= 100
    assert pauses[2] <= 2


@pytest.mark.parametrize("value", ["soon", "-3", "", "Fri, 99 Foo 2026", "1e3", "²"])
def test_a_pause_that_cannot_be_read_is_none(value: str) -> None:
    connection, _, pauses = connect([httpx2.Response(429, headers={"retry-after": value.encode()}), FINE])
    with connection:
        connection.get("/models")
    assert 0.25 <= pauses[0] <= 0.5


def test_a_server_that_asks_for_an_hour_is_given_up() -> None:
    connection, requests, pauses = connect([busy(429, retry_after="3600")])
    with connection, pytest.raises(RequestFailed, match="it asks for a pause of 3600 seconds"):
        connection.get("/models")
    assert (len(requests), pauses) == (1, [])


def test_no_attempt_begins_once_it_was_told_to_stop() -> None:
    connection, requests, _ = connect([busy(), FINE])
    with connection:
        connection.stop()
        with pytest.raises(RequestFailed):
            connection.get("/models")
    assert len(requests) == 1


def test_whether_a_connection_could_be_made_is_told() -> None:
    for error, connected in (
        (httpx2.ConnectError("refused"), False),
        (httpx2.ConnectTimeout("slow"), False),
        (httpx2.ReadTimeout("slow"), True),
        (httpx2.RemoteProtocolError("gone"), True),
    ):
        connection, _, _ = connect([error], retries=0)
        with connection, pytest.raises(RequestFailed) as caught:
            connection.get("/models")
        assert (caught.value.connected, caught.value.status) == (connected, None)


def test_the_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    refusal = httpx2.Response(401, json={"error": {"message": "wrong key sk-secret\x1b[31m\n" + 400 * "x"}})
    connection, requests, _ = connect([refusal])
    with connection, pytest.raises(RequestFailed) as caught:
        connection.get("/models")
    assert requests[0].headers["authorization"] == "Bearer sk-secret"
    assert caught.value.reason.startswith("HTTP 401: wrong key … [31m xxx")
    assert len(caught.value.reason) == 300

    monkeypatch.delenv("OPENAI_API_KEY")
    connection, requests, _ = connect([FINE])
    with connection:
        connection.get("/models")
    assert "authorization" not in requests[0].headers


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ({"error": {"message": "too long"}}, "too long"),
        ({"error": "too long"}, "too long"),
        ({"detail": "Server is pinned"}, "Server is pinned"),
        ({"detail": [{"loc": ["body"]}]}, '[{"loc": ["body"]}]'),
        ({"message": "too long"}, "too long"),
        (["odd"], '["odd"]'),
    ],
)
def test_what_a_server_says_is_found_in_all_its_forms(said: Any, shown: str) -> None:
    connection, _, _ = connect([httpx2.Response(400, json=said)])
    with connection, pytest.raises(RequestFailed) as caught:
        connection.get("/models")
    assert caught.value.reason == f"HTTP 400: {shown}"


@pytest.mark.parametrize(
    ("typed", "base"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1"),
        ("http://localhost:8000/v1/", "http://localhost:8000/v1"),
        ("https://api.example.com/v1/chat/completions", "https://api.example.com/v1"),
        ("https://api.example.com/openai/v2", "https://api.example.com/openai/v2"),
    ],
)
def test_the_base_of_a_url(typed: str, base: str) -> None:
    assert base_url(typed) == base


@pytest.mark.parametrize(
    "typed", ["", "127.0.0.1:8000", "localhost", "ftp://host/v1", "http://", "http://[::1", "file:///etc"]
)
def test_what_is_no_url_of_a_server_is_refused(typed: str) -> None:
    with pytest.raises(ConfigError, match=r"e\.g\. http://127\.0\.0\.1:8000/v1"):
        base_url(typed)


def test_a_key_in_the_url_is_refused_and_not_repeated() -> None:
    for typed in ("http://me:sk-secret@host/v1", "http://host/v1?key=sk-secret"):
        with pytest.raises(ConfigError, match="OPENAI_API_KEY") as caught:
            base_url(typed)
        assert "secret" not in str(caught.value)


@pytest.fixture
def scripted() -> Iterator[Callable[[list[bytes]], str]]:
    """A real server on the loopback that sends raw bytes, one script per request, and then hangs up."""
    servers: list[ThreadingHTTPServer] = []

    def start(script: list[bytes]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                self.wfile.write(script.pop(0))
                self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/v1"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_over_a_real_socket(scripted: Callable[[list[bytes]], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Hangs up without a word, hangs up in the middle, sends no HTTP, says that it is busy; then answers."""
    whole = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 14\r\n\r\n"
    url = scripted(
        [
            b"",
            whole + b'{"fine',
            b"what?\r\n\r\n",
            b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 9\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
            whole + b'{"fine": true}',
        ]
    )
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # for other machines than this one
    monkeypatch.delenv("NO_PROXY", raising=False)
    pauses: list[float] = []
    with Connection(url, timeout=20, retries=5, wait=pauses.append) as connection:
        assert connection.post("/chat/completions", {"n": 1}) == {"fine": True}
    assert len(pauses) == 4
    assert pauses[3] == 9

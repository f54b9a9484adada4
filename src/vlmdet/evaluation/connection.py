"""JSON over HTTP that does not give up at the first trouble: time-outs, retries with back-off, and errors in one line.

When: AFTER training, where answers come from a server (`evaluation.server`); no torch.

    429, 408, 5xx, no connection, a connection that ends early, a time-out, an answer that is no JSON   tried again
    any other status                                                                                  not tried again

The wait before attempt k is 0.5 * 2^(k-1) seconds, at most 30, of which a random half is taken off, so that requests that
failed together do not come back together; where the server says `Retry-After`, no less than that.
"""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from vlmdet.errors import ConfigError

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds before the second attempt, and at most before any."""

PATIENCE = 300.0
"""Seconds: a server that asks for a longer pause than this is given up."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")

KEY_VARIABLE = "OPENAI_API_KEY"
"""The only place that a key is read from; it is sent to the server, and never written or shown."""


class RequestFailed(Exception):  # noqa: N818  as `errors.Stopped`: whoever asked decides what it means
    """A request got no usable answer, after all attempts.

    Args:
        reason: one line, without the key.
        status: the HTTP status of the last attempt; None where there was no whole answer.
        connected: False where not even a connection could be made.
        pause: seconds that the server asks for before another attempt, 0 for none; None where another would not help.
    """

    def __init__(
        self, reason: str, *, status: int | None = None, connected: bool = True, pause: float | None = None
    ) -> None:
        super().__init__()
        self.reason, self.status, self.connected, self.pause = reason, status, connected, pause

    def __str__(self) -> str:
        return self.reason


def base_url(url: str) -> str:
    """Return the base of an OpenAI-compatible server's paths: `http://127.0.0.1:8000` gives `http://127.0.0.1:8000/v1`.

    Input: what a user types, with or without `/v1` or `/v1/chat/completions`; another path is kept as it is.

    Raises:
        ConfigError: it is no http or https URL, or holds a password or a query.
    """
    example = "give the server's address, e.g. http://127.0.0.1:8000/v1"
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ConfigError(f"'{url}' is no URL ({error})", example) from error
    if parsed.userinfo or parsed.query:
        raise ConfigError(
            f"the URL of the server at {parsed.host} holds a name, a password or a query",
            f"leave them out; a key is read from {KEY_VARIABLE}",
        )
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"'{url}' is no http or https URL", example)
    path = parsed.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
    return str(parsed.copy_with(path=path, fragment=None))


class Connection:
    """An open connection to a server, for several threads at once; a context manager.

    Args:
        base: see `base_url`.
        timeout: seconds for one attempt: to connect, and between two pieces of an answer.
        retries: attempts after the first.
        wait: called with seconds between attempts; by default sleeps, and wakes when `stop` is called.
        transport: what carries the requests; by default the network.
    """

    def __init__(
        self,
        base: str,
        *,
        timeout: float,
        retries: int,
        wait: Callable[[float], object] | None = None,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self.base, self.retries = base, retries
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        self._stopped = threading.Event()
        self._wait = wait or self._stopped.wait
        self._client = httpx2.Client(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx2.Timeout(timeout, pool=None),  # waiting for a turn is no fault of the server
            transport=transport,
            trust_env=httpx2.URL(base).host not in LOOPBACK,  # a proxy of the environment is for other machines
            follow_redirects=False,  # the key is for this server alone
        )

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._client.close()

    def stop(self) -> None:
        """Let no further attempt begin."""
        self._stopped.set()

    def get(self, path: str, *, retries: int | None = None) -> Any:
        """Return the JSON at a path under the base.

        Raises:
            RequestFailed: there is no usable answer.
        """
        return self._request("GET", self.base + path, None, self.retries if retries is None else retries)

    def post(self, path: str, body: dict[str, Any], *, at_root: bool = False, retries: int | None = None) -> Any:
        """Send JSON to a path under the base, or beside `/v1`, and return the JSON that comes back.

        Raises:
            RequestFailed: there is no usable answer.
        """
        base = self.base.removesuffix("/v1") if at_root else self.base
        return self._request("POST", base + path, body, self.retries if retries is None else retries)

    def _request(self, method: str, url: str, body: Any, retries: int) -> Any:
        attempt = 1
        while True:
            try:
                return self._attempt(method, url, body)
            except RequestFailed as failure:
                if failure.pause is None or self._stopped.is_set():
                    raise
                if attempt > retries or failure.pause > PATIENCE:
                    pause = f", it asks for a pause of {failure.pause:.0f} seconds" if failure.pause > PATIENCE else ""
                    failure.reason += f" (attempt {attempt}{pause})" if attempt > 1 or pause else ""
                    raise
                longest = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1))
                self._wait(max(failure.pause, longest * random.uniform(0.5, 1)))
                attempt += 1

    def _attempt(self, method: str, url: str, body: Any) -> Any:
        """Return what came back.

        Raises:
            RequestFailed: with a pause where another attempt may help.
        """
        try:
            response = self._client.request(method, url, json=body)
        except httpx2.TimeoutException as error:
            connected = not isinstance(error, httpx2.ConnectTimeout)
            raise RequestFailed(f"no answer in time ({type(error).__name__})", connected=connected, pause=0) from error
        except httpx2.TransportError as error:
            connected = not isinstance(error, (httpx2.ConnectError, httpx2.ProxyError))
            reason = self._clean(f"the connection failed: {error or type(error).__name__}")
            raise RequestFailed(reason, connected=connected, pause=0) from error
        except httpx2.DecodingError as error:
            raise RequestFailed(self._clean(f"an answer that cannot be unpacked: {error}"), pause=0) from error
        status = response.status_code
        if status != 200:
            again = status in (408, 429) or status >= 500
            reason = self._clean(f"HTTP {status}: {_message(response)}")
            raise RequestFailed(reason, status=status, pause=_retry_after(response) if again else None)
        try:
            return response.json()
        except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or nested without end
            reason = self._clean(f"an answer that is no JSON: {response.text[:80]!r}")
            raise RequestFailed(reason, status=status, pause=0) from error

    def _clean(self, text: str) -> str:
        """Bring what a server or a library says to one short line, without the key."""
        if self._key:
            text = text.replace(self._key, "…")
        line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return line if len(line) <= 300 else f"{line[:298]} …"


def _message(response: httpx2.Response) -> str:
    """Return what a server says about an error, from the forms that servers use."""
    try:
        said: Any = response.json()
    except ValueError:
        return response.text
    if isinstance(said, dict):
        said = said.get("error", said.get("detail", said.get("message", said)))
    if isinstance(said, dict):
        said = said.get("message", said)
    return said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)


def _retry_after(response: httpx2.Response) -> float:
    """Return the pause in seconds that a server asks for: a number, or a date of HTTP; 0 where it asks for none."""
    value = response.headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        then = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    return max(0.0, (then.replace(tzinfo=then.tzinfo or UTC) - datetime.now(UTC)).total_seconds())

"""One OpenAI-compatible server: which model it serves, and one request to it."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import httpx

from dashinfer_vlm.bench.events import Failure, Outcome, Piece, StreamError, error_message, read_reply
from dashinfer_vlm.bench.workloads import Turn
from dashinfer_vlm.errors import ConfigError, DashInferError

__all__ = ["BenchError", "Send", "Target", "connect", "find_model", "parse_target", "sender"]

_CONNECT_TIMEOUT_S = 10.0
_KEEP_ALIVE_S = 2.0
"""Idle connections are closed before any server does so, at 5 s the common ones: its close could cross a request."""


class BenchError(DashInferError):
    """A measurement cannot be made."""


@dataclass(frozen=True, slots=True)
class Target:
    """A server under a name of the user's choice."""

    name: str
    url: str
    """With `/v1` and no slash after it."""
    model: str = ""
    """What the server calls its model; empty until it was asked."""


Send: TypeAlias = Callable[[Turn, int, int], Awaitable[Outcome]]
"""Sends one turn, given its number of tokens and its place in the conversation, and waits for its end."""


_SCHEMES = ("http://", "https://")


def parse_target(text: str) -> Target:
    """`NAME=URL`, or a URL, which its host and port then name, with or without `/v1`; raises ConfigError."""
    name, separator, url = text.partition("=")
    if text.startswith(_SCHEMES):
        name, separator, url = text.partition("://")[2].partition("/")[0], "=", text
    if not name or not separator or not url.startswith(_SCHEMES):
        raise ConfigError(f"--target is {text!r}; it must be a URL or NAME=URL, such as ours=http://localhost:8000")
    url = url.rstrip("/")
    return Target(name, url if url.endswith("/v1") else f"{url}/v1")


def connect(timeout_s: float, api_key: str | None) -> httpx.AsyncClient:
    """A client for all targets: as many connections as clients, no proxy, no compression that would delay tokens."""
    return httpx.AsyncClient(
        timeout=httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S, pool=None),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_KEEP_ALIVE_S),
        headers={"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {}),
        trust_env=False,
    )


async def find_model(http: httpx.AsyncClient, target: Target) -> Target:
    """`target` with the first model that its server lists; raises BenchError when it lists none."""
    try:
        answer = await http.get(f"{target.url}/models", timeout=_CONNECT_TIMEOUT_S)
        answer.raise_for_status()
        models = [str(model["id"]) for model in answer.json()["data"]]
    except httpx.HTTPError as error:
        raise BenchError(f"{target.name} does not tell its models at {target.url}/models: {_say(error)}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{target.name} answers {target.url}/models with something else than a list") from error
    if not models:
        raise BenchError(f"{target.name} lists no model at {target.url}/models")
    return replace(target, model=models[0])


def sender(http: httpx.AsyncClient, target: Target, *, clock: Callable[[], float] = time.perf_counter) -> Send:
    """How a turn is sent to `target`."""
    start = b'{"model": ' + json.dumps(target.model).encode() + b", "
    url = f"{target.url}/chat/completions"

    async def send(turn: Turn, num_tokens: int, place: int) -> Outcome:
        pieces: list[Piece] = []
        body = start + turn[1:]
        sent_s = clock()
        try:
            await _ask(http, url, body, pieces, clock)
            return read_reply(sent_s, clock(), pieces, num_tokens, place)
        except (httpx.HTTPError, StreamError) as error:
            return Failure(sent_s, clock(), _say(error), place)

    return send


class _KeptClosedError(httpx.TransportError):
    """The server has closed a connection that both sides had kept, while a request was on its way."""


async def _ask(http: httpx.AsyncClient, url: str, body: bytes, pieces: list[Piece], clock: Callable[[], float]) -> None:
    """Every client asks again where a kept connection was closed: servers that were paused find theirs too old."""
    try:
        await _stream(http, url, body, pieces, clock)
    except _KeptClosedError:
        await _stream(http, url, body, pieces, clock)


async def _stream(
    http: httpx.AsyncClient, url: str, body: bytes, pieces: list[Piece], clock: Callable[[], float]
) -> None:
    """Raises _KeptClosedError only before any byte of an answer."""
    events: set[str] = set()

    async def note(event: str, info: dict[str, Any]) -> None:
        events.add(event)

    try:
        async with http.stream(
            "POST", url, content=body, headers={"Content-Type": "application/json"}, extensions={"trace": note}
        ) as response:
            if response.status_code != httpx.codes.OK:
                raise StreamError(f"HTTP {response.status_code}: {_error_text(await response.aread())}")
            async for piece in response.aiter_raw():
                pieces.append((clock(), piece))
    except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError) as error:
        if events.isdisjoint({"connection.connect_tcp.started", "http11.receive_response_headers.complete"}):
            raise _KeptClosedError(str(error), request=error.request) from error
        raise


def _error_text(body: bytes) -> str:
    try:
        parsed = json.loads(body)
    except ValueError:
        return body[:200].decode(errors="replace")
    return error_message(parsed) if isinstance(parsed, dict) else str(parsed)[:200]


def _say(error: Exception) -> str:
    kind = "" if isinstance(error, StreamError | httpx.HTTPStatusError) else type(error).__name__
    return ": ".join(part for part in (kind, str(error)) if part)

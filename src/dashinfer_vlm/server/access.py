"""What is the same for every request: its id, its path without a slash at the end, how long it may take, and what is
told of it when it is over."""

from __future__ import annotations

import logging
import math
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dashinfer_vlm.frontend.observer import CallReport, Report, current_calls
from dashinfer_vlm.frontend.tenants import current_timeout_s
from dashinfer_vlm.server.auth import TENANT

logger = logging.getLogger(__name__)

_HEADER = "x-request-id"
_TIMEOUT = "x-request-timeout"
_ANSWER_HEADERS = (_HEADER, "request-id")
"""Anthropic's clients read the second."""
_ID = re.compile(r"[\x21-\x7e]{1,128}")
_CLIENT_GONE = 499
"""nginx's number for a client that left before there was an answer."""


@dataclass(slots=True, kw_only=True)
class Exchange:
    """One request and what became of it."""

    scope: Scope
    path: str
    """As it was asked for."""
    request_id: str
    start_s: float = field(default_factory=time.perf_counter)
    status: int = _CLIENT_GONE
    is_whole: bool = False
    """Whether the answer was sent to its end."""
    calls: list[Report] = field(default_factory=list)
    """What it has asked of the model."""

    @property
    def headers(self) -> Headers:
        return Headers(scope=self.scope)

    def reports(self) -> list[CallReport]:
        return [report() for report in self.calls]


Teller = Callable[[Exchange, list[CallReport]], None]


class Access:
    """ASGI middleware. A client's `x-request-id` is kept where it is one word, and made up where there is none; the
    answer carries it, and so does the log. Queries are not logged: people put keys into them. `x-request-timeout` is
    the time for the answer in seconds."""

    def __init__(self, app: ASGIApp, tellers: tuple[Teller, ...] = ()) -> None:
        """`tellers` hear of every request when it is over, as the log does."""
        self._app = app
        self._tellers = (_log, *tellers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        sent = headers.get(_HEADER, "")
        request_id = sent if _ID.fullmatch(sent) else secrets.token_hex(12)
        exchange = Exchange(scope=scope, path=scope["path"], request_id=request_id)
        scope["path"] = exchange.path.rstrip("/") or "/"
        current_timeout_s.set(_seconds(headers.get(_TIMEOUT)))
        current_calls.set(exchange.calls)

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(dict.fromkeys(_ANSWER_HEADERS, request_id))
                exchange.status = message["status"]
            elif not message.get("more_body"):
                exchange.is_whole = True
            await send(message)

        try:
            await self._app(scope, receive, tell)
        finally:
            self._tell(exchange)

    def _tell(self, exchange: Exchange) -> None:
        reports = exchange.reports()
        for teller in self._tellers:
            teller(exchange, reports)


def _seconds(header: str | None) -> float | None:
    """NaN for what is no number, which is refused as other wrong numbers are."""
    try:
        return None if header is None else float(header)
    except ValueError:
        return math.nan


def _log(exchange: Exchange, reports: list[CallReport]) -> None:
    """In uvicorn's form; behind it the id, the name of the key where there is one, and what it took. Lines of JSON have
    the same as fields."""
    scope = exchange.scope
    host, port = scope.get("client") or ("-", 0)
    facts: dict[str, Any] = {
        "client": f"{host}:{port}",
        "method": scope["method"],
        "path": exchange.path.encode("unicode_escape").decode(),
        "http": scope["http_version"],
        "status": exchange.status,
        "request_id": exchange.request_id,
        "key": tenant.name if (tenant := scope.get(TENANT)) else None,
        "seconds": round(time.perf_counter() - exchange.start_s, 4),
        "complete": exchange.is_whole,
        **_tokens(reports),
    }
    who = f"{facts['request_id']} {facts['key']}" if facts["key"] else facts["request_id"]
    request = f'"{facts["method"]} {facts["path"]} HTTP/{facts["http"]}" {facts["status"]} {who}'
    logger.info("%s - %s %s", facts["client"], request, _took(facts), extra={"facts": facts})


def _tokens(reports: list[CallReport]) -> dict[str, Any]:
    if not reports:
        return {}
    first = min((r.first_token_s for r in reports if r.first_token_s is not None), default=None)
    return {
        "prompt_tokens": sum(report.num_prompt_tokens for report in reports),
        "cached_tokens": sum(report.num_cached_tokens for report in reports),
        "output_tokens": sum(report.num_output_tokens for report in reports),
        "first_token_seconds": None if first is None else round(first, 4),
    }


def _took(facts: dict[str, Any]) -> str:
    parts = [f"{facts['seconds']:.3f} s"]
    if "prompt_tokens" in facts:
        parts.append(f"{facts['prompt_tokens']}+{facts['output_tokens']} tokens, {facts['cached_tokens']} cached")
        if facts["first_token_seconds"] is not None:
            parts.append(f"first after {facts['first_token_seconds']:.3f} s")
    if not facts["complete"]:
        parts.append("not sent to its end")
    return ", ".join(parts)

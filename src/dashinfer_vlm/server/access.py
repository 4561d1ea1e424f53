"""What is the same for every request: its id, its path without a slash at the end, how long it may take, and its line
in the log."""

from __future__ import annotations

import logging
import math
import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dashinfer_vlm.frontend.tenants import current_timeout_s
from dashinfer_vlm.server.auth import TENANT

logger = logging.getLogger(__name__)

_HEADER = "x-request-id"
_TIMEOUT = "x-request-timeout"
_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Access:
    """ASGI middleware. A client's `x-request-id` is kept where it is one word, and made up where there is none; the
    answer carries it, and so does the log. Queries are not logged: people put keys into them. `x-request-timeout` is
    the time for the answer in seconds."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        sent = headers.get(_HEADER, "")
        request_id = sent if _ID.fullmatch(sent) else secrets.token_hex(12)
        current_timeout_s.set(_seconds(headers.get(_TIMEOUT)))
        path = scope["path"]
        scope["path"] = path.rstrip("/") or "/"

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[_HEADER] = request_id
                _log(scope, path, message["status"], request_id)
            await send(message)

        await self._app(scope, receive, tell)


def _seconds(header: str | None) -> float | None:
    """NaN for what is no number, which is refused as other wrong numbers are."""
    try:
        return None if header is None else float(header)
    except ValueError:
        return math.nan


def _log(scope: Scope, path: str, status: int, request_id: str) -> None:
    """In uvicorn's form, with the id behind it, and the name of the key where there is one."""
    host, port = scope.get("client") or ("-", 0)
    version, printable = scope["http_version"], path.encode("unicode_escape").decode()
    who = f"{request_id} {tenant.name}" if (tenant := scope.get(TENANT)) else request_id
    logger.info('%s:%d - "%s %s HTTP/%s" %d %s', host, port, scope["method"], printable, version, status, who)

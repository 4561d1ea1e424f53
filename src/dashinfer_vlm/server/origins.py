"""Pages of other sites: what a browser sends for one without asking first goes no further here.

A page may make a browser post a form or plain text to any server, `localhost` too. It cannot read the answer, but the
server would have worked for it. With keys this is no danger, since a page has none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from dashinfer_vlm.server.errors import HttpError

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
"""They change nothing, and cost next to nothing."""


class SameOrigin:
    """ASGI middleware. Answers 403 to what a browser says that it sends for a page of another origin, which `allowed`
    does not name."""

    def __init__(
        self, app: ASGIApp, allowed: Collection[str] = (), refused: Callable[[str], None] = lambda reason: None
    ) -> None:
        """`refused` hears why a request went no further."""
        self._app = app
        self._allowed = frozenset(allowed)
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in SAFE_METHODS or self._may_call(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        self._refused("origin_refused")
        await _refusal().reply.response(scope["path"])(scope, receive, send)

    def _may_call(self, headers: Headers) -> bool:
        """Browsers say `Sec-Fetch-Site` over TLS and to this machine, which holds behind a proxy too, and `Origin`
        everywhere; other clients say neither."""
        origin = headers.get("origin")
        if "*" in self._allowed or origin in self._allowed:
            return True
        site = headers.get("sec-fetch-site")
        if site is not None:
            return site in ("same-origin", "none")
        return origin is None or origin.partition("://")[2].lower() == headers.get("host", "").lower()


def _refusal() -> HttpError:
    return HttpError(
        403,
        "origin_refused",
        "this request comes from a page of another origin; start the server with --allowed-origins to let it call",
        type="permission_error",
    )

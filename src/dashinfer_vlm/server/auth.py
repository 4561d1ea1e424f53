"""API keys: one of them opens every route but the probes, the API's description and the files of the page."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from dashinfer_vlm.config import ServerConfig
from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.server.errors import HttpError

OPEN_PATHS = frozenset({"/health", "/ready", "/openapi.json", "/docs"})
"""What load balancers ask before they know a key, and what holds no secret."""


class ApiKeys:
    """ASGI middleware that answers 401 unless the path is open or the request carries one of the keys as
    `Authorization: Bearer`."""

    def __init__(self, app: ASGIApp, keys: Iterable[str], open_paths: frozenset[str] = OPEN_PATHS) -> None:
        self._app = app
        self._open_paths = open_paths
        self._digests = [sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._open_paths and not self._knows(Headers(scope=scope)):
            error = HttpError(
                401,
                "invalid_api_key",
                "no valid API key in the Authorization header; send 'Authorization: Bearer KEY'",
                type="authentication_error",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error.reply.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _knows(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return False
        digest = sha256(key.strip().encode()).digest()
        # digests have one length and all are compared, so the time tells nothing about the keys
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


def read_keys(config: ServerConfig) -> tuple[str, ...]:
    """The keys of the flag and of the file; raises ConfigError for a file that cannot be read or holds none."""
    if config.api_keys_file is None:
        return config.api_keys
    try:
        lines = Path(config.api_keys_file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-keys-file {config.api_keys_file} cannot be read: {error}") from error
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise ConfigError(f"--api-keys-file {config.api_keys_file} holds no key; write one per line")
    return config.api_keys + keys

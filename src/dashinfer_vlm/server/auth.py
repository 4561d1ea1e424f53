"""API keys: one of them opens every route but the probes, the API's description and the files of the page, and says
whose request it is."""

from __future__ import annotations

import hmac
import logging
import re
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import msgspec
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from dashinfer_vlm.config import ServerConfig
from dashinfer_vlm.errors import ConfigError, RateLimitError
from dashinfer_vlm.frontend.tenants import Tenant, TenantLimits, current_tenant
from dashinfer_vlm.server.errors import HttpError, reply_to
from dashinfer_vlm.server.files import Changes
from dashinfer_vlm.server.origins import SAFE_METHODS

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/ready", "/openapi.json", "/docs"})
"""What load balancers ask before they know a key, and what holds no secret."""
TENANT = "dashinfer.tenant"
"""The key of the ASGI scope that holds the Tenant of a request, for the log. Who asks from within the server has set it
already, and needs no key."""
_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
_NO_NAME = re.compile(r"key-\d+")
"""What a key without a name is called, by its place."""


class KeyHolder(TenantLimits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One name of a file of keys: any of its keys will do, so that one can be replaced by another."""

    keys: Annotated[tuple[Annotated[str, msgspec.Meta(min_length=1)], ...], msgspec.Meta(min_length=1)]


class Keyring:
    """Which key is whose. The file is read again when it changes; one that cannot be used is logged, and what was read
    before stays."""

    def __init__(self, config: ServerConfig) -> None:
        """Raises ConfigError for a file that cannot be read or holds no key."""
        self._config = config
        self._changes = Changes(*filter(None, [config.api_keys_file]))
        self._tenants: dict[str, Tenant] = {}
        """By their ids."""
        self._by_digest: list[tuple[bytes, Tenant]] = []
        self._read()

    def __len__(self) -> int:
        return len(self._by_digest)

    def tenants(self) -> list[Tenant]:
        """One for each name."""
        return list(self._tenants.values())

    def tenant(self, headers: Headers) -> Tenant | None:
        """Whose key a request carries. Digests have one length and all are compared, so that the time tells nothing
        about the keys."""
        if self._changes.happened():
            self.read_again()
        sent = [sha256(key).digest() for key in sent_keys(headers)]
        found = [t for mine in sent for known, t in self._by_digest if hmac.compare_digest(mine, known)]
        return found[0] if found else None

    def read_again(self) -> None:
        """Look at the file now."""
        try:
            self._read()
            logger.info("%s was read again; there are keys of %d names", self._config.api_keys_file, len(self._tenants))
        except ConfigError as error:
            logger.error("%s; the keys before are still used", error)

    def _read(self) -> None:
        holders = read_keys(self._config)
        before, self._tenants, self._by_digest = self._tenants, {}, []
        for name, holder in holders.items():
            id = _id_of(name, holder)
            tenant = self._tenants[id] = before.get(id) or Tenant(id=id)
            tenant.name = name
            tenant.change(_with_defaults(holder, self._config))
            tenant.has_neighbours = len(holders) > 1
            self._by_digest += [(sha256(key.encode()).digest(), tenant) for key in holder.keys]


class ApiKeys:
    """ASGI middleware. Answers 401 unless the path is open or the request carries a key, as `Authorization: Bearer` or,
    as Anthropic's clients send it, as `x-api-key`; and 429 for a key that has used what it may use now."""

    def __init__(
        self,
        app: ASGIApp,
        keyring: Keyring,
        open_paths: frozenset[str] = OPEN_PATHS,
        refused: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """`refused` hears why a request went no further."""
        self._app = app
        self._keyring = keyring
        self._open_paths = open_paths
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open_paths or TENANT in scope:
            await self._app(scope, receive, send)
            return
        tenant = self._keyring.tenant(Headers(scope=scope))
        if tenant is None:
            self._refused("invalid_api_key")
            await _no_key().reply.response(scope["path"])(scope, receive, send)
            return
        scope[TENANT] = tenant
        current_tenant.set(tenant)
        if scope["method"] in SAFE_METHODS:  # no limit of a key counts them
            await self._app(scope, receive, send)
            return
        try:
            with tenant.request():
                await self._app(scope, receive, send)
        except RateLimitError as error:  # from this tenant's own gate: what the application raises, it answers itself
            self._refused(error.reason)
            await reply_to(error).response(scope["path"])(scope, receive, send)


def sent_keys(headers: Headers) -> list[bytes]:
    """What a client sent as its key; some clients send both headers, of which one is right."""
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    candidates = (bearer if scheme.lower() == "bearer" else "", headers.get("x-api-key", ""))
    return [key.encode("latin-1") for candidate in candidates if (key := candidate.strip())]  # the bytes that were sent


def read_keys(config: ServerConfig) -> dict[str, KeyHolder]:
    """The keys of the flag and of the file by name; raises ConfigError for a file that cannot be read or holds none."""
    plain, named = config.api_keys, {}
    if config.api_keys_file is not None:
        text = _text_of(config.api_keys_file)
        if text.lstrip().startswith("{"):
            named = _named(text, config.api_keys_file)
        else:
            plain += _lines(text, config.api_keys_file)
    holders = {f"key-{i}": KeyHolder(keys=(key,)) for i, key in enumerate(dict.fromkeys(plain), 1)}
    _check_distinct(holders, named)
    return holders | named


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-keys-file {path} cannot be read: {error}") from error


def _lines(text: str, path: str) -> tuple[str, ...]:
    if not (keys := tuple(line.strip() for line in text.splitlines() if line.strip())):
        raise ConfigError(f"--api-keys-file {path} holds no key; write one per line, or a JSON object of names")
    return keys


def _named(text: str, path: str) -> dict[str, KeyHolder]:
    """The message of a wrong file says where in it, and none of its keys."""
    try:
        named = msgspec.json.decode(text, type=dict[str, KeyHolder])
    except (msgspec.DecodeError, UnicodeError) as error:
        raise ConfigError(f"--api-keys-file {path}: {error}") from error
    if not named:
        raise ConfigError(f"--api-keys-file {path} holds no key")
    for name in named:
        if _NO_NAME.fullmatch(name):
            raise ConfigError(f"--api-keys-file {path} has the name {name}, as keys without a name are called")
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"--api-keys-file {path} has the name {name[:80]!r}; write up to 64 letters, digits, '_', '-' and '.'"
            )
    return named


def _check_distinct(holders: Mapping[str, KeyHolder], named: Mapping[str, KeyHolder]) -> None:
    owners: dict[str, str] = {}
    for name, holder in [*holders.items(), *named.items()]:
        for key in holder.keys:
            if owners.setdefault(key, name) != name:
                raise ConfigError(f"{owners[key]} and {name} have the same key; give each one of its own")


def _id_of(name: str, holder: KeyHolder) -> str:
    """The name, or for a key without one its digest: another key may have its place after the file has changed."""
    return sha256(holder.keys[0].encode()).hexdigest() if _NO_NAME.fullmatch(name) else name


def _with_defaults(holder: KeyHolder, config: ServerConfig) -> TenantLimits:
    return TenantLimits(
        requests_per_minute=holder.requests_per_minute or config.key_requests_per_minute,
        tokens_per_minute=holder.tokens_per_minute or config.key_tokens_per_minute,
        max_concurrent=holder.max_concurrent or config.key_max_concurrent,
        weight=holder.weight,
    )


def _no_key() -> HttpError:
    return HttpError(
        401,
        "invalid_api_key",
        "no valid API key; send the header 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
        type="authentication_error",
        headers={"WWW-Authenticate": "Bearer"},
    )

"""The bytes behind a URL: http and https as the policy allows, data, file. No proxy, no cookie, no credential.

Error texts repeat at most the host that the client named and its status; never an address, a path or a body.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import math
import os
import re
import socket
import ssl
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TypeVar

import anyio
import httpx

from dashinfer_vlm.errors import (
    MediaError,
    MediaFetchError,
    MediaTimeoutError,
    MediaTooLargeError,
    MediaUnavailableError,
    OverloadedError,
)
from dashinfer_vlm.media.cache import BUSY
from dashinfer_vlm.media.medium import DEFAULT_LIMITS, MediaLimits
from dashinfer_vlm.media.policy import IPAddress, MediaPolicy, Target
from dashinfer_vlm.media.turns import ANYBODY, Party, Turns

_T = TypeVar("_T")

Resolver = Callable[[str, int], Awaitable[list[str]]]
"""(host, port) to addresses, best first; raises OSError."""

Reserve = Callable[[int], Awaitable[None]]
"""Called with the bytes of each part of a body that has arrived; may wait for room."""

MAX_REDIRECTS = 3
MAX_ADDRESSES = 3
"""Addresses of one host that are tried before giving up."""

_REDIRECTS = {301, 302, 303, 307, 308}
_HEADERS = {
    "accept": "image/*, video/*;q=0.9, */*;q=0.5",
    "accept-encoding": "identity",
    "connection": "close",
    "user-agent": "dashinfer-vlm",
}
_BASE64_HEAD = re.compile(r"data:[^;,]{0,200}(?:;[^;,]{0,200}){0,9};\s{0,9}base64\s{0,9}", re.IGNORECASE)
"""Type and parameters mean nothing here: what the bytes are is told by themselves."""
_FRAMES_HEAD = re.compile(r"data:\s{0,9}video/jpe?g\s{0,9}(?:;[^;,]{0,200}){0,9};\s{0,9}base64\s{0,9},", re.IGNORECASE)
_STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")
_ESCAPED_BASE64 = (("%2B", "+"), ("%2b", "+"), ("%2F", "/"), ("%2f", "/"), ("%3D", "="), ("%3d", "="))
"""What a URL's percent-encoding makes of base64."""
_BLANKS = " \t\r\n\f\v"
_BASE64_WINDOW = 1 << 18
"""Digits that are decoded at once: about a millisecond, in which Python's lock is held."""
_MAX_SPLIT = 10_000
"""Far more frames than any video may have."""
_PASSING = frozenset({408, 425, 429})
"""Statuses of a host that would rather be asked later."""


class Fetcher:
    """Fetches http and https URLs. Belongs to one event loop."""

    def __init__(
        self,
        policy: MediaPolicy,
        *,
        limits: MediaLimits = DEFAULT_LIMITS,
        resolve: Resolver | None = None,
        verify: ssl.SSLContext | None = None,
    ) -> None:
        """`resolve` and `verify` stand in for the system's resolver and the public certificate authorities."""
        self._policy = policy
        self._limits = limits
        self._threads = ThreadPoolExecutor(32, thread_name_prefix="resolve")  # slow names hold up only other names
        self._resolve = resolve or self._getaddrinfo
        # httpx's pool looks at all who wait whenever one comes or goes; who waits here costs nothing
        self._places = Turns(limits.max_fetches, most_each=limits.max_fetches_per_request)
        self._hosts: dict[str, Turns] = {}
        # A transport, not a client: it has no cookies, redirects or memory of its own. Connections are not kept: one
        # that was verified for a host must not serve another host of the same address.
        self._transport = httpx.AsyncHTTPTransport(
            verify=verify or httpx.create_ssl_context(trust_env=False),
            trust_env=False,
            limits=httpx.Limits(max_connections=limits.max_fetches, max_keepalive_connections=0),
        )

    async def fetch(
        self, url: str, *, max_bytes: int, timeout_s: float, reserve: Reserve | None = None, party: Party = ANYBODY
    ) -> bytes:
        """GET `url`, following at most three redirects, each of which is judged anew.

        `timeout_s` covers everything but the waits for a place and in `reserve`. Places of a host and places in all are
        taken in turns. Raises MediaError and its kinds, and OverloadedError when no place comes free.
        """
        target = self._policy.check_url(url)
        async with self._place(target.host, party):
            return await self._fetch(target, max_bytes, timeout_s, reserve)

    @asynccontextmanager
    async def _place(self, host: str, party: Party) -> AsyncIterator[None]:
        """The host's place first: who waits for a slow host must not hold one of the others'."""
        limits = self._limits
        turns = self._hosts.setdefault(
            host, Turns(limits.max_fetches_per_host, most_each=limits.max_fetches_per_request)
        )
        try:
            async with AsyncExitStack() as stack:
                await self._wait_for(turns, party)
                stack.callback(turns.give_back, party)
                await self._wait_for(self._places, party)
                stack.callback(self._places.give_back, party)
                yield
        finally:
            if turns.free == limits.max_fetches_per_host and not turns.num_waiting:
                self._hosts.pop(host, None)

    async def _wait_for(self, turns: Turns, party: Party) -> None:
        try:
            with anyio.fail_after(self._limits.wait_timeout_s):
                await turns.take(party)
        except TimeoutError as error:
            raise OverloadedError(BUSY, reason="media_wait") from error

    async def _fetch(self, target: Target, max_bytes: int, timeout_s: float, reserve: Reserve | None) -> bytes:
        clock = asyncio.get_running_loop().time
        started = clock()
        response = await _within(timeout_s, self._open(target, timeout_s), target)
        try:
            _check_announced(response, target, max_bytes)
            with anyio.fail_after(timeout_s - (clock() - started)) as scope:
                return await _read(response, target, max_bytes, _outside(scope, reserve))
        except TimeoutError as error:
            raise MediaTimeoutError(f"{target.host} did not deliver in time") from error
        finally:
            await response.aclose()

    async def close(self) -> None:
        """Close connections; fetches that still run fail."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self._transport.aclose()

    async def _open(self, target: Target, timeout_s: float) -> httpx.Response:
        for _ in range(MAX_REDIRECTS + 1):
            response = await self._get(target, timeout_s)
            if response.status_code == 200:
                return response
            await response.aclose()
            location = response.headers.get("location")
            if response.status_code not in _REDIRECTS or location is None:
                kind = MediaUnavailableError if _is_final(response.status_code) else MediaFetchError
                raise kind(f"{target.host} answered with status {response.status_code}")
            target = self._policy.check_url(location, base=target)
        raise MediaFetchError(f"{target.host} redirects more than {MAX_REDIRECTS} times")

    async def _get(self, target: Target, timeout_s: float) -> httpx.Response:
        for address in await self._addresses(target):
            try:
                return await self._transport.handle_async_request(_request(target, address, timeout_s))
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue  # the next address may answer
            except (httpx.TransportError, httpx.InvalidURL) as error:
                raise MediaFetchError(f"{target.host} broke off the answer") from error
        raise MediaFetchError(f"no connection to {target.host}")

    async def _addresses(self, target: Target) -> list[IPAddress]:
        """All addresses of the host, each of them judged: a forbidden one among them refuses the host."""
        try:
            names = await self._resolve(target.host, target.port)
            addresses = [ipaddress.ip_address(name) for name in dict.fromkeys(names)]
        except (OSError, ValueError) as error:
            raise MediaFetchError(f"{target.host} is not a known host") from error
        for address in addresses:
            self._policy.check_address(target, address)
        return addresses[:MAX_ADDRESSES]

    async def _getaddrinfo(self, host: str, port: int) -> list[str]:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(
            self._threads, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
        return [str(entry[4][0]) for entry in found]


def _is_final(status: int) -> bool:
    """Whether the same URL would be answered so again: the client's mistake, not the host's."""
    return 400 <= status < 500 and status not in _PASSING


def decode_data_url(url: str, max_bytes: int) -> bytes:
    """The bytes of `data:[type][;parameters];base64,...`, in any spelling of base64 that means the same bytes.

    Blanks and line breaks, missing padding, the URL alphabet and percent-encoded digits are understood. Works in
    windows, between which other threads run. Raises MediaError, and MediaTooLargeError before anything is decoded.
    """
    head, comma, text = url.partition(",")
    if not comma or not _BASE64_HEAD.fullmatch(head):
        raise MediaError("a data URL is data:TYPE;base64,DATA; this one is not")
    text = _without_padding(text)
    num_digits = len(text) - sum(map(text.count, _BLANKS))
    if num_digits * 3 // 4 > max_bytes + 2:
        raise MediaTooLargeError(f"the data URL holds about {num_digits * 3 // 4} bytes; the limit is {max_bytes}")
    try:
        return check_size(_decode_base64(text), max_bytes, "the data URL")
    except ValueError as error:
        raise MediaError("the data is not valid base64; in a data URL it stands behind the comma") from error


def _without_padding(text: str) -> str:
    """Base64 up to its last digit, with percent-encoded digits as they are."""
    if "%" in text:
        for escaped, plain in _ESCAPED_BASE64:
            text = text.replace(escaped, plain)
    return text.rstrip(_BLANKS + "=")


def _decode_base64(text: str) -> bytes:
    """Raises ValueError for what is not a digit."""
    pieces: list[bytes] = []
    digits = b""
    for start in range(0, len(text), _BASE64_WINDOW):
        digits += text[start : start + _BASE64_WINDOW].encode("ascii").translate(_STANDARD_ALPHABET, _BLANKS.encode())
        if b"=" in digits:
            raise ValueError("padding before the end")
        whole = len(digits) // 4 * 4
        pieces.append(base64.b64decode(digits[:whole], validate=True))
        digits = digits[whole:]
    pieces.append(base64.b64decode(digits + b"=" * (-len(digits) % 4), validate=True))
    return b"".join(pieces)


def split_frames(url: str) -> tuple[str, ...] | None:
    """The frames of `data:video/jpeg;base64,F1,F2,...`, each as a URL of its own; None for any other URL.

    This is how vLLM's clients send a video that they have taken apart. Of very many frames the last one holds the
    rest: so many are refused by whoever counts them.
    """
    if not _FRAMES_HEAD.match(url):
        return None
    return tuple(f"data:image/jpeg;base64,{frame}" for frame in url.split(",", _MAX_SPLIT)[1:])


def read_file(path: Path, max_bytes: int) -> bytes:
    """The bytes of a regular file that the policy allowed; blocks. Its name is resolved, so it is not a link any
    more."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise MediaError("the file cannot be read")
            return check_size(file.read(max_bytes + 1), max_bytes, "the file")
    except OSError as error:
        raise MediaError("the file cannot be read") from error


def check_size(data: bytes, max_bytes: int, noun: str) -> bytes:
    """`data` itself, or MediaError when it is empty and MediaTooLargeError when it is longer than `max_bytes`."""
    if not data:
        raise MediaError(f"{noun} is empty")
    if len(data) > max_bytes:
        raise MediaTooLargeError(f"{noun} is larger than the limit of {max_bytes} bytes")
    return data


def _request(target: Target, address: IPAddress, timeout_s: float) -> httpx.Request:
    """A request that connects to `address`, and asks for and verifies the host."""
    host = f"[{address}]" if address.version == 6 else str(address)
    timeouts = {"connect": timeout_s / 2, "read": None, "write": None, "pool": None}
    return httpx.Request(
        "GET",
        f"{target.scheme}://{host}:{target.port}{target.path}",
        headers={**_HEADERS, "host": target.authority},
        extensions={"sni_hostname": target.host, "timeout": timeouts},
    )


def _check_announced(response: httpx.Response, target: Target, max_bytes: int) -> None:
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise MediaFetchError(f"{target.host} compressed the answer although it was asked not to")
    announced = response.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced) > max_bytes:
        raise MediaTooLargeError(f"{target.host} announces {announced} bytes; the limit is {max_bytes}")


async def _read(response: httpx.Response, target: Target, max_bytes: int, reserve: Reserve) -> bytes:
    chunks: list[bytes] = []
    size = 0
    try:
        async for chunk in response.aiter_raw():
            size += len(chunk)
            if size > max_bytes:
                raise MediaTooLargeError(f"{target.host} sends more than the limit of {max_bytes} bytes")
            await reserve(len(chunk))
            chunks.append(chunk)
    except httpx.TransportError as error:
        raise MediaFetchError(f"{target.host} broke off the answer") from error
    if not size:
        raise MediaFetchError(f"{target.host} delivered no bytes")
    return b"".join(chunks)


def _outside(scope: anyio.CancelScope, reserve: Reserve | None) -> Reserve:
    """`reserve` with its waits added to the scope's time: they are not the host's doing."""
    clock = asyncio.get_running_loop().time

    async def wait(num_bytes: int) -> None:
        if reserve is None:
            return
        started, deadline = clock(), scope.deadline
        scope.deadline = math.inf
        await reserve(num_bytes)
        scope.deadline = deadline + clock() - started

    return wait


async def _within(timeout_s: float, work: Awaitable[_T], target: Target) -> _T:
    try:
        with anyio.fail_after(timeout_s):  # asyncio.wait_for swallows a cancellation at times, before Python 3.12
            return await work
    except TimeoutError as error:
        raise MediaTimeoutError(f"{target.host} did not deliver in time") from error

"""The encoded bytes behind a reference: a URL is fetched once for all who want it at the same time, and what all loads
hold together is bounded."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from functools import partial

import anyio

from dashinfer_vlm.errors import OverloadedError
from dashinfer_vlm.media.cache import BUSY, Account, ByteBudget, Lease, LeasedCache
from dashinfer_vlm.media.fetch import Fetcher, Resolver, check_size, decode_data_url, read_file
from dashinfer_vlm.media.medium import Limits, MediaLimits
from dashinfer_vlm.media.policy import MediaPolicy
from dashinfer_vlm.media.turns import Party

_LARGE_BYTES = 1 << 20
"""What takes longer than some milliseconds to decode or hash is left to a thread."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Bytes as they came, their SHA-256, and what they occupy."""

    data: bytes
    digest: bytes
    account: Account


class Sources:
    """Belongs to one event loop; `close` it."""

    def __init__(
        self, policy: MediaPolicy, limits: MediaLimits, largest_bytes: int, *, resolve: Resolver | None = None
    ) -> None:
        """`largest_bytes` is what one item may have; the budget is never less."""
        self._policy = policy
        self._limits = limits
        self._fetcher = Fetcher(policy, limits=limits, resolve=resolve)
        self._budget = ByteBudget(max(limits.max_raw_bytes, largest_bytes))
        self._fetched = LeasedCache[Encoded](0, size_of=lambda e: len(e.data), dispose=lambda e: e.account.close())
        self.num_fetches = 0
        self.num_fetched_bytes = 0

    @property
    def free_bytes(self) -> int:
        """Room that is left for encoded bytes; the whole budget when nothing is being loaded."""
        return self._budget.free_bytes

    async def close(self) -> None:
        """End connections; loads that still run are cancelled."""
        await self._fetched.close()
        await self._fetcher.close()

    async def encoded(self, source: str | bytes, limits: Limits, party: Party) -> Lease[Encoded]:
        """The bytes of `source`, for one of the `party`'s items; raises MediaError and its kinds, and
        OverloadedError."""
        if isinstance(source, str) and source[:5].lower() != "data:" and source[:7].lower() != "file://":
            make = partial(self._fetch, source, limits, party)
            return await self._fetched.lease((source, limits.max_bytes), make)
        account = self._budget.account()
        try:
            await self._grow(account, min(_size_hint(source, limits.max_bytes), limits.max_bytes))
            data = await self._local_bytes(source, limits.max_bytes)
            return Lease(Encoded(data, await _digest(data), account), account.close)
        except BaseException:
            account.close()
            raise

    async def _local_bytes(self, source: str | bytes, max_bytes: int) -> bytes:
        if isinstance(source, bytes):
            return check_size(source, max_bytes, "the item")
        if source[:5].lower() == "data:":
            if len(source) < _LARGE_BYTES:
                return decode_data_url(source, max_bytes)
            return await asyncio.to_thread(decode_data_url, source, max_bytes)
        return await asyncio.to_thread(lambda: read_file(self._policy.local_path(source), max_bytes))

    async def _fetch(self, url: str, limits: Limits, party: Party) -> Encoded:
        self.num_fetches += 1
        account = self._budget.account()
        try:
            data = await self._fetcher.fetch(
                url,
                max_bytes=limits.max_bytes,
                timeout_s=limits.fetch_timeout_s,
                reserve=partial(self._grow, account),
                party=party,
            )
            self.num_fetched_bytes += len(data)
            return Encoded(data, await _digest(data), account)
        except BaseException:
            account.close()
            raise

    async def _grow(self, account: Account, num_bytes: int) -> None:
        try:
            with anyio.fail_after(self._limits.wait_timeout_s):
                await account.grow(num_bytes)
        except TimeoutError as error:
            raise OverloadedError(BUSY, reason="media_wait") from error


def _size_hint(source: str | bytes, unknown: int) -> int:
    """Bytes that a source turns into, as far as it can be told before it is read."""
    if isinstance(source, bytes):
        return len(source)
    return len(source) * 3 // 4 if source[:5].lower() == "data:" else unknown


async def _digest(data: bytes) -> bytes:
    if len(data) < _LARGE_BYTES:
        return hashlib.sha256(data).digest()
    return await asyncio.to_thread(lambda: hashlib.sha256(data).digest())

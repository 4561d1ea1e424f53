"""Who asks. The requests of one tenant share limits, caches and a turn in the engine; those of different ones do not.

A server with API keys has a tenant for each of their names; everywhere else all requests are NOBODY's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Annotated

import msgspec

from dashinfer_vlm.errors import RateLimitError

Clock = Callable[[], float]


class TenantLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the requests of one tenant may take together; None is no limit."""

    requests_per_minute: Annotated[float, msgspec.Meta(gt=0)] | None = None
    tokens_per_minute: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """Of prompts and answers."""
    max_concurrent: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """Requests at a time."""
    weight: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    """How much of a busy engine the tenant gets beside others."""


NO_LIMITS = TenantLimits()


class Bucket:
    """Units of which so many come back in a minute, and no more than that are ever there. Taking more than there are
    leaves a debt that is paid first."""

    def __init__(self, per_minute: float, clock: Clock) -> None:
        self._clock = clock
        self.per_minute = self._level = per_minute
        self._filled_s = clock()

    def change(self, per_minute: float) -> None:
        """Another rate from now on. What has been taken stays taken."""
        self._fill()
        was_bounded = math.isfinite(self.per_minute)
        self._level = self._level + per_minute - self.per_minute if was_bounded else per_minute
        self.per_minute = per_minute

    def wait_s(self) -> float:
        """Seconds until there is a unit; 0 when there is one."""
        self._fill()
        missing = 1 - self._level
        return missing * 60 / self.per_minute if missing > 0 else 0.0

    def take(self, units: float) -> None:
        self._fill()
        self._level -= units

    def _fill(self) -> None:
        if math.isfinite(self.per_minute):
            now_s = self._clock()
            self._level = min(self.per_minute, self._level + self.per_minute * (now_s - self._filled_s) / 60)
            self._filled_s = now_s


class Tenant:
    """Somebody whose requests are counted together. Belongs to one event loop."""

    def __init__(self, limits: TenantLimits = NO_LIMITS, *, id: str = "", clock: Clock = time.monotonic) -> None:
        self.id = id
        """What its caches and what is kept for it are known by."""
        self.name = id
        """What people call it, in metrics and logs."""
        self.has_neighbours = False
        """Whether this server has other tenants, who must not see by the time what this one sends."""
        self.gives_way = False
        """Whether its requests have no priority as good as that of others' which ask for none."""
        self.num_requests = 0
        """Those that are being answered, also in the background."""
        self.num_choices = 0
        """Their answers, of which a request may want several."""
        self.num_requests_total = self.num_refusals_total = self.num_tokens_total = 0
        self._limits = limits
        self._requests = Bucket(_or_inf(limits.requests_per_minute), clock)
        self._tokens = Bucket(_or_inf(limits.tokens_per_minute), clock)

    @property
    def weight(self) -> float:
        return self._limits.weight

    @property
    def salt(self) -> str:
        """What this tenant's prefixes and pictures are kept apart by; empty where there is nobody else."""
        return self.id if self.has_neighbours else ""

    def salted(self, own: str) -> str:
        """`own`, the salt of a request, within this tenant; ids hold no zero, so that nobody can write another's."""
        return f"{self.salt}\0{own}" if self.salt else own

    def priority(self, asked: int) -> int:
        """Of a request that asks for `asked`; lower goes first."""
        return max(asked, 1) if self.gives_way else asked

    def change(self, limits: TenantLimits) -> None:
        """Other limits from now on; what has been used stays used."""
        if limits != self._limits:
            self._limits = limits
            self._requests.change(_or_inf(limits.requests_per_minute))
            self._tokens.change(_or_inf(limits.tokens_per_minute))

    @contextmanager
    def request(self) -> Iterator[None]:
        """One request more while the block runs; raises RateLimitError."""
        try:
            self._check()
        except RateLimitError:
            self.num_refusals_total += 1
            raise
        self._requests.take(1)
        self.num_requests_total += 1
        with self.task():
            yield

    @contextmanager
    def task(self) -> Iterator[None]:
        """What goes on while the block runs, after the request that has begun it or as one: it counts as a request at a
        time."""
        self.num_requests += 1
        try:
            yield
        finally:
            self.num_requests -= 1

    def spend(self, num_tokens: int) -> None:
        """Tokens of a prompt or of an answer. A request that runs is not ended over them; the next one waits."""
        self._tokens.take(num_tokens)
        self.num_tokens_total += num_tokens

    def _check(self) -> None:
        most = self._limits.max_concurrent
        if most is not None and self.num_requests >= most:
            raise RateLimitError(
                f"{self.num_requests} requests with this key are being answered, the limit is {most}; wait for one of "
                "them",
                reason="key_concurrency",
            )
        for bucket, unit in ((self._requests, "requests"), (self._tokens, "tokens")):
            if wait_s := math.ceil(bucket.wait_s()):
                raise RateLimitError(
                    f"this key has used its {bucket.per_minute:g} {unit} per minute; try again in {wait_s} s",
                    reason=f"key_{unit}",
                    retry_after_s=wait_s,
                )


def _or_inf(limit: float | None) -> float:
    return math.inf if limit is None else limit


NOBODY = Tenant()

current_timeout_s: ContextVar[float | None] = ContextVar("current_timeout_s", default=None)
"""How long the answer to the request may take that the running task works on, as its header says."""

current_tenant: ContextVar[Tenant] = ContextVar("current_tenant", default=NOBODY)
"""Whose request the running task works on. The server sets it in front of all routes, so that none can forget it."""

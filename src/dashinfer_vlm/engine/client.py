"""The engine as everyone outside it sees it: requests in, streams of outputs out, wherever the engine runs.

`host/local.py` runs its loop in a thread of this process, `host/process.py` in a process of its own; the same loop, the
same events, the same streams.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Protocol

from dashinfer_vlm.engine.info import EngineInfo
from dashinfer_vlm.engine.stats import EngineStats
from dashinfer_vlm.request import Output, Request

__all__ = ["EngineClient", "OnProgress"]

OnProgress = Callable[[str, int, int], None]
"""Called with a stage of loading, how much of it is done, and how much there is."""


class EngineClient(Protocol):
    """An engine in this process or in another one."""

    @property
    def info(self) -> EngineInfo: ...

    def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """Stream the outputs of `request`; the last one carries `finish`. Use with `contextlib.aclosing`.

        The first `anext` raises InvalidRequestError, ContextLengthError or OverloadedError when the engine refuses
        the request, and EngineDeadError when the engine is gone. An engine that dies later ends the stream
        with an Output whose finish reason is "error". Closing the stream early aborts the sequence.
        """
        ...

    async def stats(self) -> EngineStats:
        """Counters and gauges at the end of the current step; raises EngineDeadError."""
        ...

    def alive(self) -> bool:
        """Whether new requests can be served."""
        ...

    def gone(self) -> bool:
        """Whether none will be served any more: it is dead, and no other one is started in its place."""
        ...

    async def close(self) -> None:
        """End what still runs (finish reason "abort") and free everything; idempotent."""
        ...

"""The engine as everyone outside it sees it: requests in, outputs out, wherever the engine runs.

`host/local.py` runs its loop in a thread of this process, `host/process.py` in a process of its own; the same loop, the
same events.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from dashinfer_vlm.engine.info import EngineInfo
from dashinfer_vlm.engine.stats import EngineStats
from dashinfer_vlm.fault import Fault
from dashinfer_vlm.request import Output, Request

__all__ = ["EngineClient", "Listener", "OnProgress"]

Listener = Callable[[Output | Fault], None]
"""Hears all outputs of one request, or the one fault for which it was refused. Must be quick and must not raise."""

OnProgress = Callable[[str, int, int], None]
"""Called with a stage of loading, how much of it is done, and how much there is."""


class EngineClient(Protocol):
    """An engine in this process or in another one."""

    @property
    def info(self) -> EngineInfo: ...

    def ask(self, request: Request, listener: Listener) -> None:
        """Run `request`. In the event loop that runs now, `listener` hears its outputs, of which the last one carries
        `finish`, or the fault for which the engine refuses it: of an InvalidRequestError, a ContextLengthError, an
        OverloadedError. An engine that dies later has a last output whose finish reason is "error".

        Raises EngineDeadError when the engine is gone, and InvalidRequestError for an id that is in use.
        """
        ...

    def leave(self, request_id: str) -> None:
        """Abort a request, and hear no more of it but for what is on its way; of one that has ended, nothing."""
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

"""An engine process that is replaced by another one when it dies: after a pause, and not without end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque

import msgspec

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine.client import Listener, OnProgress
from dashinfer_vlm.engine.host.process import ProcessEngine
from dashinfer_vlm.engine.info import EngineInfo
from dashinfer_vlm.engine.stats import EngineStats
from dashinfer_vlm.errors import DashInferError
from dashinfer_vlm.request import Request

__all__ = ["RestartedEngine"]

logger = logging.getLogger(__name__)

WINDOW_S = 600.0
"""Deaths are counted within it."""


class RestartedEngine:
    """A `ProcessEngine`, and another one in its place when it has died. Requests that ran end with an error, and none
    are taken until the next one is loaded. Belongs to the event loop that `start` ran in."""

    first_pause_s = 1.0
    """Before the first new start within WINDOW_S; it doubles with each further one."""

    def __init__(self, engine: ProcessEngine, config: EngineConfig, max_restarts: int) -> None:
        self._engine = engine
        self._config = config
        self._max_restarts = max_restarts
        self._deaths_s: deque[float] = deque(maxlen=max_restarts + 1)
        self._num_restarts = 0
        self._gone = False
        self._keeper = asyncio.create_task(self._keep(), name="engine-keeper")

    @classmethod
    async def start(
        cls, config: EngineConfig, max_restarts: int, *, progress: OnProgress | None = None
    ) -> RestartedEngine:
        """Start the first engine; raises what `ProcessEngine.start` raises. The one that dies after `max_restarts` new
        starts within WINDOW_S is the last."""
        return cls(await ProcessEngine.start(config, progress=progress), config, max_restarts)

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    @property
    def pid(self) -> int:
        """Process id of the child that runs, or ran last."""
        return self._engine.pid

    def ask(self, request: Request, listener: Listener) -> None:
        self._engine.ask(request, listener)

    def leave(self, request_id: str) -> None:
        self._engine.leave(request_id)

    async def stats(self) -> EngineStats:
        """Counters begin anew with each engine, but for that of the engines."""
        return msgspec.structs.replace(await self._engine.stats(), num_restarts_total=self._num_restarts)

    def alive(self) -> bool:
        return self._engine.alive()

    def gone(self) -> bool:
        return self._gone

    async def close(self) -> None:
        self._keeper.cancel()
        await asyncio.wait({self._keeper})
        await self._engine.close()

    async def _keep(self) -> None:
        try:
            is_there = True
            while is_there:
                await self._engine.wait_dead()
                self._deaths_s.append(time.monotonic())
                await self._engine.close()
                is_there = await self._start_another()
        except Exception:
            logger.exception("the engine is not started again")
        finally:  # whatever has ended this, nobody starts another one
            self._gone = True

    async def _start_another(self) -> bool:
        """Whether there is another engine now."""
        while (pause_s := self._pause_s()) is not None:
            logger.warning("the engine is started again in %g s", pause_s)
            await asyncio.sleep(pause_s)
            try:
                self._engine = await ProcessEngine.start(self._config)
            except (DashInferError, OSError) as error:
                logger.error("the engine could not be started again: %s", error)
                self._deaths_s.append(time.monotonic())
                continue
            self._num_restarts += 1
            logger.warning("the engine was started again and takes requests")
            return True
        return False

    def _pause_s(self) -> float | None:
        """How long to wait before another start; None when there have been enough."""
        num_recent = sum(time.monotonic() - death_s < WINDOW_S for death_s in self._deaths_s)
        if num_recent > self._max_restarts:
            logger.error(
                "the engine has died %d times within %g s and is not started again (--max-engine-restarts)",
                num_recent,
                WINDOW_S,
            )
            return None
        return self.first_pause_s * float(2 ** max(0, num_recent - 1))

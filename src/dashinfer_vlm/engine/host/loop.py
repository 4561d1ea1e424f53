"""The one loop that turns an engine: obey commands, step, publish what came of it.

Every request that the engine accepted gets exactly one final Output from here, whatever happens: the engine's own, an
"error" when a step failed, an "abort" when the loop is closed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from dashinfer_vlm.engine.host.mapping import lost_arrays, map_tensor
from dashinfer_vlm.engine.host.wire import (
    Abort,
    AskStats,
    Close,
    Command,
    Event,
    Failed,
    Outputs,
    Refused,
    StatsReply,
)
from dashinfer_vlm.engine.stats import EngineStats
from dashinfer_vlm.errors import DashInferError, EngineDeadError, InvalidRequestError
from dashinfer_vlm.fault import Fault
from dashinfer_vlm.request import Finish, FinishReason, Item, Output, Request
from dashinfer_vlm.shared_array import SharedArray

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

MAX_FAILURES = 3
"""Failed steps without a single token in between after which the engine counts as broken."""

_LOOK_S = 0.01
"""How often to look for commands while nothing but the preparation of requests is under way."""


class SteppedEngine(Protocol):
    """What the loop needs of an engine."""

    def prepare(self, request: Request) -> Future[Any] | None: ...
    def add(self, request: Request, prepared: Future[Any] | None = None) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def step(self) -> list[Output]: ...
    def has_work(self) -> bool: ...
    def stats(self) -> EngineStats: ...
    def fail_all(self, message: str) -> list[Output]: ...
    def close(self) -> None: ...


class Channel(Protocol):
    """Where commands come from and events go to. Both are called by the loop's thread only."""

    def receive(self, *, wait: bool) -> list[Command]:
        """All commands that have arrived; with `wait`, blocks until there is one."""
        ...

    def send(self, event: Event) -> None: ...


class EngineLoop:
    """Runs `engine` for whoever is behind `channel`."""

    def __init__(self, engine: SteppedEngine, channel: Channel) -> None:
        self._engine = engine
        self._channel = channel
        self._live: set[str] = set()
        """Requests that have had no final Output and no refusal yet."""
        self._preparing: dict[str, tuple[Request, Future[Any]]] = {}
        """Those among them that are added when their future is done."""
        self._num_failures = 0

    def run(self) -> None:
        """Serve until a Close command, or until the engine is broken: then the last event is `Failed`."""
        try:
            while self._obey(self._channel.receive(wait=not (self._engine.has_work() or self._preparing))):
                self._add_prepared()
                if self._engine.has_work():
                    with self._surviving():
                        self._publish(self._engine.step())
        except Exception as error:
            logger.exception("the engine is broken; %d requests end with an error", len(self._live))
            self._end_live("error", Fault.of(error).message)
            self._channel.send(Failed(Fault("EngineDeadError", f"the engine gave up: {Fault.of(error).message}")))
        else:
            self._engine.fail_all("closed")  # what it says goes unheard: the engine may be given to another loop
            self._end_live("abort")

    def _obey(self, commands: Iterable[Command]) -> bool:
        """False once told to close."""
        for command in commands:
            match command:
                case Request():
                    self._take(command)
                case Abort(request_id):
                    self._abort(request_id)
                case AskStats(ticket):
                    self._channel.send(StatsReply(ticket, self._engine.stats()))
                case Close():
                    return False
        return True

    def _take(self, request: Request) -> None:
        with self._refusing(request.id):
            if request.id in self._live:
                raise InvalidRequestError(f"request id {request.id!r} is in use", param="id")
            request = _with_mapped_arrays(request)
            ready = self._engine.prepare(request)
            if ready is None:
                self._engine.add(request)
            else:
                self._preparing[request.id] = (request, ready)
            self._live.add(request.id)

    def _add_prepared(self) -> None:
        """Those that are ready. While the engine has nothing to do, it waits a little for one of them."""
        if self._preparing and not self._engine.has_work():
            wait([ready for _, ready in self._preparing.values()], _LOOK_S, FIRST_COMPLETED)
        for request, ready in tuple(self._preparing.values()):
            if ready.done():
                del self._preparing[request.id]
                self._live.discard(request.id)
                with self._refusing(request.id):
                    self._engine.add(request, ready)
                    self._live.add(request.id)

    def _abort(self, request_id: str) -> None:
        if request_id in self._preparing:
            _, ready = self._preparing.pop(request_id)
            if all(other is not ready for _, other in self._preparing.values()):
                ready.cancel()  # nobody else waits for it
            self._publish([Output(request_id, finish=Finish("abort"))])
        else:
            self._engine.abort(request_id)

    @contextmanager
    def _refusing(self, request_id: str) -> Iterator[None]:
        try:
            yield
        except DashInferError as error:
            self._channel.send(Refused(request_id, Fault.of(error)))
        except Exception as error:
            logger.exception("the engine failed to take request %s", request_id)
            self._channel.send(Refused(request_id, Fault.of(error)))

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        """A step that fails ends the requests that are there, and `MAX_FAILURES` of them the engine."""
        try:
            yield
        except EngineDeadError:
            raise
        except Exception as error:
            self._num_failures += 1
            if self._num_failures >= MAX_FAILURES:
                raise EngineDeadError(
                    f"{self._num_failures} steps failed, the last with {type(error).__name__}"
                ) from error
            logger.exception("a step of the engine failed; %d requests end with an error", len(self._live))
            self._publish(self._engine.fail_all(Fault.of(error).message))
            self._end_live("error", Fault.of(error).message)  # those whose last output was lost with the step

    def _publish(self, outputs: list[Output]) -> None:
        if not outputs:
            return
        if any(output.token_ids for output in outputs):
            self._num_failures = 0
        self._channel.send(Outputs(outputs))  # first: what cannot be sent has ended nobody
        self._live.difference_update(output.request_id for output in outputs if output.finish)

    def _end_live(self, reason: FinishReason, message: str | None = None) -> None:
        self._preparing.clear()
        finish = Finish(reason, None, message)
        self._publish([Output(request_id, finish=finish) for request_id in sorted(self._live)])


def _with_mapped_arrays(request: Request) -> Request:
    """Map shared patches and embeddings now, so that their owner may remove them whenever the request has ended."""
    if not request.items:
        return request
    map_once = cache(map_tensor)  # the parts of an item share its patches
    try:
        items = tuple(_with_mapped(item, map_once) for item in request.items)
    except OSError as error:
        raise lost_arrays(request.id, error) from error
    return replace(request, items=items)


def _with_mapped(item: Item, map_once: Callable[[SharedArray], torch.Tensor]) -> Item:
    if isinstance(item.patches, SharedArray):
        return replace(item, patches=map_once(item.patches))
    if isinstance(item.embedding, SharedArray):
        return replace(item, embedding=map_once(item.embedding))
    return item

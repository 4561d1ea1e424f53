"""From an engine's events to those who wait for them: the half of a client that does not care where the engine runs."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

from dashinfer_vlm.engine.client import Listener
from dashinfer_vlm.engine.host.wire import (
    AskStats,
    Event,
    Failed,
    Outputs,
    Refused,
    StatsReply,
)
from dashinfer_vlm.engine.stats import EngineStats
from dashinfer_vlm.errors import InvalidRequestError
from dashinfer_vlm.fault import Fault
from dashinfer_vlm.request import Finish, Output

CLOSED = Fault("EngineDeadError", "the engine was closed")


class Listeners:
    """Who waits for which request and which answer. Thread-safe: the engine's thread dispatches, others register."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of_request: dict[str, Listener] = {}
        self._of_ticket: dict[int, Callable[[EngineStats | Fault], None]] = {}
        self._tickets = itertools.count()
        self._dead: Fault | None = None

    @property
    def dead(self) -> Fault | None:
        return self._dead

    def __contains__(self, request_id: str) -> bool:
        with self._lock:
            return request_id in self._of_request

    def add(self, request_id: str, listener: Listener) -> None:
        with self._lock:
            if self._dead:
                raise self._dead.error()
            if request_id in self._of_request:
                raise InvalidRequestError(f"request id {request_id!r} is in use", param="id")
            self._of_request[request_id] = listener

    def remove(self, request_id: str) -> bool:
        """Whether somebody was still listening."""
        with self._lock:
            return self._of_request.pop(request_id, None) is not None

    def await_stats(self, listener: Callable[[EngineStats | Fault], None]) -> AskStats:
        with self._lock:
            if self._dead:
                raise self._dead.error()
            ask = AskStats(next(self._tickets))
            self._of_ticket[ask.ticket] = listener
            return ask

    def dispatch(self, event: Event) -> None:
        match event:
            case Outputs(outputs):
                for output in outputs:
                    self._tell(output.request_id, output, last=output.finish is not None)
            case Refused(request_id, fault):
                self._tell(request_id, fault, last=True)
            case StatsReply(ticket, stats):
                with self._lock:
                    asker = self._of_ticket.pop(ticket)
                asker(stats)
            case Failed(fault):
                self.end_all(fault)

    def end_all(self, fault: Fault, *, finish: Finish | None = None) -> None:
        """The engine is gone: a final Output for whoever listens, `fault` for whoever comes later."""
        with self._lock:
            self._dead = self._dead or fault
            requests, self._of_request = self._of_request, {}
            tickets, self._of_ticket = self._of_ticket, {}
        for request_id, listener in requests.items():
            listener(Output(request_id, finish=finish or Finish("error", None, fault.message)))
        for asker in tickets.values():
            asker(fault)

    def _tell(self, request_id: str, news: Output | Fault, *, last: bool) -> None:
        # no lock: one look-up is one step for all threads, and `end_all` is the dispatching thread's, too
        listener = self._of_request.pop(request_id, None) if last else self._of_request.get(request_id)
        if listener:  # else its stream was closed early
            listener(news)


def stats_or_raise(answer: EngineStats | Fault) -> EngineStats:
    if isinstance(answer, Fault):
        raise answer.error()
    return answer


def silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""

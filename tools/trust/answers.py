"""One request as its client saw it: whether it was taken, how each of its answers ended, and when its pieces came."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

__all__ = ["Answer", "Asked", "ask", "connect"]

_ENDS = {"response.completed", "response.incomplete", "response.failed", "message_stop"}
"""Events that are the last of a stream whose events have types."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request to send."""

    path: str
    body: dict[str, Any] | bytes
    num_choices: int = 1
    leave_after: int | None = None
    """The client closes its connection after so many pieces; 0 leaves before the first one."""

    @property
    def streams(self) -> bool:
        return isinstance(self.body, dict) and bool(self.body.get("stream"))

    @property
    def content(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


@dataclass(slots=True)
class Answer:
    """What came back."""

    status: int = 0
    """0 where the connection failed before one came."""
    finals: list[str] = field(default_factory=list)
    """How each choice ended, in the words of the API; `error: CODE` for an error event."""
    num_ends: int = 0
    """`[DONE]`, or the last event of an API whose events have types. An error ends a stream of chunks without it."""
    has_left: bool = False
    """The client went on its own account."""
    error: str = ""
    """The server's code for the refusal, or what the connection broke with."""
    retry_after: str = ""
    sent_s: float = 0.0
    pieces_s: list[float] = field(default_factory=list)
    """When each event of a stream arrived, on `time.perf_counter`."""
    end_s: float = 0.0

    @property
    def seconds(self) -> float:
        return self.end_s - self.sent_s

    @property
    def was_accepted(self) -> bool:
        return self.status == httpx.codes.OK

    def fault(self, num_choices: int) -> str:
        """What is wrong with how an accepted request ended; empty where it ended exactly once."""
        if not self.was_accepted or self.has_left:
            return ""
        if self.error:
            return f"broken off: {self.error}"
        if any(final.startswith("error") for final in self.finals):
            return "" if len(self.finals) == 1 and not self.num_ends else f"an error and {self.finals}"
        if len(self.finals) != num_choices:
            return f"{len(self.finals)} final events for {num_choices} choices"
        return "" if self.num_ends == 1 else f"the end was told {self.num_ends} times"


def connect(url: str, timeout_s: float | None) -> httpx.AsyncClient:
    """A client without a limit of connections, straight to `url`."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0)
    return httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(timeout_s, pool=None), limits=limits, trust_env=False)


async def ask(http: httpx.AsyncClient, asked: Asked, answer: Answer | None = None) -> Answer:
    """Send it and read the answer to its end, into `answer` where one is given. What goes wrong on the way is in it;
    nothing is raised."""
    answer = answer or Answer()
    answer.sent_s = time.perf_counter()
    try:
        headers = {"Content-Type": "application/json"}
        async with http.stream("POST", asked.path, content=asked.content, headers=headers) as response:
            answer.status = response.status_code
            answer.retry_after = response.headers.get("Retry-After", "")
            if response.headers.get("Content-Type", "").startswith("text/event-stream"):
                await _read_stream(response.aiter_lines(), answer, asked.leave_after)
            else:
                _read_whole(await response.aread(), answer)
    except httpx.HTTPError as error:
        answer.error = type(error).__name__
    answer.end_s = time.perf_counter()
    return answer


async def _read_stream(lines: AsyncIterator[str], answer: Answer, leave_after: int | None) -> None:
    if leave_after == 0:
        answer.has_left = True
        return
    async for line in lines:
        if not line.startswith("data: "):
            continue
        answer.pieces_s.append(time.perf_counter())
        if line == "data: [DONE]":
            answer.num_ends += 1
        else:
            _read_event(json.loads(line.removeprefix("data: ")), answer)
        if len(answer.pieces_s) == leave_after:
            answer.has_left = True
            return


def _read_event(event: dict[str, Any], answer: Answer) -> None:
    kind = event.get("type", "")
    answer.num_ends += kind in _ENDS
    if event.get("error"):
        answer.finals.append(f"error: {event['error'].get('code') or event['error'].get('type')}")
    elif kind.startswith("response.") and kind in _ENDS:
        answer.finals.append(event["response"]["status"])
    elif kind == "message_delta":
        answer.finals.append(event["delta"]["stop_reason"])
    answer.finals += [choice["finish_reason"] for choice in event.get("choices", ()) if choice.get("finish_reason")]


def _read_whole(body: bytes, answer: Answer) -> None:
    try:
        reply = json.loads(body)
    except ValueError:
        answer.error = "not JSON"
        return
    if answer.status != httpx.codes.OK:
        error = reply.get("error", {})
        answer.error = str(error.get("code") or error.get("type"))
        return
    answer.num_ends = 1
    if "choices" in reply:
        answer.finals = [choice["finish_reason"] for choice in reply["choices"]]
    else:
        answer.finals = [reply.get("status") or reply["stop_reason"]]

"""What a server streamed, as timed pieces of bytes, becomes a reply with its times or the reason why it is none.

Nothing here looks at a clock: the pieces are timed when they arrive and read when the request is over, so that reading
costs the measured server nothing and the same pieces always give the same figures.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

__all__ = ["Failure", "Outcome", "Piece", "Reply", "StreamError", "read_events", "read_reply"]

Piece: TypeAlias = tuple[float, bytes]
"""Bytes as one read gave them, and when, in seconds."""


class StreamError(Exception):
    """The stream is not a complete answer of the length that was asked for; the message says why."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete answer. Times are in seconds on one clock."""

    sent_s: float
    text_times_s: tuple[float, ...]
    """When each event with tokens arrived; a server may put several tokens into one."""
    ended_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    """As the server's usage tells; events are not tokens."""
    turn: int = 0

    @property
    def first_token_s(self) -> float:
        return self.text_times_s[0] - self.sent_s

    @property
    def per_token_s(self) -> float:
        """Mean time of a token after the first one; of an answer of one token, 0."""
        return (self.text_times_s[-1] - self.text_times_s[0]) / max(1, self.num_output_tokens - 1)

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """Waits between one event with tokens and the next."""
        return tuple(b - a for a, b in pairwise(self.text_times_s))

    @property
    def tokens_per_event(self) -> float:
        return self.num_output_tokens / len(self.text_times_s)


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that was not answered; it counts as nothing but a failure."""

    sent_s: float
    ended_s: float
    reason: str
    turn: int = 0


Outcome: TypeAlias = Reply | Failure


def read_events(pieces: Iterable[Piece]) -> Iterator[tuple[float, str]]:
    """The data of each server-sent event and when its last byte arrived; comments and other fields are skipped.

    Format: WHATWG HTML, "Server-sent events"; lines end with CR LF, LF or CR.
    """
    data: list[str] = []
    for time_s, line in _lines(pieces):
        if line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" ").decode(errors="replace"))
        elif not line and data:
            yield time_s, "\n".join(data)
            data = []


def _lines(pieces: Iterable[Piece]) -> Iterator[Piece]:
    rest = b""
    for time_s, piece in pieces:
        held = piece.endswith(b"\r")  # its LF may come with the next piece
        buffer = rest + (piece[:-1] if held else piece)
        *lines, rest = buffer.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        if held:
            rest += b"\r"
        for line in lines:
            yield time_s, line


def read_reply(sent_s: float, ended_s: float, pieces: Iterable[Piece], num_tokens: int, turn: int = 0) -> Reply:
    """The answer in `pieces`; raises StreamError unless it is complete and `num_tokens` long by the server's count."""
    times: list[float] = []
    usage: dict[str, Any] | None = None
    done = False
    for time_s, data in read_events(pieces):
        if data == "[DONE]":
            done = True
            continue
        chunk = _parse(data)
        usage = chunk.get("usage") or usage
        if _has_tokens(chunk):
            times.append(time_s)
    if not done:
        raise StreamError("the stream ended without [DONE]")
    if usage is None:
        raise StreamError("the server sent no usage, so its tokens cannot be counted")
    if usage["completion_tokens"] != num_tokens:
        raise StreamError(f"{usage['completion_tokens']} tokens came where {num_tokens} were asked for (ignore_eos)")
    if not times:
        raise StreamError("no event brought any text")
    return Reply(sent_s, tuple(times), ended_s, usage["prompt_tokens"], num_tokens, turn)


def _parse(data: str) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except json.JSONDecodeError as error:
        raise StreamError(f"an event is not JSON: {data[:200]}") from error
    if not isinstance(chunk, dict):
        raise StreamError(f"an event is not an object: {data[:200]}")
    if "error" in chunk:
        raise StreamError(error_message(chunk))
    return chunk


def _has_tokens(chunk: dict[str, Any]) -> bool:
    """Also where they show no text yet: special tokens, parts of a character. Not so the event that only tells the
    role, or the last one that only tells why the answer ended."""
    choices = chunk.get("choices")
    if not choices:
        return False
    delta = choices[0].get("delta") or {}
    if delta.get("content") or delta.get("reasoning_content"):
        return True
    return "content" in delta and "role" not in delta and choices[0].get("finish_reason") is None


def error_message(body: dict[str, Any]) -> str:
    """What an OpenAI error object, or another server's likeness of one, says."""
    error = body.get("error", body)
    return str(error.get("message", error) if isinstance(error, dict) else error)[:300]

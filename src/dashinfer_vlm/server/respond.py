"""From a started generation to a response: whole or as events, and ended early when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import msgspec
from fastapi import Request
from starlette.responses import Response

from dashinfer_vlm.frontend.answers import Answer, collect
from dashinfer_vlm.frontend.deltas import Delta, Usage
from dashinfer_vlm.frontend.generation import Generation
from dashinfer_vlm.server.body import unless_gone
from dashinfer_vlm.server.errors import reply_to
from dashinfer_vlm.server.reading import forget_body
from dashinfer_vlm.server.stream import EventStream, data, unnamed

_SHORT_TOKENS = 64
"""Their log probabilities are written in about 5 ms; those of longer answers are written in a thread."""


class Writer(Protocol):
    """The form of one route's answers."""

    def whole(self, answers: Sequence[Answer], usage: Usage) -> msgspec.Struct: ...

    def news(self, delta: Delta, usage: Callable[[], Usage]) -> list[msgspec.Struct]:
        """The events that tell `delta`; may be none. `usage` counts the tokens so far."""
        ...

    def last(self, usage: Usage) -> list[msgspec.Struct]:
        """The events after all deltas."""
        ...


@dataclass(frozen=True, slots=True)
class Form:
    """How an API writes events."""

    written: Callable[[Iterable[Any]], bytes]
    failed: Callable[[Exception], bytes]
    """The event that ends a stream by an error."""
    done: bytes = b""
    """What stands behind the last event of a stream that was not ended so."""


OPENAI = Form(unnamed, lambda error: data(reply_to(error).body), b"data: [DONE]\n\n")


async def respond(
    request: Request,
    begin: Coroutine[Any, Any, Generation],
    writer: Writer,
    *,
    stream: bool,
    form: Form = OPENAI,
) -> Response:
    """Await `begin` and answer; a stream's events are written in `form`.

    Raises what went wrong before the first token, so that the status can say it.
    """
    if not stream:
        return await unless_gone(request, _whole(admitted(request, begin), writer), lambda _: None)
    generation, first = await unless_gone(request, opened(admitted(request, begin)), lambda started: started[0].close())
    show = partial(_show, writer, form, lambda: generation.usage)
    return EventStream(_lines(generation, first, writer, form, show), generation, show)


async def admitted(request: Request, begin: Coroutine[Any, Any, Generation]) -> Generation:
    """The generation; from now on, what the client has sent is not needed any more."""
    generation = await begin
    forget_body(request)
    return generation


async def _whole(begin: Coroutine[Any, Any, Generation], writer: Writer) -> Response:
    generation = await begin
    answers = await collect(generation)
    usage = generation.usage
    num_told = usage.num_output_tokens + sum(len(answer.prompt_logprobs) for answer in answers)
    if num_told <= _SHORT_TOKENS:
        body = _encode(writer, answers, usage)
    else:
        body = await asyncio.to_thread(_encode, writer, answers, usage)
    return Response(body, media_type="application/json")


def _encode(writer: Writer, answers: Sequence[Answer], usage: Usage) -> bytes:
    return msgspec.json.encode(writer.whole(answers, usage))


async def opened(begin: Coroutine[Any, Any, Generation]) -> tuple[Generation, Delta]:
    """A generation and the first thing it says. Raises what went wrong before that."""
    generation = await begin
    try:
        return generation, await anext(generation)
    except BaseException:
        generation.close()
        raise


def _show(writer: Writer, form: Form, usage: Callable[[], Usage], delta: Delta) -> bytes:
    return form.written(writer.news(delta, usage))


async def _lines(
    generation: Generation, first: Delta, writer: Writer, form: Form, show: Callable[[Delta], bytes]
) -> AsyncIterator[bytes]:
    """An error on the way is told by an event too, as the status is sent already, and ends the stream."""
    try:
        yield show(first)
        async for delta in generation:
            yield show(delta)
        yield form.written(writer.last(generation.usage)) + form.done
    except Exception as error:  # noqa: BLE001  see above
        yield form.failed(error)

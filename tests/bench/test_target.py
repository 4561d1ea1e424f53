"""One request of the bench to a server that closes connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing, suppress
from itertools import count

from dashinfer_vlm.bench.events import Failure, Outcome
from dashinfer_vlm.bench.target import Target, connect, sender

TURN = b'{"messages": []}'
EVENTS = (
    b'data: {"choices": [{"delta": {"content": "tok "}}]}\n\n'
    b'data: {"choices": [{"delta": {}, "finish_reason": "length"}]}\n\n'
    b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 1}}\n\ndata: [DONE]\n\n'
)
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n%b" % (len(EVENTS), EVENTS)


@asynccontextmanager
async def serving(answers: Callable[[int, int], bytes]) -> AsyncIterator[Target]:
    """A server that says to request `n` of connection `c` what `answers(c, n)` gives, and closes on less than all."""
    connections: list[asyncio.Task[None] | None] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = len(connections)
        connections.append(asyncio.current_task())
        with closing(writer), suppress(asyncio.IncompleteReadError):  # the client has closed it
            for number in count():
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
                await reader.readexactly(int(length.partition(b":")[2]))
                said = answers(connection, number)
                writer.write(said)
                if said != ANSWER:
                    return

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
        yield Target("peer", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", "model")
        await asyncio.gather(*filter(None, connections))


async def asked_twice(answers: Callable[[int, int], bytes]) -> list[Outcome]:
    async with serving(answers) as target, connect(10, None) as http:
        send = sender(http, target)
        return [await send(TURN, 1, place) for place in (0, 1)]


async def test_a_kept_connection_that_the_server_closes_is_no_failure_of_its_answer() -> None:
    outcomes = await asked_twice(lambda connection, number: ANSWER if number == 0 else b"")
    assert not [outcome for outcome in outcomes if isinstance(outcome, Failure)]


async def test_a_new_connection_that_the_server_closes_is_one() -> None:
    outcomes = await asked_twice(lambda connection, number: b"" if connection == 0 else ANSWER)
    assert [isinstance(outcome, Failure) for outcome in outcomes] == [True, False]


async def test_an_answer_that_breaks_off_is_one_on_whatever_connection() -> None:
    outcomes = await asked_twice(lambda connection, number: ANSWER if number == 0 else ANSWER[:-40])
    assert [isinstance(outcome, Failure) for outcome in outcomes] == [False, True]

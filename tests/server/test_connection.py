"""Clients that are slow, silent or many, and those that come while the server goes."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import h11
import httpx
import pytest
from uvicorn.protocols.http.flow_control import FlowControl

from dashinfer_vlm.frontend import generation
from dashinfer_vlm.server import run
from dashinfer_vlm.server.connection import Connection, raise_file_limit
from dashinfer_vlm.server.outlet import Chunks, Outlet
from tests.frontend.scripted import ScriptedLoader
from tests.media.site import until
from tests.server.conftest import Running, Serve

CHAT = "/v1/chat/completions"
ASK: Any = [{"role": "user", "content": "say it"}]
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


class Written(asyncio.Transport):
    """A transport that keeps what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.data: list[bytes] = []

    def is_closing(self) -> bool:
        return False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.data.append(bytes(data))


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("headers", [[], [("Content-Length", "8")]])
def test_an_outlet_frames_parts_as_h11_does(version: str, headers: list[tuple[str, str]]) -> None:
    """In chunks where the client knows them and no length was told; it is closed otherwise, and before an answer."""
    conn, transport = Chunks(h11.SERVER), Written()
    outlet = Outlet(conn, transport, FlowControl(transport))
    assert not outlet.offer(b"part", bytes)
    for framing in (headers, [("Content-Length", "8")]):
        conn.receive_data(f"GET / HTTP/{version}\r\nHost: x\r\nConnection: keep-alive\r\n\r\n".encode())
        assert isinstance(conn.next_event(), h11.Request)
        assert isinstance(conn.next_event(), h11.EndOfMessage)
        conn.send(h11.Response(status_code=200, headers=framing))
        for part in (b"part", b"", b"more"):
            sent = conn.send(h11.Data(data=part))
            is_taken = outlet.offer(part, bytes)
            assert is_taken == (version == "1.1" and not framing)
            assert b"".join(transport.data) == (sent if is_taken else b"")
            transport.data.clear()
        conn.send(h11.EndOfMessage())
        if conn.our_state is h11.MUST_CLOSE:
            break
        conn.start_next_cycle()


Connect = Callable[[Running], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """`await connect(running)` opens a connection that is closed at the end of the test."""
    writers: list[asyncio.StreamWriter] = []

    async def open_one(running: Running) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writers.append(writer)
        return reader, writer

    yield open_one
    for writer in writers:
        writer.transport.abort()
    await asyncio.sleep(0)


async def closed(reader: asyncio.StreamReader) -> bool:
    """Whether the other side ends the connection."""
    try:
        while await asyncio.wait_for(reader.read(1 << 20), 60):
            pass
    except ConnectionResetError:
        pass
    return True


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHo"])
async def test_headers_that_stop_coming_end_the_connection(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(Connection, "headers_s", 0.1)
    reader, writer = await connect(await serve())
    writer.write(sent)
    assert await closed(reader)


async def test_headers_of_a_second_request_that_stop_coming_end_the_connection(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Connection, "headers_s", 0.1)
    reader, writer = await connect(await serve())
    writer.write(HEALTH)
    assert (await reader.readuntil(b'{"status":"alive"}')).startswith(b"HTTP/1.1 200")
    writer.write(b"GET /health HT")
    assert await closed(reader)


async def test_a_connection_between_requests_is_kept_and_a_slow_answer_too(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Connection, "headers_s", 0.1)
    running = await serve("hello", engine={"pauses_after": 1})
    async with httpx.AsyncClient(base_url=running.url, timeout=60) as client:
        asking = asyncio.create_task(client.post(CHAT, json={"messages": ASK}))
        await running.engine.paused.wait()
        await asyncio.sleep(0.3)  # longer than headers may take
        running.engine.resume.set()
        assert (await asking).status_code == 200
        await asyncio.sleep(0.3)
        assert len(running.server.server_state.connections) == 1
        assert (await client.get("/health")).status_code == 200


async def test_a_stream_that_nobody_reads_is_let_go(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Connection, "write_s", 0.1)
    running = await serve("word " * 200_000, engine={"pauses_after": 150_000})
    _, writer = await connect(running)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    body = b'{"messages": [{"role": "user", "content": "x"}], "stream": true, "logprobs": true, "top_logprobs": 2}'
    writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    await until(lambda: bool(running.engine.requests))
    await until(lambda: not running.server.server_state.connections)
    await until(lambda: not running.engine.running)


@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_a_stream_is_whole_and_in_order_whether_its_client_reads_or_not(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """What comes while the client reads goes straight to it, what comes while it does not has to wait; so has all for
    clients that are too old to know chunks."""
    straight: list[Any] = []
    offer = Outlet.offer

    def noted(outlet: Outlet, news: Any, written: Any) -> bool:
        is_taken = offer(outlet, news, written)
        straight.extend([news] if is_taken else [])
        return is_taken

    monkeypatch.setattr(Outlet, "offer", noted)
    words = "".join(f"{number} " for number in range(30))
    running = await serve(words, engine={"pauses_after": 20})
    reader, writer = await connect(running)
    body = b'{"messages": [{"role": "user", "content": "x"}], "stream": true}'
    writer.write(f"POST {CHAT} HTTP/{version}\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    await running.engine.paused.wait()
    (connection,) = running.server.server_state.connections
    num_before = len(straight)
    assert (num_before > 10) == (version == "1.1")
    connection.pause_writing()
    running.engine.resume.set()
    await running.engine.idle.wait()
    assert len(straight) == num_before
    connection.resume_writing()
    data = await reader.readuntil(b"data: [DONE]\n\n")
    texts = re.findall(rb'"content":"([^"]*)"', data)
    assert b"".join(texts).decode() == words
    assert data.count(b'"finish_reason":"stop"') == 1


async def test_what_nobody_reads_is_bounded_long_before_the_client_is_let_go(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "MAX_UNREAD_BYTES", 2**20)
    running = await serve("word " * 200_000, engine={"pauses_after": 150_000})
    reader, writer = await connect(running)
    body = b'{"messages": [{"role": "user", "content": "x"}], "stream": true, "logprobs": true, "top_logprobs": 2}'
    writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    await until(lambda: bool(running.engine.requests))
    await until(lambda: not running.engine.running)
    assert len(running.engine.aborted) == 1
    assert not running.engine.paused.is_set()
    writer.transport.resume_reading()  # type: ignore[attr-defined]
    async for line in reader:
        if b'"code":"overloaded"' in line:
            return
    pytest.fail("the stream did not say why it ended")


async def test_where_too_many_connections_are_open_an_idle_one_goes(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Connection, "max_connections", 3)
    running = await serve()
    opened = []
    for _ in range(3):
        reader, writer = await connect(running)
        writer.write(HEALTH)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        opened.append((reader, writer))
    assert (await running.get("/health")).status_code == 200
    assert await closed(opened[0][0])


def test_more_idle_connections_than_files_keep_nobody_out(folder: Path, tmp_path: Path) -> None:
    """With a limit of 1,024 files that cannot be raised."""
    raise_file_limit()
    log = tmp_path / "log"
    with log.open("wb") as errors, ExitStack() as stack:
        command = [sys.executable, str(Path(__file__).with_name("scripted_server.py")), str(folder), "1024"]
        server = stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
        )
        stack.callback(server.kill)
        assert server.stdout is not None
        port = int(server.stdout.readline())
        for _ in range(1100):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            assert client.get("/health").status_code == 200
            assert client.post(CHAT, json={"messages": ASK}).json()["choices"][0]["message"]["content"] == "hello"
    assert log.read_text() == ""


@pytest.mark.parametrize("body", [b"zz\r\n", b'5\r\n{"a":zzz', b"-1\r\n\r\n"])
async def test_a_malformed_body_is_one_line_in_the_log(
    serve: Serve, connect: Connect, caplog: pytest.LogCaptureFixture, body: bytes
) -> None:
    running = await serve()
    logging.getLogger("uvicorn").addHandler(caplog.handler)  # it does not propagate
    reader, writer = await connect(running)
    writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
    await writer.drain()
    await until(lambda: bool(running.server.server_state.tasks))
    writer.write(body)
    assert await closed(reader)
    await until(lambda: not running.server.server_state.tasks)
    logging.getLogger("uvicorn").removeHandler(caplog.handler)
    assert [record.exc_info for record in caplog.records if record.levelno >= logging.WARNING] == [None]


async def test_whoever_comes_while_the_server_drains_is_told_to_come_back(serve: Serve) -> None:
    running = await serve("hello", engine={"pauses_after": 1})
    asking = asyncio.create_task(running.post(CHAT, {"messages": ASK}))
    await running.engine.paused.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    while running.service.ready:
        await asyncio.wait((asking,), timeout=0.01)
    refused = await running.post(CHAT, {"messages": ASK})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "30")
    assert (await running.get("/ready")).status_code == 503
    running.engine.resume.set()
    assert (await asking).json()["choices"][0]["message"]["content"] == "hello"


async def test_what_is_written_to_a_client_that_has_gone_is_dropped_without_a_word(
    serve: Serve, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    running = await serve()
    await connect(running)
    connections = running.server.server_state.connections
    await until(lambda: bool(connections))
    (connection,) = connections
    connection.transport.abort()
    for _ in range(10):
        connection.transport.write(b"data: more\n\n")
    assert not [record for record in caplog.records if record.name == "asyncio"]


async def test_what_the_end_of_the_server_cuts_off_is_told_so_without_a_traceback(
    serve: Serve, connect: Connect, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture that does not come, a body that does not, and an answer that is not read."""
    monkeypatch.setattr(run, "_CUT_OFF_S", 0.2)
    loader = ScriptedLoader(hangs={"http://h/silent"})
    running = await serve("hello " * 100_000, loader=loader, config={"shutdown_timeout_s": 0.1})
    logging.getLogger("uvicorn").addHandler(caplog.handler)  # it does not propagate
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: "
    picture = {"type": "image_url", "image_url": {"url": "http://h/silent"}}
    looking = asyncio.create_task(running.post(CHAT, {"messages": [{"role": "user", "content": [picture]}]}))
    half, writer = await connect(running)
    writer.write(f"{head}1000\r\n\r\n{{".encode())
    _, unread = await connect(running)
    body = json.dumps({"messages": ASK, "stream": True, "max_tokens": None})
    unread.transport.pause_reading()  # type: ignore[attr-defined]
    unread.write(f"{head}{len(body)}\r\n\r\n{body}".encode())
    await loader.hanging.wait()
    state = running.server.server_state
    await until(lambda: len(state.tasks) == 3 and any(each.flow.write_paused for each in state.connections))
    os.kill(os.getpid(), signal.SIGINT)
    reply = await looking
    assert (reply.status_code, reply.json()["error"]["message"]) == (503, "the server is shutting down")
    told = await asyncio.wait_for(half.read(), 60)
    assert told.startswith(b"HTTP/1.1 503 ")
    assert b"the server is shutting down" in told
    await running.server.ended.wait()
    logging.getLogger("uvicorn").removeHandler(caplog.handler)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_second_ctrl_c_ends_streams_with_the_true_reason(serve: Serve) -> None:
    running = await serve("hello", engine={"pauses_after": 1})
    asking = asyncio.create_task(running.post(CHAT, {"messages": ASK, "stream": True}))
    await running.engine.paused.wait()
    os.kill(os.getpid(), signal.SIGINT)
    while running.service.ready:
        await asyncio.wait((asking,), timeout=0.01)
    os.kill(os.getpid(), signal.SIGINT)
    assert "the server is shutting down" in (await asking).text


def test_the_limit_of_open_files_is_raised_as_far_as_it_goes() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, before[1]))
        assert raise_file_limit() == max(1, before[1] - 256)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

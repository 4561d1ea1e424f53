"""Bodies that are slow, many or intricate are refused by themselves; nobody else waits for them."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
import time
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashinfer_vlm.server import reading
from dashinfer_vlm.server.errors import HttpError
from tests.frontend.scripted import ScriptedLoader
from tests.server.conftest import Running, Serve

CHAT = "/v1/chat/completions"
ASK: Any = [{"role": "user", "content": "say it"}]


def num_structure(value: Any) -> tuple[int, int]:
    """Objects, and commas, of a JSON value as `json.dumps` writes it."""
    if isinstance(value, dict):
        inside = [num_structure(item) for item in value.values()]
        return 1 + sum(n for n, _ in inside), sum(m for _, m in inside) + max(0, len(value) - 1)
    if isinstance(value, list):
        inside = [num_structure(item) for item in value]
        return sum(n for n, _ in inside), sum(m for _, m in inside) + max(0, len(value) - 1)
    return 0, 0


values = st.recursive(
    st.text(st.sampled_from('a"\\{,é')) | st.integers(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.sampled_from('a"\\{,')), inner),
)


@given(value=values)
def test_what_stands_in_strings_is_no_structure(value: Any) -> None:
    body = json.dumps(value).encode()
    ranges = list(reading._outside_strings(body))
    assert (sum(body.count(b"{", *r) for r in ranges), sum(body.count(b",", *r) for r in ranges)) == num_structure(
        value
    )


@pytest.mark.parametrize(
    ("body", "limit"),
    [
        ({"messages": [{"role": "user", "content": ""}] * 300_000}, "4096 objects"),
        ({"messages": [{}] * 10_000}, "4096 objects"),
        ({"messages": ASK} | {f"field{i}": i for i in range(500_000)}, "150000 values"),
        ({"messages": ASK, "logit_bias": {str(i): 1 for i in range(400_000)}}, "150000 values"),
    ],
)
def test_too_intricate_bodies_are_refused_unread(body: Any, limit: str) -> None:
    with pytest.raises(HttpError, match=f"more than {limit}"):
        reading.check_structure(json.dumps(body).encode())


def test_long_conversations_long_texts_and_pictures_pass() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 1_000_000}}
    turns = [{"role": "user", "content": 'x,"{' * 100_000}, {"role": "user", "content": [picture] * 10}] + ASK * 2000
    reading.check_structure(json.dumps({"messages": turns}).encode())
    reading.check_structure(json.dumps({"prompt": list(range(131_072))}).encode())


async def test_a_byte_order_mark_is_no_part_of_a_body(serve: Serve) -> None:
    running = await serve("hello")
    body = b"\xef\xbb\xbf" + json.dumps({"messages": ASK}).encode()
    async with httpx.AsyncClient(base_url=running.url) as client:
        assert (await client.post(CHAT, content=body)).status_code == 200


async def test_a_packed_body_is_refused_by_its_encoding(serve: Serve) -> None:
    running = await serve("hello")
    body = json.dumps({"messages": ASK}).encode()
    async with httpx.AsyncClient(base_url=running.url) as client:
        reply = await client.post(CHAT, content=gzip.compress(body), headers={"Content-Encoding": "gzip"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "unsupported")
        assert "gzip" in reply.json()["error"]["message"]
        assert (await client.post(CHAT, content=body, headers={"Content-Encoding": "identity"})).status_code == 200


async def test_a_body_that_stops_coming_is_408_and_the_connection_ends(serve: Serve) -> None:
    running = await serve(body_start_s=0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{{".encode())
    reply = await asyncio.wait_for(reader.read(), 60)
    assert reply.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_timeout"' in reply
    writer.close()


async def test_unfinished_bodies_have_a_budget_together(serve: Serve) -> None:
    running = await serve(max_body_bytes=1000)
    opened = [await asyncio.open_connection("127.0.0.1", running.port) for _ in range(18)]
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n".encode()
    for _, writer in opened:
        writer.write(head + b" " * 900)
        await writer.drain()
    waiting = [asyncio.ensure_future(reader.readline()) for reader, _ in opened]
    done, pending = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=60)
    assert [task.result() for task in done] == [b"HTTP/1.1 429 Too Many Requests\r\n"]
    for (_, writer), task in zip(opened, waiting, strict=True):
        task.cancel()
        writer.close()
    await asyncio.gather(*pending, return_exceptions=True)
    for _ in range(200):  # until the server has seen that the others left
        reply = await running.post(CHAT, {"messages": ASK})
        if reply.status_code == 200:
            return
    pytest.fail(reply.text)


def picture(url: str, padding: int) -> Any:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": " " * padding}]
    return {"messages": [{"role": "user", "content": content}]}


async def test_bodies_are_held_until_their_pictures_are_loaded_and_not_while_the_answer_is_made(serve: Serve) -> None:
    """However many requests there may be, what they sent is bounded."""
    loader = ScriptedLoader(hangs={"http://h/silent"})
    running = await serve(loader=loader, engine={"pauses_after": 0}, max_body_bytes=1000)
    answered: list[asyncio.Task[httpx.Response]] = []
    while len(answered) < 20:
        answered.append(asyncio.create_task(running.post(CHAT, picture("http://h/p", 800))))
        while len(running.engine.requests) < len(answered):
            await asyncio.wait(answered, timeout=0.01)
    waiting = [asyncio.create_task(running.post(CHAT, picture("http://h/silent", 800))) for _ in range(20)]
    done, pending = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=60)
    told = done.pop().result()
    assert (told.status_code, "the bodies of requests hold" in told.text) == (429, True)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    running.engine.resume.set()
    assert {(await task).status_code for task in answered} == {200}
    for _ in range(200):  # until the server has seen that the others left
        if (await running.post(CHAT, picture("http://h/p", 800))).status_code == 200:
            return
    pytest.fail("what was held is held for ever")


HEAVY: dict[str, tuple[str, Any, int]] = {
    "a long text": (CHAT, {"messages": [{"role": "user", "content": "the quick brown fox, " * 150_000}]}, 400),
    "a text as long as may fit": (CHAT, {"messages": [{"role": "user", "content": "word " * 10_000}]}, 400),
    "a text to count": ("/tokenize", {"prompt": "the quick brown fox, " * 150_000}, 400),
    "ids to detokenise": ("/detokenize", {"tokens": [100] * 3_000_000}, 400),
    "ids that fit": ("/detokenize", {"tokens": [100] * 140_000}, 200),
    "wrong ids": ("/detokenize", {"tokens": [-1] * 140_000}, 400),
    "empty messages": (CHAT, {"messages": [{"role": "user", "content": ""}] * 300_000}, 400),
    "unknown fields": (CHAT, {"messages": ASK} | {f"f{i}": 1 for i in range(500_000)}, 400),
    "logit_bias": (CHAT, {"messages": ASK, "logit_bias": {str(i): 1.0 for i in range(250_000)}}, 400),
    "a large picture": (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 10_000_000}}]}]}, 200),  # noqa: E501
    "log probabilities": (CHAT, {"messages": ASK, "logprobs": True, "top_logprobs": 20, "n": 4}, 200),
    "a large answer": (CHAT, {"messages": ASK, "n": 8}, 200),
}  # fmt: skip


@pytest.mark.parametrize("name", HEAVY)
async def test_one_request_never_stops_the_others(serve: Serve, name: str) -> None:
    """The loop's longest pause while the request is served, the best of three."""
    path, body, status = HEAVY[name]
    running = await serve("word " * 1500)
    content = json.dumps(body).encode()
    pauses = []
    for _ in range(3):
        pause, reply = await longest_pause(running, path, content)
        assert reply.status_code == status, reply.text[:300]
        pauses.append(pause)
        if pause < 0.1:
            break
    assert min(pauses) < 0.1


async def longest_pause(running: Running, path: str, content: bytes) -> tuple[float, httpx.Response]:
    """In seconds, no more than this process computed meanwhile, since other programs run on this machine too.

    The client has a thread of its own, which does little but wait: its bytes are ready before.
    """
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    replies: list[httpx.Response] = []

    def post() -> None:
        with httpx.Client(base_url=running.url, timeout=120) as client:
            replies.append(client.post(path, content=content))
        loop.call_soon_threadsafe(done.set)

    threading.Thread(target=post).start()
    longest, before = 0.0, (time.perf_counter(), time.process_time())
    while not done.is_set():
        await asyncio.sleep(0.001)
        now = (time.perf_counter(), time.process_time())
        longest, before = max(longest, min(now[0] - before[0], now[1] - before[1])), now
    return longest, replies[0]

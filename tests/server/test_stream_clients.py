"""What the bench clients of others make of our streams: an event for every token, as it comes."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import httpx
import pytest

from dashinfer_vlm.bench.events import Piece, read_events, read_reply
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from tests.frontend.scripted import EOS, ScriptedEngine
from tests.server.conftest import Running, Serve

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASK: Any = {CHAT: {"messages": [{"role": "user", "content": "say it"}]}, TEXT: {"prompt": "say it", "max_tokens": 50}}
ALSO_ASK: Any = {
    "/v1/messages": {"messages": [{"role": "user", "content": "say it"}], "max_tokens": 50, "model": "model"},
    "/v1/responses": {"input": "say it"},
}
EVERY_STEP = {"include_usage": True, "continuous_usage_stats": True}


class SteppedByHand(ScriptedEngine):
    """Emits a token, or the end, whenever the test says so."""

    def __init__(self, tokens: list[int]) -> None:
        super().__init__(lambda _: tokens)
        self.steps = asyncio.Semaphore(0)

    async def _outputs(self, request: Any) -> Any:
        async for output in super()._outputs(request):
            await self.steps.acquire()
            yield output


class Paced(ScriptedEngine):
    """Makes a token every `pace_s` seconds."""

    pace_s = 0.03

    async def _outputs(self, request: Any) -> Any:
        async for output in super()._outputs(request):
            await asyncio.sleep(self.pace_s)
            yield output


@dataclass
class VllmClient:
    """Reads a stream as `vllm bench serve` does: vllm/benchmarks/lib/endpoint_request_func.py at commit 02cfb534,
    async_request_openai_chat_completions and async_request_openai_completions. The first event with choices is the
    first token, every later one ends a wait, whatever text they have; the event of the usage ends none."""

    sent_s: float
    ttft_s: float = 0.0
    waits_s: list[float] = field(default_factory=list)
    text: str = ""
    num_output_tokens: int = 0
    _latest_s: float = 0.0

    def read(self, line: str, now_s: float) -> None:
        if not line.startswith("data: ") or line == "data: [DONE]":
            return
        data = json.loads(line.removeprefix("data: "))
        if choices := data.get("choices"):
            content = choices[0]["delta"].get("content") if "delta" in choices[0] else choices[0].get("text")
            if self.ttft_s == 0.0:
                self.ttft_s = now_s - self.sent_s
            else:
                self.waits_s.append(now_s - self._latest_s)
            self._latest_s = now_s
            self.text += content or ""
        elif usage := data.get("usage"):
            self.num_output_tokens = usage.get("completion_tokens")


async def lines_of(running: Running, path: str, body: dict[str, Any]) -> list[str]:
    reply = await running.post(path, ASK[path] | {"stream": True} | body)
    assert reply.status_code == 200, reply.text
    return [line for line in reply.text.split("\n") if line]


async def steps_of(running: Running, path: str, tokens: list[int], client: VllmClient) -> int:
    """Events of an answer of `tokens` that belong to a step: not the role, nor the reason at the end.

    A token is made only after the event of the one before has been read.
    """
    running.service.engine = engine = SteppedByHand(tokens)
    body = ASK[path] | {"stream": True, "ignore_eos": True, "stream_options": {"include_usage": True}}
    engine.steps.release()
    num_steps = 0
    async with (
        httpx.AsyncClient(base_url=running.url, timeout=60) as http,
        http.stream("POST", path, json=body) as reply,
    ):
        async for line in reply.aiter_lines():
            client.read(line, time.perf_counter())
            if '"choices":[{' not in line:
                continue
            choice = json.loads(line.removeprefix("data: "))["choices"][0]
            if "role" not in choice.get("delta", {}) and choice["finish_reason"] is None:
                num_steps += 1
                engine.steps.release()
    return num_steps


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_every_token_is_an_event_that_arrives_by_itself(serve: Serve, tokenizer: Tokenizer, path: str) -> None:
    """Also where it shows no text: a special token, a part of a character."""
    running = await serve()
    smile = tokenizer.encode_text("\U0001f600")
    assert len(smile) > 1
    tokens = [EOS, *smile, *tokenizer.encode_text("word"), EOS]
    client = VllmClient(time.perf_counter())
    assert await steps_of(running, path, tokens, client) == len(tokens)
    assert client.text == "\U0001f600word"
    assert client.num_output_tokens == len(tokens) + 1
    around = 2 if path == CHAT else 1  # the role, and the reason at the end
    assert 1 + len(client.waits_s) == len(tokens) + around


@pytest.mark.parametrize("path", [CHAT, TEXT, *ALSO_ASK])
async def test_an_event_is_one_line_for_clients_that_end_lines_as_unicode_does(serve: Serve, path: str) -> None:
    said = "\N{SNOWMAN}a\u2028b\u2029c\x85d\x0be\x1ef"
    running = await serve(said)
    reply = await running.post(path, {**ALSO_ASK, **ASK}[path] | {"stream": True})
    lines = [line for line in reply.text.splitlines() if line]
    assert all(line.startswith(("data: ", "event: ")) for line in lines), lines
    told = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert all(escaped in json.dumps(told) for escaped in (r"\u2028", r"\u2029", r"\u0085"))


async def test_vllms_client_measures_what_our_bench_measures(serve: Serve, tokenizer: Tokenizer) -> None:
    """Both read the same events with the same times: the role must not come long before the first token."""
    running = await serve()
    tokens = tokenizer.encode_text(" one two three four five six seven eight")
    running.service.engine = Paced(lambda _: tokens)
    body = ASK[CHAT] | {"stream": True, "stream_options": {"include_usage": True}}
    pieces: list[Piece] = []
    sent_s = time.perf_counter()
    async with httpx.AsyncClient(base_url=running.url) as http, http.stream("POST", CHAT, json=body) as reply:
        async for piece in reply.aiter_raw():
            pieces.append((time.perf_counter(), piece))
    ours = read_reply(sent_s, pieces[-1][0], pieces, len(tokens) + 1)
    theirs = VllmClient(sent_s)
    for time_s, data in read_events(pieces):
        theirs.read(f"data: {data}", time_s)
    assert theirs.num_output_tokens == ours.num_output_tokens
    assert 0 <= ours.first_token_s - theirs.ttft_s < Paced.pace_s / 2
    assert median(theirs.waits_s[1:]) == pytest.approx(median(ours.gaps_s), abs=Paced.pace_s / 6)


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_every_event_tells_the_tokens_so_far_when_asked(serve: Serve, path: str) -> None:
    """As guidellm asks by default."""
    running = await serve("qz")
    lines = await lines_of(running, path, {"stream_options": EVERY_STEP})
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert (counts[-1], events[-1]["choices"]) == (3, [])
    assert all(event["usage"]["prompt_tokens"] > 0 for event in events)


async def test_usage_of_every_event_needs_include_usage(serve: Serve) -> None:
    lines = await lines_of(await serve("qz"), CHAT, {"stream_options": {"continuous_usage_stats": True}})
    assert not any("usage" in json.loads(line.removeprefix("data: ")) for line in lines[:-1])

"""A stand-in for an OpenAI-compatible server: it has no model and says "tok" as often as it is asked to.

It keeps every body that it saw, so that tests can tell what the bench sent, to whom and in which order.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse


@dataclass(slots=True)
class Script:
    """What one stand-in does; the defaults behave well."""

    name: str = "stand-in"
    tokens_per_event: int = 1
    short_by: int = 0
    """Tokens that an answer lacks."""
    fail: frozenset[int] = frozenset()
    """Numbers of the requests that are answered 503."""
    gather: int = 1
    """Requests that must be there before any is answered."""
    seen: list[dict[str, Any]] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    """One name per request; two stand-ins may share it."""
    most_at_once: int = 0
    at_once: int = 0
    crowd: asyncio.Event = field(default_factory=asyncio.Event)


def events(script: Script, count: int) -> Iterator[dict[str, Any]]:
    """The chunks of an answer of `count` tokens."""
    yield {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
    for start in range(0, count, script.tokens_per_event):
        yield {"choices": [{"delta": {"content": "tok " * min(script.tokens_per_event, count - start)}}]}
    yield {"choices": [{"delta": {}, "finish_reason": "length"}]}
    yield {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": count}}


def make_app(script: Script) -> FastAPI:
    app = FastAPI()

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"data": [{"id": f"model of {script.name}"}]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await request.json()
        number = len(script.seen)
        script.seen.append(body)
        script.order.append(script.name)
        if number in script.fail:
            return JSONResponse({"error": {"message": f"no room for request {number}"}}, 503)
        return StreamingResponse(_stream(script, body["max_tokens"] - script.short_by), media_type="text/event-stream")

    return app


async def _stream(script: Script, count: int) -> AsyncIterator[bytes]:
    script.at_once += 1
    script.most_at_once = max(script.most_at_once, script.at_once)
    if script.at_once >= script.gather:
        script.crowd.set()
    await script.crowd.wait()
    for event in events(script, count):
        yield f"data: {json.dumps(event)}\n\n".encode()
    script.at_once -= 1
    yield b"data: [DONE]\n\n"


@contextmanager
def served(script: Script) -> Iterator[str]:
    """The URL of a stand-in on a free port of loopback, up within the block."""
    server = uvicorn.Server(uvicorn.Config(make_app(script), port=0, log_level="warning", lifespan="off"))
    up = threading.Event()
    startup = server.startup

    async def announce(*args: Any, **kwargs: Any) -> None:
        await startup(*args, **kwargs)
        up.set()

    server.startup = announce  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert up.wait(30)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()

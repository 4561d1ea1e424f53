"""A real uvicorn on a loopback socket over a scripted engine, and the real OpenAI client to call it."""

from __future__ import annotations

import asyncio
import queue
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn.server
from openai import AsyncOpenAI

from dashinfer_vlm.cli.listen import listen
from dashinfer_vlm.config import ServerConfig
from dashinfer_vlm.frontend.backlog import QueueLimits
from dashinfer_vlm.frontend.prompt import PromptBuilder
from dashinfer_vlm.frontend.scores import NO_SCORES, ScoreForm
from dashinfer_vlm.frontend.service import Service
from dashinfer_vlm.frontend.template import ChatTemplate
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from dashinfer_vlm.frontend.vectors import NO_VECTORS, VectorForm
from dashinfer_vlm.server.access import Teller
from dashinfer_vlm.server.app import create_app
from dashinfer_vlm.server.reading import BodyReader
from dashinfer_vlm.server.run import HttpServer
from tests.conftest import CheckpointMaker
from tests.frontend.scripted import ScriptedEngine, ScriptedLoader
from tests.tokens import IMAGE, VIDEO

Serve = Callable[..., Any]


class Running:
    """A server that listens, with everything that a test wants to look at."""

    def __init__(self, server: TestedServer, engine: ScriptedEngine, loader: ScriptedLoader, service: Service) -> None:
        self.server, self.engine, self.loader, self.service = server, engine, loader, service
        self.port: int = server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    async def post(self, path: str, json: Any = None, **options: Any) -> httpx.Response:
        async with httpx.AsyncClient(base_url=self.url, timeout=60) as client:
            return await client.post(path, json=json, **options)

    async def get(self, path: str, **options: Any) -> httpx.Response:
        async with httpx.AsyncClient(base_url=self.url, timeout=60) as client:
            return await client.get(path, **options)


@pytest.fixture(scope="session")
def folder(checkpoint: CheckpointMaker) -> Path:
    return checkpoint("qwen2_vl")


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="session")
def template(folder: Path, tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate.from_folder(folder, tokenizer)


@pytest.fixture(scope="session")
def parts(tokenizer: Tokenizer, template: ChatTemplate) -> Iterator[Parts]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn.server, "asyncio", Hurried())
        yield Parts(tokenizer, template)


@pytest.fixture
async def serve(parts: Parts) -> AsyncIterator[Serve]:
    """`await serve("hello", engine={}, config={}, ...)` starts a server that says "hello" and ends with the test."""
    async with AsyncExitStack() as stack:

        async def start(text: str = "hello", **options: Any) -> Running:
            return await stack.enter_async_context(parts.running(text, **options))

        yield start


@pytest.fixture(scope="session")
def shared(parts: Parts) -> Iterator[httpx.Client]:
    """A client of one server for all tests that need no other; it runs in a thread."""
    ready: queue.SimpleQueue[tuple[Running, asyncio.AbstractEventLoop, asyncio.Event]] = queue.SimpleQueue()

    async def run() -> None:
        async with parts.running() as running:
            end = asyncio.Event()
            ready.put((running, asyncio.get_running_loop(), end))
            await end.wait()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    running, loop, end = ready.get(timeout=60)
    with httpx.Client(base_url=running.url, timeout=60) as client:
        yield client
    loop.call_soon_threadsafe(end.set)
    thread.join()


class Parts:
    """What all servers of a test run have in common."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self.tokenizer, self.template = tokenizer, template

    @asynccontextmanager
    async def running(
        self,
        text: str = "hello",
        *,
        config: dict[str, Any] | None = None,
        engine: dict[str, Any] | None = None,
        loader: ScriptedLoader | None = None,
        max_body_bytes: int = 2**25,
        body_start_s: float = 60.0,
        defaults: dict[str, float | int] | None = None,
        max_items: dict[str, int] | None = None,
        tellers: tuple[Teller, ...] = (),
        vectors: VectorForm = NO_VECTORS,
        scores: ScoreForm = NO_SCORES,
    ) -> AsyncIterator[Running]:
        scripted = ScriptedEngine(lambda _: self.tokenizer.encode_text(text), **(engine or {}))
        media = loader or ScriptedLoader()
        prompts = PromptBuilder(
            tokenizer=self.tokenizer,
            template=self.template,
            loader=media,
            placeholder_ids={"image": IMAGE, "video": VIDEO},
            max_model_len=scripted.info.max_model_len,
            vocab_size=scripted.info.vocab_size,
            max_items=max_items or {},
            vectors=vectors,
            scores=scores,
        )
        options: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "log_level": "warning", **(config or {})}
        settings = ServerConfig(**options)
        service = Service(scripted, prompts, sampling_defaults=defaults, queue=QueueLimits.of(settings))
        app = create_app(service, settings, bodies=BodyReader(max_body_bytes, start_s=body_start_s), tellers=tellers)
        server = TestedServer(app, service, settings)
        async with listening(server):
            yield Running(server, scripted, media, service)


@asynccontextmanager
async def listening(server: TestedServer) -> AsyncIterator[None]:
    """Run `server` until the block ends."""
    task = asyncio.create_task(server.serve(sockets=listen("127.0.0.1", 0)))
    listens = asyncio.create_task(server.listens.wait())
    await asyncio.wait((task, listens), return_when=asyncio.FIRST_COMPLETED)
    assert listens.done(), task
    try:
        yield
    finally:
        server.should_exit = True
        await task


class Hurried:
    """asyncio as uvicorn sees it: it looks every tenth of a second whether to end, and a server ends with each test."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s / 20)


class TestedServer(HttpServer):
    """Says when it listens, and when it has ended."""

    __test__ = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.listens, self.ended = asyncio.Event(), asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listens.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        self.ended.set()


@pytest.fixture
async def openai_client() -> AsyncIterator[Callable[[Running], AsyncOpenAI]]:
    """`openai_client(running)` is a client that does not try again."""
    clients: list[AsyncOpenAI] = []

    def make(running: Running, api_key: str = "EMPTY") -> AsyncOpenAI:
        clients.append(AsyncOpenAI(base_url=f"{running.url}/v1", api_key=api_key, max_retries=0))
        return clients[-1]

    yield make
    for client in clients:
        await client.close()

"""Serving the application on a socket, until a signal ends it in good order."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI
from uvicorn.config import LOGGING_CONFIG

from dashinfer_vlm.config import ServerConfig
from dashinfer_vlm.errors import EngineDeadError
from dashinfer_vlm.frontend.service import Service
from dashinfer_vlm.server.app import create_app
from dashinfer_vlm.server.auth import Keyring
from dashinfer_vlm.server.connection import Connection, raise_file_limit
from dashinfer_vlm.server.errors import CUT_OFF
from dashinfer_vlm.server.tls import Certificate
from dashinfer_vlm.server.tracing import Tracer

logger = logging.getLogger(__name__)

_GRACE_S = 3
"""What uvicorn waits for connections once the service has drained, so that the last answers can leave."""
_LAST_WORDS_S = 1.0
"""What streams that were ended get to say why."""
_CUT_OFF_S = 2.0
"""What is left then is cut off, before uvicorn does so in its own way: with a traceback for each request."""
_TICKS_WITHOUT_ENGINE = 30
"""Tenths of a second that a server stays up once its engine is gone for good."""
_ACCEPTED_AT_ONCE = 16
"""Connections that one turn of the event loop takes. `Connection` makes room some turns later, and until then each of
them holds a file."""
_BACKLOG = 2048
"""Connections that the kernel holds until they are taken."""
_GARBAGE = 10_000
"""Objects more than before until their cycles are looked for; they take a few megabytes."""
_LOOK_S = 0.1
"""How often a second Ctrl-C is looked for."""


class HttpServer(uvicorn.Server):
    """uvicorn that drains the service at SIGINT or SIGTERM and then returns; a second SIGINT does not wait."""

    def __init__(
        self, app: FastAPI, service: Service, config: ServerConfig, certificate: Certificate | None = None
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=config.host,
                port=config.port,
                log_level=config.log_level,
                log_config=LOGGING_CONFIG if config.log_format == "text" else None,
                access_log=False,  # see server/access.py
                ssl_keyfile=certificate.keyfile if certificate else None,
                ssl_certfile=certificate.certfile if certificate else None,
                lifespan="on",  # "Application startup complete" tells that the server is ready
                ws="none",
                timeout_keep_alive=config.keep_alive_s,  # type: ignore[arg-type]  # a delay in seconds, whole or not
                timeout_graceful_shutdown=_GRACE_S,
                http=Connection,
                backlog=_ACCEPTED_AT_ONCE,
            )
        )
        self._service = service
        self._certificate = certificate
        self._drain_s = config.shutdown_timeout_s
        self._num_ticks_dead = 0
        self.engine_is_gone = False
        """The server ends, or has ended, since there is no engine any more."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn announces itself only on sockets that it has bound; people and scripts wait for that line."""
        if self._certificate and self.config.ssl:
            self._certificate.follow(self.config.ssl)
        await super().startup(sockets)
        if sockets and self.started:
            for each in sockets:
                each.listen(_BACKLOG)  # asyncio has one number for the kernel's queue and for what it takes of it
            self._log_started_message(sockets)

    async def on_tick(self, counter: int) -> bool:
        """Whether to end: told so, or without an engine for a while, in which clients and probes hear of it."""
        self._num_ticks_dead = self._num_ticks_dead + 1 if self._service.engine.gone() else 0
        self.engine_is_gone = self._num_ticks_dead > _TICKS_WITHOUT_ENGINE
        return await super().on_tick(counter) or self.engine_is_gone

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new requests, let the running ones end for the configured time, abort the rest, then stop listening.

        Until then clients are told to come back later, and probes that this server goes.
        """
        if num_running := self._service.num_in_flight:
            logger.info(
                "%d answers get up to %g s to end; press Ctrl+C again to stop at once", num_running, self._drain_s
            )
        drain = asyncio.create_task(self._service.drain(self._drain_s))
        while not drain.done() and not self.force_exit:
            await asyncio.wait({drain}, timeout=_LOOK_S)
        if self.force_exit:
            drain.cancel()
            await self._service.drain(0)
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=_LAST_WORDS_S)
        cutting = asyncio.get_running_loop().call_later(_CUT_OFF_S, self._cut_off)
        await super().shutdown(sockets)
        cutting.cancel()
        if self.force_exit:
            await self.lifespan.shutdown()  # uvicorn skips it, and its task would end with a traceback

    def _cut_off(self) -> None:
        """End requests whose bodies have not come and answers that are not read."""
        for connection in self.server_state.connections:
            if isinstance(connection, Connection) and connection.is_amid_answer:
                connection.transport.abort()
        for task in self.server_state.tasks:
            task.cancel(CUT_OFF)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """A server that has drained has done what the signal asked, so it is not raised again: the status is 0."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()


def _collect_seldom() -> None:
    """A thousand streams make and drop thousands of objects at once, which the collector would take for many that stay:
    it would go through all that the server holds in the middle of a step's tokens, again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GARBAGE)


@contextmanager
def _reading_again(*held: Keyring | Certificate | None) -> Iterator[None]:
    """While the block runs, SIGHUP has the files of keys and of the certificate read again, and ends nothing."""
    files = [each for each in held if each is not None]

    def read() -> None:
        logger.info("SIGHUP: %s", "files are read again" if files else "there is no file to read again")
        for each in files:
            each.read_again()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, read)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)


async def serve(
    service: Service,
    config: ServerConfig,
    certificate: Certificate | None = None,
    sockets: list[socket.socket] | None = None,
) -> None:
    """Serve until a signal, on `sockets` when the address is bound already.

    Raises ConfigError before, SystemExit when the address cannot be had, EngineDeadError when the engine has died: who
    started the server then starts another one.
    """
    Connection.max_connections = raise_file_limit()
    _collect_seldom()
    tracer = Tracer.to(config.otlp_traces_endpoint) if config.otlp_traces_endpoint else None
    keyring = Keyring(config)
    app = create_app(service, config, keyring=keyring, tellers=(tracer.tell,) if tracer else ())
    server = HttpServer(app, service, config, certificate)
    try:
        with _reading_again(keyring if config.api_keys_file else None, certificate):
            await server.serve(sockets)
    finally:
        if tracer:
            await asyncio.to_thread(tracer.close)
    if server.engine_is_gone:
        raise EngineDeadError("the engine has stopped, and the server with it")

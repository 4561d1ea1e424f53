"""`dashinfer_vlm_serve`: from flags to a server that answers, and down again in good order.

    flags ──► configs ──► socket ──► model folder ──► engine process ──► media processes ──► HTTP

Whatever can be wrong is found before the minutes of loading: flags, files, address and folder come first.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import signal
import socket
import sys
from contextlib import ExitStack
from functools import partial
from typing import Any

import rich_click as click
import uvloop

from dashinfer_vlm import envs, flags
from dashinfer_vlm.allocator import return_freed_memory
from dashinfer_vlm.cli.command import CONTEXT, execute, version_option
from dashinfer_vlm.cli.listen import listen
from dashinfer_vlm.cli.logs import announce, set_up_logging
from dashinfer_vlm.cli.options import options
from dashinfer_vlm.config import EngineConfig, MediaConfig, ServerConfig
from dashinfer_vlm.hub import names_of, resolve
from dashinfer_vlm.server.tls import Certificate

__all__ = ["main"]

logger = logging.getLogger(__name__)


@click.command(
    "dashinfer_vlm_serve",
    context_settings=CONTEXT,
    epilog="Every flag can also be given as a variable: --max-batch 8 is DASHINFER_MAX_NUM_SEQS=8. See docs/flags.md.",
)
@version_option
@options(*flags.FACES)
def command(**values: Any) -> None:
    """Serve a vision-language model behind an OpenAI-compatible API.

    dashinfer_vlm_serve --model qwen/Qwen2-VL-2B-Instruct
    """
    engine, media, server = (flags.build(face, values) for face in flags.FACES)
    for config in (engine, media, server):
        config.validate()
    set_up_logging(server.log_level, server.log_format)
    return_freed_memory()
    for name in envs.unknown([env for face in flags.FACES for item in flags.flags_of(face) for env in item.envs]):
        logger.warning("%s is not a variable of this server and has no effect; see docs/flags.md", name)
    with ExitStack() as stack:
        _check_keys(server)
        _check_traces(server)
        _check_files(server)
        _check_responses(server)
        certificate = certificate_of(server)
        sockets = [stack.enter_context(each) for each in listen(server.host, server.port)]
        names = server.served_model_name or names_of(engine)
        engine = resolve(engine)
        # SIGTERM ends loading as Ctrl-C does; uvicorn handles both once it runs
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until it has read what it may have to read again
        server = dataclasses.replace(server, served_model_name=names)
        uvloop.run(_serve(engine, media, server, sockets, certificate))


def _check_keys(config: ServerConfig) -> None:
    """The keys are read again when the server starts; here a wrong file is found before the model is loaded."""
    if config.api_keys_file is not None:
        from dashinfer_vlm.server.auth import read_keys  # brings the web framework

        read_keys(config)


def _check_traces(config: ServerConfig) -> None:
    """Without the packages, or with an endpoint that is none, the server ends here."""
    if config.otlp_traces_endpoint is not None:
        from dashinfer_vlm.server import tracing

        tracing.check(config.otlp_traces_endpoint)


def _check_files(config: ServerConfig) -> None:
    """Whether the folder for files can be used is found before the model is loaded, too."""
    if config.files_path is not None:
        from dashinfer_vlm.server.batches.opening import open_store  # brings the web framework

        open_store(config, config.files_path).close()


def _check_responses(config: ServerConfig) -> None:
    """Likewise the file for responses."""
    if config.responses_store is not None:
        from dashinfer_vlm.server.responses.store import ResponseStore  # brings the web framework

        asyncio.run(ResponseStore.open(config.responses_store, config.responses_store_mib * 2**20).close())


def certificate_of(config: ServerConfig) -> Certificate | None:
    """The one that the flags name, or with --ssl the environment; raises ConfigError."""
    if config.ssl_certfile and config.ssl_keyfile:
        return Certificate(config.ssl_certfile, config.ssl_keyfile)
    if not config.ssl:
        return None
    keyfile, certfile = envs.tls_files()
    return Certificate(certfile, keyfile)


async def _serve(
    engine_config: EngineConfig,
    media_config: MediaConfig,
    server_config: ServerConfig,
    sockets: list[socket.socket],
    certificate: Certificate | None,
) -> None:
    # the rooms bring torch and more, which neither -h nor a wrong flag should wait for
    from dashinfer_vlm.frontend.backlog import QueueLimits
    from dashinfer_vlm.frontend.opening import open_service, start_restarted
    from dashinfer_vlm.server.run import serve

    opening = open_service(
        engine_config,
        media_config,
        start_engine=partial(start_restarted, max_restarts=server_config.max_engine_restarts),
        chat_template=server_config.chat_template,
        queue=QueueLimits.of(server_config),
        start_decoders=True,
    )
    async with opening as service:
        announce(server_config.served_model_name[0], service.engine.info)
        await serve(service, server_config, certificate, sockets)


def main() -> None:
    """Entry point of `dashinfer_vlm_serve`."""
    sys.exit(execute(command))


if __name__ == "__main__":
    main()

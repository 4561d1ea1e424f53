"""The address is taken, on every family, before anything listens on it."""

from __future__ import annotations

import asyncio
import socket

import pytest

from dashinfer_vlm.cli.listen import listen
from dashinfer_vlm.errors import ConfigError


def test_port_0_is_one_free_port_for_all_addresses_of_the_host() -> None:
    sockets = listen("localhost", 0)
    try:
        ports = {each.getsockname()[1] for each in sockets}
        assert len(ports) == 1
        assert 0 not in ports
    finally:
        for each in sockets:
            each.close()


def test_connections_are_refused_until_the_server_listens() -> None:
    (bound,) = listen("127.0.0.1", 0)
    with bound, pytest.raises(ConnectionRefusedError):
        socket.create_connection(bound.getsockname())


def test_a_taken_port_is_refused_and_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            listen("127.0.0.1", port)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1:8000"):
        listen("192.0.2.1", 8000)


def test_a_host_without_an_address_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--host no\.such\.host\.invalid"):
        listen("no.such.host.invalid", 8000)


def test_accepted_connections_send_small_pieces_at_once() -> None:
    """asyncio turns Nagle's algorithm off where the listening socket names its protocol, and nowhere else."""

    async def option_of_an_accepted_connection() -> int:
        (bound,) = listen("127.0.0.1", 0)
        options: asyncio.Queue[int] = asyncio.Queue()

        def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted = writer.get_extra_info("socket")
            options.put_nowait(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(connected, sock=bound):
            _, writer = await asyncio.open_connection(*bound.getsockname())
            writer.close()
            return await options.get()

    assert asyncio.run(option_of_an_accepted_connection()) == 1

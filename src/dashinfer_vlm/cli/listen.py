"""The server's address, taken before the model is loaded, so that a port in use is known at once."""

from __future__ import annotations

import errno
import socket

from dashinfer_vlm.errors import ConfigError

__all__ = ["listen"]

_NO_SUCH_FAMILY = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""`localhost` has an IPv6 address also where the system has no IPv6."""


def listen(host: str, port: int) -> list[socket.socket]:
    """Bound sockets for every address of `host`; they refuse connections until the server listens on them.

    Port 0 takes one free port for all of them. Raises ConfigError for a host without an address here and for a port
    that is taken.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ConfigError(f"--host {host}: {error.strerror}") from error
    sockets: list[socket.socket] = []
    problem = OSError(errno.EADDRNOTAVAIL, "the host has no address")
    for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
        port = sockets[0].getsockname()[1] if sockets else port
        try:
            sockets.append(_bind(family, (address[0], port, *address[2:])))
        except OSError as error:
            problem = error
            if error.errno not in _NO_SUCH_FAMILY:
                break
    else:
        if sockets:
            return sockets
    for each in sockets:
        each.close()
    raise ConfigError(f"cannot listen on {host}:{port}: {problem.strerror}; choose another --host or --port")


def _bind(family: int, address: tuple[object, ...]) -> socket.socket:
    # asyncio turns Nagle's algorithm off only where the protocol is named; with it, events of a stream wait for each
    # other
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound

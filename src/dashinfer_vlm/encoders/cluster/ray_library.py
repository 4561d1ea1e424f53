"""Ray, imported when it is used: it is an optional dependency."""

from __future__ import annotations

import logging
import socket
from importlib import import_module
from typing import Any

from dashinfer_vlm.errors import ConfigError

__all__ = ["RESOURCE", "check_head", "connect", "ray_library"]

RESOURCE = "dashinfer_encoder"
"""What a machine that lends itself offers to Ray, one for each encoder that it has room for."""
HEAD_TIMEOUT_S = 5.0
_NAMESPACE = "dashinfer"


def ray_library() -> Any:
    """The module `ray`; raises ConfigError with a hint when it is not installed."""
    try:
        return import_module("ray")
    except ImportError as error:
        raise ConfigError(
            "--cluster and --join need Ray; install it with: pip install 'dashinfer-vlm[cluster]'"
        ) from error


def check_head(address: str) -> None:
    """Raise ConfigError unless something listens at `address`, which Ray itself would find out after minutes."""
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()):
        raise ConfigError(f"{address} is not the address of a cluster; write host:port, such as 192.168.0.10:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=HEAD_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"nothing answers at {address} ({error}); start a head with: ray start --head") from error


def connect(address: str) -> Any:
    """Make this process a part of the Ray cluster at `address`, whose node runs on this machine; returns the module.

    Raises ConfigError when no cluster answers. A process that is connected already stays where it is.
    """
    ray = ray_library()
    if ray.is_initialized():
        return ray
    if address != "auto":
        check_head(address)
    try:
        ray.init(address=address, namespace=_NAMESPACE, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"--cluster {address}: no Ray node of that cluster answers on this machine; "
            "start one with: ray start --head --port 6379"
        ) from error
    return ray

"""The environment variables that are not flags, each read here and nowhere else; a value that does not parse raises.

Every flag can also be given as `DASHINFER_<FIELD>` (see `flags.py`). The hubs' client libraries read their own
variables (`HF_ENDPOINT`, `HF_HOME`, `HF_HUB_OFFLINE`, `MODELSCOPE_ENDPOINT`, `MODELSCOPE_CACHE`, ...).
"""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from dashinfer_vlm.errors import ConfigError

__all__ = [
    "cache_folder",
    "encoder_lora",
    "encoder_model",
    "encoder_threads",
    "keep_compiled_kernels",
    "kernels",
    "otel_protocol",
    "otel_service",
    "tls_files",
    "unknown",
]

_PREFIX = "DASHINFER_"
_NAMES = frozenset(
    f"DASHINFER_{name}" for name in ("API_KEY", "ENCODER_LORA", "ENCODER_MODEL", "ENCODER_THREADS", "KERNELS")
)
"""Those of ours that belong to no flag of the server."""


def unknown(flag_names: Collection[str]) -> list[str]:
    """Variables that look like ours and mean nothing, where `flag_names` are those of the flags: misspelt ones, most
    likely, but also what Kubernetes sets for a service of our name, so they are not an error."""
    return sorted(name for name in os.environ if name.startswith(_PREFIX) and name not in {*_NAMES, *flag_names})


def cache_folder() -> Path:
    """Where this package may keep what it can make again: below `XDG_CACHE_HOME`, or else `~/.cache`. Raises
    RuntimeError when there is no home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "dashinfer-vlm"


def keep_compiled_kernels() -> None:
    """Have triton keep what it compiles in our folder of caches, for the next start, unless `TRITON_CACHE_DIR` names
    another one; without a home, where it wants."""
    with suppress(RuntimeError):
        os.environ.setdefault("TRITON_CACHE_DIR", str(cache_folder() / "triton"))


def kernels() -> str:
    """`DASHINFER_KERNELS`: which kernels compute: `auto`, an instruction level of the CPU, or `reference` (plain torch,
    also on a card)."""
    return os.environ.get("DASHINFER_KERNELS", "auto")


def tls_files() -> tuple[str, str]:
    """`SSL_KEYFILE` and `SSL_CERTFILE`; raises ConfigError when one is unset or not a file."""
    return _file("SSL_KEYFILE"), _file("SSL_CERTFILE")


def otel_service() -> str:
    """`OTEL_SERVICE_NAME`: what traces call this server."""
    return os.environ.get("OTEL_SERVICE_NAME") or "dashinfer-vlm"


def otel_protocol() -> str:
    """`OTEL_EXPORTER_OTLP_TRACES_PROTOCOL`: how traces are sent: `grpc`, or `http/protobuf`; raises ConfigError."""
    value = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or "grpc"
    if value not in ("grpc", "http/protobuf"):
        raise ConfigError(f"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL is {value}; it must be grpc or http/protobuf")
    return value


def _file(name: str) -> str:
    value = os.environ.get(name, "")
    if not value:
        raise ConfigError(f"{name} is not set; --ssl needs SSL_KEYFILE and SSL_CERTFILE; or name the files by flags")
    if not Path(value).is_file():
        raise ConfigError(f"{name} is {value}; there is no such file")
    return value


def encoder_model() -> str | None:
    """`DASHINFER_ENCODER_MODEL`: where a machine that lends itself has the model; set by `dashinfer-vlm encoder`."""
    return os.environ.get("DASHINFER_ENCODER_MODEL") or None


def encoder_lora() -> str | None:
    """`DASHINFER_ENCODER_LORA`: likewise the adapter."""
    return os.environ.get("DASHINFER_ENCODER_LORA") or None


def encoder_threads() -> int | None:
    """`DASHINFER_ENCODER_THREADS`: compute threads of each encoder there; raises ConfigError for no whole number."""
    value = os.environ.get("DASHINFER_ENCODER_THREADS", "")
    if value and not (value.isascii() and value.isdigit() and int(value)):
        raise ConfigError(f"DASHINFER_ENCODER_THREADS is {value}; it must be a whole number from 1 on")
    return int(value) if value else None

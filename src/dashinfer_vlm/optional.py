"""Packages that only some settings need: imported where they are used, with a word on how to get them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from dashinfer_vlm.errors import ConfigError

__all__ = ["require"]


def require(module: str, extra: str, what: str) -> Any:
    """The module, imported now. Raises ConfigError that says what needs it and which `extra` installs it."""
    try:
        return import_module(module)
    except ImportError as error:
        hint = f"pip install 'dashinfer-vlm[{extra}]'"
        raise ConfigError(f"{what} needs {module}, which is not installed: {hint}") from error

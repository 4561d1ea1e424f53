"""How the processes beside the first one are started."""

from __future__ import annotations

import sys

__all__ = ["running"]

_SAFE_PATH = ("-P",) if sys.version_info >= (3, 11) else ()
"""Else Python would import whatever has the name of a module in the working directory, which may be a model's folder;
Python 3.10 cannot be told not to."""


def running(module: str, *args: str, options: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The command that runs `module` in this interpreter; `options` are the interpreter's."""
    return (sys.executable, *_SAFE_PATH, *options, "-m", module, *args)

"""How every command of ours behaves: one-line errors, exit codes, no traceback for what a user can cause."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import rich_click as click

from dashinfer_vlm import __version__
from dashinfer_vlm.errors import ConfigError, DashInferError

__all__ = ["CONTEXT", "execute", "version_option"]

Command = TypeVar("Command", bound=Callable[..., Any])

CONTEXT: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda token: token.replace("_", "-"),
    "max_content_width": 120,
}
"""Context settings of every command: `-h`, and `-` and `_` alike."""

_FAILED, _USAGE, _INTERRUPTED = 1, 2, 130


def version_option(command: Command) -> Command:
    """Add `--version`, which imports nothing else and says so at once."""
    return click.version_option(__version__, message="dashinfer-vlm %(version)s")(command)


def execute(command: click.Command, args: Sequence[str] | None = None) -> int:
    """Run `command` and return its exit code: 0; 1 for a failure; 2 for a wrong flag or setting; 130 after Ctrl-C."""
    _open_closed_streams()
    try:
        code = command.main(args, standalone_mode=False)
    except click.ClickException as error:
        return _report(command, error.format_message(), error.exit_code)
    except ConfigError as error:
        return _report(command, str(error), _USAGE)
    except DashInferError as error:
        return _report(command, str(error), _FAILED)
    except (click.Abort, KeyboardInterrupt):
        return _report(command, "interrupted", _INTERRUPTED)
    return code if isinstance(code, int) else 0


def _open_closed_streams() -> None:
    """Whoever starts us may have closed a standard stream. Its number would go to the next file or socket, into which
    everything that prints would write."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)  # noqa: SIM115  for as long as the process lives
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


def _report(command: click.Command, message: str, code: int) -> int:
    sys.stderr.write(f"{command.name}: {message}\n")
    return code

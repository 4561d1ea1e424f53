"""`dashinfer-vlm` and its subcommands, whose modules are imported when they are asked for."""

from __future__ import annotations

import platform
import sys
from copy import copy
from difflib import get_close_matches
from importlib import import_module

import rich_click as click

from dashinfer_vlm import __version__
from dashinfer_vlm.cli.command import CONTEXT, execute, version_option
from dashinfer_vlm.cli.options import reference_page

__all__ = ["main", "tool"]

ELSEWHERE = {
    "bench": "dashinfer_vlm.cli.bench:bench",
    "chat": "dashinfer_vlm.cli.chat:chat",
    "encoder": "dashinfer_vlm.cli.encoder:encoder",
    "info": "dashinfer_vlm.cli.info:info",
    "quantize": "dashinfer_vlm.cli.quantize:quantize",
    "run": "dashinfer_vlm.cli.run:run",
    "serve": "dashinfer_vlm.cli.serve:command",
}
"""Subcommands that live in modules of their own."""

_MEANT = {
    "batch": "dashinfer-vlm run answers a file of requests",
    "run-batch": "dashinfer-vlm run answers a file of requests",
    "benchmark": "dashinfer-vlm bench measures",
}
"""What people who know other servers type, and what it is called here."""


class LazyGroup(click.RichGroup):
    """A group that imports the subcommands of `ELSEWHERE` when they are needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *ELSEWHERE])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """An unknown subcommand is answered with the nearest one."""
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            near = get_close_matches(name, self.list_commands(ctx), n=1)
            hint = _MEANT.get(name) or (f"did you mean {near[0]}?" if near else "-h lists the commands")
            raise click.UsageError(f"No such command {name!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in ELSEWHERE:
            return super().get_command(ctx, cmd_name)
        module, name = ELSEWHERE[cmd_name].split(":")
        command = getattr(import_module(module), name)
        assert isinstance(command, click.Command), ELSEWHERE[cmd_name]
        if command.name != cmd_name:  # a program of its own that is a subcommand as well
            command = copy(command)
            command.name = cmd_name
        return command


@click.command("dashinfer-vlm", cls=LazyGroup, context_settings=CONTEXT)
@version_option
def tool() -> None:
    """Serve vision-language models, talk to them, measure and inspect them."""


@tool.command("version", context_settings=CONTEXT)
def version() -> None:
    """Say which versions are installed here."""
    import torch

    click.echo(f"dashinfer-vlm {__version__}, torch {torch.__version__}, Python {platform.python_version()}")


@tool.command("flags", context_settings=CONTEXT)
def show_flags() -> None:
    """Print docs/flags.md: every flag of dashinfer_vlm_serve."""
    click.echo(reference_page(), nl=False)


def main() -> None:
    """Entry point of `dashinfer-vlm`."""
    sys.exit(execute(tool))

"""`dashinfer-vlm chat`: a conversation with pictures, in the terminal.

The line editor is the standard library's: `input()` over readline brings editing and a history that lasts, and a
synchronous program gets Ctrl-C as an exception where it waits, whether for a line or for the next token. prompt_toolkit
would add colours and a dependency.
"""

from __future__ import annotations

import math
import readline
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import rich_click as click

from dashinfer_vlm import envs
from dashinfer_vlm.cli.command import CONTEXT
from dashinfer_vlm.cli.conversation import Conversation
from dashinfer_vlm.cli.own_server import own_server
from dashinfer_vlm.errors import DashInferError

__all__ = ["chat"]

_MOST_LINES = 2000
"""Of the history, over all conversations."""


@click.command("chat", context_settings=CONTEXT)
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="[-- FLAGS OF THE SERVER]")
@click.option("--url", help="A running server, such as http://localhost:8000; one is started when absent.")
@click.option("--model", default="", help="The model to ask for, or to start with; the one that is there when absent.")
@click.option("--api-key", envvar="DASHINFER_API_KEY", help="A key of the server at --url.")
@click.option("-i", "--image", "images", multiple=True, metavar="PATH|URL", help="A picture of the first message.")
@click.option("--system", metavar="TEXT", help="What the model is told before the conversation.")
@click.option(
    "--temperature", type=float, metavar="NUMBER", help="0 is always the likeliest word; the model's own when absent."
)
@click.option("--max-tokens", type=int, metavar="COUNT", help="Of an answer; to the end of the context when absent.")
def chat(
    flags: tuple[str, ...],
    url: str | None,
    model: str,
    api_key: str | None,
    images: tuple[str, ...],
    system: str | None,
    temperature: float | None,
    max_tokens: int | None,
) -> None:
    """Talk to a model about pictures.

    dashinfer-vlm chat --url http://localhost:8000

    dashinfer-vlm chat --model qwen/Qwen2-VL-2B-Instruct -- --quant-type a8w8
    """
    if url and flags:
        raise click.UsageError("flags go to a server that is started here; leave out --url, or the flags")
    if temperature is not None and not math.isfinite(temperature):  # which JSON cannot say
        raise click.UsageError(f"--temperature is {temperature}; it must be a finite number")
    with ExitStack() as stack:
        if url is None:
            (url, api_key), model = stack.enter_context(own_server(model, flags)), ""
        sampling = {"temperature": temperature, "max_completion_tokens": max_tokens}
        conversation = stack.enter_context(Conversation(url, model or "model", api_key, system, sampling))
        for image in images:
            conversation.attach("image", image)
        Terminal(conversation).run()


class Terminal:
    """Reads lines and does what they say."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._interactive = sys.stdin.isatty()
        self._commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "/image": ("PATH|URL", "attach a picture to the next message", lambda at: conversation.attach("image", at)),
            "/video": ("PATH|URL", "attach a video to the next message", lambda at: conversation.attach("video", at)),
            "/system": ("TEXT", "what the model is told before the conversation", self._set_system),
            "/retry": ("", "ask the last question again", lambda _: self._show(conversation.retry())),
            "/clear": ("", "begin a new conversation", lambda _: conversation.clear()),
            "/help": ("", "this list", lambda _: self._help()),
            "/quit": ("", "leave, as Ctrl-D does", lambda _: None),
        }

    def run(self) -> None:
        """Ctrl-C ends an answer, or drops a line; `/quit` or the end of the input ends the conversation.

        Raises the first DashInferError when nobody is there to read it.
        """
        if not self._interactive:
            return self._loop()
        history = _read_history()
        click.echo("/image PATH attaches a picture, /help lists the rest, Ctrl-D leaves.")
        try:
            self._loop()
        finally:
            readline.write_history_file(history)

    def _loop(self) -> None:
        while (line := self._read()) != "/quit":
            try:
                self._do(line)
            except DashInferError as error:
                if not self._interactive:
                    raise
                click.secho(f"error: {error}", fg="red", err=True)

    def _read(self) -> str:
        attached = len(self._conversation.attached)
        prompt = f"({attached} attached) > " if attached else "> "
        while True:
            try:
                return input(prompt if self._interactive else "").strip()
            except EOFError:
                return "/quit"
            except KeyboardInterrupt:
                click.echo()

    def _do(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word in self._commands:
            self._commands[word][2](rest.strip())
        elif word.startswith("/"):
            raise DashInferError(f"there is no {word}; /help lists what there is")
        elif line:
            self._show(self._conversation.ask(line))

    def _show(self, pieces: Iterator[str]) -> None:
        try:
            for piece in pieces:
                click.echo(_printable(piece), nl=False)
        except KeyboardInterrupt:
            click.secho(" (stopped)", dim=True, nl=False, err=True)
        click.echo()
        if self._interactive:
            click.secho(str(self._conversation.figures), dim=True, err=True)

    def _set_system(self, text: str) -> None:
        self._conversation.system = text or None

    def _help(self) -> None:
        for name, (value, meaning, _) in self._commands.items():
            click.echo(f"{name} {value:<{16 - len(name)}} {meaning}")


def _printable(text: str) -> str:
    """Without the characters that control a terminal: what a model writes is not to be trusted."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def _read_history() -> Path:
    """Have what was typed in former conversations at hand; the file that keeps it."""
    path = envs.cache_folder() / "chat_history"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    readline.read_history_file(path)
    readline.set_history_length(_MOST_LINES)
    return path

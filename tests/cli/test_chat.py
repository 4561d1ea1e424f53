"""`dashinfer-vlm chat` against a real server over a scripted engine, through pipes and in a terminal."""

from __future__ import annotations

import asyncio
import io
import os
import pty
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from dashinfer_vlm.cli import chat as module
from dashinfer_vlm.cli.chat import chat
from dashinfer_vlm.cli.command import execute
from dashinfer_vlm.cli.conversation import Conversation
from dashinfer_vlm.cli.own_server import own_server
from dashinfer_vlm.errors import DashInferError
from tests.conftest import CheckpointMaker
from tests.server.conftest import Running, Serve, folder, parts, serve, template, tokenizer

__all__ = ["folder", "parts", "serve", "template", "tokenizer"]

PNG = Path(__file__).resolve().parents[2] / "docs" / "images" / "shapes.png"


@pytest.fixture
def type_lines(monkeypatch: pytest.MonkeyPatch) -> TypeLines:
    return TypeLines(monkeypatch)


class TypeLines:
    """`await type_lines(running, "hello", "/retry")` runs the command with these lines as its input."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    async def __call__(self, running: Running, *lines: str, flags: tuple[str, ...] = ()) -> int:
        self._monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        return await asyncio.to_thread(execute, chat, ["--url", running.url, *flags])


def prompts(running: Running) -> list[str]:
    return [running.service.tokenizer.decode(r.prompt_ids, skip_special=False) for r in running.engine.requests]


async def test_a_picture_by_path_is_asked_about(
    serve: Serve, type_lines: TypeLines, capsys: pytest.CaptureFixture[str]
) -> None:
    running = await serve("A green square.")
    assert await type_lines(running, f"/image {PNG}", "What is this?") == 0
    assert capsys.readouterr().out == "A green square.\n"
    assert [str(ref.source)[:22] for ref in running.loader.loaded] == ["data:image/png;base64,"]


async def test_media_by_url_and_by_flag_are_left_to_the_server(serve: Serve, type_lines: TypeLines) -> None:
    running = await serve()
    flags = ("--image", "https://a.example/b.png")
    assert await type_lines(running, "/video https://a.example/c.mp4", "What are these?", flags=flags) == 0
    loaded = [(ref.kind, ref.source) for ref in running.loader.loaded]
    assert loaded == [("image", "https://a.example/b.png"), ("video", "https://a.example/c.mp4")]


async def test_it_remembers_until_it_is_told_to_forget(serve: Serve, type_lines: TypeLines) -> None:
    running = await serve("blue")
    assert await type_lines(running, "/system Be brief.", "first", "second", "/retry", "/clear", "third") == 0
    _, second, again, third = prompts(running)
    assert "Be brief." in second
    assert "first" in second
    assert "blue" in second
    assert again == second
    assert "Be brief." in third
    assert "first" not in third


async def test_sampling_flags_are_sent(serve: Serve, type_lines: TypeLines) -> None:
    running = await serve()
    assert await type_lines(running, "hi", flags=("--temperature", "0.5", "--max-tokens", "3")) == 0
    params = running.engine.requests[0].params
    assert (params.temperature, params.max_tokens) == (0.5, 3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/image /nowhere.png", "/nowhere.png cannot be read: No such file or directory"),
        ("/imgae", "there is no /imgae"),
        ("/retry", "there is nothing to ask again"),
    ],
)
async def test_a_mistake_ends_a_script_with_a_reason(
    line: str, message: str, serve: Serve, type_lines: TypeLines, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await type_lines(await serve(), line, "never sent") == 1
    assert message in capsys.readouterr().err


async def test_the_servers_errors_are_told(
    serve: Serve, type_lines: TypeLines, capsys: pytest.CaptureFixture[str]
) -> None:
    running = await serve(config={"api_keys": ("secret",)})
    assert await type_lines(running, "hi") == 1
    assert "no valid API key" in capsys.readouterr().err
    assert await type_lines(running, "hi", flags=("--api-key", "secret")) == 0
    running.engine.failure = "the engine tripped"
    assert await type_lines(running, "hi", flags=("--api-key", "secret")) == 1
    assert "the engine tripped" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi"))
    assert execute(chat, ["--url", f"http://127.0.0.1:{port}"]) == 1
    assert f"http://127.0.0.1:{port}/v1/: " in capsys.readouterr().err


def test_flags_without_a_server_of_its_own_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(chat, ["--url", "http://127.0.0.1:1", "--", "--device", "cpu"]) == 2
    assert "leave out --url" in capsys.readouterr().err


def test_a_temperature_that_is_no_number_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(chat, ["--url", "http://localhost:1", "--temperature", "nan"]) == 2
    assert "--temperature is nan; it must be a finite number" in capsys.readouterr().err


def test_what_a_model_writes_cannot_control_the_terminal() -> None:
    assert module._printable("\x1b]0;owned\x07a\x1b[2J\tb\nü\u202e") == "]0;owneda[2J\tb\nü"


def test_ctrl_c_drops_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    typed: list[Callable[[], str]] = [interrupted, lambda: " /quit "]
    monkeypatch.setattr("builtins.input", lambda _: typed.pop(0)())
    with Conversation("http://127.0.0.1:1", "model", None, None, {}) as conversation:
        module.Terminal(conversation).run()
    assert typed == []


def interrupted() -> str:
    raise KeyboardInterrupt


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, url: str, cache: Path) -> None:
        self._descriptor, inside = pty.openpty()
        program = [sys.executable, "-c", "from dashinfer_vlm.cli.tool import main; main()", "chat", "--url", url]
        environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "TERM": "dumb"}
        self.process = subprocess.Popen(
            program, stdin=inside, stdout=inside, stderr=inside, env=environment, start_new_session=True,
            preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(inside)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    async def sees(self, text: str) -> None:
        """Wait for `text` behind what was waited for before."""
        while text not in self.seen:
            self.seen += (await asyncio.to_thread(os.read, self._descriptor, 4096)).decode()
        self.seen = self.seen.partition(text)[2]

    async def ends(self) -> int:
        return await asyncio.to_thread(self.process.wait, 30)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._descriptor)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
async def terminal(serve: Serve, tmp_path: Path) -> AsyncIterator[tuple[Running, Terminal]]:
    running = await serve("one two three four five six seven eight", engine={"pauses_after": 8})
    made = Terminal(running.url, tmp_path)
    yield running, made
    made.close()


async def test_ctrl_c_ends_an_answer_and_ctrl_d_the_conversation(terminal: tuple[Running, Terminal]) -> None:
    running, shown = terminal
    await shown.sees("> ")
    shown.type("count\n")
    await shown.sees("one")
    shown.type("\x03")
    await shown.sees("(stopped)")
    await running.engine.idle.wait()
    assert len(running.engine.aborted) == 1
    await shown.sees("> ")
    shown.type("/image /nowhere.png\n")
    await shown.sees("error: /nowhere.png cannot be read")
    await shown.sees("> ")
    shown.type("\x04")
    assert await shown.ends() == 0


async def test_the_history_lasts(terminal: tuple[Running, Terminal], tmp_path: Path) -> None:
    running, shown = terminal
    running.engine.resume.set()
    await shown.sees("> ")
    shown.type("count\n")
    await shown.sees("to the first token")
    await shown.sees("> ")
    shown.type("/quit\n")
    assert await shown.ends() == 0
    again = Terminal(running.url, tmp_path)
    try:
        await again.sees("> ")
        again.type("\x10\x10\n")  # the line before the last
        await again.sees("to the first token")
    finally:
        again.close()
    assert len(running.engine.requests) == 2
    assert prompts(running)[0] == prompts(running)[1]


def test_without_a_url_a_server_is_started_and_ended(checkpoint: CheckpointMaker) -> None:
    with own_server(str(checkpoint()), ("--device", "cpu", "--kv-cache-gib", "0.01", "--max-model-len", "256")) as own:
        url, key = own
        assert len(key) > 40
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        socket.create_connection(address).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)


def test_a_server_that_does_not_start_is_told() -> None:
    with pytest.raises(DashInferError, match="ended with status 2"), own_server("/nowhere", ()):
        raise AssertionError("there is no such model")

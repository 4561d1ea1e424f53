"""`dashinfer-vlm run` with a real model: answers as the server gives them, and nothing lost by a kill."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from PIL import Image

from dashinfer_vlm.cli.command import execute
from dashinfer_vlm.cli.run import run
from dashinfer_vlm.server.access import Access
from tests.conftest import CheckpointMaker
from tests.engine.host.test_client import SCRIPTED_PROCESS

COMMAND = [sys.executable, "-c", "from dashinfer_vlm.cli.tool import main; main()", "run"]
_SCRIPT = f"""
from dashinfer_vlm.cli.tool import main
from dashinfer_vlm.engine.host.process import ProcessEngine
ProcessEngine.command = {SCRIPTED_PROCESS}
main()
"""
SCRIPTED = [sys.executable, "-c", _SCRIPT, "run"]
"""The same command over an engine that loads no model: for what pipes and signals do."""
NUM_LINES = 16


def picture() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (56, 56), "red").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def chat(name: str, *content: Any, **body: Any) -> str:
    body = {"model": "model", "messages": [{"role": "user", "content": list(content)}], "max_tokens": 5, **body}
    return json.dumps({"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body})


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


@pytest.fixture
def arguments(checkpoint: CheckpointMaker, tmp_path: Path) -> list[str]:
    flags = ["--dtype", "float32", "--device", "cpu", "--kv-cache-gib", "0.1", "--max-length", "512", "--threads", "1"]
    return [str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "--model", str(checkpoint()), *flags]


def records(tmp_path: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()]
    assert max(Counter(line["id"] for line in lines).values()) == 1
    return {line["custom_id"]: line for line in lines}


def test_a_file_of_requests_is_answered_with_errors_in_their_lines(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = {"type": "image_url", "image_url": {"url": picture()}}
    lines = [
        chat("text", text("Hello")),
        chat("image", image, text("What?")),
        chat("broken image", {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}),
        chat("wrong", text("Hello"), temperature=-1),
        "no json",
        chat("long", text("word " * 3000)),
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "2 lines answered, 4 failed" in done.stderr
    found = records(tmp_path)
    statuses = {name: (r["response"] or {}).get("status_code") for name, r in found.items()}
    assert statuses == {"text": 200, "image": 200, "broken image": 422, "wrong": 400, "long": 400, None: None}
    assert found["image"]["response"]["body"]["usage"]["completion_tokens"] == 5
    assert found["long"]["response"]["body"]["error"]["code"] == "context_length_exceeded"
    assert execute(run, arguments) == 0
    assert "all 6 lines are answered" in capsys.readouterr().err


def test_a_killed_run_goes_on_without_losing_or_repeating_a_line(arguments: list[str], tmp_path: Path) -> None:
    names = [f"r{i}" for i in range(NUM_LINES)]
    (tmp_path / "in.jsonl").write_text("\n".join(chat(name, text(name), max_tokens=12, seed=1) for name in names))
    output = tmp_path / "out.jsonl"
    slow = [*arguments, "--max-batch", "1"]
    with subprocess.Popen([*COMMAND, *slow], stderr=subprocess.DEVNULL) as first:
        while not (output.exists() and output.stat().st_size):
            assert first.poll() is None
            time.sleep(0.002)
        first.send_signal(signal.SIGKILL)
    before = output.read_bytes().count(b"\n")
    assert 0 < before < NUM_LINES
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{NUM_LINES - before} lines answered, 0 failed, {before} were there before" in done.stderr
    found = records(tmp_path)
    assert sorted(found) == sorted(names)
    assert all(record["response"]["status_code"] == 200 for record in found.values())


def test_requests_come_from_a_pipe_and_answers_go_to_one(arguments: list[str]) -> None:
    flags = ["-", "-o", "-", *arguments[3:]]
    lines = [chat("a", text("Hello")), chat("b", text("Hello"))]
    done = subprocess.run([*SCRIPTED, *flags], input="\n".join(lines), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert sorted(record["custom_id"] for record in found) == ["a", "b"]
    assert all(record["response"]["status_code"] == 200 for record in found)
    assert "2 lines answered, 0 failed: standard output" in done.stderr


def test_ctrl_c_ends_a_run_whose_pipe_is_silent(arguments: list[str]) -> None:
    flags = ["-", "-o", "-", *arguments[3:]]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # a shell lets what it starts in the background ignore Ctrl-C, these tests too
    heard = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen([*SCRIPTED, *flags], preexec_fn=heard, **pipes) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdin.write(chat("a", text("Hello")) + "\n")
        running.stdin.flush()
        assert json.loads(running.stdout.readline())["custom_id"] == "a"
        running.send_signal(signal.SIGINT)
        assert running.wait(60) == 130
        assert running.stderr.read().splitlines()[-1] == "dashinfer-vlm: interrupted"


def test_answers_that_nobody_reads_end_the_run(arguments: list[str]) -> None:
    flags = ["-", "-o", "-", *arguments[3:]]
    read, write = os.pipe()
    os.close(read)
    lines = chat("a", text("Hello"))
    command = [*SCRIPTED, *flags]
    done = subprocess.run(command, input=lines, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "dashinfer-vlm: standard output cannot be written: Broken pipe"


def test_what_is_wrong_is_said_before_the_model_is_loaded(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(run, arguments) == 2
    assert "in.jsonl cannot be read" in capsys.readouterr().err


def test_what_the_application_has_opened_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[str] = []

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        states.append("open")
        yield
        states.append("closed")

    @asynccontextmanager
    async def opened(*_: Any, **__: Any) -> AsyncIterator[Any]:
        yield SimpleNamespace(engine=SimpleNamespace(alive=lambda: True))

    app = FastAPI(lifespan=lifespan)
    app.add_middleware(Access)
    monkeypatch.setattr("dashinfer_vlm.cli.run.resolve", lambda config: config)
    monkeypatch.setattr("dashinfer_vlm.frontend.opening.open_service", opened)
    monkeypatch.setattr("dashinfer_vlm.server.app.create_app", lambda *_: app)
    (tmp_path / "in.jsonl").write_text(chat("a", text("hello")))
    assert execute(run, [str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]) == 1
    assert records(tmp_path)["a"]["response"]["status_code"] == 404
    assert states == ["open", "closed"]

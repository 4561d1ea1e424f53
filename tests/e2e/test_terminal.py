"""What a person sees who types the command: help, errors of one line, the banner, Ctrl-C."""

from __future__ import annotations

import os
import re
import select
import socket
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from dashinfer_vlm.cli.command import execute
from dashinfer_vlm.cli.serve import command
from tests.certificates import self_signed
from tests.e2e.serving import Server, run_to_end

SHUTTING_DOWN = re.compile(r"answers get up to 600 s to end; press Ctrl\+C again")
Start = Callable[..., Server]


@pytest.fixture
def start(model_folder: Path) -> Iterator[Start]:
    """`start(*flags)` gives a server that is ready."""
    servers: list[Server] = []

    def start_one(*flags: str, env: Mapping[str, str] | None = None) -> Server:
        servers.append(Server("--model", str(model_folder), "--port", "0", "--kv-cache-gib", "0.05", *flags, env=env))
        servers[-1].wait_ready()
        return servers[-1]

    yield start_one
    for server in servers:
        server.kill()


def stream(server: Server, num_tokens: int) -> Iterator[ChatCompletionChunk]:
    """Chunks of an answer of exactly `num_tokens` tokens."""
    client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="EMPTY", max_retries=0)
    return client.chat.completions.create(
        model="model",
        messages=[{"role": "user", "content": "Say something."}],
        max_completion_tokens=num_tokens,
        stream=True,
        extra_body={"ignore_eos": True},
    )


def wait_gone(pids: Iterable[int], timeout_s: float = 30.0) -> None:
    """Return when none of the processes is alive any more; they need not be children of ours."""
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        with os.fdopen(handle):
            assert select.select([handle], [], [], timeout_s)[0], f"process {pid} is still alive"


def test_help_names_every_room() -> None:
    done = run_to_end("-h")
    assert done.returncode == 0
    for word in ("Engine", "Vision", "Media", "Server", "--max-batch", "--allowed-media-domains"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--modle", "x"), 2, "No such option '--modle'"),
        (("--max-batch", "many"), 2, "'many' is not a valid integer"),
        (("--max-batch", "0"), 2, "--max-num-seqs is 0; it must be at least 1"),
        (("--parallel_size", "0"), 2, "--parallel-size is 0; it must be at least 1"),
        (("--vision_engine", "tensorrt"), 2, "this version supports native"),
        (("--quant-type", "gptq"), 2, "this version supports none or a8w8 or a16w8 or a16w4 or fp8"),
        (("--model", "/no/such/folder", "--port", "0"), 2, "no such folder"),
        (("--ssl",), 2, "SSL_KEYFILE is not set"),
        (("--host", "no.such.host.invalid"), 2, "--host no.such.host.invalid"),
    ],
)
def test_a_wrong_flag_is_one_line(
    flags: tuple[str, ...], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(command, flags) == code
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_a_misspelt_variable_is_named_and_a_folder_without_a_model_too(tmp_path: Path) -> None:
    done = run_to_end(
        "--model", str(tmp_path), "--port", "0", env={"DASHINFER_PROT": "1", "DASHINFER_MAX_NUM_SEQS": "2"}
    )
    assert "DASHINFER_PROT is not a variable of this server" in done.stderr
    assert "DASHINFER_MAX_NUM_SEQS" not in done.stderr
    assert done.returncode == 1
    assert "config.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_one_line_before_anything_is_loaded(model_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run_to_end("--model", str(model_folder), "--host", "127.0.0.1", "--port", port)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in done.stderr


def test_the_log_tells_what_was_loaded_and_then_that_it_serves(server: Server) -> None:
    assert re.search(
        r"Loaded \S+ on \S+ as bfloat16, KV cache as bfloat16: [\d,]+ blocks of 16 tokens hold [\d,]+ tokens",
        server.text,
    )
    assert "Application startup complete." in server.text
    assert server.text.index("Loaded") < server.text.index("Application startup complete.")


def test_ssl_serves_https_with_the_files_of_the_environment(start: Start, tmp_path: Path) -> None:
    key, certificate = self_signed(tmp_path)
    server = start("--ssl", env={"SSL_KEYFILE": str(key), "SSL_CERTFILE": str(certificate)})
    assert server.address.startswith("https://localhost:")
    trusted = ssl.create_default_context(cafile=str(certificate))
    assert httpx.get(f"{server.address}/health", verify=trusted).status_code == 200


def test_ctrl_c_lets_running_requests_end_and_exits_0(start: Start) -> None:
    server = start("--shutdown-timeout", "120")
    chunks = stream(server, num_tokens=400)
    next(chunks)
    server.interrupt()
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert reasons == ["length"]
    assert server.wait_end() == 0
    assert "Traceback" not in server.text
    wait_gone(server.children)


def test_ctrl_c_waits_no_longer_than_the_shutdown_timeout(start: Start) -> None:
    server = start("--shutdown-timeout", "0.5")
    chunks = stream(server, num_tokens=30_000)
    next(chunks)
    server.interrupt()
    assert server.wait_end() == 0
    assert "Traceback" not in server.text
    wait_gone(server.children)


def test_a_second_ctrl_c_does_not_wait(start: Start) -> None:
    server = start("--shutdown-timeout", "600")
    chunks = stream(server, num_tokens=30_000)
    next(chunks)
    server.interrupt()
    server.wait_line(SHUTTING_DOWN)
    server.interrupt()
    assert server.wait_end() == 0
    assert "Traceback" not in server.text
    wait_gone(server.children)


def test_a_killed_server_leaves_no_process_behind(start: Start) -> None:
    server = start()
    assert server.children
    server.kill()
    wait_gone(server.children)

"""A vision worker of a real server dies under load: what the clients see, and what `/metrics` tells of it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import CheckpointMaker
from tests.e2e.serving import Server
from tests.e2e.test_nothing_twice import ask, data_url, metrics, user

NUM_REQUESTS, NUM_CLIENTS = 50, 16
BOUND_S = 120.0
"""Far less than any request's own time limit; alone on the machine it takes a few seconds."""
WORKER = "dashinfer_vlm.encoders.elsewhere.worker"
PREFIX = "dashinfer_engine_num_"
Chat = list[dict[str, object]]


@pytest.fixture
def server(checkpoint: CheckpointMaker) -> Iterator[Server]:
    flags = ("--model", str(checkpoint("qwen2_vl")), "--dtype", "float32", "--port", "0", "--kv-cache-gib", "0.05")
    server = Server(*flags, "--no-prefix-cache", "--vision-cache-gib", "0", "--vision-workers", "2")
    try:
        server.wait_ready()
        yield server
    finally:
        server.kill()


def workers(server: Server) -> list[int]:
    return [pid for pid in server.children if WORKER in Path(f"/proc/{pid}/cmdline").read_text()]


def wait_for(server: Server, name: str, at_least: float) -> None:
    deadline = time.monotonic() + BOUND_S
    while metrics(server)[PREFIX + name] < at_least:
        assert time.monotonic() < deadline, (name, metrics(server))


def test_a_worker_killed_under_fifty_requests_costs_no_answer_and_metrics_show_the_retry(server: Server) -> None:
    chats: list[Chat] = [[user("What is this?", data_url(f"#{5 * i:02x}4080"))] for i in range(NUM_REQUESTS)]
    expected = [ask(server, chat) for chat in chats]  # one by one, and nothing is kept of it
    before = metrics(server)
    assert before[PREFIX + "items_encoded_elsewhere_total"] == NUM_REQUESTS

    victim, _ = workers(server)
    start = time.monotonic()
    with ThreadPoolExecutor(NUM_CLIENTS) as clients:
        os.kill(victim, signal.SIGSTOP)  # so that it surely holds a batch when it dies
        asking = [clients.submit(ask, server, chat) for chat in chats]
        wait_for(server, "items_encoded_elsewhere_total", NUM_REQUESTS + 1)
        os.kill(victim, signal.SIGKILL)
        answers = [each.result() for each in asking]
    assert answers == expected
    assert time.monotonic() - start < BOUND_S

    after = metrics(server)
    assert after[PREFIX + "items_encoded_total"] == 2 * NUM_REQUESTS
    assert after[PREFIX + "encoder_retries_total"] > before[PREFIX + "encoder_retries_total"] == 0
    assert after[PREFIX + "encoder_failures_total"] == 0
    wait_for(server, "encoder_restarts_total", 1)
    wait_for(server, "encoders", 2)

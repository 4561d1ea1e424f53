"""Two servers that share a Redis, as two machines would: by flags, tokens and `/metrics` alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import CheckpointMaker
from tests.e2e.serving import Server
from tests.e2e.test_nothing_twice import ask, data_url, metrics, user
from tests.encoders.redis_server import RedisServer, start_redis

ENCODES = "dashinfer_engine_num_items_encoded_total"
HITS = "dashinfer_engine_shared_cache_hits_total"


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    yield from start_redis(tmp_path_factory.mktemp("redis"))


@pytest.fixture
def servers(redis: RedisServer, checkpoint: CheckpointMaker) -> Iterator[list[Server]]:
    flags = ("--model", str(checkpoint("qwen2_vl")), "--dtype", "float32", "--port", "0", "--kv-cache-gib", "0.05")
    servers = [Server(*flags, "--vision-cache", redis.url) for _ in range(2)]
    try:
        for server in servers:
            server.wait_ready()
        yield servers
    finally:
        for server in servers:
            server.kill()


def test_a_second_server_encodes_nothing_and_both_live_on_without_redis(
    redis: RedisServer, servers: list[Server]
) -> None:
    first, second = servers
    colours = ("red", "green", "blue")
    chats = [[user("What is this?", data_url(colour))] for colour in colours]
    answers = [ask(first, chat) for chat in chats]
    deadline = time.monotonic() + 60.0
    while redis.client.dbsize() < len(colours):
        assert time.monotonic() < deadline, metrics(first)
    assert [ask(second, chat) for chat in chats] == answers
    assert (metrics(first)[ENCODES], metrics(first)[HITS]) == (3, 0)
    assert (metrics(second)[ENCODES], metrics(second)[HITS]) == (0, 3)

    new = [user("And this?", data_url(f"#{shade:02x}0000")) for shade in range(0, 250, 5)]
    with ThreadPoolExecutor(16) as clients:
        asking = [clients.submit(ask, second, [message]) for message in new]
        asking[0].result()
        redis.kill()
        found = [each.result() for each in asking]
    assert found == [ask(first, [message]) for message in new]
    assert len(found) == 50
    after = metrics(second)
    assert after[ENCODES] == 50
    assert after["dashinfer_engine_shared_cache_errors_total"] >= 1
    assert "trying again now and then" in second.text

"""Redis as the second level of the embedding cache, against a real redis-server."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.encoders.shared.embedding_bytes import EmbeddingBytes, EmbeddingFormatError
from dashinfer_vlm.encoders.shared.redis_cache import FIRST_BACK_OFF_S, MAX_BACK_OFF_S, Breaker, RedisCache
from dashinfer_vlm.errors import ConfigError
from tests.encoders.redis_server import RedisServer, start_redis

PACKING = EmbeddingBytes(b"m" * 32, num_columns=6, dtype=torch.bfloat16)
OTHER_MODEL = EmbeddingBytes(b"o" * 32, num_columns=6, dtype=torch.bfloat16)
KEY = b"k" * 32
WAIT_S = 10.0
"""For what comes within milliseconds on an idle machine."""


def rows(num_tokens: int = 5) -> torch.Tensor:
    return torch.arange(num_tokens * 6.0).view(num_tokens, 6).to(torch.bfloat16)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    yield from start_redis(tmp_path)


@pytest.fixture
def open_cache() -> Iterator[Callable[..., RedisCache]]:
    """`open_cache(url, packing=PACKING, ttl_s=60)`; closed at the end."""
    opened: list[RedisCache] = []

    def make(url: str, packing: EmbeddingBytes = PACKING, *, ttl_s: int = 60) -> RedisCache:
        opened.append(RedisCache(url, packing, ttl_s=ttl_s))
        return opened[-1]

    yield make
    for cache in opened:
        cache.close()


OpenCache = Callable[..., RedisCache]


def answer(cache: RedisCache, key: bytes = KEY, num_tokens: int = 5) -> torch.Tensor | None:
    assert cache.ask(key, num_tokens)
    (found,) = cache.answers(WAIT_S)
    assert found.content_hash == key
    return found.embedding


def written(cache: RedisCache, *keys: bytes) -> None:
    """Put `rows()` under each key and see them through."""
    for key in keys:
        cache.put(key, rows())
    cache.close()
    assert cache.num_dropped == 0


# The bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_an_embedding_survives_as_bytes(dtype: torch.dtype, num_tokens: int) -> None:
    packing = EmbeddingBytes(b"m" * 32, num_columns=3, dtype=dtype)
    embedding = torch.randn(3, num_tokens, dtype=torch.float64).to(dtype).t()  # not contiguous
    back = packing.unpack(KEY, num_tokens, packing.pack(KEY, embedding))
    assert back.dtype == dtype
    assert torch.equal(back, embedding)


def test_an_unpacked_embedding_does_not_share_the_bytes() -> None:
    data = PACKING.pack(KEY, rows())
    PACKING.unpack(KEY, 5, data).zero_()
    assert torch.equal(PACKING.unpack(KEY, 5, data), rows())


@pytest.mark.parametrize("index", [0, 8, 10, 12, 16, 20, 24, 55, 56, 87, 88, -1])
def test_a_byte_that_changed_anywhere_is_noticed(index: int) -> None:
    data = bytearray(PACKING.pack(KEY, rows()))
    data[index] ^= 1
    with pytest.raises(EmbeddingFormatError):
        PACKING.unpack(KEY, 5, bytes(data))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nonsense",
        b"\0" * 148,
        PACKING.pack(KEY, rows())[:-1],
        PACKING.pack(KEY, rows()) + b"\0",
        PACKING.pack(KEY, rows(4)),
        PACKING.pack(b"x" * 32, rows()),
        OTHER_MODEL.pack(KEY, rows()),
        EmbeddingBytes(b"m" * 32, num_columns=6, dtype=torch.float16).pack(KEY, rows()),
    ],
)
def test_bytes_of_anything_else_are_refused(data: bytes) -> None:
    with pytest.raises(EmbeddingFormatError):
        PACKING.unpack(KEY, 5, data)


# The breaker


def test_the_breaker_keeps_off_for_longer_after_each_failure_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = [0.0]
    breaker = Breaker("reading", now=lambda: clock[0])
    assert breaker.allows
    for n in range(12):
        breaker.failed(OSError("gone"))
        longest = min(MAX_BACK_OFF_S, FIRST_BACK_OFF_S * 2**n)
        clock[0] += 0.49 * longest
        assert not breaker.allows
        clock[0] += 0.52 * longest
        assert breaker.allows
    breaker.succeeded()
    assert breaker.allows
    breaker.succeeded()
    lines = [record.message for record in caplog.records]
    assert lines == [
        "reading fails (gone); going on without it, trying again now and then",
        "reading works again after 12 failures",
    ]


# The cache


def test_what_one_cache_writes_another_reads(redis: RedisServer, open_cache: OpenCache) -> None:
    written(open_cache(redis.url), KEY)
    reader = open_cache(redis.url)
    found = answer(reader)
    assert found is not None
    assert torch.equal(found, rows())
    assert reader.reads.num_bytes == PACKING.num_bytes(5)
    assert answer(reader, b"?" * 32) is None


def test_many_questions_are_answered_each_with_its_own(redis: RedisServer, open_cache: OpenCache) -> None:
    keys = [bytes([n]) * 32 for n in range(60)]
    written(open_cache(redis.url), *keys[::2])
    reader = open_cache(redis.url)
    for key in keys:
        assert reader.ask(key, 5)
    found: dict[bytes, bool] = {}
    while len(found) < len(keys):
        news = reader.answers(WAIT_S)
        assert news
        found |= {each.content_hash: each.embedding is not None for each in news}
    assert found == {key: index % 2 == 0 for index, key in enumerate(keys)}


def test_entries_go_after_their_time_to_live(redis: RedisServer, open_cache: OpenCache) -> None:
    written(open_cache(redis.url, ttl_s=1234), KEY)
    (name,) = redis.client.keys()
    assert 1200 < redis.client.ttl(name) <= 1234


def test_a_damaged_value_is_no_answer_and_counted(redis: RedisServer, open_cache: OpenCache) -> None:
    written(open_cache(redis.url), KEY)
    (name,) = redis.client.keys()
    good = redis.client.get(name)
    reader = open_cache(redis.url)
    for bad in (b"", good[:-1], good[:-1] + bytes([good[-1] ^ 1]), b"x" * len(good)):
        redis.client.set(name, bad)
        assert answer(reader) is None
    assert reader.reads.num_errors == 4
    redis.client.delete(name)
    redis.client.rpush(name, "a value of another type")
    assert answer(reader) is None


def test_another_models_entry_is_not_used_even_under_our_name(redis: RedisServer, open_cache: OpenCache) -> None:
    written(open_cache(redis.url, OTHER_MODEL), KEY)
    reader = open_cache(redis.url)
    assert answer(reader) is None
    assert reader.reads.num_errors == 0
    redis.client.set(reader._key(KEY), OTHER_MODEL.pack(KEY, rows()))
    assert answer(reader) is None
    assert reader.reads.num_errors == 1


def test_without_a_server_questions_are_answered_with_nothing_and_writes_dropped(
    redis: RedisServer, open_cache: OpenCache, caplog: pytest.LogCaptureFixture
) -> None:
    redis.kill()
    cache = open_cache(redis.url)
    for _ in range(20):
        assert answer(cache) is None
    cache.put(KEY, rows())
    cache.close()
    assert cache.num_dropped == 1
    assert cache.reads.num_errors >= 1
    assert sorted(record.message.partition(" fails")[0] for record in caplog.records) == [
        f"reading from the shared cache 127.0.0.1:{redis.port}/0",
        f"writing to the shared cache 127.0.0.1:{redis.port}/0",
    ]


def test_a_frozen_server_is_waited_for_once_and_found_again(redis: RedisServer, open_cache: OpenCache) -> None:
    written(open_cache(redis.url), KEY)
    cache = open_cache(redis.url)
    assert answer(cache) is not None
    redis.freeze()
    assert answer(cache) is None
    start = time.monotonic()
    for _ in range(50):
        cache.ask(b"?" * 32, 5)
        cache.answers(WAIT_S)
    assert time.monotonic() - start < 5.0  # 50 time-outs would take ten seconds
    redis.thaw()
    deadline = time.monotonic() + 60.0
    while answer(cache) is None:  # until the breaker tries again; the late answer of before is nobody's
        assert time.monotonic() < deadline
    assert answer(cache, b"?" * 32) is None


def test_writes_beyond_the_bound_are_dropped(
    redis: RedisServer, open_cache: OpenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dashinfer_vlm.encoders.shared.redis_cache.MAX_UNWRITTEN_BYTES", 2 * rows().nbytes)
    cache = open_cache(redis.url)
    cache.put(KEY, rows(11))
    assert cache.num_dropped == 1


def test_questions_beyond_the_bound_are_not_asked(
    redis: RedisServer, open_cache: OpenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dashinfer_vlm.encoders.shared.redis_cache.MAX_QUESTIONS", 0)
    assert not open_cache(redis.url).ask(KEY, 5)


@pytest.mark.parametrize(
    "url",
    ["localhost:6379", "http://h", "redis://", "redis://h/a", "redis://h?x=1", "redis://h:port", "unix:///x", ""],
)
def test_an_address_that_is_none_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(
        ConfigError, match=r"--vision-cache is not the address of a Redis server; write redis://"
    ) as caught:
        EngineConfig(vision_cache=url).validate()
    assert not url or url == "redis://" or url not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["redis://h", "redis://u:p@10.0.0.1:6379/3", "rediss://:p%40@h.example", "redis://[::1]:1"]
)
def test_addresses_of_redis_are_taken(url: str) -> None:
    EngineConfig(vision_cache=url).validate()


def test_without_the_client_library_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ConfigError, match=r"pip install 'dashinfer-vlm\[redis\]'"):
        RedisCache("redis://127.0.0.1:1", PACKING, ttl_s=60)

"""The same questions through every way to answer them: precisions, caches, homes of the encoder, and the HTTP server.

Each way yields its answers and a line that proves, by the engine's own counters, that it was that way.
"""

from __future__ import annotations

import base64
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import httpx
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from tests.e2e.serving import Server
from tests.encoders.cluster.nodes import Cluster
from tests.encoders.redis_server import BINARY, RedisServer

from dashinfer_vlm.engine.stats import EngineStats
from dashinfer_vlm.offline.vlm import VLM
from dashinfer_vlm.request import SamplingParams
from demo_model.cases import MAX_TOKENS, Case, with_media

NUM_CLIENTS = 8
NUM_NODES = 2
PATIENCE_S = 300.0
KV_CACHE_GIB = 0.25  # a model of 3 M parameters; there may be several engines at once
GREEDY = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)


@dataclass(frozen=True, slots=True)
class Asked:
    """What one way answered."""

    name: str
    answers: list[str]
    seconds: float
    proof: str


@dataclass(frozen=True, slots=True)
class Skipped:
    name: str
    why: str


Way: TypeAlias = "Callable[[Path, list[Case]], Iterator[Asked | Skipped]]"


class MisplacedError(Exception):
    """The answers came, but not in the way that was asked for."""


def precisions(folder: Path, cases: list[Case]) -> Iterator[Asked | Skipped]:
    """In the engine's step, with the prefix cache."""
    for dtype in ("float32", "bfloat16"):
        with loaded(folder, dtype=dtype) as vlm:
            yield ask(f"in the step, {dtype}", vlm, cases, expect_cached_prefixes)


def caches(folder: Path, cases: list[Case]) -> Iterator[Asked | Skipped]:
    """Without the prefix cache, so that the second time every embedding is asked for, and found in memory."""
    with loaded(folder, prefix_cache=False) as vlm:
        yield ask("without the prefix cache", vlm, cases, expect_no_cached_prefixes)
        yield ask("hit in memory", vlm, cases, expect_hits_in_memory)


def workers(folder: Path, cases: list[Case]) -> Iterator[Asked | Skipped]:
    for number, name in ((1, "one worker process"), (2, "two worker processes")):
        with loaded(folder, vision_workers=number) as vlm:
            yield ask(name, vlm, cases, expect_elsewhere)


def redis(folder: Path, cases: list[Case]) -> Iterator[Asked | Skipped]:
    """A second engine finds what a first one has encoded."""
    name = "hit in Redis"
    if BINARY is None or find_spec("redis") is None:
        yield Skipped(name, "needs the program redis-server and pip install 'dashinfer-vlm[redis]'")
        return
    with tempfile.TemporaryDirectory() as scratch, closing(RedisServer(Path(scratch))) as server:
        with loaded(folder, vision_cache=server.url, prefix_cache=False) as first:
            first.chat([with_media(case) for case in cases], GREEDY)
            num_encoded = first.stats().num_items_encoded_total
            wait_until(lambda: server.client.dbsize() == num_encoded, "Redis holds every embedding")
        with loaded(folder, vision_cache=server.url, prefix_cache=False) as vlm:
            yield ask(name, vlm, cases, expect_hits_in_redis)


def cluster(folder: Path, cases: list[Case]) -> Iterator[Asked | Skipped]:
    """Two machines that are lent to a Ray cluster, both of them this one."""
    name = "Ray, two nodes"
    if find_spec("ray") is None:
        yield Skipped(name, "needs pip install 'dashinfer-vlm[cluster]'")
        return
    with closing(Cluster()) as lent:
        for _ in range(NUM_NODES):
            lent.join()
        with loaded(folder, vision_workers=NUM_NODES, cluster=lent.address) as vlm:
            wait_until(lambda: served(vlm, cases[0]).num_encoders == NUM_NODES, "both encoders are ready")
            yield ask(name, vlm, cases, expect_elsewhere)


def server(folder: Path, cases: list[Case]) -> Iterator[Asked | Skipped]:
    """The real command with its defaults, and clients that upload PNG files."""
    process = Server("--model", str(folder), "--port", "0", "--kv-cache-gib", str(KV_CACHE_GIB))
    try:
        address = process.wait_ready()
        with ThreadPoolExecutor(NUM_CLIENTS) as pool, httpx.Client(timeout=PATIENCE_S, trust_env=False) as http:
            start = time.perf_counter()
            answers = list(pool.map(lambda case: post(http, address, case), cases))
            seconds = time.perf_counter() - start
            text = http.get(f"{address}/metrics").text
    finally:
        process.kill()
    found = {sample.name: sample.value for each in text_string_to_metric_families(text) for sample in each.samples}
    num_requests = found["dashinfer_request_seconds_count"]
    if num_requests != len(cases):
        raise MisplacedError(f"the server answered {num_requests} of {len(cases)} requests")
    proof = f"{len(cases)} requests, {found['dashinfer_engine_num_items_encoded_total']:.0f} items encoded"
    yield Asked(f"HTTP server, {NUM_CLIENTS} clients", answers, seconds, proof)


def loaded(folder: Path, **options: Any) -> VLM:
    return VLM(folder, **{"kv_cache_gib": KV_CACHE_GIB, "dtype": "bfloat16", "progress": False} | options)


def ask(name: str, vlm: VLM, cases: list[Case], prove: Callable[[EngineStats, EngineStats], str]) -> Asked:
    """All questions side by side; `prove` sees the counters before and after."""
    before, start = vlm.stats(), time.perf_counter()
    answers = [result.text for result in vlm.chat([with_media(case) for case in cases], GREEDY)]
    return Asked(name, answers, time.perf_counter() - start, prove(before, vlm.stats()))


def served(vlm: VLM, case: Case) -> EngineStats:
    vlm.chat(with_media(case), GREEDY)
    return vlm.stats()


def wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > deadline:
            raise MisplacedError(f"it did not come to pass within {PATIENCE_S:.0f} s that {what}")


def expect_cached_prefixes(before: EngineStats, after: EngineStats) -> str:
    num_tokens = after.num_cached_tokens_total - before.num_cached_tokens_total
    if not num_tokens:
        raise MisplacedError("no prefix was found in the cache")
    num_prompt = after.num_prompt_tokens_total - before.num_prompt_tokens_total
    return f"{num_tokens / num_prompt:.0%} of the prompts from the prefix cache"


def expect_no_cached_prefixes(before: EngineStats, after: EngineStats) -> str:
    if after.num_cached_tokens_total != before.num_cached_tokens_total:
        raise MisplacedError("a prefix came from the cache")
    return f"{after.num_items_encoded_total - before.num_items_encoded_total} items encoded, no prefix cached"


def expect_hits_in_memory(before: EngineStats, after: EngineStats) -> str:
    if after.num_items_encoded_total != before.num_items_encoded_total:
        raise MisplacedError("something was encoded again")
    return f"{after.embedding_hits_total - before.embedding_hits_total} hits, nothing encoded"


def expect_elsewhere(before: EngineStats, after: EngineStats) -> str:
    num_items = after.num_items_encoded_total - before.num_items_encoded_total
    num_elsewhere = after.num_items_encoded_elsewhere_total - before.num_items_encoded_elsewhere_total
    if num_elsewhere < num_items:
        raise MisplacedError(f"{num_items - num_elsewhere} of {num_items} items were encoded in the engine's step")
    return f"{num_elsewhere} items encoded by {after.num_encoders} encoders elsewhere, none in the step"


def expect_hits_in_redis(before: EngineStats, after: EngineStats) -> str:
    """An answer that came too late on a busy machine is a miss, which is no fault."""
    hits = after.shared_cache_hits_total - before.shared_cache_hits_total
    num_encoded = after.num_items_encoded_total - before.num_items_encoded_total
    if num_encoded > hits / 20:
        raise MisplacedError(f"{num_encoded} items were encoded and {hits} found in Redis")
    return f"{hits} hits, {num_encoded} encoded"


def post(http: httpx.Client, address: str, case: Case) -> str:
    """The answer's text."""
    body = {"model": "model", "messages": uploads(case), "temperature": 0, "max_tokens": MAX_TOKENS}
    reply = http.post(f"{address}/v1/chat/completions", json=body)
    reply.raise_for_status()
    text: str = reply.json()["choices"][0]["message"]["content"]
    return text


def uploads(case: Case) -> list[dict[str, Any]]:
    """The messages with data URLs of PNG files, as an HTTP client sends them."""
    urls = [[data_url(picture) for picture in pictures] for pictures in case.media]

    def part(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "image":
            return {"type": "image_url", "image_url": {"url": urls[part["index"]][0]}}
        return {"type": "video", "video": urls[part["index"]]} if part["type"] == "video" else part

    return [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [part(p) for p in message["content"]]}
        for message in case.messages
    ]


def data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "png", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

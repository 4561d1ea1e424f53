"""The engine at work in this process: the published workload, and pictures that arrive beside streams."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import torch

from card_checks.models import (
    checked_backend,
    make_engine,
    make_model,
    published_config,
    request,
    tokens_of,
)
from card_checks.results import Check, Setting
from card_checks.rows import Row
from card_checks.sizes import layer_numbers, vit_flops, weight_bytes
from dashinfer_vlm.config import ScheduleName
from dashinfer_vlm.engine.engine import Engine
from dashinfer_vlm.engine.stats import EngineStats
from dashinfer_vlm.models.model import LoadedModel
from dashinfer_vlm.request import Grid, Request

PUBLISHED_PICTURES: list[Grid] = [(1, 64, 64), (1, 48, 72), (1, 72, 48)]
PUBLISHED_TEXT, PUBLISHED_TOKENS, CLIENTS = 52, 120, 32
"""Words of the prompt beside its pictures, tokens of an answer, and requests that run at a time."""

MOST_PICTURES = 60
"""That arrive beside streams."""


def published(setting: Setting) -> Iterator[Check]:
    """Seconds per request; the floor takes the ViT, the prefill and a share of the decode one after the other."""
    for size, bar in (("tiny", 1.0),) if setting.tiny else (("2b", 1 / 0.65), ("7b", 1 / 0.70)):
        yield f"{size} published work, s per request", partial(_published, setting, size, "balanced", bar)
        if not setting.tiny:
            name = f"{size} published work, --schedule throughput"
            yield name, partial(_published, setting, size, "throughput", bar)


def _published(setting: Setting, size: str, schedule: ScheduleName, bar: float) -> Row:
    model, clients = card_model(setting, size), 2 if setting.tiny else CLIENTS
    engine, requests = published_engine(setting, model, clients, schedule)
    count = len(requests)
    setting.wait()
    begin = time.perf_counter()
    before = engine.stats()
    tokens_of(engine, requests)
    seconds, after = (time.perf_counter() - begin) / count, engine.stats()
    told = _told(before, after, seconds * count)
    floor = _floor(setting, model, requests[0], clients)
    engine.close()
    return Row(seconds=seconds, floor=floor, bar=bar, note=f"{1 / seconds:.2f} requests/s; {told}")


def _told(before: EngineStats, after: EngineStats, seconds: float) -> str:
    """Where the time went, as the engine saw it."""
    steps = {n: count - before.decode_steps_total.get(n, 0) for n, count in after.decode_steps_total.items()}
    in_steps = after.step_seconds_total - before.step_seconds_total
    prefill = after.prefill_seconds_total - before.prefill_seconds_total
    encoder = after.encoder_seconds_total - before.encoder_seconds_total
    shares = (
        f"{in_steps / seconds:.2f} in steps, {prefill / seconds:.2f} of it prefill, {encoder / seconds:.2f} encoder"
    )
    return f"{shares}; steps by streams {steps}"


def _floor(setting: Setting, model: LoadedModel, request: Request, clients: int) -> float:
    grids, answer = [item.grid for item in request.items if item.grid is not None], request.params.max_tokens or 0
    length = len(request.prompt_ids)
    c, t = setting.ceilings, model.config.text
    attention = 2 * t.num_heads * t.head_dim * t.num_layers * length**2
    prefill = c.seconds(0, 2 * layer_numbers(model) * length, attention)
    per_token = 2 * t.num_layers * t.num_kv_heads * t.head_dim * model.kv_dtype.itemsize
    step = c.seconds(weight_bytes(model) + clients * (length + answer / 2) * per_token)
    return c.seconds(0, *vit_flops(model.config, grids)) + prefill + answer * step / clients


def published_engine(
    setting: Setting, model: LoadedModel, clients: int, schedule: ScheduleName = "balanced"
) -> tuple[Engine, list[Request]]:
    """An engine for so many requests at a time, and three times as many of them."""
    grids, text, answer = PUBLISHED_PICTURES, PUBLISHED_TEXT, PUBLISHED_TOKENS
    if setting.tiny:
        grids, text, answer = [(1, 4, 4)], 10, 2
    length = text + len(grids) + sum(map(math.prod, grids)) // model.config.merge_size**2
    engine = make_engine(
        model, (clients + 1) * (length + answer + 16), length + answer, max_num_seqs=clients,
        max_num_batched_tokens=2048, prefix_cache=False, vision_cache_gib=0.0, schedule=schedule,
    )  # fmt: skip
    tokens_of(engine, [request(model.config, "first", grids, text, answer, 999)])
    count = clients * (1 if setting.tiny else 3)
    return engine, [request(model.config, str(i), grids, text, answer, i) for i in range(count)]


def beside(setting: Setting) -> Iterator[Check]:
    """99th percentile of the gaps of streams while pictures arrive; the floor is that without pictures."""
    size, streams = ("tiny", 2) if setting.tiny else ("2b", 16)
    yield f"{size}, P99 gap of {streams} streams with pictures", partial(_beside, setting, size, streams)


def _beside(setting: Setting, size: str, streams: int) -> Row:
    model = card_model(setting, size)
    words, answer, every_s = (10, 4, 0.0) if setting.tiny else (100, 1000, 0.25)
    grid = (1, 4, 6) if setting.tiny else (1, 74, 74)
    p99 = []
    for with_pictures in (False, True):
        engine = make_engine(model, 200_000 if not setting.tiny else 4096, 2048 if not setting.tiny else 256)
        tokens_of(engine, [request(model.config, "first", [grid], words, 4, 999)])  # a server is warm when it is ready
        p99.append(_gaps(engine, model, streams, words, answer, grid if with_pictures else None, every_s))
        engine.close()
    return Row(seconds=p99[1], floor=p99[0], bar=1.2)


def _gaps(
    engine: Engine, model: LoadedModel, streams: int, words: int, answer: int, grid: Grid | None, every_s: float
) -> float:
    for i in range(streams):
        engine.add(request(model.config, f"stream {i}", [], words, answer, i))
    seen: dict[str, list[float]] = defaultdict(list)
    waiting = (
        []
        if grid is None
        else [request(model.config, f"picture {i}", [grid], words // 5, 1, 5000 + i) for i in range(MOST_PICTURES)]
    )  # made before, since that takes longer than a step
    last = time.perf_counter()
    while engine.has_work():
        outputs, now = engine.step(), time.perf_counter()
        for output in outputs:
            seen[output.request_id] += [now] * bool(output.token_ids)
        if all(len(seen[f"stream {i}"]) == answer for i in range(streams)):
            break
        if waiting and now - last >= every_s:
            engine.add(waiting.pop())
            last = now
    gaps = sorted(b - a for i in range(streams) for a, b in pairwise(seen[f"stream {i}"]))
    return gaps[int(0.99 * (len(gaps) - 1))]


def card_model(setting: Setting, size: str) -> LoadedModel:
    """Qwen2-VL."""
    dtype = torch.float32 if setting.device.type == "cpu" else torch.bfloat16
    return make_model(published_config("qwen2_vl", size), checked_backend(setting, dtype), small=setting.tiny)

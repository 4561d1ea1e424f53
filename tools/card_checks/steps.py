"""The same steps started kernel by kernel, as graphs, and as graphs one ahead."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import torch

from card_checks.models import (
    USUAL,
    WAYS,
    checked_backend,
    engine_for,
    make_model,
    published_config,
    request,
)
from card_checks.results import Check, Setting
from card_checks.rows import Row
from card_checks.sizes import kv_bytes, weight_bytes
from dashinfer_vlm.models.model import LoadedModel


def steps(setting: Setting) -> Iterator[Check]:
    """Seconds from one step's tokens to the next one's, through the whole engine; how long the device idles between."""
    dtype = torch.float32 if setting.device.type == "cpu" else torch.bfloat16
    size = "tiny" if setting.tiny else "2b"
    model = make_model(published_config("qwen2_vl", size), checked_backend(setting, dtype), small=setting.tiny)
    context = 20 if setting.tiny else 1024
    for streams, bar in ((1, 1.4), (2 if setting.tiny else 64, 1.35)):
        for way in [USUAL] if setting.tiny and streams == 1 else WAYS:
            name = f"{size} {streams} of {context}, {way}"
            yield name, partial(_steps, setting, model, way, streams, context, bar if way == USUAL else None)


def _steps(setting: Setting, model: LoadedModel, way: str, streams: int, context: int, bar: float | None) -> Row:
    rounds = 3 if setting.tiny else 64
    per_step, idle, kv, told = _decode(model, way, streams, context, rounds, tiny=setting.tiny)
    moved = weight_bytes(model) + streams * context * kv
    floor = setting.ceilings.seconds(moved, 2 * weight_bytes(model) / model.kv_dtype.itemsize * streams)
    return Row(seconds=per_step, floor=floor, bar=bar, note=f"idle {100 * idle:.0f} %; {told}")


def _decode(
    model: LoadedModel, way: str, streams: int, context: int, rounds: int, *, tiny: bool
) -> tuple[float, float, float, str]:
    """Seconds per step of decode alone, the share in which nothing was under way, bytes of K and V of a token, and how
    the prompts went."""
    limits = {"max_model_len": 2 * context, "max_num_seqs": streams}
    words = 4 if tiny else context
    if tiny:
        limits["max_num_batched_tokens"] = 8
    engine = engine_for(model, way, streams * 2 * context, **limits)
    for i in range(streams):
        engine.add(request(model.config, str(i), [], words, context, i))
    waiting, num_steps, begin = {str(i) for i in range(streams)}, 0, time.perf_counter()
    while waiting:
        waiting -= {output.request_id for output in engine.step()}
        num_steps += 1
    told = f"prompts in {time.perf_counter() - begin:.2f} s, {num_steps} steps"
    begin, before = time.perf_counter(), engine.stats()
    for _ in range(rounds):
        engine.step()
    seconds, after = time.perf_counter() - begin, engine.stats()
    assert after.num_running == streams, f"some stream has ended; {told}"
    busy = after.step_seconds_total - before.step_seconds_total
    return seconds / rounds, max(0.0, 1 - busy / seconds), kv_bytes(engine.runner.kv), told

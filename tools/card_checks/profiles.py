"""Where the time of a model call goes, kernel by kernel, as the profiler of the card sees it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from card_checks import delta_net
from card_checks.models import (
    BLOCK_SIZE,
    checked_backend,
    make_model,
    published_config,
    text_batch,
)
from card_checks.results import Check, Setting
from card_checks.rows import Row
from card_checks.service import card_model, published_engine
from dashinfer_vlm.models.loading import allocate_kv
from dashinfer_vlm.models.model import LoadedModel
from dashinfer_vlm.request import Grid

MOST_KERNELS = 12
"""That a row names; the others are added up."""


def profiles(setting: Setting) -> Iterator[Check]:
    """Decode of 1 and 64 streams, a prompt and the ViT: the sum of all kernels, and the longest with their counts."""
    dtype = torch.float32 if setting.device.type == "cpu" else torch.bfloat16
    published = (("qwen2_vl", "2b"), ("qwen2_vl", "7b"), ("qwen3_5", "2b"))
    for arch, size in (("qwen2_vl", "tiny"),) if setting.tiny else published:
        config = published_config(arch, size)
        model = make_model(config, checked_backend(setting, dtype), small=setting.tiny)
        context, prompt = (17, 20) if setting.tiny else (1024, 8192)
        for streams in (2,) if setting.tiny else (1, 64):
            rows, contexts = [1] * streams, [context] * streams
            yield f"{arch} {size} kernels of decode {streams}", partial(_of_text, setting, model, rows, contexts)
        yield f"{arch} {size} kernels of prefill {prompt}", partial(_of_text, setting, model, [prompt], [prompt])
        yield f"{arch} {size} kernels of the ViT", partial(_of_pictures, setting, model)
    for case in delta_net.cases(setting, dtype, small=setting.tiny):
        yield f"kernels of {case.name}", partial(_profiled, setting, case.run)


def _of_text(setting: Setting, model: LoadedModel, rows: list[int], contexts: list[int]) -> Row:
    kv = allocate_kv(model, sum(-(-n // BLOCK_SIZE) for n in contexts), BLOCK_SIZE, num_seats=len(rows))
    batch = text_batch(setting.device, rows, contexts)
    return _profiled(setting, lambda: model.forward(batch, kv))


def _of_pictures(setting: Setting, model: LoadedModel) -> Row:
    grids: list[Grid] = [(1, 4, 6)] if setting.tiny else [(1, 74, 74)] * 4
    encoder, vision = model.encoder, model.config.vision
    assert encoder is not None
    assert vision is not None
    shapes = [(math.prod(grid), vision.patch_dim) for grid in grids]
    patches = [torch.randint(0, 256, shape, dtype=torch.uint8, device=setting.device) for shape in shapes]

    def run() -> None:
        state = encoder.begin(patches, grids)
        while not state.done:
            encoder.run(state, 1 << 20)
        encoder.finish(state)

    return _profiled(setting, run)


def serving(setting: Setting) -> Iterator[Check]:
    """Some steps of the published workload: what the card did, and how long it had nothing to do."""
    yield "published work, kernels", partial(_serving, setting)


def _serving(setting: Setting) -> Row:
    clients, first, count = (2, 1, 2) if setting.tiny else (32, 150, 120)
    engine, requests = published_engine(setting, card_model(setting, "tiny" if setting.tiny else "2b"), clients)
    for one in requests:
        engine.add(one)
    for _ in range(first):
        engine.step()
    setting.wait()
    begin = time.perf_counter()
    with profile(activities=_activities(setting)) as found:
        for _ in range(count):
            engine.step()
        setting.wait()
    seconds = time.perf_counter() - begin
    engine.close()
    row = _row(setting, found)
    return replace(row, seconds=seconds, note=f"{count} steps, kernels {row.seconds or 0:.3f} s of it")


def _profiled(setting: Setting, call: Callable[[], object]) -> Row:
    """The second call's."""
    call()
    setting.wait()
    with profile(activities=_activities(setting)) as found:
        call()
        setting.wait()
    return _row(setting, found)


def _activities(setting: Setting) -> list[ProfilerActivity]:
    return [ProfilerActivity.CUDA if setting.device.type == "cuda" else ProfilerActivity.CPU]


def _row(setting: Setting, found: profile) -> Row:
    name = "self_device_time_total" if setting.device.type == "cuda" else "self_cpu_time_total"
    times = sorted(((getattr(x, name) / 1e6, x.count, x.key) for x in found.key_averages()), reverse=True)
    longest = {f"{count} {key[:60]}": seconds for seconds, count, key in times[:MOST_KERNELS] if seconds}
    rest = sum(seconds for seconds, _, _ in times[MOST_KERNELS:])
    return Row(
        seconds=sum(seconds for seconds, _, _ in times),
        others=longest | {"others": rest},
        note=f"{sum(count for seconds, count, _ in times if seconds)} kernels",
    )

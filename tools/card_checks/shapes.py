"""Decode, prompts and pictures of published sizes, next to their floors."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from card_checks.models import BLOCK_SIZE, RandomWeights, checked_backend, make_model, published_config, text_batch
from card_checks.results import Check, Setting
from card_checks.rows import Row
from card_checks.sizes import head_numbers, kv_bytes, layer_numbers, vit_flops, weight_bytes
from dashinfer_vlm.layers.backend import Backend
from dashinfer_vlm.layers.card_backend import in_floats, in_groups
from dashinfer_vlm.models.base import KVCache, StepBatch
from dashinfer_vlm.models.config import CheckpointConfig
from dashinfer_vlm.models.loading import allocate_kv
from dashinfer_vlm.models.model import LoadedModel
from dashinfer_vlm.request import Grid


def shapes(setting: Setting) -> Iterator[Check]:
    """Decode, prefill and the ViT of the published sizes, next to their floors; decode is timed as a graph."""
    dtype = torch.float32 if setting.device.type == "cpu" else torch.bfloat16
    for size in ("tiny",) if setting.tiny else ("2b", "7b"):
        bars = {"2b": (1.4, 1.35, 1.5), "7b": (1.15, 1.2, 1.3)}.get(size, (1.0, 1.0, 1.0))
        config = published_config("qwen2_vl", size)
        backend = checked_backend(setting, dtype)
        model = make_model(config, backend, small=setting.tiny)
        yield from _decoding(setting, model, f"{size} decode", bars)
        yield f"Qwen2-VL ViT for {size}", partial(_encoding, setting, model)
        model.encoder = None
        for name, make in _precisions(setting, dtype):
            quantised = text_alone(setting, config, make())
            yield from islice(_decoding(setting, quantised, f"{size} {name} decode", (1.7, 1.5, 1.5)), _few(setting))
            del quantised
        del model
        if size != "7b":  # layers with states
            hybrid = text_alone(setting, published_config("qwen3_5", size), backend)
            yield from _decoding(setting, hybrid, f"Qwen3.5-{size.upper()} decode", (1.9, 1.7, 1.9))
            del hybrid
        if size != "2b":
            config = published_config("qwen2_5_vl", size)
            model = make_model(config, backend, small=setting.tiny)
            yield "Qwen2.5-VL ViT", partial(_encoding, setting, model)


def _few(setting: Setting) -> int | None:
    return 1 if setting.tiny else None


def _precisions(setting: Setting, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Backend]]]:
    if setting.multiplies_floats_of_8_bits:
        yield "fp8", partial(in_floats, setting.device, dtype)
    for kind in () if setting.tiny else ("a16w8", "a16w4"):
        yield kind, partial(in_groups, setting.device, dtype, kind)


def text_alone(setting: Setting, config: CheckpointConfig, backend: Backend) -> LoadedModel:
    """The text model without its ViT."""
    weights = RandomWeights(config, setting.device, same_everywhere=setting.tiny)
    return LoadedModel(config, config.family.decoder(config, weights, backend), None, backend)


def _decoding(setting: Setting, model: LoadedModel, name: str, bars: tuple[float, float, float]) -> Iterator[Check]:
    context, long = (17, 20) if setting.tiny else (1024, 8192)
    streams = (1, 2) if setting.tiny else (1, 8, 64)
    num_blocks = max(streams[-1] * -(-context // BLOCK_SIZE), -(-long // BLOCK_SIZE))
    kv = allocate_kv(model, num_blocks, BLOCK_SIZE, num_seats=streams[-1])
    for count in streams:
        bar = bars[1] if count == streams[-1] else bars[0]
        yield f"{name} {count} of {context}", partial(_decode, setting, model, kv, count, context, bar)
    yield f"{name} {long}".replace("decode", "prefill"), partial(_prefill, setting, model, kv, long, bars[2])


def _decode(setting: Setting, model: LoadedModel, kv: KVCache, count: int, context: int, bar: float) -> Row:
    batch = text_batch(setting.device, [1] * count, [context] * count)
    seconds = setting.time(lambda: model.forward(batch, kv), as_graph=True)
    moved = weight_bytes(model) + count * (context * kv_bytes(kv) + 2 * model.text.state_bytes)
    floor = setting.ceilings.seconds(moved, 2 * (layer_numbers(model) + head_numbers(model)) * count)
    return Row(seconds=seconds, floor=floor, bar=bar, note=_host(setting, model, batch, kv))


def _prefill(setting: Setting, model: LoadedModel, kv: KVCache, length: int, bar: float) -> Row:
    batch = text_batch(setting.device, [length], [length])
    text = model.config.text
    attention = 2 * text.num_heads * text.head_dim * text.num_kv_layers * length**2
    floor = setting.ceilings.seconds(0, 2 * layer_numbers(model) * length, attention)
    return Row(seconds=setting.time(lambda: model.forward(batch, kv), rounds=5), floor=floor, bar=bar)


def _host(setting: Setting, model: LoadedModel, batch: StepBatch, kv: KVCache) -> str:
    """How long the CPU takes to start a step; where that is more than the card's time, the card idles."""
    setting.wait()
    begin = time.perf_counter()
    model.forward(batch, kv)
    return f"host {1e3 * (time.perf_counter() - begin):.2f} ms"


def _encoding(setting: Setting, model: LoadedModel) -> Row:
    grids: list[Grid] = [(1, 4, 6)] * 2 if setting.tiny else [(1, 74, 74)] * 16
    encoder, vision = model.encoder, model.config.vision
    assert encoder is not None
    assert vision is not None
    patches = [
        torch.randint(0, 256, (math.prod(g), vision.patch_dim), dtype=torch.uint8, device=setting.device) for g in grids
    ]

    def run() -> list[Tensor]:
        state = encoder.begin(patches, grids)
        while not state.done:
            encoder.run(state, 1 << 20)
        return encoder.finish(state)

    floor = setting.ceilings.seconds(0, *vit_flops(model.config, grids))
    note = f"{len(grids)} of {grids[0][1]}x{grids[0][2]}"
    return Row(seconds=setting.time(run, rounds=5), floor=floor, bar=1.5, note=note)

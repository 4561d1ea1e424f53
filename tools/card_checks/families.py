"""Tiny models of each family, whose tokens and embeddings are those of the CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from card_checks.models import (
    BLOCK_SIZE,
    USUAL,
    WAYS,
    RandomWeights,
    checked_backend,
    engine_for,
    make_engine,
    make_model,
    picture,
    published_config,
    request,
    text_batch,
    tokens_of,
)
from card_checks.results import Check, Setting, error
from card_checks.rows import Row
from dashinfer_vlm.bench.spans import replaced
from dashinfer_vlm.engine import states
from dashinfer_vlm.engine.states import PROMPT_TAIL
from dashinfer_vlm.layers.backend import Backend, choose_backend
from dashinfer_vlm.layers.card_backend import in_floats, in_groups
from dashinfer_vlm.layers.grouped import BITS
from dashinfer_vlm.models.config import CheckpointConfig
from dashinfer_vlm.models.loading import allocate_kv
from dashinfer_vlm.models.model import LoadedModel
from dashinfer_vlm.request import Grid
from make_checkpoint import RECIPES


def families(setting: Setting) -> Iterator[Check]:
    """Steps of decode and prompts agree; greedy tokens of a tiny model of each family in float32: the device's are the
    CPU's; logits in bfloat16 nearly."""
    for name, backend, cache in _precisions(setting):
        yield f"decode beside prompts in {name}", partial(_decoding, setting, "qwen2_vl", backend, cache)
    name, backend, cache = next(_precisions(setting))
    yield f"decode beside prompts by states in {name}", partial(_decoding, setting, "qwen3_5", backend, cache)
    for arch in RECIPES:
        if not arch.endswith(("_text", "_next")):  # whose layers are those of another one
            yield f"logits of a tiny {arch} in bfloat16", partial(_rounding, setting, arch)
        if RECIPES[arch][2] and not arch.endswith("_moe"):  # whose ViT is that of the same model without experts
            yield f"embeddings by the ViT of {arch} in bfloat16", partial(_seeing, setting, arch)
        for way in [USUAL] if setting.tiny else WAYS:
            yield f"tokens of a tiny {arch}, {way}", partial(_tokens, setting, arch, way)
    yield "tokens of a second turn from saved states", partial(_second_turn, setting, "qwen3_5")
    if setting.multiplies_floats_of_8_bits:
        yield "logits of a tiny qwen3_moe in 8-bit floats", partial(_in_floats, setting, "qwen3_moe")


def _precisions(setting: Setting) -> Iterator[tuple[str, Backend, torch.dtype | None]]:
    """Names, backends, and types of the cache."""
    dtype = torch.float32 if setting.device.type == "cpu" else torch.bfloat16
    yield "16 bits", checked_backend(setting, dtype), None
    yield "16 bits over an int8 cache", checked_backend(setting, dtype), torch.int8
    if setting.multiplies_floats_of_8_bits:
        yield "8-bit floats", in_floats(setting.device, dtype), None
    for kind in BITS:
        yield kind, in_groups(setting.device, dtype, kind), None


def _decoding(setting: Setting, arch: str, backend: Backend, cache: torch.dtype | None) -> Row:
    """Logits of 1, 8 and 64 streams' last tokens in a step of decode, beside those of the same tokens in prompts: by
    products of few rows, and of many. At published size, where programs run side by side."""
    config, length = published_config(arch, "tiny" if setting.tiny else "2b"), 5 if setting.tiny else 200
    weights = RandomWeights(config, setting.device, same_everywhere=setting.tiny)
    model = LoadedModel(config, config.family.decoder(config, weights, backend), None, backend)
    errors = []
    for count in (2,) if setting.tiny else (1, 8, 64):
        kv = allocate_kv(model, count * -(-length // BLOCK_SIZE), BLOCK_SIZE, cache, num_seats=count)
        prompts, before, newest = (
            text_batch(setting.device, [rows] * count, [context] * count)
            for rows, context in ((length, length), (length - 1, length - 1), (1, length))
        )
        ids = prompts.ids.view(count, length)
        want = model.forward(prompts, kv)
        model.forward(replace(before, ids=ids[:, :-1].flatten()), kv)  # states have seen the last token, too
        errors.append(error(model.forward(replace(newest, ids=prompts.ids[prompts.logits_rows]), kv), want))
    return Row(error=max(errors), allowed=0.1, note=", ".join(f"{x:.1e}" for x in errors))


def _tokens(setting: Setting, arch: str, way: str) -> Row:
    """In a rehearsal as a processor does its steps."""
    config = published_config(arch, "tiny")
    grids: list[Grid] = [(1, 4, 6), (1, 8, 4)] if RECIPES[arch][2] else []
    count, fewest, more, answer = (2, 1, 4, 2) if setting.tiny else (4, 20, 9, 12)
    requests = [request(config, str(i), grids[: i % 3], fewest + more * i, answer, i) for i in range(1, 1 + count)]
    theirs = tokens_of(make_engine(_tiny(config, torch.device("cpu")), 4096, 512), requests)
    model = make_model(config, checked_backend(setting, torch.float32), small=True)
    is_usual = way == USUAL
    engine = make_engine(model, 4096, 512) if is_usual else engine_for(model, way, 4096, max_model_len=512)
    ours, total = tokens_of(engine, requests), sum(map(len, theirs.values()))
    apart = sum(a != b for name in ours for a, b in zip(ours[name], theirs[name], strict=True))
    return Row(error=apart / total, allowed=0, note=f"{total} tokens")


def _second_turn(setting: Setting, arch: str) -> Row:
    """Beside those of a processor that computes the whole prompt. States are saved behind one block already."""
    config, answer = published_config(arch, "tiny"), 1 if setting.tiny else 40
    first = request(config, "first", [], BLOCK_SIZE + PROMPT_TAIL, answer, 1)
    second = replace(first, id="second", prompt_ids=[*first.prompt_ids, 1, 2])
    plain = make_engine(_tiny(config, torch.device("cpu")), 4096, 512, prefix_cache=False)
    model = make_model(config, checked_backend(setting, torch.float32), small=True)
    saving = make_engine(model, 4096, 512)
    with replaced(states, "MIN_SPARED", BLOCK_SIZE):
        theirs, ours = ([tokens_of(engine, [each]) for each in (first, second)] for engine in (plain, saving))
    num_found = saving.stats().num_cached_tokens_total
    return Row(error=float(ours != theirs or not num_found), allowed=0, note=f"{num_found} tokens found")


def _seeing(setting: Setting, arch: str) -> Row:
    """Embeddings by a ViT of published size, in bfloat16 beside those in float32; pictures that fill no tiles."""
    config = published_config(arch, "tiny" if setting.tiny else "2b")
    grids: list[Grid] = [(1, 4, 6), (1, 8, 4)] if setting.tiny else [(1, 38, 54), (1, 26, 20), (1, 74, 74)]
    assert config.vision is not None
    patches = [picture(config, grid, 0, i).patches for i, grid in enumerate(grids)]
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        weights = RandomWeights(config, setting.device, same_everywhere=setting.tiny)
        encoder = config.family.encoder(config.vision, weights, checked_backend(setting, dtype))
        state = encoder.begin([torch.from_numpy(x).to(setting.device) for x in patches if x is not None], grids)
        while not state.done:
            encoder.run(state, 1 << 20)
        found.append(torch.cat(encoder.finish(state)))
        del encoder, state
    return Row(error=error(found[1], found[0]), allowed=0.05)


def _tiny(config: CheckpointConfig, device: torch.device) -> LoadedModel:
    return make_model(config, choose_backend(device, torch.float32), small=True)


def _rounding(setting: Setting, arch: str) -> Row:
    """Logits of a text in bfloat16 beside those in float32; torch's own kernels lose 0.02 here, and where layers keep
    states 0.06, with experts 0.08."""
    whole, rounded = (_logits(setting, arch, checked_backend(setting, x)) for x in (torch.float32, torch.bfloat16))
    has_states = published_config(arch, "tiny").text.delta_net is not None
    return Row(error=error(rounded, whole), allowed=0.15 if has_states else 0.05)


def _in_floats(setting: Setting, arch: str) -> Row:
    """As `_rounding`. A row that chooses another expert for it is farther off."""
    dtype = torch.float32 if setting.device.type == "cpu" else torch.bfloat16
    whole, rounded = (
        _logits(setting, arch, backend)
        for backend in (checked_backend(setting, torch.float32), in_floats(setting.device, dtype))
    )
    return Row(error=error(rounded, whole), allowed=0.2)


def _logits(setting: Setting, arch: str, backend: Backend) -> torch.Tensor:
    """Of all rows of a text."""
    num_tokens = 9 if setting.tiny else 40  # more than are few
    model = make_model(published_config(arch, "tiny"), backend, small=True)
    kv = allocate_kv(model, 8, BLOCK_SIZE)
    return model.forward(text_batch(setting.device, [num_tokens], [num_tokens]), kv)


def call_everything(setting: Setting, arch: str, dtype: torch.dtype) -> None:
    """What a tiny model of a family does with words and pictures, in either kind of cache."""
    config = published_config(arch, "tiny")
    model = make_model(config, checked_backend(setting, dtype), small=False)
    for cache in (None, torch.int8):
        kv = allocate_kv(model, 8, BLOCK_SIZE, cache, num_seats=2)
        for rows in ([40, 1], [1, 1]):
            model.forward(text_batch(setting.device, rows, [40, 30]), kv)
    if model.encoder is not None and config.vision is not None:
        grids: list[Grid] = [(1, 4, 6), (2, 8, 4)]
        shapes = [(math.prod(grid), config.vision.patch_dim) for grid in grids]
        state = model.encoder.begin([torch.empty(x, dtype=torch.uint8, device=setting.device) for x in shapes], grids)
        while not state.done:
            model.encoder.run(state, 1)
        model.encoder.finish(state)

"""Whole models with random weights, made where they are needed: no checkpoint has to be at hand."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from card_checks.results import Check, Setting, error
from card_checks.rows import Row
from dashinfer_vlm.bench.spans import replaced
from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine import engine as engine_module
from dashinfer_vlm.engine.devices import make_card_runner, num_spare_blocks
from dashinfer_vlm.engine.engine import Engine
from dashinfer_vlm.layers.backend import Backend, choose_backend, in_floats, in_groups, on_card
from dashinfer_vlm.layers.fp8 import Fp8Linear
from dashinfer_vlm.layers.grouped import GroupedLinear
from dashinfer_vlm.layers.linear import Linear, Matrix
from dashinfer_vlm.layers.ranks import WHOLE, Cut
from dashinfer_vlm.models.base import KVCache, StepBatch
from dashinfer_vlm.models.config import CheckpointConfig, read_config
from dashinfer_vlm.models.loading import allocate_kv
from dashinfer_vlm.models.model import LoadedModel
from dashinfer_vlm.models.weights import Weights
from dashinfer_vlm.request import Grid, Item, Request, SamplingParams
from make_checkpoint import RECIPES, generation_config, processor_configs

BLOCK_SIZE = 16
USUAL = "as graphs, one ahead"
WAYS = {USUAL: (True, 1), "as graphs": (True, 0), "kernel by kernel": (False, 0)}
"""How steps are started: whether model calls are graphs, and how many steps are under way while one is planned."""


class RandomWeights(Weights):
    """Tensors that no file holds, the same for a name whenever it is asked for."""

    def __init__(self, config: CheckpointConfig, device: torch.device, *, same_everywhere: bool) -> None:
        self.folder = config.folder
        self._device = device
        self._maker = torch.device("cpu") if same_everywhere else device

    def __contains__(self, name: str) -> bool:
        return False

    def take(self, name: str, *shape: int) -> Tensor:
        if self._maker.type == "meta":
            return torch.empty(shape, device=self._maker)
        generator = torch.Generator(self._maker)
        generator.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7]))
        values = torch.randn(shape, generator=generator, device=self._maker).to(self._device)
        if len(shape) == 1:
            return 0.1 * values + (0.0 if name.endswith("bias") else 1.0)
        return values / math.sqrt(math.prod(shape[1:]))

    def join(self, names: tuple[str, ...], sizes: tuple[int, ...], cut: Cut = WHOLE) -> Tensor:
        parts = zip(names, sizes, cut.of(names), strict=True)
        return torch.cat([self.take(name, size)[part] for name, size, part in parts])

    def matrix(self, rows: Mapping[str, int], depth: int, cut: Cut = WHOLE) -> Matrix:
        def read() -> Tensor:
            parts = zip(rows.items(), cut.of(rows), strict=True)
            return torch.cat([self.take(name, size, depth)[part, cut.columns] for (name, size), part in parts])

        return Matrix("+".join(rows), sum(rows.values()), depth, read)

    def finish(self) -> None:
        """Nothing can be left."""


def published_config(arch: str, size: str) -> CheckpointConfig:
    """What the JSON files of a published model of this size say."""
    architecture, config, processor = RECIPES[arch]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        told = {"architectures": [architecture], "model_type": arch, "torch_dtype": "bfloat16"} | config(size)
        (folder / "config.json").write_text(json.dumps(told))
        (folder / "generation_config.json").write_text(json.dumps(generation_config(size)))
        for name, settings in ({} if processor is None else processor_configs(processor)).items():
            (folder / name).write_text(json.dumps(settings))
        return read_config(folder)


def checked_backend(setting: Setting, dtype: torch.dtype) -> Backend:
    """The card's; in a rehearsal the same kernels, interpreted."""
    if setting.device.type == "cuda":
        return choose_backend(setting.device, dtype)
    return on_card(setting.device, dtype)


def make_model(config: CheckpointConfig, backend: Backend, *, small: bool) -> LoadedModel:
    weights = RandomWeights(config, backend.device, same_everywhere=small)
    encoder = None if config.vision is None else config.family.encoder(config.vision, weights, backend)
    return LoadedModel(config, config.family.decoder(config, weights, backend), encoder, backend)


def make_engine(model: LoadedModel, num_tokens: int, max_model_len: int, **options: object) -> Engine:
    """An engine with a KV cache for `num_tokens`."""
    config = EngineConfig(device=model.device.type, max_model_len=max_model_len, **options)  # type: ignore[arg-type]
    num_blocks = -(-num_tokens // BLOCK_SIZE) + num_spare_blocks(model.device)
    return Engine(model, allocate_kv(model, num_blocks, BLOCK_SIZE), config)


def engine_for(model: LoadedModel, way: str, num_tokens: int, **options: object) -> Engine:
    """An engine with a KV cache for `num_tokens`, whose steps go this way on any device."""
    with_graphs, depth = WAYS[way]
    config = EngineConfig(device=model.device.type, **options)  # type: ignore[arg-type]
    num_blocks = -(-num_tokens // BLOCK_SIZE) + 1  # the runner's own is the last one
    with replaced(engine_module, "make_runner", partial(make_card_runner, with_graphs=with_graphs, depth=depth)):
        return Engine(model, allocate_kv(model, num_blocks, BLOCK_SIZE), config)


def picture(config: CheckpointConfig, grid: Grid, start: int, seed: int) -> Item:
    """Noise; `seed` is its identity."""
    assert config.vision is not None
    random = np.random.default_rng(seed)
    patches = random.integers(0, 256, (math.prod(grid), config.vision.patch_dim), dtype=np.uint8)
    return Item(
        kind="image",
        start=start,
        num_tokens=len(patches) // config.merge_size**2,
        content_hash=seed.to_bytes(32),
        grid=grid,
        patches=patches,
    )


def request(
    config: CheckpointConfig, name: str, grids: list[Grid], num_text: int, max_tokens: int, seed: int
) -> Request:
    """Pictures, then words, of which one stands between any two pictures; greedy, to the last token."""
    words = np.random.default_rng(seed).integers(0, 1000, num_text + len(grids)).tolist()
    ids: list[int] = []
    items: list[Item] = []
    for number, grid in enumerate(grids):
        item = picture(config, grid, len(ids), 1000 * seed + number)
        items.append(item)
        ids += [config.placeholder_ids["image"]] * item.num_tokens + [words.pop()]
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return Request(id=name, prompt_ids=ids + words, params=params, items=tuple(items))


def tokens_of(engine: Engine, requests: list[Request]) -> dict[str, list[int]]:
    """Run all requests to their end."""
    found: dict[str, list[int]] = {r.id: [] for r in requests}
    for r in requests:
        engine.add(r)
    while engine.has_work():
        for output in engine.step():
            found[output.request_id] += output.token_ids
    return found


def families(setting: Setting) -> Iterator[Check]:
    """Greedy tokens of a tiny model of each family in float32: the device's are the CPU's; logits in bfloat16
    nearly."""
    for arch in RECIPES:
        yield f"logits of a tiny {arch} in bfloat16", partial(_rounding, setting, arch)
        if RECIPES[arch][2]:
            yield f"embeddings by the ViT of {arch} in bfloat16", partial(_seeing, setting, arch)
        for way in [USUAL] if setting.tiny else WAYS:
            yield f"tokens of a tiny {arch}, {way}", partial(_tokens, setting, arch, way)


def _tokens(setting: Setting, arch: str, way: str) -> Row:
    """In a rehearsal as a processor does its steps."""
    config = published_config(arch, "tiny")
    grids: list[Grid] = [(1, 4, 6), (1, 8, 4)] if RECIPES[arch][2] else []
    count, fewest, answer = (2, 1, 2) if setting.tiny else (4, 20, 12)
    requests = [request(config, str(i), grids[: i % 3], fewest + 9 * i, answer, i) for i in range(1, 1 + count)]
    theirs = tokens_of(make_engine(_tiny(config, torch.device("cpu")), 4096, 512), requests)
    model = make_model(config, checked_backend(setting, torch.float32), small=True)
    is_usual = way == USUAL
    engine = make_engine(model, 4096, 512) if is_usual else engine_for(model, way, 4096, max_model_len=512)
    ours, total = tokens_of(engine, requests), sum(map(len, theirs.values()))
    apart = sum(a != b for name in ours for a, b in zip(ours[name], theirs[name], strict=True))
    return Row(error=apart / total, allowed=0, note=f"{total} tokens")


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
    """Logits of a text in bfloat16 beside those in float32; torch's own kernels lose about a hundredth here."""
    config, num_tokens, logits = published_config(arch, "tiny"), 17 if setting.tiny else 40, []
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(config, checked_backend(setting, dtype), small=True)
        kv = allocate_kv(model, 8, BLOCK_SIZE)
        logits.append(model.forward(text_batch(setting.device, [num_tokens], [num_tokens]), kv))
    return Row(error=error(logits[1], logits[0]), allowed=0.05)


def call_everything(setting: Setting, arch: str, dtype: torch.dtype) -> None:
    """What a tiny model of a family does with words and pictures, in either kind of cache."""
    config = published_config(arch, "tiny")
    model = make_model(config, checked_backend(setting, dtype), small=False)
    for cache in (None, torch.int8):
        kv = allocate_kv(model, 8, BLOCK_SIZE, cache)
        for rows in ([40, 1], [1, 1]):
            model.forward(text_batch(setting.device, rows, [40, 30]), kv)
    if model.encoder is not None and config.vision is not None:
        grids: list[Grid] = [(1, 4, 6), (2, 8, 4)]
        shapes = [(math.prod(grid), config.vision.patch_dim) for grid in grids]
        state = model.encoder.begin([torch.empty(x, dtype=torch.uint8, device=setting.device) for x in shapes], grids)
        while not state.done:
            model.encoder.run(state, 1)
        model.encoder.finish(state)


def text_batch(device: torch.device, rows: list[int], contexts: list[int]) -> StepBatch:
    """The last `rows[s]` tokens of a text of `contexts[s]`, in blocks one behind the other."""
    blocks = [-(-n // BLOCK_SIZE) for n in contexts]
    tables = torch.zeros(len(rows), max(blocks), dtype=torch.int32)
    slots, positions, first = [], [], 0
    for table, count, n, context in zip(tables, blocks, rows, contexts, strict=True):
        table[:count] = torch.arange(first, first + count)
        places = torch.arange(context - n, context)
        slots.append(places + first * BLOCK_SIZE)
        positions.append(places)
        first += count
    starts = torch.tensor([0, *rows]).cumsum(0)
    ids = torch.randint(0, 1000, (sum(rows),), generator=torch.Generator().manual_seed(0))
    return StepBatch(
        ids=ids.to(device),
        positions=torch.cat(positions).expand(3, -1).to(device),
        slots=torch.cat(slots).to(device),
        query_starts=starts.int().to(device),
        context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
        block_tables=tables.to(device),
        logits_rows=(starts[1:] - 1).to(device),
    )


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
    kv = allocate_kv(model, max(streams[-1] * -(-context // BLOCK_SIZE), -(-long // BLOCK_SIZE)), BLOCK_SIZE)
    for count in streams:
        bar = bars[1] if count == streams[-1] else bars[0]
        yield f"{name} {count} of {context}", partial(_decode, setting, model, kv, count, context, bar)
    yield f"{name} {long}".replace("decode", "prefill"), partial(_prefill, setting, model, kv, long, bars[2])


def _decode(setting: Setting, model: LoadedModel, kv: KVCache, count: int, context: int, bar: float) -> Row:
    batch = text_batch(setting.device, [1] * count, [context] * count)
    seconds = setting.time(lambda: model.forward(batch, kv), as_graph=True)
    moved = weight_bytes(model) + count * context * kv_bytes(kv)
    floor = setting.ceilings.seconds(moved, 2 * (layer_numbers(model) + head_numbers(model)) * count)
    return Row(seconds=seconds, floor=floor, bar=bar, note=_host(setting, model, batch, kv))


def _prefill(setting: Setting, model: LoadedModel, kv: KVCache, length: int, bar: float) -> Row:
    batch = text_batch(setting.device, [length], [length])
    text = model.config.text
    attention = 2 * text.num_heads * text.head_dim * text.num_layers * length**2
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


def layer_numbers(model: LoadedModel) -> int:
    """Weights of all layers, without embedding and head."""
    t = model.config.text
    attention = t.hidden_size * t.head_dim * (2 * t.num_heads + 2 * t.num_kv_heads)
    return t.num_layers * (attention + 3 * t.hidden_size * t.intermediate_size)


def head_numbers(model: LoadedModel) -> int:
    return model.config.text.hidden_size * model.config.text.vocab_size


def weight_bytes(model: LoadedModel) -> int:
    """What a step reads of them, scales left out."""
    size = model.kv_dtype.itemsize
    of_layers, of_head = map(_bits, (model.decoder.layers[0].attention.qkv, model.decoder.head))
    return (layer_numbers(model) * (of_layers or 8 * size) + head_numbers(model) * (of_head or 8 * size)) // 8


def _bits(layer: Linear) -> int | None:
    """Of a quantised weight."""
    if isinstance(layer, GroupedLinear):
        return layer.weight.bits
    return 8 if isinstance(layer, Fp8Linear) else None


def kv_bytes(kv: KVCache) -> float:
    """Of one token."""
    return sum(x.nbytes for x in (*kv.keys, *kv.values)) / (kv.num_blocks * kv.block_size)


def vit_flops(config: CheckpointConfig, grids: list[Grid]) -> tuple[float, float]:
    """Of products and of attention (the ViTs of Qwen2-VL and Qwen2.5-VL)."""
    vision = config.vision
    assert vision is not None
    width, section = vision.width, vision.section
    gated = section.has("intermediate_size")
    inner = section.integer("intermediate_size") if gated else int(width * section.number("mlp_ratio"))
    per_layer = 4 * width**2 + (3 if gated else 2) * width * inner
    num_patches = sum(math.prod(g) for g in grids)
    group = width * vision.merge_size**2
    merger = 2 * (num_patches / vision.merge_size**2) * group * (group + vision.out_size)
    products = 2 * num_patches * (vision.patch_dim * width + vision.depth * per_layer) + merger
    full = len(section.integers("fullatt_block_indexes")) if gated else vision.depth
    window = (section.integer("window_size") // vision.patch_size) ** 2 if gated else 0
    pairs = sum(t * (h * w) ** 2 for t, h, w in grids)
    return products, 4.0 * width * (full * pairs + (vision.depth - full) * num_patches * window)

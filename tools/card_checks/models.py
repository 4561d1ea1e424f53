"""Whole models with random weights, made where they are needed: no checkpoint has to be at hand."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from card_checks.results import Setting
from dashinfer_vlm.bench.spans import replaced
from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine import engine as engine_module
from dashinfer_vlm.engine.devices import make_card_runner, num_spare_blocks
from dashinfer_vlm.engine.engine import Engine
from dashinfer_vlm.layers.backend import Backend, choose_backend
from dashinfer_vlm.layers.card_backend import on_card
from dashinfer_vlm.layers.linear import Matrix
from dashinfer_vlm.layers.ranks import WHOLE, Cut
from dashinfer_vlm.models.base import StepBatch
from dashinfer_vlm.models.config import CheckpointConfig, read_config
from dashinfer_vlm.models.loading import allocate_kv
from dashinfer_vlm.models.model import LoadedModel
from dashinfer_vlm.models.weights import Weights
from dashinfer_vlm.request import Grid, Item, Request, SamplingParams
from make_checkpoint import write_configs

BLOCK_SIZE = 16
MOST_SEATED = 8
"""Sequences of a model with states that run at once."""
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
        return torch.cat([self.take(name, size)[part] for name, size, of_it in parts for part in of_it])

    def matrix(self, rows: Mapping[str, int], depth: int, cut: Cut = WHOLE) -> Matrix:
        def read() -> Tensor:
            parts = zip(rows.items(), cut.of(rows), strict=True)
            found = [(self.take(name, size, depth), of_it) for (name, size), of_it in parts]
            return torch.cat([matrix[part, cut.columns] for matrix, of_it in found for part in of_it])

        return Matrix("+".join(rows), sum(rows.values()), depth, read)

    def finish(self) -> None:
        """Nothing can be left."""


def published_config(arch: str, size: str) -> CheckpointConfig:
    """What the JSON files of a published model of this size say."""
    with tempfile.TemporaryDirectory() as folder:
        write_configs(Path(folder), arch, size, "bfloat16")
        return read_config(Path(folder))


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
    return Engine(model, allocate_kv(model, num_blocks, BLOCK_SIZE, num_seats=MOST_SEATED), config)


def engine_for(model: LoadedModel, way: str, num_tokens: int, **options: object) -> Engine:
    """An engine with a KV cache for `num_tokens`, whose steps go this way on any device."""
    with_graphs, depth = WAYS[way]
    config = EngineConfig(device=model.device.type, **options)  # type: ignore[arg-type]
    num_blocks = -(-num_tokens // BLOCK_SIZE) + 1  # the runner's own is the last one
    with replaced(engine_module, "make_runner", partial(make_card_runner, with_graphs=with_graphs, depth=depth)):
        return Engine(model, allocate_kv(model, num_blocks, BLOCK_SIZE, num_seats=MOST_SEATED), config)


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
        seats=torch.arange(len(rows), device=device),
    )

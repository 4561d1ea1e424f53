"""Attention over a cache, and in pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from card_checks.cases import Case
from card_checks.models import checked_backend
from card_checks.results import Check, Setting
from card_checks.rows import Row
from dashinfer_vlm.layers import attention
from dashinfer_vlm.layers.ops import REFERENCE, Ops

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Heads:
    query: int
    key: int
    dim: int


def cases_over_a_cache(setting: Setting, dtype: torch.dtype, *, small: bool) -> Iterator[Case]:
    heads = Heads(6, 2, 32) if small else Heads(28, 4, 128)
    for name, rows, contexts in _steps(small):
        for cache in (dtype, torch.int8):
            told = str(cache).removeprefix("torch.")
            yield attention_over_a_cache(setting, dtype, f"{name} over {told}", heads, rows, contexts, cache)
    for count, context in ((1, 300), (3, 70)) if small else ((1, 1024), (64, 1024)):
        yield decode_alone(setting, dtype, f"decode with its rotation, {count} of {context}", heads, [context] * count)


def cases_of_pictures(setting: Setting, dtype: torch.dtype, *, small: bool) -> Iterator[Case]:
    if small:
        yield attention_of_pictures(setting, dtype, "frames", [37, 1, 64, 5], 2, 80)
        yield attention_of_pictures(setting, dtype, "heads of 72", [30, 9], 2, 72)
        for dim in (80, 72, 64):
            yield attention_of_pictures(setting, dtype, f"tall frames, heads of {dim}", [300, 129, 192], 2, dim)
    else:
        yield attention_of_pictures(setting, dtype, "16 pictures of 1024^2", [5476] * 16, 16, 80)
        yield attention_of_pictures(setting, dtype, "heads of 72", [4096] * 16, 16, 72)
        yield attention_of_pictures(setting, dtype, "windows", [64] * 1369, 16, 80)


def _steps(small: bool) -> list[tuple[str, list[int], list[int]]]:
    if small:
        return [("decode", [1, 1, 1], [1, 37, 70]), ("mixed step", [1, 19, 3], [40, 30, 33])]
    return [
        ("decode 1 of 1k", [1], [1024]),
        ("decode 64 of 1k", [1] * 64, [1024] * 64),
        ("decode 8 of 8k", [1] * 8, [8192] * 8),
        ("prefill 8k", [8192], [8192]),
        ("mixed step", [1] * 64 + [1984], [1024] * 64 + [4096]),
    ]


@dataclass(frozen=True, slots=True)
class Filled:
    """A cache of random keys and values, in blocks that lie in no order."""

    keys: Tensor
    values: Tensor
    tables: Tensor
    lengths: Tensor
    num_bytes: int
    """Of what all sequences read."""

    def wide(self) -> tuple[Tensor, Tensor]:
        """Copies in float64, but of int8."""
        keys, values = (x.clone() if x.dtype == torch.int8 else x.double() for x in (self.keys, self.values))
        return keys, values


def _filled(setting: Setting, heads: Heads, contexts: list[int], cache: torch.dtype) -> Filled:
    needed = [-(-n // BLOCK_SIZE) for n in contexts]
    order = torch.randperm(sum(needed), dtype=torch.int32)
    tables = torch.zeros(len(contexts), max(needed), dtype=torch.int32)
    for table, begin, count in zip(tables, [0, *accumulate(needed)], needed, strict=False):
        table[:count] = order[begin : begin + count]
    shape = (len(order), BLOCK_SIZE, heads.key, attention.cache_row_size(heads.dim, cache, "cuda"))
    keys, values = (torch.zeros(shape, dtype=cache, device=setting.device) for _ in range(2))
    slots = torch.arange(len(order) * BLOCK_SIZE, device=setting.device)
    for begin in range(0, len(slots), 4096):
        k, v = torch.randn(2, len(slots[begin : begin + 4096]), heads.key, heads.dim, device=setting.device)
        attention.write_kv(k, v, keys, values, slots[begin : begin + 4096])
    lengths = torch.tensor(contexts, dtype=torch.int32, device=setting.device)
    return Filled(keys, values, tables.to(setting.device), lengths, 2 * sum(contexts) * keys[0, 0].nbytes)


def attention_over_a_cache(
    setting: Setting,
    dtype: torch.dtype,
    name: str,
    heads: Heads,
    rows: list[int],
    contexts: list[int],
    cache: torch.dtype | None = None,
) -> Case:
    """A step whose rows are in the cache already. None: the cache has `dtype`, too."""
    ops, filled = checked_backend(setting, dtype).ops, _filled(setting, heads, contexts, cache or dtype)
    q = torch.randn(sum(rows), heads.query, heads.dim, device=setting.device).to(dtype)
    starts = torch.tensor([0, *accumulate(rows)], dtype=torch.int32, device=setting.device)
    told = (filled.tables, starts, filled.lengths, heads.dim**-0.5)
    pairs = sum(n * (2 * context - n + 1) / 2 for n, context in zip(rows, contexts, strict=True))
    return Case(
        name,
        lambda: ops.paged_attention(q, filled.keys, filled.values, *told),
        lambda: attention.paged_attention(q.double(), *filled.wide(), *told),
        filled.num_bytes + 2 * q.nbytes,
        4 * heads.query * heads.dim * pairs if max(rows) > 8 else 0,  # few rows are bound by reading
        bar=2.0,
    )


def decode_alone(setting: Setting, dtype: torch.dtype, name: str, heads: Heads, contexts: list[int]) -> Case:
    """A step of decode as it is served: rotation, the write into the cache and attention over it."""
    ops, filled = checked_backend(setting, dtype).ops, _filled(setting, heads, contexts, dtype)
    count, device = len(contexts), setting.device
    joined = torch.randn(count, heads.query + 2 * heads.key, heads.dim, device=device).to(dtype)
    angles = torch.randn(count, heads.dim // 2, device=device)
    newest = filled.lengths.long() - 1
    slots = filled.tables[torch.arange(count, device=device), newest // BLOCK_SIZE] * BLOCK_SIZE + newest % BLOCK_SIZE
    starts = torch.arange(count + 1, dtype=torch.int32, device=device)
    tables, told = (angles.cos(), angles.sin()), (slots, filled.tables, starts, filled.lengths, heads.dim**-0.5)

    def attend(ops: Ops, joined: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q, k, v = torch.split(joined, [heads.query, heads.key, heads.key], dim=1)
        return ops.attend(q, k, v, *tables, keys, values, *told)

    return Case(
        name,
        lambda: attend(ops, joined, filled.keys, filled.values),
        lambda: attend(REFERENCE, joined.double(), *filled.wide()),
        filled.num_bytes + joined.nbytes,
        bar=2.0,
    )


def attention_of_pictures(
    setting: Setting, dtype: torch.dtype, name: str, lengths: list[int], heads: int, dim: int
) -> Case:
    ops = checked_backend(setting, dtype).ops
    qkv = torch.randn(sum(lengths), 3 * heads, dim, device=setting.device).to(dtype)
    q, k, v = torch.split(qkv, heads, dim=1)
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=setting.device)
    return Case(
        f"ViT attention, {name}",
        lambda: ops.varlen_attention(q, k, v, starts, dim**-0.5, 0),
        lambda: attention.varlen_attention(q.double(), k.double(), v.double(), starts, dim**-0.5),
        qkv.nbytes * 4 / 3,
        sum(4.0 * n * n * heads * dim for n in lengths),
        bar=1.6,
    )


def yardsticks(setting: Setting) -> Iterator[Check]:
    """torch's own attention over one picture of 1024^2, as cuDNN and FlashAttention 2 do it: what is to be beaten."""
    q, k, v = torch.randn(3, 16, 16, 5476, 80, device=setting.device, dtype=torch.bfloat16)
    floor = setting.ceilings.seconds(attention_flops=16 * 4.0 * 5476**2 * 16 * 80)

    def attend(backend: torch.nn.attention.SDPBackend) -> Row:
        try:
            with torch.nn.attention.sdpa_kernel(backend):
                seconds = setting.time(lambda: F.scaled_dot_product_attention(q, k, v), rounds=5)
        except RuntimeError as error:  # nothing of ours is wrong
            return Row(note=f"not to be had: {error}")
        return Row(seconds=seconds, floor=floor)

    for backend in (torch.nn.attention.SDPBackend.CUDNN_ATTENTION, torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        yield f"torch, {backend.name.lower()}, 16 of 1024^2", partial(attend, backend)

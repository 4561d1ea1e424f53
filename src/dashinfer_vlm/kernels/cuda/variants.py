"""What a served model asks of the kernels: one call for every variant that is compiled, on tensors without memory.

A variant that was not compiled before it is needed costs a second in the middle of service. So a start, the check of a
card and the tests walk this list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product as each
from itertools import starmap

import torch
from torch import Tensor

from dashinfer_vlm.kernels.choices import Choices
from dashinfer_vlm.kernels.cuda import (
    delta_variants,
    few_bits,
    fp8,
    gemv,
    narrow,
    paged,
    rotary,
    rows,
    sampling,
    segments,
    skinny,
    skinny_floats,
)
from dashinfer_vlm.kernels.cuda.decode import rope_and_attend
from dashinfer_vlm.kernels.cuda.delta_variants import DeltaSizes
from dashinfer_vlm.kernels.cuda.experts_variants import MIXTURES, calls
from dashinfer_vlm.kernels.grouped import GROUP, GroupedWeight
from dashinfer_vlm.kernels.head_norms import HeadNorms

__all__ = ["MIXTURES", "PUBLISHED", "Sizes", "Variant", "variants"]

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The sizes of a model that decide what is compiled."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int = 151_936
    turned: int | None = None
    """Channels of a head that turn; None for all."""
    norms_heads: bool = False
    gates_heads: bool = False
    delta_net: DeltaSizes | None = None
    """Of the layers without keys and values; None: there are none."""
    vit_width: int = 0
    """0 for a model without a ViT."""
    vit_inner: int = 0
    vit_heads: int = 1
    patch_dim: int = 1176


PUBLISHED = {
    "Qwen2-VL-2B": Sizes(
        hidden=1536, inner=8960, heads=12, kv_heads=2, head_dim=128, vit_width=1280, vit_inner=5120, vit_heads=16
    ),
    "Qwen2-VL-7B": Sizes(
        hidden=3584, inner=18944, heads=28, kv_heads=4, head_dim=128, vocab=152_064, vit_width=1280,
        vit_inner=5120, vit_heads=16,
    ),
    "Qwen3-VL-8B": Sizes(
        hidden=4096, inner=12288, heads=32, kv_heads=8, head_dim=128, norms_heads=True, vit_width=1152,
        vit_inner=4304, vit_heads=16, patch_dim=1536,
    ),
    "Qwen3.5-9B": Sizes(
        hidden=4096, inner=12288, heads=16, kv_heads=4, head_dim=256, turned=64, vocab=248_320, norms_heads=True,
        gates_heads=True, delta_net=DeltaSizes(key_heads=16, value_heads=32, dim=128), vit_width=1152,
        vit_inner=4304, vit_heads=16, patch_dim=1536,
    ),
}  # fmt: skip
"""Of the published models, those whose kernels differ: the ones of Qwen2.5-VL are Qwen2-VL's."""


@dataclass(frozen=True, slots=True)
class Variant:
    name: str
    call: Callable[[], object]


def variants(model: str, dtype: torch.dtype) -> Iterator[Variant]:
    """Calls for a model of `PUBLISHED`, or for the experts of one of `MIXTURES`, of 16-bit `dtype`, on tensors without
    memory: whoever replaced `launch.launch` before these modules were imported sees what is compiled."""
    meta = torch.device("meta")
    if model in MIXTURES:
        yield from starmap(Variant, calls(MIXTURES[model], dtype, meta))
        return
    sizes = PUBLISHED[model]
    yield from _text(sizes, dtype, meta)
    yield from _floats(sizes, dtype, meta)
    yield from _few_rows(sizes, dtype, meta)
    yield from _single(sizes, dtype, meta)
    yield from _choosing(sizes.vocab, meta)
    if sizes.delta_net:
        yield from (Variant(name, call) for name, call in delta_variants.calls(sizes.delta_net, dtype, meta))
    if sizes.vit_width:
        yield from _vit(sizes, dtype, meta)


def _text(s: Sizes, dtype: torch.dtype, device: torch.device) -> Iterator[Variant]:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    norms = HeadNorms(empty(s.head_dim), empty(s.head_dim), 1e-6) if s.norms_heads else None
    half = (s.turned or s.head_dim) // 2

    def heads(num_rows: int) -> tuple[Tensor, ...]:
        joined = empty(num_rows, s.heads + 2 * s.kv_heads, s.head_dim)
        return torch.split(joined, [s.heads, s.kv_heads, s.kv_heads], dim=1)

    def attend(queries: list[int], cache: torch.dtype, splits: int | None) -> Tensor:
        num_rows, num_sequences = sum(queries), len(queries)
        keys = empty(64, BLOCK_SIZE, s.kv_heads, s.head_dim + 16 * (cache == torch.int8), dtype=cache)
        starts, contexts = (empty(n, dtype=torch.int32) for n in (num_sequences + 1, num_sequences))
        tables = empty(num_sequences, 64, dtype=torch.int32)
        return paged.paged_attention(heads(num_rows)[0], keys, keys, tables, starts, contexts, 0.1, splits)

    def write(cache: torch.dtype, num_rows: int) -> None:
        keys = empty(64, BLOCK_SIZE, s.kv_heads, s.head_dim + 16 * (cache == torch.int8), dtype=cache)
        table = empty(num_rows, half, dtype=torch.float32)
        q, k, v = heads(num_rows)
        rotary.rope_write_kv(q, k, v, table, table, keys, keys, empty(num_rows, dtype=torch.int64), norms)

    def decode(num_rows: int, splits: int) -> Tensor:
        keys = empty(64, BLOCK_SIZE, s.kv_heads, s.head_dim)
        table = empty(num_rows, half, dtype=torch.float32)
        starts, contexts = (empty(n, dtype=torch.int32) for n in (num_rows + 1, num_rows))
        q, k, v = heads(num_rows)
        slots, blocks = empty(num_rows, dtype=torch.int64), empty(num_rows, 64, dtype=torch.int32)
        return rope_and_attend(q, k, v, table, table, keys, keys, slots, blocks, starts, contexts, 0.1, norms, splits)

    ids, table, is_item = empty(16, dtype=torch.int64), empty(64, s.hidden), empty(16, dtype=torch.bool)
    yield Variant("embed", lambda: rows.embed(ids, table, dtype))
    yield Variant("embed with pictures", lambda: rows.embed(ids, table, dtype, empty(16, s.hidden), is_item))
    yield Variant("rms_norm", lambda: rows.rms_norm(empty(16, s.hidden), empty(s.hidden), 1e-6))
    yield Variant(
        "mrope_cos_sin",
        lambda: rotary.mrope_cos_sin(
            empty(3, 16, dtype=torch.int64), empty(half, dtype=torch.float32), empty(half, dtype=torch.int64)
        ),
    )
    yield Variant("silu_mul", lambda: rows.silu_mul(empty(16, 2 * s.inner)))
    if s.gates_heads:
        yield Variant("gates", lambda: rows.sigmoid_mul(*(empty(16, s.heads, s.head_dim) for _ in range(2))))
    for cache in (dtype, torch.int8):
        kind = "int8" if cache == torch.int8 else "plain"
        yield Variant(f"rope_write_kv {kind}", partial(write, cache, 16))
        yield Variant(f"rope_write_kv of one row {kind}", partial(write, cache, 1))
        for splits, told in ((1, ""), (8, " in 8 splits")):
            yield Variant(f"few rows beside others{told} {kind}", partial(attend, [1] * 16 + [100], cache, splits))
        yield Variant(f"prefill {kind}", partial(attend, [512], cache, 1))
        yield Variant(f"long prefill {kind}", partial(attend, [8192], cache, 1))
    for num_rows, splits, told in ((1, 16, " of one row"), (16, 1, ""), (16, 8, " in 8 splits")):
        yield Variant(f"decode{told} plain", partial(decode, num_rows, splits))
        yield Variant(f"decode{told} int8", partial(attend, [1] * num_rows, torch.int8, splits))


def _floats(s: Sizes, dtype: torch.dtype, device: torch.device) -> Iterator[Variant]:
    """Layers of 8-bit floats."""
    x = torch.empty(1024, s.hidden, dtype=dtype, device=device)
    weight = torch.empty(s.hidden, s.hidden, dtype=torch.float8_e4m3fn, device=device)
    groups = -(-s.hidden // fp8.BLOCK)
    weight_scales = torch.empty(groups, groups, dtype=torch.float32, device=device)

    def product(num_rows: int) -> Tensor:
        numbers, scales = (
            torch.empty(num_rows, n, dtype=t, device=device)
            for n, t in ((s.hidden, weight.dtype), (groups, torch.float32))
        )
        return fp8.block_product(numbers, scales, weight, weight_scales, dtype)

    yield Variant("fp8 rows", lambda: fp8.quantise(x))
    yield Variant("fp8 rows of an MLP", lambda: fp8.quantise(torch.empty(16, s.inner, dtype=dtype, device=device)))
    yield Variant("fp8 groups", lambda: fp8.quantise(x, fp8.BLOCK))
    gains, wide = (torch.empty(*n, dtype=dtype, device=device) for n in ((s.hidden,), (16, 2 * s.inner)))
    for group, told in ((0, "rows"), (fp8.BLOCK, "groups")):
        yield Variant(f"fp8 {told} of a norm", partial(fp8.rms_norm, x, gains, 1e-6, group))
        yield Variant(f"fp8 {told} of silu_mul", partial(fp8.silu_mul, wide, group))

    def some(count: int, num_rows: int, depth: int, *, in_blocks: bool) -> Tensor:
        sides = [(-(-num_rows // fp8.BLOCK), -(-depth // fp8.BLOCK))] if in_blocks else [(num_rows, 1)]
        sides.append((count, sides[0][1]))
        of_weight, of_rows = (torch.empty(*side, dtype=torch.float32, device=device) for side in sides)
        numbers, matrix = (torch.empty(n, depth, dtype=weight.dtype, device=device) for n in (count, num_rows))
        residual = torch.empty(count, num_rows, dtype=dtype, device=device)
        return skinny_floats.product(numbers, of_rows, matrix, of_weight, dtype, None, residual)

    for (told, in_blocks), (name, count) in each(
        (("", False), (" in blocks", True)), (("row", 1), ("few rows", 16), ("some rows", 64))
    ):
        yield Variant(f"fp8 {name}{told}", partial(some, count, 2 * s.inner, s.hidden, in_blocks=in_blocks))
        if count == 1:
            yield Variant(f"fp8 {name} of an MLP{told}", partial(some, count, s.hidden, s.inner, in_blocks=in_blocks))
    yield Variant("fp8 product", lambda: product(1024))


def _few_rows(s: Sizes, dtype: torch.dtype, device: torch.device) -> Iterator[Variant]:
    """Products of few rows, with what rides in them."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    def weight(size: int, depth: int, bits: int, *, has_zeros: bool = False) -> GroupedWeight:
        groups = -(-depth // GROUP)
        kind, width = (torch.int8, groups * GROUP) if bits == 8 else (torch.uint8, groups * GROUP // 2)
        scales = empty(size, groups, dtype=torch.bfloat16)
        return GroupedWeight(empty(size, width, dtype=kind), scales, depth, bits, scales if has_zeros else None)

    queries = (s.heads + 2 * s.kv_heads) * s.head_dim
    for bits in (16, 8, 4):
        make = empty if bits == 16 else partial(weight, bits=bits)
        qkv, gate_up, down = make(queries, s.hidden), make(2 * s.inner, s.hidden), make(s.hidden, s.inner)
        out = make(s.hidden, s.heads * s.head_dim)
        for num_rows, told in ((16, "few"), (64, "some")):
            x, inner = empty(num_rows, s.hidden), empty(num_rows, s.inner)
            attended = empty(num_rows, s.heads * s.head_dim)
            yield Variant(f"{bits} bits, qkv of {told}", partial(skinny.product, x, qkv, empty(queries)))
            if isinstance(down, Tensor):
                splits = skinny.splits_to_leave(num_rows, down)
                yield Variant(f"16 bits, out of {told}", partial(skinny.product, attended, out, residual=x))
                yield Variant(f"16 bits, parts of {told}", partial(skinny.parts_of, inner, down, splits))
                parts = empty(splits, num_rows, s.hidden, dtype=torch.float32)
                yield Variant(f"norm of parts of {told}", partial(rows.add_rms_norm, x, parts, empty(s.hidden), 1e-6))
            yield Variant(f"{bits} bits, MLP of {told}", partial(skinny.product, x, gate_up, silu_mul=bits == 16))
            yield Variant(f"{bits} bits, down of {told}", partial(skinny.product, inner, down, residual=x))
    for bits in (8, 4):
        gate_up, qkv, down = (
            weight(*sides, bits) for sides in ((2 * s.inner, s.hidden), (queries, s.hidden), (s.hidden, s.inner))
        )
        yield Variant(f"{bits} bits, expanded", partial(few_bits.expand, weight(s.hidden, s.inner, bits), dtype))
        row, out = empty(1, s.hidden), weight(s.hidden, s.heads * s.head_dim, bits)
        of_row = partial(narrow.of_groups, row, gains=empty(s.hidden))
        yield Variant(f"{bits} bits, qkv of one row", partial(of_row, qkv, empty(queries)))
        yield Variant(f"{bits} bits, MLP of one row", partial(of_row, gate_up, silu_mul=True))
        attended, one_inner = empty(1, s.heads * s.head_dim), empty(1, s.inner)
        yield Variant(f"{bits} bits, out of one row", partial(narrow.of_groups, attended, out, residual=row))
        yield Variant(f"{bits} bits, down of one row", partial(narrow.of_groups, one_inner, down, residual=row))
    shifted_qkv, shifted_up, shifted_down = (
        weight(*sides, 4, has_zeros=True)
        for sides in ((queries, s.hidden), (2 * s.inner, s.hidden), (s.hidden, s.inner))
    )
    few, some = empty(16, s.hidden), empty(64, s.inner)
    yield Variant("4 bits and zeros, qkv of few", partial(skinny.product, few, shifted_qkv, empty(queries)))
    yield Variant("4 bits and zeros, down of some", partial(skinny.product, some, shifted_down))
    yield Variant("4 bits and zeros, MLP of one row", partial(of_row, shifted_up, silu_mul=True))
    yield Variant("4 bits and zeros, expanded", partial(few_bits.expand, shifted_down, dtype))
    head = weight(s.vocab, s.hidden, 8)
    yield Variant("8 bits, head of one row", partial(narrow.of_groups, empty(1, s.hidden), head, dtype=torch.float32))


def _single(s: Sizes, dtype: torch.dtype, device: torch.device) -> Iterator[Variant]:
    """Products of one row, with what rides in them."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    queries = (s.heads + 2 * s.kv_heads) * s.head_dim
    x, inner = empty(1, s.hidden), empty(1, s.inner)
    of_x = partial(gemv.product, x, gains=empty(s.hidden))
    yield Variant("one row, qkv", lambda: of_x(empty(queries, s.hidden), empty(queries)))
    yield Variant("one row, MLP", lambda: of_x(empty(2 * s.inner, s.hidden), silu_mul=True))
    yield Variant("one row, out", lambda: gemv.product(x, empty(s.hidden, s.hidden), residual=x))
    yield Variant("one row, down", lambda: gemv.product(inner, empty(s.hidden, s.inner), residual=x))


def _choosing(vocab: int, device: torch.device) -> Iterator[Variant]:
    def choose(num_entries: int, *, masked: bool) -> Tensor:
        def empty(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=device)

        names = ("temperature", "top_p", "min_p", "uniform", "repetition_penalty", "presence_penalty")
        columns = dict.fromkeys((*names, "frequency_penalty"), empty(torch.float32, 16))
        entries, starts = empty(torch.int32, num_entries), empty(torch.int32, 17)
        lists = {f"{name}_{part}": x for name in ("bias", "seen", "forbidden")
                 for part, x in (("starts", starts), ("ids", entries))}  # fmt: skip
        mask = empty(torch.int32, 16, -(-vocab // 32)) if masked else None
        choices = Choices(top_k=empty(torch.int32, 16), biases=empty(torch.float32, num_entries), seen_counts=entries,
                          mask=mask, **columns, **lists)  # fmt: skip
        return sampling.tokens_of(empty(torch.float32, 16, vocab), choices)

    yield Variant("choose", lambda: choose(0, masked=False))
    yield Variant("choose with penalties", lambda: choose(16, masked=False))
    yield Variant("choose by a mask", lambda: choose(0, masked=True))


def _vit(s: Sizes, dtype: torch.dtype, device: torch.device) -> Iterator[Variant]:
    dim = s.vit_width // s.vit_heads

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    def attend(num_segments: int) -> Tensor:
        q, k, v = torch.split(empty(1024, 3 * s.vit_heads, dim), s.vit_heads, dim=1)
        return segments.varlen_attention(q, k, v, empty(num_segments + 1, dtype=torch.int32), 0.1)

    table = empty(1024, dim // 2, dtype=torch.float32)
    x, weight, shift = empty(16, s.vit_width), empty(s.vit_width), empty(s.vit_width, dtype=torch.float32)
    yield Variant("ViT layer_norm", lambda: rows.layer_norm(x, weight, weight, 1e-6, shift=shift))
    yield Variant("ViT rms_norm", lambda: rows.rms_norm(x, weight, 1e-6, shift=shift))
    yield Variant("ViT quick_gelu", lambda: rows.quick_gelu(empty(16, s.vit_inner)))
    yield Variant(
        "ViT rope", lambda: rotary.rope(empty(1024, 3 * s.vit_heads, dim)[:, : 2 * s.vit_heads], table, table)
    )
    yield Variant("ViT attention in frames", lambda: attend(1))
    yield Variant("ViT attention in windows", lambda: attend(16))

"""Each kernel against its reference, and against what the device allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from itertools import product as each

import torch
from torch import Tensor
from torch.nn import functional as F

from card_checks.models import checked_backend
from card_checks.results import Check, Setting, error
from card_checks.rows import Row
from dashinfer_vlm.kernels.grouped import GroupedWeight
from dashinfer_vlm.layers import activation, attention, fp8, grouped, norm, rotary
from dashinfer_vlm.layers.ops import REFERENCE, Ops

BLOCK_SIZE = 16
BFLOAT16_ERROR = 1e-2


@dataclass(frozen=True, slots=True)
class Case:
    """One call of a kernel and what it should give."""

    name: str
    run: Callable[[], Tensor]
    want: Callable[[], Tensor]
    num_bytes: float = 0
    flops: float = 0
    """Of products in attention."""
    bar: float = 1.5
    allowed: float = 0
    """Error beyond which it is wrong, where the type's own is less."""


@dataclass(frozen=True, slots=True)
class Heads:
    query: int
    key: int
    dim: int


def check(setting: Setting) -> Iterator[Check]:
    """Small and odd sizes, every type, against float64; `measure` rehearses with bfloat16."""
    for dtype in (torch.float32,) if setting.tiny else (torch.bfloat16, torch.float32, torch.float16):
        for case in cases(setting, dtype, small=True):
            yield (
                f"{case.name} {_short(dtype)}",
                partial(_right, case, 1e-5 if dtype == torch.float32 else BFLOAT16_ERROR),
            )


def _right(case: Case, allowed: float) -> Row:
    return Row(error=error(case.run(), case.want()), allowed=max(allowed, case.allowed))


def measure(setting: Setting) -> Iterator[Check]:
    """Sizes of service in bfloat16."""
    for case in cases(setting, torch.bfloat16, small=setting.tiny):
        yield case.name, partial(_timed, setting, case)
    if not setting.tiny:
        yield from _yardsticks(setting)


def _timed(setting: Setting, case: Case) -> Row:
    floor = setting.ceilings.seconds(num_bytes=case.num_bytes, attention_flops=case.flops)
    return Row(seconds=setting.time(case.run, as_graph=True), floor=floor, bar=case.bar)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cases(setting: Setting, dtype: torch.dtype, *, small: bool) -> Iterator[Case]:
    torch.manual_seed(0)
    ops = checked_backend(setting, dtype).ops
    yield from _rows(setting, ops, dtype, 5 if small else 8192, 33 if small else 3584)
    heads = Heads(6, 2, 32) if small else Heads(28, 4, 128)
    for name, rows, contexts in _steps(small):
        for cache in (dtype, torch.int8):
            yield attention_over_a_cache(setting, dtype, f"{name} over {_short(cache)}", heads, rows, contexts, cache)
    for count, context in ((1, 300), (3, 70)) if small else ((1, 1024), (64, 1024)):
        yield decode_alone(setting, dtype, f"decode with its rotation, {count} of {context}", heads, [context] * count)
    if dtype != torch.float32:
        yield from _patches(setting, dtype, small=small)
    yield from _single(setting, dtype, small=small)
    yield from _some(setting, dtype, small=small)
    if small:
        yield attention_of_pictures(setting, dtype, "frames", [37, 1, 64, 5], 2, 80)
        yield attention_of_pictures(setting, dtype, "heads of 72", [30, 9], 2, 72)
        for dim in (80, 72, 64):
            yield attention_of_pictures(setting, dtype, f"tall frames, heads of {dim}", [300, 129, 192], 2, dim)
        yield from _floats(setting, dtype, small=True)
    else:
        yield from _floats(setting, dtype, small=False)
        yield attention_of_pictures(setting, dtype, "16 pictures of 1024^2", [5476] * 16, 16, 80)
        yield attention_of_pictures(setting, dtype, "heads of 72", [4096] * 16, 16, 72)
        yield attention_of_pictures(setting, dtype, "windows", [64] * 1369, 16, 80)


def _patches(setting: Setting, dtype: torch.dtype, *, small: bool) -> Iterator[Case]:
    """A ViT's first layer, from patches as long as those of Qwen2-VL and of Qwen3-VL."""
    from dashinfer_vlm.kernels.cuda import patches as kernels  # triton reads the environment when it is imported

    for depth in (1176, 1536):
        count, size = (300, 200) if small else (21904, 1280)
        patches = torch.randint(0, 256, (count, depth), dtype=torch.uint8, device=setting.device)
        weight, bias = (torch.randn(*shape, device=setting.device) for shape in ((size, depth), (size,)))
        halves = kernels.two_halves(weight)
        yield Case(
            f"patches of {depth} bytes",
            partial(kernels.embed_patches, patches, halves, bias, dtype),
            partial(F.linear, patches.double(), weight.double(), bias.double()),
            patches.nbytes + 2 * count * size,
            2 * 2 * count * size * depth,
            bar=2.0,
        )


def _single(setting: Setting, dtype: torch.dtype, *, small: bool) -> Iterator[Case]:
    """A row by itself, with all that rides in its product."""
    from dashinfer_vlm.kernels.cuda import gemv  # triton reads the environment when it is imported

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=setting.device).to(dtype) / shape[-1] ** 0.5

    for name, size, depth in (("MLP", 66, 200), ("down", 37, 9000)) if small else (("MLP", 17920, 1536),):
        x, weight, gains, bias = random(1, depth), random(size, depth), random(depth), random(size)
        is_gated = name == "MLP"
        residual = random(1, size // 2 if is_gated else size)

        def want(x=x, weight=weight, gains=gains, bias=bias, residual=residual, is_gated=is_gated) -> Tensor:
            y = norm.rms_norm(x.double(), gains.double(), 1e-6) if is_gated else x.double()
            y = F.linear(y, weight.double(), bias.double())
            return (activation.silu_mul(y) if is_gated else y) + residual.double()

        run = partial(
            gemv.product, x, weight, bias, gains=gains if is_gated else None, eps=1e-6, silu_mul=is_gated,
            residual=residual,
        )  # fmt: skip
        yield Case(f"one row of {name}", run, want, weight.nbytes, bar=1.4)
        yield from _narrow(setting, name, x, weight, residual, is_gated=is_gated)


def _narrow(
    setting: Setting, name: str, x: Tensor, weight: Tensor, residual: Tensor, *, is_gated: bool
) -> Iterator[Case]:
    """The same of 8 and 4 bits, and of 8-bit floats, which nothing but the residual rides in."""
    from dashinfer_vlm.kernels.cuda import narrow  # triton reads the environment when it is imported

    for bits in (8, 4):
        few = grouped.rounded(weight, bits)

        def want(few: GroupedWeight = few) -> Tensor:
            y = F.linear(x.double(), grouped.expand(few, torch.float64))
            return (activation.silu_mul(y) if is_gated else y) + residual.double()

        run = partial(narrow.of_groups, x, few, silu_mul=is_gated, residual=residual)
        yield Case(f"one row of {name} in {bits} bits", run, want, few.numbers.nbytes + few.scales.nbytes, bar=1.6)
    if not setting.multiplies_floats_of_8_bits or is_gated:
        return
    (numbers, scales), (row, of_row) = fp8.quantise(weight), fp8.quantise(x)
    yield Case(
        f"one row of {name} in 8-bit floats",
        partial(narrow.of_floats, row, of_row, numbers, scales, x.dtype, None, residual),
        lambda: F.linear(row.double() * of_row, numbers.double() * scales) + residual.double(),
        numbers.nbytes,
        bar=1.6,
    )


def _some(setting: Setting, dtype: torch.dtype, *, small: bool) -> Iterator[Case]:
    """Few rows, in every layout of the weight, with what rides in their product; columns shared where rows are few."""
    from dashinfer_vlm.kernels.cuda import skinny  # triton reads the environment when it is imported

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=setting.device).to(dtype) / shape[-1] ** 0.5

    counts, layers = (
        ((3, 37), (("MLP", 136, 264), ("down", 72, 1032))) if small else ((8, 64), (("down", 3584, 18944),))
    )
    for (name, size, depth), count in each(layers, counts):
        x, weight, bias, is_gated = random(count, depth), random(size, depth), random(size), name == "MLP"
        residual = random(count, size // 2 if is_gated else size)
        for bits in (16,) if is_gated else (16, 8, 4):
            few = weight if bits == 16 else grouped.rounded(weight, bits)

            def want(few=few, x=x, bias=bias, residual=residual, is_gated=is_gated) -> Tensor:
                wide = few.double() if isinstance(few, Tensor) else grouped.expand(few, torch.float64)
                y = F.linear(x.double(), wide, bias.double())
                return (activation.silu_mul(y) if is_gated else y) + residual.double()

            run = partial(skinny.product, x, few, bias, silu_mul=is_gated, residual=residual)
            moved = few.nbytes if isinstance(few, Tensor) else few.numbers.nbytes + few.scales.nbytes
            yield Case(f"{count} rows of {name} in {bits} bits", run, want, moved, bar=1.3)


def _floats(setting: Setting, dtype: torch.dtype, *, small: bool) -> Iterator[Case]:
    """Products in 8-bit floats with a scale per block; those of few rows are bound by reading the weight."""
    if not setting.multiplies_floats_of_8_bits:
        return
    from dashinfer_vlm.kernels.cuda import fp8 as kernels  # triton reads the environment when it is imported

    yield from _some_floats(setting, dtype, small=small)
    size, depth = (130, 200) if small else (3584, 18944)
    weight = torch.randn(size, depth, device=setting.device).to(torch.float8_e4m3fn)
    of_blocks = torch.rand(-(-size // fp8.BLOCK), -(-depth // fp8.BLOCK), device=setting.device)
    for num_rows in (3, 20) if small else (16,):
        x, scales = fp8.quantise(torch.randn(num_rows, depth, device=setting.device), fp8.BLOCK)
        yield Case(
            f"fp8 product of {num_rows} rows",
            partial(kernels.block_product, x, scales, weight, of_blocks, dtype),
            partial(fp8.block_product, x, scales, weight, of_blocks, torch.float64),
            weight.nbytes + x.nbytes,
            allowed=1e-3,  # a card adds products of 8-bit floats with fewer bits than float32 has: 1.2e-4 on an H200
        )


def _some_floats(setting: Setting, dtype: torch.dtype, *, small: bool) -> Iterator[Case]:
    """Few rows of 8-bit floats, with a scale per row."""
    from dashinfer_vlm.kernels.cuda import skinny_floats  # triton reads the environment when it is imported

    size, depth = (130, 1040) if small else (3584, 18944)
    weight, of_weight = fp8.quantise(torch.randn(size, depth, device=setting.device))
    for count in (3, 37) if small else (8, 64):
        x, scales = fp8.quantise(torch.randn(count, depth, device=setting.device))
        residual = torch.randn(count, size, device=setting.device).to(dtype)

        def want(x=x, scales=scales, residual=residual) -> Tensor:
            return F.linear(x.double() * scales, weight.double() * of_weight) + residual.double()

        run = partial(skinny_floats.product, x, scales, weight, of_weight, dtype, None, residual)
        yield Case(f"{count} rows in 8-bit floats", run, want, weight.nbytes, bar=1.3, allowed=1e-3)


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


def _rows(setting: Setting, ops: Ops, dtype: torch.dtype, num_rows: int, size: int) -> Iterator[Case]:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=setting.device).to(dtype)

    x, weight, bias = random(num_rows, size), random(size), random(size)
    shift = torch.randn(size, device=setting.device)
    moved = 2 * x.nbytes
    yield Case(
        "rms_norm",
        lambda: ops.rms_norm(x, weight, 1e-6),
        lambda: norm.rms_norm(x.double(), weight.double(), 1e-6),
        moved,
    )
    yield Case(
        "layer_norm",
        lambda: ops.layer_norm(x, weight, bias, 1e-6, shift=shift),
        lambda: norm.layer_norm(x.double(), weight.double(), bias.double(), 1e-6, shift=shift),
        moved,
    )
    heads, dim = (3, 16) if num_rows < 100 else (32, 80)
    turned, angles = random(num_rows, heads, dim), torch.randn(num_rows, dim // 2, device=setting.device)
    cos, sin = angles.cos(), angles.sin()

    def rotate(function: Callable[[Tensor, Tensor, Tensor], None], values: Tensor) -> Tensor:
        function(values, cos, sin)
        return values

    yield Case(
        "rope and a copy",
        lambda: rotate(ops.rope, turned.clone()),
        lambda: rotate(rotary.rope, turned.double()),
        4 * turned.nbytes,
    )
    from dashinfer_vlm.kernels.cuda import rows as row_kernels  # triton reads the environment when it is imported

    wide = random(num_rows, 2 * size)
    yield Case(
        "silu_mul", lambda: row_kernels.silu_mul(wide), lambda: activation.silu_mul(wide.double()), 1.5 * wide.nbytes
    )


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


def _yardsticks(setting: Setting) -> Iterator[Check]:
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

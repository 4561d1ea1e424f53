"""A whole layer in one call is what its parts make one after the other, to the bit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from dashinfer_vlm.kernels import cpu_ops
from dashinfer_vlm.kernels.decoder_layer import DecoderLayer
from tests.kernels.test_attention import random_cache

pytestmark = pytest.mark.usefixtures("level")

HIDDEN, HEADS, KV_HEADS, DIM, INNER, EPS = 48, 6, 2, 16, 40, 1e-6
BLOCK_SIZE, NUM_BLOCKS = 4, 12


def packed(rows: int, depth: int, kind: str, *, gate_up: bool = False) -> cpu_ops.PackedWeight:
    weight = torch.randn(rows, depth) / depth**0.5
    match kind:
        case "int8":
            return cpu_ops.pack_linear_int8(weight, gate_up=gate_up)
        case "int4":
            return cpu_ops.pack_linear_int4(weight, 32, gate_up=gate_up)
        case _:
            return cpu_ops.pack_linear(weight.to(getattr(torch, kind)), gate_up=gate_up)


def parts(kind: str, *, is_qwen3: bool) -> dict[str, Any]:
    """Random ones, with a bias as Qwen2 or with norms of the heads as Qwen3."""
    return {
        "norms": (torch.rand(HIDDEN), torch.rand(HIDDEN)),
        "qkv": packed((HEADS + 2 * KV_HEADS) * DIM, HIDDEN, kind),
        "qkv_bias": None if is_qwen3 else torch.randn((HEADS + 2 * KV_HEADS) * DIM),
        "head_norms": (torch.rand(DIM), torch.rand(DIM)) if is_qwen3 else None,
        "out": packed(HIDDEN, HEADS * DIM, kind),
        "gate_up": packed(2 * INNER, HIDDEN, kind, gate_up=True),
        "down": packed(HIDDEN, INNER, kind),
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "eps": EPS,
    }


@dataclass(frozen=True, slots=True)
class Step:
    """Sequences of given query counts and contexts, in blocks that lie one after the other."""

    queries: list[int]
    contexts: list[int]
    cache_dtype: torch.dtype
    caches: tuple[Tensor, Tensor] = field(init=False)
    tables: tuple[Tensor, Tensor] = field(init=False)
    """Of cosines and sines; any numbers do."""

    def __post_init__(self) -> None:
        keys, values = random_cache((2, NUM_BLOCKS, BLOCK_SIZE, KV_HEADS, DIM), self.cache_dtype)
        object.__setattr__(self, "caches", (keys, values))
        object.__setattr__(self, "tables", tuple(torch.randn(2, sum(self.queries), DIM // 2)))

    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Slots, block tables, starts of the queries, contexts."""
        width = NUM_BLOCKS // len(self.queries)
        tables = torch.arange(NUM_BLOCKS, dtype=torch.int32).view(len(self.queries), width)
        pairs = enumerate(zip(self.queries, self.contexts, strict=True))
        slots = [s * width * BLOCK_SIZE + at for s, (n, length) in pairs for at in range(length - n, length)]
        starts = torch.tensor([0, *self.queries]).cumsum(0).int()
        return torch.tensor(slots, dtype=torch.int64), tables, starts, torch.tensor(self.contexts).int()


def one_after_the_other(x: Tensor, p: dict[str, Any], step: Step, caches: tuple[Tensor, Tensor]) -> Tensor:
    slots, tables, starts, contexts = step.batch()
    joined = cpu_ops.linear(cpu_ops.rms_norm(x, p["norms"][0], EPS), p["qkv"], p["qkv_bias"])
    q, k, v = (
        part.contiguous() for part in joined.view(len(x), -1, DIM).split_with_sizes([HEADS, KV_HEADS, KV_HEADS], 1)
    )
    for rows, gains in zip((q, k), p["head_norms"] or (), strict=False):
        cpu_ops.rms_norm(rows.flatten(0, 1), gains, EPS, rows.flatten(0, 1))
    cpu_ops.rope_write_kv(q, k, v, *step.tables, *caches, slots)
    attended = cpu_ops.paged_attention(q, *caches, tables, starts, contexts, DIM**-0.5).flatten(1)
    x = cpu_ops.linear(attended, p["out"], epilogue="residual", residual=x)
    inner = cpu_ops.linear(cpu_ops.rms_norm(x, p["norms"][1], EPS), p["gate_up"], epilogue="silu_mul")
    return cpu_ops.linear(inner, p["down"], epilogue="residual", residual=x)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("kind", ["bfloat16", "float32", "int8", "int4"])
@pytest.mark.parametrize("is_qwen3", [False, True])
@pytest.mark.parametrize(("queries", "contexts"), [([1], [1]), ([1, 1, 1], [9, 1, 16]), ([13, 1], [20, 7])])
def test_a_layer_is_its_parts(
    queries: list[int], contexts: list[int], is_qwen3: bool, kind: str, cache_dtype: torch.dtype
) -> None:
    p, step = parts(kind, is_qwen3=is_qwen3), Step(queries, contexts, cache_dtype)
    x, caches = torch.randn(sum(queries), HIDDEN), tuple(cache.clone() for cache in step.caches)
    want = one_after_the_other(x, p, step, (caches[0], caches[1]))
    DecoderLayer(**p).forward(x, *step.tables, *step.caches, *step.batch())
    assert torch.equal(x, want)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(step.caches, caches, strict=True))


def test_no_rows_change_nothing() -> None:
    step = Step([0], [0], torch.float32)
    before = step.caches[0].clone()
    DecoderLayer(**parts("int8", is_qwen3=False)).forward(
        torch.empty(0, HIDDEN), *step.tables, *step.caches, *step.batch()
    )
    assert torch.equal(step.caches[0], before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 7}, "qkv: is not of so many heads"),
        ({"norms": (torch.rand(HIDDEN), torch.rand(HIDDEN + 1))}, r"norm2.*\[49\]"),
        ({"qkv_bias": torch.rand(3)}, "qkv_bias"),
        ({"head_norms": (torch.rand(DIM), None)}, "q_norm, k_norm: both or neither"),
        ({"out": lambda: packed(HIDDEN, 32, "int8")}, "out: does not fit qkv"),
        ({"gate_up": lambda: packed(2 * INNER, HIDDEN, "int8")}, "gate_up: does not fit qkv"),
        ({"down": lambda: packed(HIDDEN, 32, "int8")}, "down: does not fit gate_up"),
    ],
)
def test_parts_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    changed = {name: part() if callable(part) else part for name, part in change.items()}
    with pytest.raises(ValueError, match=message):
        DecoderLayer(**{**parts("int8", is_qwen3=False), **changed})


def test_a_step_that_does_not_fit_is_named() -> None:
    layer, step = DecoderLayer(**parts("int8", is_qwen3=False)), Step([2], [3], torch.float32)
    slots, tables, starts, contexts = step.batch()
    x = torch.randn(2, HIDDEN)
    keys, values = random_cache((2, NUM_BLOCKS, BLOCK_SIZE, 1, DIM), torch.float32)
    with pytest.raises(ValueError, match="k_cache: expected rows of 2 heads of 16"):
        layer.forward(x, *step.tables, keys, values, slots, tables, starts, contexts)
    with pytest.raises(ValueError, match="slots: 48 of token 0"):
        layer.forward(x, *step.tables, *step.caches, slots + 47, tables, starts, contexts)
    with pytest.raises(ValueError, match="block_tables: sequence 0: block 12"):
        layer.forward(x, *step.tables, *step.caches, slots, tables + 12, starts, contexts)
    with pytest.raises(ValueError, match="x: expected"):
        layer.forward(x[:, :5], *step.tables, *step.caches, slots, tables, starts, contexts)

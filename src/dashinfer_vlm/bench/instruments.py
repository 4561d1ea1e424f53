"""Puts spans around the parts of an engine: layers through the backend that makes them, the rest by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import torch

from dashinfer_vlm.bench.spans import Spans, replaced
from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.encoders.cache import EmbeddingCache
from dashinfer_vlm.engine import engine as engine_module
from dashinfer_vlm.engine.cards.calls import Followers
from dashinfer_vlm.engine.engine import Engine
from dashinfer_vlm.engine.runner import Runner
from dashinfer_vlm.kernels.cpu_ops import PackedWeight
from dashinfer_vlm.layers.activation import Epilogue
from dashinfer_vlm.layers.backend import Backend, LinearFactory
from dashinfer_vlm.layers.linear import Linear, Matrix
from dashinfer_vlm.layers.ops import Ops
from dashinfer_vlm.layers.patches import Patches
from dashinfer_vlm.models import loading
from dashinfer_vlm.models.base import KVCache, Model

__all__ = ["instrument", "instrumented_loading"]

_CHOICE = "choose_backend"
"""Where loading asks how the layers will compute."""
_SHAPE = "NxK"
_NAMES = {
    "rms_norm": "norm",
    "layer_norm": "norm",
    "rope": "rope",
    "rope_write_kv": "rope, KV write",
    "paged_attention": "attention",
    "varlen_attention": "attention",
}
"""What an operation is called in the tables; another one goes by its own name."""


@contextmanager
def instrumented_loading(spans: Spans) -> Iterator[None]:
    """Models that are loaded within the block report their layers to `spans`, for as long as they live. Steps compute
    while they are started, on a card too: a graph has no parts."""
    choose: Callable[..., Backend] = getattr(loading, _CHOICE)

    def choose_instrumented(*args: Any) -> Backend:
        return _instrumented(choose(*args), spans)

    def plain_runner(
        model: Model, kv: KVCache, embeddings: EmbeddingCache, config: EngineConfig, followers: Followers | None
    ) -> Runner:
        assert followers is None  # LatencyBench.validate
        return Runner(model, kv, embeddings)

    with replaced(loading, _CHOICE, choose_instrumented), replaced(engine_module, "make_runner", plain_runner):
        yield


@contextmanager
def instrument(engine: Engine, spans: Spans) -> Iterator[None]:
    """The rooms of `engine` report to `spans` within the block."""
    encoder = engine.model.encoder
    assert isinstance(engine.runner, Runner), engine.runner
    with ExitStack() as stack:
        for owner, name, part in (
            (engine.scheduler, "schedule", "scheduling"),
            (engine.runner, "batch", "batch of the step"),
            (engine.model, "forward", "model, other"),
            (engine.runner.sampler, "sample", "sampling"),
            *((encoder, verb, "encoder, other") for verb in ("begin", "run", "finish") if encoder is not None),
        ):
            stack.enter_context(replaced(owner, name, spans.timed(part, getattr(owner, name))))
        yield


def _instrumented(backend: Backend, spans: Spans) -> Backend:
    def timed_factory(make: LinearFactory, name: str) -> LinearFactory:
        def make_timed(weight: Matrix, bias: torch.Tensor | None, epilogue: Epilogue) -> Linear:
            return _TimedLinear(make(weight, bias, epilogue), spans, name, weight, backend.weight_dtype)

        return make_timed

    def make_patches(weight: torch.Tensor, bias: torch.Tensor) -> Patches:
        return spans.timed("patch embedding", backend.make_patches(weight, bias).__call__)

    parts = replace(backend.ops, rope_and_attend=None)
    ops = {f.name: getattr(parts, f.name) for f in fields(Ops)}
    timed = {name: _timed_op(name, op, spans) for name, op in ops.items() if op is not None}
    return replace(
        backend,
        make_linear=timed_factory(backend.make_linear, f"linear {_SHAPE}"),
        make_head=timed_factory(backend.make_head or backend.make_linear, "head"),
        make_patches=make_patches,
        ops=replace(parts, **timed),
    )


class _TimedLinear:
    def __init__(self, linear: Linear, spans: Spans, name: str, weight: Matrix, dtype: torch.dtype) -> None:
        """In `name` stands `_SHAPE` for that of `weight`; integers that it is rounded to are named behind it. `dtype`
        is that of whole weights."""
        packed = getattr(linear, "packed", None)
        rounded_to, num_bytes = "", weight.num_rows * weight.depth * dtype.itemsize
        if isinstance(packed, PackedWeight):
            kind, num_bytes = packed.shape.type, packed.num_bytes
            rounded_to = f" {kind}" if kind.startswith("int") else ""
        self.linear = linear
        self.spans = spans
        self.name = name.replace(_SHAPE, f"{weight.num_rows}x{weight.depth}") + rounded_to
        self.num_bytes = num_bytes
        self.num_flops = 2 * weight.num_rows * weight.depth

    def __call__(
        self, x: torch.Tensor, *, residual: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        with self.spans.span(self.name, self.num_bytes, self.num_flops * len(x)):
            return self.linear(x, residual=residual, out=out)


def _timed_op(name: str, op: Callable[..., Any], spans: Spans) -> Callable[..., Any]:
    count = _COSTS.get(name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        cost = (0.0, 0.0)
        if count is not None:
            with spans.span("measuring"):
                cost = count(*args)
        with spans.span(_NAMES.get(name, name), *cost):
            return op(*args, **kwargs)

    return wrapper


def _paged_cost(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tables: torch.Tensor, starts: torch.Tensor,
    lens: torch.Tensor, scale: float,
) -> tuple[float, float]:  # fmt: skip
    """Bytes of K and V in the contexts, and operations of both products under the causal mask."""
    contexts: list[int] = lens.tolist()
    queries = [stop - start for start, stop in pairwise(starts.tolist())]
    pairs = sum(n * (context - (n - 1) / 2) for n, context in zip(queries, contexts, strict=True))
    slot_bytes = 2 * keys.shape[2] * keys.shape[3] * keys.element_size()
    return slot_bytes * sum(contexts), 4 * q.shape[1] * q.shape[2] * pairs


def _varlen_cost(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, scale: float, first: int, *_: object
) -> tuple[float, float]:
    last = first + len(q)
    pairs = sum(
        max(0, min(stop, last) - max(start, first)) * (stop - start) for start, stop in pairwise(starts.tolist())
    )
    return (q.numel() + 2.0 * k.numel()) * q.element_size(), 4 * q.shape[1] * q.shape[2] * pairs


_COSTS: dict[str, Callable[..., tuple[float, float]]] = {
    "paged_attention": _paged_cost,
    "varlen_attention": _varlen_cost,
}

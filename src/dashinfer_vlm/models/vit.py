"""What ViTs are put together from: packing, patch embedding, norms, attention, MLPs and merger, and the three verbs.

A family names its parts: `PackedVit(config, backend, embed=..., blocks=[VitBlock(...), ...], merger=..., layout=...)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import torch
from torch.nn import functional as F

from dashinfer_vlm.layers.activation import Epilogue
from dashinfer_vlm.layers.backend import Backend
from dashinfer_vlm.layers.linear import Linear, padded
from dashinfer_vlm.layers.memory import sent
from dashinfer_vlm.layers.rotary import inverse_frequencies, vision_cos_sin
from dashinfer_vlm.models.base import EncoderState
from dashinfer_vlm.models.config import VisionConfig
from dashinfer_vlm.models.vit_embed import PatchEmbedding, PositionTable, Taps
from dashinfer_vlm.models.vit_layout import Layout, PatchLayout, patch_positions
from dashinfer_vlm.models.vit_norms import Norm
from dashinfer_vlm.models.weights import Weights
from dashinfer_vlm.request import Grid

__all__ = [
    "GatedMlp",
    "Mlp",
    "PackedVit",
    "PatchMerger",
    "VitBlock",
    "VitState",
    "take_linear",
]

CPU_SLICE_FLOPS = 6e9
"""Work of one slice on a CPU, where streams wait for it: some 40 ms without and 2 ms with matrix units. On a card a
slice is a whole phase of a block."""
MIN_SLICE_ROWS = 128
"""Rows of a slice at least: with fewer, reading the weights costs more than the products."""


@dataclass(slots=True)
class VitState:
    """A packed batch between two slices."""

    hidden: torch.Tensor
    """[P, width]."""
    cos: torch.Tensor
    sin: torch.Tensor
    layout: PatchLayout
    num_tokens: list[int]
    """Tokens of each item after merging."""
    merged: torch.Tensor
    """[tokens, columns of all mergers], in the order of the rows."""
    taps: Taps | None = None
    """Where each patch looks in the table of positions."""
    slice_flops: float = float("inf")
    """Operations of one slice, about."""
    slices: Iterator[None] = field(default_factory=lambda: iter(()))
    """The work that is left: each `next` does one slice of it."""
    done: bool = False


class VitMlp(Protocol):
    """[P, width] -> [P, width]; `residual` is added, the result goes into `out`."""

    num_weights: int
    """Two operations each per row."""
    left_out: torch.Tensor
    """See `take_onto_stream`."""

    def __call__(self, x: torch.Tensor, *, residual: torch.Tensor, out: torch.Tensor) -> torch.Tensor: ...


class Mlp:
    """Two biased layers with an activation between them. Takes `{names[0]}.*` and `{names[1]}.*`."""

    def __init__(
        self, names: tuple[str, str], width: int, inner: int, weights: Weights, backend: Backend, *, act: Epilogue
    ) -> None:
        self.up = take_linear(names[0], width, inner, weights, backend, epilogue=act)
        self.down, self.left_out = take_onto_stream(names[1], inner, width, weights, backend)
        self.num_weights = 2 * width * inner

    def __call__(self, x: torch.Tensor, *, residual: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x), residual=residual, out=out)


class GatedMlp:
    """down(silu(gate x) * up x), all biased. Takes `{prefix}.*_proj.*`."""

    def __init__(self, prefix: str, width: int, inner: int, weights: Weights, backend: Backend) -> None:
        names = tuple(f"{prefix}.{x}_proj" for x in ("gate", "up"))
        gate_up = weights.matrix({f"{name}.weight": inner for name in names}, width)
        bias = weights.join(tuple(f"{name}.bias" for name in names), (inner, inner))
        padding = -inner % backend.channel_unit  # the published ViT of Qwen2.5-VL has 3,420 channels
        gate_up = padded(gate_up, parts=2, rows=inner + padding)
        bias = F.pad(bias.view(2, inner), (0, padding)).flatten()
        self.gate_up = backend.linear(gate_up, bias, epilogue="silu_mul")
        self.down, self.left_out = take_onto_stream(
            f"{prefix}.down_proj", inner, width, weights, backend, depth=inner + padding
        )
        self.num_weights = 3 * width * inner

    def __call__(self, x: torch.Tensor, *, residual: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return self.down(self.gate_up(x), residual=residual, out=out)


class VitBlock:
    """One transformer block of a ViT: attention between all rows, the rest row by row. Takes `{prefix}.attn.*`."""

    def __init__(
        self,
        prefix: str,
        config: VisionConfig,
        weights: Weights,
        backend: Backend,
        *,
        norms: tuple[Norm, Norm],
        mlp: VitMlp,
        starts_index: int = 0,
    ) -> None:
        """`norms` come before attention and MLP; `starts_index` says which of the layout's segmentations the attention
        uses."""
        width = config.width
        self.ops = backend.ops
        self.width = width
        self.num_heads = config.num_heads
        self.head_dim = width // config.num_heads
        self.qkv = take_linear(f"{prefix}.attn.qkv", width, 3 * width, weights, backend)
        self.proj, self.left_out = take_onto_stream(f"{prefix}.attn.proj", width, width, weights, backend)
        self.norm1, self.norm2 = norms
        self.mlp = mlp
        self.starts_index = starts_index

    def shift_norms(self, lacking: torch.Tensor) -> torch.Tensor:
        """Have the norms add what the stream lacks, `lacking` [width] in front of this block; what it lacks behind."""
        self.norm1.shift = lacking
        self.norm2.shift = lacking + self.left_out
        return self.norm2.shift + self.mlp.left_out

    def slices(self, state: VitState) -> Iterator[None]:
        """Advance `state.hidden` by this block, one slice per `next`: rows through the projection, heads through the
        attention, rows through what is left. Rows are overwritten only when no other row needs them any more."""
        starts = state.layout.starts[self.starts_index]
        num_rows = len(state.hidden)
        heads = state.hidden.new_empty(num_rows, 3 * self.num_heads, self.head_dim)
        for rows in pieces(num_rows, 2 * 3 * self.width**2, MIN_SLICE_ROWS, state.slice_flops):
            self.qkv(self.norm1(state.hidden[rows]), out=heads[rows].view(-1, 3 * self.width))
            self.ops.rope(heads[rows, : 2 * self.num_heads], state.cos[rows], state.sin[rows])
            yield
        q, k, v = torch.split(heads, self.num_heads, dim=1)
        attended = torch.empty_like(q, memory_format=torch.contiguous_format)
        pairs = state.layout.pairs[self.starts_index]
        for rows, part in self._attention_pieces(pairs, num_rows, state.slice_flops):
            self.ops.varlen_attention(
                q[rows, part],
                k[:, part],
                v[:, part],
                starts,
                self.head_dim**-0.5,
                rows.start,
                attended[rows, part],
            )
            yield
        flat = attended.flatten(1)
        for rows in pieces(num_rows, 2 * (self.width**2 + self.mlp.num_weights), MIN_SLICE_ROWS, state.slice_flops):
            hidden = state.hidden[rows]
            self.proj(flat[rows], residual=hidden, out=hidden)
            self.mlp(self.norm2(hidden), residual=hidden, out=hidden)
            yield

    def _attention_pieces(self, pairs: int, num_rows: int, slice_flops: float) -> Iterator[tuple[slice, slice]]:
        """Queries and heads of each slice: whole heads, or parts of one head's queries where a head is too much."""
        per_head = 4.0 * self.head_dim * pairs
        for part in pieces(self.num_heads, per_head, 1, slice_flops):
            flops_per_row = per_head * (part.stop - part.start) / num_rows
            for rows in pieces(num_rows, flops_per_row, MIN_SLICE_ROWS, slice_flops):
                yield rows, part


def pieces(count: int, flops_each: float, at_least: int, slice_flops: float) -> Iterator[slice]:
    """Equal pieces of `count` things, each near `slice_flops` of work and not below `at_least` things."""
    num_pieces = min(max(1, count // at_least), max(1, round(count * flops_each / slice_flops)))
    size = -(-count // num_pieces)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def take_linear(
    name: str, inputs: int, outputs: int, weights: Weights, backend: Backend, *, epilogue: Epilogue = "none"
) -> Linear:
    """The biased linear layer `name`."""
    weight, bias = weights.matrix({f"{name}.weight": outputs}, inputs), weights.take(f"{name}.bias", outputs)
    return backend.linear(weight, bias, epilogue=epilogue)


def take_onto_stream(
    name: str, inputs: int, outputs: int, weights: Weights, backend: Backend, *, depth: int | None = None
) -> tuple[Linear, torch.Tensor]:
    """The biased linear layer `name`, padded to `depth` inputs, whose result is added to the residual stream, and what
    of its bias it leaves out: float32 [outputs], zero but where `backend` leaves out biases."""
    weight = padded(weights.matrix({f"{name}.weight": outputs}, inputs), depth=depth)
    bias = weights.take(f"{name}.bias", outputs).to(backend.device, torch.float32, copy=True)
    if backend.leaves_out_biases:
        return backend.linear(weight), bias
    return backend.linear(weight, bias), torch.zeros_like(bias)


class PatchMerger:
    """Norm of each row, or with `norm_group` of each group, of merge ** 2 neighbours, projected to the text model's
    width. Takes `{names[0]}.*` and `{names[1]}.*`."""

    def __init__(
        self,
        names: tuple[str, str],
        config: VisionConfig,
        weights: Weights,
        backend: Backend,
        *,
        norm: Norm,
        norm_group: bool = False,
    ) -> None:
        self.norm, self.norm_group = norm, norm_group
        self.group = config.merge_size**2
        self.inputs = config.width * self.group
        self.first = take_linear(names[0], self.inputs, self.inputs, weights, backend, epilogue="gelu")
        self.second = take_linear(names[1], self.inputs, config.out_size, weights, backend)
        self.flops_per_token = 2 * self.inputs * (self.inputs + config.out_size)

    def shift_norm(self, lacking: torch.Tensor) -> None:
        """Have the norm add what the stream lacks, `lacking` [width]."""
        self.norm.shift = lacking.repeat(self.group) if self.norm_group else lacking

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[group * tokens, width] -> [tokens, out_size]."""
        if self.norm_group:
            return self.second(self.first(self.norm(rows.view(-1, self.inputs))))
        return self.second(self.first(self.norm(rows).view(-1, self.inputs)))


class PackedVit:
    """A ViT in the verbs of `models.base.VisionEncoder`."""

    def __init__(
        self,
        config: VisionConfig,
        backend: Backend,
        *,
        embed: PatchEmbedding,
        blocks: Sequence[VitBlock],
        merger: PatchMerger,
        layout: Layout,
        table: PositionTable | None = None,
        deepstack: Mapping[int, PatchMerger] | None = None,
    ) -> None:
        """`table` is added to the embedded patches; a merger of `deepstack` makes further columns of the embeddings
        from what the block of its number gives."""
        self.config = config
        self.table, self.deepstack = table, deepstack or {}
        self.embedding_size = config.out_size * (1 + len(self.deepstack))
        self.backend = backend
        self.embed, self.blocks, self.merger, self.layout = embed, blocks, merger, layout
        self.width = config.width
        if backend.leaves_out_biases:
            self._shift_norms()
        self.slice_flops = CPU_SLICE_FLOPS if backend.device.type == "cpu" else float("inf")
        self.frequencies = inverse_frequencies(config.width // config.num_heads // 2, config.rope_theta, backend.device)

    def _shift_norms(self) -> None:
        lacking = torch.zeros(self.width, device=self.backend.device)
        for i, block in enumerate(self.blocks):
            lacking = block.shift_norms(lacking)
            if i in self.deepstack:
                self.deepstack[i].shift_norm(lacking)
        self.merger.shift_norm(lacking)

    @property
    def bytes_per_patch(self) -> int:
        """Rows of hidden states, projected heads, attention and its packed keys, and where slices are whole phases, of
        an MLP."""
        num_rows = 7 if self.backend.device.type == "cpu" else 16
        merged = len(self.deepstack) * self.config.out_size // self.merger.group
        return (num_rows * self.width + merged) * self.backend.activation_dtype.itemsize

    def begin(self, patches: Sequence[torch.Tensor], grids: Sequence[Grid]) -> VitState:
        """Pack uint8 [P_i, patch_dim] items; embedding them is the work of the first slices."""
        for item, (frames, rows, columns) in zip(patches, grids, strict=True):
            assert item.shape == (frames * rows * columns, self.config.patch_dim), (item.shape, frames, rows, columns)
        with torch.no_grad():
            layout = self.layout(grids)
            packed = torch.cat([item.to(self.backend.device) for item in patches])
            places = [patch_positions(grid, self.config.merge_size) for grid in grids]
            taps = None
            if self.table is not None:
                taps = Taps(*(self._ordered(x, layout.order) for x in self.table.taps(places, grids)))
            positions = torch.cat(places)
            cos, sin = vision_cos_sin(sent(positions, self.backend.device), self.frequencies)
            packed, cos, sin = (self._ordered(x, layout.order) for x in (packed, cos, sin))
            hidden = cos.new_empty(len(packed), self.width, dtype=self.backend.activation_dtype)
            group = self.config.merge_size**2
            num_tokens = [len(item) // group for item in patches]
            merged = hidden.new_empty(sum(num_tokens), self.embedding_size)
            state = VitState(hidden, cos, sin, layout, num_tokens, merged, taps, slice_flops=self.slice_flops)
            state.slices = self._slices(state, packed)
            return state

    def run(self, state: EncoderState, num_slices: int) -> None:
        """Advance `state` by up to `num_slices` slices."""
        assert isinstance(state, VitState)
        with torch.no_grad():
            for _ in islice(state.slices, num_slices):
                pass

    def finish(self, state: EncoderState) -> list[torch.Tensor]:
        """One [tokens_i, hidden] per item in the activations' type."""
        assert isinstance(state, VitState)
        assert state.done, "slices are left"
        state.slices = iter(())  # the last ones know the state, which would stay until Python looks for cycles
        with torch.no_grad():
            merged = state.merged
            if state.layout.order is not None:
                merged = torch.empty_like(merged).index_copy_(0, state.layout.order, merged)
            return list(torch.split(merged, state.num_tokens))

    def _slices(self, state: VitState, packed: torch.Tensor) -> Iterator[None]:
        for rows in pieces(len(packed), self.embed.flops_per_patch, MIN_SLICE_ROWS, state.slice_flops):
            state.hidden[rows] = self.embed(packed[rows])
            if self.table is not None and state.taps is not None:
                self.table.add(state.hidden[rows], state.taps, rows)
            yield
        del packed  # nobody else holds it
        column = self.config.out_size
        for i, block in enumerate(self.blocks):
            yield from block.slices(state)
            if i in self.deepstack:
                yield from self._merge(state, self.deepstack[i], column)
                column += self.config.out_size
        yield from self._merge(state, self.merger, 0, is_last=True)

    def _merge(self, state: VitState, merger: PatchMerger, column: int, *, is_last: bool = False) -> Iterator[None]:
        """The columns of the embeddings from `column` on."""
        num_tokens, at_least = len(state.merged), MIN_SLICE_ROWS // merger.group
        for part in pieces(num_tokens, merger.flops_per_token, at_least, state.slice_flops):
            group = state.hidden[part.start * merger.group : part.stop * merger.group]
            state.merged[part, column : column + self.config.out_size] = merger(group)
            state.done = is_last and part.stop == num_tokens
            yield

    def _ordered(self, x: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
        if order is None:
            return x
        return x.view(len(order), -1, x.shape[-1])[order].flatten(0, 1)

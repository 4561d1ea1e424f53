"""Checkpoints that are stored quantised: what `quantization_config` says, and how their numbers are read.

Weights of 8-bit floats are read as bfloat16, w = q * scale with the product in float32. Formats: Qwen's own `fp8`, with
a scale per block, row or tensor, and `compressed-tensors` in `float-quantized`. Those of integers: `models.packed`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dashinfer_vlm.models.packed import StoredIntegers, read_awq, read_compressed_integers, read_gptq
from dashinfer_vlm.models.section import Section

if TYPE_CHECKING:  # configurations are read without torch
    from collections.abc import Sequence

    import torch

__all__ = ["Stored", "StoredFloats", "read_stored"]


_EDGE = 128
"""Of the blocks that a card computes with as they are."""


@dataclass(frozen=True, slots=True)
class StoredFloats:
    """Matrices of 8-bit floats (e4m3) beside their scales; what has no scale is stored whole."""

    block: tuple[int, int] | None
    """Rows and columns of the blocks that share a scale; None: a scale per row, or one for the whole matrix."""

    def __str__(self) -> str:
        return "8-bit floats"

    def quant_type(self, device_type: str) -> str | None:
        """The `--quant-type` that computes with the numbers as they are stored."""
        return "fp8" if device_type == "cuda" else None

    scale_suffixes = (".weight_scale_inv", ".weight_scale")
    """How the scales of `X.weight` are called; both multiply."""
    ignored_suffixes = (".input_scale",)
    """Scales of activations, which are not rounded here."""

    def scale_shapes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Shapes that the scales of a matrix may have. Blocks at the lower and right edges may be cut off."""
        if self.block is None:
            return (shape[0], 1), (shape[0],), (1,), ()
        return (tuple(-(-size // edge) for size, edge in zip(shape, self.block, strict=True)),)

    def can_be_joined(self, shapes: Sequence[tuple[int, ...]], parts: Sequence[slice], columns: slice) -> bool:
        """Whether these parts of matrices can be put below each other and stay what `layers.linear.Floats` knows: with
        a scale per row, or in blocks of 128 x 128 which no edge cuts."""
        if self.block is None:
            return True
        ranges = [range(shape[0])[rows] for shape, rows in zip(shapes, parts, strict=True)]
        across = [range(shape[1])[columns] for shape in shapes]
        starts = [found.start for found in (*ranges, *across)]
        return self.block == (_EDGE, _EDGE) and all(
            edge % _EDGE == 0 for edge in (*starts, *(rows.stop for rows in ranges[:-1]))
        )

    def own_scales(self, scale: torch.Tensor, shape: tuple[int, ...], rows: slice, columns: slice) -> torch.Tensor:
        """float32 of a part: per block, or [rows, 1]."""
        if self.block is None:
            return scale.float().view(-1, 1).expand(shape[0], 1)[rows]
        wanted = (range(size)[part] for size, part in zip(shape, (rows, columns), strict=True))
        blocks = tuple(slice(part.start // _EDGE, -(-part.stop // _EDGE)) for part in wanted)
        return scale.float()[blocks]

    def restore(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """bfloat16 [N, K] from e4m3 [N, K] and its scales, block by block."""
        import torch

        if self.block is None:
            factor = scale.float().view(-1, 1)
            return (weight.float() * factor).to(torch.bfloat16)
        rows, columns = self.block
        out = torch.empty(weight.shape, dtype=torch.bfloat16)
        for i, factors in enumerate(scale.float()):
            part = weight[i * rows : (i + 1) * rows].float()
            part *= factors.repeat_interleave(columns)[: weight.shape[1]]
            out[i * rows : (i + 1) * rows] = part
        return out


Stored = StoredFloats | StoredIntegers


def read_stored(root: Section) -> Stored | None:
    """How the weights of a checkpoint are stored; None: as they are. Raises CheckpointError for what is not read."""
    if not root.has("quantization_config"):
        return None
    section = root.section("quantization_config")
    return _READERS[section.choice("quant_method", tuple(_READERS), "")](section)


def _read_fp8(section: Section) -> StoredFloats:
    section.choice("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    section.choice("activation_scheme", ("dynamic", "static"), "dynamic")
    return StoredFloats(_block(section, "weight_block_size"))


def _read_compressed(section: Section) -> Stored:
    form = section.choice("format", ("float-quantized", "pack-quantized", "int-quantized"), "")
    if section.has("kv_cache_scheme"):
        raise section.error("kv_cache_scheme", "is set; a quantised KV cache comes from --kv-cache-dtype alone")
    _check_transforms(section.optional("transform_config").optional("config_groups"))
    groups = section.section("config_groups")
    kinds = (groups.section(name).section("weights") for name in groups.values)
    if form == "float-quantized":
        found: set[Stored] = {_read_weights(weights) for weights in kinds}
    else:
        found = {read_compressed_integers(weights, are_packed=form == "pack-quantized") for weights in kinds}
    if len(found) != 1:
        raise section.error("config_groups", f"has {len(found)} kinds of weights; one is supported")
    return found.pop()


def _check_transforms(groups: Section) -> None:
    """What was done to weights is done; what is done to activations while a model runs is not."""
    for name in groups.values:
        for args in groups.section(name).sections("apply"):
            args.choice("location", ("weight_input", "weight_output"), "")


def _read_weights(section: Section) -> StoredFloats:
    section.choice("type", ("float",), "float")
    if section.integer("num_bits", 8) != 8:
        raise section.error("num_bits", f"is {section.integer('num_bits')}; supported: 8")
    if not section.boolean("symmetric", True):
        raise section.error("symmetric", "is false; zero points of floats are not supported")
    strategy = section.choice("strategy", ("tensor", "channel", "block"), "tensor")
    return StoredFloats(_block(section, "block_structure") if strategy == "block" else None)


def _block(section: Section, key: str) -> tuple[int, int] | None:
    if not section.has(key):
        return None
    edges = section.integers(key)
    if len(edges) != 2 or min(edges) < 1:
        raise section.error(key, f"is {list(edges)}; it must be two numbers of rows and columns")
    return edges[0], edges[1]


_READERS: dict[str, Callable[[Section], Stored]] = {
    "fp8": _read_fp8,
    "compressed-tensors": _read_compressed,
    "awq": read_awq,
    "gptq": read_gptq,
}
"""By `quant_method`."""

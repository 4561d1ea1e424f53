"""Checkpoints of few bits, whose integers lie packed in int32: AWQ, GPTQ and `compressed-tensors`.

They are read as floats of the scales' type, w = (q - zero) * scale, rounded once. Where a matrix [N, K]
has what, g being groups of columns (or one of all) and n the numbers in a word:

| layout | numbers | zeros | scales | a word holds |
|---|---|---|---|---|
| `awq` | `qweight` [K, N / 8] | `qzeros` [g, N / 8] | `scales` [g, N] | 8 columns, in the order of `_AWQ` |
| `gptq` | `qweight` [K / n, N] | `qzeros` [g, N / n] | `scales` [g, N] | rows or columns; zeros less 1 |
| `compressed` | `weight_packed` [N, K / n] | `weight_zero_point` [N / n, g] | `weight_scale` [N, g] | the same |
| `bytes` | `weight` [N, K] | `weight_zero_point` [N, 1] | `weight_scale` [N, 1] | nothing: all are int8 |

Formats as written by AutoAWQ 0.2.9 (`awq/utils/packing_utils.py`), AutoGPTQ 0.7.1 (`qlinear_cuda_old.py`), GPTQModel
7.7 (`utils/model.py`) and compressed-tensors 0.20 (`compressors/pack_quantized`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dashinfer_vlm.models.section import Section

if TYPE_CHECKING:  # configurations are read without torch
    import torch

__all__ = ["StoredIntegers", "read_awq", "read_compressed_integers", "read_gptq"]

Layout = Literal["awq", "gptq", "compressed", "bytes"]
Shape = tuple[int, ...]

_AWQ = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which of its word's eight numbers belongs to the first column, the second, ..."""
_NAMES: dict[Layout, tuple[str, dict[str, str]]] = {
    "awq": (".qweight", {"scales": ".scales", "zeros": ".qzeros"}),
    "gptq": (".qweight", {"scales": ".scales", "zeros": ".qzeros", "groups": ".g_idx"}),
    "compressed": (
        ".weight_packed",
        {"scales": ".weight_scale", "zeros": ".weight_zero_point", "shape": ".weight_shape", "groups": ".weight_g_idx"},
    ),
    "bytes": (".weight", {"scales": ".weight_scale", "zeros": ".weight_zero_point"}),
}
"""How the numbers of `X.weight` are called, and what lies beside them."""
_OPTIONAL = ("groups", "shape")


@dataclass(frozen=True, slots=True)
class StoredIntegers:
    """Matrices of few bits; what has no scales is stored whole."""

    layout: Layout
    bits: int
    group: int
    """Columns that share a scale; 0: all of a row."""
    has_zeros: bool = True
    zeros_less_one: bool = False
    """1 was taken from each number of a word at once, so that a 0 borrowed from the next one."""

    def __str__(self) -> str:
        return f"{self.bits} bits ({'compressed-tensors' if self.layout in ('compressed', 'bytes') else self.layout})"

    @property
    def numbers_suffix(self) -> str:
        return _NAMES[self.layout][0]

    def types(self, part: str) -> tuple[str, ...]:
        """That `numbers` or what lies beside them may have, as safetensors writes them."""
        if part in ("numbers", "zeros"):
            return ("I8",) if self.layout == "bytes" else ("I32",)
        return ("BF16", "F16", "F32") if part == "scales" else ("I32", "I64")

    @property
    def part_suffixes(self) -> dict[str, str]:
        """By what the parts are."""
        suffixes = _NAMES[self.layout][1]
        return {part: name for part, name in suffixes.items() if part != "zeros" or self.has_zeros}

    @property
    def ignored_suffixes(self) -> tuple[str, ...]:
        """Scales of activations, which are not rounded here, and zeros that say nothing."""
        return (".input_scale", ".input_zero_point", *(() if self.has_zeros else (".weight_zero_point",)))

    def is_needed(self, part: str) -> bool:
        return part not in _OPTIONAL

    def shape(self, numbers: Shape, parts: Mapping[str, Shape], told: Shape | None = None) -> Shape:
        """[N, K] of the matrix, which is `told` where its last word is not full. Raises ValueError where the shapes of
        its parts do not fit each other."""
        each = 1 if self.layout == "bytes" else 32 // self.bits
        if len(numbers) != 2 or not 0 < len(parts["scales"]) < 3:
            raise ValueError(f"has shape {list(numbers)}, and scales of {list(parts['scales'])}")
        if self.layout in ("compressed", "bytes"):
            scales: Shape = (*parts["scales"], 1)[:2]  # of whole rows they may be a vector
            rows, columns = told or (numbers[0], numbers[1] * each)
            if (rows, -(-columns // each)) != numbers:
                raise ValueError(f"has shape {list(numbers)}, which does not hold {rows} x {columns} numbers")
            groups = -(-columns // self.group) if self.group else 1
            wanted: dict[str, Shape] = {"scales": (rows, groups), "zeros": (-(-rows // each), groups)}
        else:
            scales = parts["scales"]
            across, down = (each, 1) if self.layout == "awq" else (1, each)
            rows, columns = numbers[1] * across, numbers[0] * down
            groups = -(-columns // self.group) if self.group else 1
            wanted = {"scales": (groups, rows), "zeros": (groups, -(-rows // each))}
        wanted["groups"] = (columns,)
        for part, shape in {**parts, "scales": scales}.items():
            if part in wanted and shape != wanted[part]:
                raise ValueError(f"of {rows} x {columns} numbers has {part} of {list(shape)}, not {list(wanted[part])}")
        return rows, columns

    def restore(self, numbers: torch.Tensor, parts: Mapping[str, torch.Tensor], shape: Shape) -> torch.Tensor:
        """[N, K] of the scales' type. Raises ValueError for columns of groups that there are not."""
        import torch

        rows, columns = shape
        scales = parts["scales"]
        kind = scales.dtype
        wide, zeros = self._unpacked(numbers, rows, columns), self._zeros(parts.get("zeros"), rows)
        scales = scales.reshape(rows, -1) if self.layout in ("compressed", "bytes") else scales.t()
        zeros = zeros.expand(scales.shape)
        group = self.group or columns
        is_even = "groups" not in parts and columns % group == 0
        of_column = parts["groups"].long() if "groups" in parts else torch.arange(columns) // group
        if not 0 <= int(of_column.min()) <= int(of_column.max()) < scales.shape[1]:
            raise ValueError(f"has {scales.shape[1]} groups of columns, and columns of others")
        out = torch.empty(rows, columns, dtype=kind)
        for i in range(0, rows, 512):  # so that what lies between stays small
            part = slice(i, i + 512)
            # whole numbers of 9 bits at the most are exact in 16 bits as well, so that only the product is rounded
            factors, less = (x[part].to(kind) for x in (scales, zeros))
            if is_even:
                y = wide[part].to(kind).view(-1, columns // group, group)
                out[part] = y.sub_(less[..., None]).mul_(factors[..., None]).flatten(1)
            else:
                out[part] = wide[part].to(kind).sub_(less[:, of_column]).mul_(factors[:, of_column])
        return out

    def quant_type(self, device_type: str) -> str | None:
        """The `--quant-type` that computes with the numbers as they are stored, if columns are in order."""
        groups = (128,) if device_type == "cuda" else (128, 32)
        return "a16w4" if self.nibble_group in groups else None

    @property
    def nibble_group(self) -> int:
        """Columns of the groups that `nibbles` has; 0: kernels of 4 bits do not take these."""
        if self.bits != 4:
            return 0
        return next((size for size in (128, 32) if self.group % size == 0), 0)

    def nibbles(
        self, numbers: torch.Tensor, parts: Mapping[str, torch.Tensor], shape: Shape
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The numbers of 4 bits, uint8 [N, K], with float32 scales and uint8 zeros (or None: 8) for each `nibble_group`
        columns, [N, groups]."""
        import torch

        rows, columns = shape
        scales = parts["scales"].float()
        scales = scales.reshape(rows, -1) if self.layout == "compressed" else scales.t()
        first = torch.arange(0, columns, self.nibble_group)
        group = first // (self.group or columns)
        zeros = self._zeros(parts["zeros"], rows)[:, group].contiguous() if self.has_zeros else None
        return self._unpacked(numbers, rows, columns).contiguous(), scales[:, group].contiguous(), zeros

    def _unpacked(self, numbers: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """[N, K] of bytes."""
        if self.layout == "bytes":
            return numbers
        if self.layout == "awq":
            return _split(numbers, self.bits, _AWQ).t().contiguous()
        if self.layout == "gptq":
            return _split(numbers.t(), self.bits)[:, :columns]
        return _split(numbers, self.bits)[:rows, :columns]

    def _zeros(self, zeros: torch.Tensor | None, rows: int) -> torch.Tensor:
        """[N, groups], or [N, 1] where all are one number."""
        import torch

        middle = 1 << (self.bits - 1)
        if zeros is None:
            return torch.full((rows, 1), 0 if self.layout == "bytes" else middle)
        if self.layout == "bytes":
            return zeros.reshape(rows, -1)
        if self.layout == "awq":
            return _split(zeros, self.bits, _AWQ).t()
        if self.layout == "gptq":
            ones = sum(1 << i for i in range(0, 32, self.bits)) if self.zeros_less_one else 0
            return _split(zeros + ones, self.bits)[:, :rows].t()
        return _split(zeros.t(), self.bits)[:, :rows].t()


def _split(words: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """uint8 [A, B * n]: the n numbers of each word of int32 [A, B], the first in the lowest bits."""
    import torch

    found = words.contiguous().view(torch.uint8)
    if bits == 4:
        found = torch.stack((found & 15, found >> 4), dim=2)
    if order is not None:
        found = found.view(len(words), -1, len(order))[..., list(order)]
    return found.view(len(words), -1)


def read_awq(section: Section) -> StoredIntegers:
    """AutoAWQ's `gemm`."""
    section.choice("version", ("gemm", "GEMM"), "gemm")
    if section.integer("bits", 4) != 4:
        raise section.error("bits", f"is {section.integer('bits')}; supported: 4")
    if not section.boolean("zero_point", True):
        raise section.error("zero_point", "is false; numbers without zeros are not read")
    return StoredIntegers("awq", 4, _group(section))


def read_gptq(section: Section) -> StoredIntegers:
    versions = "gptq", "gptq_v2"
    version = section.choice("checkpoint_format", versions, section.choice("format", versions, "gptq"))
    section.choice("pack_dtype", ("int32",), "int32")
    bits = section.integer("bits")
    if bits not in (4, 8):
        raise section.error("bits", f"is {bits}; supported: 4, 8")
    if section.boolean("is_marlin_format", False):
        raise section.error("is_marlin_format", "is true; repacked numbers are not read")
    if section.has("dynamic") and any(not rule.startswith("-") for rule in section.section("dynamic").values):
        raise section.error("dynamic", "gives some layers other bits; one kind of weights is supported")
    return StoredIntegers("gptq", bits, _group(section), zeros_less_one=version == "gptq")


def _group(section: Section) -> int:
    size = section.integer("group_size", 128, minimum=-1)
    if size == 0:
        raise section.error("group_size", "is 0; it must be a number of columns, or -1 for all")
    return max(size, 0)


def read_compressed_integers(weights: Section, *, are_packed: bool) -> StoredIntegers:
    """`weights` of a group of `compressed-tensors`, in `pack-quantized`, else `int-quantized`."""
    weights.choice("type", ("int",), "int")
    bits = weights.integer("num_bits", 8)
    if bits not in ((4, 8) if are_packed else (8,)):
        raise weights.error("num_bits", f"is {bits}; supported: {'4, 8' if are_packed else '8'}")
    strategy = weights.choice("strategy", ("group", "channel"), "channel")
    group = _group(weights) if strategy == "group" else 0
    layout: Layout = "compressed" if are_packed else "bytes"
    return StoredIntegers(layout, bits, group, has_zeros=not weights.boolean("symmetric", True))

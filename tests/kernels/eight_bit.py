"""What the rows of an int8 cache stand for, by the definition, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def numbers(rows: Tensor) -> Tensor:
    """[..., D + 4] int8 as [..., D]: numbers times the float32 scale in the last four bytes. Other types as they
    are."""
    if rows.dtype != torch.int8:
        return rows.double()
    return (
        rows[..., :-4].double()
        * rows[..., -4:].clone(memory_format=torch.contiguous_format).view(torch.float32).double()
    )


def size_of_transform(dim: int) -> int:
    return dim & -dim if dim % 8 == 0 else 1


def transformed(x: Tensor) -> Tensor:
    """x [..., D] with every block of channels times Sylvester's matrix, whose signs are those of parity(i & j)."""
    size = size_of_transform(x.shape[-1])
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    matrix = torch.tensor(signs, dtype=torch.float64)
    return (x.double().reshape(*x.shape[:-1], -1, size) @ matrix).flatten(-2)


def seen_by_keys(q: Tensor, cache: Tensor) -> Tensor:
    """The queries whose products with `numbers(cache)` are those with the keys that were written."""
    return transformed(q) / size_of_transform(q.shape[-1]) if cache.dtype == torch.int8 else q.double()

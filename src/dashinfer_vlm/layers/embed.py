"""The rows that a step begins with: words from the table, pictures from where they were staged."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["embed"]


def embed(
    ids: Tensor, table: Tensor, dtype: torch.dtype, staged: Tensor | None = None, is_item: Tensor | None = None
) -> Tensor:
    """[T, hidden] of `dtype`: row `ids[t]` of the table [V, hidden], or the first columns of row t of `staged`
    [T, hidden or more] where bool `is_item` [T] says so."""
    x = F.embedding(ids, table).to(dtype)
    if staged is None or is_item is None:
        return x
    return torch.where(is_item[:, None], staged[:, : table.shape[1]], x)

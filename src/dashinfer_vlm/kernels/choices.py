"""What sampling is given and what it answers, as arrays over the rows of a step: the same for every implementation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

NOT_A_NUMBER = -1
"""In place of a token: the row holds NaN or its largest logit is infinite, with or without penalties."""
NOTHING_ALLOWED = -2
"""In place of a token: penalties and mask forbid everything."""

ALIGNED = 4
"""Numbers of 4 bytes after which an array may begin, so that a kernel is not compiled again for a pointer that 16 does
not divide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """How the token of each of R rows over V logits is chosen. Columns [R]; lists of row r go from `starts[r]` to
    `starts[r + 1]` (int32 [R + 1]). In this order: biases, penalties of seen tokens, forbidden tokens and the mask, the
    `top_k` largest, those of `min_p` times the largest probability at least, the fewest that make up `top_p` (of equal
    ones always the first), and one of them where `uniform` of their sum is passed.
    """

    temperature: Tensor
    """float32. 0: the largest logit, the first of equal ones; nothing of the rest of this block is looked at."""
    top_k: Tensor
    """int32; 0: all."""
    top_p: Tensor
    """float32; 1: all."""
    min_p: Tensor
    """float32; 0: all."""
    uniform: Tensor
    """float32, from 0 to below 1."""

    repetition_penalty: Tensor
    """float32. Divides positive logits of seen tokens and multiplies negative ones."""
    presence_penalty: Tensor
    """float32. Taken from the logits of seen tokens whose count is not 0."""
    frequency_penalty: Tensor
    """float32. The same, times the count."""

    bias_starts: Tensor
    bias_ids: Tensor
    """int32; distinct within a row."""
    biases: Tensor
    """float32."""
    seen_starts: Tensor
    seen_ids: Tensor
    """int32; distinct within a row. Tokens of the prompt or of the output."""
    seen_counts: Tensor
    """int32. How often the output has each of `seen_ids`."""
    forbidden_starts: Tensor
    forbidden_ids: Tensor
    """int32; a token may come twice."""
    mask: Tensor | None = None
    """int32 [R, V / 32 rounded up]; bit i of word w allows token 32 w + i. None allows all."""


@dataclass(frozen=True, slots=True)
class Likeliest:
    """What is told of one token in each of n rows, and the tokens that are likelier than all others."""

    largest: Tensor
    """float32 [n]. The largest logit."""
    log_totals: Tensor
    """float32 [n]. log(sum(exp(logits - largest)))."""
    ranks: Tensor
    """int32 [n]. 1 is the likeliest."""
    top_ids: Tensor
    """int32 [n, num_top]. Best first, of equal ones the first."""

    @classmethod
    def empty(cls, num_rows: int, num_top: int) -> Likeliest:
        return cls(
            torch.empty(num_rows),
            torch.empty(num_rows),
            torch.empty(num_rows, dtype=torch.int32),
            torch.empty(num_rows, num_top, dtype=torch.int32),
        )


def arrays_of(choices: Choices) -> Iterator[tuple[str, Tensor]]:
    """What there is, by its name."""
    for field in fields(choices):
        array = getattr(choices, field.name)
        if array is not None:
            yield field.name, array


def moved(choices: Choices, device: torch.device) -> Choices:
    """The same on `device`, in one copy that is not waited for."""
    arrays = dict(arrays_of(choices))
    sizes = [-(-x.numel() // ALIGNED) * ALIGNED for x in arrays.values()]
    staged = torch.zeros(sum(sizes), dtype=torch.int32)
    parts = dict(zip(arrays, torch.split(staged, sizes), strict=True))
    for name, array in arrays.items():
        parts[name][: array.numel()] = array.contiguous().view(torch.int32).flatten()
    if device.type == "cuda":
        staged = staged.pin_memory()  # otherwise the copy is waited for
    there = dict(zip(arrays, torch.split(staged.to(device, non_blocking=True), sizes), strict=True))
    return replace(choices, **{n: there[n][: x.numel()].view(x.dtype).view(x.shape) for n, x in arrays.items()})

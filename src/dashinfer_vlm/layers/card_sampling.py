"""From logits to tokens without waiting: nothing here reads a value back. The rules are those of `layers.sampling`,
which takes one row after the other; here they are plain torch over all rows at once, on any device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from dashinfer_vlm.kernels import cuda
from dashinfer_vlm.kernels.choices import NOT_A_NUMBER, NOTHING_ALLOWED, Choices

__all__ = ["Chooser", "SeenCounts", "candidates", "choose", "chooser", "largest", "shape", "tell"]

Numbers = NDArray[Any]


@dataclass(frozen=True, slots=True)
class SeenCounts:
    """Tokens that were seen, as a table on the device: row `seats[i]` belongs to `rows[i]` of the logits.

    The table is int32 [seats, V]: 0 for a token that was not seen, else 1 more than its count in the output.
    """

    table: Tensor
    seats: Tensor
    rows: Tensor

    def add(self, tokens: Tensor) -> None:
        """Count int64 `tokens` [R], one for each row of the logits."""
        chosen = tokens[self.rows]
        before = self.table[self.seats, chosen]
        self.table[self.seats, chosen] = before.clamp(min=1) + 1


def shape(logits: Tensor, choices: Choices, seen: SeenCounts | None) -> Tensor:
    """A copy of float32 [R, V] with biases, penalties, forbidden tokens and the mask applied; `choices` are on the
    device, and `seen` is of other rows than its lists of seen tokens."""
    shaped = logits.clone()
    if len(choices.bias_ids):
        rows = _rows(choices.bias_starts, choices.bias_ids)
        shaped[rows, choices.bias_ids] += choices.biases
    if len(choices.seen_ids):
        rows = _rows(choices.seen_starts, choices.seen_ids)
        counts = choices.seen_counts
        shaped[rows, choices.seen_ids] = _penalised(shaped[rows, choices.seen_ids], counts, choices, rows)
    if seen is not None:
        counts = seen.table[seen.seats]
        values = shaped[seen.rows]
        penalised = _penalised(values, counts - 1, choices, seen.rows[:, None])
        shaped[seen.rows] = torch.where(counts > 0, penalised, values)
    if len(choices.forbidden_ids):
        shaped[_rows(choices.forbidden_starts, choices.forbidden_ids), choices.forbidden_ids] = -torch.inf
    if choices.mask is not None:
        bits = choices.mask[:, :, None] >> torch.arange(32, dtype=torch.int32, device=logits.device) & 1
        shaped.masked_fill_(bits.flatten(1)[:, : logits.shape[1]] == 0, -torch.inf)
    return shaped


def _rows(starts: Tensor, ids: Tensor) -> Tensor:
    """int64: the row of each entry of the lists that begin at `starts`."""
    return torch.repeat_interleave(starts.diff().long(), output_size=len(ids))


def _penalised(values: Tensor, counts: Tensor, choices: Choices, rows: Tensor) -> Tensor:
    """Logits of seen tokens; `rows` says of which row each is."""
    penalty = choices.repetition_penalty[rows]
    values = torch.where(values > 0, values / penalty, values * penalty)
    per_output = choices.presence_penalty[rows] + choices.frequency_penalty[rows] * counts
    return values - torch.where(counts > 0, per_output, 0.0)


def largest(logits: Tensor, shaped: Tensor | None = None) -> Tensor:
    """int64 [R]: the largest of `shaped`, or else of the logits, the first of equal ones. NOT_A_NUMBER where the
    largest of `logits` is none or infinite, NOTHING_ALLOWED where only `shaped` has none above -inf."""
    found = logits if shaped is None else shaped
    return _or_problem(found.argmax(dim=-1), logits, found)


def choose(logits: Tensor, choices: Choices, shaped: Tensor | None = None, *, num_candidates: int | None) -> Tensor:
    """int64 [R]: as `largest`, but drawn in rows whose temperature is above 0. `choices` are on the device.

    `num_candidates` of the largest logits hold all that can be drawn in any row (see `candidates`)."""
    if num_candidates is None:
        return largest(logits, shaped)
    found = logits if shaped is None else shaped
    weights = _kept_of_largest(found, choices, num_candidates) if num_candidates else _kept_of_all(found, choices)
    mass = weights.double().cumsum(dim=-1)
    total = mass[:, -1:]
    passed = torch.minimum(choices.uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(mass, passed, right=True)[:, 0].clamp(max=found.shape[1] - 1)
    return _or_problem(torch.where(choices.temperature == 0, found.argmax(dim=-1), drawn), logits, found)


class Chooser(Protocol):
    """`choose`, or what takes its place."""

    def __call__(
        self, logits: Tensor, choices: Choices, shaped: Tensor | None = None, *, num_candidates: int | None
    ) -> Tensor: ...


def chooser(device: torch.device) -> Chooser:
    """The fastest `choose` for `device`: the kernel on cards, which needs no number of candidates and sorts nothing."""
    if device.type != "cuda" or cuda.why_unavailable() is not None:
        return choose
    from dashinfer_vlm.kernels.cuda.sampling import drawn  # imports triton

    def by_kernel(
        logits: Tensor, choices: Choices, shaped: Tensor | None = None, *, num_candidates: int | None
    ) -> Tensor:
        return drawn(logits, choices, shaped).long()

    return by_kernel


def candidates(temperature: Numbers, top_k: Numbers, top_p: Numbers, vocab_size: int) -> int | None:
    """What `choose` is told, from the columns on the host: 0 where no row has to be ordered, None where nothing is
    drawn in any."""
    if not temperature.any():
        return None
    ordered = (temperature != 0) & ((top_k > 0) | (top_p < 1))
    if not ordered.any():
        return 0
    is_cut = bool((top_k[temperature != 0] > 0).all())
    return min(int(top_k[ordered].max()), vocab_size) if is_cut else vocab_size


def _kept_of_all(values: Tensor, choices: Choices) -> Tensor:
    return _weights(values, values.amax(dim=-1, keepdim=True), choices)


def _kept_of_largest(values: Tensor, choices: Choices, count: int) -> Tensor:
    """float32 [R, V]: 0 for what top_k, min_p and top_p leave out."""
    ids = _largest_ids(values, count)
    ordered = values.gather(1, ids)
    rank, top_k = torch.arange(count, device=values.device), choices.top_k[:, None]
    weights = torch.where((rank < top_k) | (top_k == 0), _weights(ordered, ordered[:, :1], choices), 0.0)
    mass = weights.double().cumsum(dim=-1)
    before = torch.zeros_like(mass)
    before[:, 1:] = mass[:, :-1]
    top_p = choices.top_p[:, None]
    inside = (before < top_p.double() * mass[:, -1:]) | (rank == 0) | (top_p >= 1)
    return torch.zeros_like(values).scatter_(1, ids, torch.where(inside, weights, 0.0))


def _weights(values: Tensor, top: Tensor, choices: Choices) -> Tensor:
    """1 for the largest, 0 for those below min_p."""
    temperature = torch.where(choices.temperature == 0, 1.0, choices.temperature)[:, None]
    weights = torch.exp((values - top) / temperature)
    return torch.where(weights >= choices.min_p[:, None], weights, 0.0)


def _largest_ids(values: Tensor, count: int) -> Tensor:
    """int64 [R, count]: of falling values, of equal ones the first."""
    size = values.shape[1]
    if count == size:
        return torch.sort(values, dim=-1, descending=True, stable=True).indices
    bits = (values + 0.0).view(torch.int32)  # no -0.0: it would be smaller than 0.0
    ordered = (bits ^ (bits >> 31 & 0x7FFFFFFF)).long()
    keys = (ordered << 32) + torch.arange(size - 1, -1, -1, device=values.device)
    return size - 1 - (torch.topk(keys, count).values & 0xFFFFFFFF)


def _or_problem(tokens: Tensor, logits: Tensor, found: Tensor) -> Tensor:
    tokens = torch.where(torch.isfinite(logits.amax(dim=-1)), tokens, NOT_A_NUMBER)
    if found is logits:
        return tokens
    return torch.where((found.amax(dim=-1) == -torch.inf) & (tokens != NOT_A_NUMBER), NOTHING_ALLOWED, tokens)


def tell(logits: Tensor, rows: Tensor, tokens: Tensor, num_top: int) -> Tensor:
    """What `logprobs` tells of int64 `tokens` [n], one in each of `rows` [n] of float32 [R, V]: float64 [n, 2 + 2 *
    top], the token's logprob and rank (1 is the likeliest), then that many ids, the likeliest first, and their
    logprobs."""
    values = logits[rows]
    top = values.amax(dim=-1, keepdim=True)
    normaliser = top.double() + torch.exp(values - top).double().sum(dim=-1, keepdim=True).log().float().double()
    chosen = values.gather(1, tokens[:, None])
    rank = (values > chosen).sum(dim=-1, keepdim=True) + 1
    ids = _largest_ids(values, min(num_top, values.shape[1]))
    top_logprobs = values.gather(1, ids).double() - normaliser
    return torch.cat([chosen.double() - normaliser, rank.double(), ids.double(), top_logprobs], dim=1)

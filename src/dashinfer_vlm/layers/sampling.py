"""From logits to tokens: the reference in numpy, one row after the other, and the random numbers.

Random numbers are a function of the request's seed and of the token's place in its output. So nothing has to be kept
for them: a row that is computed a second time, or guessed, draws what it would have drawn, on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dashinfer_vlm.kernels import cpu_ops, cuda
from dashinfer_vlm.kernels.choices import NOT_A_NUMBER, NOTHING_ALLOWED, Choices, Likeliest

__all__ = ["NATIVE", "REFERENCE", "SamplingOps", "choose", "likeliest", "sampling_ops", "uniform"]

Row = NDArray[np.float32]
Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SamplingOps:
    """The functions of sampling; signatures are those of the reference."""

    choose: Callable[[Tensor, Choices], Tensor]
    likeliest: Callable[[Tensor, Tensor, Tensor, int], Likeliest]


def sampling_ops(device: torch.device) -> SamplingOps:
    """The fastest for logits on `device`."""
    if device.type == "cuda" and cuda.why_unavailable() is None:
        from dashinfer_vlm.kernels.cuda import sampling  # imports triton

        return SamplingOps(sampling.choose, sampling.likeliest)
    return NATIVE if device.type == "cpu" and cpu_ops.available() else REFERENCE


def uniform(seeds: Sequence[int], indices: Sequence[int]) -> NDArray[np.float32]:
    """Numbers from 0 to below 1, multiples of 2^-24, one for each seed (any whole number, modulo 2^64) and index.

    The upper 24 bits of output number `index` of splitmix64 that begins at the seed (Steele, Lea and Flood 2014).
    """
    state = np.array([seed % 2**64 for seed in seeds], np.uint64)
    state += (np.array(indices, np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    drawn: NDArray[np.float32] = (state >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
    return drawn


def choose(logits: Tensor, choices: Choices) -> Tensor:
    """int32 [R], on the CPU: a token for each row of logits (float32 [R, V], on any device), or NOT_A_NUMBER or
    NOTHING_ALLOWED. Logits stay as they are; rows of which the largest is wanted never leave their device."""
    largest, tokens = logits.max(dim=-1).values.cpu(), logits.argmax(dim=-1).int().cpu()
    for row in range(len(tokens)):
        if not torch.isfinite(largest[row]):
            tokens[row] = NOT_A_NUMBER
        elif choices.temperature[row] != 0 or _is_shaped(choices, row):
            tokens[row] = _choose_row(_shaped(logits[row].cpu().numpy(), choices, row), choices, row)
    return tokens


def likeliest(logits: Tensor, rows: Tensor, tokens: Tensor, num_top: int) -> Likeliest:
    """What `logprobs` tells of `tokens` (int32 [n]), one in each of `rows` (int32 [n]) of logits (float32 [R, V])."""
    found = Likeliest.empty(len(rows), min(num_top, logits.shape[1]))
    for i, (index, token) in enumerate(zip(rows.tolist(), tokens.tolist(), strict=True)):
        row = logits[index].cpu().numpy()
        found.largest[i] = float(row.max())
        found.log_totals[i] = float(np.log(np.exp(row - row.max()).sum(dtype=np.float64)))
        found.ranks[i] = int((row > row[token]).sum()) + 1
        ids = _largest(row, num_top) if num_top else np.arange(0)
        found.top_ids[i] = torch.from_numpy(ids[np.argsort(-row[ids], kind="stable")])
    return found


REFERENCE = SamplingOps(choose, likeliest)
NATIVE = SamplingOps(cpu_ops.choose, cpu_ops.likeliest)


def _is_shaped(choices: Choices, row: int) -> bool:
    starts = (choices.bias_starts, choices.seen_starts, choices.forbidden_starts)
    return choices.mask is not None or any(bool(s[row] < s[row + 1]) for s in starts)


def _shaped(logits: Row, choices: Choices, row: int) -> Row:
    """A copy of the row with biases, penalties, forbidden tokens and the mask applied."""
    logits = logits.copy()
    part = _part(choices.bias_starts, row)
    logits[choices.bias_ids[part].numpy()] += choices.biases[part].numpy()
    part = _part(choices.seen_starts, row)
    seen, counts = choices.seen_ids[part].numpy(), choices.seen_counts[part].numpy()
    penalty = choices.repetition_penalty[row].numpy()
    with np.errstate(over="ignore"):  # whoever chooses looks for infinite ones
        values = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    per_output = choices.presence_penalty[row].numpy() + choices.frequency_penalty[row].numpy() * counts
    logits[seen] = values - np.where(counts > 0, per_output, 0)
    logits[choices.forbidden_ids[_part(choices.forbidden_starts, row)].numpy()] = -np.inf
    if choices.mask is not None:
        allowed = np.unpackbits(choices.mask[row].numpy().view(np.uint8), bitorder="little", count=len(logits))
        logits[allowed == 0] = -np.inf
    return logits


def _part(starts: Tensor, row: int) -> slice:
    return slice(int(starts[row]), int(starts[row + 1]))


def _choose_row(row: Row, choices: Choices, index: int) -> int:
    if row.max() == -np.inf:
        return NOTHING_ALLOWED
    if not np.isfinite(row.max()):
        return NOT_A_NUMBER
    if choices.temperature[index] == 0:
        return int(row.argmax())
    top_k, top_p, min_p = int(choices.top_k[index]), float(choices.top_p[index]), float(choices.min_p[index])
    ids = _largest(row, top_k) if top_k else np.arange(len(row))
    weights = _weights(row[ids] if top_k else row, float(choices.temperature[index]))
    if min_p > 0:
        kept = np.flatnonzero(weights >= np.float32(min_p))  # the likeliest weighs 1
        ids, weights = ids[kept], weights[kept]
    if top_p < 1:
        kept = _nucleus(weights, top_p)
        ids, weights = ids[kept], weights[kept]
    return int(ids[_draw(weights, float(choices.uniform[index]))])


def _weights(row: Row, temperature: float) -> Row:
    """Probabilities, but for a factor that makes the largest 1."""
    row = row - row.max()
    with np.errstate(over="ignore"):  # a temperature of almost 0 leaves the likeliest tokens alone
        row /= np.float32(temperature)
    weights: Row = np.exp(row, out=row)
    return weights


def _nucleus(weights: Row, top_p: float) -> Ids:
    """Indices of the fewest weights that make up the share `top_p` of all, at least one."""
    total = weights.sum(dtype=np.float64)
    # those below an equal part of the rest are outside: all of them together weigh less than the rest
    candidates = np.flatnonzero(weights >= (1 - top_p) / len(weights) * total)
    weights = weights[candidates]
    falling = np.sort(weights)[::-1]
    mass = np.cumsum(falling, dtype=np.float64)
    count = min(int(np.searchsorted(mass, top_p * total)) + 1, len(mass))
    return candidates[_first_from(weights, falling[count - 1], count)]


def _largest(values: Row, count: int) -> Ids:
    """Indices, in order, of the `count` largest values; of equal ones the first."""
    if count >= len(values):
        return np.arange(len(values))
    return _first_from(values, np.partition(values, -count)[-count], count)


def _first_from(values: Row, least: np.float32, count: int) -> Ids:
    """Indices, in order, of the values above `least`, and of as many that equal it as make them `count`."""
    above, equal = np.flatnonzero(values > least), np.flatnonzero(values == least)
    if len(above) + len(equal) == count:
        return np.flatnonzero(values >= least)
    return np.sort(np.concatenate([above, equal[: count - len(above)]]))


def _draw(weights: Row, uniform: float) -> int:
    """An index with the probability of its share: where the share `uniform` of the sum is passed."""
    mass = np.cumsum(weights, dtype=np.float64)
    # never the sum itself, whatever was rounded: what lies behind the last weight above 0 must not be found
    passed = min(uniform * mass[-1], np.nextafter(mass[-1], 0))
    return int(np.searchsorted(mass, passed, side="right"))

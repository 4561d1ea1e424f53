"""From logits to tokens: penalties, then truncation, then one draw per token.

Rows are independent: what a sequence gets depends on its own tokens, parameters and generator, never on its
neighbours in the batch. A sequence that has guessed tokens owns several rows, which are drawn one after the other: the
penalties and the generator of a row are those that the tokens before it have left. So a token is the same whether it
was guessed or not. The plain greedy rows, the common case, take one argmax together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dashinfer_vlm.engine.sequence import Sequence
from dashinfer_vlm.request import TokenLogprob

Row = NDArray[np.float32]
Ids = NDArray[np.int64]

_NOTHING_LEFT = (
    "min_tokens, no_repeat_ngram_size and the stop tokens forbid every token that could come next; ask for fewer tokens "
    "or relax one of them"
)
_LEAST_TEMPERATURE = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, slots=True)
class Sampled:
    token: int
    logprob: TokenLogprob | None
    problem: str | None = None
    """Why there is no token, fit for the client's eyes; `token` is -1 then."""


class LogitRows:
    """float32 logits [L, vocab] of a step, with the largest of each row. They are not changed.

    Rows are looked at by numpy on the CPU: they are too short to be worth a second thread, and torch would wake one for
    every operation.
    """

    def __init__(self, logits: torch.Tensor) -> None:
        self._logits = logits
        if logits.device.type == "cpu":
            values = logits.numpy()
            greedy = values.argmax(axis=-1)  # the first NaN, where there is one
            self._greedy: list[int] = greedy.tolist()
            self._finite: list[bool] = np.isfinite(values[np.arange(len(values)), greedy]).tolist()
        else:
            largest = logits.max(dim=-1)  # NaN propagates through it
            self._greedy = largest.indices.tolist()
            self._finite = torch.isfinite(largest.values).tolist()

    def sample(self, row: int, sequence: Sequence, eos_token_ids: tuple[int, ...]) -> Sampled:
        """Choose the next token of `sequence`, whose tokens are those that the row was computed after.

        A row that holds NaN, or of which everything is forbidden, gives a problem: the caller fails that sequence alone.
        """
        params, token = sequence.request.params, self._greedy[row]
        if not self._finite[row]:
            return Sampled(-1, None, "the model produced a value that is not a number")
        if params.temperature == 0 and params.logprobs is None and not _changes_logits(sequence):
            return Sampled(token, None)
        logits: Row = self._logits[row].cpu().numpy()
        if params.temperature != 0 or _changes_logits(sequence):
            shaped = _shaped(logits, sequence, eos_token_ids)
            if shaped.max() == -np.inf:
                return Sampled(-1, None, _NOTHING_LEFT)
            token = _choose(shaped, sequence)
        return Sampled(token, None if params.logprobs is None else _logprob(logits, token, params.logprobs))


def _changes_logits(sequence: Sequence) -> bool:
    p = sequence.request.params
    return bool(
        p.repetition_penalty != 1
        or p.presence_penalty
        or p.frequency_penalty
        or p.logit_bias
        or p.no_repeat_ngram_size
        or sequence.num_output < p.min_tokens
    )


def _shaped(row: Row, sequence: Sequence, eos_token_ids: tuple[int, ...]) -> Row:
    """A copy of the row with bias, penalties and forbidden tokens applied."""
    params = sequence.request.params
    row = row.copy()
    if params.logit_bias:
        row[list(params.logit_bias)] += np.array(list(params.logit_bias.values()), dtype=np.float32)
    if params.repetition_penalty != 1:
        seen = _seen_tokens(sequence, len(row))
        values = row[seen]
        row[seen] = np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if sequence.output_counts and (params.presence_penalty or params.frequency_penalty):
        counts = np.array(list(sequence.output_counts.values()), dtype=np.float32)
        row[list(sequence.output_counts)] -= params.presence_penalty + params.frequency_penalty * counts
    forbidden = _repeated_ngram_tokens(sequence.tokens, params.no_repeat_ngram_size)
    if sequence.num_output < params.min_tokens:
        forbidden += [*eos_token_ids, *params.stop_token_ids]
    row[[token for token in forbidden if token < len(row)]] = -np.inf
    return row


def _seen_tokens(sequence: Sequence, vocab_size: int) -> Ids:
    """Distinct ids of prompt and output, without the placeholders, which stand for no token."""
    ids = np.array(sequence.tokens, dtype=np.int64)
    keep = ids < vocab_size
    for item in sequence.request.items:
        keep[item.start : item.start + item.num_tokens] = False
    return np.unique(ids[keep])


def _repeated_ngram_tokens(tokens: list[int], size: int) -> list[int]:
    """Tokens that would complete an n-gram a second time."""
    if not size or len(tokens) < size:
        return []
    tail = tokens[len(tokens) - size + 1 :]
    return [tokens[i + size - 1] for i in range(len(tokens) - size + 1) if tokens[i : i + size - 1] == tail]


def _choose(row: Row, sequence: Sequence) -> int:
    params = sequence.request.params
    if params.temperature == 0:
        return int(row.argmax())
    ids = _largest(row, params.top_k) if params.top_k else np.arange(len(row))
    weights = _weights(row[ids] if params.top_k else row, params.temperature)
    if params.min_p > 0:
        kept = np.flatnonzero(weights >= params.min_p)  # the likeliest weighs 1
        ids, weights = ids[kept], weights[kept]
    if params.top_p < 1:
        kept = _nucleus(weights, params.top_p)
        ids, weights = ids[kept], weights[kept]
    return int(ids[_draw(weights, _generator(sequence))])


def _weights(row: Row, temperature: float) -> Row:
    """Probabilities, but for a factor that makes the largest 1."""
    row = row - row.max()
    with np.errstate(over="ignore"):  # a temperature of almost 0 leaves the likeliest tokens alone
        row /= max(temperature, _LEAST_TEMPERATURE)
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
    """Indices, in order, of the values above `least`, and of so many that equal it that they are `count`."""
    above, equal = np.flatnonzero(values > least), np.flatnonzero(values == least)
    if len(above) + len(equal) == count:
        return np.flatnonzero(values >= least)
    return np.sort(np.concatenate([above, equal[: count - len(above)]]))


def _draw(weights: Row, generator: np.random.Generator) -> int:
    """An index with the probability of its share, by one uniform number: where that share of the sum is passed."""
    mass = np.cumsum(weights, dtype=np.float64)
    # never the sum itself, whatever was rounded: what lies behind the last weight above 0 must not be found
    passed = min(generator.random() * mass[-1], np.nextafter(mass[-1], 0))
    return int(np.searchsorted(mass, passed, side="right"))


def _generator(sequence: Sequence) -> np.random.Generator:
    if sequence.generator is None:
        sequence.generator = np.random.default_rng(sequence.seed % 2**64)
    return sequence.generator


def _logprob(row: Row, token: int, num_top: int) -> TokenLogprob:
    """Log probability and rank of `token`, and the `num_top` likeliest tokens, best first."""
    highest = row.max()
    log_total = float(highest) + math.log(np.exp(row - highest).sum(dtype=np.float64))
    ids = _largest(row, num_top) if num_top else np.arange(0)
    best = ids[np.argsort(-row[ids], kind="stable")].tolist()
    pairs = tuple((index, float(row[index]) - log_total) for index in best)
    return TokenLogprob(token, float(row[token]) - log_total, int((row > row[token]).sum()) + 1, pairs)

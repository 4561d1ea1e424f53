"""The tokens of a step: collects what its rows ask for as arrays, has all of them chosen at once, tells what came of
it.

Rows are independent: what a sequence gets depends on its own tokens, parameters and seed, never on its neighbours in
the batch. A sequence that has guessed tokens owns several rows. Each is chosen as if the guesses in front of it had
come true, by the penalties and the random number that belong to that place, so that a token is the same whether it was
guessed or not; the engine takes them as far as the guesses did come true.
"""

from __future__ import annotations

import logging

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dashinfer_vlm.engine.sequence import Sequence
from dashinfer_vlm.kernels.choices import NOT_A_NUMBER, NOTHING_ALLOWED, Choices
from dashinfer_vlm.layers.sampling import sampling_ops, uniform
from dashinfer_vlm.request import SamplingParams, TokenLogprob

log = logging.getLogger(__name__)

Ids = NDArray[np.int32]
Guesses = tuple[int, ...]

_NOTHING = np.zeros(0, np.int32)
_NO_BIASES = np.zeros(0, np.float32)
LEAST_TEMPERATURE = float(np.finfo(np.float32).tiny)
"""Above 0, which means the largest."""
NO_TOKEN_LEFT = (
    "min_tokens, no_repeat_ngram_size, bad_words, the stop tokens and the mask of allowed tokens "
    "forbid every token that could come next; ask for fewer tokens or relax one of them"
)
PROBLEMS = {NOT_A_NUMBER: "the model produced a value that is not a number", NOTHING_ALLOWED: NO_TOKEN_LEFT}
FAILED = "no token could be chosen with these sampling parameters; the server's log says more"


class Sampled(msgspec.Struct, frozen=True, gc=False):
    token: int
    logprob: TokenLogprob | None
    problem: str | None = None
    """Why there is no token, fit for the client's eyes; `token` is -1 then."""
    guess: tuple[int, ...] = ()
    """The tokens behind this one, where the model itself guesses."""


class Row(msgspec.Struct, frozen=True, gc=False):
    """What one row asks for."""

    params: SamplingParams
    seed: int
    index: int
    bias_ids: Ids
    biases: NDArray[np.float32]
    seen_ids: Ids
    seen_counts: Ids
    forbidden: Ids


FAILED_ROW = Row(SamplingParams(temperature=0), 0, 0, _NOTHING, _NO_BIASES, _NOTHING, _NOTHING, _NOTHING)
"""In place of one that cannot be made; what is chosen for it is thrown away."""


class Sampler:
    """Chooses the tokens of a model with these end-of-sequence tokens, whose logits are on `device`."""

    def __init__(self, eos_token_ids: tuple[int, ...], device: torch.device) -> None:
        self._eos_ids = np.array(eos_token_ids, np.int32)
        self._ops = sampling_ops(device)

    def sample(
        self, logits: Tensor, groups: list[tuple[Sequence, Guesses]], mask: Tensor | None = None
    ) -> list[list[Sampled]]:
        """For each sequence its next token, and one more behind each of its guesses, should it come true.

        logits: float32 [L, vocab], not changed; the rows of a group lie one behind the other, the first computed after
        the sequence's tokens, each other one after a guess more. mask: int32 [L, vocab / 32 rounded up] of allowed
        tokens, as in `Choices`; None allows all. A row that holds NaN, or of which everything is forbidden, gives a
        problem, and so do parameters that cannot be dealt with: the caller fails that sequence alone.
        """
        places = [sequence.num_output for sequence, _ in groups]
        rows = self.rows(groups, places, logits.shape[1])
        tokens = self._ops.choose(logits, choices_of(rows, mask)).tolist()
        problems = [FAILED if row is FAILED_ROW else PROBLEMS.get(t) for row, t in zip(rows, tokens, strict=True)]
        asking = [(i, n) for i, row in enumerate(rows) if (n := row.params.logprobs) is not None and not problems[i]]
        logprobs = self._logprobs(logits, asking, tokens) if asking else {}
        sampled = (
            Sampled(token, logprobs.get(i), None) if problem is None else Sampled(-1, None, problem)
            for i, (token, problem) in enumerate(zip(tokens, problems, strict=True))
        )
        return [[next(sampled) for _ in range(len(guesses) + 1)] for _, guesses in groups]

    def scores(self, logits: Tensor, groups: list[tuple[Sequence, range]]) -> list[list[TokenLogprob]]:
        """What is told of tokens of prompts, by their places; logits: float32 [L, vocab], one row before each of
        them."""
        tokens, asked = asked_of_prompts(groups)
        found = self._logprobs(logits, list(enumerate(asked)), tokens)
        told = (found[row] for row in range(len(tokens)))
        return [[next(told) for _ in places] for _, places in groups]

    def rows(self, groups: list[tuple[Sequence, Guesses]], places: list[int], vocab_size: int) -> list[Row]:
        """What the rows of all groups ask for; `places` are those of each one's first token in its output."""
        asked = zip(groups, places, strict=True)
        return [
            row for (sequence, guesses), place in asked for row in self._group(sequence, guesses, place, vocab_size)
        ]

    def _group(self, sequence: Sequence, guesses: Guesses, place: int, vocab_size: int) -> list[Row]:
        """Whatever one request's parameters bring about ends that request alone, never the step of all."""
        try:
            return self._rows(sequence, guesses, place, vocab_size)
        except Exception:
            log.exception("no token can be chosen for request %s", sequence.id)
            return [FAILED_ROW] * (len(guesses) + 1)

    def _rows(self, sequence: Sequence, guesses: Guesses, place: int, vocab_size: int) -> list[Row]:
        rows = [self._row(sequence, place, vocab_size)]
        num_pushed = 0
        try:
            for guess in guesses:
                sequence.shaping.push(guess)
                num_pushed += 1
                rows.append(self._row(sequence, place + num_pushed, vocab_size))
        finally:
            for _ in range(num_pushed):
                sequence.shaping.pop()
        return rows

    def _row(self, sequence: Sequence, index: int, vocab_size: int) -> Row:
        """The row of the output's token at `index`; the sequence's shaping knows those before it."""
        params, shaping = sequence.request.params, sequence.shaping
        forbidden = shaping.forbidden
        if index < params.min_tokens:
            forbidden += [self._eos_ids, shaping.stop_ids]
        return Row(
            params,
            sequence.seed,
            index,
            shaping.bias_ids,
            shaping.biases,
            _NOTHING if shaping.seen is None else shaping.seen.ids,
            _NOTHING if shaping.seen is None else shaping.seen.counts,
            _below(vocab_size, forbidden),
        )

    def _logprobs(self, logits: Tensor, asking: list[tuple[int, int]], tokens: list[int]) -> dict[int, TokenLogprob]:
        """Of the rows that ask for them, with how many others, from the logits before anything was applied to them."""
        rows = torch.tensor([row for row, _ in asking], dtype=torch.int32)
        chosen = torch.tensor([tokens[row] for row, _ in asking], dtype=torch.int32)
        told = self._ops.likeliest(logits, rows, chosen, max(num_top for _, num_top in asking))
        ids = torch.cat([chosen[:, None], told.top_ids], dim=1)
        values = logits[rows.to(logits.device).long()[:, None], ids.to(logits.device).long()].double().cpu()
        logprobs = (values - (told.largest.double() + told.log_totals.double())[:, None]).tolist()
        found = {}
        for (row, num_top), names, numbers, rank in zip(
            asking, ids.tolist(), logprobs, told.ranks.tolist(), strict=True
        ):
            top = tuple(zip(names[1 : num_top + 1], numbers[1 : num_top + 1], strict=True))
            found[row] = TokenLogprob(names[0], numbers[0], rank, top)
        return found


def asked_of_prompts(groups: list[tuple[Sequence, range]]) -> tuple[list[int], list[int]]:
    """The tokens at these places of prompts, and beside how many others each is to be told."""
    tokens = [sequence.tokens[place] for sequence, places in groups for place in places]
    asked = [sequence.request.params.prompt_logprobs or 0 for sequence, places in groups for _ in places]
    return tokens, asked


def choices_of(rows: list[Row], mask: Tensor | None) -> Choices:
    params = [row.params for row in rows]
    bias_starts, bias_ids = _joined([row.bias_ids for row in rows])
    seen_starts, seen_ids = _joined([row.seen_ids for row in rows])
    forbidden_starts, forbidden_ids = _joined([row.forbidden for row in rows])
    return Choices(
        temperature=_floats([p.temperature and max(p.temperature, LEAST_TEMPERATURE) for p in params]),
        top_k=torch.tensor([p.top_k for p in params], dtype=torch.int32),
        top_p=_floats([p.top_p for p in params]),
        min_p=_floats([p.min_p for p in params]),
        uniform=torch.from_numpy(uniform([row.seed for row in rows], [row.index for row in rows])),
        repetition_penalty=_floats([p.repetition_penalty for p in params]),
        presence_penalty=_floats([p.presence_penalty for p in params]),
        frequency_penalty=_floats([p.frequency_penalty for p in params]),
        bias_starts=bias_starts,
        bias_ids=bias_ids,
        biases=torch.from_numpy(np.concatenate([row.biases for row in rows])),
        seen_starts=seen_starts,
        seen_ids=seen_ids,
        seen_counts=torch.from_numpy(np.concatenate([row.seen_counts for row in rows])),
        forbidden_starts=forbidden_starts,
        forbidden_ids=forbidden_ids,
        mask=mask,
    )


def _below(vocab_size: int, lists: list[NDArray[np.integer]]) -> Ids:
    """All of them together, without what stands for no token."""
    if not lists:
        return _NOTHING
    ids = np.concatenate(lists)
    return ids[ids < vocab_size].astype(np.int32)


def _floats(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def _joined(lists: list[Ids]) -> tuple[Tensor, Tensor]:
    """Where each list begins, and one more for the end; the lists one behind the other."""
    starts = np.zeros(len(lists) + 1, np.int32)
    np.cumsum([len(ids) for ids in lists], out=starts[1:])
    return torch.from_numpy(starts), torch.from_numpy(np.concatenate(lists))

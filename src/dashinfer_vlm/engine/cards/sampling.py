"""Tokens are chosen on the device, from logits that stay there; the host learns them when the step has landed.

Most rows are chosen as soon as the step is started: what their parameters ask for is known, and seen tokens are counted
on the device. Some need the host, and the values of older tokens there: a grammar's mask, and n-grams that must not
come twice. Their steps are computed at once all the same; only the choice waits until the older tokens are known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from torch import Tensor

from dashinfer_vlm.engine.cards.packing import place_of
from dashinfer_vlm.engine.cards.seats import Seat
from dashinfer_vlm.engine.cards.staging import COLUMNS
from dashinfer_vlm.engine.grammars.masks import Masks
from dashinfer_vlm.engine.sampler import (
    FAILED,
    FAILED_ROW,
    PROBLEMS,
    Row,
    Sampled,
    Sampler,
    asked_of_prompts,
    choices_of,
)
from dashinfer_vlm.engine.sequence import Sequence
from dashinfer_vlm.engine.steps import Chunk
from dashinfer_vlm.kernels.choices import Choices, moved
from dashinfer_vlm.layers import card_sampling as ops
from dashinfer_vlm.layers.memory import sent
from dashinfer_vlm.request import TokenLogprob

_NO_IDS = np.zeros(0, np.int32)
_LISTS = (
    "bias_starts", "bias_ids", "biases", "seen_starts", "seen_ids", "seen_counts", "forbidden_starts", "forbidden_ids"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Wanted:
    """The rows of a step whose tokens are wanted."""

    chunks: list[Chunk]
    num_rows: int
    num_counted: int
    arrays: dict[str, Tensor]
    """`staging.OF_LOGITS`, of these rows, on the device."""
    logits: Tensor
    num_candidates: int | None
    """See `card_sampling.candidates`."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """Results on their way to the host."""

    tokens: Tensor
    """int64 [rows]."""
    failed: frozenset[int]
    asking: list[tuple[int, int]]
    """Rows that ask for log probabilities, and for how many others."""
    told: Tensor | None
    """See `card_sampling.tell`; of the asking rows."""

    def sampled(self, chunks: list[Chunk]) -> list[list[Sampled]]:
        """Once they are here."""
        tokens = self.tokens.tolist()
        problems = [FAILED if row in self.failed else PROBLEMS.get(token) for row, token in enumerate(tokens)]
        logprobs = {} if self.told is None else dict(_read_told(tokens, self.asking, self.told))
        sampled = (
            Sampled(token, logprobs.get(row)) if problem is None else Sampled(-1, None, problem)
            for row, (token, problem) in enumerate(zip(tokens, problems, strict=True))
        )
        return [[next(sampled) for _ in range(chunk.num_logits)] for chunk in chunks]


@dataclass(frozen=True, slots=True)
class Scored:
    """What is told of tokens of prompts, on its way to the host."""

    groups: list[tuple[Sequence, range]]
    tokens: list[int]
    asking: list[tuple[int, int]]
    told: Tensor
    """See `card_sampling.tell`."""

    def scores(self) -> list[list[TokenLogprob]]:
        """Once it is here."""
        found = _read_told(self.tokens, self.asking, self.told)
        return [[next(found)[1] for _ in places] for _, places in self.groups]


def _read_told(tokens: list[int], asking: list[tuple[int, int]], told: Tensor) -> Iterator[tuple[int, TokenLogprob]]:
    """The rows that ask, in order, each with what it is told of its token."""
    for (row, num_top), (logprob, rank, *others) in zip(asking, told.tolist(), strict=True):
        ids, values = others[: len(others) // 2], others[len(others) // 2 :]
        top = tuple((int(i), value) for i, value in zip(ids[:num_top], values[:num_top], strict=True))
        yield row, TokenLogprob(tokens[row], logprob, int(rank), top)


class CardSampler:
    """Owns what the device keeps of the tokens that seats have seen, and writes their newest ones."""

    def __init__(self, sampler: Sampler, masks: Masks, device: torch.device, newest: Tensor, vocab_size: int) -> None:
        """`newest` is int64 [seats + 1]; the seat behind all others is nobody's."""
        self._sampler = sampler
        self._masks = masks
        self._device = device
        self._choose = ops.chooser(device)
        self._vocab_size = vocab_size
        self.newest = newest
        self._seen = torch.zeros(len(newest), vocab_size, dtype=torch.int32, device=device)
        self._no_lists = dict.fromkeys(_LISTS, torch.zeros(0, dtype=torch.int32, device=device))

    def take_seat(self, seat: Seat) -> None:
        """The seat has a new owner, none of whose tokens is PENDING."""
        if not counts_on_device(seat.sequence):
            return
        seen = seat.sequence.shaping.seen
        assert seen is not None
        self._seen[seat.index] = 0
        self._seen[seat.index, self._moved(torch.from_numpy(seen.ids)).long()] = self._moved(
            torch.from_numpy(seen.counts + 1)
        )

    def choose(self, wanted: Wanted) -> Chosen:
        """Start all that turns logits into tokens and brings them to the host. What the device keeps changes last, so
        that a step for which there is no memory can be computed again: counts may take some, newest tokens take none.
        """
        logits = wanted.logits[: wanted.num_rows]
        choices, failed = self._choices(wanted)
        seen = self._seen_counts(wanted)
        is_shaped = seen is not None or _is_shaped(choices)
        shaped = ops.shape(logits, choices, seen) if is_shaped else None
        tokens = self._choose(logits, choices, shaped, num_candidates=wanted.num_candidates)
        known = tokens.clamp(min=0)
        asking = [(row, num_top) for row, num_top in enumerate(_logprobs_of(wanted.chunks)) if num_top is not None]
        told = self._tell(logits, known, asking) if asking else None
        chosen = Chosen(self.home(tokens), failed, asking, None if told is None else self.home(told))
        if seen is not None:
            seen.add(known)
        self.newest.scatter_(0, wanted.arrays["seats"], known)
        return chosen

    def score(self, logits: Tensor, groups: list[tuple[Sequence, range]]) -> Scored:
        """Start to find what `Sampler.scores` tells."""
        tokens, asked = asked_of_prompts(groups)
        asking = list(enumerate(asked))
        told = self._tell(logits, self._moved(torch.tensor(tokens)), asking)
        return Scored(groups, tokens, asking, self.home(told))

    def _choices(self, wanted: Wanted) -> tuple[Choices, frozenset[int]]:
        """On the device; and the rows of which nothing can be chosen."""
        if not any(_needs_lists(chunk) for chunk in wanted.chunks):
            return Choices(**{name: wanted.arrays[name] for name in COLUMNS}, **self._no_lists), frozenset()
        groups = [(chunk.sequence, chunk.draft) for chunk in wanted.chunks]
        mask = self._masks.begin(groups)
        rows = self._sampler.rows(groups, [place_of(chunk) for chunk in wanted.chunks], self._vocab_size)
        failed = frozenset(i for i, row in enumerate(rows) if row is FAILED_ROW)
        counted = [counts_on_device(chunk.sequence) for chunk in wanted.chunks for _ in range(chunk.num_logits)]
        asked = [_without_seen(row) if is_counted else row for row, is_counted in zip(rows, counted, strict=True)]
        return moved(choices_of(asked, mask()), self._device), failed

    def _seen_counts(self, wanted: Wanted) -> ops.SeenCounts | None:
        if not wanted.num_counted:
            return None
        part = slice(wanted.num_counted)
        return ops.SeenCounts(self._seen, wanted.arrays["counted_seats"][part], wanted.arrays["counted_rows"][part])

    def _tell(self, logits: Tensor, tokens: Tensor, asking: list[tuple[int, int]]) -> Tensor:
        rows = self._moved(torch.tensor([row for row, _ in asking]))
        return ops.tell(logits, rows, tokens[rows], max(num_top for _, num_top in asking))

    def _moved(self, tensor: Tensor) -> Tensor:
        return sent(tensor, self._device)

    def home(self, tensor: Tensor) -> Tensor:
        """On the host, once the device has come so far."""
        if self._device.type != "cuda":
            return tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def waits_for_tokens(chunk: Chunk) -> bool:
    """Whether the choice of its tokens needs the values of all older ones on the host."""
    return chunk.sequence.matcher is not None or chunk.sequence.shaping.forbids_by_output


def counts_on_device(sequence: Sequence) -> bool:
    """Whether the device counts what the sequence has seen. Who guesses waits for its tokens anyway: the host counts
    them, and the guesses before each row."""
    return sequence.shaping.seen is not None and sequence.drafter is None


def _needs_lists(chunk: Chunk) -> bool:
    """Whether more than the columns of a seat says how its tokens are chosen."""
    sequence = chunk.sequence
    return (
        waits_for_tokens(chunk)
        or len(sequence.shaping.bias_ids) > 0
        or len(sequence.shaping.banned) > 0
        or place_of(chunk) < sequence.request.params.min_tokens
        or (sequence.shaping.seen is not None and sequence.drafter is not None)
    )


def _is_shaped(choices: Choices) -> bool:
    lists = (choices.bias_ids, choices.seen_ids, choices.forbidden_ids)
    return choices.mask is not None or any(len(ids) for ids in lists)


def _without_seen(row: Row) -> Row:
    return row if row is FAILED_ROW else msgspec.structs.replace(row, seen_ids=_NO_IDS, seen_counts=_NO_IDS)


def _logprobs_of(chunks: list[Chunk]) -> list[int | None]:
    return [chunk.sequence.request.params.logprobs for chunk in chunks for _ in range(chunk.num_logits)]

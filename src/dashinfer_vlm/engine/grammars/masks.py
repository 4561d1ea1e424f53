"""Which tokens a step may choose, by grammars and by lists of allowed tokens, worked out while the model computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import TYPE_CHECKING

import llguidance
import numpy as np
import torch
from numpy.typing import NDArray

from dashinfer_vlm.request import SamplingParams

if TYPE_CHECKING:
    from dashinfer_vlm.engine.sequence import Sequence

__all__ = ["Masks"]

Words = NDArray[np.int32]


class Masks:
    """Owns one thread, which has begun only when there was something to do. It works without Python's lock."""

    def __init__(self, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._num_words = (vocab_size + 31) // 32
        self._eos = np.zeros(self._num_words, np.int32)
        for token in eos_token_ids:
            self._eos[token >> 5] |= _bit(token)
        self._executor: llguidance.LLExecutor | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")

    def begin(self, groups: list[tuple[Sequence, tuple[int, ...]]]) -> Callable[[], torch.Tensor | None]:
        """Masks for the rows that `Sampler.sample` wants of `groups`; the function that is returned waits for them.

        int32 [L, vocab / 32 rounded up], a bit per token; rows of sequences that ask for nothing allow everything. None
        when no sequence asks. The sequences must not go on before the function has returned.
        """
        if all(sequence.matcher is None and sequence.shaping.allowed is None for sequence, _ in groups):
            return lambda: None
        return self._thread.submit(self._fill, groups).result

    def _fill(self, groups: list[tuple[Sequence, tuple[int, ...]]]) -> torch.Tensor:
        words = np.full((sum(1 + len(guesses) for _, guesses in groups), self._num_words), -1, np.int32)
        alone: list[tuple[llguidance.LLMatcher, int]] = []
        guessing: list[tuple[llguidance.LLMatcher, int, list[int]]] = []
        ends: list[tuple[int, SamplingParams]] = []
        starts = list(accumulate((1 + len(guesses) for _, guesses in groups), initial=0))
        for start, (sequence, guesses) in zip(starts, groups, strict=False):
            if sequence.matcher is None:
                continue
            if guesses:
                guessing.append((sequence.matcher.state, start, list(guesses)))
            else:
                alone.append((sequence.matcher.state, start))
            ends += [(start + i, sequence.request.params) for i in range(1 + len(guesses))]
        self._compute(words, alone, guessing)
        for row, params in ends:
            self._let_end(words[row], params)
        for start, (sequence, guesses) in zip(starts, groups, strict=False):
            _restrict(words[start : start + 1 + len(guesses)], sequence.shaping.allowed)
        return torch.from_numpy(words)

    def _compute(
        self,
        words: Words,
        alone: list[tuple[llguidance.LLMatcher, int]],
        guessing: list[tuple[llguidance.LLMatcher, int, list[int]]],
    ) -> None:
        if self._executor is None:
            self._executor = llguidance.LLExecutor(num_threads=1)
        where = words.ctypes.data, words.shape[1] * words.itemsize, words.shape[0]
        if alone:
            self._executor.unsafe_compute_mask_ptr(alone, *where)
        if guessing:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(guessing, *where)

    def _let_end(self, row: Words, params: SamplingParams) -> None:
        """Where the grammar may end, what ends this sequence is allowed: its stop tokens are, and the model's own
        end-of-sequence tokens unless they are to be ignored and something else may follow."""
        if not (row & self._eos).any():
            return
        if params.ignore_eos and (others := row & ~self._eos).any():
            row[:] = others
        for token in params.stop_token_ids:
            row[token >> 5] |= _bit(token)


def _restrict(rows: Words, allowed: Words | None) -> None:
    if allowed is not None:
        rows[:, : len(allowed)] &= allowed
        rows[:, len(allowed) :] = 0


def _bit(token: int) -> int:
    """The token's in its word; the highest one is the sign."""
    place = token & 31
    return -(1 << 31) if place == 31 else 1 << place

"""What a request's parameters do to its logits besides temperature and truncation, as arrays that a step only collects.

Everything is prepared once and kept up token by token: a step's cost does not grow with what has been said so far.
"""

from __future__ import annotations

import secrets
from array import array
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from dashinfer_vlm.request import Item, Request

Ids = NDArray[np.int32]

_PRIME = 2**61 - 1
_BASE = secrets.randbelow(_PRIME - 2**32) + 2**32
"""Of the hashes of n-grams. Nobody outside can know it, so nobody can make two n-grams collide."""


class Shaping:
    """Follows one sequence: `push` for each token of its output, `pop` to take back the newest ones."""

    def __init__(self, request: Request) -> None:
        params = request.params
        self.bias_ids = np.array(list(params.logit_bias), np.int32)
        self.biases = np.array(list(params.logit_bias.values()), np.float32)
        self.stop_ids = np.array(params.stop_token_ids, np.int32)
        self.allowed = token_words(params.allowed_token_ids) if params.allowed_token_ids else None
        """Of the mask of every row: int32 [n], and nothing behind them is allowed."""
        penalised = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
        self.seen = SeenTokens(_words(request.prompt_ids, request.items)) if penalised else None
        size = params.no_repeat_ngram_size
        self.ngrams = NgramFollowers(size, request.prompt_ids) if size else None
        self.banned = np.array([word[0] for word in params.bad_words if len(word) == 1], np.int32)
        """Bad words of one token."""
        phrases = [word for word in params.bad_words if len(word) > 1]
        self.phrases = Phrases(phrases) if phrases else None

    @property
    def forbids_by_output(self) -> bool:
        """Whether it depends on the values of the tokens so far which ones may come next."""
        return self.ngrams is not None or self.phrases is not None

    @property
    def follows_output(self) -> bool:
        """Whether what it does depends on the values of the tokens so far."""
        return self.seen is not None or self.forbids_by_output

    @property
    def forbidden(self) -> list[NDArray[np.integer]]:
        """Ids that may not come next, in lists; those outside the vocabulary may be among them."""
        found: list[NDArray[np.integer]] = [] if not len(self.banned) else [self.banned]
        return found + [part.newest for part in (self.ngrams, self.phrases) if part is not None]

    def push(self, token: int) -> None:
        for part in (self.seen, self.ngrams, self.phrases):
            if part is not None:
                part.push(token)

    def pop(self) -> None:
        for part in (self.seen, self.ngrams, self.phrases):
            if part is not None:
                part.pop()


class SeenTokens:
    """The distinct tokens of prompt and output, and how often the output has each."""

    def __init__(self, prompt: Ids) -> None:
        self._prompt = np.unique(prompt)
        self._size = len(self._prompt)
        self._ids = np.concatenate([self._prompt, np.zeros(64, np.int32)])
        self._counts = np.zeros(len(self._ids), np.int32)
        self._places: dict[int, int] = {}  # of the output's tokens
        self._output: list[int] = []

    @property
    def ids(self) -> Ids:
        """int32 [n], a copy."""
        return np.array(self._ids[: self._size])

    @property
    def counts(self) -> Ids:
        """int32 [n], a copy."""
        return np.array(self._counts[: self._size])

    def push(self, token: int) -> None:
        place = self._places.get(token)
        if place is None:
            place = self._places[token] = self._place_in_prompt(token)
        if place == self._size:
            self._grow()
            self._ids[place] = token
            self._size += 1
        self._counts[place] += 1
        self._output.append(token)

    def pop(self) -> None:
        token = self._output.pop()
        place = self._places[token]
        self._counts[place] -= 1
        if not self._counts[place] and place >= len(self._prompt):  # it came with this token, so it is the last one
            del self._places[token]
            self._size -= 1

    def _place_in_prompt(self, token: int) -> int:
        """Or the next free one."""
        place = int(np.searchsorted(self._prompt, token))
        return place if place < len(self._prompt) and self._prompt[place] == token else self._size

    def _grow(self) -> None:
        if self._size == len(self._ids):
            more = np.zeros(len(self._ids), np.int32)
            self._ids, self._counts = np.concatenate([self._ids, more]), np.concatenate([self._counts, more])


class NgramFollowers:
    """What has followed each run of n - 1 tokens of prompt and output; a run is known by its hash, so that its length
    costs nothing."""

    def __init__(self, size: int, prompt: Iterable[int]) -> None:
        self._run = size - 1
        self._shift = pow(_BASE, self._run, _PRIME)
        self._tokens: list[int] = []
        self._hashes = [0]  # of the first 0, 1, 2 ... tokens
        self._followers: defaultdict[int, array[int]] = defaultdict(lambda: array("q"))
        for token in prompt:
            self.push(token)

    @property
    def newest(self) -> NDArray[np.int64]:
        """int64 [n], a copy: what would make the newest run an n-gram that has been there. A token may come twice; ids
        outside the vocabulary, which stand for items, may be among them."""
        run = self._newest_run()
        return np.array(self._followers.get(run, ()) if run is not None else (), np.int64)

    def push(self, token: int) -> None:
        run = self._newest_run()
        if run is not None:
            self._followers[run].append(token)
        self._tokens.append(token)
        self._hashes.append((self._hashes[-1] * _BASE + token + 1) % _PRIME)

    def pop(self) -> None:
        self._tokens.pop()
        self._hashes.pop()
        run = self._newest_run()
        if run is not None:
            self._followers[run].pop()

    def _newest_run(self) -> int | None:
        if len(self._tokens) < self._run:
            return None
        return (self._hashes[-1] - self._hashes[-1 - self._run] * self._shift) % _PRIME


class Phrases:
    """Sequences of at least two tokens, none of which the output may hold whole; the prompt does not count."""

    def __init__(self, phrases: Iterable[tuple[int, ...]]) -> None:
        self._output: list[int] = []
        self._behind: defaultdict[int, list[tuple[int, ...]]] = defaultdict(list)  # by their last token but one
        for phrase in phrases:
            self._behind[phrase[-2]].append(phrase)

    @property
    def newest(self) -> Ids:
        """int32 [n]: what would end one of them now."""
        output = self._output
        phrases = self._behind.get(output[-1], ()) if output else ()
        return np.array([p[-1] for p in phrases if tuple(output[-(len(p) - 1) :]) == p[:-1]], np.int32)

    def push(self, token: int) -> None:
        self._output.append(token)

    def pop(self) -> None:
        self._output.pop()


def _words(prompt_ids: list[int], items: tuple[Item, ...]) -> Ids:
    """The prompt without the placeholders of its items, which stand for no token."""
    ids = np.array(prompt_ids, np.int64)
    keep = np.ones(len(ids), bool)
    for item in items:
        keep[item.start : item.start + item.num_tokens] = False
    return ids[keep].astype(np.int32)


def token_words(ids: Iterable[int]) -> Ids:
    """int32 [n]: a bit for each of `ids`, up to the word of the largest."""
    array = np.array(list(ids), np.int64)
    bits = np.zeros((array.max(initial=0) // 32 + 1) * 32, bool)
    bits[array] = True
    return np.packbits(bits, bitorder="little").view(np.int32)

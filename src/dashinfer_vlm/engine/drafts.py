"""Guesses what a sequence will say next: from what it has said or read before (prompt lookup, Saxena 2023), or as the
model's own head has it.

A guess is never trusted: the engine computes the guessed tokens beside the newest one, and keeps a guess only when the
sampler chose the same token. So a wrong guess costs time and changes nothing.
"""

from __future__ import annotations

from dashinfer_vlm.config import Speculation

_FIRST_CHANCE = 0.6
"""A guess is tried until experience says otherwise: one alone beside eight streams still pays."""
_LEARNING_RATE = 0.15
_MOST_PLACES = 32
"""Earlier places that are compared at most, the latest first: text that repeats one phrase has thousands."""


class Drafter:
    """The guesses for one sequence, and how often they were right. This one waits for the model's."""

    def __init__(self, settings: Speculation) -> None:
        self.settings = settings
        self.chance = _FIRST_CHANCE
        """Share of the first guessed tokens, or of those after a right one, that were right lately."""
        self._guess: list[int] = []

    def propose(self, tokens: list[int], num_tokens: int) -> list[int]:
        """Up to `num_tokens` tokens that may follow `tokens`, which may only grow from call to call."""
        return self._guess[:num_tokens]

    def observe(self, token: int) -> None:
        """The sequence goes on with `token`: learn whether the guess was right, also where nobody computed it."""
        if not self._guess:
            return
        right = self._guess.pop(0) == token
        self.chance += _LEARNING_RATE * (right - self.chance)
        if not right:
            self._guess.clear()

    def hear(self, guess: tuple[int, ...]) -> None:
        """What the model guesses behind the newest token."""
        self._guess = list(guess)


class LookupDrafter(Drafter):
    """Looks the newest tokens up among the earlier ones.

    The places of every n-gram of the smallest size are chained from the latest to the earliest, so that a lookup looks
    at nothing but places that match already.
    """

    def __init__(self, settings: Speculation, vocab_size: int) -> None:
        super().__init__(settings)
        self._vocab_size = vocab_size
        self._latest: dict[tuple[int, ...], int] = {}  # n-gram -> where it ended last
        self._earlier: list[int | None] = []  # place -> where its n-gram ended before

    def propose(self, tokens: list[int], num_tokens: int) -> list[int]:
        """See `Drafter`.

        Only the tokens in front of the newest are searched. Ids outside the vocabulary, which stand for items, are
        never guessed.
        """
        size = self.settings.prompt_lookup_min
        for place in range(len(self._earlier), len(tokens) - 1):
            gram = tuple(tokens[place - size + 1 : place + 1])
            self._earlier.append(self._latest.get(gram))
            if len(gram) == size:
                self._latest[gram] = place
        found = self._best_place(tokens)
        self._guess = [] if found is None else self._continuation(tokens, found + 1, num_tokens)
        return self._guess[:]

    def _best_place(self, tokens: list[int]) -> int | None:
        """Where the longest earlier occurrence of the newest tokens ends; of equal ones the latest."""
        settings = self.settings
        place = self._latest.get(tuple(tokens[-settings.prompt_lookup_min :]))
        best, best_length = None, 0
        for _ in range(_MOST_PLACES):
            if place is None or best_length == settings.prompt_lookup_max:
                break
            length = _common_end(tokens, place, settings.prompt_lookup_max)
            if length > best_length:
                best, best_length = place, length
            place = self._earlier[place]
        return best

    def _continuation(self, tokens: list[int], start: int, num_tokens: int) -> list[int]:
        """What follows `start`; past the newest token it reads its own guess, as in a text that goes round."""
        guess: list[int] = []
        for place in range(start, start + num_tokens):
            token = tokens[place] if place < len(tokens) else guess[place - len(tokens)]
            if token >= self._vocab_size:
                break
            guess.append(token)
        return guess


def make_drafter(settings: Speculation | None, vocab_size: int) -> Drafter | None:
    """None: nothing is guessed."""
    if settings is None:
        return None
    return LookupDrafter(settings, vocab_size) if settings.method == "ngram" else Drafter(settings)


def _common_end(tokens: list[int], place: int, most: int) -> int:
    """How many tokens up to `place` equal the newest ones, `most` at the most."""
    length = 0
    while length < most and length <= place and tokens[place - length] == tokens[-1 - length]:
        length += 1
    return length

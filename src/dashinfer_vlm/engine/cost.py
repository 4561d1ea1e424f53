"""What a step costs, so that the scheduler can spend time instead of tokens."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from math import inf

LEAST_JOINING = 32
"""Tokens of prompts that join a step of a card: a prompt would wait longer for fewer than streams would gain."""


@dataclass(slots=True)
class StepCost:
    """Seconds of a model call over T tokens on a processor: `fixed_s + token_s * T`.

    The fixed part is the reading of the weights, which every step pays once; the marginal part is arithmetic. Both
    follow what steps really took, by exponential averaging: a machine that throttles or has noisy neighbours moves
    the estimate, a single slow step barely does.
    """

    fixed_s: float
    token_s: float
    rate: float = 0.1

    def of(self, num_tokens: int) -> float:
        return self.fixed_s + self.token_s * num_tokens if num_tokens else 0.0

    def more(self, num_tokens: int, joining: int) -> float:
        """Seconds that `joining` tokens add to a call over `num_tokens` that is made anyway."""
        return self.token_s * joining

    def joining_in(self, seconds: float, num_tokens: int) -> int:
        """How many tokens may join a call over `num_tokens` that is made anyway, for `seconds` more."""
        return int(seconds / self.token_s) if self.token_s > 0 else 1 << 30

    def split(self, seconds: float, num_rows: int, joining: int) -> tuple[float, float]:
        """What of a call's `seconds` its `num_rows` took, and what `joining` tokens beside them: in the proportion of
        the estimates."""
        own, more = self.of(num_rows), self.more(num_rows, joining) if joining else 0.0
        share = own / (own + more) if own + more else float(joining == 0)
        return seconds * share, seconds * (1 - share)

    def observe(self, num_rows: int, joining: int, seconds: float) -> None:
        """Learn from a model call over rows of streams and what joined them. Rows alone teach the fixed part, what
        joins them the marginal part, by as much as it is of the call: which of the two a call teaches does not depend
        on the estimates, so that wrong ones cannot confirm each other."""
        if not joining:
            self.fixed_s += self.rate * (max(0.0, seconds - self.token_s * num_rows) - self.fixed_s)
            return
        token_s = (seconds - self.fixed_s - self.token_s * num_rows) / joining
        self.token_s += self.rate * joining / (num_rows + joining) * (max(0.0, token_s) - self.token_s)


@dataclass(slots=True)
class CardCost(StepCost):
    """Seconds of a model call on a card, by the rows that it is padded up to: those of `decode_sizes` where each row is
    a stream's, of `mixed_sizes` where anything joins them.

    A size costs what calls of it took, whatever decides: reading, arithmetic, or the host that starts the kernels. Of
    one that has not been seen, `fixed_s` and `token_s` are a first guess, `max(fixed_s, token_s * T)`, kept between
    what smaller and larger ones take; decode is taken to cost what the smallest mixed call does, which reads as much.
    """

    decode_sizes: tuple[int, ...] = ()
    mixed_sizes: tuple[int, ...] = ()
    _seen: dict[tuple[bool, int], float] = field(default_factory=dict)

    def of(self, num_tokens: int) -> float:
        return self._padded(num_tokens, is_mixed=False) if num_tokens else 0.0

    def more(self, num_tokens: int, joining: int) -> float:
        return max(0.0, self._padded(num_tokens + joining, is_mixed=True) - self.of(num_tokens)) if joining else 0.0

    def joining_in(self, seconds: float, num_tokens: int) -> int:
        """As many as fill the largest size that takes no longer; but those of the smallest size that has room for
        `LEAST_JOINING`, which one token would cost as well."""
        sizes = [size for size in self.mixed_sizes if size > num_tokens]
        if not sizes:
            return 0
        sizes = [size for size in sizes if size >= num_tokens + LEAST_JOINING] or sizes[-1:]
        most_s = self.of(num_tokens) + seconds
        fitting = [size for size in sizes if self._padded(size, is_mixed=True) <= most_s]
        return max(fitting, default=sizes[0]) - num_tokens

    def observe(self, num_rows: int, joining: int, seconds: float) -> None:
        key = joining > 0, self._size(num_rows + joining, is_mixed=joining > 0)
        before = self._seen.get(key, seconds)
        self._seen[key] = before + self.rate * (seconds - before)
        if key[0] and key[1] == self.mixed_sizes[-1]:
            self.token_s = self._seen[key] / key[1]

    def _size(self, num_tokens: int, *, is_mixed: bool) -> int:
        sizes = self.mixed_sizes if is_mixed else self.decode_sizes
        place = bisect_left(sizes, num_tokens)
        return sizes[place] if place < len(sizes) else num_tokens

    def _padded(self, num_tokens: int, *, is_mixed: bool) -> float:
        size = self._size(num_tokens, is_mixed=is_mixed)
        if (seconds := self._seen.get((is_mixed, size))) is not None:
            return seconds
        if not is_mixed and (seconds := self._seen.get((True, self.mixed_sizes[0]))) is not None:
            return seconds
        at_least = max((s for (_, other), s in self._seen.items() if other < size), default=0.0)
        at_most = min((s for (_, other), s in self._seen.items() if other > size), default=inf)
        return max(at_least, min(at_most, max(self.fixed_s, self.token_s * size)))

"""What a step costs, so that the scheduler can spend time instead of tokens."""

from __future__ import annotations

from dataclasses import dataclass

FEW_TOKENS = 16
"""A card has always done its arithmetic over so few tokens before it has read the weights."""
SLOW, MANY_TOKENS = 2.0, 128
"""A call over a number of tokens that takes many times what the fixed part says is not below the knee, whatever the
estimate says."""


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

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Learn from one model call. Small calls teach the fixed part, large ones the marginal part."""
        if num_tokens * self.token_s < self.fixed_s:
            self._learn_fixed(max(0.0, seconds - self.token_s * num_tokens))
        else:
            self._learn_token(max(0.0, (seconds - self.fixed_s) / num_tokens))

    def _learn_fixed(self, seconds: float) -> None:
        self.fixed_s += self.rate * (seconds - self.fixed_s)

    def _learn_token(self, seconds: float) -> None:
        self.token_s += self.rate * (seconds - self.token_s)


@dataclass(slots=True)
class CardCost(StepCost):
    """Seconds of a model call over T tokens on a card: `max(fixed_s, token_s * T)`.

    A card reads weights while it multiplies, so rows are free up to the knee where arithmetic takes as long as reading.
    """

    def of(self, num_tokens: int) -> float:
        return max(self.fixed_s, self.token_s * num_tokens) if num_tokens else 0.0

    def more(self, num_tokens: int, joining: int) -> float:
        return self.of(num_tokens + joining) - self.of(num_tokens)

    def joining_in(self, seconds: float, num_tokens: int) -> int:
        if self.token_s <= 0:
            return 1 << 30
        return int((self.of(num_tokens) + seconds) / self.token_s) - num_tokens

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Learn from one model call. Calls below the knee teach the fixed part, those above it the marginal part; so do
        large ones that are slow, or an estimate with its knee too far out would never come back."""
        is_slow = num_tokens >= MANY_TOKENS and seconds > SLOW * self.fixed_s
        if num_tokens <= FEW_TOKENS or (num_tokens * self.token_s < self.fixed_s and not is_slow):
            self._learn_fixed(seconds)
        else:
            self._learn_token(seconds / num_tokens)

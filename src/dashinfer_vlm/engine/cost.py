"""What a step costs, so that the scheduler can spend time instead of tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class StepCost:
    """Seconds of a model call over T tokens: `fixed_s + token_s * T`.

    The fixed part is the reading of the weights, which every step pays once; the marginal part is arithmetic. Both
    follow what steps really took, by exponential averaging: a machine that throttles or has noisy neighbours moves
    the estimate, one slow step hardly does.
    """

    fixed_s: float
    token_s: float
    rate: float = 0.1

    def of(self, num_tokens: int) -> float:
        return self.fixed_s + self.token_s * num_tokens if num_tokens else 0.0

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Learn from one model call. Small calls teach the fixed part, large ones the marginal part."""
        if num_tokens * self.token_s < self.fixed_s:
            sample = max(0.0, seconds - self.token_s * num_tokens)
            self.fixed_s += self.rate * (sample - self.fixed_s)
        else:
            sample = max(0.0, (seconds - self.fixed_s) / num_tokens)
            self.token_s += self.rate * (sample - self.token_s)

    def tokens_in(self, seconds: float) -> int:
        """How many tokens may join a call that is made anyway, for `seconds` more."""
        return int(seconds / self.token_s) if self.token_s > 0 else 1 << 30

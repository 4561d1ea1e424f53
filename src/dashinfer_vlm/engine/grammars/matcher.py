"""Where one sequence stands in its grammar."""

from __future__ import annotations

from collections.abc import Sequence

import llguidance

__all__ = ["Matcher"]

_FAILED = "the grammar became too complex while it was followed; simplify it"


class Matcher:
    """Follows the output of one sequence, token by token."""

    def __init__(self, state: llguidance.LLMatcher) -> None:
        """`state` is this object's own from now on."""
        self.state = state

    def accept(self, token: int) -> None:
        self.state.consume_token(token)

    def num_allowed(self, tokens: Sequence[int]) -> int:
        """How many of `tokens`, from the first on, may follow one behind the other."""
        return self.state.validate_tokens(list(tokens))

    @property
    def problem(self) -> str | None:
        """Why it can be followed no further, fit for the client's eyes: a limit of the library, never the output."""
        return _FAILED if self.state.is_error() else None

    @property
    def is_complete(self) -> bool:
        """Nothing may follow."""
        return self.state.is_stopped()

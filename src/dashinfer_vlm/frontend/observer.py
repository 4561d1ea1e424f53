"""What the front end tells about its requests while they run; the server's metrics listen."""

from __future__ import annotations

from typing import Protocol


class Observer(Protocol):
    """Called in the event loop, so every method must be quick and must not raise."""

    def tokens(self, num_tokens: int, seconds: float, *, first: bool) -> None:
        """`num_tokens` of one choice came at once, `seconds` after the ones before, or after the request if `first`."""
        ...

    def ended(self, *, num_prompt_tokens: int, num_cached_tokens: int, reasons: list[str], seconds: float) -> None:
        """A call is over after `seconds`. One reason per choice: stop, length, tool_calls, abort, timeout or error."""
        ...


class Silence:
    """Nobody listens."""

    def tokens(self, num_tokens: int, seconds: float, *, first: bool) -> None: ...

    def ended(self, *, num_prompt_tokens: int, num_cached_tokens: int, reasons: list[str], seconds: float) -> None: ...

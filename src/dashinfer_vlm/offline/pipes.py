"""Batches through pipes: requests from standard input, answers to standard output.

A pipe has no number of lines, and what went through it cannot be looked up: such a run cannot go on after its end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.server.batches.lines import BatchRecord, Line, encoded, numbered_lines

__all__ = ["PipedInput", "PipedOutput"]

_STDIN, _STDOUT = 0, 1


class PipedInput:
    """Standard input, read as its lines come."""

    num_lines = None

    def check(self, done: dict[int, str | None]) -> None:
        """Raise ConfigError when the output holds answers, which may be those of other lines."""
        if done:
            raise ConfigError(
                f"the output holds {len(done)} answers, and a run that reads standard input cannot go on from them; "
                "name another output, or a file as input"
            )

    def open_lines(self, done: dict[int, str | None]) -> Iterator[Line]:
        """All lines."""
        self.check(done)
        # not sys.stdin: an interrupted program closes that one, and would wait for the thread that reads it
        with open(_STDIN, "rb", closefd=False) as lines:
            yield from numbered_lines(lines)


class PipedOutput:
    """Standard output; every record is written whole, and a reader that is slow slows the run down."""

    name = "standard output"
    can_resume = False

    def __init__(self) -> None:
        self.done: dict[int, str | None] = {}

    def write(self, record: BatchRecord) -> None:
        """Raises ConfigError once nobody reads any more."""
        left = encoded(record)
        try:
            while left:
                left = left[os.write(_STDOUT, left) :]
        except OSError as error:
            raise ConfigError(f"{self.name} cannot be written: {error.strerror}") from error

    def close(self) -> None:
        """There is nothing to give up."""

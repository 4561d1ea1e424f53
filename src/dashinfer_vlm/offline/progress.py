"""How far a list of prompts has come, as a person sees it."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class AnswerProgress:
    """A bar on standard error with answers done and tokens per second; use it as a context manager."""

    def __init__(self, num_prompts: int, *, enabled: bool) -> None:
        self._bar = Progress(
            TextColumn("Answers"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rate]:.0f} tokens/s"),
            console=Console(stderr=True),
            disable=not enabled,
        )
        self._task = self._bar.add_task("", total=num_prompts, rate=0.0)
        self._start_s = time.monotonic()
        self._num_tokens = 0

    def advance(self, num_tokens: int) -> None:
        """One more prompt has been answered, with this many tokens."""
        self._num_tokens += num_tokens
        rate = self._num_tokens / max(time.monotonic() - self._start_s, 1e-6)
        self._bar.update(self._task, advance=1, rate=rate)

    def __enter__(self) -> AnswerProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

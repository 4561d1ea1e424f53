"""Loading, as a person sees it: a bar on a terminal, a line per quarter in a log file."""

from __future__ import annotations

import logging
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

__all__ = ["LoadingProgress"]

logger = logging.getLogger(__name__)


class LoadingProgress:
    """Call it with a stage, how much of it is done, and how much there is; use it as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._tasks: dict[str, TaskID] = {}
        self._quarters: dict[str, int] = {}
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> LoadingProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._console.is_terminal:
            self._draw(stage, done, total)
        else:
            self._log(stage, done, total)

    def _draw(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(f"Loading {stage}", total=total)
        self._bar.update(self._tasks[stage], completed=done, total=total)

    def _log(self, stage: str, done: int, total: int) -> None:
        quarter = 4 * done // total if total else 4
        if quarter != self._quarters.get(stage):
            self._quarters[stage] = quarter
            logger.info("Loading %s: %d %%", stage, 25 * quarter)

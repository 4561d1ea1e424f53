"""`dashinfer-vlm run`: a file of requests, answered without a server."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dashinfer_vlm import flags
from dashinfer_vlm.cli.command import CONTEXT
from dashinfer_vlm.cli.logs import set_up_logging
from dashinfer_vlm.cli.options import options
from dashinfer_vlm.config import EngineConfig, MediaConfig, ServerConfig
from dashinfer_vlm.hub import names_of, resolve

if TYPE_CHECKING:
    from dashinfer_vlm.server.batches.ends import BatchSink, BatchSource
    from dashinfer_vlm.server.batches.lines import BatchRecord

__all__ = ["run"]

_PIPE = Path("-")
_LOOKAHEAD = 8
"""Requests that are prepared while all sequences of the engine run."""


@click.command("run", context_settings=CONTEXT)
@click.argument("input_file", metavar="INPUT.jsonl", type=click.Path(dir_okay=False, allow_dash=True, path_type=Path))
@click.option(
    "-o",
    "--output",
    "output_file",
    required=True,
    metavar="OUTPUT.jsonl",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    help="Where answers are appended; a run that was ended goes on from what is there.",
)
@click.option("--chat-template", metavar="FILE", help="File with a Jinja chat template; the model's own when absent.")
@options(EngineConfig, MediaConfig)
def run(input_file: Path, output_file: Path, chat_template: str | None, **values: Any) -> int:
    """Answer the requests of INPUT.jsonl, a file in the format of OpenAI's Batch API.

    Answers are written as they come, in any order, with errors in the lines that they belong to. The exit code is 1
    when a line that this run has answered has one.

    As INPUT.jsonl, - is standard input; as OUTPUT.jsonl, it is standard output. A pipe has no known number of lines,
    and a run that reads or writes one cannot go on after its end.
    """
    engine, media = flags.build(EngineConfig, values), flags.build(MediaConfig, values)
    engine.validate()
    media.validate()
    set_up_logging("warning")
    source, output = _open(input_file, output_file)
    try:
        source.check(output.done)  # a mismatch is found before the minutes of loading
        if len(output.done) == source.num_lines:
            click.echo(f"all {source.num_lines} lines are answered in {output_file}", err=True)
            return 0
        return asyncio.run(_run(source, output, engine, media, chat_template))
    finally:
        output.close()


def _open(input_file: Path, output_file: Path) -> tuple[BatchSource, BatchSink]:
    from dashinfer_vlm.offline.pipes import PipedInput, PipedOutput  # brings the server
    from dashinfer_vlm.server.batches.ends import BatchInput, BatchOutput

    source = PipedInput() if input_file == _PIPE else BatchInput(input_file)
    return source, PipedOutput() if output_file == _PIPE else BatchOutput(output_file)


async def _run(
    source: BatchSource, output: BatchSink, engine_config: EngineConfig, media: MediaConfig, chat_template: str | None
) -> int:
    from dashinfer_vlm.frontend.opening import open_service
    from dashinfer_vlm.server.app import create_app
    from dashinfer_vlm.server.batches.run import BatchRun

    config = resolve(engine_config)
    async with open_service(config, media, chat_template=chat_template) as service:
        app = create_app(service, ServerConfig(served_model_name=names_of(engine_config)))
        most = config.max_num_seqs + _LOOKAHEAD
        with _Progress(source.num_lines, len(output.done)) as progress:
            batch = BatchRun(
                app,
                output,
                window=lambda: most,
                is_alive=service.engine.alive,
                on_record=progress.advance,
            )
            async with app.router.lifespan_context(app):
                await batch.run(source)
    return progress.conclude(output.name)


class _Progress:
    """A bar with answered and failed lines."""

    def __init__(self, num_lines: int | None, num_done: int) -> None:
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("Lines"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[failed]} failed"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=num_lines, completed=num_done, failed=0)
        self._num_done = num_done
        self._num_answered = self._num_failed = 0

    def advance(self, record: BatchRecord) -> None:
        self._num_answered += record.is_good
        self._num_failed += not record.is_good
        self._bar.update(self._task, advance=1, failed=self._num_failed)

    def conclude(self, name: str) -> int:
        before = f", {self._num_done} were there before" if self._num_done else ""
        self._console.print(
            f"{self._num_answered} lines answered, {self._num_failed} failed{before}: {name}",
            markup=False,
            soft_wrap=True,
        )
        return int(self._num_failed > 0)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

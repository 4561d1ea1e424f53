"""Grammars are tried in a process that may die, before the engine compiles them.

The library reports most of what it cannot do, and bounds its work. What is left is a stack that overflows and work that
its bounds do not see; neither may happen where the model is. Run as `python -m dashinfer_vlm.engine.grammars.trial`, it
reads grammars and writes verdicts, JSON, one a line, until its input ends.
"""

from __future__ import annotations

import math
import queue
import resource
import select
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import cast

import llguidance
import msgspec

from dashinfer_vlm.child_process import running
from dashinfer_vlm.engine.grammars.forms import compile_for
from dashinfer_vlm.request import Grammar

__all__ = ["Trial"]

CPU_S = 3
"""Of the processor's time that one grammar may take, and of rounding less than one more."""
WALL_S = 20.0
"""The same by the clock, for a process that waits or a machine that is very busy."""
_MEMORY_BYTES = 1 << 30
_STACK_BYTES = 2 << 20
"""Less than the threads have that compile the grammar later, and as much as those that make its masks."""


class Trial:
    """The process, started when it is first needed and again whenever it has died. For one thread at a time."""

    command: tuple[str, ...] = running("dashinfer_vlm.engine.grammars.trial")

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def problem(self, grammar: Grammar) -> str | None:
        """Why the grammar cannot be compiled, or None."""
        process = self._process
        if process is None or process.poll() is not None:
            self.close()
            process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(msgspec.json.encode(grammar) + b"\n")
        process.stdin.flush()
        answer = select.poll()
        answer.register(process.stdout, select.POLLIN)
        line = process.stdout.readline() if answer.poll(WALL_S * 1e3) else b""
        if line:
            return cast("str | None", msgspec.json.decode(line))
        self.close()
        return f"it takes more than {CPU_S} s, more memory or deeper recursion than is allowed to compile it"

    def close(self) -> None:
        """End the process; idempotent."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _start(self) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self._process


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(_STACK_BYTES)
    tokenizer = llguidance.LLTokenizer("byte")
    for line in sys.stdin.buffer:
        _limit_cpu()
        grammar = msgspec.json.decode(line, type=Grammar)
        verdict = _in_a_thread(lambda grammar=grammar: _problem(tokenizer, grammar))  # type: ignore[misc]
        sys.stdout.buffer.write(msgspec.json.encode(verdict) + b"\n")
        sys.stdout.buffer.flush()


def _problem(tokenizer: llguidance.LLTokenizer, grammar: Grammar) -> str | None:
    try:
        matcher = compile_for(tokenizer, grammar)
    except (ValueError, RecursionError) as error:
        return str(error)
    matcher.compute_bitmask()
    if matcher.is_stopped() and not matcher.is_accepting():
        return "nothing satisfies it"
    return matcher.get_error() or None


def _limit_cpu() -> None:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(usage.ru_utime + usage.ru_stime) + CPU_S, hard))


def _in_a_thread(work: Callable[[], str | None]) -> str | None:
    """A thread's stack has the size that was set for it; the first thread's has whatever the system gave it."""
    results: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    thread = threading.Thread(target=lambda: results.put(work()))
    thread.start()
    thread.join()
    return results.get_nowait()


if __name__ == "__main__":
    main()

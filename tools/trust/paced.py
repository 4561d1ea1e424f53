"""A server whose engine has no model: all streams get a token at once, again and again after the same time.

    python tools/trust/paced.py COMMAND FLAG...

is COMMAND, a `dashinfer_vlm_serve`, with that engine in place of its own. The engine is in a process of its own as
always, and writes to a file when it handed out which token, on `time.perf_counter`'s clock, which all processes share.
SIGUSR1 ends its streams.
"""

from __future__ import annotations

import os
import signal
import struct
import sys
import time
from array import array
from concurrent.futures import Future
from pathlib import Path
from string import ascii_letters, digits
from typing import Any

from tokenizers import Tokenizer

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine.client import OnProgress
from dashinfer_vlm.engine.host.child import serve
from dashinfer_vlm.engine.info import EngineInfo
from dashinfer_vlm.engine.stats import EngineStats
from dashinfer_vlm.request import Finish, Output, Request

__all__ = ["EVERY_S", "LETTERS", "STAMPS", "read_stamps"]

LETTERS = ascii_letters + digits
"""The n-th token since the engine's start is letter n of these, over and over."""
EVERY_S, STAMPS = "TRUST_EVERY_S", "TRUST_STAMPS"
"""Variables: seconds between two tokens of a stream, and the file of the times."""
CHILD = (sys.executable, "-c", "import trust.paced; trust.paced.be_engine()")
MAX_LEN = 1 << 20


class PacedEngine:
    """Every request gets a token in every step; a step takes `every_s`."""

    def __init__(self, token_ids: list[int], every_s: float, stamps: Path) -> None:
        self._token_ids = token_ids
        self._every_s = every_s
        self._stamps = stamps.open("wb", buffering=0)
        self._num_steps = 0
        self._next_s = 0.0
        self._running: dict[str, None] = {}
        self._is_over = False
        signal.signal(signal.SIGUSR1, self._end)

    def prepare(self, request: Request) -> Future[Any] | None:
        return None

    def add(self, request: Request) -> None:
        self._running[request.id] = None

    def abort(self, request_id: str) -> None:
        self._running.pop(request_id, None)

    def has_work(self) -> bool:
        return bool(self._running)

    def step(self) -> list[Output]:
        time.sleep(max(0.0, self._next_s - time.perf_counter()))
        self._next_s = max(self._next_s, time.perf_counter() - self._every_s) + self._every_s
        finish = Finish("length") if self._is_over else None
        tokens = (self._token_ids[self._num_steps % len(LETTERS)],)
        outputs = [Output(request_id, tokens, finish=finish) for request_id in self._running]
        if self._is_over:
            self._running.clear()
        self._num_steps += 1
        self._stamps.write(struct.pack("d", time.perf_counter()))
        return outputs

    def stats(self) -> EngineStats:
        return EngineStats(num_running=len(self._running), num_steps_total=self._num_steps)

    def fail_all(self, message: str) -> list[Output]:
        return []

    def close(self) -> None:
        self._stamps.close()

    def _end(self, *_: object) -> None:
        self._is_over = True


def read_stamps(path: Path) -> list[float]:
    """When each token was handed out."""
    return list(array("d", path.read_bytes()))


def be_engine() -> None:
    """In the engine's process."""
    sys.exit(serve(_load))


def _load(config: EngineConfig, progress: OnProgress) -> tuple[PacedEngine, EngineInfo]:
    tokenizer = Tokenizer.from_file(f"{config.model}/tokenizer.json")
    info = EngineInfo(
        model="paced",
        max_model_len=MAX_LEN,
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=8,
        embedding_size=8,
        eos_token_ids=(),
        device="none",
        dtype="none",
        kv_dtype="none",
        block_size=16,
        num_blocks=MAX_LEN,
        max_num_seqs=4096,
        max_item_patches=10_000,
    )
    ids = [tokenizer.token_to_id(letter) for letter in LETTERS]
    return PacedEngine(ids, float(os.environ[EVERY_S]), Path(os.environ[STAMPS])), info


def _be_server() -> None:
    from dashinfer_vlm.cli.serve import main
    from dashinfer_vlm.engine.host.process import ProcessEngine

    ProcessEngine.command = CHILD
    sys.argv = sys.argv[1:]
    main()


if __name__ == "__main__":
    _be_server()

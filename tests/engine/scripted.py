"""An engine without a model, for the tests of everything around engines.

A request with the prompt [n, ...] gets the tokens 1..n, one per step, as far as it asks for them. Special prompts
misbehave, see `Script`.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from enum import IntEnum
from typing import Any

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine.client import OnProgress
from dashinfer_vlm.engine.info import EngineInfo
from dashinfer_vlm.engine.stats import EngineStats
from dashinfer_vlm.errors import CheckpointError, ContextLengthError, OverloadedError
from dashinfer_vlm.request import Finish, Output, Request
from dashinfer_vlm.shared_array import SharedArray

INFO = EngineInfo(
    model="scripted",
    max_model_len=100,
    vocab_size=1000,
    hidden_size=8,
    embedding_size=8,
    eos_token_ids=(2,),
    device="cpu",
    dtype="float32",
    kv_dtype="float32",
    block_size=16,
    num_blocks=64,
    max_num_seqs=4,
    max_item_patches=10_000,
)


class Script(IntEnum):
    """First prompt tokens with a meaning of their own."""

    REFUSE_LENGTH = -1
    REFUSE_LOAD = -2
    CRASH_STEP = -3
    """The step raises until the request is ended."""
    CRASH_ADD = -4
    ENDLESS = -5
    """A token per step until it is aborted; its steps take a millisecond, as those of a model would."""
    ECHO_ITEMS = -6
    """One token per item and positions: the sum of its numbers."""
    CRASH_EXIT = -7
    """The process ends at once."""
    HANG = -8
    """Its step does not end."""


class ScriptedEngine:
    def __init__(self) -> None:
        self.requests: dict[str, Request] = {}
        self.preparing: dict[str, Future[Any]] = {}
        """What requests wait for before they are added."""
        self.num_steps = 0
        self.aborted: list[str] = []
        self._produced: dict[str, int] = {}
        self._ended: list[Output] = []

    def prepare(self, request: Request) -> Future[Any] | None:
        return self.preparing.get(request.id)

    def add(self, request: Request, prepared: Future[Any] | None = None) -> None:
        match request.prompt_ids[0]:
            case Script.REFUSE_LENGTH:
                raise ContextLengthError("prompt has 200 tokens, the model's context is 100", param="messages")
            case Script.REFUSE_LOAD:
                raise OverloadedError("no room", retry_after_s=7)
            case Script.CRASH_ADD:
                raise ZeroDivisionError
            case Script.CRASH_EXIT:
                raise SystemExit(3)
        self.requests[request.id] = request
        self._produced[request.id] = 0

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        if self.requests.pop(request_id, None):
            self._ended.append(Output(request_id, finish=Finish("abort")))

    def step(self) -> list[Output]:
        self.num_steps += 1
        if any(request.prompt_ids[0] == Script.CRASH_STEP for request in self.requests.values()):
            raise ZeroDivisionError("scripted")
        if any(request.prompt_ids[0] == Script.HANG for request in self.requests.values()):
            time.sleep(600)
        if any(request.prompt_ids[0] == Script.ENDLESS for request in self.requests.values()):
            time.sleep(0.001)
        ended, self._ended = self._ended, []
        return ended + [self._advance(request) for request in list(self.requests.values())]

    def has_work(self) -> bool:
        return bool(self.requests or self._ended)

    def fail_all(self, message: str) -> list[Output]:
        ended = [Output(name, finish=Finish("error", None, message)) for name in self.requests]
        self.requests.clear()
        return ended

    def close(self) -> None:
        pass

    def stats(self) -> EngineStats:
        return EngineStats(num_running=len(self.requests), num_steps_total=self.num_steps)

    def _advance(self, request: Request) -> Output:
        if request.prompt_ids[0] == Script.ECHO_ITEMS:
            del self.requests[request.id]
            return Output(request.id, token_ids=_sums(request), finish=Finish("stop"))
        self._produced[request.id] += 1
        token = self._produced[request.id]
        last = token in (request.prompt_ids[0], request.params.max_tokens)
        if last:
            del self.requests[request.id]
        return Output(request.id, token_ids=(token,), finish=Finish("length") if last else None)


def _sums(request: Request) -> tuple[int, ...]:
    arrays = [item.patches if item.embedding is None else item.embedding for item in request.items]
    mapped = (a for a in (*arrays, request.positions) if not (a is None or isinstance(a, SharedArray)))
    return tuple(int(array.sum()) for array in mapped)


def load(config: EngineConfig, progress: OnProgress) -> tuple[ScriptedEngine, EngineInfo]:
    """Loads whatever it is given, but for a model named "broken" or "crash"."""
    for done in range(3):
        progress("weights", done + 1, 3)
    if config.model == "broken":
        raise CheckpointError("tensor x is missing")
    if config.model == "crash":
        raise ZeroDivisionError("scripted")
    return ScriptedEngine(), INFO

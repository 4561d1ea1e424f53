"""Stand-ins for the engine and the media room, so that the front end is tested without a model.

`ScriptedEngine` is a real `EngineClient` that emits the tokens it was told; `ScriptedLoader` loads nothing and counts
who holds what.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from dashinfer_vlm.engine.client import Listener
from dashinfer_vlm.engine.info import EngineInfo
from dashinfer_vlm.engine.stats import EngineStats
from dashinfer_vlm.errors import EngineDeadError
from dashinfer_vlm.media.turns import ANYBODY, Party
from dashinfer_vlm.media.types import LoadedMedia, MediaCounters, MediaRef
from dashinfer_vlm.request import Finish, Output, Request, TokenLogprob
from dashinfer_vlm.shared_array import SharedArray
from dashinfer_vlm.stages import Span
from tests.tokens import IM_END, VOCAB

EOS = IM_END
Answer = Callable[[Request], Sequence[int]]


def info(*, max_model_len: int = 4096, max_num_seqs: int = 8) -> EngineInfo:
    return EngineInfo(
        model="models/scripted",
        max_model_len=max_model_len,
        vocab_size=VOCAB,
        hidden_size=128,
        embedding_size=128,
        eos_token_ids=(EOS,),
        device="none",
        dtype="none",
        kv_dtype="none",
        block_size=16,
        num_blocks=256,
        max_num_seqs=max_num_seqs,
        max_item_patches=10_000,
    )


@dataclass
class ScriptedEngine:
    """Emits `answer(request)` token by token, then ends as a model would; a stand-in without weights."""

    answer: Answer
    info: EngineInfo = field(default_factory=info)
    error: Exception | None = None
    """Raised instead of taking a request."""
    failure: str | None = None
    """Message of a final output with reason "error" after `fails_after` tokens."""
    fails_after: int = 1
    pauses_after: int | None = None
    """Wait for `resume` after so many tokens."""
    num_cached_tokens: int = 0
    spans: tuple[Span, ...] = ()
    """Told with every first token."""
    vector: Callable[[Request], bytes] = lambda request: vector_of(request)
    """What answers a request for one."""
    stop_token: int = EOS
    """What ends an answer that is not cut by max_tokens."""
    requests: list[Request] = field(default_factory=list)
    running: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    aborted: list[str] = field(default_factory=list)
    paused: asyncio.Event = field(default_factory=asyncio.Event)
    """Set whenever a request has come to its pause."""
    resume: asyncio.Event = field(default_factory=asyncio.Event)
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    """Set whenever the last running request has ended."""
    is_alive: bool = True
    comes_back: bool = False
    """Whether a dead one is started again."""

    def ask(self, request: Request, listener: Listener) -> None:
        self.requests.append(request)
        if self.error is not None:
            raise self.error
        self.running[request.id] = asyncio.create_task(self._answer(request, listener))
        self.idle.clear()

    def leave(self, request_id: str) -> None:
        if task := self.running.get(request_id):
            task.cancel()
            self.aborted.append(request_id)
            self._forget(request_id)

    async def _answer(self, request: Request, listener: Listener) -> None:
        async for output in self._outputs(request):
            if output.finish:
                self._forget(request.id)
            listener(output)

    def _forget(self, request_id: str) -> None:
        del self.running[request_id]
        if not self.running:
            self.idle.set()

    async def stats(self) -> EngineStats:
        if not self.is_alive:
            raise EngineDeadError("the scripted engine is dead")
        return EngineStats(num_running=len(self.running))

    def alive(self) -> bool:
        return self.is_alive

    def gone(self) -> bool:
        return not self.is_alive and not self.comes_back

    async def close(self) -> None:
        self.is_alive = False

    async def _outputs(self, request: Request) -> AsyncIterator[Output]:
        if request.wants_vector:
            await asyncio.sleep(0)
            yield Output(request.id, finish=Finish("stop"), spans=self.spans, vector=self.vector(request))
            return
        limit = request.params.max_tokens
        if request.params.prompt_logprobs is not None:
            yield Output(request.id, prompt_logprobs=tuple(_told_of_prompt(request)))
        tokens = list(self.answer(request))
        for i, token in enumerate(tokens if limit is None else tokens[:limit]):
            if i == self.pauses_after:
                self.paused.set()
                await self.resume.wait()
            if self.failure is not None and i == self.fails_after:
                yield Output(request.id, finish=Finish("error", message=self.failure))
                return
            await asyncio.sleep(0)  # other requests take their turns between two steps
            yield self._output(request, token, self.spans if i == 0 else ())
        full = limit is not None and len(tokens) >= limit
        yield Output(request.id, finish=Finish("length") if full else Finish("stop", stop_token=self.stop_token))

    def _output(self, request: Request, token: int, spans: tuple[Span, ...]) -> Output:
        top = request.params.logprobs
        row = TokenLogprob(token, -0.5, 1, ((token, -0.5), (0, float("-inf")))[:top])
        logprobs = () if top is None else (row,)
        return Output(
            request.id, (token,), logprobs, None, len(request.prompt_ids), self.num_cached_tokens, spans=spans
        )


def vector_of(request: Request) -> bytes:
    """Of 128 numbers, which tell prompts apart."""
    return np.array([len(request.prompt_ids), sum(request.prompt_ids), 1, *[0] * 125], "<f4").tobytes()


def _told_of_prompt(request: Request) -> Iterator[TokenLogprob]:
    """The id before it is always likelier than a token of the prompt."""
    for before, token in itertools.pairwise(request.prompt_ids):
        yield TokenLogprob(token, float("-inf"), 2, ((before, -0.25),)[: request.params.prompt_logprobs])


@dataclass
class ScriptedLoader:
    """Makes media of `num_tokens` tokens out of nothing and counts what is held; a stand-in for the media room."""

    num_tokens: int = 4
    pixel_bounds: tuple[int, int] = (1000, 1_000_000)
    side_step: int = 28
    fails: dict[str, Exception] = field(default_factory=dict)
    """Errors by URL."""
    hangs: set[str] = field(default_factory=set)
    """URLs that never come."""
    loaded: list[MediaRef] = field(default_factory=list)
    parties: list[Party] = field(default_factory=list)
    """For whom each of them was loaded."""
    salts: list[str] = field(default_factory=list)
    num_held: int = 0
    hanging: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once somebody waits for a URL that never comes."""
    max_patches: int | None = None

    @property
    def counters(self) -> MediaCounters:
        return MediaCounters(fetches=len(self.loaded))

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def load(self, ref: MediaRef, party: Party = ANYBODY, *, salt: str = "") -> LoadedMedia:
        source = ref.source if isinstance(ref.source, str) else "frames"
        if source in self.fails:
            raise self.fails[source]
        if source in self.hangs:
            self.hanging.set()
            await asyncio.Event().wait()
        self.loaded.append(ref)
        self.parties.append(party)
        self.salts.append(salt)
        self.num_held += 1
        released = False

        def release() -> None:
            nonlocal released
            assert not released, "released twice"
            released = True
            self.num_held -= 1

        return LoadedMedia(
            kind=ref.kind,
            grid=(1, 2, 2 * self.num_tokens),
            num_tokens=self.num_tokens,
            content_hash=source.encode().ljust(32)[:32],
            features=SharedArray("nowhere", (4 * self.num_tokens, 1176), "|u1"),
            release=release,
        )

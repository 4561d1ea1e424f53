"""Whole answers: a generation read to its end, for every caller who does not stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dashinfer_vlm.frontend.deltas import Delta, EndReason
from dashinfer_vlm.frontend.generation import Generation
from dashinfer_vlm.frontend.messages import ToolCall
from dashinfer_vlm.frontend.pieces import Piece, join
from dashinfer_vlm.request import TokenLogprob


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer to a prompt."""

    text: str
    """Without reasoning and calls of tools."""
    token_ids: tuple[int, ...]
    """Without the token that ended it."""
    finish_reason: EndReason
    stop: str | None = None
    """The stop string that ended it."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One per token when `SamplingParams.logprobs` asks for them."""
    reasoning: str = ""
    """What the model thought before it answered."""
    tool_calls: tuple[ToolCall, ...] = ()
    end_ids: tuple[int, ...] = ()
    """The token that ended it, where one did."""
    prompt_ids: Sequence[int] = field(default=(), repr=False)
    prompt_logprobs: tuple[TokenLogprob, ...] = field(default=(), repr=False)
    """One per token of the prompt but for its first, when `SamplingParams.prompt_logprobs` asks for them."""


async def collect(generation: Generation) -> tuple[Answer, ...]:
    """Read `generation` to its end, one answer per choice; it is closed when it fails or the reader is cancelled."""
    drafts = [_Draft() for _ in generation.choices]
    try:
        async for delta in generation:
            drafts[delta.index].add(delta)
    finally:
        generation.close()
    return tuple(draft.answer(generation.prompt_logprobs(i)) for i, draft in enumerate(drafts))


async def collect_vectors(generation: Generation) -> list[bytes]:
    """The same of a generation that is for vectors: `Choice.vector` of each."""
    try:
        async for _ in generation:
            pass
    finally:
        generation.close()
    return [choice.vector for choice in generation.choices]


@dataclass(slots=True)
class _Draft:
    pieces: list[Piece] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: EndReason | None = None
    end_ids: tuple[int, ...] = ()
    prompt_ids: Sequence[int] = ()
    stop: str | None = None

    def add(self, delta: Delta) -> None:
        self.pieces += delta.pieces
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason
        self.end_ids = delta.end_ids
        self.prompt_ids = self.prompt_ids or delta.prompt_ids
        self.stop = delta.stop

    def answer(self, prompt_logprobs: tuple[TokenLogprob, ...]) -> Answer:
        assert self.finish_reason is not None, self
        said = join(self.pieces)
        return Answer(
            text=said.text,
            reasoning=said.reasoning,
            tool_calls=said.calls,
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            stop=self.stop,
            logprobs=tuple(self.logprobs),
            end_ids=self.end_ids,
            prompt_ids=self.prompt_ids,
            prompt_logprobs=prompt_logprobs,
        )

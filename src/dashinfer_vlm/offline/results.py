"""What comes back from the offline API."""

from __future__ import annotations

from dataclasses import dataclass, field

from dashinfer_vlm.errors import DashInferError
from dashinfer_vlm.frontend.generation import EndReason, Generation, Usage
from dashinfer_vlm.request import TokenLogprob


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer to a prompt."""

    text: str
    token_ids: tuple[int, ...]
    """Without the token that ended it."""
    finish_reason: EndReason
    logprobs: tuple[TokenLogprob, ...] = ()
    """One per token when `SamplingParams.logprobs` asks for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """All answers to one prompt, or, in a list of results, the error that it met instead."""

    answers: tuple[Answer, ...] = ()
    usage: Usage = field(default_factory=lambda: Usage(0, 0, 0))
    error: DashInferError | None = None

    @property
    def text(self) -> str:
        """Text of the first answer; raises `error` where there is one."""
        return self.first.text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Tokens of the first answer; raises `error` where there is one."""
        return self.first.token_ids

    @property
    def first(self) -> Answer:
        if self.error:
            raise self.error
        return self.answers[0]


@dataclass(slots=True)
class _Draft:
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: EndReason = "length"

    def answer(self) -> Answer:
        return Answer(
            text=self.text,
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            logprobs=tuple(self.logprobs),
        )


async def collect(generation: Generation) -> Result:
    """Read `generation` to its end; it is closed when the reader is cancelled."""
    drafts = [_Draft() for _ in generation.choices]
    try:
        async for delta in generation:
            draft = drafts[delta.index]
            draft.text += delta.text
            draft.token_ids += delta.token_ids
            draft.logprobs += delta.logprobs
            draft.finish_reason = delta.finish_reason or draft.finish_reason
    finally:
        generation.close()
    return Result(answers=tuple(draft.answer() for draft in drafts), usage=generation.usage)

"""`POST /v1/completions`: text only, without a chat template."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from dashinfer_vlm.frontend.answers import Answer
from dashinfer_vlm.frontend.generation import Delta, Usage
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from dashinfer_vlm.request import TokenLogprob
from dashinfer_vlm.server.body import read_body
from dashinfer_vlm.server.context import Context
from dashinfer_vlm.server.protocol import CompletionBody
from dashinfer_vlm.server.replies import (
    Chunk,
    Head,
    TextChoice,
    TextLogprobs,
    TextReply,
    UsageReply,
    text_logprobs,
)
from dashinfer_vlm.server.respond import respond


def completion_routes(context: Context) -> APIRouter:
    router = APIRouter()
    service = context.service

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await read_body(request, CompletionBody, context.bodies)
        head = Head.new("cmpl", context.model_name(body.model))
        wants_logprobs = body.logprobs is not None
        writer = CompletionWriter(head, service.tokenizer, logprobs=wants_logprobs, include_usage=body.include_usage)
        begin = service.complete(body.prompts(), body.params(service.sampling_defaults))
        return await respond(request, begin, writer, stream=bool(body.stream))

    return router


class CompletionWriter:
    """Answers in the form of OpenAI's text completions."""

    def __init__(self, head: Head, tokenizer: Tokenizer, *, logprobs: bool, include_usage: bool) -> None:
        self._head = head
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._include_usage = include_usage
        self._offsets: dict[int, int] = {}

    def whole(self, answers: Sequence[Answer], usage: Usage) -> TextReply:
        choices = [TextChoice(i, a.text, self._rows(i, a.logprobs), a.finish_reason) for i, a in enumerate(answers)]
        head = self._head
        return TextReply(head.id, head.created, head.model, choices, UsageReply.of(usage))

    def news(self, delta: Delta) -> list[msgspec.Struct]:
        if not (delta.text or delta.finish_reason or (self._logprobs and delta.logprobs)):
            return []
        rows = self._rows(delta.index, delta.logprobs)
        return [self._chunk(TextChoice(delta.index, delta.text, rows, delta.finish_reason))]

    def last(self, usage: Usage) -> list[msgspec.Struct]:
        return [self._chunk(None, UsageReply.of(usage))] if self._include_usage else []

    def _rows(self, index: int, logprobs: tuple[TokenLogprob, ...]) -> TextLogprobs | None:
        if not self._logprobs:
            return None
        offset = self._offsets.get(index, 0)
        rows = text_logprobs(logprobs, self._tokenizer, offset)
        self._offsets[index] = offset + sum(map(len, rows.tokens))
        return rows

    def _chunk(self, choice: TextChoice | None, usage: UsageReply | None = None) -> Chunk:
        head = self._head
        told = usage if self._include_usage else msgspec.UNSET
        return Chunk(head.id, "text_completion", head.created, head.model, [] if choice is None else [choice], told)

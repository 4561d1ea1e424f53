"""`POST /v1/completions`: text only, without a chat template."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from dashinfer_vlm.frontend.answers import Answer
from dashinfer_vlm.frontend.deltas import Delta, Usage
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from dashinfer_vlm.request import TokenLogprob
from dashinfer_vlm.server.body import read_body
from dashinfer_vlm.server.context import Context
from dashinfer_vlm.server.described import GENERATING, Operation
from dashinfer_vlm.server.errors import ErrorBody
from dashinfer_vlm.server.protocol import CompletionBody
from dashinfer_vlm.server.replies import (
    NO_EXTRAS,
    Extras,
    Head,
    TextChoice,
    TextChunk,
    TextLogprobs,
    TextReply,
    UsageEvents,
    UsageReply,
    text_logprobs,
)
from dashinfer_vlm.server.respond import respond

COMPLETIONS = Operation(
    summary="Continue text or ids; no chat template, no images.",
    body=CompletionBody,
    example={"prompt": "A heron is", "max_tokens": 16},
    reply=TextReply,
    events=(TextChunk, ErrorBody),
    errors=GENERATING,
)


def completion_routes(context: Context) -> APIRouter:
    router = APIRouter()
    service = context.service

    @router.post("/v1/completions", openapi_extra=COMPLETIONS.extra)
    async def completions(request: Request) -> Response:
        body = await read_body(request, CompletionBody, context.bodies)
        head = context.head("cmpl", body.model)
        wants_logprobs = body.logprobs is not None
        writer = CompletionWriter(
            head, service.tokenizer, logprobs=wants_logprobs, usage=body.usage_events, extras=body.extras
        )
        begin = service.complete(body.prompts(), body.params(service.sampling_defaults))
        return await respond(request, begin, writer, stream=bool(body.stream))

    return router


class CompletionWriter:
    """Answers in the form of OpenAI's text completions."""

    def __init__(
        self, head: Head, tokenizer: Tokenizer, *, logprobs: bool, usage: UsageEvents, extras: Extras = NO_EXTRAS
    ) -> None:
        self._head = head
        self._extras = extras
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._usage = usage
        self._offsets: dict[int, int] = {}

    def whole(self, answers: Sequence[Answer], usage: Usage) -> TextReply:
        extras, tokenizer = self._extras, self._tokenizer
        choices = [
            TextChoice(
                i,
                a.text,
                self._rows(i, a.logprobs),
                a.finish_reason,
                extras.ids(a.token_ids + a.end_ids),
                extras.prompt_ids(a),
                extras.prompt_rows(a, tokenizer),
            )
            for i, a in enumerate(answers)
        ]
        head = self._head
        return TextReply(head.id, head.created, head.model, choices, UsageReply.of(usage), head.fingerprint)

    def news(self, delta: Delta, usage: Callable[[], Usage]) -> list[msgspec.Struct]:
        """What each step brought, which may be no text (yet), with the reason in the last one."""
        if not (delta.text or delta.token_ids or delta.finish_reason):
            return []
        rows, extras = self._rows(delta.index, delta.logprobs), self._extras
        choice = TextChoice(
            delta.index,
            delta.text,
            rows,
            delta.finish_reason,
            extras.ids(delta.token_ids + delta.end_ids),
            extras.prompt_ids(delta),
        )
        return [self._chunk(choice, usage)]

    def last(self, usage: Usage) -> list[msgspec.Struct]:
        return [self._chunk(None, lambda: usage)] if self._usage.last else []

    def _rows(self, index: int, logprobs: tuple[TokenLogprob, ...]) -> TextLogprobs | None:
        if not self._logprobs:
            return None
        offset = self._offsets.get(index, 0)
        rows = text_logprobs(logprobs, self._tokenizer, offset)
        self._offsets[index] = offset + sum(map(len, rows.tokens))
        return rows

    def _chunk(self, choice: TextChoice | None, usage: Callable[[], Usage]) -> TextChunk:
        head, told = self._head, self._usage.told(usage, is_last=choice is None)
        choices = [] if choice is None else [choice]
        return TextChunk(head.id, head.created, head.model, head.fingerprint, choices, told)

"""`POST /v1/chat/completions`."""

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
from dashinfer_vlm.server.protocol import ChatBody
from dashinfer_vlm.server.replies import (
    AnswerMessage,
    ChatChoice,
    ChatLogprobs,
    ChatReply,
    Chunk,
    ChunkChoice,
    DeltaMessage,
    Head,
    UsageReply,
    chat_logprobs,
)
from dashinfer_vlm.server.respond import respond


def chat_routes(context: Context) -> APIRouter:
    router = APIRouter()
    service = context.service

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = await read_body(request, ChatBody, context.bodies)
        head = Head.new("chatcmpl", context.model_name(body.model))
        writer = ChatWriter(head, service.tokenizer, logprobs=bool(body.logprobs), include_usage=body.include_usage)
        messages = body.conversation(service.prompts.loader.pixel_bounds)
        begin = service.chat(messages, body.params(service.sampling_defaults))
        stream = bool(body.stream)
        del body, messages  # their images may be large, and the answer takes long
        return await respond(request, begin, writer, stream=stream)

    return router


class ChatWriter:
    """Answers in the form of OpenAI's chat completions."""

    def __init__(self, head: Head, tokenizer: Tokenizer, *, logprobs: bool, include_usage: bool) -> None:
        self._head = head
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._include_usage = include_usage
        self._begun: set[int] = set()

    def whole(self, answers: Sequence[Answer], usage: Usage) -> ChatReply:
        choices = [
            ChatChoice(i, AnswerMessage("assistant", a.text), self._rows(a.logprobs), a.finish_reason)
            for i, a in enumerate(answers)
        ]
        head = self._head
        return ChatReply(head.id, head.created, head.model, choices, UsageReply.of(usage))

    def news(self, delta: Delta) -> list[msgspec.Struct]:
        """The role first, then text, then the reason why it ends, each in an event of its own."""
        events: list[msgspec.Struct] = []
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            events.append(self._chunk(ChunkChoice(delta.index, DeltaMessage(role="assistant", content=""))))
        if delta.text or (self._logprobs and delta.logprobs):
            rows = self._rows(delta.logprobs)
            events.append(self._chunk(ChunkChoice(delta.index, DeltaMessage(content=delta.text), rows)))
        if delta.finish_reason:
            choice = ChunkChoice(delta.index, DeltaMessage(), finish_reason=delta.finish_reason)
            events.append(self._chunk(choice))
        return events

    def last(self, usage: Usage) -> list[msgspec.Struct]:
        return [self._chunk(None, UsageReply.of(usage))] if self._include_usage else []

    def _rows(self, logprobs: tuple[TokenLogprob, ...]) -> ChatLogprobs | None:
        return chat_logprobs(logprobs, self._tokenizer) if self._logprobs else None

    def _chunk(self, choice: ChunkChoice | None, usage: UsageReply | None = None) -> Chunk:
        head = self._head
        told = usage if self._include_usage else msgspec.UNSET
        choices = [] if choice is None else [choice]
        return Chunk(head.id, "chat.completion.chunk", head.created, head.model, choices, told)

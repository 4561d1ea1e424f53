"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from dashinfer_vlm.frontend.answers import Answer
from dashinfer_vlm.frontend.deltas import Delta, EndReason, Usage
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from dashinfer_vlm.request import TokenLogprob
from dashinfer_vlm.server.body import read_body
from dashinfer_vlm.server.context import Context
from dashinfer_vlm.server.described import GENERATING, Operation
from dashinfer_vlm.server.errors import ErrorBody
from dashinfer_vlm.server.protocol import ChatBody
from dashinfer_vlm.server.replies import (
    NO_EXTRAS,
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatLogprobs,
    ChatReply,
    ChunkChoice,
    DeltaMessage,
    Extras,
    Head,
    UsageEvents,
    UsageReply,
    chat_logprobs,
)
from dashinfer_vlm.server.respond import respond

CHAT = Operation(
    summary="Answer a conversation with images and videos.",
    body=ChatBody,
    example={"messages": [{"role": "user", "content": "What is a heron?"}], "max_tokens": 16},
    reply=ChatReply,
    events=(ChatChunk, ErrorBody),
    errors=GENERATING,
)


def chat_routes(context: Context) -> APIRouter:
    router = APIRouter()
    service = context.service

    @router.post("/v1/chat/completions", openapi_extra=CHAT.extra)
    async def chat_completions(request: Request) -> Response:
        body = await read_body(request, ChatBody, context.bodies)
        head = context.head("chatcmpl", body.model)
        dialogue = body.dialogue(service.prompts.loader.pixel_bounds)
        writer = ChatWriter(
            head,
            service.tokenizer,
            logprobs=bool(body.logprobs),
            usage=body.usage_events,
            reasoning=body.include_reasoning is not False,
            extras=body.extras,
            names_tool=dialogue.choice.is_named,
        )
        begin = service.chat(dialogue, body.params(service.sampling_defaults))
        stream = bool(body.stream)
        del body, dialogue  # their images may be large, and the answer takes long
        return await respond(request, begin, writer, stream=stream)

    return router


class ChatWriter:
    """Answers in the form of OpenAI's chat completions."""

    def __init__(
        self,
        head: Head,
        tokenizer: Tokenizer,
        *,
        logprobs: bool,
        usage: UsageEvents,
        reasoning: bool = True,
        extras: Extras = NO_EXTRAS,
        names_tool: bool = False,
    ) -> None:
        """`reasoning`: whether it is told; `names_tool`: the request names the one tool that is called."""
        self._names_tool = names_tool
        self._reasoning = reasoning
        self._extras = extras
        self._head = head
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._usage = usage
        self._begun: set[int] = set()

    def whole(self, answers: Sequence[Answer], usage: Usage) -> ChatReply:
        choices = [
            ChatChoice(
                i,
                AnswerMessage.of(a, reasoning=self._reasoning),
                self._rows(a.logprobs),
                self._reason(a.finish_reason),
                self._extras.ids(a.token_ids + a.end_ids),
            )
            for i, a in enumerate(answers)
        ]
        head, extras = self._head, self._extras
        return ChatReply(
            head.id,
            head.created,
            head.model,
            choices,
            UsageReply.of(usage),
            head.fingerprint,
            prompt_token_ids=extras.prompt_ids(answers[0]),
            prompt_logprobs=extras.prompt_rows(answers[0], self._tokenizer),
        )

    def news(self, delta: Delta, usage: Callable[[], Usage]) -> list[msgspec.Struct]:
        """The role first, then what each step brought, then the reason why it ends, each in an event of its own.

        A step whose tokens show no text (yet) is an event with empty content: clients take their times from events.
        """
        events: list[msgspec.Struct] = []
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            opened = ChunkChoice(delta.index, DeltaMessage(role="assistant", content=""))
            events.append(self._chunk(opened, usage, self._extras.prompt_ids(delta)))
        if delta.text or delta.token_ids or delta.pieces:
            choice = ChunkChoice(
                delta.index,
                DeltaMessage.of(delta.pieces, reasoning=self._reasoning),
                self._rows(delta.logprobs),
                token_ids=self._extras.ids(delta.token_ids),
            )
            events.append(self._chunk(choice, usage))
        if delta.finish_reason:
            ids = self._extras.ids(delta.end_ids)
            reason = self._reason(delta.finish_reason)
            choice = ChunkChoice(delta.index, DeltaMessage(), finish_reason=reason, token_ids=ids)
            events.append(self._chunk(choice, usage))
        return events

    def last(self, usage: Usage) -> list[msgspec.Struct]:
        return [self._chunk(None, lambda: usage)] if self._usage.last else []

    def _reason(self, reason: EndReason) -> EndReason:
        """OpenAI does not call it a surprise when the tool is called that it was told to call."""
        return "stop" if self._names_tool and reason == "tool_calls" else reason

    def _rows(self, logprobs: tuple[TokenLogprob, ...]) -> ChatLogprobs | None:
        return chat_logprobs(logprobs, self._tokenizer) if self._logprobs else None

    def _chunk(
        self,
        choice: ChunkChoice | None,
        usage: Callable[[], Usage],
        prompt_ids: list[int] | msgspec.UnsetType = msgspec.UNSET,
    ) -> ChatChunk:
        head, told = self._head, self._usage.told(usage, is_last=choice is None)
        choices = [] if choice is None else [choice]
        return ChatChunk(head.id, head.created, head.model, head.fingerprint, choices, told, prompt_ids)

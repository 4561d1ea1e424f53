"""`POST /v1/messages` and `POST /v1/messages/count_tokens`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from dashinfer_vlm.server.anthropic.protocol import CountTokensBody, MessagesBody
from dashinfer_vlm.server.anthropic.replies import Event, MessageReply, TokenCount
from dashinfer_vlm.server.anthropic.writer import ANTHROPIC, MessageWriter
from dashinfer_vlm.server.body import read_body, unless_gone
from dashinfer_vlm.server.context import Context
from dashinfer_vlm.server.described import GENERATING, Operation
from dashinfer_vlm.server.errors import AnthropicError
from dashinfer_vlm.server.respond import respond
from dashinfer_vlm.server.status import json_response

MESSAGES = Operation(
    summary="Answer a conversation with images, as Anthropic's API does.",
    body=MessagesBody,
    example={"messages": [{"role": "user", "content": "What is a heron?"}], "max_tokens": 16},
    reply=MessageReply,
    events=(Event, AnthropicError),
    names_events=True,
    error=AnthropicError,
    errors=(*(status for status in GENERATING if status != 422), 529),
)
COUNT_TOKENS = Operation(
    summary="What a prompt costs, images included.",
    body=CountTokensBody,
    example={"messages": [{"role": "user", "content": "What is a heron?"}]},
    reply=TokenCount,
    error=AnthropicError,
    errors=MESSAGES.errors,
)


def messages_routes(context: Context) -> APIRouter:
    router = APIRouter()
    service = context.service

    @router.post("/v1/messages", openapi_extra=MESSAGES.extra)
    async def messages(request: Request) -> Response:
        body = await read_body(request, MessagesBody, context.bodies)
        writer = MessageWriter(context.model_name(body.model), max_tokens=body.max_tokens, thoughts=body.tells_thoughts)
        begin = service.chat(body.dialogue(), body.params(service.sampling_defaults))
        stream = bool(body.stream)
        del body  # its images may be large, and the answer takes long
        return await respond(request, begin, writer, stream=stream, form=ANTHROPIC)

    @router.post("/v1/messages/count_tokens", openapi_extra=COUNT_TOKENS.extra)
    async def count_tokens(request: Request) -> Response:
        body = await read_body(request, CountTokensBody, context.bodies)
        context.model_name(body.model)
        count = service.count(body.dialogue(), body.prompt_params())
        ids = await unless_gone(request, count, lambda _: None)
        return json_response(TokenCount(len(ids)))

    return router

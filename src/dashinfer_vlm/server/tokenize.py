"""`POST /tokenize` and `POST /detokenize`, as in vLLM: what a prompt costs, and what ids say."""

from __future__ import annotations

import asyncio
from typing import Annotated

import msgspec
from fastapi import APIRouter, Request
from pydantic import FailFast, Field
from starlette.responses import Response

from dashinfer_vlm.errors import InvalidRequestError
from dashinfer_vlm.frontend.conversation import MessageBody, ProcessorBody, read_conversation
from dashinfer_vlm.frontend.messages import Dialogue
from dashinfer_vlm.frontend.params import GenerationParams
from dashinfer_vlm.frontend.schema import Body, all_whole, no_effect
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from dashinfer_vlm.frontend.tool_schema import ToolsBody
from dashinfer_vlm.server.body import read_body, unless_gone
from dashinfer_vlm.server.context import Context
from dashinfer_vlm.server.described import GENERATING, READING, Operation
from dashinfer_vlm.server.status import json_response

_MOST_IDS = 1 << 18
"""What a text that is only counted may have, where the model's context is shorter."""


class TokenizeBody(ToolsBody):
    """Either `prompt`, which is plain text, or `messages`, whose images are fetched and counted."""

    model: str | None = None
    prompt: str | None = None
    messages: list[MessageBody] | None = None
    return_token_strs: bool | None = None
    add_special_tokens: Annotated[bool | None, no_effect] = None
    """No effect: these tokenizers add none of their own to a text."""
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    mm_processor_kwargs: ProcessorBody | None = None


class DetokenizeBody(Body):
    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], FailFast(), all_whole]


class Tokens(msgspec.Struct, frozen=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(msgspec.Struct, frozen=True):
    prompt: str


TOKENIZE = Operation(
    summary="What a prompt costs, images included.",
    body=TokenizeBody,
    example={"messages": [{"role": "user", "content": "What is a heron?"}]},
    reply=Tokens,
    errors=GENERATING,
)
DETOKENIZE = Operation(
    summary="What ids say.", body=DetokenizeBody, example={"tokens": [32, 33]}, reply=Text, errors=READING
)


def tokenize_routes(context: Context) -> APIRouter:
    router = APIRouter()
    service = context.service

    @router.post("/tokenize", openapi_extra=TOKENIZE.extra)
    async def tokenize(request: Request) -> Response:
        body = await read_body(request, TokenizeBody, context.bodies)
        context.model_name(body.model)
        ids = await unless_gone(request, _ids(context, body), lambda _: None)
        texts = await asyncio.to_thread(_texts, service.tokenizer, ids) if body.return_token_strs else None
        return json_response(Tokens(len(ids), service.engine.info.max_model_len, ids, texts))

    @router.post("/detokenize", openapi_extra=DETOKENIZE.extra)
    async def detokenize(request: Request) -> Response:
        body = await read_body(request, DetokenizeBody, context.bodies)
        context.model_name(body.model)
        vocab_size = service.engine.info.vocab_size
        if max(body.tokens, default=0) >= vocab_size:
            raise InvalidRequestError(f"tokens holds id {max(body.tokens)}; ids are below {vocab_size}", param="tokens")
        text = await asyncio.to_thread(service.tokenizer.decode, body.tokens, skip_special=False)
        return json_response(Text(text))

    return router


def _texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.decode((id,), skip_special=False) for id in ids]


async def _ids(context: Context, body: TokenizeBody) -> list[int]:
    service, bounds = context.service, context.service.prompts.loader.pixel_bounds
    if body.messages is not None and body.prompt is None:
        ending = GenerationParams(
            add_generation_prompt=body.add_generation_prompt, continue_final_message=bool(body.continue_final_message)
        )
        messages = read_conversation(body.messages, bounds, body.mm_processor_kwargs)
        tools, choice = body.offered()
        return await service.count(Dialogue(messages, tools=tools, choice=choice), ending)
    if body.tools:
        raise InvalidRequestError("tools are for messages; a prompt is plain text", param="tools")
    if body.prompt is not None and body.messages is None:
        return await service.prompts.text_ids(body.prompt, max(service.engine.info.max_model_len, _MOST_IDS))
    raise InvalidRequestError("send either prompt or messages", param="prompt")

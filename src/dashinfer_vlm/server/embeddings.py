"""`POST /v1/embeddings`: vectors of texts, and, as in vLLM, of a conversation with pictures and videos."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Coroutine, Sequence
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from dashinfer_vlm.errors import InvalidRequestError
from dashinfer_vlm.frontend.answers import collect_vectors
from dashinfer_vlm.frontend.conversation import MessageBody, ProcessorBody, read_conversation
from dashinfer_vlm.frontend.deltas import Usage
from dashinfer_vlm.frontend.generation import Generation
from dashinfer_vlm.frontend.messages import Dialogue
from dashinfer_vlm.frontend.params import GenerationParams
from dashinfer_vlm.frontend.schema import Whole, no_effect, only
from dashinfer_vlm.frontend.vectors import check_dimensions, unit_vector
from dashinfer_vlm.server.body import read_body, unless_gone
from dashinfer_vlm.server.context import Context
from dashinfer_vlm.server.described import GENERATING, Operation
from dashinfer_vlm.server.protocol import Prompts, prompts_of
from dashinfer_vlm.server.replies import CachedTokens, Head
from dashinfer_vlm.server.respond import admitted
from dashinfer_vlm.server.sampling import PromptBody

MAX_INPUTS = 2048
"""OpenAI's limit for one request."""
Encoding = Literal["float", "base64"]


class EmbeddingBody(PromptBody):
    """Either `input`, of which every text or list of ids is a vector, or `messages`, of which the whole is one."""

    input: Prompts | None = None
    messages: list[MessageBody] | None = None
    encoding_format: Encoding | None = None
    dimensions: Whole | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    """False: what ends the prompts of this model is left out."""
    mm_processor_kwargs: ProcessorBody | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    # no effect by their nature
    user: Annotated[str | None, no_effect] = None
    request_id: Annotated[str | None, no_effect] = None

    # known, not served
    normalize: Annotated[Any, only(True)] = None
    use_activation: Annotated[Any, only(True)] = None
    embed_dtype: Annotated[Any, only("float32")] = None
    endianness: Annotated[Any, only("native", "little")] = None
    chat_template: Annotated[Any, only()] = None

    def asked(self, bounds: tuple[int, int]) -> Dialogue | list[str | list[int]]:
        """`bounds` are the least and most pixels of an image here. Raises InvalidRequestError."""
        if self.messages is not None and self.input is None:
            messages = read_conversation(self.messages, bounds, self.mm_processor_kwargs)
            return Dialogue(messages, variables=self.chat_template_kwargs or {})
        if self.messages is not None or self.input is None:
            raise InvalidRequestError("send either input or messages", param="input")
        inputs = prompts_of(self.input, "input")
        if len(inputs) > MAX_INPUTS:
            raise InvalidRequestError(f"input has {len(inputs)} entries; the limit is {MAX_INPUTS}", param="input")
        return inputs

    def params(self) -> GenerationParams:
        """Raises InvalidRequestError."""
        return GenerationParams(
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=bool(self.continue_final_message),
            cache_salt=self.cache_salt or "",
            truncation=self.prompt_truncation(),
            priority=self.priority or 0,
            timeout_s=self.timeout,
        )


class EmbeddingObject(msgspec.Struct, frozen=True):
    index: int
    embedding: list[float] | str
    """Numbers, or base64 of float32, little endian."""
    object: str = "embedding"


class EmbeddingUsage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens

    @classmethod
    def of(cls, usage: Usage) -> EmbeddingUsage:
        return cls(usage.num_prompt_tokens, usage.num_prompt_tokens, CachedTokens(usage.num_cached_tokens))


class EmbeddingReply(msgspec.Struct, frozen=True):
    id: str
    created: int
    model: str
    data: list[msgspec.Raw]
    """`EmbeddingObject` each, written one by one: millions of numbers at once would stop every other request."""
    usage: EmbeddingUsage
    object: str = "list"


EMBEDDINGS = Operation(
    summary="Vectors of texts, or of a conversation with images and videos.",
    body=EmbeddingBody,
    example={"input": "A heron stands in the reeds."},
    reply=EmbeddingReply,
    errors=GENERATING,
)


def embedding_routes(context: Context) -> APIRouter:
    """Of a model that was published for vectors."""
    router = APIRouter()
    service = context.service

    @router.post("/v1/embeddings", openapi_extra=EMBEDDINGS.extra)
    async def embeddings(request: Request) -> Response:
        body = await read_body(request, EmbeddingBody, context.bodies)
        head = context.head("embd", body.model)
        dimensions, encoding = body.dimensions, body.encoding_format or "float"
        check_dimensions(dimensions, service.engine.info.hidden_size)
        asked, ending = body.asked(service.prompts.loader.pixel_bounds), body.add_special_tokens is not False
        begin = admitted(request, service.embed(asked, body.params(), ending=ending))
        del body, asked  # their images may be large
        states, usage = await unless_gone(request, _collected(begin), lambda _: None)
        written = await asyncio.to_thread(_written, head, states, usage, dimensions, encoding)
        return Response(written, media_type="application/json")

    return router


async def _collected(begin: Coroutine[Any, Any, Generation]) -> tuple[list[bytes], Usage]:
    generation = await begin
    return await collect_vectors(generation), generation.usage


def _written(head: Head, states: Sequence[bytes], usage: Usage, dimensions: int | None, encoding: Encoding) -> bytes:
    data = []
    for index, state in enumerate(states):
        vector = unit_vector(state, dimensions)
        told: list[float] | str = vector.tolist()
        if encoding == "base64":
            told = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        data.append(msgspec.Raw(msgspec.json.encode(EmbeddingObject(index, told))))
    return msgspec.json.encode(EmbeddingReply(head.id, head.created, head.model, data, EmbeddingUsage.of(usage)))

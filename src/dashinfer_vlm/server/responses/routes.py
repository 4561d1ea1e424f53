"""`/v1/responses`: create, retrieve, delete and cancel a response; the items and the tokens of its input."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import msgspec
from fastapi import APIRouter, Request
from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from dashinfer_vlm.errors import InvalidRequestError, OverloadedError
from dashinfer_vlm.frontend.generation import Generation
from dashinfer_vlm.frontend.messages import Dialogue
from dashinfer_vlm.frontend.params import GenerationParams
from dashinfer_vlm.frontend.schema import explain
from dashinfer_vlm.frontend.tenants import current_tenant
from dashinfer_vlm.server.body import read_body, unless_gone
from dashinfer_vlm.server.context import Context
from dashinfer_vlm.server.described import GENERATING, LOOKING, Operation
from dashinfer_vlm.server.reading import hold
from dashinfer_vlm.server.respond import admitted, opened
from dashinfer_vlm.server.responses import kept
from dashinfer_vlm.server.responses.body import CountBody, ItemsQuery, PromptedBody, ResponseBody, RetrieveQuery
from dashinfer_vlm.server.responses.desk import Desk
from dashinfer_vlm.server.responses.echo import begun
from dashinfer_vlm.server.responses.ids import new_id
from dashinfer_vlm.server.responses.jobs import Job, Keep, keep_nothing, shown, tell, write
from dashinfer_vlm.server.responses.replies import Event, ResponseReply
from dashinfer_vlm.server.responses.turns import Placed, read_turns
from dashinfer_vlm.server.responses.writer import ResponseWriter
from dashinfer_vlm.server.stream import EventStream

Query = TypeVar("Query", bound=BaseModel)


class ItemList(msgspec.Struct, frozen=True):
    data: list[msgspec.Raw]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: str = "list"


class Deleted(msgspec.Struct, frozen=True):
    id: str
    object: str = "response"
    deleted: bool = True


class InputTokens(msgspec.Struct, frozen=True):
    input_tokens: int
    object: str = "response.input_tokens"


CREATE = Operation(
    summary="Answer a conversation, and keep the answer for the next turn.",
    body=ResponseBody,
    example={"input": "What is a heron?", "max_output_tokens": 16},
    reply=ResponseReply,
    events=(Event,),
    names_events=True,
    errors=GENERATING,
)
COUNT = Operation(
    summary="Count the tokens of an input.",
    body=CountBody,
    example={"input": "What is a heron?"},
    reply=InputTokens,
    errors=GENERATING,
)
RETRIEVE = Operation(
    summary="A response that is kept.", query=RetrieveQuery, reply=ResponseReply, errors=(400, 404, *LOOKING)
)
DELETE = Operation(summary="Forget a response.", reply=Deleted, errors=(404, *LOOKING))
CANCEL = Operation(summary="End a response in the background.", reply=ResponseReply, errors=(400, 404, *LOOKING))
ITEMS = Operation(
    summary="The items of a response's input.", query=ItemsQuery, reply=ItemList, errors=(400, 404, *LOOKING)
)


@dataclass(frozen=True, slots=True)
class Order:
    """A request for a response, all checked but for what the prompt will say."""

    writer: ResponseWriter
    dialogue: Dialogue
    params: GenerationParams
    input: bytes
    """The items of its own input as a JSON list, where they are to be kept."""
    keep: Keep


def response_routes(context: Context, desk: Desk) -> APIRouter:
    router = APIRouter()
    service = context.service

    @router.post("/v1/responses", openapi_extra=CREATE.extra)
    async def create(request: Request) -> Response:
        body = await read_body(request, ResponseBody, context.bodies)
        order = await _order(context, desk, body, partial(hold, request))
        begin = _begun(request, service.chat(order.dialogue, order.params), len(order.input))
        writer, keep = order.writer, order.keep
        if body.background:
            generation = await unless_gone(request, begin, Generation.close)
            desk.jobs.start(Job(_tenant(), order.input, writer), generation, keep)
            return _json(writer.reply)
        stream = body.stream
        del body, order  # their images may be large, and the answer takes long
        if not stream:
            return await unless_gone(request, _whole(begin, writer, keep), lambda _: None)
        generation, first = await unless_gone(request, opened(begin), lambda started: started[0].close())
        return EventStream(tell(generation, first, writer, keep), generation, partial(shown, writer))

    @router.post("/v1/responses/input_tokens", openapi_extra=COUNT.extra)
    async def count(request: Request) -> Response:
        body = await read_body(request, CountBody, context.bodies)
        context.model_name(body.model)
        dialogue, _ = await _dialogue(context, desk, body, partial(hold, request))
        ids = await unless_gone(request, service.count(dialogue), lambda _: None)
        return _json(InputTokens(len(ids)))

    @router.get("/v1/responses/{id}", openapi_extra=RETRIEVE.extra)
    async def retrieve(request: Request, id: str) -> Response:
        _query(request, RetrieveQuery)
        return _raw(await desk.reply(_tenant(), id))

    @router.delete("/v1/responses/{id}", openapi_extra=DELETE.extra)
    async def delete(request: Request, id: str) -> Response:
        await desk.delete(_tenant(), id)
        return _json(Deleted(id))

    @router.post("/v1/responses/{id}/cancel", openapi_extra=CANCEL.extra)
    async def cancel(request: Request, id: str) -> Response:
        return _raw(await desk.cancel(_tenant(), id))

    @router.get("/v1/responses/{id}/input_items", openapi_extra=ITEMS.extra)
    async def input_items(request: Request, id: str) -> Response:
        query = _query(request, ItemsQuery)
        return _json(_page(await desk.input(_tenant(), id), query))

    return router


async def _begun(request: Request, begin: Coroutine[Any, Any, Generation], num_kept: int) -> Generation:
    """The generation; `num_kept` bytes of what the client has sent are still needed. Raises OverloadedError."""
    generation = await admitted(request, begin)
    try:
        hold(request, num_kept)
    except OverloadedError:
        generation.close()
        raise
    return generation


async def _order(context: Context, desk: Desk, body: ResponseBody, hold: Callable[[int], None]) -> Order:
    """`hold` counts bytes. Raises HttpError, InvalidRequestError and OverloadedError for what cannot be."""
    model, params = context.model_name(body.model), body.params(context.service.sampling_defaults)
    dialogue, own = await _dialogue(context, desk, body, hold)
    stores = body.store is not False and desk.keeps_anything
    if body.background and not stores:
        raise InvalidRequestError("background needs a response that is stored", param="background")
    reply = begun(body, params, id=new_id(), model=model, store=stores)
    writer = ResponseWriter(reply, context.service.tokenizer, logprobs=body.wants_logprobs)
    if not stores:
        return Order(writer, dialogue, params, b"", keep_nothing)
    input = await asyncio.to_thread(kept.written, [placed.item for placed in own], reply.id)
    if body.background:
        desk.check_jobs(len(input))
    return Order(writer, dialogue, params, input, desk.keeper(_tenant(), input))


async def _dialogue(
    context: Context, desk: Desk, body: PromptedBody, hold: Callable[[int], None]
) -> tuple[Dialogue, list[Placed]]:
    """The conversation, and which of its items the request itself brought. Raises HttpError, InvalidRequestError."""
    own = await desk.own(_tenant(), body.input, hold)
    earlier = await desk.earlier(_tenant(), body.previous_response_id, hold)
    tools, choice = body.offered()
    bounds = context.service.prompts.loader.pixel_bounds
    turns = read_turns(earlier + own, bounds, instructions=body.instructions, processor=body.mm_processor_kwargs)
    dialogue = Dialogue(
        turns,
        tools=tools,
        choice=choice,
        variables=body.chat_template_kwargs or {},
        effort=body.reasoning.effort if body.reasoning else None,
        param="input",
    )
    return dialogue, own


async def _whole(begin: Coroutine[Any, Any, Generation], writer: ResponseWriter, keep: Keep) -> Response:
    await write(await begin, writer)
    await keep(writer.reply)
    return _json(writer.reply)


def _tenant() -> str:
    """Whose responses are looked at: those of whoever has the same key, or one of the same name."""
    return current_tenant.get().id


def _query(request: Request, model: type[Query]) -> Query:
    """Raises InvalidRequestError. A name may end in brackets, as OpenAI's clients write lists."""
    values = request.query_params
    sent = {name.removesuffix("[]"): values.getlist(name) for name in values}
    try:
        return model.model_validate({name: each if name == "include" else each[-1] for name, each in sent.items()})
    except ValidationError as error:
        raise explain(error) from None


def _page(items: list[msgspec.Raw], query: ItemsQuery) -> ItemList:
    """The part of a list that a query asks for. Raises InvalidRequestError for an item that is not there."""
    ordered = [(kept.id_of(item), item) for item in items][:: 1 if query.order == "asc" else -1]
    begin = 0
    if query.after is not None:
        places = [i for i, (id, _) in enumerate(ordered) if id == query.after]
        if not places:
            raise InvalidRequestError(f"there is no item with id {query.after[:80]!r}", param="after")
        begin = places[0] + 1
    page = ordered[begin : begin + query.limit]
    first, last = (page[0][0], page[-1][0]) if page else (None, None)
    return ItemList([item for _, item in page], first, last, has_more=len(ordered) > begin + len(page))


def _json(reply: msgspec.Struct) -> Response:
    return _raw(msgspec.json.encode(reply))


def _raw(reply: bytes) -> Response:
    return Response(reply, media_type="application/json")

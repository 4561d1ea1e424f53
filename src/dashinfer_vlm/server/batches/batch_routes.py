"""`/v1/batches`: files of requests that are answered while the server has time."""

from __future__ import annotations

from collections.abc import Collection

from fastapi import APIRouter, Request
from starlette.responses import Response

from dashinfer_vlm.errors import InvalidRequestError
from dashinfer_vlm.frontend.tenants import current_tenant
from dashinfer_vlm.server.batches.protocol import BatchBody, BatchQuery, BatchReply, Page, page, read_fields
from dashinfer_vlm.server.batches.store import Batch, Store
from dashinfer_vlm.server.batches.worker import BatchWorker
from dashinfer_vlm.server.body import read_body
from dashinfer_vlm.server.context import Context
from dashinfer_vlm.server.described import LOOKING, READING, Operation
from dashinfer_vlm.server.errors import HttpError
from dashinfer_vlm.server.status import json_response

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/rerank", "/v1/score")
"""Those that a batch may ask, where the server has them."""
MAX_OPEN = 100
"""Batches of one owner that have not ended."""
_WINDOW_S = 24 * 3600

CREATE_BATCH = Operation(
    summary="Begin to answer a file of requests.", body=BatchBody, reply=BatchReply, errors=(*READING, 429)
)
LIST_BATCHES = Operation(
    summary="The batches of this key.", query=BatchQuery, reply=Page[BatchReply], errors=(400, *LOOKING)
)
BATCH = Operation(summary="How far a batch is.", reply=BatchReply, errors=(404, *LOOKING))
CANCEL_BATCH = Operation(summary="End a batch.", reply=BatchReply, errors=(404, 409, *LOOKING))


def batch_routes(context: Context, store: Store, worker: BatchWorker, endpoints: Collection[str]) -> APIRouter:
    """`endpoints` are those of ENDPOINTS that this server has."""
    router = APIRouter()

    @router.post("/v1/batches", openapi_extra=CREATE_BATCH.extra)
    async def create(request: Request) -> Response:
        body = await read_body(request, BatchBody, context.bodies)
        batch = store.save(_made(body, store, endpoints, context))
        worker.wake()
        return json_response(BatchReply.of(batch))

    @router.get("/v1/batches", openapi_extra=LIST_BATCHES.extra)
    async def list_batches(request: Request) -> Response:
        query = read_fields(BatchQuery, dict(request.query_params))
        return json_response(page(store.batches(_owner()), query.after, query.limit, BatchReply.of))

    @router.get("/v1/batches/{id}", openapi_extra=BATCH.extra)
    async def retrieve(id: str) -> Response:
        return json_response(BatchReply.of(store.batch(id, _owner())))

    @router.post("/v1/batches/{id}/cancel", openapi_extra=CANCEL_BATCH.extra)
    async def cancel(id: str) -> Response:
        batch = store.batch(id, _owner())
        if not batch.is_open:
            raise HttpError(409, "batch_ended", f"{id} has ended: it is {batch.status}")
        return json_response(BatchReply.of(worker.cancel(batch)))

    return router


def _owner() -> str:
    return current_tenant.get().id


def _made(body: BatchBody, store: Store, endpoints: Collection[str], context: Context) -> Batch:
    owner, now = _owner(), store.now()
    if body.endpoint not in endpoints:
        raise InvalidRequestError(
            f"endpoint is {body.endpoint[:80]!r}; batches here ask {' or '.join(endpoints)}", param="endpoint"
        )
    file = store.file(body.input_file_id, owner)
    if file.purpose != "batch":
        raise InvalidRequestError(f"{file.id} is the output of a batch", param="input_file_id")
    if sum(batch.owner == owner for batch in store.open_batches()) >= MAX_OPEN:
        raise HttpError(
            429, "too_many_batches", f"{MAX_OPEN} batches have not ended; wait for one of them, or cancel it"
        )
    kept_s = int(store.limits.seconds)
    expiry = body.output_expires_after
    return Batch(
        id=store.new_batch_id(),
        owner=owner,
        endpoint=body.endpoint,
        input_file_id=file.id,
        model=context.service.engine.info.model,
        model_name=context.model_names[0],
        metadata=body.metadata,
        status="validating",
        created_at=now,
        expires_at=now + _WINDOW_S,
        output_seconds=kept_s if expiry is None else min(kept_s, expiry.seconds),
    )

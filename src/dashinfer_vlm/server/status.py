"""What there is and how it is doing: models, probes, version."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

import dashinfer_vlm
from dashinfer_vlm.server.context import Context
from dashinfer_vlm.server.described import LOOKING, Operation
from dashinfer_vlm.server.errors import HttpError


class ModelReply(msgspec.Struct, frozen=True):
    id: str
    created: int
    root: str
    """The model's first name; where its files are is nobody's business."""
    max_model_len: int
    object: str = "model"
    owned_by: str = "dashinfer_vlm"


class ModelsReply(msgspec.Struct, frozen=True):
    data: list[ModelReply]
    object: str = "list"


class StateReply(msgspec.Struct, frozen=True):
    status: str


class VersionReply(msgspec.Struct, frozen=True):
    version: str


MODEL = Operation(summary="One name of the model.", reply=ModelReply, errors=(404, *LOOKING))
HEALTH = Operation(summary="Whether this process still makes sense.", reply=StateReply)
READY = Operation(summary="Whether requests are taken.", reply=StateReply)
VERSION = Operation(summary="The package's version.", reply=VersionReply)


def status_routes(context: Context) -> APIRouter:
    router = APIRouter()
    service = context.service

    @router.get("/v1/models", openapi_extra=Operation(summary="What is served.", reply=ModelsReply).extra)
    async def models() -> Response:
        return json_response(ModelsReply([_model(context, name) for name in context.model_names]))

    @router.get("/v1/models/{name:path}", openapi_extra=MODEL.extra)
    async def model(name: str) -> Response:
        return json_response(_model(context, context.model_name(name)))

    @router.api_route("/health", methods=["GET", "HEAD"], openapi_extra=HEALTH.extra)
    async def health() -> Response:
        """Whether this process still makes sense; restart it if not."""
        return _state("alive" if not service.engine.gone() else None)

    @router.api_route("/ready", methods=["GET", "HEAD"], openapi_extra=READY.extra)
    async def ready() -> Response:
        """Whether to send requests here."""
        return _state("ready" if service.ready else None)

    @router.get("/version", openapi_extra=VERSION.extra)
    async def version() -> Response:
        return json_response(VersionReply(dashinfer_vlm.__version__))

    return router


def json_response(content: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")


def _state(state: str | None) -> Response:
    if state is None:
        raise HttpError(503, "not_ready", "there is no engine now, or the server is shutting down", type="server_error")
    return json_response(StateReply(state))


def _model(context: Context, name: str) -> ModelReply:
    return ModelReply(name, context.started_at, context.model_names[0], context.service.engine.info.max_model_len)

"""Routes that clients of OpenAI, Anthropic and vLLM know and this server does not have: refusals say what there is."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from dashinfer_vlm.server.errors import HttpError

_MISSING = {
    "/v1/audio": "the model neither hears nor speaks",
    "/v1/realtime": "the model neither hears nor speaks",
    "/v1/images": "the model sees pictures and makes none; send them to /v1/chat/completions",
    "/v1/videos": "the model sees videos and makes none; send them to /v1/chat/completions",
    "/v1/moderations": "the model does not classify",
    "/v1/rerank": "the model does not rank",
    "/v2/rerank": "the model does not rank",
    "/rerank": "the model does not rank",
    "/v1/score": "the model does not rank",
    "/score": "the model does not rank",
    "/classify": "the model does not classify",
    "/pooling": "vectors are those of OpenAI's API, /v1/embeddings, of models that were published for them",
    "/v1/fine_tuning": "nothing is trained here",
    "/v1/uploads": "nothing is uploaded in parts",
    "/v1/vector_stores": "nothing is searched here",
    "/v1/assistants": "nothing is kept for assistants; send the conversation to /v1/chat/completions",
    "/v1/threads": "nothing is kept for assistants; send the conversation to /v1/chat/completions",
    "/v1/conversations": "a response goes on with another one by its previous_response_id",
    "/v1/containers": "no code is run here",
    "/v1/messages/batches": "batches are those of OpenAI's API, /v1/batches",
    "/v1/files": "start the server with --files-path to keep files",
    "/v1/batches": "start the server with --files-path to keep batches, or answer them with dashinfer-vlm run",
    "/v1/complete": "Anthropic's older API is not served; use /v1/messages",
    "/v1/v1": "the base URL of a client of Anthropic's API ends before /v1",
    **{
        f"/{name}": "the base URL of a client of OpenAI's API ends in /v1"
        for name in ("chat", "completions", "embeddings", "responses", "models", "files", "batches")
    },
}
_NO_VECTORS = "models that were published for it give vectors, such as Qwen3-VL-Embedding and Qwen3-Embedding"
_FILES = {"/v1/files", "/v1/batches"}
_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


def refused_routes(*, with_files: bool, why_no_vectors: str | None) -> APIRouter:
    """Behind all other routes. Each of them answers 404 with the code `not_served`, whatever the method. `with_files`:
    the server keeps files and batches, so that nothing is to be said of them. `why_no_vectors` is what the model lacks
    for `/v1/embeddings`, if anything."""
    router = APIRouter(include_in_schema=False)
    missing = {root: why for root, why in _MISSING.items() if not (with_files and root in _FILES)}
    if why_no_vectors is not None:
        missing["/v1/embeddings"] = f"{_NO_VECTORS}; this one answers, since {why_no_vectors}"

    async def refuse(request: Request) -> Response:
        path = request.url.path
        reason = next(why for root, why in missing.items() if path == root or path.startswith(f"{root}/"))
        raise HttpError(404, "not_served", f"there is no {path[:200]} here: {reason}")

    for root in missing:
        router.add_api_route(root, refuse, methods=_METHODS)
        router.add_api_route(f"{root}/{{rest:path}}", refuse, methods=_METHODS)
    return router

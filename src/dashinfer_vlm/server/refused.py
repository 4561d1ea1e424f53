"""Routes that clients of OpenAI, Anthropic and vLLM know and this server does not have: refusals say what there is."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from dashinfer_vlm.frontend.prompt import PromptBuilder
from dashinfer_vlm.server.errors import HttpError
from dashinfer_vlm.server.scores import RERANK_PATHS, SCORE_PATHS

_MISSING = {
    "/v1/audio": "the model neither hears nor speaks",
    "/v1/realtime": "the model neither hears nor speaks",
    "/v1/images": "the model sees pictures and makes none; send them to /v1/chat/completions",
    "/v1/videos": "the model sees videos and makes none; send them to /v1/chat/completions",
    "/v1/moderations": "the model does not classify",
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
_NO_SCORES = "models that were published for it score pairs, such as Qwen3-VL-Reranker and Qwen3-Reranker"
_FILES = {"/v1/files", "/v1/batches"}
_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


def refused_routes(prompts: PromptBuilder, *, with_files: bool) -> APIRouter:
    """Behind all other routes. Each of them answers 404 with the code `not_served`, whatever the method. `prompts` say
    what the model lacks for vectors and for scores, if anything. `with_files`: the server keeps files and batches, so
    that nothing is to be said of them."""
    router = APIRouter(include_in_schema=False)
    missing = {root: why for root, why in _MISSING.items() if not (with_files and root in _FILES)}
    if prompts.vectors.why_not is not None:
        missing["/v1/embeddings"] = f"{_NO_VECTORS}; this one does not: {prompts.vectors.why_not}"
    if prompts.scores.why_not is not None:
        missing |= dict.fromkeys(
            (*RERANK_PATHS, *SCORE_PATHS), f"{_NO_SCORES}; this one does not: {prompts.scores.why_not}"
        )

    async def refuse(request: Request) -> Response:
        path = request.url.path
        reason = next(why for root, why in missing.items() if path == root or path.startswith(f"{root}/"))
        raise HttpError(404, "not_served", f"there is no {path[:200]} here: {reason}")

    for root in missing:
        router.add_api_route(root, refuse, methods=_METHODS)
        router.add_api_route(f"{root}/{{rest:path}}", refuse, methods=_METHODS)
    return router

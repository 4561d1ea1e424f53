"""The HTTP application: routes, middleware and error handlers around one Service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import APIRouter, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.routing import APIRoute
from starlette.types import Lifespan

import dashinfer_vlm
from dashinfer_vlm.config import ServerConfig
from dashinfer_vlm.frontend.service import Service
from dashinfer_vlm.server.access import Access, Teller
from dashinfer_vlm.server.anthropic.routes import messages_routes
from dashinfer_vlm.server.auth import OPEN_PATHS, ApiKeys, Keyring
from dashinfer_vlm.server.batches.opening import Batches
from dashinfer_vlm.server.chat import chat_routes
from dashinfer_vlm.server.completions import completion_routes
from dashinfer_vlm.server.context import Context
from dashinfer_vlm.server.embeddings import embedding_routes
from dashinfer_vlm.server.errors import install_error_handlers
from dashinfer_vlm.server.metrics import Metrics, ReplyCounter, metrics_routes
from dashinfer_vlm.server.openapi import document_routes
from dashinfer_vlm.server.origins import SameOrigin
from dashinfer_vlm.server.reading import BodyReader
from dashinfer_vlm.server.refused import refused_routes
from dashinfer_vlm.server.responses.desk import Desk
from dashinfer_vlm.server.responses.routes import response_routes
from dashinfer_vlm.server.responses.store import ResponseStore
from dashinfer_vlm.server.scores import score_routes
from dashinfer_vlm.server.status import status_routes
from dashinfer_vlm.server.tokenize import tokenize_routes
from dashinfer_vlm.server.ui import page_files, page_routes


def create_app(
    service: Service,
    config: ServerConfig,
    *,
    keyring: Keyring | None = None,
    bodies: BodyReader | None = None,
    tellers: tuple[Teller, ...] = (),
) -> FastAPI:
    """The application over a service that is ready; who made the service closes it. `keyring` is that of `config`, made
    here when None. `tellers` hear of every request when it is over. Raises ConfigError."""
    context = Context(service=service, config=config, bodies=bodies or BodyReader(config.max_body_mib * 2**20))
    service.observer = metrics = Metrics(service, model_name=context.model_names[0])
    keyring = Keyring(config) if keyring is None else keyring
    desk = Desk(ResponseStore.open(config.responses_store, config.responses_store_mib * 2**20))
    batches = Batches.open(config, service) if config.files_path is not None else None
    routers = _routers(context, metrics, desk, batches)
    if config.docs:
        routers.append(document_routes(_routes(routers), with_keys=bool(keyring)))
    routers.append(refused_routes(service.prompts, with_files=batches is not None))
    app = FastAPI(
        title="DashInfer-VLM",
        version=dashinfer_vlm.__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        lifespan=_lifespan(desk, batches),
    )
    for router in routers:
        app.include_router(router)
    install_error_handlers(app, metrics.refused)
    if keyring:
        open_paths = OPEN_PATHS.union(page_files() if config.ui else ())
        metrics.watch(keyring.tenants)
        app.add_middleware(ApiKeys, keyring=keyring, open_paths=open_paths, refused=metrics.refused)
    else:
        app.add_middleware(SameOrigin, allowed=config.allowed_origins, refused=metrics.refused)
    app.add_middleware(ReplyCounter, metrics=metrics, paths=frozenset(route.path for route in _routes(routers)))
    app.add_middleware(Access, tellers=tellers)
    if config.allowed_origins:  # added last, so outermost: a refusal needs its headers too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=config.allowed_methods,
            allow_headers=config.allowed_headers,
            allow_credentials=config.allow_credentials,
        )
    return app


def _routers(context: Context, metrics: Metrics, desk: Desk, batches: Batches | None) -> list[APIRouter]:
    routers = [
        make(context) for make in (chat_routes, completion_routes, messages_routes, status_routes, tokenize_routes)
    ]
    routers += [response_routes(context, desk), metrics_routes(metrics)]
    if context.service.prompts.vectors.why_not is None:
        routers.append(embedding_routes(context))
    if context.service.prompts.scores.why_not is None:
        routers.append(score_routes(context))
    if context.config.ui:
        routers.append(page_routes(context))
    if batches is not None:
        routers += batches.routes(context, {route.path for route in _routes(routers)})
    return routers


def _lifespan(desk: Desk, batches: Batches | None) -> Lifespan[FastAPI]:
    """What runs and ends with the application."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(desk.close)
            if batches is not None:
                await stack.enter_async_context(batches.lifespan(app))
            yield

    return lifespan


def _routes(routers: list[APIRouter]) -> list[APIRoute]:
    return [route for router in routers for route in router.routes if isinstance(route, APIRoute)]

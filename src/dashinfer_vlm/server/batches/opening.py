"""Everything for `/v1/files` and `/v1/batches`, opened together."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, FastAPI

from dashinfer_vlm.config import ServerConfig
from dashinfer_vlm.frontend.service import Service
from dashinfer_vlm.server.batches.batch_routes import ENDPOINTS, batch_routes
from dashinfer_vlm.server.batches.file_routes import file_routes
from dashinfer_vlm.server.batches.store import Store, StoreLimits
from dashinfer_vlm.server.batches.worker import BatchWorker
from dashinfer_vlm.server.context import Context

_DAY_S = 24 * 3600


def open_store(config: ServerConfig, folder: str) -> Store:
    """Raises ConfigError for a folder that cannot be used."""
    limits = StoreLimits(
        file_bytes=config.max_file_mib * 2**20,
        total_bytes=int(config.files_gib * 2**30),
        num_files=config.max_files,
        seconds=config.files_days * _DAY_S,
    )
    return Store(Path(folder), limits)


@dataclass(frozen=True, slots=True)
class Batches:
    """What is kept, and who works on it."""

    store: Store
    worker: BatchWorker

    @classmethod
    def open(cls, config: ServerConfig, service: Service) -> Batches:
        """Raises ConfigError for a folder that cannot be used; `config` names one."""
        assert config.files_path is not None
        store = open_store(config, config.files_path)
        return cls(store, BatchWorker(store, service, concurrency=config.batch_concurrency))

    def routes(self, context: Context, paths: Collection[str]) -> list[APIRouter]:
        """`paths` are those of the server's other routes."""
        endpoints = [path for path in ENDPOINTS if path in paths]
        return [file_routes(context, self.store), batch_routes(context, self.store, self.worker, endpoints)]

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Work while the application runs, then give the folder up."""
        try:
            async with self.worker.working(app):
                yield
        finally:
            self.store.close()

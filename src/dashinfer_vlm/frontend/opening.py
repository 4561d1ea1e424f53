"""One model, ready to answer: engine, media room and front end are opened together, and closed together."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from dashinfer_vlm.config import EngineConfig, MediaConfig
from dashinfer_vlm.engine.client import EngineClient
from dashinfer_vlm.engine.host.process import ProcessEngine
from dashinfer_vlm.engine.host.restarts import RestartedEngine
from dashinfer_vlm.frontend.backlog import NO_LIMITS, QueueLimits
from dashinfer_vlm.frontend.checkpoint import FrontendConfig
from dashinfer_vlm.frontend.open_loader import open_loader
from dashinfer_vlm.frontend.prompt import Loader, PromptBuilder
from dashinfer_vlm.frontend.scores import ScoreForm
from dashinfer_vlm.frontend.service import Service
from dashinfer_vlm.frontend.template import ChatTemplate
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from dashinfer_vlm.frontend.vectors import VectorForm
from dashinfer_vlm.models.config import read_config
from dashinfer_vlm.models.settings import check_settings
from dashinfer_vlm.progress import LoadingProgress

StartEngine = Callable[[EngineConfig], Awaitable[EngineClient]]


@dataclass(frozen=True, slots=True)
class FrontEnd:
    """What the front end reads of a model folder, before there is an engine."""

    checkpoint: FrontendConfig
    tokenizer: Tokenizer
    template: ChatTemplate

    @classmethod
    def from_folder(cls, folder: Path, chat_template: str | None = None) -> FrontEnd:
        """`chat_template` is a file that replaces the folder's template. Raises CheckpointError or ConfigError."""
        checkpoint = FrontendConfig.from_folder(
            folder
        )  # first: a folder without config.json is not a model folder at all
        tokenizer = Tokenizer.from_folder(folder)
        return cls(checkpoint, tokenizer, ChatTemplate.from_folder(folder, tokenizer, chat_template))

    def prompts(
        self, loader: Loader, *, max_model_len: int, vocab_size: int, max_items: Mapping[str, int]
    ) -> PromptBuilder:
        """Prompts for a model of this context and vocabulary, with at most this many items of a kind."""
        return PromptBuilder(
            tokenizer=self.tokenizer,
            template=self.template,
            loader=loader,
            placeholder_ids=self.checkpoint.placeholder_ids,
            expand_item=self.checkpoint.expand_item,
            box_unit=self.checkpoint.box_unit,
            vectors=VectorForm.of(self.checkpoint.config, self.tokenizer),
            scores=ScoreForm.of(self.checkpoint.config, self.tokenizer),
            max_model_len=max_model_len,
            vocab_size=vocab_size,
            max_items=max_items,
        )

    def service(
        self,
        engine: EngineClient,
        loader: Loader,
        *,
        max_items: Mapping[str, int] | None = None,
        queue: QueueLimits = NO_LIMITS,
    ) -> Service:
        """The service over an engine and a media room that stay their owner's."""
        info = engine.info
        prompts = self.prompts(
            loader, max_model_len=info.max_model_len, vocab_size=info.vocab_size, max_items=max_items or {}
        )
        defaults = self.checkpoint.sampling_defaults
        return Service(engine, prompts, sampling_defaults=defaults, queue=queue)


async def start_process(config: EngineConfig) -> EngineClient:
    """An engine in a process of its own; standard error shows how far its loading has come."""
    with LoadingProgress() as progress:
        return await ProcessEngine.start(config, progress=progress)


async def start_restarted(config: EngineConfig, max_restarts: int) -> EngineClient:
    """The same, and another one in its place when it dies (`engine/host/restarts.py`)."""
    with LoadingProgress() as progress:
        return await RestartedEngine.start(config, max_restarts, progress=progress)


@asynccontextmanager
async def open_service(
    engine_config: EngineConfig,
    media_config: MediaConfig,
    *,
    start_engine: StartEngine = start_process,
    chat_template: str | None = None,
    queue: QueueLimits = NO_LIMITS,
    start_decoders: bool = False,
) -> AsyncIterator[Service]:
    """The service of the model in the folder `engine_config.model` (`hub.resolve` finds it).

    What the folder, the template, `media_config`, or `engine_config` beside the folder have wrong is raised as
    CheckpointError or ConfigError before the engine is started. With `start_decoders` the decoding processes run before
    the first medium comes. At the end what still runs is aborted, and all is closed. Belongs to one event loop.
    """
    folder = Path(engine_config.model)
    check_settings(read_config(folder), engine_config)
    front_end = FrontEnd.from_folder(folder, chat_template)
    async with AsyncExitStack() as stack:
        loader = open_loader(folder, engine_config, media_config)
        stack.push_async_callback(loader.close)
        engine = await start_engine(engine_config)
        stack.push_async_callback(engine.close)
        loader.max_patches = engine.info.max_item_patches
        if start_decoders:
            await loader.start()
        service = front_end.service(engine, loader, max_items=media_config.max_items, queue=queue)
        stack.push_async_callback(service.drain, 0)
        yield service

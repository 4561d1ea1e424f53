"""`VLM`: a model in this process that answers conversations, one or thousands at a time.

    with VLM("Qwen/Qwen2-VL-2B-Instruct") as vlm:
        print(vlm.chat([{"role": "user", "content": [Image.open("cat.jpg"), "What is this?"]}]).text)

The caller's thread waits; the front end runs in a loop of its own, the engine in a thread of its own.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import sys
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias, cast, overload

import msgspec

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine.host.local import LocalEngine
from dashinfer_vlm.engine.info import EngineInfo
from dashinfer_vlm.engine.stats import EngineStats
from dashinfer_vlm.errors import DashInferError, InvalidRequestError
from dashinfer_vlm.frontend.answers import collect
from dashinfer_vlm.frontend.deltas import Delta
from dashinfer_vlm.frontend.generation import Generation
from dashinfer_vlm.frontend.messages import Dialogue
from dashinfer_vlm.frontend.opening import open_service
from dashinfer_vlm.frontend.params import GenerationParams
from dashinfer_vlm.frontend.tool_schema import parse_tools
from dashinfer_vlm.frontend.tools import Tool, ToolChoice
from dashinfer_vlm.hub import resolve
from dashinfer_vlm.offline.background import BackgroundLoop, gather
from dashinfer_vlm.offline.inputs import (
    Conversation,
    Prompt,
    as_sequence,
    is_conversation,
    text_or_ids,
    to_messages,
)
from dashinfer_vlm.offline.options import configs
from dashinfer_vlm.offline.progress import AnswerProgress
from dashinfer_vlm.offline.results import Result
from dashinfer_vlm.offline.scores import Scores, Side, scores_of
from dashinfer_vlm.offline.vectors import Vectors, vectors_of
from dashinfer_vlm.progress import LoadingProgress
from dashinfer_vlm.request import SamplingParams

Params: TypeAlias = SamplingParams | GenerationParams | None
Tools: TypeAlias = Sequence[Mapping[str, Any]] | None
"""As in OpenAI's chat completions."""
Choice: TypeAlias = str | Mapping[str, Any] | None
Offered: TypeAlias = tuple[tuple[Tool, ...], ToolChoice]
Begin: TypeAlias = Callable[[], Coroutine[Any, Any, Generation]]

_LOOKAHEAD = 8
"""Prompts that are prepared while all sequences of the engine run; more would only fill memory with patches."""


class VLM:
    """A loaded model. Close it, or use it as a context manager: everything is freed then.

    All methods may be called from any thread; calls at the same time share the engine's batches.
    """

    def __init__(
        self, model: str | Path = "", *, chat_template: str | None = None, progress: bool | None = None, **options: Any
    ) -> None:
        """Load `model`: a folder, a ModelScope or Hugging Face id, or the bundled demo model when absent.

        `options` are the fields of EngineConfig and MediaConfig (docs/flags.md; the flags' other names too), such as
        `dtype="float32"` or `allowed_media_domains=("example.org",)`. `chat_template` is a file with a Jinja template.
        `progress` shows bars, or hides them; when absent, they are shown on a terminal.

        Raises ConfigError for an unknown option or a wrong value, CheckpointError for a model that cannot be used.
        """
        engine_config, media_config = configs({"model": str(model), **options})
        self._progress = sys.stderr.isatty() if progress is None else progress
        config = resolve(engine_config)
        with ExitStack() as stack:
            self._loop = BackgroundLoop()
            stack.callback(self._loop.close)
            self._engine = self._load(config)
            stack.callback(self._engine.shutdown)
            opening = open_service(config, media_config, start_engine=self._loaded, chat_template=chat_template)
            self._service = self._loop.run(opening.__aenter__())
            stack.callback(lambda: self._loop.run(opening.__aexit__(None, None, None)))
            self._resources = stack.pop_all()
        atexit.register(_close, weakref.ref(self))

    @property
    def info(self) -> EngineInfo:
        """Facts about the loaded model."""
        return self._engine.info

    def stats(self) -> EngineStats:
        """Counters of the engine since it was loaded; raises EngineDeadError."""
        return self._engine.read_stats()

    @property
    def default_params(self) -> SamplingParams:
        """What is used when no params are given: the checkpoint's own recommendation."""
        return msgspec.convert(self._service.sampling_defaults, SamplingParams)

    @overload
    def chat(  # type: ignore[overload-overlap]
        self, messages: Conversation, params: Params = None, *, tools: Tools = None, tool_choice: Choice = None
    ) -> Result: ...
    @overload
    def chat(
        self,
        messages: Sequence[Conversation],
        params: Params | Sequence[Params] = None,
        *,
        tools: Tools = None,
        tool_choice: Choice = None,
    ) -> list[Result]: ...
    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        params: Params | Sequence[Params] = None,
        *,
        tools: Tools = None,
        tool_choice: Choice = None,
    ) -> Result | list[Result]:
        """Answer one conversation, or a list of them side by side; answers come in the order of the questions.

        One conversation raises what is wrong with it (InvalidRequestError, MediaError, EngineError). In a list the
        others go on, and the Result carries the error. `params` is one for all or one for each. `tools` and
        `tool_choice` are those of OpenAI's chat completions; calls are the answer's `tool_calls`.
        """
        return self._loop.run(self._chat(messages, params, parse_tools(tools, tool_choice)))

    @overload
    async def achat(  # type: ignore[overload-overlap]
        self, messages: Conversation, params: Params = None, *, tools: Tools = None, tool_choice: Choice = None
    ) -> Result: ...
    @overload
    async def achat(
        self,
        messages: Sequence[Conversation],
        params: Params | Sequence[Params] = None,
        *,
        tools: Tools = None,
        tool_choice: Choice = None,
    ) -> list[Result]: ...
    async def achat(
        self,
        messages: Conversation | Sequence[Conversation],
        params: Params | Sequence[Params] = None,
        *,
        tools: Tools = None,
        tool_choice: Choice = None,
    ) -> Result | list[Result]:
        """`chat` for callers with an event loop; cancelling it aborts what runs."""
        return await self._loop.arun(self._chat(messages, params, parse_tools(tools, tool_choice)))

    @overload
    def generate(self, prompts: Prompt, params: Params = None) -> Result: ...  # type: ignore[overload-overlap]
    @overload
    def generate(self, prompts: Sequence[Prompt], params: Params | Sequence[Params] = None) -> list[Result]: ...
    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: Params | Sequence[Params] = None
    ) -> Result | list[Result]:
        """Continue a text or token ids, without a chat template; else as `chat`."""
        return self._loop.run(self._generate(prompts, params))

    @overload
    async def agenerate(self, prompts: Prompt, params: Params = None) -> Result: ...  # type: ignore[overload-overlap]
    @overload
    async def agenerate(self, prompts: Sequence[Prompt], params: Params | Sequence[Params] = None) -> list[Result]: ...
    async def agenerate(
        self, prompts: Prompt | Sequence[Prompt], params: Params | Sequence[Params] = None
    ) -> Result | list[Result]:
        """`generate` for callers with an event loop; cancelling it aborts what runs."""
        return await self._loop.arun(self._generate(prompts, params))

    def stream(
        self, messages: Conversation, params: Params = None, *, tools: Tools = None, tool_choice: Choice = None
    ) -> Iterator[Delta]:
        """The answer to one conversation as it is made; closing the iterator early aborts it."""
        return self._loop.iterate(self._stream(messages, params, parse_tools(tools, tool_choice)))

    def astream(
        self, messages: Conversation, params: Params = None, *, tools: Tools = None, tool_choice: Choice = None
    ) -> AsyncGenerator[Delta, None]:
        """`stream` for callers with an event loop. Use with `contextlib.aclosing` when leaving early."""
        return self._loop.aiterate(self._stream(messages, params, parse_tools(tools, tool_choice)))

    def embed(self, inputs: Sequence[Prompt | Conversation], *, dimensions: int | None = None) -> Vectors:
        """Vectors of length 1, float32 [inputs, dimensions], by a model that was published for them: of texts, of
        conversations with pictures, or of token ids, which are taken as they are.

        `dimensions` are the first so many, for models that were trained for it; None: all. Raises what is wrong with an
        input, and UnsupportedError for another model.
        """
        return self._loop.run(vectors_of(self._service, inputs, dimensions, self._most_prepared))

    async def aembed(self, inputs: Sequence[Prompt | Conversation], *, dimensions: int | None = None) -> Vectors:
        """`embed` for callers with an event loop; cancelling it aborts what runs."""
        return await self._loop.arun(vectors_of(self._service, inputs, dimensions, self._most_prepared))

    def score(self, query: Side, documents: Sequence[Side], *, instruction: str | None = None) -> Scores:
        """How likely each document answers the query, float32 [documents] from 0 to 1, by a model that was published
        for it. Pictures and videos may stand on both sides.

        `instruction` says what is looked for; None: the publisher's own. Raises what is wrong with a document, and
        UnsupportedError for another model.
        """
        return self._loop.run(scores_of(self._service, query, documents, instruction, self._most_prepared))

    async def ascore(self, query: Side, documents: Sequence[Side], *, instruction: str | None = None) -> Scores:
        """`score` for callers with an event loop; cancelling it aborts what runs."""
        return await self._loop.arun(scores_of(self._service, query, documents, instruction, self._most_prepared))

    def close(self) -> None:
        """Abort what runs and free model, caches, threads and processes; idempotent. A process that was forked from
        their own leaves them alone."""
        if os.getpid() == self._loop.pid:
            self._resources.close()

    def __enter__(self) -> VLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _chat(
        self, messages: Conversation | Sequence[Conversation], params: Params | Sequence[Params], offered: Offered
    ) -> Result | list[Result]:
        if is_conversation(messages):
            return await self._collected(self._begin_chat(cast(Conversation, messages), _one(params), offered))
        conversations = cast("Sequence[Conversation]", as_sequence(messages, "messages"))
        jobs = zip(conversations, _each(params, len(conversations)), strict=True)
        return await self._collect_all([partial(self._begin_chat, *job, offered) for job in jobs])

    async def _generate(
        self, prompts: Prompt | Sequence[Prompt], params: Params | Sequence[Params]
    ) -> Result | list[Result]:
        many = cast("Sequence[Prompt]", as_sequence(prompts, "prompts"))
        if isinstance(prompts, str) or (many and isinstance(many[0], Integral)):
            return await self._collected(self._begin_generate(cast(Prompt, prompts), _one(params)))
        jobs = zip(many, _each(params, len(many)), strict=True)
        return await self._collect_all([partial(self._begin_generate, *job) for job in jobs])

    async def _stream(self, messages: Conversation, params: Params, offered: Offered) -> AsyncGenerator[Delta, None]:
        generation = await self._begin_chat(messages, params, offered)
        try:
            async for delta in generation:
                yield delta
        finally:
            generation.close()

    async def _begin_chat(self, conversation: Conversation, params: Params, offered: Offered) -> Generation:
        messages = await asyncio.to_thread(to_messages, conversation, self._service.prompts.loader.pixel_bounds)
        tools, choice = offered
        return await self._service.chat(Dialogue(messages, tools=tools, choice=choice), self._generation_params(params))

    async def _begin_generate(self, prompt: Prompt, params: Params) -> Generation:
        return await self._service.complete([text_or_ids(prompt)], self._generation_params(params))

    def _generation_params(self, params: Params) -> GenerationParams:
        if params is None:
            return GenerationParams(sampling=self.default_params)
        if not isinstance(params, SamplingParams | GenerationParams):
            raise InvalidRequestError(
                f"params is a {type(params).__name__}; pass SamplingParams or GenerationParams", param="params"
            )
        return _checked(GenerationParams(sampling=params) if isinstance(params, SamplingParams) else params)

    async def _collected(self, begin: Coroutine[Any, Any, Generation]) -> Result:
        generation = await begin
        return Result(answers=await collect(generation), usage=generation.usage)

    async def _collect_all(self, begins: Sequence[Begin]) -> list[Result]:
        gate = asyncio.Semaphore(self._most_prepared)
        with AnswerProgress(len(begins), enabled=self._progress) as progress:

            async def one(begin: Begin) -> Result:
                async with gate:
                    try:
                        result = await self._collected(begin())
                    except DashInferError as error:
                        result = Result(error=error)
                progress.advance(result.usage.num_output_tokens)
                return result

            return await gather([one(begin) for begin in begins])

    @property
    def _most_prepared(self) -> int:
        return self.info.max_num_seqs + _LOOKAHEAD

    async def _loaded(self, config: EngineConfig) -> LocalEngine:
        return self._engine

    def _load(self, config: EngineConfig) -> LocalEngine:
        """In the caller's thread, where Ctrl-C ends it."""
        if not self._progress:
            return LocalEngine.start(config)
        with LoadingProgress() as progress:
            return LocalEngine.start(config, progress=progress)


def _close(reference: weakref.ref[VLM]) -> None:
    """At the interpreter's exit: threads in the middle of a computation would crash it."""
    if (vlm := reference()) is not None:
        vlm.close()


def _checked(params: GenerationParams) -> GenerationParams:
    """Their fields by their types, which Python does not look at: `stop="ab"` would be two strings. Raises
    InvalidRequestError."""
    try:
        return msgspec.convert(msgspec.to_builtins(params), GenerationParams)
    except (msgspec.ValidationError, TypeError) as error:
        raise InvalidRequestError(f"params: {error}", param="params") from error


def _one(params: Params | Sequence[Params]) -> Params:
    if isinstance(params, Sequence):
        raise InvalidRequestError("params is a list, but there is one prompt", param="params")
    return params


def _each(params: Params | Sequence[Params], num_prompts: int) -> Sequence[Params]:
    if not isinstance(params, Sequence):
        return [params] * num_prompts
    if len(params) != num_prompts:
        raise InvalidRequestError(f"there are {num_prompts} prompts and {len(params)} params", param="params")
    return params

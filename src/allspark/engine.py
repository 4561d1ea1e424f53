"""The engine of the documented API: models by name, requests by handle, answers by queue.

A thin face over the same engine that the server runs (`dashinfer_vlm.engine`): it checks what it is given and turns
every mistake into a status with a message.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from allspark.engine_stat import AsEngineStat, describe
from allspark.generation_config import ASGenerationConfigBuilder, multimedia, sampling_params
from allspark.model_loader import HuggingFaceModel
from allspark.multimedia import check_mask, import_ids, place
from allspark.result_queue import ResultQueue
from allspark.runtime_config import (
    AsCacheMode,
    AsModelConfig,
    AsModelRuntimeConfigBuilder,
    TargetDevice,
    engine_config,
)
from allspark.status import AsStatus, RefusalError, wrong
from dashinfer_vlm import __version__
from dashinfer_vlm.engine.engine import Engine as Core
from dashinfer_vlm.engine.host.local import LocalEngine
from dashinfer_vlm.engine.info import EngineInfo
from dashinfer_vlm.engine.load import load_engine
from dashinfer_vlm.errors import CheckpointError, ConfigError, EngineDeadError, InvalidRequestError
from dashinfer_vlm.models.config import read_config
from dashinfer_vlm.request import Request

__all__ = [
    "ASGenerationConfigBuilder",
    "AsCacheMode",
    "AsEngineStat",
    "AsModelConfig",
    "AsModelRuntimeConfigBuilder",
    "AsStatus",
    "Engine",
    "RequestHandle",
    "TargetDevice",
]

GenerateConfig = Mapping[str, Any] | ASGenerationConfigBuilder
Started = tuple[AsStatus, "RequestHandle | None", ResultQueue | None]


class RequestHandle:
    """Names a request towards the engine that started it; opaque."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id

    def __repr__(self) -> str:
        return f"RequestHandle({self.request_id})"


@dataclass(eq=False, slots=True)
class _Model:
    """An installed model; it runs while it has a loop."""

    name: str
    core: Core
    info: EngineInfo
    merge_size: int
    loop: LocalEngine | None = None
    requests: dict[RequestHandle, ResultQueue] = field(default_factory=dict)
    """Started and not yet released."""

    def stop(self) -> None:
        if self.loop:
            self.loop.shutdown()
            self.loop = None

    def release(self) -> None:
        self.stop()
        self.core.close()


class Engine:
    """Installs models, starts and stops them, and runs requests. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._models: dict[str, _Model] = {}
        self._ids = itertools.count()
        self._finalizer = weakref.finalize(self, _release_all, self._models, os.getpid())

    def __repr__(self) -> str:
        return f"Engine({self.get_version_full()}: {', '.join(self._models) or 'no model'})"

    def get_version_full(self) -> str:
        """Versions of this package and of torch."""
        return f"dashinfer-vlm {__version__} (torch {torch.__version__})"

    def install_model(self, config: AsModelConfig) -> AsStatus:
        """Load a model under the name of `config`.

        PARAM_ERROR for a value that cannot be, IO_ERROR for a model that cannot be read, MEMORY_ERROR when it does not
        fit, INVALID_CALL_ERROR when the name is taken.
        """
        return _status(self._install, config)

    def start_model(self, model_name: str) -> AsStatus:
        """Let an installed or stopped model take requests. INVALID_CALL_ERROR when it does already."""
        return _status(self._start_model, model_name)

    def stop_model(self, model_name: str) -> AsStatus:
        """Interrupt what runs and take no more requests; returns when the model is idle."""
        return _status(self._stop_model, model_name)

    def release_model(self, model_name: str) -> AsStatus:
        """Free a stopped model; its name may be used again. INVALID_CALL_ERROR while it runs."""
        return _status(self._release_model, model_name)

    def start_request(
        self, model_name: str, inputs: Mapping[str, Any], generate_config: GenerateConfig | None = None
    ) -> Started:
        """Start a request: its status, and when that is ALLSPARK_SUCCESS, its handle and its queue.

        `inputs` has `input_ids`: int64 [1, S], a DLPack capsule or an object with `__dlpack__`; `attention_mask` may
        come along if it is all ones. `generate_config` is what `ASGenerationConfigBuilder.build()` gives; `mm_info` in
        it holds the embeddings of the placeholders in `input_ids`.

        PARAM_ERROR for anything that cannot be, with the reason as the status's `message`; EXCEED_LIMIT_ERROR for
        lengths over the engine's; EMPTY_REQUEST without a token; REQUEST_DENIED while the model does not run;
        LORA_NOT_FOUND. Nothing is scheduled then.
        """
        return self._started(model_name, lambda: _input_ids(inputs), generate_config)

    def start_request_ids(
        self, model_name: str, model: object, input_ids: Any, generate_config_builder: GenerateConfig
    ) -> Started:
        """`start_request` with a tensor [S] or [1, S], or a list of ids. `model` is not needed."""
        return self._started(model_name, lambda: import_ids(input_ids), generate_config_builder)

    def start_request_text(
        self, model_name: str, model: HuggingFaceModel, text: str, generate_config_builder: GenerateConfig
    ) -> Started:
        """`start_request` with a text, which the tokenizer of `model` encodes, special tokens included."""
        return self._started(model_name, lambda: _encode(model, text), generate_config_builder)

    def stop_request(self, model_name: str, request_handle: RequestHandle) -> AsStatus:
        """Interrupt a request; one that has ended already stays as it is. ILLEGAL_REQUEST_ID after its release."""
        return _status(self._stop_request, model_name, request_handle, False)

    def release_request(self, model_name: str, request_handle: RequestHandle) -> AsStatus:
        """Interrupt a request if it runs, and forget it. Its queue can still be read. ILLEGAL_REQUEST_ID when it was
        released before."""
        return _status(self._stop_request, model_name, request_handle, True)

    def sync_request(self, model_name: str, request_handle: RequestHandle | None = None) -> AsStatus:
        """Wait until a request, or with None every request of the model, has ended. RUNTIME_ERROR if one failed."""
        return _status(self._sync, model_name, request_handle)

    def get_as_engine_stat(self, model_name: str) -> AsEngineStat:
        """Numbers about a model; all 0 unless it runs."""
        with self._lock:
            model = self._models.get(model_name)
            loop = model.loop if model else None
        if model is None or loop is None:
            return AsEngineStat(model_name=str(model_name))
        try:
            return describe(model.name, model.core.runner.kv, loop.read_stats())
        except EngineDeadError:
            return AsEngineStat(model_name=model.name)

    def load_lora(self, model_name: str, lora_name: str) -> AsStatus:
        """Adapters beside a loaded model are not offered: LORA_NOT_FOUND."""
        return _status(self._no_lora, model_name, lora_name)

    def unload_lora(self, model_name: str, lora_name: str) -> AsStatus:
        """Adapters beside a loaded model are not offered: LORA_NOT_FOUND."""
        return _status(self._no_lora, model_name, lora_name)

    def _install(self, config: AsModelConfig) -> None:
        if not isinstance(config, AsModelConfig):
            raise wrong(
                f"install_model takes what AsModelRuntimeConfigBuilder.build() gives, not {type(config).__name__}"
            )
        settings = engine_config(config)
        if not config.model_name:
            raise wrong("model_name is empty")
        self._check_free(config.model_name)
        core, info = load_engine(settings, lambda stage, done, total: None)
        merge_size = read_config(Path(settings.model)).merge_size
        with self._lock:
            self._check_free(config.model_name)
            self._models[config.model_name] = _Model(config.model_name, core, info, merge_size)

    def _check_free(self, name: str) -> None:
        if name in self._models:
            raise RefusalError(AsStatus.ALLSPARK_INVALID_CALL_ERROR, f"a model {name!r} is installed; release it first")

    def _start_model(self, model_name: str) -> None:
        with self._lock:
            model = self._model(model_name)
            if model.loop:
                raise RefusalError(AsStatus.ALLSPARK_INVALID_CALL_ERROR, f"model {model_name!r} runs already")
            model.loop = LocalEngine(model.core, model.info)

    def _stop_model(self, model_name: str) -> None:
        with self._lock:
            model = self._model(model_name)
            if model.loop is None:
                raise RefusalError(AsStatus.ALLSPARK_INVALID_CALL_ERROR, f"model {model_name!r} does not run")
            model.stop()

    def _release_model(self, model_name: str) -> None:
        with self._lock:
            model = self._model(model_name)
            if model.loop:
                raise RefusalError(AsStatus.ALLSPARK_INVALID_CALL_ERROR, f"model {model_name!r} runs; stop it first")
            del self._models[model_name]
            model.release()

    def _started(self, model_name: str, ids: Callable[[], list[int]], config: GenerateConfig | None) -> Started:
        try:
            return AsStatus.ALLSPARK_SUCCESS, *self._start_request(model_name, ids, config)
        except RefusalError as refusal:
            return refusal.status(), None, None

    def _start_request(
        self, model_name: str, read_ids: Callable[[], list[int]], config: GenerateConfig | None
    ) -> tuple[RequestHandle, ResultQueue]:
        with self._lock:
            model = self._running(model_name)
        ids = read_ids()
        values = _config_dict(config)
        info = model.info
        placed = place(
            multimedia(values),
            ids,
            widths=(info.hidden_size, info.embedding_size),
            vocab_size=info.vocab_size,
            merge_size=model.merge_size,
        )
        params = sampling_params(values, len(ids), info.max_model_len, info.vocab_size)
        request = Request(
            id=f"{next(self._ids)}-{values.get('uuid') or 'allspark'}",
            prompt_ids=ids,
            params=params,
            items=placed.items,
            positions=placed.positions,
        )
        _wait_prepared(model.core, request)
        return self._submit(model_name, request)

    def _submit(self, model_name: str, request: Request) -> tuple[RequestHandle, ResultQueue]:
        handle, queue = RequestHandle(request.id), ResultQueue(len(request.prompt_ids))
        with self._lock:
            model = self._running(model_name)  # it may have been stopped while the request was checked
            assert model.loop is not None
            try:
                model.loop.submit(request, queue.feed)
            except EngineDeadError as error:
                raise RefusalError(AsStatus.ALLSPARK_RUNTIME_ERROR, str(error)) from error
            model.requests[handle] = queue
        return handle, queue

    def _stop_request(self, model_name: str, handle: RequestHandle, release: bool) -> None:
        with self._lock:
            model = self._model(model_name)
            queue = _queue_of(model, handle)
            if model.loop and not queue.ended:
                model.loop.abort(handle.request_id)
            if release:
                del model.requests[handle]

    def _sync(self, model_name: str, handle: RequestHandle | None) -> None:
        with self._lock:
            model = self._model(model_name)
            queues = list(model.requests.values()) if handle is None else [_queue_of(model, handle)]
        failed = [finish for finish in [queue.wait_ended() for queue in queues] if finish.reason == "error"]
        if failed:
            raise RefusalError(AsStatus.ALLSPARK_RUNTIME_ERROR, f"{len(failed)} requests failed: {failed[0].message}")

    def _no_lora(self, model_name: str, lora_name: str) -> None:
        with self._lock:
            self._model(model_name)
        raise RefusalError(
            AsStatus.ALLSPARK_LORA_NOT_FOUND,
            f"adapter {lora_name!r}: this engine loads none; VLM(model, lora=...) and dashinfer_vlm_serve --lora merge "
            "one into the model's weights",
        )

    def _model(self, name: str) -> _Model:
        if not isinstance(name, str) or name not in self._models:
            raise wrong(f"there is no model {name!r}; installed: {', '.join(self._models) or 'none'}")
        return self._models[name]

    def _running(self, name: str) -> _Model:
        model = self._model(name)
        if model.loop is None:
            raise RefusalError(AsStatus.ALLSPARK_REQUEST_DENIED, f"model {name!r} does not run; call start_model")
        return model


def _status(call: Callable[..., None], *args: Any) -> AsStatus:
    """Run `call`; whatever it refuses becomes a status."""
    try:
        call(*args)
    except RefusalError as refusal:
        return refusal.status()
    except ConfigError as error:
        return wrong(str(error)).status()
    except CheckpointError as error:
        return RefusalError(AsStatus.ALLSPARK_IO_ERROR, str(error)).status()
    except (MemoryError, torch.OutOfMemoryError) as error:
        return RefusalError(AsStatus.ALLSPARK_MEMORY_ERROR, str(error) or "out of memory").status()
    return AsStatus.ALLSPARK_SUCCESS


def _release_all(models: dict[str, _Model], pid: int) -> None:
    """Nothing in a process that was forked from `pid`, whose models they are."""
    for model in models.values() if os.getpid() == pid else ():
        model.release()


def _queue_of(model: _Model, handle: object) -> ResultQueue:
    if not isinstance(handle, RequestHandle) or handle not in model.requests:
        raise RefusalError(
            AsStatus.ALLSPARK_ILLEGAL_REQUEST_ID,
            f"{handle!r} is not a request of model {model.name!r}, or was released",
        )
    return model.requests[handle]


def _input_ids(inputs: Mapping[str, Any]) -> list[int]:
    if not isinstance(inputs, Mapping) or "input_ids" not in inputs:
        raise wrong("inputs must be a dict with input_ids")
    for name in inputs:
        if name not in ("input_ids", "attention_mask"):
            raise wrong(f"inputs has an unknown key {name!r}; known are input_ids and attention_mask")
    ids = import_ids(inputs["input_ids"])
    if "attention_mask" in inputs:
        check_mask(inputs["attention_mask"], len(ids))
    return ids


def _encode(model: HuggingFaceModel, text: str) -> list[int]:
    if not isinstance(model, HuggingFaceModel):
        raise wrong(f"a text needs a HuggingFaceModel with its tokenizer, not {type(model).__name__}")
    if not isinstance(text, str):
        raise wrong(f"the text is a {type(text).__name__}; start one request per text")
    return import_ids(model.get_tokenizer().encode(text))


def _config_dict(config: GenerateConfig | None) -> Mapping[str, Any]:
    if config is None:
        return {}
    if isinstance(config, ASGenerationConfigBuilder):
        return config.build()
    if not isinstance(config, Mapping):
        raise wrong(f"the generation config is a {type(config).__name__}; it must be a dict or a builder")
    return config


def _wait_prepared(core: Core, request: Request) -> None:
    """So that a form which cannot be kept is the status of the call."""
    try:
        if (ready := core.prepare(request)) is not None:
            ready.result()
    except InvalidRequestError as error:
        raise wrong(str(error)) from error

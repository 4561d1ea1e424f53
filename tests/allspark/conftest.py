"""One engine with one running model for all tests of the documented API."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

import allspark
from allspark import AsStatus, GenerateRequestStatus
from tests.conftest import CheckpointMaker

NAME = "tiny"
HIDDEN = 128
MAX_LENGTH = 512
GREEDY = {"temperature": 0.0, "early_stopping": False}


@dataclass(frozen=True)
class Answer:
    """What came of one request that was waited for."""

    ids: list[int]
    logprobs: list[float]
    status: GenerateRequestStatus
    prefix_cache_len: int


def config(folder: Path, **changes: Any) -> allspark.AsModelConfig:
    """A small, fast configuration of the checkpoint in `folder`."""
    fields: dict[str, Any] = {
        "model_name": NAME,
        "model_path": str(folder),
        "compute_unit": "CPU:0",
        "engine_max_length": MAX_LENGTH,
        "engine_max_batch": 16,
        "num_threads": 1,
        "cache_span_size": 16,
    }
    return allspark.AsModelConfig(**(fields | changes))


@pytest.fixture(scope="package")
def folder(checkpoint: CheckpointMaker) -> Path:
    return checkpoint()


@pytest.fixture(scope="package")
def loader(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> allspark.HuggingFaceModel:
    return loaded(folder, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="package")
def engine(loader: allspark.HuggingFaceModel) -> Iterator[allspark.Engine]:
    with running(loader) as engine:
        yield engine


Ask = Callable[..., Answer]


@pytest.fixture(scope="package")
def ask(engine: allspark.Engine) -> Ask:
    return partial(run, engine)


def loaded(folder: Path, output: Path) -> allspark.HuggingFaceModel:
    """The loader in fp32, so that two ways to the same tokens can be compared exactly."""
    model = allspark.HuggingFaceModel(str(folder), NAME, user_set_data_type="float32")
    return model.load_model().serialize(None, model_output_dir=str(output))


@contextmanager
def running(loader: allspark.HuggingFaceModel) -> Iterator[allspark.Engine]:
    """An engine in which the model has been started."""
    builder = loader.create_reference_runtime_config_builder(NAME, allspark.TargetDevice.CPU, [0], max_batch=16)
    builder.max_length(MAX_LENGTH).kv_cache_span_size(16).compute_unit("CPU", [0], 1)
    made = allspark.Engine()
    assert made.install_model(builder.build()) == AsStatus.ALLSPARK_SUCCESS
    assert made.start_model(NAME) == AsStatus.ALLSPARK_SUCCESS
    yield made
    assert made.stop_model(NAME) == AsStatus.ALLSPARK_SUCCESS
    assert made.release_model(NAME) == AsStatus.ALLSPARK_SUCCESS


def run(
    engine: allspark.Engine, ids: Sequence[int], generate_config: Mapping[str, Any] = GREEDY, **keys: Any
) -> Answer:
    """Run one request to its end; it must be accepted."""
    inputs = {"input_ids": to_dlpack(torch.tensor([list(ids)]))}
    status, handle, queue = engine.start_request(NAME, inputs, {"max_length": len(ids) + 6, **generate_config, **keys})
    assert status == AsStatus.ALLSPARK_SUCCESS, status
    assert handle is not None
    assert queue is not None
    engine.sync_request(NAME, handle)
    elements = queue.GetNoWait() or allspark.GeneratedElements()
    engine.release_request(NAME, handle)
    return Answer(
        elements.ids_from_generate, elements.token_logprobs_list, queue.GenerateStatus(), elements.prefix_cache_len
    )


def embedding(rows: int, seed: int = 0, columns: int = HIDDEN) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def media(identifier: str = "151859", *tensors: Any, **extra: Any) -> allspark.MultiMediaInfo:
    """Embeddings of one placeholder, and what is known by other identifiers."""
    info = allspark.MultiMediaInfo()
    for name, content in {identifier: list(tensors), **{k: [v] for k, v in extra.items()}}.items():
        assert info.add_multimedia_content(name, content) == AsStatus.ALLSPARK_SUCCESS
    return info


def usable(engine: allspark.Engine) -> bool:
    """Whether the engine still serves."""
    status, handle, queue = engine.start_request_ids(NAME, None, [1, 2, 3], {**GREEDY, "max_length": 5})
    assert queue is not None
    done = engine.sync_request(NAME, handle)
    return status == done == engine.release_request(NAME, handle) == AsStatus.ALLSPARK_SUCCESS  # type: ignore[arg-type]

"""The documented API on a card: the same answers as on the CPU, embeddings from either memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

import allspark
from allspark import AsStatus
from tests.allspark.conftest import GREEDY, NAME, Ask, config, embedding, media

IMAGE = 151859
LOGPROBS = {**GREEDY, "logprobs": True}

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def on_card(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[allspark.Engine]:
    loader = allspark.HuggingFaceModel(str(folder), NAME, user_set_data_type="float32").load_model()
    loader.serialize(None, model_output_dir=str(tmp_path_factory.mktemp("cuda")))
    runtime = loader.create_reference_runtime_config_builder(NAME, "cuda", [0], max_batch=4).max_length(512)
    engine = allspark.Engine()
    assert engine.install_model(runtime.kv_cache_span_size(16).build()) == AsStatus.ALLSPARK_SUCCESS
    assert engine.start_model(NAME) == AsStatus.ALLSPARK_SUCCESS
    yield engine
    assert engine.stop_model(NAME) == AsStatus.ALLSPARK_SUCCESS
    assert engine.release_model(NAME) == AsStatus.ALLSPARK_SUCCESS


@pytest.mark.parametrize("memory", ["cpu", "cuda"])
def test_embeddings_may_come_from_either_memory(memory: str, on_card: allspark.Engine, ask: Ask) -> None:
    ids = [5, *[IMAGE] * 4, 6]
    expected = ask(ids, LOGPROBS, mm_info=media(str(IMAGE), embedding(4)))
    info = media(str(IMAGE), to_dlpack(embedding(4).to(memory)))
    keys = {**LOGPROBS, "max_length": len(ids) + 6, "mm_info": info}
    status, handle, queue = on_card.start_request_ids(NAME, None, ids, keys)
    assert status == AsStatus.ALLSPARK_SUCCESS, status
    assert queue is not None
    on_card.sync_request(NAME, handle)
    elements = queue.Get()
    assert elements is not None
    assert elements.token_logprobs_list == pytest.approx(expected.logprobs, abs=1e-3)
    on_card.release_request(NAME, handle)  # type: ignore[arg-type]


def test_a_tensor_on_the_card_is_not_copied() -> None:
    tensor = embedding(4).to("cuda")
    assert media("7", to_dlpack(tensor)).embeddings[7][0].data_ptr() == tensor.data_ptr()


def test_a_device_that_is_not_there_is_refused(folder: Path) -> None:
    many = ",".join(str(i) for i in range(torch.cuda.device_count() + 1))
    assert allspark.Engine().install_model(config(folder, compute_unit=f"CUDA:{many}")) == AsStatus.ALLSPARK_PARAM_ERROR

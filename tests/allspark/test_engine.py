"""The life of models and requests, and what queues tell."""

from __future__ import annotations

import gc
import importlib.metadata
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

import allspark
from allspark import AsStatus, GenerateRequestStatus
from allspark.runtime_config import engine_config
from dashinfer_vlm.errors import EngineError
from dashinfer_vlm.fault import Fault
from dashinfer_vlm.request import Finish, Output
from tests.allspark.conftest import GREEDY, MAX_LENGTH, NAME, Ask, config, usable

OK = AsStatus.ALLSPARK_SUCCESS


def test_statuses_are_numbers_with_names_and_reasons() -> None:
    assert AsStatus.ALLSPARK_PARAM_ERROR == 2
    status = AsStatus(2, "too long")
    assert status == AsStatus.ALLSPARK_PARAM_ERROR != AsStatus.ALLSPARK_SUCCESS
    assert (status.name, status.value, status.message) == ("ALLSPARK_PARAM_ERROR", 2, "too long")
    assert repr(status) == "<AsStatus.ALLSPARK_PARAM_ERROR: 2: too long>"
    assert str(AsStatus.ALLSPARK_STREAMING) == "AsStatus.ALLSPARK_STREAMING"


def test_a_model_lives_through_its_states(folder: Path) -> None:
    engine = allspark.Engine()
    assert engine.install_model(config(folder)) == OK
    for _ in range(2):  # a stopped model may be started again
        assert engine.start_model(NAME) == OK
        assert usable(engine)
        assert engine.stop_model(NAME) == OK
    assert engine.release_model(NAME) == OK
    assert engine.install_model(config(folder, engine_max_length=64)) == OK
    assert engine.release_model(NAME) == OK


def test_two_engines_and_two_models_do_not_mix(folder: Path) -> None:
    first, second = allspark.Engine(), allspark.Engine()
    for engine, name in ((first, "a"), (first, "b"), (second, "a")):
        assert engine.install_model(config(folder, model_name=name)) == OK
        assert engine.start_model(name) == OK
    status, handle, _ = first.start_request_ids("a", None, [1, 2], GREEDY)
    assert status == OK
    assert handle is not None
    assert first.release_request("b", handle) == AsStatus.ALLSPARK_ILLEGAL_REQUEST_ID
    assert second.release_request("a", handle) == AsStatus.ALLSPARK_ILLEGAL_REQUEST_ID
    assert first.release_request("a", handle) == OK
    for engine, name in ((first, "a"), (first, "b"), (second, "a")):
        assert engine.stop_model(name) == OK


def test_stopping_a_model_interrupts_its_requests(folder: Path) -> None:
    engine = allspark.Engine()
    engine.install_model(config(folder))
    engine.start_model(NAME)
    _, handle, queue = engine.start_request_ids(NAME, None, [1, 2], GREEDY)
    assert queue is not None
    assert handle is not None
    queue.Get()
    assert engine.stop_model(NAME) == OK
    assert engine.sync_request(NAME, handle) == OK
    assert queue.GenerateStatus() == GenerateRequestStatus.GenerateInterrupted
    assert engine.release_request(NAME, handle) == OK
    status, none, nothing = engine.start_request_ids(NAME, None, [1, 2], GREEDY)
    assert (status, none, nothing) == (AsStatus.ALLSPARK_REQUEST_DENIED, None, None)


def test_an_engine_that_is_forgotten_stops_its_threads(folder: Path) -> None:
    before = set(threading.enumerate())
    engine = allspark.Engine()
    engine.install_model(config(folder))
    engine.start_model(NAME)
    engine.start_request_ids(NAME, None, [1, 2], GREEDY)
    del engine
    gc.collect()
    assert set(threading.enumerate()) <= before


def test_requests_run_together_and_sync_waits_for_all(engine: allspark.Engine, ask: Ask) -> None:
    prompts = [[i, i + 1, i + 2] for i in range(1, 30)]
    started = [engine.start_request_ids(NAME, None, ids, {**GREEDY, "max_length": 9}) for ids in prompts]
    assert engine.sync_request(NAME, None) == OK
    for ids, (status, handle, queue) in zip(prompts, started, strict=True):
        assert status == OK
        assert handle is not None
        assert queue is not None
        assert queue.GenerateStatus() == GenerateRequestStatus.GenerateFinished
        elements = queue.Get()
        assert elements is not None
        assert elements.ids_from_generate == ask(ids).ids
        assert engine.release_request(NAME, handle) == OK


def test_input_ids_come_in_every_documented_form(engine: allspark.Engine, ask: Ask) -> None:
    ids = [5, 6, 7]
    tensor = torch.tensor(ids)
    expected = ask(ids).ids
    forms: list[Any] = [
        ids,
        tuple(ids),
        tensor,
        tensor[None],
        tensor.int(),
        tensor.numpy(),
        torch.tensor([0, 5, 0, 6, 0, 7])[1::2],
    ]
    for form in forms:
        status, handle, queue = engine.start_request_ids(NAME, None, form, {**GREEDY, "max_length": 9})
        assert status == OK, status
        engine.sync_request(NAME, handle)
        assert queue is not None
        elements = queue.Get()
        assert elements is not None
        assert elements.ids_from_generate == expected
        engine.release_request(NAME, handle)  # type: ignore[arg-type]
    inputs = {"input_ids": tensor[None], "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    status, handle, _ = engine.start_request(NAME, inputs, GREEDY)
    assert status == OK
    engine.release_request(NAME, handle)  # type: ignore[arg-type]


def test_log_probabilities_come_with_the_tokens(engine: allspark.Engine) -> None:
    keys = {**GREEDY, "max_length": 6, "logprobs": True, "top_logprobs": 3}
    _, handle, queue = engine.start_request_ids(NAME, None, [5, 6, 7], keys)
    engine.sync_request(NAME, handle)
    assert queue is not None
    elements = queue.Get()
    assert elements is not None
    assert len(elements.token_logprobs_list) == len(elements.log_probs_list) == 3
    for token, logprob, top in zip(
        elements.ids_from_generate, elements.token_logprobs_list, elements.log_probs_list, strict=True
    ):
        assert len(top) == 3
        assert top[0] == (token, logprob)  # greedy
    engine.release_request(NAME, handle)  # type: ignore[arg-type]


def test_a_known_beginning_is_not_computed_again(ask: Ask) -> None:
    ids = list(range(100, 150))
    assert ask(ids).prefix_cache_len == 0
    assert ask([*ids, 7]).prefix_cache_len == 48


def test_statistics_describe_the_model(engine: allspark.Engine, ask: Ask) -> None:
    before = engine.get_as_engine_stat(NAME)
    ask([200, 201, 202])
    after = engine.get_as_engine_stat(NAME)
    assert after.total_generated_token - before.total_generated_token == 6
    assert after.total_prefill_token - before.total_prefill_token == 3
    assert after.total_token >= after.free_token > 0
    assert after.dict()["model_name"] == NAME
    assert "total_token" in after.ToString()
    assert engine.get_as_engine_stat("unknown").total_token == 0


def test_a_request_describes_itself(engine: allspark.Engine) -> None:
    _, handle, queue = engine.start_request_ids(NAME, None, [5, 6, 7], {**GREEDY, "max_length": 8})
    engine.sync_request(NAME, handle)
    assert queue is not None
    info = queue.RequestStatInfo()
    assert (info["context_token_length"], info["generated_token_length"]) == (3, 5)
    assert info["arrival_time"] <= info["first_token_time"] <= info["last_token_time"]
    assert 0 < info["time_to_first_token"] <= info["finished_time"]
    assert info["generate_tps"] > 0
    engine.release_request(NAME, handle)  # type: ignore[arg-type]


def test_a_text_is_encoded_with_its_special_tokens(
    engine: allspark.Engine, loader: allspark.HuggingFaceModel, ask: Ask
) -> None:
    text = "<|im_start|>user\nHi<|im_end|>\n"
    ids = loader.get_tokenizer().encode(text)
    status, handle, queue = engine.start_request_text(NAME, loader, text, {**GREEDY, "max_length": len(ids) + 6})
    assert status == OK
    engine.sync_request(NAME, handle)
    assert queue is not None
    elements = queue.Get()
    assert elements is not None
    assert elements.ids_from_generate == ask(ids).ids
    engine.release_request(NAME, handle)  # type: ignore[arg-type]


def test_the_reference_builders_follow_the_checkpoint(loader: allspark.HuggingFaceModel) -> None:
    runtime = loader.create_reference_runtime_config_builder("x", "cpu", [0], 8).max_length(100).build()
    assert (runtime.model_name, runtime.compute_unit, runtime.engine_max_batch) == ("x", "CPU:0", 8)
    assert loader.create_reference_generation_config_builder(runtime).build()["max_length"] == 100
    assert loader.get_model_context_length() > 1000
    assert loader.get_model_config()["hidden_size"] == 128


def test_the_runtime_builder_reads_the_documented_dict() -> None:
    fields = {
        "model_name": "m",
        "compute_unit": {"device_type": "CPU", "device_ids": [0], "compute_thread_in_device": 2},
        "engine_max_length": 64,
        "engine_max_batch": 4,
        "enable_prefix_cache": False,
        "kv_cache_mode": "AsCacheQuantI8",
        "kv_cache_span_size": 64,
    }
    built = allspark.AsModelRuntimeConfigBuilder().from_dict(fields).prefix_cache_ttl(5).build()
    assert (built.num_threads, built.engine_max_length, built.cache_span_size) == (2, 64, 64)
    assert built.cache_mode is allspark.AsCacheMode.AsCacheQuantI8
    assert not built.enable_prefix_cache
    with pytest.raises(KeyError, match="unknown field 'max'"):
        allspark.AsModelRuntimeConfigBuilder().update_from_dict({"max": 5})


def test_a_model_runs_with_its_keys_and_values_in_8_bits(folder: Path) -> None:
    eight_bit = config(folder, cache_mode=allspark.AsCacheMode.AsCacheQuantI8)
    assert engine_config(eight_bit).kv_cache_dtype == "int8"
    assert engine_config(config(folder)).kv_cache_dtype == "auto"
    engine = allspark.Engine()
    assert engine.install_model(eight_bit) == OK
    assert engine.start_model(NAME) == OK
    ids = to_dlpack(torch.tensor([[1, 2, 3, 4]]))
    status, handle, queue = engine.start_request_ids(NAME, None, ids, {"max_length": 24, **GREEDY})
    assert status == OK
    assert handle is not None
    assert engine.sync_request(NAME, handle) == OK
    assert queue is not None
    assert queue.GeneratedLength() == 20
    assert engine.stop_model(NAME) == OK
    assert engine.release_model(NAME) == OK


def test_builders_do_not_share_what_they_build() -> None:
    builder = allspark.ASGenerationConfigBuilder().top_k(5)
    first = builder.build()
    assert builder.top_k(6).build()["top_k"] == 6
    assert first["top_k"] == 5
    runtime = allspark.AsModelRuntimeConfigBuilder().max_batch(1)
    one = runtime.build()
    assert runtime.max_batch(2).build().engine_max_batch == 2
    assert one.engine_max_batch == 1


def test_the_version_names_the_package() -> None:
    version = importlib.metadata.version("dashinfer-vlm")
    assert allspark.Engine().get_version_full().startswith(f"dashinfer-vlm {version} (torch ")


class TestResultQueue:
    def test_a_reader_that_stops_at_the_end_misses_no_token(self) -> None:
        queue = allspark.ResultQueue()
        queue.feed(Output("a", token_ids=(1,)))
        assert queue.GenerateStatus() == GenerateRequestStatus.ContextFinished
        queue.feed(Output("a", token_ids=(2,), finish=Finish("stop")))
        assert queue.GenerateStatus() == GenerateRequestStatus.Generating
        elements = queue.Get()
        assert elements is not None
        assert elements.ids_from_generate == [1, 2]
        assert queue.GenerateStatus() == GenerateRequestStatus.GenerateFinished
        assert queue.Get() is None
        assert queue.GeneratedLength() == 2

    def test_waiting_ends_with_the_time_or_with_a_token(self) -> None:
        queue = allspark.ResultQueue()
        assert queue.GetNoWait() is None
        assert queue.GetWithTimeout(1) is None
        assert queue.GenerateStatus() == GenerateRequestStatus.Init
        feeder = threading.Thread(target=queue.feed, args=(Output("a", token_ids=(7,)),))
        feeder.start()
        elements = queue.GetWithTimeout(1e12)
        feeder.join()
        assert elements is not None
        assert elements.ids_from_generate == [7]

    @pytest.mark.parametrize("timeout_ms", [-1, float("nan")])
    def test_a_time_that_cannot_be_is_refused(self, timeout_ms: float) -> None:
        with pytest.raises(ValueError, match="timeout_ms"):
            allspark.ResultQueue().GetWithTimeout(timeout_ms)

    def test_a_failure_is_told_and_ends_loops_that_do_not_look(self) -> None:
        queue = allspark.ResultQueue()
        queue.feed(Output("a", token_ids=(1,)))
        queue.feed(Fault("EngineError", "the card is gone"))
        elements = queue.Get()
        assert elements is not None
        assert elements.ids_from_generate == [1]
        assert queue.Get() is None
        assert queue.GenerateStatus() == GenerateRequestStatus.InternalError
        with pytest.raises(EngineError, match="the card is gone"):
            queue.Get()


def test_a_thousand_requests_leave_no_memory_behind(engine: allspark.Engine) -> None:
    def run(num_requests: int) -> None:
        for first in range(0, num_requests, 50):
            started = [
                engine.start_request_ids(NAME, None, [10 + i % 90, 300 + i], {"max_length": 3, "seed": i})
                for i in range(first, first + 50)
            ]
            assert engine.sync_request(NAME, None) == OK
            for status, handle, _ in started:
                assert status == OK
                assert engine.release_request(NAME, handle) == OK  # type: ignore[arg-type]

    run(300)  # allocators and caches reach their size
    gc.collect()
    before = resident_bytes()
    run(1000)
    gc.collect()
    assert resident_bytes() == pytest.approx(before, rel=0.02)
    stat = engine.get_as_engine_stat(NAME)
    assert stat.running_request == stat.pendding_request == 0
    assert stat.free_token == stat.total_token


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_max_length_is_the_engines_when_it_is_not_given(engine: allspark.Engine) -> None:
    _, handle, queue = engine.start_request_ids(NAME, None, list(range(1, MAX_LENGTH - 2)), GREEDY)
    engine.sync_request(NAME, handle)
    assert queue is not None
    assert queue.GeneratedLength() == 3
    engine.release_request(NAME, handle)  # type: ignore[arg-type]

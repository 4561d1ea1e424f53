"""Every wrong use gets its status and a reason, and the engine serves the next request."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import allspark
from allspark import AsStatus, Engine, RequestHandle
from tests.allspark.conftest import GREEDY, NAME, config, usable
from tests.tokens import VOCAB

PARAM = AsStatus.ALLSPARK_PARAM_ERROR
LIMIT = AsStatus.ALLSPARK_EXCEED_LIMIT_ERROR
CALL = AsStatus.ALLSPARK_INVALID_CALL_ERROR
ILLEGAL = AsStatus.ALLSPARK_ILLEGAL_REQUEST_ID
OK = AsStatus.ALLSPARK_SUCCESS


def started(engine: Engine, **keys: Any) -> AsStatus:
    return engine.start_request_ids(NAME, None, [1, 2, 3], {**GREEDY, **keys})[0]


def with_ids(engine: Engine, ids: Any) -> AsStatus:
    return engine.start_request_ids(NAME, None, ids, GREEDY)[0]


def with_inputs(engine: Engine, inputs: Any, generate_config: Any = None) -> AsStatus:
    return engine.start_request(NAME, inputs, generate_config)[0]


def ended(engine: Engine) -> RequestHandle:
    _, handle, _ = engine.start_request_ids(NAME, None, [1, 2, 3], {**GREEDY, "max_length": 5})
    engine.sync_request(NAME, handle)
    assert handle is not None
    return handle


def released(engine: Engine) -> RequestHandle:
    handle = ended(engine)
    assert engine.release_request(NAME, handle) == OK
    return handle


IDS = torch.tensor([[1, 2, 3]])

WRONG_REQUESTS: dict[str, tuple[Callable[[Engine], AsStatus], AsStatus, str]] = {
    "no inputs": (lambda e: with_inputs(e, {}), PARAM, "input_ids"),
    "inputs that are no dict": (lambda e: with_inputs(e, [1, 2]), PARAM, "input_ids"),
    "an unknown input": (lambda e: with_inputs(e, {"input_ids": IDS, "pixels": IDS}), PARAM, "'pixels'"),
    "a mask with padding": (lambda e: with_inputs(e, {"input_ids": IDS, "attention_mask": IDS * 0}), PARAM, "ones"),
    "a mask of another length": (
        lambda e: with_inputs(e, {"input_ids": IDS, "attention_mask": IDS[:, 1:]}),
        PARAM,
        "3 ones",
    ),
    "a batch of two": (lambda e: with_inputs(e, {"input_ids": IDS.repeat(2, 1)}), PARAM, "[2, 3]"),
    "ids of three dimensions": (lambda e: with_inputs(e, {"input_ids": IDS[None]}), PARAM, "[1, 1, 3]"),
    "float ids": (lambda e: with_inputs(e, {"input_ids": IDS.float()}), PARAM, "float32"),
    "byte ids": (lambda e: with_inputs(e, {"input_ids": IDS.byte()}), PARAM, "uint8"),
    "ids of text": (lambda e: with_ids(e, "hello"), PARAM, "input_ids"),
    "ids of floats": (lambda e: with_ids(e, [1.0, 2.0]), PARAM, "whole numbers"),
    "ids of truths": (lambda e: with_ids(e, [True]), PARAM, "whole numbers"),
    "nested ids": (lambda e: with_ids(e, [[1, 2]]), PARAM, "whole numbers"),
    "no ids": (lambda e: with_ids(e, []), AsStatus.ALLSPARK_EMPTY_REQUEST, "empty"),
    "an empty tensor": (lambda e: with_ids(e, IDS[:, :0]), AsStatus.ALLSPARK_EMPTY_REQUEST, "empty"),
    "a negative id": (lambda e: with_ids(e, [1, -1]), PARAM, "id 1 is -1"),
    "an id beyond the vocabulary": (lambda e: with_ids(e, [1, VOCAB]), PARAM, str(VOCAB)),
    "an id beyond all integers": (lambda e: with_ids(e, [2**70]), PARAM, str(2**70)),
    "a prompt that is too long": (lambda e: with_ids(e, [1] * 512), LIMIT, "512"),
    "a config that is no dict": (lambda e: with_inputs(e, {"input_ids": IDS}, [1]), PARAM, "dict or a builder"),
    "an unknown key": (lambda e: started(e, temprature=1.0), PARAM, "'temprature'"),
    "several beams": (lambda e: started(e, num_beams=2), PARAM, "num_beams"),
    "a length penalty": (lambda e: started(e, length_penalty=2.0), PARAM, "length_penalty"),
    "a negative temperature": (lambda e: started(e, temperature=-1.0), PARAM, "temperature"),
    "a temperature that is no number": (lambda e: started(e, temperature=float("nan")), PARAM, "temperature"),
    "an endless temperature": (lambda e: started(e, temperature=float("inf")), PARAM, "temperature"),
    "a temperature of text": (lambda e: started(e, temperature="0.7"), PARAM, "temperature"),
    "a top_p above one": (lambda e: started(e, top_p=1.5), PARAM, "top_p"),
    "a fraction as top_k": (lambda e: started(e, top_k=1.5), PARAM, "top_k"),
    "a negative top_k": (lambda e: started(e, top_k=-1), PARAM, "top_k"),
    "a repetition penalty of zero": (lambda e: started(e, repetition_penalty=0.0), PARAM, "repetition_penalty"),
    "a presence penalty of three": (lambda e: started(e, presence_penalty=3.0), PARAM, "presence_penalty"),
    "a seed of 65 bits": (lambda e: started(e, seed=2**64), PARAM, "seed"),
    "do_sample of text": (lambda e: started(e, do_sample="yes"), PARAM, "do_sample"),
    "a negative ngram size": (lambda e: started(e, no_repeat_ngram_size=-2), PARAM, "no_repeat_ngram_size"),
    "a max_length within the prompt": (lambda e: started(e, max_length=3), LIMIT, "3 tokens"),
    "a max_length above the engine's": (lambda e: started(e, max_length=513), LIMIT, "513"),
    "a max_length of text": (lambda e: started(e, max_length="512"), PARAM, "max_length"),
    "a min_length above the output": (lambda e: started(e, max_length=5, min_length=4), PARAM, "min_tokens"),
    "an end beyond the vocabulary": (
        lambda e: started(e, eos_token_id=2**31, early_stopping=True),
        PARAM,
        "stop_token_ids has",
    ),
    "stop words of one level": (lambda e: started(e, stop_words_ids=[1, 2]), PARAM, "list of lists"),
    "an empty stop word": (lambda e: started(e, stop_words_ids=[[]]), PARAM, "list of lists"),
    "too many log probabilities": (lambda e: started(e, logprobs=True, top_logprobs=21), PARAM, "logprobs"),
    "a response format": (lambda e: started(e, response_format={"type": "yaml"}), PARAM, "response_format"),
    "an adapter": (lambda e: started(e, lora_name="x"), AsStatus.ALLSPARK_LORA_NOT_FOUND, "'x'"),
    "a uuid of a number": (lambda e: started(e, uuid=5), PARAM, "uuid"),
    "media that are none": (lambda e: started(e, mm_info=[IDS]), PARAM, "MultiMediaInfo"),
    "a text without a loader": (lambda e: e.start_request_text(NAME, None, "a", GREEDY)[0], PARAM, "HuggingFaceModel"),  # type: ignore[arg-type]
    "a model that is not there": (lambda e: e.start_request_ids("no", None, [1], GREEDY)[0], PARAM, "no model 'no'"),
    "a model without a name": (lambda e: e.start_request_ids(None, None, [1], GREEDY)[0], PARAM, "no model None"),  # type: ignore[arg-type]
}
WRONG_CALLS: dict[str, tuple[Callable[[Engine], AsStatus], AsStatus, str]] = {
    "release twice": (lambda e: e.release_request(NAME, released(e)), ILLEGAL, "released"),
    "stop after release": (lambda e: e.stop_request(NAME, released(e)), ILLEGAL, "released"),
    "sync after release": (lambda e: e.sync_request(NAME, released(e)), ILLEGAL, "released"),
    "a handle that is none": (lambda e: e.release_request(NAME, 5), ILLEGAL, "5"),  # type: ignore[arg-type]
    "a handle that cannot be hashed": (lambda e: e.stop_request(NAME, []), ILLEGAL, "[]"),  # type: ignore[arg-type]
    "a made-up handle": (lambda e: e.stop_request(NAME, RequestHandle("0-allspark")), ILLEGAL, "0-allspark"),
    "a handle of another engine": (lambda e: Engine().stop_request(NAME, ended(e)), PARAM, "no model"),
    "start twice": (lambda e: e.start_model(NAME), CALL, "runs already"),
    "start an unknown model": (lambda e: e.start_model("no"), PARAM, "no model"),
    "stop an unknown model": (lambda e: e.stop_model("no"), PARAM, "no model"),
    "release a running model": (lambda e: e.release_model(NAME), CALL, "stop it first"),
    "load an adapter": (lambda e: e.load_lora(NAME, "x"), AsStatus.ALLSPARK_LORA_NOT_FOUND, "'x'"),
    "unload an adapter": (lambda e: e.unload_lora(NAME, "x"), AsStatus.ALLSPARK_LORA_NOT_FOUND, "'x'"),
    "load an adapter of no model": (lambda e: e.load_lora("no", "x"), PARAM, "no model"),
    "install no config": (lambda e: e.install_model({"model_name": "x"}), PARAM, "AsModelRuntimeConfigBuilder"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("use", [*WRONG_REQUESTS, *WRONG_CALLS])
def test_a_wrong_use_has_a_status_and_a_reason_and_harms_nobody(use: str, engine: Engine) -> None:
    call, expected, reason = (WRONG_REQUESTS | WRONG_CALLS)[use]
    status = call(engine)
    assert status == expected
    assert reason in status.message
    assert usable(engine)


@pytest.mark.parametrize(
    ("changes", "expected", "reason"),
    [
        ({"model_name": NAME}, CALL, "is installed"),
        ({"model_name": ""}, PARAM, "model_name is empty"),
        ({"model_name": 5}, PARAM, "model_name is 5"),
        ({"model_path": ""}, PARAM, "names no model"),
        ({"model_path": "/no/such.asgraph"}, AsStatus.ALLSPARK_IO_ERROR, "/no/such.asgraph"),
        ({"model_path": __file__}, PARAM, "serialize"),
        ({"model_path": str(Path(__file__).parent)}, AsStatus.ALLSPARK_IO_ERROR, "config.json"),
        ({"compute_unit": "TPU:0"}, PARAM, "TPU:0"),
        ({"compute_unit": "CPU"}, PARAM, "compute_unit"),
        ({"compute_unit": "CUDA:1"}, PARAM, "CUDA_VISIBLE_DEVICES"),
        ({"compute_unit": "CUDA:0,1"}, PARAM, "torch sees no CUDA device"),
        ({"engine_max_length": -1}, PARAM, "engine_max_length"),
        ({"engine_max_length": "512"}, PARAM, "engine_max_length"),
        ({"engine_max_length": 10**9}, PARAM, "max-model-len"),
        ({"engine_max_batch": 1.5}, PARAM, "engine_max_batch"),
        ({"cache_span_size": 17}, PARAM, "kv_cache_span_size"),
        ({"prefix_cache_ttl": 0}, PARAM, "prefix_cache_ttl"),
        ({"enable_prefix_cache": "yes"}, PARAM, "enable_prefix_cache"),
        ({"cache_mode": allspark.AsCacheMode.AsCacheQuantU4}, PARAM, "AsCacheQuantU4"),
        ({"cache_mode": "AsCacheDefault"}, PARAM, "cache_mode"),
    ],
)
def test_a_model_that_cannot_be_installed_says_why(
    changes: dict[str, Any], expected: AsStatus, reason: str, engine: Engine, folder: Path
) -> None:
    status = engine.install_model(config(folder, **({"model_name": "other"} | changes)))
    assert status == expected
    assert reason in status.message
    assert usable(engine)


def test_a_card_that_is_not_there_is_named(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    status = Engine().install_model(config(folder, compute_unit="CUDA:0"))
    assert status == PARAM
    assert "CUDA" in status.message


def test_a_model_refuses_what_its_state_does_not_allow(folder: Path) -> None:
    engine = Engine()
    assert engine.install_model(config(folder)) == OK
    assert engine.stop_model(NAME) == CALL
    assert started(engine) == AsStatus.ALLSPARK_REQUEST_DENIED
    assert engine.sync_request(NAME, None) == OK
    assert engine.start_model(NAME) == OK
    assert engine.stop_model(NAME) == OK
    assert engine.stop_model(NAME) == CALL
    assert engine.release_model(NAME) == OK
    for call in (engine.start_model, engine.stop_model, engine.release_model):
        assert call(NAME) == PARAM
    assert started(engine) == PARAM


def test_a_released_queue_still_gives_its_tokens_and_never_waits(engine: Engine) -> None:
    _, handle, queue = engine.start_request_ids(NAME, None, [1, 2, 3], GREEDY)
    assert queue is not None
    assert handle is not None
    assert queue.Get() is not None
    assert engine.release_request(NAME, handle) == OK
    while queue.Get() is not None:  # up to the interruption
        pass
    assert queue.GenerateStatus() == allspark.GenerateRequestStatus.GenerateInterrupted
    assert queue.Get() is None


def test_stopping_twice_and_stopping_what_has_ended_is_no_mistake(engine: Engine) -> None:
    _, handle, queue = engine.start_request_ids(NAME, None, [1, 2, 3], GREEDY)
    assert handle is not None
    assert queue is not None
    assert engine.stop_request(NAME, handle) == engine.stop_request(NAME, handle) == OK
    assert engine.sync_request(NAME, handle) == OK
    assert engine.stop_request(NAME, handle) == OK
    assert engine.release_request(NAME, handle) == OK


def test_a_model_can_be_stopped_while_others_start_and_wait(folder: Path) -> None:
    engine = Engine()
    assert engine.install_model(config(folder)) == OK
    assert engine.start_model(NAME) == OK
    statuses: list[AsStatus] = []
    running = threading.Barrier(5)

    def use() -> None:
        first = True
        while True:
            status, handle, queue = engine.start_request_ids(NAME, None, [1, 2, 3], GREEDY)
            statuses.append(status)
            if queue is None:
                return
            queue.Get()
            if first:
                running.wait()
                first = False
            statuses.append(engine.sync_request(NAME, handle))

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    running.wait()
    assert engine.stop_model(NAME) == OK
    for thread in threads:
        thread.join()
    assert set(statuses) == {OK, AsStatus.ALLSPARK_REQUEST_DENIED}
    assert engine.release_model(NAME) == OK


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: allspark.HuggingFaceModel(str(folder), "m", user_set_data_type="int3"), "int3"),
        (lambda folder: allspark.HuggingFaceModel("/no/such/folder", "m").load_model(), "no such folder"),
        (lambda folder: allspark.HuggingFaceModel(str(folder), "m").serialize(None, "x"), "load_model"),
        (lambda folder: allspark.HuggingFaceModel(str(folder), "m").load_model().serialize(None), "model_output_dir"),
        (
            lambda folder: (
                allspark.HuggingFaceModel(str(folder), "m")
                .load_model()
                .create_reference_runtime_config_builder("m", "CPU", [0], 1)
            ),
            "serialize",
        ),
        (
            lambda folder: (
                allspark.HuggingFaceModel(str(folder), "m")
                .load_model()
                .serialize(None, str(folder), enable_quant=True, customized_quant_config={"quant_method": "magic"})
            ),
            "magic",
        ),
    ],
)
def test_a_loader_that_cannot_go_on_raises(make: Callable[[Path], object], reason: str, folder: Path) -> None:
    with pytest.raises(allspark.ModelSerializerException, match=reason):
        make(folder)

"""What one request asks for ends that request alone: the streams beside it go on as if it were not there."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine.engine import Engine
from dashinfer_vlm.errors import InvalidRequestError
from dashinfer_vlm.request import Output, Request, SamplingParams
from tests.engine.scripted_model import VOCAB, ScriptedModel, expected
from tests.engine.test_engine import greedy, make_engine, reason, run, tokens
from tests.engine.test_speculation import NGRAM
from tests.searching import searched

NEIGHBOUR = Request(id="neighbour", prompt_ids=[5, 6, 7], params=greedy(120))


@pytest.mark.parametrize(
    ("params", "most_tokens"),
    [
        (SamplingParams(min_tokens=5, max_tokens=9, stop_token_ids=tuple(range(VOCAB))), 0),
        (SamplingParams(max_tokens=150, no_repeat_ngram_size=1, temperature=0, ignore_eos=True), VOCAB - 2),
    ],
    ids=["every stop forbidden", "no token may come twice"],
)
def test_a_request_that_forbids_everything_fails_alone(params: SamplingParams, most_tokens: int) -> None:
    outputs = run(make_engine(), NEIGHBOUR, Request(id="stuck", prompt_ids=[1, 2], params=params))
    assert reason(outputs["stuck"]) == "error"
    assert (finish := outputs["stuck"][-1].finish) is not None
    assert finish.impossible
    assert len(tokens(outputs["stuck"])) == most_tokens
    assert tokens(outputs["neighbour"]) == expected([5, 6, 7], 120)


IDS = st.integers(-1, VOCAB)
NUMBERS: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": st.none() | st.integers(0, 30) | st.integers(),
    "min_tokens": st.integers(0, 30) | st.integers(),
    "temperature": st.floats(0, 3) | st.floats(),
    "top_k": st.integers(0, VOCAB + 5) | st.integers(),
    "top_p": st.floats(0, 1) | st.floats(),
    "min_p": st.floats(0, 1) | st.floats(),
    "repetition_penalty": st.floats(1e-3, 100) | st.floats(),
    "presence_penalty": st.floats(-2, 2) | st.floats(),
    "frequency_penalty": st.floats(-2, 2) | st.floats(),
    "no_repeat_ngram_size": st.integers(0, 4) | st.integers(),
    "logit_bias": st.dictionaries(IDS, st.floats(-100, 100) | st.floats(), max_size=5),
    "seed": st.none() | st.integers(),
    "stop_token_ids": st.lists(IDS, max_size=5).map(tuple),
    "stop_sequences": st.lists(st.lists(IDS, max_size=3).map(tuple), max_size=3).map(tuple),
    "ignore_eos": st.booleans(),
    "logprobs": st.none() | st.integers(0, 20) | st.integers(),
}
ANY_PARAMS = st.fixed_dictionaries({}, optional=NUMBERS)


@pytest.mark.parametrize("guesses", [False, True])
@searched(150)
@given(asked=st.lists(ANY_PARAMS, min_size=1, max_size=4))
def test_no_numbers_of_one_request_fail_a_step_of_another(guesses: bool, asked: list[dict[str, Any]]) -> None:
    model = ScriptedModel()
    config = EngineConfig(max_model_len=60, speculative_config=NGRAM if guesses else None)
    engine = Engine(model, model.kv(200), config)
    neighbour = Request(id="neighbour", prompt_ids=[5, 6, 7], params=greedy(40))
    outputs: dict[str, list[Output]] = {"neighbour": []}
    engine.add(neighbour)
    for index, fields in enumerate(asked):
        request = Request(id=f"r{index}", prompt_ids=[1, 2, 1, 2], params=SamplingParams(**fields))
        try:
            engine.add(request)
        except InvalidRequestError:
            continue
        outputs[request.id] = []
    while engine.has_work():
        for output in engine.step():
            outputs[output.request_id].append(output)
    assert tokens(outputs["neighbour"]) == expected([5, 6, 7], 40)
    assert all([o.finish is not None for o in news].count(True) == 1 for news in outputs.values())


@pytest.mark.parametrize(
    ("params", "told"),
    [
        (SamplingParams(logit_bias=dict.fromkeys(range(2000), 1.0)), "logit_bias has 2000 tokens; the limit is 1024"),
        (SamplingParams(stop_token_ids=(1,) * 10_000), "stop_token_ids has 10000 tokens; the limit is 1024"),
        (SamplingParams(stop_sequences=((1,),) * 65), "stop_sequences has 65 sequences; the limit is 64"),
        (SamplingParams(stop_sequences=((1,) * 1025,)), "stop_sequences has 1025 tokens in one of them"),
        (SamplingParams(seed=2**63), "seed is 9223372036854775808; it must fit 64 bits"),
        (SamplingParams(top_k=2**64), "top_k is 18446744073709551616"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_cost_without_bound_is_refused_with_its_limit(params: SamplingParams, told: str) -> None:
    with pytest.raises(InvalidRequestError, match=told):
        params.validate(vocab_size=5000)

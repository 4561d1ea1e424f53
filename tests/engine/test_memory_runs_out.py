"""A device without memory costs a request, never the engine: the others go on as if nothing had been."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch

from dashinfer_vlm.engine import engine as engine_module
from dashinfer_vlm.engine.cards.sampling import CardSampler, Wanted, waits_for_tokens
from dashinfer_vlm.engine.cards.seats import Seat
from dashinfer_vlm.engine.devices import make_runner
from dashinfer_vlm.engine.engine import Engine
from dashinfer_vlm.layers.card_sampling import SeenCounts
from dashinfer_vlm.models.base import KVCache, StepBatch
from dashinfer_vlm.request import Output, Request, SamplingParams
from tests.engine.card_runner import make_card_runner
from tests.engine.scripted_model import ScriptedEncoder, ScriptedModel, ScriptedState, expected
from tests.engine.test_engine import greedy, make_engine, reason, run, tokens, with_image

NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")


class NarrowModel(ScriptedModel):
    most_rows = 1 << 30

    def forward(self, batch: StepBatch, kv: KVCache) -> torch.Tensor:
        if len(batch.ids) > self.most_rows:
            raise NO_MEMORY
        return super().forward(batch, kv)


@pytest.fixture(params=[make_runner, make_card_runner], ids=["processor", "card"], autouse=True)
def each_runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "make_runner", request.param)


@pytest.fixture
def card(request: pytest.FixtureRequest) -> None:
    if "card" not in request.node.callspec.id:
        pytest.skip("a processor chooses and counts within the step")


on_card = pytest.mark.usefixtures("card")


def narrow_engine(most_rows: int) -> Engine:
    model = NarrowModel()
    engine = make_engine(model=model)
    model.most_rows = most_rows  # graphs are captured by now
    return engine


def test_the_prompt_that_a_step_has_no_memory_for_ends_and_the_streams_go_on() -> None:
    short = Request(id="short", prompt_ids=[5, 6, 7], params=greedy(30))
    long = Request(id="long", prompt_ids=list(range(1, 60)), params=greedy(5))
    outputs = run(narrow_engine(12), short, long)
    assert tokens(outputs["short"]) == expected([5, 6, 7], 30)
    assert reason(outputs["long"]) == "error"
    finish = outputs["long"][-1].finish
    assert finish is not None
    assert "no memory left for this request" in str(finish.message)


def test_of_equal_ones_the_newest_ends() -> None:
    requests = [Request(id=name, prompt_ids=[i + 1, 2], params=greedy(9)) for i, name in enumerate("abc")]
    outputs = run(narrow_engine(4), *requests)
    assert tokens(outputs["a"]) == expected([1, 2], 9)
    assert tokens(outputs["b"]) == expected([2, 2], 9)
    assert reason(outputs["c"]) == "error"


def test_penalties_do_not_count_what_was_not_chosen() -> None:
    """The step that failed is computed again."""
    penalised = Request(id="a", prompt_ids=[5, 6, 7], params=greedy(20, frequency_penalty=1.9, repetition_penalty=1.1))
    long = Request(id="long", prompt_ids=list(range(1, 60)), params=greedy(5))
    alone = run(narrow_engine(12), penalised)["a"]
    assert tokens(run(narrow_engine(12), penalised, long)["a"]) == tokens(alone)


def test_a_prefix_that_somebody_computes_before_the_step_is_planned_again_is_read_where_it_lies() -> None:
    engine = narrow_engine(12)
    outputs: dict[str, list[Output]] = {"a": [], "long": [], "first": []}

    def step() -> None:
        for output in engine.step():
            outputs[output.request_id].append(output)

    engine.add(Request(id="a", prompt_ids=[5, 6, 7, 8, 9, 3], params=greedy(9)))
    engine.add(Request(id="long", prompt_ids=list(range(1, 60)), params=greedy(5)))
    step()
    assert reason(outputs["long"]) == "error", "the step of both has failed"
    engine.add(Request(id="first", prompt_ids=[5, 6, 7, 8, 9, 3], params=greedy(9), priority=-1))
    while engine.has_work():
        step()
    assert outputs["a"][-1].num_cached_tokens == 4
    assert tokens(outputs["a"]) == tokens(outputs["first"]) == expected([5, 6, 7, 8, 9, 3], 9)


@on_card
def test_penalties_count_the_prompt_of_whom_the_first_step_had_no_memory_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = SamplingParams(seed=1, max_tokens=1, repetition_penalty=100)
    penalised = Request(id="a", prompt_ids=[5, 20, 20], params=params)  # would be followed by another 5
    other = Request(id="other", prompt_ids=[8, 9, 10, 11], params=greedy(20))
    alone = run(make_engine(), penalised)["a"]
    assert tokens(alone) != [5]
    take_seat, left = CardSampler.take_seat, [NO_MEMORY]

    def narrow(sampler: CardSampler, seat: Seat) -> None:
        if left and seat.sequence.id == "a":
            raise left.pop()
        take_seat(sampler, seat)

    monkeypatch.setattr(CardSampler, "take_seat", narrow)
    outputs = run(make_engine(), penalised, other)
    assert reason(outputs["other"]) == "error", "it asked for more"
    assert tokens(outputs["a"]) == tokens(alone)


@on_card
def test_a_step_whose_tokens_could_not_be_counted_is_computed_again_behind_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests = [Request(id=n, prompt_ids=[5, 6, 7], params=greedy(12, repetition_penalty=1.1)) for n in ("a", "other")]
    add, calls = SeenCounts.add, count()

    def narrow(seen: SeenCounts, chosen: torch.Tensor) -> None:
        if next(calls) == 5:
            raise NO_MEMORY
        add(seen, chosen)

    monkeypatch.setattr(SeenCounts, "add", narrow)
    outputs = run(make_engine(), *requests)
    assert reason(outputs["other"]) == "error"
    assert tokens(outputs["a"]) == expected([5, 6, 7], 12)


def test_an_engine_serves_on_after_it() -> None:
    engine = narrow_engine(12)
    for number in range(4):
        long = Request(id=f"long {number}", prompt_ids=list(range(1, 60)), params=greedy(5))
        assert reason(run(engine, long)[long.id]) == "error"
    assert tokens(run(engine, Request(id="a", prompt_ids=[5, 6], params=greedy(5)))["a"]) == expected([5, 6], 5)


class NarrowEncoder(ScriptedEncoder):
    def run(self, state: ScriptedState, num_slices: int) -> None:
        if any(int(patches[0, 0]) == 7 for patches in state.patches):
            raise NO_MEMORY
        super().run(state, num_slices)


def test_a_picture_that_a_slice_has_no_memory_for_ends_its_own_request() -> None:
    model = ScriptedModel()
    model.encoder = NarrowEncoder()
    good, values = with_image("good", 3)
    bad, _ = with_image("bad", 7)
    outputs = run(make_engine(model=model), bad, good)
    assert reason(outputs["bad"]) == "error"
    assert tokens(outputs["good"]) == expected(values, 6)


def failing_once(choose: Callable[[CardSampler, Wanted], Any]) -> Callable[[CardSampler, Wanted], Any]:
    """The first choice that has waited for older tokens finds no memory."""
    left = [NO_MEMORY]

    def narrow(sampler: CardSampler, wanted: Wanted) -> Any:
        if left and any(waits_for_tokens(chunk) and chunk.sequence.num_output > 3 for chunk in wanted.chunks):
            raise left.pop()
        return choose(sampler, wanted)

    return narrow


@on_card
def test_a_choice_without_memory_ends_those_who_wait_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(CardSampler, "choose", failing_once(CardSampler.choose))
    engine = make_engine()
    waiting = Request(id="waiting", prompt_ids=[1, 2], params=greedy(20, no_repeat_ngram_size=3))
    outputs = run(engine, waiting)
    assert reason(outputs["waiting"]) == "error"
    assert len(tokens(outputs["waiting"])) >= 3
    assert tokens(run(engine, Request(id="a", prompt_ids=[5, 6], params=greedy(5)))["a"]) == expected([5, 6], 5)


@on_card
def test_a_choice_without_memory_ends_those_whose_prompts_it_was_to_tell_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(CardSampler, "choose", failing_once(CardSampler.choose))
    waiting = Request(id="waiting", prompt_ids=[1, 2], params=greedy(20, no_repeat_ngram_size=3))
    scored = Request(id="scored", prompt_ids=list(range(1, 90)), params=greedy(5, prompt_logprobs=0))
    outputs = run(make_engine(), waiting, scored)
    assert reason(outputs["waiting"]) == "error"
    assert reason(outputs["scored"]) == "error"

"""An engine with a step under way says what one without says, whatever happens meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine import engine as engine_module
from dashinfer_vlm.engine.cost import StepCost
from dashinfer_vlm.engine.devices import make_runner
from dashinfer_vlm.engine.engine import Engine
from dashinfer_vlm.request import Output, Request, SamplingParams
from tests.engine.late_runner import LateRunner, make_late_runner
from tests.engine.scripted_model import EOS, VOCAB, ScriptedModel, expected
from tests.engine.test_engine import greedy, image, reason, tokens
from tests.engine.test_speculation import NGRAM, EchoingModel
from tests.searching import searched


@dataclass
class Life:
    """One engine, and all that it has said."""

    engine: Engine
    outputs: dict[str, list[Output]] = field(default_factory=dict)

    def add(self, request: Request) -> None:
        self.engine.add(request)
        self.outputs[request.id] = []

    def step(self) -> None:
        for output in self.engine.step():
            assert not any(o.finish for o in self.outputs[output.request_id]), "news after the end"
            self.outputs[output.request_id].append(output)
        self.engine.scheduler.check_integrity()

    def finish(self) -> None:
        while self.engine.has_work():
            self.step()
        assert self.engine.stats().num_free_blocks == self.engine.stats().num_blocks
        assert all(news[-1].finish for news in self.outputs.values())


def life(depth: int, num_blocks: int = 64, model: ScriptedModel | None = None, **options: Any) -> Life:
    model = model or ScriptedModel()
    config = EngineConfig(**{"max_model_len": min(200, num_blocks * 4), "max_num_batched_tokens": 16, **options})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "make_runner", make_late_runner if depth else make_runner)
        engine = Engine(model, model.kv(num_blocks), config)
    assert engine.runner.depth == depth
    engine.scheduler.cost = StepCost(fixed_s=0.1, token_s=0.001, rate=0)
    return Life(engine)


def late(engine: Engine) -> LateRunner:
    assert isinstance(engine.runner, LateRunner)
    return engine.runner


def test_tokens_of_a_step_come_with_the_next_one() -> None:
    alone = life(depth=1)
    alone.add(Request(id="a", prompt_ids=[5, 6, 7], params=greedy(3)))
    told = []
    while alone.engine.has_work():
        alone.step()
        told.append(len(tokens(alone.outputs["a"])))
    assert told == [0, 1, 2, 3]
    assert tokens(alone.outputs["a"]) == expected([5, 6, 7], 3)
    assert alone.engine.stats().num_steps_total == 3


def test_a_stop_that_nobody_foresaw_costs_one_row_and_no_more() -> None:
    said = expected([5, 6, 7], 9)
    place = said.index(said[4])
    for depth, num_steps in ((0, place + 1), (1, place + 2)):
        one = life(depth)
        one.add(Request(id="a", prompt_ids=[5, 6, 7], params=greedy(9, stop_token_ids=(said[4],))))
        one.finish()
        assert tokens(one.outputs["a"]) == said[:place]
        assert one.engine.stats().num_steps_total == num_steps


def test_who_leaves_while_a_step_is_under_way_hears_nothing_of_it_and_frees_its_blocks() -> None:
    two = life(depth=1)
    for name in "ab":
        two.add(Request(id=name, prompt_ids=[5, 6, 7], params=greedy(20)))
    for _ in range(4):
        two.step()
    two.engine.abort("a")
    two.finish()
    assert reason(two.outputs["a"]) == "abort"
    assert tokens(two.outputs["a"]) == expected([5, 6, 7], len(tokens(two.outputs["a"])))
    assert tokens(two.outputs["b"]) == expected([5, 6, 7], 20)


def test_penalties_of_the_tokens_so_far_wait_for_them_and_others_do_not() -> None:
    waits, flies = SamplingParams(temperature=0, repetition_penalty=1.5, max_tokens=9), SamplingParams(max_tokens=9)
    for params, is_late in ((waits, False), (flies, True)):
        one = life(depth=1)
        one.add(Request(id="a", prompt_ids=[5, 6, 7], params=params))
        one.finish()
        assert late(one.engine).num_pending == (8 if is_late else 0)


def test_blocks_that_fill_late_are_found_by_the_next_turn() -> None:
    turns = life(depth=1)
    turns.add(Request(id="a", prompt_ids=[5, 6, 7], params=greedy(20)))
    turns.finish()
    again = [5, 6, 7, *tokens(turns.outputs["a"])]
    turns.add(Request(id="b", prompt_ids=[*again, 3], params=greedy(4)))
    turns.finish()
    assert tokens(turns.outputs["b"]) == expected([*again, 3], 4)
    assert turns.outputs["b"][-1].num_cached_tokens == 20


def test_a_step_that_fails_to_start_loses_nothing_that_older_steps_have_said() -> None:
    two = life(depth=1)
    two.add(Request(id="done", prompt_ids=[1, 2], params=greedy(2)))
    two.add(Request(id="goes on", prompt_ids=[3, 4], params=greedy(20, repetition_penalty=1.1)))
    two.step()
    two.step()

    def broken(*args: object) -> None:
        raise RuntimeError("scripted")

    two.engine.model.forward = broken  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeError, match="scripted"):
        two.step()  # takes the second token of both before it starts anything
    for output in two.engine.fail_all("the model call failed"):
        two.outputs[output.request_id].append(output)
    assert (reason(two.outputs["done"]), reason(two.outputs["goes on"])) == ("length", "error")
    assert tokens(two.outputs["done"]) == expected([1, 2], 2)
    assert not two.engine.has_work()
    two.engine.scheduler.check_integrity()


PARAMS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.5},
    {"temperature": 40},
    {"temperature": 40, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
    {"temperature": 0, "no_repeat_ngram_size": 3},
    {"temperature": 40, "stop_token_ids": tuple(range(0, VOCAB, 7)), "min_tokens": 4},
    {"temperature": 40, "stop_sequences": tuple((i,) for i in range(0, VOCAB, 3)), "min_tokens": 2},
    {"temperature": 2, "logit_bias": {EOS: 9.0}, "logprobs": 2},
    {"temperature": 0, "frequency_penalty": 2.0, "logprobs": 0},
]


@st.composite
def lives(draw: st.DrawFn, longest_prefix: int = 9) -> list[Request | int | str]:
    """What happens to an engine: a request, a number of steps, or the name of a request that is given up. Prompts begin
    with up to `longest_prefix` equal words."""
    told: list[Request | int | str] = []
    for index in range(draw(st.integers(1, 8))):
        num_prefix, has_image = draw(st.integers(1, longest_prefix)), draw(st.booleans())
        items = (image(num_prefix, 6, draw(st.integers(1, 2))),) if has_image else ()
        prompt = [*[9] * num_prefix, *[VOCAB] * 6 * has_image, *draw(st.lists(st.integers(1, 3), max_size=9)), 1]
        fields = {**draw(st.sampled_from(PARAMS)), "seed": index, "max_tokens": draw(st.integers(1, 24))}
        fields["min_tokens"] = min(fields.get("min_tokens", 0), fields["max_tokens"])
        params, wants_vector = SamplingParams(**fields), draw(st.integers(0, 4)) == 0
        told.append(Request(id=f"r{index}", prompt_ids=prompt, params=params, items=items, wants_vector=wants_vector))
        told.append(draw(st.integers(0, 6)))
        if draw(st.integers(0, 3)) == 0:
            told.append(f"r{draw(st.integers(0, index))}")
    return told


def lived(one: Life, told: list[Request | int | str]) -> Life:
    for what in told:
        if isinstance(what, Request):
            one.add(what)
        elif isinstance(what, str):
            one.engine.abort(what)
        else:
            for _ in range(what):
                one.step()
    one.finish()
    return one


@searched(150)
@given(told=lives(), num_blocks=st.integers(14, 40), guesses=st.booleans())
def test_random_lives_say_the_same_with_a_step_under_way(
    told: list[Request | int | str], num_blocks: int, guesses: bool
) -> None:
    options: dict[str, Any] = {"max_model_len": 56, "speculative_config": NGRAM if guesses else None}
    at_once = lived(life(0, num_blocks, EchoingModel(), **options), told)
    a_step_late = lived(life(1, num_blocks, EchoingModel(), **options), told)
    for name, news in at_once.outputs.items():
        other = a_step_late.outputs[name]
        if "abort" in (reason(news), reason(other)):
            shorter = min(len(tokens(news)), len(tokens(other)))
            assert tokens(news)[:shorter] == tokens(other)[:shorter]
        else:
            assert tokens(news) == tokens(other)
            assert (news[-1].finish, news[-1].vector) == (other[-1].finish, other[-1].vector)
            assert [p for o in news for p in o.logprobs] == [p for o in other for p in o.logprobs]
    event(f"preempted: {at_once.engine.stats().num_preemptions_total > 0}")
    event(f"late tokens: {late(a_step_late.engine).num_pending > 0}")

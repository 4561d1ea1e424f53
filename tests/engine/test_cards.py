"""The runner for cards says what the one for processors says: seats, padding, graphs and late tokens change nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine import engine as engine_module
from dashinfer_vlm.engine.cards.calls import ModelCalls
from dashinfer_vlm.engine.cards.graphs import Shapes
from dashinfer_vlm.engine.cards.sampling import CardSampler
from dashinfer_vlm.engine.cards.staging import Shape
from dashinfer_vlm.engine.cost import StepCost
from dashinfer_vlm.engine.devices import make_runner
from dashinfer_vlm.engine.engine import Engine
from dashinfer_vlm.engine.grammars.compiler import Compiler
from dashinfer_vlm.layers.card_sampling import SeenCounts
from dashinfer_vlm.request import Grammar, Output, Request, SamplingParams
from tests.engine.card_runner import PoisonedCardRunner, make_card_runner, with_spare_block
from tests.engine.scripted_model import ScriptedModel, expected
from tests.engine.test_engine import (
    greedy,
    make_engine,
    reason,
    run,
    test_a_prefix_hit_that_ends_inside_an_image_writes_only_the_remaining_rows,
    test_a_ready_made_embedding_needs_no_encoder,
    test_a_seed_makes_sampling_repeatable_in_any_company,
    test_an_image_overwrites_its_placeholders,
    test_ignore_eos_and_min_tokens_keep_it_going,
    test_random_lives_leak_nothing_and_answer_right,
    test_stop_ids_and_stop_sequences_end_the_output,
    test_too_few_blocks_preempt_the_youngest_and_change_no_answer,
    tokens,
)
from tests.engine.test_grammars import Run, vocabulary
from tests.engine.test_isolation import test_a_request_that_forbids_everything_fails_alone
from tests.engine.test_late_steps import Life, life, lived, lives
from tests.engine.test_speculation import NGRAM, EchoingModel
from tests.searching import searched

__all__ = [
    "test_a_prefix_hit_that_ends_inside_an_image_writes_only_the_remaining_rows",
    "test_a_ready_made_embedding_needs_no_encoder",
    "test_a_request_that_forbids_everything_fails_alone",
    "test_a_seed_makes_sampling_repeatable_in_any_company",
    "test_an_image_overwrites_its_placeholders",
    "test_ignore_eos_and_min_tokens_keep_it_going",
    "test_random_lives_leak_nothing_and_answer_right",
    "test_stop_ids_and_stop_sequences_end_the_output",
    "test_too_few_blocks_preempt_the_youngest_and_change_no_answer",
]
"""What holds of an engine with any runner holds here too."""

WAYS = {
    "graphs, one ahead": make_card_runner,
    "one ahead": partial(make_card_runner, with_graphs=False),
    "at once": partial(make_card_runner, with_graphs=False, depth=0),
}


@pytest.fixture(autouse=True)
def runner_for_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "make_runner", make_card_runner)


def card(engine: Engine) -> PoisonedCardRunner:
    assert isinstance(engine.runner, PoisonedCardRunner)
    return engine.runner


def card_life(
    num_blocks: int = 64, model: ScriptedModel | None = None, way: str = "graphs, one ahead", **options: Any
) -> Life:
    """As `life`, over the runner for cards."""
    model = model or ScriptedModel()
    config = EngineConfig(**{"max_model_len": min(200, num_blocks * 4), "max_num_batched_tokens": 16, **options})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "make_runner", WAYS[way])
        engine = Engine(model, model.kv(num_blocks), config)
    engine.scheduler.cost = StepCost(fixed_s=0.1, token_s=0.001, rate=0)
    return Life(engine)


def assert_same_logprobs(news: list[Output], other: list[Output]) -> None:
    """But for the last digits."""
    for ours, theirs in zip(*([p for o in x for p in o.logprobs] for x in (news, other)), strict=True):
        assert (ours.token_id, ours.rank, [i for i, _ in ours.top]) == (
            theirs.token_id,
            theirs.rank,
            [i for i, _ in theirs.top],
        )
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-6)
        assert [value for _, value in ours.top] == pytest.approx([value for _, value in theirs.top], abs=1e-6)


@pytest.mark.parametrize("way", WAYS)
@searched(15)
@given(told=lives(), num_blocks=st.integers(14, 40), guesses=st.booleans(), max_num_seqs=st.sampled_from([2, 3, 128]))
def test_random_lives_say_the_same_on_a_card(
    way: str, told: list[Request | int | str], num_blocks: int, guesses: bool, max_num_seqs: int
) -> None:
    options: dict[str, Any] = {
        "max_model_len": 56,
        "speculative_config": NGRAM if guesses else None,
        "max_num_seqs": max_num_seqs,
    }
    on_processor = lived(life(0, num_blocks, EchoingModel(), **options), told)
    on_card = lived(card_life(num_blocks, EchoingModel(), way, **options), told)
    for name, news in on_processor.outputs.items():
        other = on_card.outputs[name]
        if "abort" in (reason(news), reason(other)):
            shorter = min(len(tokens(news)), len(tokens(other)))
            assert tokens(news)[:shorter] == tokens(other)[:shorter]
        else:
            assert tokens(news) == tokens(other)
            assert (news[-1].finish, news[-1].vector) == (other[-1].finish, other[-1].vector)
            assert_same_logprobs(news, other)
    event(f"preempted: {on_processor.engine.stats().num_preemptions_total > 0}")
    event(f"late tokens: {card(on_card.engine).num_pending > 0}")


ALLOCATING = (
    (CardSampler, "take_seat"),
    (CardSampler, "choose"),
    (CardSampler, "score"),
    (SeenCounts, "add"),
    (ModelCalls, "put_items"),
    (ModelCalls, "make"),
)
"""What takes memory of a card in a step."""


@contextmanager
def out_of_memory(chance: float, seed: int) -> Iterator[None]:
    """Now and then a step finds no memory."""
    luck = random.Random(seed)

    def narrow(call: Callable[..., Any]) -> Callable[..., Any]:
        def tried(*args: Any) -> Any:
            if luck.random() < chance:
                raise torch.OutOfMemoryError
            return call(*args)

        return tried

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ALLOCATING:
            patch.setattr(owner, name, narrow(getattr(owner, name)))
        yield


@searched(25)
@given(told=lives(), num_blocks=st.integers(14, 40), guesses=st.booleans(), chance=st.sampled_from([0.02, 0.2]))
def test_random_lives_on_a_card_without_memory_say_the_same_up_to_their_errors(
    told: list[Request | int | str], num_blocks: int, guesses: bool, chance: float
) -> None:
    told = [each for each in told if not isinstance(each, str)]
    options: dict[str, Any] = {"max_model_len": 56, "speculative_config": NGRAM if guesses else None}
    undisturbed = lived(life(0, num_blocks, EchoingModel(), **options), told)
    with out_of_memory(chance, num_blocks):
        one = lived(card_life(num_blocks, EchoingModel(), **options), told)
    assert_same_up_to_errors(undisturbed, one)


def assert_same_up_to_errors(undisturbed: Life, one: Life) -> None:
    for name, news in undisturbed.outputs.items():
        other = one.outputs[name]
        if reason(other) == "error":
            assert tokens(news)[: len(tokens(other))] == tokens(other)
        else:
            assert tokens(news) == tokens(other)
            assert (news[-1].finish, news[-1].vector) == (other[-1].finish, other[-1].vector)
    event(f"errors: {any(reason(news) == 'error' for news in one.outputs.values())}")


def test_seats_are_given_to_the_next_ones() -> None:
    requests = {f"r{i}": [i + 1, 2, 3] for i in range(9)}
    params = greedy(7, repetition_penalty=1.3)
    engine = make_engine(max_num_seqs=2)
    outputs = run(engine, *(Request(id=name, prompt_ids=ids, params=params) for name, ids in requests.items()))
    for name, ids in requests.items():
        alone = run(make_engine(), Request(id=name, prompt_ids=ids, params=params))[name]
        assert tokens(outputs[name]) == tokens(alone)


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 40, "top_k": 20}, {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 3}, {"min_tokens": 5},
     {"logit_bias": {7: 2.0}, "logprobs": 2}],
    ids=str,
)  # fmt: skip
def test_no_parameter_makes_a_step_wait_for_the_one_before(params: dict[str, Any]) -> None:
    one = card_life()
    one.add(
        Request(id="a", prompt_ids=[5, 6, 7], params=SamplingParams(**{"temperature": 0, "max_tokens": 9, **params}))
    )
    one.finish()
    assert len(tokens(one.outputs["a"])) == 9
    assert card(one.engine).num_pending == 8


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    compiler = Compiler(vocabulary, 101, (100,))
    yield compiler
    compiler.close()


def test_steps_of_a_grammar_are_computed_before_its_tokens_are_known(compiler: Compiler) -> None:
    said: list[Any] = []
    for make in (make_runner, make_card_runner):
        run_ = Run(compiler)
        kv = with_spare_block(run_.engine.runner.kv) if make is make_card_runner else run_.engine.runner.kv
        run_.engine.runner = make(run_.model, kv, run_.engine.stage.cache, run_.engine.config)
        for pattern in (r"[a-c]{2,4}-\d{3}", r"x{30}", r"(ab|cd)*\."):
            run_.add(Grammar("regex", pattern))
        run_.add(None, max_tokens=30, temperature=0.0)
        said.append({id: (tokens, last.finish) for id, (tokens, last) in run_.finish().items()})
    assert said[0] == said[1]
    assert card(run_.engine).num_pending > 30


def test_a_step_that_fits_no_shape_has_its_own() -> None:
    shapes = Shapes(max_sequences=6, max_rows=100, decode_sizes=(1, 2, 4, 8), mixed_sizes=(16, 32))
    assert shapes.of(3, 3, 3, has_items=False) == Shape(4, 4, 4, has_items=False)
    assert shapes.of(5, 5, 5, has_items=False) == Shape(6, 6, 6, has_items=False)
    assert shapes.of(3, 3, 3, has_items=True) == Shape(16, 6, 6, has_items=True)
    assert shapes.of(20, 6, 2, has_items=False) == Shape(32, 6, 6, has_items=True)
    assert shapes.of(12, 2, 12, has_items=False) == Shape(12, 2, 12, has_items=True), "guesses: more logits than seats"
    assert shapes.of(40, 40, 1, has_items=True).num_sequences != 40, "no decode"
    assert all(shape.num_sequences != shape.num_rows for shape in shapes.mixed)


def test_a_failed_row_ends_its_request_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    forward = engine.model.forward

    def broken(*args: Any) -> torch.Tensor:
        logits = forward(*args)
        logits[0] = torch.nan
        return logits

    prompts = {"a": [1, 2], "b": [3, 4]}
    for name, ids in prompts.items():
        engine.add(Request(id=name, prompt_ids=ids, params=greedy(9)))
    said = [output for _ in range(4) for output in engine.step()]
    monkeypatch.setattr(engine.model, "forward", broken)
    said += engine.step()
    monkeypatch.setattr(engine.model, "forward", forward)
    while engine.has_work():
        said += engine.step()
    by_name = {name: [o for o in said if o.request_id == name] for name in prompts}
    assert (reason(by_name["a"]), reason(by_name["b"])) == ("error", "length")
    assert tokens(by_name["b"]) == expected([3, 4], 9)

"""Speculative decoding: the same tokens as without it, in fewer steps."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine import states
from dashinfer_vlm.engine.cost import StepCost
from dashinfer_vlm.engine.engine import Engine
from dashinfer_vlm.models.base import KVCache, StepBatch
from dashinfer_vlm.request import Output, Request, SamplingParams
from tests.engine.scripted_model import EOS, VOCAB, ScriptedModel, one_hot
from tests.engine.stateful_model import StatefulModel
from tests.engine.test_engine import greedy, image, reason, run, tokens
from tests.searching import searched

PERIOD = 5
NGRAM: dict[str, str | int] = {"method": "ngram", "num_speculative_tokens": 4}
MTP: dict[str, str | int] = {"method": "mtp", "num_speculative_tokens": 3}


class EchoingModel(ScriptedModel):
    """Repeats what it read `PERIOD` tokens ago; at some places, which depend on the whole context, it does not."""

    speculation = NGRAM

    def answer(self, context: torch.Tensor) -> int:
        total = int(context.sum().item())
        echoed = int(context[-PERIOD].item()) // (len(context) - PERIOD + 1) if len(context) > PERIOD else total
        return (total if total % 7 == 0 else echoed) % EOS


class StatefulEcho(StatefulModel, EchoingModel):
    """The same with states, which no wrong guess may stay in."""

    def __init__(self, num_seats: int = 64) -> None:
        super().__init__(num_seats)


class GuessingEcho(StatefulEcho):
    """The same with a head that guesses what comes next, most of the time."""

    speculation = MTP

    def forward_with_states(
        self, batch: StepBatch, kv: KVCache, num_logits: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A state is the row's token, or 0 where an item's row is."""
        return *self.forward_with_vectors(batch, kv, num_logits), batch.ids

    def guess(self, batch: StepBatch, states: torch.Tensor, kv: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
        """What it guesses on with are the contexts, behind their lengths."""
        if states.dim() == 1:
            contexts, told = self._contexts(batch, states, kv), batch.ids[batch.logits_rows]
        else:
            contexts, told = [row[1 : int(row[0]) + 1] for row in states], batch.ids
            blocks = (batch.context_lens - 1) // kv.block_size
            assert torch.equal(batch.block_tables.gather(1, blocks[:, None].long())[:, 0], batch.slots // kv.block_size)
        grown = [torch.cat([c, (token * (len(c) + 1.0))[None]]) for c, token in zip(contexts, told, strict=True)]
        answers = [self.answer(context) for context in grown]
        guesses = [one_hot((answer + (answer % 5 == 0)) % EOS) for answer in answers]
        kept = torch.zeros(len(grown), 600, dtype=torch.float64)
        for row, context in zip(kept, grown, strict=True):
            row[0], row[1 : len(context) + 1] = len(context), context
        return torch.stack(guesses) if guesses else torch.empty(0, VOCAB), kept

    def _contexts(self, batch: StepBatch, states: torch.Tensor, kv: KVCache) -> list[torch.Tensor]:
        """Up to the wanted rows; each row has the token behind it."""
        starts, wanted, found = batch.query_starts.tolist(), batch.logits_rows.tolist(), []
        for s, (start, stop) in enumerate(pairwise(starts)):
            assert torch.equal(batch.ids[start : stop - 1], states[start + 1 : stop]) or stop - 1 not in wanted
            for row in [row for row in wanted if start <= row < stop]:
                length = int(batch.context_lens[s]) - (stop - 1 - row)
                found.append(kv.keys[0][batch.block_tables[s, : -(-length // kv.block_size)].long()].view(-1)[:length])
        return found


@pytest.fixture(params=[EchoingModel, StatefulEcho, GuessingEcho], autouse=True)
def model_class(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "Echo", request.param)
        patch.setattr(states, "MIN_SPARED", 8)
        patch.setattr(states, "PROMPT_TAIL", 2)
        yield


Echo: type[EchoingModel] = EchoingModel
"""Of the test that runs."""


def make_engine(guesses: bool, num_blocks: int = 64, **options: Any) -> Engine:
    """Rows cost little and never more than at first, so that guesses are always worth a try."""
    model = Echo()
    settings: dict[str, Any] = {
        "max_model_len": min(200, num_blocks * 4),
        "speculative_config": model.speculation if guesses else None,
        **options,
    }
    engine = Engine(model, model.kv(num_blocks), EngineConfig(**settings))
    engine.scheduler.cost = StepCost(fixed_s=0.1, token_s=0.001, rate=0)
    return engine


def both(*requests: Request, num_blocks: int = 64, **options: Any) -> tuple[Engine, dict[str, list[Output]]]:
    """The engine that guessed and what it said, which is what the one without guesses says, word for word."""
    plain = run(make_engine(False, num_blocks, **options), *requests)
    engine = make_engine(True, num_blocks, **options)
    guessed = run(engine, *requests)
    for name in plain:
        assert tokens(guessed[name]) == tokens(plain[name])
        assert guessed[name][-1].finish == plain[name][-1].finish
        assert [p for o in guessed[name] for p in o.logprobs] == [p for o in plain[name] for p in o.logprobs]
    return engine, guessed


def text(name: str = "a", **params: Any) -> Request:
    sampling = SamplingParams(**{"temperature": 0, "max_tokens": 60, **params})
    return Request(id=name, prompt_ids=[5, 6, 7, 8, 9, 1, 5, 6], params=sampling)


def picture(name: str, fill: int, params: SamplingParams) -> Request:
    return Request(
        id=name, prompt_ids=[1, 2, 3, *[VOCAB] * 6, 4, 5, 6, 1, 2, 3], params=params, items=(image(3, 6, fill),)
    )


def test_guesses_change_no_token_and_save_steps() -> None:
    engine, outputs = both(text())
    stats = engine.stats()
    assert len(tokens(outputs["a"])) == 60
    assert stats.num_steps_total < 40
    assert 0 < stats.num_accepted_draft_tokens_total < stats.num_draft_tokens_total
    assert stats.num_steps_total + stats.num_accepted_draft_tokens_total == 60


def test_tokens_of_one_step_come_in_one_output() -> None:
    _, outputs = both(text())
    assert max(len(o.token_ids) for o in outputs["a"]) > 1


def test_guesses_change_no_token_behind_an_image() -> None:
    engine, _ = both(picture("a", 1, greedy(60)))
    assert engine.stats().num_accepted_draft_tokens_total > 0


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.7, "seed": 3},
        {"temperature": 1.7, "seed": 4, "top_k": 20, "top_p": 0.9, "min_p": 0.001},
        {"temperature": 1.7, "seed": 5, "logprobs": 3},
        {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3, "logprobs": 0},
        {"no_repeat_ngram_size": 8},
        {"logit_bias": {7: 9.0, 8: 100.0}},
        {"temperature": 1.5, "seed": 6, "min_tokens": 30, "stop_token_ids": (1, 2, 3)},
    ],
    ids=str,
)
def test_sampling_is_the_same_token_by_token(params: dict[str, Any]) -> None:
    engine, _ = both(text(**params))
    assert engine.stats().num_accepted_draft_tokens_total > 0


def test_eight_sequences_of_all_kinds_in_one_batch() -> None:
    requests = [
        text("greedy"),
        text("short", max_tokens=3),
        text("sampled", temperature=1.7, seed=1),
        text("logprobs", temperature=1.2, seed=2, logprobs=2),
        text("penalties", repetition_penalty=1.1),
        picture("one", 1, greedy(40)),
        picture("two", 2, SamplingParams(temperature=1.5, seed=3, max_tokens=40)),
        picture("three", 1, greedy(40, min_tokens=5, stop_token_ids=(1,))),
    ]
    engine, _ = both(*requests, max_num_batched_tokens=24)
    assert max(engine.model.tokens_per_call) <= 24, "what is computed again counts, too"  # type: ignore[attr-defined]
    assert engine.stats().num_accepted_draft_tokens_total > 0


def test_a_stop_inside_a_run_of_right_guesses_ends_the_output_there() -> None:
    news = both(text())[1]["a"]
    longest = max((o.token_ids for o in news), key=len)
    inside = longest[: len(longest) // 2]
    assert inside
    params: dict[str, Any]
    for params in (
        {"stop_token_ids": inside[-1:]},
        {"stop_sequences": (inside,)},
        {"stop_sequences": (inside,), "min_tokens": 8},
    ):
        _, outputs = both(text(**params))
        assert reason(outputs["a"]) == "stop"
        assert len(tokens(outputs["a"])) < len(tokens(news))


@pytest.mark.parametrize("max_tokens", range(1, 20))
def test_the_output_is_never_longer_than_asked_for(max_tokens: int) -> None:
    _, outputs = both(text(max_tokens=max_tokens))
    assert len(tokens(outputs["a"])) == max_tokens


def test_a_preempted_sequence_says_the_same() -> None:
    requests = [replace(text(f"r{i}"), prompt_ids=[i, i, 2, 3, i, i, 2, 3]) for i in range(6)]
    engine, _ = both(*requests, num_blocks=24, max_model_len=80)
    assert engine.stats().num_preemptions_total > 0
    assert engine.stats().num_accepted_draft_tokens_total > 0


def test_a_prefix_that_was_computed_beside_wrong_guesses_serves_the_next_turn() -> None:
    first, next_words = text(), [3, 1, 4]
    said = tokens(run(make_engine(False), first)["a"])
    second = replace(text("b"), prompt_ids=[*first.prompt_ids, *said, *next_words])
    expected = tokens(run(make_engine(False, prefix_cache=False), second)["b"])
    engine = make_engine(True)
    run(engine, first)
    outputs = run(engine, second)["b"]
    assert tokens(outputs) == expected
    assert outputs[-1].num_cached_tokens > 40


def test_an_aborted_sequence_gives_back_the_blocks_of_its_guesses() -> None:
    engine = make_engine(True)
    engine.add(text())
    while not engine.stats().num_accepted_draft_tokens_total:
        engine.step()
    engine.abort("a")
    assert [o.finish.reason for o in engine.step() if o.finish] == ["abort"]
    engine.scheduler.check_integrity()
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


def test_a_row_that_is_not_a_number_fails_its_sequence_and_keeps_the_tokens_before_it() -> None:
    class Broken(Echo):  # type: ignore[misc,valid-type]
        def forward(self, batch, kv):  # type: ignore[no-untyped-def]
            logits = super().forward(batch, kv)
            if len(logits) > 1:
                logits[1] = float("nan")
            return logits

    model = Broken()
    engine = Engine(model, model.kv(64), EngineConfig(max_model_len=200, speculative_config=model.speculation))
    engine.scheduler.cost = StepCost(fixed_s=0.1, token_s=0.001, rate=0)
    outputs = run(engine, text())["a"]
    assert reason(outputs) == "error"
    said = tokens(run(make_engine(False), text())["a"])
    assert tokens(outputs) == said[: len(tokens(outputs))]


@searched(60)
@given(data=st.data())
def test_random_lives_with_guesses_leak_nothing_and_say_the_same(data: st.DataObject) -> None:
    """Arrivals, aborts and steps in any order, with few blocks, shared prefixes and images."""
    num_blocks = data.draw(st.integers(14, 40))
    engine = make_engine(True, num_blocks, max_model_len=56, max_num_batched_tokens=16, max_num_seqs=4)
    outputs: dict[str, list[Output]] = {}
    requests = []
    for index in range(data.draw(st.integers(1, 10))):
        params = SamplingParams(
            max_tokens=data.draw(st.integers(1, 30)), temperature=data.draw(st.sampled_from([0, 1.5])), seed=index
        )
        requests.append(picture(f"r{index}", data.draw(st.integers(1, 3)), params))
        engine.add(requests[-1])
        outputs[requests[-1].id] = []
        for _ in range(data.draw(st.integers(0, 6))):
            advance(engine, outputs)
        if data.draw(st.booleans()):
            engine.abort(data.draw(st.sampled_from(sorted(outputs))))
    while engine.has_work():
        advance(engine, outputs)
    assert max(engine.model.tokens_per_call, default=0) <= 16  # type: ignore[attr-defined]
    plain = run(make_engine(False, max_model_len=56), *requests)
    for name, news in outputs.items():
        assert sum(o.finish is not None for o in news) == 1
        assert tokens(news) == tokens(plain[name])[: len(tokens(news))]
        assert reason(news) == "abort" or tokens(news) == tokens(plain[name])


def advance(engine: Engine, outputs: dict[str, list[Output]]) -> None:
    for output in engine.step():
        outputs[output.request_id].append(output)
    engine.scheduler.check_integrity()

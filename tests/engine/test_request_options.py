"""What single requests ask of the engine beyond their tokens: the prompt's log probabilities, words that it must not
say, their rank, and that nothing is kept of them; with every runner."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch

from dashinfer_vlm.engine import engine as engine_module
from dashinfer_vlm.engine.scheduler import MAX_SCORED_ROWS
from dashinfer_vlm.errors import InvalidRequestError
from dashinfer_vlm.request import Output, Request, SamplingParams, TokenLogprob
from tests.engine.runners import RUNNERS
from tests.engine.scripted_model import VOCAB, ScriptedModel, answer, expected
from tests.engine.test_engine import greedy, image, make_engine, reason, run, tokens, with_image

PROMPT = [5, 6, 7, 6, 5, 9, 1, 1, 2, 3, 3, 8, 13, 21, 34, 55, 89, 44, 33, 77]


@pytest.fixture(autouse=True, params=list(RUNNERS.values()), ids=list(RUNNERS))
def runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "make_runner", request.param)


def told(news: list[Output]) -> list[TokenLogprob]:
    return [logprob for output in news for logprob in output.prompt_logprobs]


def check_scores(scores: list[TokenLogprob], values: list[float]) -> None:
    """`values` are what the model reads: ids, and rows of embeddings."""
    total = math.log(math.exp(10) + VOCAB - 1)
    for i, score in enumerate(scores, 1):
        context = torch.tensor([v * (place + 1) for place, v in enumerate(values[:i])], dtype=torch.float64)
        best = answer(context)
        assert score.rank == (1 if score.token_id == best else 2)
        assert score.logprob == pytest.approx((10 if score.token_id == best else 0) - total, abs=1e-4)
        assert score.top[0][0] == best
        assert score.top[0][1] == pytest.approx(10 - total, abs=1e-4)


@pytest.mark.parametrize("budget", [4, 16])
def test_every_token_of_a_prompt_but_the_first_is_told(budget: int) -> None:
    params = greedy(3, prompt_logprobs=2)
    engine = make_engine(max_num_batched_tokens=budget)
    news = run(engine, Request(id="a", prompt_ids=PROMPT, params=params))["a"]
    scores = told(news)
    assert [score.token_id for score in scores] == PROMPT[1:]
    assert all(len(score.top) == 2 for score in scores)
    check_scores(scores, [float(id) for id in PROMPT])
    assert tokens(news) == expected(PROMPT, 3)
    first = next(i for i, output in enumerate(news) if output.token_ids)
    assert not told(news[first:])


def test_a_prompt_that_was_computed_before_is_told_all_the_same() -> None:
    engine = make_engine()
    run(engine, Request(id="a", prompt_ids=PROMPT, params=greedy(2)))
    news = run(engine, Request(id="b", prompt_ids=PROMPT, params=greedy(2, prompt_logprobs=0)))["b"]
    assert [score.token_id for score in told(news)] == PROMPT[1:]
    assert news[-1].num_cached_tokens == 0


def test_equal_prompts_at_once_are_both_told() -> None:
    params = greedy(2, prompt_logprobs=1)
    requests = [Request(id=id, prompt_ids=PROMPT, params=params) for id in "ab"]
    news = run(make_engine(), *requests, Request(id="c", prompt_ids=PROMPT, params=greedy(2)))
    assert told(news["a"]) == told(news["b"])
    assert len(told(news["a"])) == len(PROMPT) - 1
    assert not told(news["c"])


def test_a_preempted_prompt_is_told_once() -> None:
    engine = make_engine(num_blocks=12, max_model_len=48)
    params = greedy(25, prompt_logprobs=0)
    requests = [Request(id=f"r{i}", prompt_ids=[i + 1] * 9, params=params) for i in range(4)]
    news = run(engine, *requests)
    assert engine.stats().num_preemptions_total > 0
    assert {id: len(told(outputs)) for id, outputs in news.items()} == {f"r{i}": 8 for i in range(4)}


def test_placeholders_are_told_too() -> None:
    prompt = [3, 4, 50, 50, 6]
    item = image(2, 2)
    news = run(make_engine(), Request(id="a", prompt_ids=prompt, items=(item,), params=greedy(1, prompt_logprobs=1)))
    scores = told(news["a"])
    assert [score.token_id for score in scores] == prompt[1:]
    check_scores(scores, [3, 4, 8, 8, 6])


def test_a_placeholder_outside_the_vocabulary_has_no_log_probability() -> None:
    prompt = [3, 500, 6]
    with pytest.raises(InvalidRequestError, match="token 1 of the prompt is 500"):
        make_engine().add(Request(id="a", prompt_ids=prompt, items=(image(1, 1),), params=greedy(1, prompt_logprobs=1)))


def test_a_step_has_a_bounded_number_of_told_rows() -> None:
    model = ScriptedModel()
    engine = make_engine(model=model, num_blocks=200, max_model_len=400, max_num_batched_tokens=400)
    prompt = [i % 90 for i in range(300)]
    news = run(engine, Request(id="a", prompt_ids=prompt, params=greedy(1, prompt_logprobs=0)))["a"]
    assert len(told(news)) == 299
    assert max(model.tokens_per_call[:3]) <= MAX_SCORED_ROWS


def without(*words: tuple[int, ...]) -> SamplingParams:
    return greedy(6, bad_words=words)


def test_a_bad_word_of_one_token_is_never_said() -> None:
    usual = expected(PROMPT, 6)
    said = tokens(run(make_engine(), Request(id="a", prompt_ids=PROMPT, params=without((usual[0],))))["a"])
    assert usual[0] not in said
    assert len(said) == 6


def test_a_bad_word_of_several_tokens_is_never_said_whole() -> None:
    usual = expected(PROMPT, 6)
    said = tokens(run(make_engine(), Request(id="a", prompt_ids=PROMPT, params=without(tuple(usual[:3]))))["a"])
    assert said[:2] == usual[:2]
    assert said[2] != usual[2]


def test_the_beginning_of_a_bad_word_in_the_prompt_does_not_count() -> None:
    usual = expected(PROMPT, 6)
    said = tokens(run(make_engine(), Request(id="a", prompt_ids=PROMPT, params=without((PROMPT[-1], usual[0]))))["a"])
    assert said == usual


@pytest.mark.parametrize("words", [((),), ((VOCAB,),), ((-1,),)])
def test_bad_words_that_cannot_be_are_refused(words: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        make_engine().add(Request(id="a", prompt_ids=PROMPT, params=without(*words)))
    assert caught.value.param == "bad_words"


def finished(*requests: Request, **options: Any) -> list[str]:
    """Ids in the order in which their requests end."""
    engine = make_engine(**options)
    for request in requests:
        engine.add(request)
    ended: list[str] = []
    while engine.has_work():
        ended += [output.request_id for output in engine.step() if output.finish]
        engine.scheduler.check_integrity()
    return ended


def test_who_waits_is_admitted_by_priority_and_then_by_arrival() -> None:
    ranks = {"a": 5, "b": 0, "c": -3, "d": 0, "e": -3}
    requests = [Request(id=id, prompt_ids=PROMPT, params=greedy(3), priority=rank) for id, rank in ranks.items()]
    assert finished(*requests, max_num_seqs=1) == ["c", "e", "b", "d", "a"]


def test_the_one_of_the_lowest_rank_is_preempted_whenever_it_came() -> None:
    """The first to come has the highest number: it gives way to all others, and still ends."""
    requests = [
        Request(id=f"r{i}", prompt_ids=[i + 1] * 9, params=greedy(25), priority=1 if i == 0 else 0) for i in range(3)
    ]
    ended = finished(*requests, num_blocks=20, max_model_len=80)
    assert sorted(ended) == ["r0", "r1", "r2"]
    assert ended[-1] == "r0"


def test_nothing_is_kept_of_a_request_that_has_ended() -> None:
    """Its pictures are memory that others could have."""
    engine = make_engine()
    request, _ = with_image("a", 3)
    patches = request.items[0].patches
    assert patches is not None
    kept = weakref.ref(patches)
    assert reason(run(engine, request)["a"]) == "length"
    del patches, request
    assert kept() is None

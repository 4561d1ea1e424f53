"""The engine over a scripted model: batching, chunks, prefixes, preemption, ends."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.encoders.in_step import InStepEncoder
from dashinfer_vlm.engine import engine as engine_module
from dashinfer_vlm.engine.devices import make_runner
from dashinfer_vlm.engine.engine import Engine
from dashinfer_vlm.errors import ConfigError, ContextLengthError, InvalidRequestError
from dashinfer_vlm.request import Item, Output, Request, SamplingParams
from tests.engine.late_runner import make_late_runner
from tests.engine.scripted_model import EOS, VOCAB, ScriptedModel, expected
from tests.searching import searched


@pytest.fixture(autouse=True, params=[0, 1], ids=["depth 0", "depth 1"])
def depth(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is said here of an engine holds with a step under way, too."""
    monkeypatch.setattr(engine_module, "make_runner", make_late_runner if request.param else make_runner)


def make_engine(num_blocks: int = 64, model: ScriptedModel | None = None, **options: object) -> Engine:
    model = model or ScriptedModel()
    config = EngineConfig(**{"max_model_len": min(200, num_blocks * 4), "max_num_batched_tokens": 16, **options})  # type: ignore[arg-type]
    return Engine(model, model.kv(num_blocks), config)


def greedy(max_tokens: int = 8, **options: object) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **options)  # type: ignore[arg-type]


def image(start: int, num_tokens: int, fill: int = 1) -> Item:
    patches = torch.full((num_tokens * 4, 2), fill, dtype=torch.uint8)
    return Item(
        kind="image",
        start=start,
        num_tokens=num_tokens,
        content_hash=hashlib.sha256(patches.numpy().tobytes()).digest(),
        grid=(1, 2, num_tokens * 2),
        patches=patches,
    )


def run(engine: Engine, *requests: Request) -> dict[str, list[Output]]:
    """Add all, step to the end, and check that each ended once and nothing leaked."""
    outputs: dict[str, list[Output]] = {r.id: [] for r in requests}
    for request in requests:
        engine.add(request)
    for _ in range(10_000):
        if not engine.has_work():
            break
        for output in engine.step():
            outputs[output.request_id].append(output)
        engine.scheduler.check_integrity()
        engine.stage.cache.check_integrity()
    for news in outputs.values():
        assert [o.finish is not None for o in news] == [False] * (len(news) - 1) + [True]
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    return outputs


def tokens(news: list[Output]) -> list[int]:
    return [t for o in news for t in o.token_ids]


def reason(news: list[Output]) -> str:
    assert news[-1].finish is not None
    return news[-1].finish.reason


def test_a_prompt_is_continued_greedily_until_max_tokens() -> None:
    outputs = run(make_engine(), Request(id="a", prompt_ids=[5, 6, 7], params=greedy(9)))["a"]
    assert tokens(outputs) == expected([5, 6, 7], 9)
    assert reason(outputs) == "length"


def test_a_prompt_longer_than_the_step_budget_is_prefilled_in_chunks() -> None:
    model = ScriptedModel()
    prompt = list(range(1, 60))
    outputs = run(
        make_engine(model=model, max_num_batched_tokens=7), Request(id="a", prompt_ids=prompt, params=greedy(3))
    )
    assert tokens(outputs["a"]) == expected(prompt, 3)
    assert model.tokens_per_call[:9] == [7] * 8 + [3]


def test_sequences_in_one_batch_answer_as_if_alone() -> None:
    prompts = {f"r{i}": [(i * 7 + j) % 90 for j in range(3 + 5 * i)] for i in range(8)}
    outputs = run(make_engine(), *(Request(id=k, prompt_ids=p, params=greedy(12)) for k, p in prompts.items()))
    assert {k: tokens(o) for k, o in outputs.items()} == {k: expected(p, 12) for k, p in prompts.items()}


def test_too_few_blocks_preempt_the_youngest_and_change_no_answer() -> None:
    engine = make_engine(num_blocks=12, max_model_len=48)
    prompts = {f"r{i}": [i + 1] * 9 for i in range(4)}
    outputs = run(engine, *(Request(id=k, prompt_ids=p, params=greedy(25)) for k, p in prompts.items()))
    assert {k: tokens(o) for k, o in outputs.items()} == {k: expected(p, 25) for k, p in prompts.items()}
    assert engine.stats().num_preemptions_total > 0


def test_a_repeated_prompt_finds_its_prefix() -> None:
    engine = make_engine()
    prompt = list(range(30))
    first = run(engine, Request(id="a", prompt_ids=prompt, params=greedy()))["a"]
    second = run(engine, Request(id="b", prompt_ids=prompt, params=greedy()))["b"]
    assert tokens(first) == tokens(second) == expected(prompt, 8)
    assert (first[-1].num_cached_tokens, second[-1].num_cached_tokens) == (0, 28)


def test_what_a_preempted_prompt_had_computed_itself_does_not_count_as_cached() -> None:
    engine = make_engine(num_blocks=14, max_model_len=56, max_num_batched_tokens=5)
    long = Request(id="long", prompt_ids=list(range(1, 46)), params=greedy(4))
    news = run(engine, Request(id="first", prompt_ids=[1, 2, 3], params=greedy(40)), long)["long"]
    assert engine.stats().num_preemptions_total > 0
    assert tokens(news) == expected(long.prompt_ids, 4)
    assert news[-1].num_cached_tokens == 0


def test_a_prefix_is_shared_only_with_the_same_salt() -> None:
    engine = make_engine()
    found = []
    for id, salt in enumerate(("", "a", "b", "a", "")):
        request = Request(id=str(id), prompt_ids=list(range(30)), params=greedy(), cache_salt=salt)
        news = run(engine, request)[str(id)]
        assert tokens(news) == expected(range(30), 8)
        found.append(news[-1].num_cached_tokens)
    assert found == [0, 0, 0, 28, 28]


def test_no_prefix_is_found_when_the_cache_is_off() -> None:
    engine = make_engine(prefix_cache=False)
    for name in ("a", "b"):
        news = run(engine, Request(id=name, prompt_ids=list(range(30)), params=greedy()))[name]
        assert news[-1].num_cached_tokens == 0


def test_equal_prompts_that_arrive_together_are_prefilled_once() -> None:
    model = ScriptedModel()
    engine = make_engine(model=model, max_num_batched_tokens=64)
    requests = [Request(id=f"r{i}", prompt_ids=list(range(41)), params=greedy(2)) for i in range(4)]
    outputs = run(engine, *requests)
    assert all(tokens(o) == expected(range(41), 2) for o in outputs.values())
    assert engine.stats().num_computed_tokens_total == 41 + 3 * 1 + 4  # one whole, three last tokens, four decodes


def test_equal_prompts_do_not_wait_for_each_other_without_the_prefix_cache() -> None:
    engine = make_engine(prefix_cache=False)
    for name in "abc":
        engine.add(Request(id=name, prompt_ids=[1, 2, 3, 4, 5], params=greedy()))
    engine.step()
    assert [sequence.num_computed for sequence in engine.scheduler.running] == [5, 5, 5]


def with_image(name: str, fill: int, max_tokens: int = 6) -> tuple[Request, list[float]]:
    item = image(3, 10, fill)
    prompt = [1, 2, 3] + [VOCAB + 7] * 10 + [4, 5]
    values = [1.0, 2.0, 3.0] + [8.0 * fill] * 10 + [4.0, 5.0]
    return Request(id=name, prompt_ids=prompt, params=greedy(max_tokens), items=(item,)), values


def test_an_image_overwrites_its_placeholders() -> None:
    request, values = with_image("a", 3)
    assert tokens(run(make_engine(max_num_batched_tokens=4), request)["a"]) == expected(values, 6)


def test_same_text_with_another_image_is_no_prefix_hit() -> None:
    engine = make_engine()
    for name, fill in (("a", 3), ("b", 4)):
        request, values = with_image(name, fill)
        assert tokens(run(engine, request)[name]) == expected(values, 6)


def test_a_prefix_hit_that_ends_inside_an_image_writes_only_the_remaining_rows() -> None:
    engine = make_engine()
    first, values = with_image("a", 3)
    run(engine, first)
    longer = Request(id="b", prompt_ids=[*first.prompt_ids[:13], 9, 9], params=greedy(6), items=first.items)
    news = run(engine, longer)["b"]
    assert tokens(news) == expected([*values[:13], 9, 9], 6)
    assert news[-1].num_cached_tokens == 12


def test_one_new_image_of_many_requests_is_encoded_once() -> None:
    model = ScriptedModel()
    engine = make_engine(model=model)
    requests = [with_image(f"r{i}", 5)[0] for i in range(16)]
    outputs = run(engine, *requests)
    assert {tuple(tokens(o)) for o in outputs.values()} == {tuple(expected(with_image("", 5)[1], 6))}
    assert model.encoder.num_begun == 1
    assert engine.stats().num_items_encoded_total == 1


def test_prefill_of_the_first_image_starts_while_a_later_one_is_encoded() -> None:
    model = ScriptedModel()
    engine = make_engine(model=model)
    first, second = image(1, 4, 2), image(6, 4, 9)
    prompt = [1] + [VOCAB] * 4 + [2] + [VOCAB] * 4 + [3]
    assert isinstance(engine.stage, InStepEncoder)
    engine.stage.max_batch_patches = 1
    engine.add(Request(id="a", prompt_ids=prompt, params=greedy(2), items=(first, second)))
    engine.stage.request(first)
    while engine.stage.cache.get(first.content_hash) is None:
        engine.stage.advance(1.0)
    engine.stage.release(first)
    assert first.content_hash in engine.stage.cache
    plan = engine.scheduler.schedule()
    assert [c.num_tokens for c in plan.chunks] == [6]


def test_an_image_that_cannot_be_encoded_fails_its_own_request_only() -> None:
    model = ScriptedModel()
    model.encoder.poison = 7
    engine = make_engine(model=model)
    good, values = with_image("good", 3)
    bad, _ = with_image("bad", 7)
    outputs = run(engine, bad, good)
    assert reason(outputs["bad"]) == "error"
    assert tokens(outputs["good"]) == expected(values, 6)
    assert engine.stats().num_encoder_failures_total == 1


def test_a_ready_made_embedding_needs_no_encoder() -> None:
    embedding = torch.arange(4.0).unsqueeze(1)
    item = Item(kind="image", start=1, num_tokens=4, content_hash=b"e" * 32, embedding=embedding)
    request = Request(id="a", prompt_ids=[1, 900, 900, 900, 900, 2], params=greedy(4), items=(item,))
    assert tokens(run(make_engine(), request)["a"]) == expected([1, 0, 1, 2, 3, 2], 4)


def test_an_aborted_sequence_ends_once_and_frees_its_blocks() -> None:
    engine = make_engine()
    engine.add(Request(id="a", prompt_ids=[1, 2], params=greedy(100)))
    engine.add(with_image("b", 3)[0])
    engine.step()
    engine.abort("a")
    engine.abort("b")
    engine.abort("never heard of")
    finals = [o for o in engine.step() if o.finish]
    assert sorted((o.request_id, o.finish.reason) for o in finals if o.finish) == [("a", "abort"), ("b", "abort")]
    while engine.has_work():
        assert engine.step() == []
    engine.scheduler.check_integrity()


def test_the_end_of_sequence_token_stops_and_is_not_output() -> None:
    # logit_bias makes the scripted model say EOS at once
    params = greedy(5, logit_bias={EOS: 100.0})
    news = run(make_engine(), Request(id="a", prompt_ids=[1], params=params))["a"]
    assert (tokens(news), reason(news)) == ([], "stop")
    assert news[-1].finish is not None
    assert news[-1].finish.stop_token == EOS


def test_ignore_eos_and_min_tokens_keep_it_going() -> None:
    ignoring = greedy(5, logit_bias={EOS: 100.0}, ignore_eos=True)
    minimum = greedy(5, logit_bias={EOS: 50.0}, min_tokens=3)
    outputs = run(
        make_engine(), Request(id="a", prompt_ids=[1], params=ignoring), Request(id="b", prompt_ids=[1], params=minimum)
    )
    assert tokens(outputs["a"]) == [EOS] * 5
    assert len(tokens(outputs["b"])) == 3


def test_stop_ids_and_stop_sequences_end_the_output() -> None:
    continuation = expected([5, 6, 7], 9)
    by_id = greedy(9, stop_token_ids=(continuation[4],))
    by_sequence = greedy(9, stop_sequences=(tuple(continuation[2:4]),))
    outputs = run(
        make_engine(),
        Request(id="id", prompt_ids=[5, 6, 7], params=by_id),
        Request(id="sequence", prompt_ids=[5, 6, 7], params=by_sequence),
    )
    assert tokens(outputs["id"]) == continuation[: continuation.index(continuation[4])]
    assert tokens(outputs["sequence"]) == continuation[:4]
    assert {reason(o) for o in outputs.values()} == {"stop"}


def test_without_max_tokens_the_output_runs_to_the_end_of_the_context() -> None:
    news = run(
        make_engine(max_model_len=50), Request(id="a", prompt_ids=[1] * 20, params=SamplingParams(temperature=0))
    )["a"]
    assert len(tokens(news)) == 30
    assert reason(news) == "length"


def test_a_seed_makes_sampling_repeatable_in_any_company() -> None:
    params = SamplingParams(temperature=50, max_tokens=20, seed=7)
    alone = run(make_engine(), Request(id="a", prompt_ids=[1, 2], params=params))["a"]
    crowd = [Request(id=f"r{i}", prompt_ids=[i], params=SamplingParams(temperature=50, max_tokens=9)) for i in range(5)]
    together = run(make_engine(), *crowd, Request(id="a", prompt_ids=[1, 2], params=params))["a"]
    assert tokens(alone) == tokens(together)
    assert len(set(tokens(alone))) > 5


def test_requests_without_a_seed_differ() -> None:
    params = SamplingParams(temperature=50, max_tokens=20)
    outputs = run(make_engine(), *(Request(id=n, prompt_ids=[1, 2], params=params) for n in "ab"))
    assert tokens(outputs["a"]) != tokens(outputs["b"])


def test_a_failed_engine_ends_every_sequence_once() -> None:
    engine = make_engine()
    for name in "abc":
        engine.add(Request(id=name, prompt_ids=[1], params=greedy()))
    engine.step()
    finals = engine.fail_all("the model call failed")
    assert sorted(o.request_id for o in finals) == ["a", "b", "c"]
    assert not engine.has_work()
    engine.scheduler.check_integrity()


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (Request(id="a", prompt_ids=[]), InvalidRequestError),
        (Request(id="a", prompt_ids=[VOCAB]), InvalidRequestError),
        (Request(id="a", prompt_ids=[-1]), InvalidRequestError),
        (Request(id="a", prompt_ids=[1] * 200), ContextLengthError),
        (Request(id="a", prompt_ids=[1], params=greedy(200)), ContextLengthError),
        (Request(id="a", prompt_ids=[1], params=SamplingParams(temperature=float("nan"))), InvalidRequestError),
        (Request(id="a", prompt_ids=[1], params=SamplingParams(repetition_penalty=0)), InvalidRequestError),
        (Request(id="a", prompt_ids=[1, 1, 1], items=(image(1, 5),)), InvalidRequestError),
        (Request(id="a", prompt_ids=[1, 1], positions=torch.zeros(3, 5)), InvalidRequestError),
        (
            Request(
                id="a",
                prompt_ids=[1, 1],
                items=(Item(kind="image", start=0, num_tokens=2, content_hash=b"", embedding=torch.zeros(2, 9)),),
            ),
            InvalidRequestError,
        ),
    ],
)
def test_an_impossible_request_is_refused_and_leaves_no_trace(request_: Request, error: type[Exception]) -> None:
    engine = make_engine()
    with pytest.raises(error):
        engine.add(request_)
    assert not engine.has_work()


def test_a_context_that_does_not_fit_the_cache_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="the KV cache holds 16 tokens, fewer than one request of 100"):
        make_engine(num_blocks=4, max_model_len=100)


@searched(60)
@given(data=st.data())
def test_random_lives_leak_nothing_and_answer_right(data: st.DataObject) -> None:
    """Arrivals, aborts and steps in any order, with few blocks, shared prefixes and images."""
    engine = make_engine(num_blocks=data.draw(st.integers(14, 40)), max_model_len=56)
    outputs: dict[str, list[Output]] = {}
    wanted: dict[str, list[int]] = {}
    for index in range(data.draw(st.integers(1, 12))):
        name = f"r{index}"
        fill, num_prefix = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 12))
        prefix = [9] * num_prefix
        item = image(num_prefix, 6, fill)
        count = data.draw(st.integers(1, 20))
        engine.add(Request(id=name, prompt_ids=[*prefix, *[VOCAB] * 6, 1, 2], params=greedy(count), items=(item,)))
        outputs[name], wanted[name] = [], expected([*prefix, *[8.0 * fill] * 6, 1, 2], count)
        for _ in range(data.draw(st.integers(0, 6))):
            for output in engine.step():
                outputs[output.request_id].append(output)
            engine.scheduler.check_integrity()
        if data.draw(st.booleans()):
            engine.abort(data.draw(st.sampled_from(sorted(outputs))))
    while engine.has_work():
        for output in engine.step():
            outputs[output.request_id].append(output)
        engine.scheduler.check_integrity()
    for name, news in outputs.items():
        assert sum(o.finish is not None for o in news) == 1
        assert tokens(news) == wanted[name][: len(tokens(news))]
        assert reason(news) in ("length", "abort")

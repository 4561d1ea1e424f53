"""What a step may cost while streams run, and the estimate behind it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dashinfer_vlm.encoders.cache import EmbeddingCache
from dashinfer_vlm.encoders.in_step import InStepEncoder
from dashinfer_vlm.encoders.queue import ItemQueue
from dashinfer_vlm.engine.blocks import BlockPool
from dashinfer_vlm.engine.cost import CardCost, StepCost
from dashinfer_vlm.engine.scheduler import IDLE_STEP_S, Scheduler
from dashinfer_vlm.engine.sequence import Sequence
from dashinfer_vlm.engine.share import (
    BURST_SLACK,
    CROWDED_SLACK,
    DECODE_SLACK,
    SHARES,
    Share,
    burst_share,
    fair_share,
    flat_share,
)
from dashinfer_vlm.engine.steps import Plan
from dashinfer_vlm.request import Item, Request, SamplingParams
from tests.engine.scripted_model import ScriptedEncoder

FIXED_S, TOKEN_S = 0.1, 0.01


def make_scheduler(share: Share = fair_share, **options: int) -> Scheduler:
    stage = InStepEncoder(ScriptedEncoder(), ItemQueue(EmbeddingCache(1 << 20)), torch.device("cpu"), 1024)
    limits = {"max_num_seqs": 16, "max_num_batched_tokens": 64} | options
    return Scheduler(
        pool=BlockPool(100), block_size=4, stage=stage, cost=StepCost(FIXED_S, TOKEN_S), share=share, **limits
    )


def arrive(scheduler: Scheduler, name: str, num_prompt: int, items: tuple[Item, ...] = ()) -> Sequence:
    prompt = [hash((name, i)) % 90 for i in range(num_prompt)]
    request = Request(id=name, prompt_ids=prompt, items=items, params=SamplingParams())
    positions = torch.arange(num_prompt).expand(3, -1)
    made = Sequence(request, positions=positions, offset=0, max_tokens=99, seed=0)
    scheduler.add(made)
    return made


def carry_out(scheduler: Scheduler, plan: Plan) -> None:
    """What the engine does with a plan, every sampled token being 1."""
    scheduler.started(plan)
    for chunk in plan.sampled_chunks:
        chunk.sequence.append(1)


def stream(scheduler: Scheduler, name: str) -> Sequence:
    """A sequence that has had its prompt computed and decodes from now on."""
    made = arrive(scheduler, name, 3)
    carry_out(scheduler, scheduler.schedule())
    assert made.is_decoding
    return made


def image(start: int, num_tokens: int = 8) -> Item:
    return Item(
        kind="image",
        start=start,
        num_tokens=num_tokens,
        content_hash=b"i" * 32,
        grid=(1, 4, num_tokens),
        patches=torch.ones(num_tokens * 4, 2, dtype=torch.uint8),
    )


def test_every_stream_gets_its_token_before_a_prompt_gets_any() -> None:
    scheduler = make_scheduler()
    streams = [stream(scheduler, f"s{i}") for i in range(4)]
    arrive(scheduler, "long", 60)
    plan = scheduler.schedule()
    assert [c.sequence for c in plan.chunks[:4]] == streams
    assert [c.num_tokens for c in plan.chunks[:4]] == [1] * 4


def test_a_prompt_adds_at_most_its_share_to_a_step_of_streams() -> None:
    scheduler = make_scheduler()
    for i in range(4):
        stream(scheduler, f"s{i}")
    arrive(scheduler, "long", 60)
    prefill = scheduler.schedule().num_tokens - 4
    assert 0 < prefill * TOKEN_S <= DECODE_SLACK * scheduler.cost.of(4)


def test_an_image_gets_what_the_prompt_left_of_the_share() -> None:
    scheduler = make_scheduler()
    for i in range(4):
        stream(scheduler, f"s{i}")
    arrive(scheduler, "picture", 12, (image(2),))
    plan = scheduler.schedule()
    prefill = plan.num_tokens - 4
    assert prefill == 2, "only the text before the image can be computed"
    assert plan.encoder_s == pytest.approx(DECODE_SLACK * scheduler.cost.of(4) - prefill * TOKEN_S)


def test_prefill_and_encoder_take_turns_with_the_extra_time_and_no_step_pays_for_both() -> None:
    scheduler = make_scheduler()
    for i in range(6):
        stream(scheduler, f"s{i}")
    arrive(scheduler, "picture", 12, (image(0),))
    arrive(scheduler, "long", 60)
    share_s = DECODE_SLACK * scheduler.cost.of(6)
    for _ in range(4):
        plan = scheduler.schedule()
        assert 0 < (plan.num_tokens - 6) * TOKEN_S <= share_s
        assert plan.encoder_s is not None
        assert plan.encoder_s + (plan.num_tokens - 6) * TOKEN_S <= share_s + 1e-9
        carry_out(scheduler, plan)
        plan = scheduler.schedule()
        assert plan.num_tokens == 6
        assert plan.encoder_s == pytest.approx(share_s)
        carry_out(scheduler, plan)


def test_the_share_is_small_beside_many_streams_and_rises_steeply_when_as_many_are_far() -> None:
    assert fair_share(0, 0, 4) == fair_share(1, 0, 4) == DECODE_SLACK
    assert fair_share(2, 0, 4) == 0.5
    assert fair_share(4, 0, 4) == 4.0
    assert fair_share(8, 0, 4) == CROWDED_SLACK
    assert fair_share(7, 0, 1) == 7.0
    shares = [fair_share(far, 0, 8) for far in range(64)]
    assert shares == sorted(shares)


def test_requests_that_are_near_get_an_equal_share_and_make_no_crowd_of_the_far_ones() -> None:
    assert fair_share(0, 7, 1) == 7.0
    assert fair_share(0, 3, 3) == 1.0
    assert fair_share(2, 0, 4) == fair_share(2, 1, 3) == 0.5


def test_for_latency_the_share_is_small_whoever_waits() -> None:
    assert flat_share(0, 0, 4) == flat_share(64, 0, 1) == flat_share(0, 64, 1) == DECODE_SLACK
    assert extra_of_prompts(1, *[20] * 7, share=flat_share) <= DECODE_SLACK


def test_for_throughput_whoever_waits_catches_up() -> None:
    assert burst_share(0, 0, 4) == DECODE_SLACK
    assert burst_share(1, 0, 8) == burst_share(0, 0.5, 8) == BURST_SLACK
    assert 7 < extra_of_prompts(1, *[40] * 7, share=burst_share) <= BURST_SLACK


@given(st.floats(0, 100), st.floats(0, 100), st.integers(1, 100))
def test_throughput_never_gives_less_than_balanced_up_to_its_own_bound_and_latency_never_more(
    num_far: float, num_near: float, num_decoding: int
) -> None:
    latency, balanced, throughput = (
        SHARES[name](num_far, num_near, num_decoding) for name in ("latency", "balanced", "throughput")
    )
    assert latency <= balanced
    assert throughput >= min(balanced, BURST_SLACK)


def extra_of_prompts(num_streams: int, *lengths: int, share: Share = fair_share) -> float:
    """Share of a step's decode that prompts of these lengths get beside streams."""
    scheduler = make_scheduler(share, max_num_batched_tokens=512)
    for i in range(num_streams):
        stream(scheduler, f"s{i}")
    for i, length in enumerate(lengths):
        arrive(scheduler, f"w{i}", length)
    return (scheduler.schedule().num_tokens - num_streams) * TOKEN_S / scheduler.cost.of(num_streams)


def test_a_prompt_that_is_done_in_no_time_is_near_and_a_long_one_is_far() -> None:
    assert extra_of_prompts(2, 5, 5) <= 1.0  # near: two for two streams
    assert extra_of_prompts(2, 100, 100) > 2.0  # far: a crowd


def test_the_share_grows_when_more_wait_than_run() -> None:
    assert DECODE_SLACK < extra_of_prompts(1, *[20] * 7) <= 7


def test_without_streams_the_encoder_gets_a_long_slice() -> None:
    scheduler = make_scheduler()
    arrive(scheduler, "picture", 12, (image(0),))
    plan = scheduler.schedule()
    assert plan.chunks == ()
    assert plan.encoder_s == IDLE_STEP_S


def test_the_oldest_prompt_is_finished_first() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16)
    first, second = arrive(scheduler, "a", 20), arrive(scheduler, "b", 20)
    carry_out(scheduler, scheduler.schedule())
    plan = scheduler.schedule()
    assert [(c.sequence, c.num_tokens) for c in plan.chunks] == [(first, 4), (second, 12)]


def test_no_more_sequences_run_than_allowed() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for i in range(5):
        arrive(scheduler, f"s{i}", 3)
    assert len(scheduler.schedule().chunks) == 2
    assert len(scheduler.waiting) == 3


def test_the_cost_estimate_follows_what_steps_really_take() -> None:
    cost = StepCost(fixed_s=1.0, token_s=1.0)
    for _ in range(300):
        for num_rows, joining in ((1, 0), (4, 0), (4, 60), (0, 512)):
            cost.observe(num_rows, joining, FIXED_S + TOKEN_S * (num_rows + joining))
    assert cost.fixed_s == pytest.approx(FIXED_S, rel=0.1)
    assert cost.token_s == pytest.approx(TOKEN_S, rel=0.1)


@pytest.mark.parametrize(("fixed_s", "token_s"), [(0.11, 0.0075), (0.05, 0.004), (0.5, 0.02), (0.001, 1e-5)])
@pytest.mark.parametrize(("guessed_fixed_s", "guessed_token_s"), [(0.02, 0.001), (0.0, 0.03), (1.0, 0.0)])
@pytest.mark.parametrize("joining", [2, 8, 60])
def test_streams_and_few_prompts_teach_both_parts_whatever_was_guessed(
    fixed_s: float, token_s: float, guessed_fixed_s: float, guessed_token_s: float, joining: int
) -> None:
    cost = StepCost(guessed_fixed_s, guessed_token_s)
    for _ in range(1500):
        for num_rows, joined in ((5, joining), (5, 0), (6, 0)):
            cost.observe(num_rows, joined, fixed_s + token_s * (num_rows + joined))
    assert cost.fixed_s == pytest.approx(fixed_s, rel=0.1)
    assert cost.token_s == pytest.approx(token_s, rel=0.1)


def test_many_rows_and_single_tokens_beside_them_do_not_shake_the_estimate() -> None:
    cost = StepCost(FIXED_S, TOKEN_S)
    for i in range(300):
        cost.observe(128, i % 2, (FIXED_S + TOKEN_S * (128 + i % 2)) * (1.1 if i % 3 else 0.9))
    assert cost.of(128) == pytest.approx(FIXED_S + 128 * TOKEN_S, rel=0.15)
    assert 0 <= cost.token_s < 3 * TOKEN_S


def test_one_slow_step_hardly_moves_the_estimate() -> None:
    cost = StepCost(FIXED_S, TOKEN_S)
    cost.observe(1, 0, 1.0)
    assert cost.of(1) < 2 * (FIXED_S + TOKEN_S)


KNEE = 300
"""Rows for which a card's arithmetic takes as long as its reading."""
DECODE_SIZES, MIXED_SIZES = (1, 2, 4, 8, 16, 32, 64), (256, 512, 1024, 2048)


def card_cost(fixed_s: float, token_s: float) -> CardCost:
    return CardCost(fixed_s, token_s, decode_sizes=DECODE_SIZES, mixed_sizes=MIXED_SIZES)


def card_seconds(num_tokens: int, fixed_s: float = FIXED_S) -> float:
    """What a card really takes for as many rows."""
    return fixed_s * max(1, num_tokens / KNEE)


@pytest.mark.parametrize(("fixed_s", "token_s"), [(0.02, 0.001), (0.005, 2e-5), (0.0001, 1e-9), (1e-6, 1e-2)])
def test_the_cost_of_a_card_is_what_its_sizes_took(fixed_s: float, token_s: float) -> None:
    cost = card_cost(fixed_s, token_s)
    for size in MIXED_SIZES:
        cost.observe(4, size - 4, card_seconds(size))
    cost.observe(4, 0, FIXED_S)
    assert cost.of(3) == FIXED_S
    for num_tokens, size in ((200, 256), (500, 512), (2000, 2048)):
        assert cost.more(4, num_tokens - 4) == pytest.approx(card_seconds(size) - FIXED_S)
    assert cost.token_s == pytest.approx(card_seconds(2048) / 2048)


def test_what_joins_a_step_of_a_card_fills_what_it_is_padded_up_to() -> None:
    cost = card_cost(FIXED_S, FIXED_S / KNEE)
    assert cost.joining_in(0.0, 64) == 256 - 64
    assert cost.joining_in(0.0, 250) == 512 - 250, "six more tokens a step would keep a prompt waiting"
    assert cost.joining_in(0.0, 2040) == 8, "no larger size is left"
    assert cost.joining_in(1.001 * card_seconds(1024) - FIXED_S, 64) == 1024 - 64
    cost.observe(64, 0, FIXED_S)
    cost.observe(64, 256 - 64, 3 * FIXED_S)
    assert cost.joining_in(0.0, 64) == 256 - 64, "one token would cost as much"
    assert cost.joining_in(1.0, 2048) == 0


def test_a_size_that_was_not_seen_costs_what_lies_between_its_neighbours() -> None:
    cost = card_cost(0.005, 2e-5)
    cost.observe(8, 0, 0.016)
    assert cost.more(8, 248) == 0, "no less than decode alone"
    cost.observe(0, 2048, 0.018)
    assert cost.of(8) + cost.more(8, 1016) <= 0.018, "no more than all rows"


def test_decode_that_was_not_seen_costs_what_the_smallest_mixed_call_does() -> None:
    cost = card_cost(0.005, 2e-5)
    cost.observe(8, 200, 0.016)
    assert cost.of(8) == 0.016


@pytest.mark.parametrize("fixed_s", [0.0002, 0.002, 0.016, 0.2])
def test_prompts_do_not_starve_whatever_a_step_of_a_card_takes(fixed_s: float) -> None:
    """One that starts every kernel by itself takes as long for two rows as for two thousand."""
    cost, left, steps = card_cost(0.005, 2e-5), 62 * 1024, 1
    cost.observe(0, 2048, fixed_s)  # before anybody decodes
    while left:
        joining = min(left, cost.joining_in(DECODE_SLACK * cost.of(8), 8))
        cost.observe(8, joining, fixed_s)
        left, steps = left - joining, steps + 1
    assert steps <= 64 * 1024 // 2040 + 2

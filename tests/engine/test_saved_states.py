"""Saved states: what is found of them, when, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

from dashinfer_vlm.engine import states
from dashinfer_vlm.engine.blocks import BlockPool
from dashinfer_vlm.engine.sequence import Sequence
from dashinfer_vlm.request import Request
from tests.engine.scripted_model import expected
from tests.engine.stateful_model import StatefulModel
from tests.engine.test_cards import assert_same_up_to_errors, card_life, out_of_memory
from tests.engine.test_engine import greedy, image, reason, tokens
from tests.engine.test_late_steps import Life, life, lived, lives
from tests.engine.test_speculation import NGRAM, StatefulEcho
from tests.searching import searched


@pytest.fixture(autouse=True)
def short_prompts() -> Iterator[None]:
    """Blocks have four tokens here, so that two of them are long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(states, "MIN_SPARED", 8)
        patch.setattr(states, "PROMPT_TAIL", 2)
        yield


LIVES: dict[str, Callable[..., Life]] = {"at once": partial(life, 0), "one late": partial(life, 1), "cards": card_life}


def hybrid(
    runner: str = "at once",
    *,
    seats: int = 8,
    num_blocks: int = 64,
    model: Callable[[int], StatefulModel] = StatefulModel,
    **options: Any,
) -> Life:
    return LIVES[runner](num_blocks, model(seats), **options)


def say(one: Life, name: str, prompt: list[int], num_tokens: int = 4) -> list[int]:
    """The answer to a prompt of words, which is checked."""
    one.add(Request(id=name, prompt_ids=prompt, params=greedy(num_tokens)))
    one.finish()
    answer = tokens(one.outputs[name])
    assert answer == expected(prompt, num_tokens)
    return answer


def num_cached(one: Life, name: str) -> int:
    return one.outputs[name][-1].num_cached_tokens


def num_rows(one: Life) -> int:
    return one.engine.stats().num_computed_tokens_total


RUNNERS = pytest.mark.parametrize("runner", LIVES)
PROMPT = list(range(1, 31))


@RUNNERS
def test_the_next_turn_goes_on_behind_the_last_block_of_the_prompt(runner: str) -> None:
    chat = hybrid(runner)
    say(chat, "a", PROMPT)
    before = num_rows(chat)
    say(chat, "b", [*PROMPT[:-2], 70, 71, 72, 73])
    assert num_cached(chat, "b") == 28
    assert num_rows(chat) - before == 32 - 28 + 3


@RUNNERS
def test_the_next_turn_goes_on_behind_the_last_block_of_the_answer(runner: str) -> None:
    chat = hybrid(runner)
    answer = say(chat, "a", PROMPT, 21)  # 51 tokens, of which 50 are computed
    assert len(chat.engine.scheduler.states._saved) == 2, "of the prompt, and the newest of the answer"
    say(chat, "b", [*PROMPT, *answer, 70])
    assert num_cached(chat, "b") == 48


def test_a_prompt_too_short_to_be_cut_costs_no_step() -> None:
    chat = hybrid()
    say(chat, "a", [1, 2, 3, 4, 5, 6, 7, 8, 9], 1)
    assert chat.engine.stats().num_steps_total == 1
    say(chat, "b", PROMPT[:16], 1)
    assert chat.engine.stats().num_steps_total == 3, "one was for the state behind 12 tokens"


@RUNNERS
def test_where_two_prompts_part_a_third_one_begins(runner: str) -> None:
    one = hybrid(runner)
    system = PROMPT[:20]
    found = {}
    for name, words in {"first": [41] * 20, "second": [42] * 20, "third": [43] * 20}.items():
        say(one, name, system + words)
        found[name] = num_cached(one, name)
    assert found == {"first": 0, "second": 0, "third": 20}


@RUNNERS
def test_equal_prompts_that_come_together_are_computed_once(runner: str) -> None:
    one = hybrid(runner)
    for index in range(4):
        one.add(Request(id=f"r{index}", prompt_ids=PROMPT, params=greedy(3)))
    one.finish()
    assert all(tokens(news) == expected(PROMPT, 3) for news in one.outputs.values())
    assert [num_cached(one, name) for name in one.outputs] == [0, 28, 28, 28]
    assert num_rows(one) == 30 + 3 * 2 + 4 * 2


def test_without_the_prefix_cache_nothing_is_saved_and_nobody_waits() -> None:
    one = hybrid(prefix_cache=False, max_num_batched_tokens=64)
    for name in "ab":
        one.add(Request(id=name, prompt_ids=PROMPT, params=greedy(20)))
    one.step()
    assert [len(tokens(news)) for news in one.outputs.values()] == [1, 1]
    one.finish()
    assert not one.engine.scheduler.states._saved
    say(one, "c", PROMPT)
    assert num_cached(one, "c") == 0


def test_saved_states_yield_to_those_who_run_and_the_oldest_first() -> None:
    one = hybrid(seats=3, max_num_batched_tokens=64)
    first, second = PROMPT, [50 + n for n in PROMPT]
    say(one, "a", first)
    say(one, "b", second)
    say(one, "uses a", [*first, 90])
    for name in ("x", "y"):
        one.add(Request(id=name, prompt_ids=[1], params=greedy(3)))
    one.finish()
    say(one, "b again", [*second, 90], 1)
    assert num_cached(one, "b again") == 0
    say(one, "a again", [*first, 91])
    assert num_cached(one, "a again") == 28


def test_where_all_seats_are_taken_no_prompt_is_cut() -> None:
    one = hybrid(seats=1, max_num_batched_tokens=64)
    say(one, "a", PROMPT, 1)
    assert one.engine.stats().num_steps_total == 1
    assert not one.engine.scheduler.states._saved


def test_the_last_seat_is_taken_over_with_the_state_in_it() -> None:
    one = hybrid(seats=2)
    say(one, "a", PROMPT)
    one.add(Request(id="long", prompt_ids=[1], params=greedy(7)))
    one.step()
    say(one, "b", PROMPT)
    assert num_cached(one, "b") == 28
    assert reason(one.outputs["long"]) == "length"


def test_a_state_whose_block_is_gone_goes_before_an_older_one() -> None:
    pool = BlockPool(6)
    seats = states.States(4, pool, 4)

    def computed(word: int) -> Sequence:
        """A sequence whose state is saved behind 8 of its tokens."""
        request = Request(id=f"{word}", prompt_ids=[word] * 10)
        made = Sequence(request, positions=torch.arange(10).expand(3, -1), offset=0, max_tokens=9, seed=0)
        seats.admit(made, 0)
        made.blocks = pool.allocate(2)
        made.num_computed, made.num_published = 8, 2
        for index, block in enumerate(made.blocks):
            pool.register(block, made.block_hash(index, 4))
        seats.save(made)
        return made

    older, newer = computed(1), computed(2)
    seats.leave(newer)
    pool.release(newer.blocks)
    pool.release(pool.allocate(4))
    third = computed(3)
    seats.check_integrity([older, third])
    assert [seats.reach(sequence, 2) for sequence in (older, newer, third)] == [2, 0, 2]


@RUNNERS
def test_who_is_preempted_goes_on_from_the_state_that_is_saved(runner: str) -> None:
    one = hybrid(runner, num_blocks=26, max_model_len=100)
    prompts = {name: [index + n for n in PROMPT] for index, name in enumerate("abc")}
    for name, prompt in prompts.items():
        one.add(Request(id=name, prompt_ids=prompt, params=greedy(24)))
    one.finish()
    assert one.engine.stats().num_preemptions_total > 0
    assert all(tokens(one.outputs[name]) == expected(prompt, 24) for name, prompt in prompts.items())
    off = hybrid(runner, num_blocks=26, max_model_len=100, prefix_cache=False)
    for name, prompt in prompts.items():
        off.add(Request(id=name, prompt_ids=prompt, params=greedy(24)))
    off.finish()
    assert num_rows(one) < num_rows(off)


@RUNNERS
def test_who_leaves_in_the_middle_leaves_what_was_saved(runner: str) -> None:
    one = hybrid(runner, max_num_batched_tokens=16)
    one.add(Request(id="leaves", prompt_ids=PROMPT, params=greedy(40)))
    for _ in range(5):
        one.step()
    one.engine.abort("leaves")
    one.finish()
    say(one, "stays", [*PROMPT, 5])
    assert num_cached(one, "stays") == 28


def test_a_picture_in_front_of_the_state_is_not_encoded_again_and_another_one_is_no_prefix() -> None:
    one = hybrid(vision_cache_gib=0.0)
    for name, fill, cached in (("a", 1, 0), ("b", 1, 28), ("c", 2, 0)):
        prompt = [3, *[101] * 20, *PROMPT[:9]]
        one.add(Request(id=name, prompt_ids=prompt, items=(image(1, 20, fill),), params=greedy(4)))
        one.finish()
        assert tokens(one.outputs[name]) == expected([3, *[8.0 * fill] * 20, *PROMPT[:9]], 4)
        assert num_cached(one, name) == cached
    assert one.engine.stats().num_items_encoded_total == 2


def test_who_waits_for_a_picture_behind_the_state_has_it_when_the_picture_is_there() -> None:
    one = hybrid()
    say(one, "a", PROMPT)
    prompt = [*PROMPT[:28], *[101] * 8, 1]
    one.add(Request(id="b", prompt_ids=prompt, items=(image(28, 8, 2),), params=greedy(4)))
    before = one.engine.stats().num_steps_total
    one.step()
    assert one.engine.stats().num_steps_total == before, "there is nothing to compute yet"
    one.finish()
    assert tokens(one.outputs["b"]) == expected([*PROMPT[:28], *[16.0] * 8, 1], 4)
    assert num_cached(one, "b") == 28


def test_no_state_is_saved_in_the_middle_of_a_block() -> None:
    one = hybrid()
    say(one, "a", PROMPT[:9], 3)
    say(one, "b", PROMPT)
    assert num_cached(one, "b") == 0


def test_a_tenant_finds_no_state_of_another() -> None:
    one = hybrid()
    for name, salt in (("a", "x"), ("b", "y"), ("c", "x")):
        one.add(Request(id=name, prompt_ids=PROMPT, params=greedy(4), cache_salt=salt))
        one.finish()
    assert [num_cached(one, name) for name in "abc"] == [0, 0, 28]


def test_who_wants_to_know_of_its_prompt_finds_nothing_and_leaves_its_state() -> None:
    one = hybrid()
    say(one, "a", PROMPT)
    one.add(Request(id="b", prompt_ids=PROMPT, params=greedy(2, prompt_logprobs=1)))
    one.finish()
    assert num_cached(one, "b") == 0
    assert sum(len(news.prompt_logprobs) for news in one.outputs["b"]) == len(PROMPT) - 1
    other = [5, *PROMPT]
    one.add(Request(id="c", prompt_ids=other, params=greedy(2, prompt_logprobs=1)))
    one.finish()
    say(one, "d", other)
    assert num_cached(one, "d") == 28


@searched(200)
@given(
    told=lives(longest_prefix=30),
    num_blocks=st.integers(20, 28),
    seats=st.integers(1, 8),
    runner=st.sampled_from(sorted(LIVES)),
    max_num_batched_tokens=st.sampled_from([5, 16, 64]),
    guesses=st.booleans(),
)
def test_random_lives_with_saved_states_say_what_those_without_say(
    told: list[Request | int | str],
    num_blocks: int,
    seats: int,
    runner: str,
    max_num_batched_tokens: int,
    guesses: bool,
) -> None:
    options: dict[str, Any] = {
        "max_model_len": 80,
        "max_num_batched_tokens": max_num_batched_tokens,
        "model": StatefulEcho if guesses else StatefulModel,
    }
    guessing: dict[str, Any] = {"speculative_config": NGRAM if guesses and seats > 1 else None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(states, "MIN_SPARED", 4)
        patch.setattr(states, "PROMPT_TAIL", 1)
        saving = lived(hybrid(runner, seats=seats, num_blocks=num_blocks, **options, **guessing), told)
    off = lived(hybrid(seats=seats, num_blocks=num_blocks, prefix_cache=False, **options), told)
    for name, news in saving.outputs.items():
        other = off.outputs[name]
        shorter = min(len(tokens(news)), len(tokens(other)))
        if "abort" not in (reason(news), reason(other)):
            assert (news[-1].finish, news[-1].vector) == (other[-1].finish, other[-1].vector)
            assert len(tokens(news)) == len(tokens(other))
        assert tokens(news)[:shorter] == tokens(other)[:shorter]
    event(f"guessed right: {saving.engine.stats().num_accepted_draft_tokens_total > 0}")
    event(f"found: {saving.engine.stats().num_cached_tokens_total > 0}")
    event(f"preempted: {saving.engine.stats().num_preemptions_total > 0}")


@searched(60)
@given(
    told=lives(longest_prefix=30),
    num_blocks=st.integers(20, 28),
    seats=st.integers(1, 8),
    chance=st.sampled_from([0.02, 0.2]),
    guesses=st.booleans(),
)
def test_random_lives_on_a_card_without_memory_change_no_state_twice(
    told: list[Request | int | str], num_blocks: int, seats: int, chance: float, guesses: bool
) -> None:
    told = [each for each in told if not isinstance(each, str)]
    options: dict[str, Any] = {"max_model_len": 80, "model": StatefulEcho if guesses else StatefulModel}
    guessing: dict[str, Any] = {"speculative_config": NGRAM if guesses and seats > 1 else None}
    undisturbed = lived(hybrid(seats=seats, num_blocks=num_blocks, **options), told)
    with out_of_memory(chance, num_blocks):
        one = lived(hybrid("cards", seats=seats, num_blocks=num_blocks, **options, **guessing), told)
    assert_same_up_to_errors(undisturbed, one)

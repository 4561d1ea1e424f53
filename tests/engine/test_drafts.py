"""What is guessed, and when a guess is worth its row."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashinfer_vlm.config import Speculation
from dashinfer_vlm.engine.cost import StepCost
from dashinfer_vlm.engine.drafts import LookupDrafter
from dashinfer_vlm.engine.scheduler import Scheduler
from dashinfer_vlm.engine.sequence import Sequence
from tests.engine.test_scheduler import arrive, carry_out, make_scheduler

VOCAB = 100


def drafter(num_tokens: int = 4, most: int = 4, least: int = 2) -> LookupDrafter:
    return LookupDrafter(
        Speculation(num_speculative_tokens=num_tokens, prompt_lookup_max=most, prompt_lookup_min=least), VOCAB
    )


def by_definition(tokens: list[int], num_tokens: int, most: int, least: int) -> list[int]:
    """The continuation of the latest of the longest matches."""
    for size in range(most, least - 1, -1):
        for stop in range(len(tokens) - 1, size - 1, -1):
            if tokens[stop - size : stop] == tokens[len(tokens) - size :]:
                grown = list(tokens)
                for place in range(stop, stop + num_tokens):
                    grown.append(grown[place])
                return grown[len(tokens) :]
    return []


@given(tokens=st.lists(st.integers(0, 3), min_size=1, max_size=24), least=st.integers(1, 3), wider=st.integers(0, 3))
def test_the_latest_of_the_longest_matches_is_continued(tokens: list[int], least: int, wider: int) -> None:
    made = drafter(4, least + wider, least)
    for length in range(1, len(tokens) + 1):
        expected = by_definition(tokens[:length], 4, least + wider, least)
        assert made.propose(tokens[:length], 4) == expected


def test_text_without_repetition_gives_no_guess() -> None:
    assert drafter().propose([1, 2, 3, 4, 5], 4) == []


def test_text_that_goes_round_is_guessed_beyond_its_end() -> None:
    assert drafter().propose([1, 2, 3, 1, 2, 3, 1, 2], 5) == [3, 1, 2, 3, 1]


def test_placeholders_are_never_guessed() -> None:
    assert drafter().propose([1, 2, 3, VOCAB, VOCAB, 4, 1, 2], 4) == [3]


def test_the_chance_follows_how_often_guesses_were_right() -> None:
    made = drafter()
    for _ in range(40):
        made.propose([1, 2, 3, 1, 2], 1)
        made.observe(3)
    assert made.chance > 0.95
    for _ in range(40):
        made.propose([1, 2, 3, 1, 2], 1)
        made.observe(4)
    assert made.chance < 0.05


def test_guesses_behind_a_wrong_one_teach_nothing() -> None:
    made = drafter()
    made.propose([1, 2, 3, 4, 1, 2], 2)
    made.observe(9)
    learnt = made.chance
    made.observe(9)
    assert made.chance == learnt


def repeating(scheduler: Scheduler, name: str, chance: float = 0.9) -> Sequence:
    """A sequence that has said 1 four times, and from now on guesses as many more as it may."""
    made = arrive(scheduler, name, 3)
    for _ in range(4):
        carry_out(scheduler, scheduler.schedule())
    made.drafter = drafter()
    made.drafter.chance = chance
    return made


def num_guesses(scheduler: Scheduler) -> list[int]:
    return [len(chunk.draft) for chunk in scheduler.schedule().chunks]


def test_cheap_rows_are_filled_with_guesses() -> None:
    scheduler = make_scheduler()
    repeating(scheduler, "a")
    scheduler.cost = StepCost(fixed_s=0.1, token_s=0.001)
    assert num_guesses(scheduler) == [4]


@pytest.mark.parametrize(("chance", "expected"), [(0.95, [4]), (0.6, [2]), (0.4, [1]), (0.1, [0])])
def test_a_guess_is_made_when_its_chance_is_worth_its_row(chance: float, expected: list[int]) -> None:
    """One row alone takes 0.125 s, and each further one 0.025 s."""
    scheduler = make_scheduler()
    repeating(scheduler, "a", chance)
    scheduler.cost = StepCost(fixed_s=0.1, token_s=0.025)
    assert num_guesses(scheduler) == expected


def test_where_every_row_costs_a_whole_step_nothing_is_guessed() -> None:
    scheduler = make_scheduler()
    repeating(scheduler, "a", 0.99)
    scheduler.cost = StepCost(fixed_s=0.0, token_s=0.1)
    assert num_guesses(scheduler) == [0]


def test_the_likelier_guesses_come_first_when_rows_are_few() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    unlikely, likely = repeating(scheduler, "unlikely"), repeating(scheduler, "likely")
    assert unlikely.drafter is not None
    assert likely.drafter is not None
    unlikely.drafter.chance, likely.drafter.chance = 0.5, 0.9
    scheduler.cost = StepCost(fixed_s=0.1, token_s=0.001)
    assert num_guesses(scheduler) == [0, 3], "half of the six rows that decoding leaves are for prompts"


def test_no_guess_lies_beyond_the_last_token_that_is_wanted() -> None:
    scheduler = make_scheduler()
    made = repeating(scheduler, "a")
    made.max_tokens = made.num_output + 2
    scheduler.cost = StepCost(fixed_s=0.1, token_s=0.001)
    assert num_guesses(scheduler) == [1]


def test_a_guess_takes_no_block_that_a_running_sequence_may_need() -> None:
    scheduler = make_scheduler()
    made = repeating(scheduler, "a")
    scheduler.cost = StepCost(fixed_s=0.1, token_s=0.001)
    room = len(made.blocks) * scheduler.block_size - len(made.tokens)
    assert room < 4
    held = scheduler.pool.allocate(scheduler.pool.num_free - 1)
    assert num_guesses(scheduler) == [room]
    scheduler.pool.release(held)
    assert num_guesses(scheduler) == [4]

"""Places are taken in turns: nobody waits for all that another one wants."""

from __future__ import annotations

import asyncio

import pytest
from tests.media.site import until

from dashinfer_vlm.media.turns import Turns


async def served(turns: Turns, parties: str) -> str:
    """The order in which those who ask in the order of `parties` get the only place, one after the other."""
    order: list[str] = []
    await turns.take("first")

    async def work(party: str) -> None:
        async with turns.place(party):
            order.append(party)
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(work(party)) for party in parties]
    await until(lambda: turns.num_waiting == len(parties))
    turns.give_back("first")
    await asyncio.gather(*tasks)
    return "".join(order)


async def test_parties_take_turns_however_much_each_wants() -> None:
    assert await served(Turns(1), "aaaabbc") == "abcabaa"
    assert await served(Turns(1), "aaaa") == "aaaa"
    assert await served(Turns(1, most_each=1), "aabb") == "abab"


async def test_who_has_just_had_a_place_is_not_next_again() -> None:
    turns = Turns(1)
    await turns.take("a")
    again, other = asyncio.create_task(turns.take("a")), asyncio.create_task(turns.take("b"))
    await until(lambda: turns.num_waiting == 2)
    turns.give_back("a")
    await other
    assert not again.done()
    turns.give_back("b")
    await again


async def test_a_free_place_goes_to_who_holds_the_fewest() -> None:
    turns = Turns(3)
    for party in "aab":
        await turns.take(party)
    order: list[str] = []

    async def take(party: str) -> None:
        await turns.take(party)
        order.append(party)

    tasks = [asyncio.create_task(take(party)) for party in "abc"]
    await until(lambda: turns.num_waiting == 3)
    for party in "aba":
        turns.give_back(party)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    assert order == ["c", "b", "a"]


async def test_nobody_holds_more_than_the_most_for_each() -> None:
    turns = Turns(4, most_each=2)
    await turns.take("a")
    await turns.take("a")
    third = asyncio.create_task(turns.take("a"))
    await asyncio.wait_for(turns.take("b"), 10)
    assert not third.done()
    turns.give_back("a")
    await asyncio.wait_for(third, 10)
    assert turns.free == 1


@pytest.mark.parametrize("in_time", [True, False])
async def test_who_leaves_the_line_or_with_a_place_leaves_none_behind(in_time: bool) -> None:
    turns = Turns(1)
    await turns.take("a")
    waiting = asyncio.create_task(turns.take("b"))
    await asyncio.sleep(0)
    if in_time:
        turns.give_back("a")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    if not in_time:
        turns.give_back("a")
    assert (turns.free, turns.num_waiting) == (1, 0)

"""Places are taken in turns: nobody waits for all that another one wants."""

from __future__ import annotations

import asyncio

import pytest
from tests.media.site import until

from dashinfer_vlm.media.turns import Party, Turns


def requests(names: str) -> list[Party]:
    """Requests of one owner, or with spaces between them such as `a1 b2` the second of b's."""
    return [Party(*name) for name in names.split()] if " " in names else [Party(None, name) for name in names]


async def served(turns: Turns, names: str) -> str:
    """The order in which those who ask in the order of `names` get the only place, one after the other."""
    order: list[str] = []
    first = Party("z", "first")
    await turns.take(first)

    async def work(name: str, party: Party) -> None:
        async with turns.place(party):
            order.append(name)
            await asyncio.sleep(0)

    separator = " " if " " in names else ""
    each = names.split() if separator else names
    tasks = [asyncio.create_task(work(*pair)) for pair in zip(each, requests(names), strict=True)]
    await until(lambda: turns.num_waiting == len(each))
    turns.give_back(first)
    await asyncio.gather(*tasks)
    return separator.join(order)


async def test_requests_take_turns_however_much_each_wants() -> None:
    assert await served(Turns(1), "aaaabbc") == "abcabaa"
    assert await served(Turns(1), "aaaa") == "aaaa"
    assert await served(Turns(1, most_each=1), "aabb") == "abab"


async def test_owners_take_turns_however_many_requests_each_has() -> None:
    assert await served(Turns(1), "a1 a2 a3 a4 b1 c1 c1") == "a1 b1 c1 a2 c1 a3 a4"


async def test_a_free_place_goes_to_the_owner_that_holds_the_fewest() -> None:
    turns = Turns(3)
    for party in requests("a1 a2 b1"):
        await turns.take(party)
    of_a, of_b = (asyncio.create_task(turns.take(party)) for party in requests("a3 b2"))
    await until(lambda: turns.num_waiting == 2)
    turns.give_back(Party("b", "1"))
    await of_b
    assert not of_a.done()
    turns.give_back(Party("a", "1"))
    await of_a


async def test_who_has_just_had_a_place_is_not_next_again() -> None:
    turns, (a, b) = Turns(1), requests("ab")
    await turns.take(a)
    again, other = asyncio.create_task(turns.take(a)), asyncio.create_task(turns.take(b))
    await until(lambda: turns.num_waiting == 2)
    turns.give_back(a)
    await other
    assert not again.done()
    turns.give_back(b)
    await again


async def test_a_free_place_goes_to_who_holds_the_fewest() -> None:
    turns = Turns(3)
    for party in requests("aab"):
        await turns.take(party)
    order: list[str] = []

    async def take(name: str) -> None:
        await turns.take(Party(None, name))
        order.append(name)

    tasks = [asyncio.create_task(take(name)) for name in "abc"]
    await until(lambda: turns.num_waiting == 3)
    for party in requests("aba"):
        turns.give_back(party)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    assert order == ["c", "b", "a"]


async def test_nobody_holds_more_than_the_most_for_each() -> None:
    turns, (a, b) = Turns(4, most_each=2), requests("ab")
    await turns.take(a)
    await turns.take(a)
    third = asyncio.create_task(turns.take(a))
    await asyncio.wait_for(turns.take(b), 10)
    assert not third.done()
    turns.give_back(a)
    await asyncio.wait_for(third, 10)
    assert turns.free == 1


@pytest.mark.parametrize("in_time", [True, False])
async def test_who_leaves_the_line_or_with_a_place_leaves_none_behind(in_time: bool) -> None:
    turns, (a, b) = Turns(1), requests("ab")
    await turns.take(a)
    waiting = asyncio.create_task(turns.take(b))
    await asyncio.sleep(0)
    if in_time:
        turns.give_back(a)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    if not in_time:
        turns.give_back(a)
    assert (turns.free, turns.num_waiting) == (1, 0)

"""Turns in the rounds of the event loop."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from kunserve.api.wire.turns import Turns


@pytest.mark.parametrize("per_round", [1, 2])
async def test_so_many_turns_a_round_in_order(per_round: int) -> None:
    turns, now, taken = Turns(per_round), 0, list[tuple[str, int]]()

    async def take(name: str) -> None:
        await turns.take()
        taken.append((name, now))

    tasks = [asyncio.create_task(take(name)) for name in "abcde"]
    await asyncio.sleep(0)
    tasks[2].cancel()  # its client has left
    while not all(task.done() for task in tasks):
        now += 1
        await asyncio.sleep(0)
    assert [name for name, _ in taken] == ["a", "b", "d", "e"]
    rounds = [at for _, at in taken]
    assert rounds == sorted(rounds) and max(Counter(rounds).values()) == per_round


async def test_a_turn_is_there_at_once_if_nobody_else_wants_it() -> None:
    turns = Turns()
    for _ in range(3):
        with pytest.raises(StopIteration):  # it ends in its first step: nothing is waited for
            turns.take().send(None)
        await asyncio.sleep(0)


async def test_work_that_nobody_waits_for_takes_turns_as_well() -> None:
    turns, now, done = Turns(2), 0, list[tuple[str, int]]()

    def run(name: str) -> None:
        turns.run(lambda: done.append((name, now)))

    for name in "abcde":
        run(name)
    assert done == [("a", 0), ("b", 0)]  # at once
    while len(done) < 5:
        now += 1
        await asyncio.sleep(0)
    assert [name for name, _ in done] == list("abcde")
    assert max(Counter(at for _, at in done).values()) == 2


class Panic(BaseException):
    """What Rust code raises when it panics."""


@pytest.mark.parametrize("failure", [ValueError(), Panic()])
async def test_a_turn_that_fails_is_told_and_keeps_nobody_from_theirs(failure: BaseException) -> None:
    turns, done, told = Turns(2), asyncio.Event(), list[object]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))

    def fail() -> None:
        raise failure

    turns.later(fail)
    turns.later(done.set)
    await done.wait()
    for _ in range(3):  # rounds that end the first, and one that begins anew
        await asyncio.sleep(0)
    await turns.take()
    assert told == [failure]


async def test_slices_take_turns_but_for_the_first() -> None:
    turns, seen = Turns(), list[tuple[str, list[int]]]()

    async def work(name: str) -> None:
        await turns.take()
        async for some in turns.slices(range(5), 2):
            seen.append((name, list(some)))

    await asyncio.gather(work("a"), work("b"))
    assert seen == [*(("a", [0, 1]), ("a", [2, 3]), ("b", [0, 1])), *(("a", [4]), ("b", [2, 3]), ("b", [4]))]

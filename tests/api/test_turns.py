"""One turn in a round of the event loop."""

from __future__ import annotations

import asyncio

from kunserve.api.turns import Turns


async def test_one_turn_a_round_in_order() -> None:
    turns, now, taken = Turns(), 0, list[tuple[str, int]]()

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
    assert rounds == sorted(set(rounds))


async def test_a_turn_is_there_at_once_if_nobody_else_wants_it() -> None:
    turns = Turns()
    for _ in range(3):
        taking = turns.take()
        try:
            taking.send(None)
        except StopIteration:
            await asyncio.sleep(0)
            continue
        raise AssertionError("it waited")

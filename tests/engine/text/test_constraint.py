from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from structures import EOS, constraint, ids_of, open_pool

from kunserve.engine.text.constraint import GrammarConstraint
from kunserve.errors import EngineError
from kunserve.grammar.pool import Pool


async def allowed(constraint: GrammarConstraint, num_accepted: int) -> set[int] | None:
    return await asyncio.to_thread(ids_of, constraint.mask(num_accepted))


async def take(constraint: GrammarConstraint, token_id: int) -> None:
    constraint.accept(token_id)
    await constraint.decided()


async def of_regex(pool: Pool, pattern: str, begins_after: int | None = None) -> GrammarConstraint:
    return await constraint(pool, ("regex", pattern), begins_after)


async def test_follows_the_grammar() -> None:
    async with open_pool() as pool:
        first = await of_regex(pool, "a(b|c)d?")
        assert await allowed(first, 0) == {ord("a")}
        await take(first, ord("a"))
        second = first.copy()
        assert await allowed(first, 1) == await allowed(first, 1) == {ord("b"), ord("c")}
        await take(first, ord("c"))
        assert await allowed(first, 2) == {ord("d"), EOS}
        assert not first.is_finished
        assert await allowed(second, 1) == {ord("b"), ord("c")}
        await take(first, ord("d"))
        assert first.is_finished or await allowed(first, 3) == {EOS}
        assert first.error is None
        await take(second, ord("x"))
        assert isinstance(second.error, EngineError) and "does not allow token" in second.error.message


async def test_the_mask_after_the_next_token_waits_for_it() -> None:
    with ThreadPoolExecutor(1) as device:
        async with open_pool() as pool:
            constraint = await of_regex(pool, "ab(c|d)e")
            assert await allowed(constraint, 0) == {ord("a")}
            waiting = device.submit(ids_of, constraint.mask(1))
            assert not waiting.done()
            await take(constraint, ord("a"))
            assert await asyncio.wrap_future(waiting) == {ord("b")}
            left = device.submit(constraint.mask(2))
            constraint.close()
            assert await asyncio.wrap_future(left) is None  # nobody needs it any more

            other = await of_regex(pool, "ab(c|d)e")
            last = device.submit(other.mask(1))
            await take(other, ord("x"))
            assert other.error is not None and "does not allow token" in other.error.message
            assert await asyncio.wrap_future(last) is None
            other.close()
            other.close()  # again: nothing happens


async def test_begins_after_the_reasoning() -> None:
    async with open_pool() as pool:
        constraint = await of_regex(pool, "ab", begins_after=270)
        for i, token in enumerate((5, 6, 7)):
            assert await allowed(constraint, i) is None
            await take(constraint, token)
        assert not constraint.is_finished
        ahead = constraint.mask(4)
        await take(constraint, 270)
        assert await allowed(constraint, 4) == {ord("a")} == ids_of(ahead)
        await take(constraint, ord("a"))
        assert await allowed(constraint, 5) == {ord("b")}

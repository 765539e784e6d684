"""Matchers whose process dies while it is started, or before they enter it, find the next one, or end with an error."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from structures import constraint, open_pool

from kunserve.errors import EngineError, KunServeError, OverloadedError
from kunserve.grammar.compiled import Compiled, Key
from kunserve.grammar.fork_server import ForkServer
from kunserve.grammar.matcher import MAX_DEATHS, Mask
from kunserve.grammar.pool import Pool
from kunserve.grammar.process import KILLED, Death, Process

KEY = ("regex", "[ab]{2,9}c")


class Starts:
    """A pool whose first starts come to something else. Implements `compiled.Processes`."""

    def __init__(self, pool: Pool, outcomes: list[Death | KunServeError | str]) -> None:
        self.is_closed, self.num_cores = False, 1
        self._pool, self._outcomes = pool, outcomes

    async def start(self, key: Key) -> Process | Death | KunServeError:
        """Start a process, unless another outcome is due; one that is "dead" ends before anybody enters it."""
        if not self._outcomes:
            return await self._pool.start(key)
        outcome = self._outcomes.pop(0)
        if isinstance(outcome, str):
            process = await self._pool.start(key)
            assert isinstance(process, Process)
            process.end()
            return process
        await asyncio.sleep(0)
        return outcome

    def refuse(self, key: Key, text: str) -> None:
        """Nothing is its own fault here."""
        raise AssertionError

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """As the pool does."""
        return self._pool.spawn(work)


async def followed(outcomes: list[Death | KunServeError | str]) -> list[tuple[set[str], KunServeError | None]]:
    """What three matchers are told after a token, when their process has died and starts come to `outcomes`."""
    async with open_pool() as pool:
        process = await pool.start(KEY)
        assert isinstance(process, Process)
        compiled = Compiled(Starts(pool, outcomes), KEY, process)
        matchers = [compiled.matcher() for _ in range(3)]
        process.end()
        masks = [Mask() for _ in matchers]
        for matcher, mask in zip(matchers, masks, strict=True):
            matcher.advance(ord("a"), mask)
        async with asyncio.timeout(60):
            for matcher in matchers:
                await matcher.decided()
            words = [await asyncio.wrap_future(mask) for mask in masks]
        return [
            ({char for char in "abc" if w is not None and w[ord(char) >> 5] >> (ord(char) & 31) & 1}, m.error)
            for w, m in zip(words, matchers, strict=True)
        ]


@pytest.mark.parametrize("outcomes", [[], [KILLED], ["dead"], [KILLED, "dead", KILLED], ["dead"] * (MAX_DEATHS - 1)])
async def test_matchers_find_the_next_process(outcomes: list[Death | KunServeError | str]) -> None:
    assert await followed(outcomes) == [({"a", "b"}, None)] * 3


async def test_matchers_of_processes_that_are_killed_again_and_again_end() -> None:
    for _, error in await followed([KILLED] * MAX_DEATHS):
        assert isinstance(error, OverloadedError)


async def test_matchers_end_when_no_process_can_be_started() -> None:
    for _, error in await followed([EngineError("no vocabulary")]):
        assert str(error) == "no vocabulary"


async def test_a_start_that_fails_in_a_way_that_nobody_foresaw_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_pool() as pool:
        (await constraint(pool, KEY)).close()

        async def fork(_: ForkServer) -> None:
            raise OSError("too many open files")

        monkeypatch.setattr(ForkServer, "fork", fork)
        error = await pool.start(KEY)
        assert isinstance(error, EngineError) and "too many open files" in str(error)

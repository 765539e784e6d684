"""In the server: a structure that was compiled once, and the processes that hold it now; perhaps none."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING

import numpy as np

from kunserve.errors import KunServeError, OverloadedError
from kunserve.grammar.matcher import Mask, Matcher
from kunserve.grammar.process import Death, Process

if TYPE_CHECKING:
    from kunserve.grammar.pool import Key, Pool

STOPPING = "the server is stopping"
MATCHERS_PER_PROCESS = 8  # before another process is started, up to one for each core


class Compiled:
    """One structure. Made by `Pool.compile`."""

    def __init__(self, pool: Pool, key: Key, process: Process) -> None:
        self._pool, self.key = pool, key
        self._first_mask = np.frombuffer(process.first_mask, np.uint32)
        self.processes = [process]
        self._numbers = itertools.count()
        self._entering: list[Matcher] = []  # when the process is there that is being started
        self._starting: asyncio.Task[None] | None = None

    def new_number(self) -> int:
        """Return a number for one of its matchers."""
        return next(self._numbers)

    def first_mask(self) -> Mask:
        """Return the mask of the first token."""
        mask = Mask()
        mask.set_result(self._first_mask)
        return mask

    def matcher(self) -> Matcher:
        """Return a new request's place: the beginning."""
        return Matcher(self)

    def place(self, matcher: Matcher, is_alone: bool = False) -> None:
        """Find a process for a matcher that waits, or start one: for it alone, or for all that come meanwhile."""
        if self._pool.is_closed:
            matcher.fail(OverloadedError(STOPPING, retry_after_s=5))
            return
        if is_alone:
            self._pool.spawn(self._start_alone(matcher))
            return
        self.processes = [process for process in self.processes if process.is_alive]
        if not self.processes:
            self._entering.append(matcher)
            self._start()
            return
        process = min(self.processes, key=lambda process: len(process.followers))
        matcher.enter(process)
        if len(process.followers) > MATCHERS_PER_PROCESS and len(self.processes) < self._pool.num_cores:
            self._start()

    def refuse(self, text: str) -> None:
        """It has ended processes: it is not used again."""
        self._pool.refuse(self.key, text)

    def _start(self) -> None:
        if self._starting is None or self._starting.done():
            self._starting = self._pool.spawn(self._start_shared())

    async def _start_shared(self) -> None:
        process, entering = await self._pool.start(self.key), self._entering
        self._entering = []
        if isinstance(process, Process):
            self.processes.append(process)
        for matcher in entering:
            _enter(matcher, process, is_alone=False)

    async def _start_alone(self, matcher: Matcher) -> None:
        _enter(matcher, await self._pool.start(self.key), is_alone=True)


def _enter(matcher: Matcher, process: Process | Death | KunServeError, is_alone: bool) -> None:
    if isinstance(process, Process):
        matcher.enter(process, is_alone)
    elif isinstance(process, Death):
        matcher.not_followed(process)
    else:
        matcher.fail(process)

"""In the server: a structure that was compiled once, and the processes that hold it now; perhaps none."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine
from typing import Any, Protocol

import numpy as np

from kunserve.errors import KunServeError, OverloadedError
from kunserve.grammar.matcher import Mask, Matcher
from kunserve.grammar.process import Death, Process

STOPPING = "the server is stopping"
MATCHERS_PER_PROCESS = 8  # before another process is started, up to one for each core

Key = tuple[str, str]  # kind and value of a structure, as `Structure` of the API has them


class Processes(Protocol):
    """Where a structure's processes come from: the pool."""

    is_closed: bool
    num_cores: int

    async def start(self, key: Key) -> Process | Death | KunServeError:
        """Compile a structure again, at once: the process that holds it, or what went wrong."""

    def refuse(self, key: Key, text: str) -> None:
        """Do not try this structure again."""

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `work` until it is done or the pool is closed."""


class Compiled:
    """One structure. Made by `Pool.compile`. Implements `matcher.ProcessFinder`."""

    def __init__(self, pool: Processes, key: Key, process: Process) -> None:
        self._pool, self.key = pool, key
        self._first_mask = np.frombuffer(process.first_mask, np.uint32)
        self.processes = [process]
        self._numbers = itertools.count()
        self._entering: list[Matcher] = []  # when the process is there that is being started
        self._starting: asyncio.Task[None] | None = None

    def new_number(self) -> int:
        """See `ProcessFinder.new_number`."""
        return next(self._numbers)

    def first_mask(self) -> Mask:
        """See `ProcessFinder.first_mask`."""
        mask = Mask()
        mask.set_result(self._first_mask)
        return mask

    def matcher(self) -> Matcher:
        """Return a new request's position: the beginning."""
        return Matcher(self)

    def find_process(self, matcher: Matcher, is_alone: bool = False) -> None:
        """See `ProcessFinder`. A process that is started for it takes in all matchers that come meanwhile."""
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
        """See `ProcessFinder.refuse`."""
        self._pool.refuse(self.key, text)

    def _start(self) -> None:
        if self._starting is None or self._starting.done():
            self._starting = self._pool.spawn(self._start_shared())

    async def _start_shared(self) -> None:
        while True:
            process, entering = await self._pool.start(self.key), self._entering
            self._entering = []
            if isinstance(process, Process):
                self.processes.append(process)
            for matcher in entering:
                _enter(matcher, process, is_alone=False)
            if not self._entering:
                return  # else the process has died already, and its matchers wait for the next: nobody else starts it

    async def _start_alone(self, matcher: Matcher) -> None:
        _enter(matcher, await self._pool.start(self.key), is_alone=True)


def _enter(matcher: Matcher, process: Process | Death | KunServeError, is_alone: bool) -> None:
    if isinstance(process, Process):
        matcher.enter(process, is_alone)
    elif isinstance(process, Death):
        matcher.not_followed(process)
    else:
        matcher.fail(process)

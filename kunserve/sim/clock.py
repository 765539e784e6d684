"""An event loop whose clock jumps: when nothing is ready, it is at once the time of the next timer.

Everything that waits for time alone runs on it unchanged, and always in the same order. There is nothing else to wait
for: no sockets, no signals, no threads. What is sent to a pool of threads runs at once, on the loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context
from heapq import heappop, heappush
from typing import Any, TypeVar, TypeVarTuple, Unpack

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

RESOLUTION_S = 1e-9  # timers no further apart are due together, as in any loop of asyncio


class DeadlockError(RuntimeError):
    """Nothing is ready and no timer is set: whoever still waits would wait for ever."""


class VirtualLoop(asyncio.BaseEventLoop):
    """A loop whose time is simulated, in seconds from 0. A step of an engine is a few rounds of it, so they are short.

    Timers of the same time are due in the order in which they were set.
    """

    _ready: deque[asyncio.Handle]  # BaseEventLoop's own: what `call_soon` was given
    _stopping: bool

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []  # a heap: due, how many were set before
        self._num_timers = 0

    def time(self) -> float:
        """Return the simulated seconds since the loop was made."""
        return self._now

    def call_at(
        self, when: float, callback: Callable[[Unpack[Ts]], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """Call back when it is that time."""
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._num_timers += 1
        heappush(self._timers, (when, self._num_timers, timer))
        return timer

    def run_in_executor(self, executor: Any, func: Callable[[Unpack[Ts]], T], *args: *Ts) -> asyncio.Future[T]:
        """Run `func` now: a simulation has no threads."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def _run_once(self) -> None:
        """Run one round of `run_forever`: all that is ready; if nothing is, let time pass first."""
        ready, timers = self._ready, self._timers
        if not ready and not self._stopping:
            self._jump()
        while timers and timers[0][0] <= self._now + RESOLUTION_S:
            ready.append(heappop(timers)[2])
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle.cancelled():
                handle._run()

    def _write_to_self(self) -> None:
        """Do nothing: `call_soon_threadsafe` asks for it, but no other thread could wake this loop."""

    def _jump(self) -> None:
        """Advance to the time of the next timer."""
        timers = self._timers
        while timers and timers[0][2].cancelled():
            heappop(timers)
        if not timers:
            raise DeadlockError(f"nothing will ever happen after {self._now:.3f} s of simulated time")
        self._now += max(0.0, timers[0][0] - self._now)


def simulate(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` to its end in simulated time, as `asyncio.run` does in real time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)

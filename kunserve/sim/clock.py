"""An event loop whose clock jumps: when nothing is ready, it is at once the time of the next timer.

Everything that waits for time alone runs on it unchanged, and always in the same order. There is nothing else to wait
for: no sockets, no signals, no threads. What is sent to a pool of threads runs at once, on the loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, TypeVarTuple, Unpack

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class DeadlockError(RuntimeError):
    """Nothing is ready and no timer is set: whoever still waits would wait for ever."""


class _Jump:
    """Stands for a selector: instead of waiting, it moves the clock."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[Any]:
        """Let `timeout` seconds pass; no event ever comes from outside."""
        if timeout is None:
            raise DeadlockError(f"nothing will ever happen after {self._loop.time():.3f} s of simulated time")
        self._loop.advance(max(0.0, timeout))
        return []


class VirtualLoop(asyncio.BaseEventLoop):
    """A loop whose time is simulated, in seconds from 0."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._selector = _Jump(self)  # what BaseEventLoop waits on

    def time(self) -> float:
        """Simulated seconds since the loop was made."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._now += seconds

    def run_in_executor(self, executor: Any, func: Callable[[Unpack[Ts]], T], *args: *Ts) -> asyncio.Future[T]:
        """Run `func` now: a simulation has no threads."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def _process_events(self, event_list: list[Any]) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nobody else could wake the loop."""


def simulate(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` to its end in simulated time, as `asyncio.run` does in real time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)

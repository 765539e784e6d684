"""A work queue on a thread of its own: what stands for a stream on devices that have none."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")

LAST_WAIT_S = 0.5  # for the threads of a lost device, before its memory is left to the end of the process


class WorkQueue:
    """Runs submitted work in order on one thread, optionally pinned to one core."""

    def __init__(self, name: str, core: int | None = None) -> None:
        def pin() -> None:
            if core is not None:
                os.sched_setaffinity(0, {core})  # 0: the calling thread

        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name, initializer=pin)

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work` after everything submitted before. Once begun it is not interrupted: a cancelled caller waits."""
        return await to_the_end(asyncio.wrap_future(self._threads.submit(work)))

    def begin(self, work: Callable[[], None]) -> None:
        """Have `work` run after everything submitted before. Nobody hears of its end, nor of its errors."""
        self._threads.submit(work)

    def abandon(self) -> None:
        """Begin nothing more, and wait for nothing."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def has_ended(self, timeout_s: float) -> bool:
        """Return whether the thread of an abandoned queue has ended, at the latest after so many seconds."""
        threads = list(self._threads._threads)
        for thread in threads:
            thread.join(timeout_s)
        return not any(thread.is_alive() for thread in threads)

    def close(self) -> None:
        """Wait for what runs and end the thread."""
        self._threads.shutdown(wait=True)


async def to_the_end(work: Awaitable[T]) -> T:
    """Return what `work` returns. A caller that is cancelled, however often, goes on only when `work` has ended.

    Else the memory that a thread or a stream works on would be given to others under it.
    """
    running = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        while not running.done():
            with suppress(asyncio.CancelledError):  # once more: the first one is raised below
                await asyncio.wait([running])
        if not running.cancelled():
            running.exception()  # seen: the caller is gone
        raise


async def gather_all(awaitables: Iterable[Awaitable[T]]) -> list[T]:
    """Wait for all of them, whatever happens to one; then raise the first error."""
    results = await asyncio.gather(*awaitables, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]

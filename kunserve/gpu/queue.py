"""A work queue on a thread of its own: what stands for a stream on devices that have none."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class WorkQueue:
    """Runs submitted work in order on one thread, optionally pinned to one core."""

    def __init__(self, name: str, core: int | None = None) -> None:
        def pin() -> None:
            if core is not None:
                os.sched_setaffinity(0, {core})  # 0: the calling thread

        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name, initializer=pin)

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work` after everything submitted before. Once begun it is not interrupted: a cancelled caller waits."""
        future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])  # the memory it works on must not change under it
            raise

    def close(self) -> None:
        """Wait for what runs and end the thread."""
        self._threads.shutdown(wait=True)


async def gather_all(awaitables: Iterable[Awaitable[T]]) -> list[T]:
    """Wait for all of them, whatever happens to one; then raise the first error."""
    results = await asyncio.gather(*awaitables, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]

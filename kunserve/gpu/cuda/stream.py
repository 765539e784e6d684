"""A CUDA stream as a work queue: one thread launches, another waits for events, and the event loop never does.

Prior art: vLLM and SGLang launch from the thread that schedules. Here that thread is the event loop's, and a launch
may block (a full stream queue, a plan, a compilation), so that each stream has a launcher. Completion is seen by a
thread that sleeps in cuEventSynchronize; a host callback (cuLaunchHostFunc) would need the interpreter lock inside the
driver's own thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from kunserve.errors import DeviceError, DeviceLostError
from kunserve.gpu.cuda.driver import Driver, Event, Stream
from kunserve.gpu.queue import WorkQueue, to_the_end

T = TypeVar("T")


@dataclass(slots=True)
class Launched(Generic[T]):
    """What launched work returned. Tensors in it may be used on other streams after `ready`, on the host too.

    Until it is finished it keeps what the work came `after`, whose tensors it may read: as soon as nobody has them,
    torch gives their memory to others. To tell torch which streams read them (`record_stream`) would let it record
    events when they go, and that ends the process where their GPU has faulted.
    """

    value: T
    ready: Event
    after: tuple[Launched[Any], ...] = ()
    begun: Event | None = None  # of work that is timed: when the stream came to it
    seconds: float = 0.0  # how long that took, once it is finished


class StreamQueue:
    """Work in order on one stream. `launch` returns when work is on its way, `run` when its results are there."""

    def __init__(self, driver: Driver, name: str) -> None:
        self._driver = driver
        self.stream: Stream = driver.take_stream()
        self._launcher, self._waiter = WorkQueue(f"{name}-launch"), WorkQueue(f"{name}-wait")
        self._launching = threading.RLock()  # whoever holds it is the only one to launch

    async def launch(
        self, work: Callable[[], T], after: Sequence[Launched[Any]] = (), *, is_timed: bool = False
    ) -> Launched[T]:
        """Launch `work` behind all launched here before, and behind `after`, on any stream: it may read their values.

        What `work` raises comes out when whatever it had launched is done: nothing runs on behind the error.
        """

        def launch_now() -> Launched[T]:
            with self.lent():
                for other in after:
                    self._driver.wait(self.stream, other.ready)
                begun = self._driver.record(self.stream, is_timed=True) if is_timed else None
                try:
                    value = work()
                except BaseException:
                    self._driver.synchronize(self.stream)
                    raise
                return Launched(value, self._driver.record(self.stream, is_timed=is_timed), tuple(after), begun)

        return await self._launcher.run(launch_now)

    async def finish(self, launched: Launched[T]) -> T:
        """Wait for what was launched here. DeviceLostError if a kernel has faulted."""
        try:
            await self._waiter.run(partial(self._driver.synchronize_event, launched.ready))
            if launched.begun is not None:
                launched.seconds = self._driver.seconds(launched.begun, launched.ready)
        except DeviceError as error:
            raise DeviceLostError(error.message) from error
        launched.after = ()
        return launched.value

    async def run(self, work: Callable[[], T], after: Sequence[Launched[Any]] = ()) -> T:
        """Launch and finish. A cancelled caller waits: the memory in use must not change under the work."""

        async def launch_and_finish() -> T:
            return await self.finish(await self.launch(work, after))

        return await to_the_end(launch_and_finish())

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Lend the stream to this thread inside: nobody else launches on it."""
        with self._launching, self._driver.on(self.stream):
            yield

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Keep the stream idle inside, and launch nothing. Blocks until what runs is done."""
        with self._launching:
            self._driver.synchronize(self.stream)
            yield

    def abandon(self) -> None:
        """Launch nothing more, and wait for nothing."""
        self._launcher.abandon()
        self._waiter.abandon()

    def has_ended(self, timeout_s: float) -> bool:
        """Return whether the threads of an abandoned stream have ended, each after so many seconds at the latest."""
        return all(queue.has_ended(timeout_s) for queue in (self._launcher, self._waiter))

    def close(self) -> None:
        """Wait for everything, end the threads and give the stream back."""
        self._launcher.close()
        self._waiter.close()
        try:
            self._driver.synchronize(self.stream)
        finally:
            self._driver.return_stream(self.stream)

"""Watched devices: whoever waits for one waits only as long as it lives.

A device may die or hang for ever, and a thread or a driver that hangs cannot be ended. So nobody waits for the device
itself: they wait for an answer, which is the device's, or, once it is lost, an error. What a lost device does later
changes nothing: nobody reads it, and its memory stays mapped as it is until its threads have ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

from kunserve.errors import DeviceLostError
from kunserve.gpu.copies import BlockCopy
from kunserve.gpu.device import Device
from kunserve.gpu.queue import answer_of

T = TypeVar("T")


class Watcher(Protocol):
    """Looks after devices (engine/survive/health.py)."""

    def has_work(self) -> None:
        """Hear that a device that had no work gets some."""

    def lost(self, device: WatchedDevice, reason: str) -> None:
        """Hear, once, that a device is lost; nobody waits for it any more."""


class Silence(NamedTuple):
    """The seconds for which a device has ended no work of a kind; 0 if it has none of that kind."""

    compute_s: float
    copy_s: float  # between devices, or between one and host memory
    load_s: float  # of weights, which may come from a disk


class _Line:
    """Work of one kind of a device that has not ended, and how long none of it has."""

    def __init__(self) -> None:
        self.waiting: set[asyncio.Future[Any]] = set()
        self.silent_s = 0.0


class WatchedDevice:
    """A device, with callers that go on when it is lost. Implements `Device` over another one.

    One that is lost stays so. Whatever comes into its place is another object, and knows nothing of its work.
    """

    def __init__(self, inner: Device) -> None:
        self.inner, self.is_lost = inner, False
        self.name, self.torch_device = inner.name, inner.torch_device
        self.chunk_bytes, self.num_chunks = inner.chunk_bytes, inner.num_chunks
        self.has_faulted = False  # it said itself that it is lost, in the middle of its work
        self.watcher: Watcher | None = None
        self._compute, self._copies, self._loads = self._lines = _Line(), _Line(), _Line()

    # --- life and death -----------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Return whether anybody waits for the device."""
        return any(line.waiting for line in self._lines)

    def tick(self, elapsed_s: float) -> Silence:
        """Note that so many seconds went by."""
        for line in self._lines:
            line.silent_s = line.silent_s + elapsed_s if line.waiting else 0.0
        return Silence(*(line.silent_s for line in self._lines))

    def lose(self, reason: str) -> None:
        """Give the device up: all who wait for it, now or later, get a DeviceLostError. Idempotent."""
        if self.is_lost:
            return
        self.is_lost = True
        self.inner.abandon()
        for line in self._lines:
            for answer in [answer for answer in line.waiting if not answer.done()]:
                answer.set_exception(DeviceLostError(f"{self.name} is lost: {reason}"))
            line.waiting.clear()
        if self.watcher is not None:
            self.watcher.lost(self, reason)

    def abandon(self) -> None:
        """See `Device.abandon`."""
        self.lose("it was given up")

    async def at_rest(self) -> None:
        """Return when all that was asked for has ended, or the device is lost."""
        while waiting := [answer for line in self._lines for answer in line.waiting]:
            await asyncio.wait(waiting)

    async def wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what `work` on the compute queue returns, or raise what it raises; DeviceLostError if it is lost."""
        if self.is_lost:
            work.close()
        return await self._wait_for(self._compute, lambda: work)

    async def _wait_for(self, line: _Line, begin: Callable[[], Awaitable[T]]) -> T:
        if self.is_lost:
            raise DeviceLostError(f"{self.name} is lost")
        if self.watcher is not None and not self.has_work:
            self.watcher.has_work()
        answer = answer_of(begin())
        line.waiting.add(answer)
        answer.add_done_callback(partial(self._ended, line))
        return await answer

    def _ended(self, line: _Line, answer: asyncio.Future[Any]) -> None:
        line.waiting.discard(answer)
        line.silent_s = 0.0
        if not (self.is_lost or answer.cancelled()) and isinstance(error := answer.exception(), DeviceLostError):
            self.has_faulted = True
            self.lose(error.message)

    # --- as a device --------------------------------------------------------------------------------------------

    def reserve(self, num_bytes: int) -> int:
        """See `Device.reserve`."""
        return self.inner.reserve(num_bytes)

    def release(self, address: int, num_bytes: int) -> None:
        """See `Device.release`."""
        self.inner.release(address, num_bytes)

    def map(self, address: int, chunks: Sequence[int]) -> None:
        """See `Device.map`."""
        self.inner.map(address, chunks)

    def unmap(self, address: int, num_chunks: int) -> None:
        """See `Device.unmap`."""
        self.inner.unmap(address, num_chunks)

    def tensor(self, address: int, num_bytes: int) -> Tensor:
        """See `Device.tensor`."""
        return self.inner.tensor(address, num_bytes)

    async def run(self, work: Callable[[], T]) -> T:
        """See `Device.run`."""
        return await self._wait_for(self._compute, partial(self.inner.run, work))

    async def run_copy(self, work: Callable[[], T]) -> T:
        """See `Device.run_copy`."""
        return await self._wait_for(self._loads, partial(self.inner.run_copy, work))

    async def copy(
        self, copies: Sequence[BlockCopy], source: Device | None = None, *, is_to_host: bool = False
    ) -> None:
        """See `Device.copy`."""
        real = None if source is None else _alive(source)
        await self._wait_for(self._copies, partial(self.inner.copy, copies, real, is_to_host=is_to_host))

    async def copy_tensor(self, read: Tensor, write: Tensor, source: Device) -> None:
        """See `Device.copy_tensor`."""
        await self._wait_for(self._copies, partial(self.inner.copy_tensor, read, write, _alive(source)))

    def copies_have_ended(self, timeout_s: float) -> bool:
        """See `Device.copies_have_ended`."""
        return self.inner.copies_have_ended(timeout_s)

    def close(self) -> None:
        """See `Device.close`."""
        self.inner.close()


def _alive(source: Device) -> Device:
    """Return the device that is to be copied from; DeviceLostError if it is lost, and its memory perhaps another's."""
    if source.is_lost:
        raise DeviceLostError(f"{source.name} is lost")
    return source.inner if isinstance(source, WatchedDevice) else source

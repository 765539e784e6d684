"""Fault injection: virtual CPU devices that fail, hang or get lost when they are told to.

For tests and for `--inject-faults`, which say so in the words of `kunserve/faults.py`. A device that has a fault stands
behind a proxy; nothing above the device protocol knows of it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import TypeVar

import structlog
from torch import Tensor

from kunserve.errors import DeviceError, DeviceLostError
from kunserve.faults import ANY_EXCHANGE, Fault, FaultKind
from kunserve.gpu.copies import BlockCopy
from kunserve.gpu.device import Device

T = TypeVar("T")

HANG_S = 2.0  # of a hang that ends by itself
SLOWNESS = 10  # a slow device sleeps so many times what its work took

log = structlog.get_logger()


class Faults:
    """The faults of a machine, the clock that they wait for, and the devices that have them.

    `phases` tells at which steps the transitions are that run now, as "drop.remap". It is called on whatever thread
    uses a device.
    """

    def __init__(self, faults: Iterable[Fault] = (), phases: Callable[[], Collection[str]] = lambda: ()) -> None:
        self.phases = phases
        self._faults = tuple(faults)
        self._devices: list[FaultyDevice] = []
        self._begun_s: float | None = None

    def begin(self) -> None:
        """Start the clock: work is here, the first request's unless a transition runs. Idempotent."""
        if self._begun_s is None and not self.phases():
            self._begun_s = time.monotonic()

    def wrap(self, index: int, device: Device) -> Device:
        """Return the device with its faults. Those without any are wrapped, too: their steps start the clock."""
        if not self._faults:
            return device
        own = [fault for fault in self._faults if fault.device == index]
        faulty = FaultyDevice(device, own, self.is_due, self.begin)
        self.add(faulty)
        return faulty

    def add(self, device: FaultyDevice) -> None:
        """Let what hangs on a device go on with all others'."""
        self._devices.append(device)

    def is_due(self, fault: Fault) -> bool:
        """Tell whether the moment of a fault is now, or its time has come."""
        if isinstance(fault.when, str):
            phases = self.phases()
            return fault.when in phases or (
                fault.when == ANY_EXCHANGE and any(phase.endswith(f".{ANY_EXCHANGE}") for phase in phases)
            )
        return self._begun_s is not None and time.monotonic() - self._begun_s >= fault.when

    def release(self) -> None:
        """Let everything go on that hangs; nothing hangs from now on. Idempotent."""
        for device in self._devices:
            device.let_go()


class FaultyDevice:
    """The device `inner`, until one of its faults is due. A fault that is due at a call stays so from then on."""

    def __init__(
        self,
        inner: Device,
        faults: Sequence[Fault],
        is_due: Callable[[Fault], bool],
        on_run: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_run = on_run
        self.inner = inner
        self.name, self.torch_device = inner.name, inner.torch_device
        self.chunk_bytes, self.num_chunks, self.is_lost = inner.chunk_bytes, inner.num_chunks, inner.is_lost
        self._is_due = is_due
        self._to_come, self._kinds = list(faults), set[FaultKind]()
        self._lock = threading.Lock()  # of these two: work on the device's threads calls `map`
        self._released = threading.Event()
        self.hang_ends_s = 0.0  # of a hang that ends by itself, on the clock of `time.monotonic`

    def let_go(self) -> None:
        """Let work go on that hangs, and let none hang from now on."""
        self._released.set()

    def reserve(self, num_bytes: int) -> int:
        """See `Device.reserve`."""
        self._due()
        return self.inner.reserve(num_bytes)

    def release(self, address: int, num_bytes: int) -> None:
        """See `Device.release`."""
        self._due()
        self.inner.release(address, num_bytes)

    def map(self, address: int, chunks: Sequence[int]) -> None:
        """See `Device.map`."""
        if FaultKind.MAP_FAILS in self._due():
            raise DeviceError(f"{self.name}: map failed (an injected fault)")
        self.inner.map(address, chunks)

    def unmap(self, address: int, num_chunks: int) -> None:
        """See `Device.unmap`."""
        self._due()
        self.inner.unmap(address, num_chunks)

    def tensor(self, address: int, num_bytes: int) -> Tensor:
        """See `Device.tensor`."""
        self._due()
        return self.inner.tensor(address, num_bytes)

    async def run(self, work: Callable[[], T]) -> T:
        """See `Device.run`."""
        return await self.inner.run(self.faulty(work))

    def faulty(self, work: Callable[[], T]) -> Callable[[], T]:
        """Return `work` of the compute queue with the faults that are due now."""
        self._on_run()
        due = self._due(FaultKind.RAISE, FaultKind.HANG_THEN_RETURN)

        def faulty() -> T:
            self._hang(due)
            if due & {FaultKind.RAISE, FaultKind.RAISE_ALWAYS}:
                raise RuntimeError(f"{self.name}: work failed (an injected fault)")
            started_s = time.monotonic()
            result = work()
            if FaultKind.SLOW in due:
                time.sleep(SLOWNESS * (time.monotonic() - started_s))
            return result

        return faulty

    async def run_copy(self, work: Callable[[], T]) -> T:
        """See `Device.run_copy`."""
        due = self._due(FaultKind.HANG_THEN_RETURN)

        def faulty() -> T:
            self._begin_copy(due)
            return work()

        return await self.inner.run_copy(faulty)

    async def copy(
        self, copies: Sequence[BlockCopy], source: Device | None = None, *, is_to_host: bool = False
    ) -> None:
        """See `Device.copy`."""
        await self.inner.run_copy(partial(self._begin_copy, self._due(FaultKind.HANG_THEN_RETURN)))
        await self.inner.copy(copies, None if source is None else _without_faults(source), is_to_host=is_to_host)

    async def copy_tensor(self, read: Tensor, write: Tensor, source: Device) -> None:
        """See `Device.copy_tensor`."""
        await self.inner.run_copy(partial(self._begin_copy, self._due(FaultKind.HANG_THEN_RETURN)))
        await self.inner.copy_tensor(read, write, _without_faults(source))

    def abandon(self) -> None:
        """See `Device.abandon`."""
        self.is_lost = True
        self.inner.abandon()

    def copies_have_ended(self, timeout_s: float) -> bool:
        """See `Device.copies_have_ended`."""
        return self.inner.copies_have_ended(timeout_s)

    def close(self) -> None:
        """See `Device.close`. What hangs goes on first: else its queue would never end."""
        self.let_go()
        self.inner.close()

    def _due(self, *once: FaultKind) -> frozenset[FaultKind]:
        """Return the kinds of the faults that are due; those in `once` are due no more afterwards.

        DeviceLostError if the device is lost.
        """
        with self._lock:
            for fault in [fault for fault in self._to_come if self._is_due(fault)]:
                log.warning("injecting a fault", device=self.name, fault=str(fault))
                self._to_come.remove(fault)
                self._kinds.add(fault.kind)
            due = frozenset(self._kinds)
            if FaultKind.LOST in due:
                raise DeviceLostError(f"{self.name} is lost (an injected fault)")
            self._kinds.difference_update(once)
        return due

    def _hang(self, due: Collection[FaultKind]) -> None:
        """Keep a thread of the device as long as work hangs that comes with these faults."""
        if FaultKind.HANG in due:
            self._released.wait()
        if FaultKind.HANG_THEN_RETURN in due:
            self.hang_ends_s = time.monotonic() + HANG_S
        if (left_s := self.hang_ends_s - time.monotonic()) > 0:  # work of the other queue, too
            self._released.wait(left_s)

    def _begin_copy(self, due: Collection[FaultKind]) -> None:
        """Do what goes wrong before a copy, on its thread."""
        self._hang(due)
        if FaultKind.RAISE_ALWAYS in due:
            raise RuntimeError(f"{self.name}: a copy failed (an injected fault)")
        if FaultKind.COPY_FAILS in due:
            raise DeviceError(f"{self.name}: a copy failed (an injected fault)")


def _without_faults(device: Device) -> Device:
    return device.inner if isinstance(device, FaultyDevice) else device

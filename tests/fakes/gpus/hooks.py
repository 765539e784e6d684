"""Where tests get at the work of devices, whichever these are: all copies, steps, and faults on GPUs.

On CPU devices all copies come to `run_copy` and steps to `run`; on GPUs each kind of copy is one of its own, and steps
are launched.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar, cast

from kunserve.engine.launch.cuda_machine import CudaMachine
from kunserve.engine.launch.faults import Faults, FaultyDevice
from kunserve.faults import Fault
from kunserve.gpu.cuda.device import CudaDevice

T = TypeVar("T")
Call = Callable[[], Awaitable[T]]


def step_call(device: Any) -> str:
    """Return the name of the method by which a device gets steps."""
    return "launch" if isinstance(device, CudaDevice) else "run"


def around_copies(device: Any, around: Callable[[Call[Any]], Awaitable[Any]]) -> Callable[[], None]:
    """Have `around` get every copy of a device, to make it or not; returns what undoes it."""
    names = ("run_copy", "copy", "copy_tensor") if isinstance(device, CudaDevice) else ("run_copy",)
    before = {name: getattr(device, name) for name in names}

    def hooked(call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def copy(*arguments: Any, **more: Any) -> Any:
            return await around(lambda: call(*arguments, **more))

        return copy

    def undo() -> None:
        for name, call in before.items():
            setattr(device, name, call)

    for name, call in before.items():
        setattr(device, name, hooked(call))
    return undo


# --- faults -----------------------------------------------------------------------------------------------------------

_CALLS = ("reserve", "release", "map", "unmap", "tensor", "run", "run_copy", "copy", "copy_tensor", "launch", "close")


class FaultyGpu(FaultyDevice):
    """The faults of a GPU's device, which stand before its own calls: its streams are used by whoever knows it."""

    def __init__(self, device: CudaDevice, faults: Sequence[Fault], machine: Faults) -> None:
        known = ("name", "torch_device", "chunk_bytes", "num_chunks", "is_lost")
        calls = SimpleNamespace(**{name: getattr(device, name) for name in (*known, *_CALLS)})
        super().__init__(cast(Any, calls), faults, machine.is_due, machine.begin)
        self._launch = device.launch
        for name in _CALLS:
            setattr(device, name, getattr(self, name))

    async def launch(self, work: Callable[[], T], after: Sequence[Any] = (), *, is_timed: bool = False) -> Any:
        """See `CudaDevice.launch`."""
        return await self._launch(self.faulty(work), after, is_timed=is_timed)


def fail_on_gpus(machine: CudaMachine, faults: Sequence[Fault]) -> None:
    """Give the devices of a machine, once they are open, their faults."""
    hooked: Any = machine
    found, opened = Faults(faults), machine.open

    def open_faulty() -> Sequence[CudaDevice]:
        devices = opened()
        for i, device in enumerate(devices):
            found.add(FaultyGpu(device, [fault for fault in faults if fault.device == i], found))
        return devices

    def tell_phases(phases: Any) -> None:
        found.phases = phases

    hooked.open, hooked.faults, hooked.tell_phases = open_faulty, found, tell_phases

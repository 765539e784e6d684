"""A driver without a GPU that keeps CUDA's rules and breaks the test when our code does not.

Physical memory is a memfd and addresses are reserved with PROT_NONE, so bytes follow their chunk, and touching what is
not mapped or has no access set ends the process as it does a GPU's context. Work on a stream is not finished before
the test says so.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from fake_gpu_tensors import GpuTensor, MappedMemory, new_pinned, register, unregister
from fake_pieces import Event, Recording, RuleBrokenError
from fake_timeline import TIMELINE
from torch import Tensor

from kunserve.errors import DeviceError
from kunserve.gpu.cuda.driver import Graph
from kunserve.sizes import ceil_div

GRANULARITY = 2 << 20
_RW = mmap.PROT_READ | mmap.PROT_WRITE
_FIXED, _NORESERVE = 0x10, 0x4000
_RESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE

_idle_streams: defaultdict[int, list[int]] = defaultdict(list)  # by GPU, as the driver keeps them

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@dataclass(frozen=True, slots=True)
class RepeatedGraph:
    """A capture on a GPU that does all at once: it does again what it has done."""

    work: Callable[[], None]

    def replay(self) -> None:
        self.work()


@dataclass(frozen=True, slots=True)
class RecordedGraph:
    """A capture on a GPU that has streams."""

    recording: Recording
    ordinal: int

    def replay(self) -> None:
        TIMELINE.replay(self.recording, TIMELINE.current(self.ordinal))


class FakeCuda:
    """`Driver` of a GPU that is not there. `calls` counts calls by name; `fail_at[name]` makes the n-th one fail.

    is_async: tensors are `GpuTensor`s, whose operations wait in their streams; else in host memory, and done at once.
    unmaps_runs: whether one call unmaps several mappings.
    """

    def __init__(
        self,
        ordinal: int = 0,
        total_bytes: int = 1 << 30,
        reachable: Sequence[int] = (),
        *,
        is_async: bool = False,
        unmaps_runs: bool = True,
        granularity: int = GRANULARITY,
    ) -> None:
        self.ordinal, self.gpu_name = ordinal, f"GPU {ordinal} that is not there"
        self.num_multiprocessors = 132  # of an H100
        self.torch_device, self.granularity = torch.device("cpu"), granularity
        self.is_async, self._unmaps_runs = is_async, unmaps_runs
        if is_async:
            self.torch_device = torch.device("gpu", ordinal)
        self.calls: Counter[str] = Counter()
        self.log: list[tuple[Any, ...]] = []
        self.fail_at: dict[str, int] = {}
        self.is_open = True
        self._total, self._reachable = total_bytes, {ordinal, *reachable}
        self._fd = os.memfd_create("fake-cuda")
        os.ftruncate(self._fd, total_bytes)
        self._handles: dict[int, tuple[int, int]] = {}  # handle -> offset, bytes
        self._next_offset = 0
        self._reserved: dict[int, int] = {}
        self._mapped: dict[int, tuple[int, int]] = {}  # address -> bytes, handle
        self._accessible: set[int] = set()  # addresses of mappings
        self.streams: list[int] = []  # that a device has
        self.pinned_ranges: dict[int, int] = {}
        self.error: str | None = None  # a kernel faulted

    # --- for tests ---------------------------------------------------------------------------------------------

    def submit(self, stream: int) -> None:
        """A kernel is launched on `stream`; it runs until `complete`."""
        TIMELINE.launch(stream, is_held=True)

    def submitted(self, stream: int) -> int:
        """Kernels that were submitted to `stream`."""
        return TIMELINE.counts(stream)[0]

    def complete(self, stream: int, pieces: int = 1) -> None:
        """The oldest kernels of `stream` finish."""
        TIMELINE.release(stream, pieces)

    def fail(self, error: str) -> None:
        """A kernel faults: all waiting ends with the error, and every call from now on."""
        with TIMELINE.change:
            self.error = error
            TIMELINE.change.notify_all()

    def destroy(self, stream: int) -> None:
        """Do what the driver must not: end a stream."""
        self.streams.remove(stream)
        TIMELINE.destroy(stream)

    def is_usable(self, address: int) -> bool:
        """Whether the GPU may use the mapping at `address`."""
        return address in self._accessible

    def usable_chunks(self) -> dict[int, int]:
        """Address of each mapping that has access -> number of its handle, in the order in which they were created."""
        order = {handle: i for i, handle in enumerate(sorted(self._handles))}
        return {address: order[handle] for address, (_, handle) in self._mapped.items() if self.is_usable(address)}

    def is_clean(self) -> bool:
        """Whether everything was given back; after a fault that is not possible, and only left."""
        if self.error:
            return not self.is_open
        return not (
            self.pinned_ranges or self._handles or self._reserved or self._mapped or self.streams or self.is_open
        )

    # --- Driver ------------------------------------------------------------------------------------------------

    def memory(self) -> tuple[int, int]:
        TIMELINE.make_current(self.ordinal)
        return self._total - sum(size for _, size in self._handles.values()), self._total

    def can_access(self, ordinal: int) -> bool:
        return ordinal in self._reachable

    def create(self, num_bytes: int) -> int:
        self._call("create", num_bytes)
        self._check(
            num_bytes > 0 and num_bytes % self.granularity == 0, "create: size is no multiple of the granularity"
        )
        if self._next_offset + num_bytes > self._total:
            raise DeviceError(f"cuda:{self.ordinal}: cuMemCreate failed: CUDA_ERROR_OUT_OF_MEMORY")
        handle = 1000 + len(self._handles)
        self._handles[handle] = (self._next_offset, num_bytes)
        self._next_offset += num_bytes
        return handle

    def release(self, handle: int) -> None:
        self._call("release", handle)
        self._check(handle in self._handles, "release: no such handle")
        self._check(all(h != handle for _, h in self._mapped.values()), "release: the handle is mapped")
        del self._handles[handle]

    def reserve(self, num_bytes: int) -> int:
        self._call("reserve", num_bytes)
        self._check(
            num_bytes > 0 and num_bytes % self.granularity == 0, "reserve: size is no multiple of the granularity"
        )
        start = self._mmap(None, num_bytes + self.granularity, 0, _RESERVED)
        # The few pages around it stay reserved: nobody can land there.
        address = ceil_div(start, self.granularity) * self.granularity
        self._reserved[address] = num_bytes
        return address

    def free(self, address: int, num_bytes: int) -> None:
        self._call("free", address, num_bytes)
        self._check(self._reserved.get(address) == num_bytes, "free: not a reserved range")
        self._check(not self._inside(address, num_bytes), "free: something is mapped in it")
        del self._reserved[address]
        _libc.munmap(address, num_bytes)

    def map(self, address: int, num_bytes: int, handle: int) -> None:
        self._call("map", address, num_bytes, handle)
        self._check_idle("map")
        self._check(address % self.granularity == 0, "map: address is not aligned")
        self._check(self._handles.get(handle, (0, 0))[1] == num_bytes, "map: no such handle, or not all of it")
        in_range = any(a <= address and address + num_bytes <= a + n for a, n in self._reserved.items())
        self._check(in_range, "map: not in a reserved range")
        self._check(not self._overlapping(address, num_bytes), "map: something is mapped there")
        self._check(all(h != handle for _, h in self._mapped.values()), "map: the chunk is mapped elsewhere")
        self._mmap(address, num_bytes, 0, mmap.MAP_SHARED | _FIXED, self._fd, self._handles[handle][0])
        self._mapped[address] = (num_bytes, handle)

    def set_access(self, address: int, num_bytes: int) -> None:
        self._call("set_access", address, num_bytes)
        self._check_idle("set_access")
        inside = self._inside(address, num_bytes)
        self._check(sum(self._mapped[a][0] for a in inside) == num_bytes, "set_access: not all of it is mapped")
        self._accessible.update(inside)
        assert _libc.mprotect(address, num_bytes, _RW) == 0

    def unmap(self, address: int, num_bytes: int) -> None:
        self._call("unmap", address, num_bytes)
        self._check_idle("unmap")
        inside = self._inside(address, num_bytes)
        whole = sum(self._mapped[a][0] for a in inside) == num_bytes and num_bytes > 0
        self._check(whole, "unmap: not whole mappings")
        if len(inside) > 1 and not self._unmaps_runs:
            raise DeviceError(f"cuda:{self.ordinal}: cuMemUnmap failed: CUDA_ERROR_INVALID_VALUE")
        for a in inside:
            del self._mapped[a]
            self._accessible.discard(a)
        self._mmap(address, num_bytes, 0, _RESERVED | _FIXED)

    def take_stream(self) -> int:
        TIMELINE.make_current(self.ordinal)
        idle = _idle_streams[self.ordinal]
        stream = idle.pop() if idle else TIMELINE.create(self)
        TIMELINE.take(stream, self)
        self.streams.append(stream)
        return stream

    def return_stream(self, stream: int) -> None:
        self._count("return_stream", stream)
        self._check(TIMELINE.is_idle(stream), "return_stream: it has work")
        self.streams.remove(stream)
        _idle_streams[self.ordinal].append(stream)

    def on(self, stream: int) -> AbstractContextManager[Any]:
        return TIMELINE.on(stream)

    def current_stream(self) -> int:
        return TIMELINE.current(self.ordinal)

    def record(self, stream: int, *, is_timed: bool = False) -> Event:
        return TIMELINE.record(stream, is_timed=is_timed)

    def seconds(self, first: Event, last: Event) -> float:
        self._check(first.mark.is_timed and last.mark.is_timed, "seconds: an event is not timed")
        self._check(first.mark.is_reached and last.mark.is_reached, "seconds: an event has not been reached")
        return last.mark.reached_s - first.mark.reached_s

    def wait(self, stream: int, event: Event) -> None:
        TIMELINE.wait(stream, event)

    def synchronize(self, stream: int) -> None:
        self.calls["synchronize"] += 1
        self.synchronize_event(self.record(stream))

    def synchronize_event(self, event: Event) -> None:
        TIMELINE.make_current(self.ordinal)
        TIMELINE.synchronize(event, self)

    def synchronize_all(self) -> None:
        before = TIMELINE.current_gpu  # torch puts it back
        for stream in (*self.streams, TIMELINE.legacy(self.ordinal)):
            self.synchronize(stream)
        TIMELINE.make_current(before)

    def capture(self, work: Callable[[], None]) -> Graph:
        self.calls["capture"] += 1
        self._check(TIMELINE.current_gpu == self.ordinal, "capture: torch captures on the GPU that is current")
        if not self.is_async:
            return RepeatedGraph(work)
        with TIMELINE.capture(self.current_stream()) as recording:
            work()
        return RecordedGraph(recording, self.ordinal)

    def tensor(self, address: int, num_bytes: int) -> Tensor:
        make: Any = torch._C._construct_storage_from_data_pointer
        storage = make(address, torch.device("cpu"), num_bytes)
        flat = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (num_bytes,), (1,))
        return GpuTensor(flat, self.ordinal, MappedMemory(self.ordinal)) if self.is_async else flat

    def pin(self, address: int, num_bytes: int) -> None:
        self._call("pin", address, num_bytes)
        self._check(address not in self.pinned_ranges, "pin: pinned already")
        self.pinned_ranges[address] = num_bytes
        register(address, num_bytes)

    def unpin(self, address: int) -> None:
        self._call("unpin", address)
        self._check(address in self.pinned_ranges, "unpin: not pinned")
        del self.pinned_ranges[address]
        unregister(address)

    def pinned(self, num_bytes: int) -> Tensor:
        self._count("pinned", num_bytes)
        return new_pinned(num_bytes)

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            os.close(self._fd)

    # --- rules -------------------------------------------------------------------------------------------------

    def _call(self, name: str, *arguments: Any) -> None:
        """A call of the driver, which is made in this GPU's context: it is this thread's from then on."""
        TIMELINE.make_current(self.ordinal)
        self._count(name, *arguments)

    def _count(self, name: str, *arguments: Any) -> None:
        if self.error:
            raise DeviceError(f"cuda:{self.ordinal}: {name} failed: {self.error}")
        self.calls[name] += 1
        self.log.append((name, *arguments))
        if self.fail_at.get(name) == self.calls[name]:
            raise DeviceError(f"cuda:{self.ordinal}: {name} failed: CUDA_ERROR_UNKNOWN")

    def _check(self, holds: bool, rule: str) -> None:
        if not holds:
            raise RuleBrokenError(rule)

    def _check_idle(self, call: str) -> None:
        self._check(all(map(TIMELINE.is_idle, self.streams)), f"{call}: work that was submitted is not finished")

    def _inside(self, address: int, num_bytes: int) -> list[int]:
        return sorted(a for a, (n, _) in self._mapped.items() if address <= a and a + n <= address + num_bytes)

    def _overlapping(self, address: int, num_bytes: int) -> bool:
        return any(a < address + num_bytes and address < a + n for a, (n, _) in self._mapped.items())

    def _mmap(self, address: int | None, size: int, prot: int, flags: int, fd: int = -1, offset: int = 0) -> int:
        result = _libc.mmap(address, size, prot, flags, fd, offset)
        assert result is not None and result != ctypes.c_void_p(-1).value, os.strerror(ctypes.get_errno())
        return int(result)

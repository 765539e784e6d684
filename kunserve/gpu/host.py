"""Virtual CPU devices: physical chunks are slices of a memfd, mapped into reserved addresses with MAP_FIXED.

The twin of CUDA's virtual memory management without a GPU: real bytes move, content follows its chunk, tensors stay
valid across remaps. A handle is an offset in the memfd, reserving is a PROT_NONE mapping, unmapping puts PROT_NONE
back (never a hole, so that nothing else can land there). Linux only.
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from kunserve.errors import ConfigError, DeviceError
from kunserve.gpu.copies import BlockCopy, copy_blocks
from kunserve.gpu.device import Device
from kunserve.gpu.mappings import Mappings
from kunserve.gpu.queue import LAST_WAIT_S, Answer, WorkQueue
from kunserve.host.cgroup import available_bytes
from kunserve.host.memory import HUGE_BYTES, HostMemory, MemoryBehind
from kunserve.sizes import ceil_div, format_size

T = TypeVar("T")

CHUNK_BYTES = HUGE_BYTES
IDLE_S = 0.05  # without work, after which a device helps another: shorter pauses are those between its own steps

_libc = ctypes.CDLL(None, use_errno=True)  # drops the GIL while it works
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

_PROT_NONE = 0
_PROT_RW = mmap.PROT_READ | mmap.PROT_WRITE
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_RESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
_MAP_FAILED = ctypes.c_void_p(-1).value


def map_memory(address: int | None, num_bytes: int, prot: int, flags: int, fd: int = -1, offset: int = 0) -> int:
    """Map memory, as mmap(2) does; return its address. Raises DeviceError."""
    result = _libc.mmap(address, num_bytes, prot, flags, fd, offset)
    if result == _MAP_FAILED or result is None:
        errno = ctypes.get_errno()
        raise DeviceError(f"mmap of {format_size(num_bytes)} failed: {os.strerror(errno)}")
    return int(result)


class Team(Protocol):
    """Threads that compute together what one of them is asked for (kunserve/compute/cpu_team.py)."""

    def lead(self, work: Callable[[], T]) -> T:
        """Run `work`, in which those who help take part."""

    def help(self, leave: ctypes.c_int32) -> None:
        """Take part in what is led, until `leave` is set."""


class HostDevice:
    """One virtual CPU device: `num_chunks` chunks of host memory, and one worker thread on its own core."""

    torch_device = torch.device("cpu")

    def __init__(
        self,
        index: int,
        num_chunks: int,
        chunk_bytes: int = CHUNK_BYTES,
        core: int | None = None,
        memory: HostMemory | None = None,
        num_first: int | None = None,
    ) -> None:
        """Take the memory now: a later remap then moves page tables only. `memory` has some of it already.

        With `num_first`, only so many chunks are taken, and the others reserved until `take_rest`.
        """
        self.index, self.name, self.is_lost = index, f"cpu:{index}", False
        self.chunk_bytes, self.num_chunks = chunk_bytes, num_chunks
        self._memory: HostMemory | None = None
        self._behind: MemoryBehind | None = None
        memory = memory or HostMemory(f"kunserve-{self.name}")
        try:
            self._take(memory, num_chunks * chunk_bytes, (num_chunks if num_first is None else num_first) * chunk_bytes)
        except BaseException:
            memory.close()
            raise
        self._memory = memory
        self.mappings = Mappings(self.name, num_chunks, chunk_bytes)
        self._compute = WorkQueue(f"{self.name}-compute", core)
        self._copy = WorkQueue(f"{self.name}-copy", core)
        self.team: Team | None = None
        self._mates: Sequence[HostDevice] = ()
        self.num_begun = 0  # calls of `run`
        self._num_asked, self._idle_since = 0, 0.0  # work that has not ended; of the event loop's clock
        self._leave = ctypes.c_int32(1)  # 0 while it helps another
        self._helpers: list[ctypes.c_int32] = []  # what those who help this one look at

    def _take(self, memory: HostMemory, needed: int, needed_first: int) -> None:
        available = available_bytes() + memory.num_reserved
        if needed > available:
            raise ConfigError(
                f"{self.name}: --device-memory of {format_size(needed)} does not fit: "
                f"{format_size(available)} of host memory are available"
            )
        try:
            memory.reserve(needed)
            memory.take(needed_first)
        except OSError as error:
            raise DeviceError(f"{self.name}: cannot populate memory: {error.strerror}") from None

    def take_rest(self, first: Sequence[int], then: Sequence[int], is_busy: Callable[[], bool] = lambda: False) -> None:
        """Take chunks that are only reserved: `first` now, `then` in this order while the device works.

        Blocks until it has `first`; DeviceError if that cannot be. `is_busy` says when steps are not to be held up, as
        in `MemoryBehind`. What is taken already costs nothing.
        """
        assert self._memory is not None and self._behind is None
        try:
            self._memory.take_pieces(self._pieces(first))
        except OSError as error:
            raise DeviceError(f"{self.name}: cannot populate memory: {error.strerror}") from None
        if pieces := self._pieces(then):
            self._behind = MemoryBehind(self.name, self._memory, pieces, is_busy)

    def _pieces(self, chunks: Sequence[int]) -> list[tuple[int, int]]:
        """Return (offset, bytes) of those chunks that are not taken."""
        assert self._memory is not None
        size, taken = self.chunk_bytes, self._memory.num_taken
        return [(chunk * size, size) for chunk in chunks if (chunk + 1) * size > taken]

    def reserve(self, num_bytes: int) -> int:
        """See `Device.reserve`."""
        # Over-reserve to align, then give head and tail back.
        start = map_memory(None, num_bytes + self.chunk_bytes, _PROT_NONE, _RESERVED)
        address = ceil_div(start, self.chunk_bytes) * self.chunk_bytes
        if address > start:
            _libc.munmap(start, address - start)
        if tail := start + self.chunk_bytes - address:
            _libc.munmap(address + num_bytes, tail)
        self.mappings.reserved[address] = num_bytes
        return address

    def release(self, address: int, num_bytes: int) -> None:
        """See `Device.release`."""
        self.mappings.check_reserved(address, num_bytes)
        _libc.munmap(address, num_bytes)
        self.mappings.release(address, num_bytes)

    def map(self, address: int, chunks: Sequence[int]) -> None:
        """See `Device.map`. Neighbouring chunks go in one call."""
        assert self._memory is not None
        self.mappings.check_map(address, chunks)
        start = 0
        try:
            for i in range(1, len(chunks) + 1):
                if i == len(chunks) or chunks[i] != chunks[i - 1] + 1:
                    map_memory(
                        address + start * self.chunk_bytes,
                        (i - start) * self.chunk_bytes,
                        _PROT_RW,
                        mmap.MAP_SHARED | _MAP_FIXED,
                        self._memory.fd,
                        chunks[start] * self.chunk_bytes,
                    )
                    start = i
        except DeviceError:
            if start:  # the chunks that were mapped would stay in two places once others get them
                map_memory(address, start * self.chunk_bytes, _PROT_NONE, _RESERVED | _MAP_FIXED)
            raise
        self.mappings.map(address, chunks)

    def unmap(self, address: int, num_chunks: int) -> None:
        """See `Device.unmap`."""
        if num_chunks == 0:
            return
        self.mappings.check_unmap(address, num_chunks)
        map_memory(address, num_chunks * self.chunk_bytes, _PROT_NONE, _RESERVED | _MAP_FIXED)
        self.mappings.unmap(address, num_chunks)

    def tensor(self, address: int, num_bytes: int) -> Tensor:
        """See `Device.tensor`."""
        return torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), dtype=torch.uint8)

    def run(self, work: Callable[[], T]) -> Answer[T]:
        """See `Device.run`. Devices that have long had nothing to do help with it."""
        self.num_begun += 1
        self._num_asked += 1
        if self.team is None:
            answer = self._compute.run(work)
        else:
            clock = asyncio.get_running_loop().time
            self._stop_helping()
            helpers = [mate.begin_to_help(self.team, clock()) for mate in self._mates]
            self._helpers += [leave for leave in helpers if leave is not None]
            answer = self._compute.run(partial(self.team.lead, work))
        answer.add_done_callback(self._has_done)
        return answer

    @property
    def has_work(self) -> bool:
        """Return whether work that it was asked for has not ended."""
        return self._num_asked > 0

    def _has_done(self, answer: object) -> None:
        self._num_asked -= 1
        if not self._num_asked:
            self._idle_since = asyncio.get_running_loop().time()
            self._dismiss()

    def join(self, team: Team, mates: Sequence[HostDevice]) -> None:
        """Have `mates` help, by way of a team of its own, while they have nothing to do. It may be among them."""
        self.team, self._mates = team, mates

    def begin_to_help(self, team: Team, now: float) -> ctypes.c_int32 | None:
        """Help a team, until there is work or what is returned is set; None of a device that is not idle."""
        is_idle = not self._num_asked and self._leave.value and now - self._idle_since >= IDLE_S
        if not is_idle or self.is_lost or self.team in (None, team):
            return None
        self._leave = ctypes.c_int32(0)
        self._compute.begin(partial(team.help, self._leave))
        return self._leave

    def _stop_helping(self) -> None:
        self._leave.value = 1

    def _dismiss(self) -> None:
        for leave in self._helpers:
            leave.value = 1
        self._helpers.clear()

    def run_copy(self, work: Callable[[], T]) -> Answer[T]:
        """See `Device.run_copy`."""
        return self._copy.run(work)

    async def copy(
        self, copies: Sequence[BlockCopy], source: Device | None = None, *, is_to_host: bool = False
    ) -> None:
        """See `Device.copy`: all devices' memory, and the host's, is one address space."""
        await self.run_copy(partial(copy_blocks, copies))

    async def copy_tensor(self, read: Tensor, write: Tensor, source: Device) -> None:
        """See `Device.copy_tensor`."""
        await self.run_copy(partial(write.copy_, read))

    def abandon(self) -> None:
        """See `Device.abandon`."""
        self.is_lost = True
        self._stop_helping()
        self._dismiss()
        for queue in (self._compute, self._copy):
            queue.abandon()

    def copies_have_ended(self, timeout_s: float) -> bool:
        """See `Device.copies_have_ended`."""
        return self._copy.has_ended(timeout_s)

    @property
    def is_open(self) -> bool:
        """Return whether it still has its memory."""
        return self._memory is not None

    def close(self) -> None:
        """See `Device.close`."""
        if self._memory is None:
            return
        self._stop_helping()
        if self._behind is not None:
            self._behind.stop()
        if self.is_lost and not all(queue.has_ended(LAST_WAIT_S) for queue in (self._compute, self._copy)):
            return  # its threads may still touch what is mapped
        self._compute.close()
        self._copy.close()
        for address, num_bytes in list(self.mappings.reserved.items()):
            self.release(address, num_bytes)
        self._memory.close()
        self._memory = None

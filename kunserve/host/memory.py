"""Memory of virtual CPU devices: files without a name, whose pages are taken before anybody needs them.

Without torch, so that a server that starts can take them while torch is imported: both need a second or two. Pages that
are in nobody's way are only reserved at the start, and taken while the server serves. A virtual machine needs that: its
host may have to find each page that it touches, at seconds a gigabyte.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn

import structlog

log = structlog.get_logger()

HUGE_BYTES = 2 << 20  # of a huge page
STEP_BYTES = 4 * HUGE_BYTES  # between two looks whether to go on
NICENESS = 10  # of threads that take memory while others work
PAUSE_S = 0.1  # between two pieces that are taken while devices compute

_libc = ctypes.CDLL(None, use_errno=True)  # drops the GIL while it works
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_PROT_NONE, _MAP_FIXED, _MAP_NORESERVE = 0, 0x10, 0x4000
_RESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
_MADV_POPULATE_WRITE, _MADV_COLLAPSE = 23, 25
_MAP_FAILED = ctypes.c_void_p(-1).value


class HostMemory:
    """A memfd: its first `num_reserved` bytes have pages, and the first `num_taken` of these have been touched."""

    def __init__(self, name: str) -> None:
        self.fd = os.memfd_create(name)
        self.num_reserved = self.num_taken = 0

    def reserve(self, num_bytes: int, goes_on: Callable[[], bool] = lambda: True) -> None:
        """Make the file `num_bytes` large, all of it with pages, which nobody else gets. OSError if the kernel refuses.

        Ends early once `goes_on` returns False. A page that was not taken before costs more when it is first written.
        """
        os.ftruncate(self.fd, num_bytes)
        self.num_reserved, self.num_taken = min(self.num_reserved, num_bytes), min(self.num_taken, num_bytes)
        while self.num_reserved < num_bytes and goes_on():
            step = min(STEP_BYTES, num_bytes - self.num_reserved)
            os.posix_fallocate(self.fd, self.num_reserved, step)
            self.num_reserved += step

    def take(self, num_bytes: int, goes_on: Callable[[], bool] = lambda: True) -> None:
        """Touch the first `num_bytes` of what is reserved. Else as `take_pieces`."""
        end = min(num_bytes, self.num_reserved)
        for start in range(self.num_taken, end, STEP_BYTES):
            if not goes_on():
                return
            step = min(STEP_BYTES, end - start)
            self.take_pieces([(start, step)])
            self.num_taken += step

    def take_pieces(self, pieces: Iterable[tuple[int, int]], goes_on: Callable[[], bool] = lambda: True) -> None:
        """Touch pieces (offset, bytes) of what is reserved, in huge pages if possible; others may work on them.

        Ends early once `goes_on` returns False. OSError if the kernel refuses.
        """
        with self._mapped() as address:
            for start, num_bytes in pieces:
                if not goes_on():
                    return
                _take(address + start, num_bytes)

    def close(self) -> None:
        """Give the memory back."""
        os.close(self.fd)

    @contextlib.contextmanager
    def _mapped(self) -> Iterator[int]:
        """Map all of it at an address where huge pages can be."""
        num_bytes = os.fstat(self.fd).st_size
        start = _mmap(None, num_bytes + HUGE_BYTES, _PROT_NONE, _RESERVED)
        try:
            address = -(-start // HUGE_BYTES) * HUGE_BYTES
            if num_bytes:
                _mmap(address, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED, self.fd)
            yield address
        finally:
            _libc.munmap(start, num_bytes + HUGE_BYTES)


def _take(address: int, num_bytes: int) -> None:
    is_huge = _libc.madvise(address, num_bytes, _MADV_COLLAPSE) == 0  # best effort: small pages work too
    step = num_bytes if is_huge else HUGE_BYTES  # of small ones it takes long, and no thread can map meanwhile
    for start in range(address, address + num_bytes, step):
        _populate(start, min(step, address + num_bytes - start))


def _populate(address: int, num_bytes: int) -> None:
    if _libc.madvise(address, num_bytes, _MADV_POPULATE_WRITE) != 0:
        _raise()


def _mmap(address: int | None, num_bytes: int, prot: int, flags: int, fd: int = -1) -> int:
    result = _libc.mmap(address, num_bytes, prot, flags, fd, 0)
    if result == _MAP_FAILED or result is None:
        _raise()
    return int(result)


def _raise() -> NoReturn:
    errno = ctypes.get_errno()
    raise OSError(errno, os.strerror(errno))


def _give_way() -> None:
    thread = threading.get_native_id()  # of which the priority is, not of the process
    os.setpriority(os.PRIO_PROCESS, thread, max(NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))


class MemoryAhead:
    """Memory of devices to come, taken by a thread until it is asked for."""

    def __init__(self, num_devices: int, num_bytes: int) -> None:
        """Begin to take `num_bytes` for each device: less than it will need rather than more."""
        self._memories = [HostMemory(f"kunserve-cpu:{i}") for i in range(num_devices)]
        self._is_needed = threading.Event()
        self._thread = threading.Thread(target=self._take, args=(num_bytes,), name="memory-ahead", daemon=True)
        self._thread.start()

    def hand_over(self) -> list[HostMemory]:
        """Stop, and return the devices' memory with what has been taken; from now on it is the caller's to close."""
        self._is_needed.set()
        self._thread.join()
        memories, self._memories = self._memories, []
        return memories

    def _take(self, num_bytes: int) -> None:
        def goes_on() -> bool:
            return not self._is_needed.is_set()

        _give_way()
        with contextlib.suppress(OSError):  # whoever needs the rest is told the same, and says it
            for memory in self._memories:
                memory.reserve(num_bytes, goes_on)
            for end in range(STEP_BYTES, num_bytes + STEP_BYTES, STEP_BYTES):  # in turns: weights lie at the beginning
                for memory in self._memories:
                    memory.take(min(end, num_bytes), goes_on)


class MemoryBehind:
    """What is only reserved of one device's memory, taken by a thread while the device works."""

    def __init__(
        self,
        name: str,
        memory: HostMemory,
        pieces: Iterable[tuple[int, int]],
        is_busy: Callable[[], bool] = lambda: False,
    ) -> None:
        """Begin to take `pieces` of `memory`, which stays open until `stop`.

        At once while `is_busy` returns False, else at intervals: the kernel holds a core for some milliseconds a piece,
        which steps wait for.
        """
        self._name, self._memory, self._pieces, self._is_busy = name, memory, pieces, is_busy
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._take, name=f"{name}-memory", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Return whether all is taken, or given up, at the latest after so many seconds."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Take no more, and wait for the piece that is being taken. Idempotent."""
        self._is_over.set()
        self._thread.join()

    def _take(self) -> None:
        _give_way()
        try:
            self._memory.take_pieces(self._pieces, self._goes_on)
        except OSError as error:  # it is the device's all the same: only slower
            log.warning("memory gets its pages when it is first used", device=self._name, because=error.strerror)

    def _goes_on(self) -> bool:
        if self._is_busy():
            self._is_over.wait(PAUSE_S)
        return not self._is_over.is_set()

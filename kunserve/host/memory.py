"""Memory of virtual CPU devices: files without a name, whose pages are taken before anybody needs them.

Without torch, so that a server that starts can take them while torch is imported: both need a second or two.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

HUGE_BYTES = 2 << 20  # of a huge page
STEP_BYTES = 8 * HUGE_BYTES  # between two looks whether to go on

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
    """A memfd of which the first `num_taken` bytes have pages."""

    def __init__(self, name: str) -> None:
        self.fd = os.memfd_create(name)
        self.num_taken = 0

    def take(self, num_bytes: int, goes_on: Callable[[], bool] = lambda: True) -> None:
        """Make the file `num_bytes` large, all of it with pages, huge ones if possible. OSError if the kernel refuses.

        Ends early once `goes_on` returns False; what has no pages then gets them when it is first written.
        """
        os.ftruncate(self.fd, num_bytes)
        self.num_taken = min(self.num_taken, num_bytes)
        with self._mapped(num_bytes) as address:
            while self.num_taken < num_bytes and goes_on():
                step = min(STEP_BYTES, num_bytes - self.num_taken)
                _take(address + self.num_taken, step)
                self.num_taken += step

    def close(self) -> None:
        """Give the memory back."""
        os.close(self.fd)

    @contextlib.contextmanager
    def _mapped(self, num_bytes: int) -> Iterator[int]:
        """Map all of it at an address where huge pages can be."""
        start = _mmap(None, num_bytes + HUGE_BYTES, _PROT_NONE, _RESERVED)
        try:
            address = -(-start // HUGE_BYTES) * HUGE_BYTES
            if num_bytes:
                _mmap(address, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED, self.fd)
            yield address
        finally:
            _libc.munmap(start, num_bytes + HUGE_BYTES)


def _take(address: int, num_bytes: int) -> None:
    # A huge page needs a first small one to be made from. With only that there is nothing to copy: several times
    # faster than to populate all of it in small pages first.
    for start in range(address, address + num_bytes, HUGE_BYTES):
        _populate(start, mmap.PAGESIZE)
    _libc.madvise(address, num_bytes, _MADV_COLLAPSE)  # best effort: small pages work too
    _populate(address, num_bytes)


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
        with contextlib.suppress(OSError):  # whoever needs the rest is told the same, and says it
            for memory in self._memories:
                memory.take(num_bytes, lambda: not self._is_needed.is_set())

"""Memory that is taken before anybody needs it: what has pages, and who owns it."""

from __future__ import annotations

import os
import threading

import pytest

from kunserve.host.memory import STEP_BYTES, HostMemory, MemoryAhead


def pages_of(memory: HostMemory) -> int:
    """Bytes of the file that have pages."""
    return os.fstat(memory.fd).st_blocks * 512


def open_files() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("num_bytes", [0, 4096, 3 << 20, 2 * STEP_BYTES + (2 << 20)])
def test_each_byte_has_a_page(num_bytes: int) -> None:
    memory = HostMemory("test")
    memory.take(num_bytes)
    assert (memory.num_taken, os.fstat(memory.fd).st_size, pages_of(memory)) == (num_bytes,) * 3
    memory.close()


def test_it_grows_and_shrinks_and_keeps_what_is_written() -> None:
    memory = HostMemory("test")
    memory.take(4 << 20)
    os.pwrite(memory.fd, b"kept", 1 << 20)
    memory.take(8 << 20)
    assert pages_of(memory) == 8 << 20
    memory.take(2 << 20)
    assert (memory.num_taken, pages_of(memory)) == (2 << 20, 2 << 20)
    assert os.pread(memory.fd, 4, 1 << 20) == b"kept"
    memory.close()


def test_it_ends_early_and_goes_on_later() -> None:
    memory, looks = HostMemory("test"), iter([True, False])
    memory.take(3 * STEP_BYTES, lambda: next(looks))
    assert (memory.num_taken, pages_of(memory)) == (STEP_BYTES, STEP_BYTES)
    memory.take(3 * STEP_BYTES)
    assert pages_of(memory) == 3 * STEP_BYTES
    memory.close()


def test_a_thread_takes_it_for_all_devices_and_hands_it_over() -> None:
    files, ahead = open_files(), MemoryAhead(2, 4 << 20)
    for thread in threading.enumerate():
        if thread.name == "memory-ahead":
            thread.join(60)
    first, second = ahead.hand_over()
    assert [first.num_taken, second.num_taken] == [4 << 20, 4 << 20]
    assert ahead.hand_over() == []
    first.close()
    second.close()
    assert open_files() == files


def test_who_needs_it_at_once_gets_what_there_is() -> None:
    (memory,) = MemoryAhead(1, 256 << 20).hand_over()
    assert memory.num_taken == pages_of(memory)
    memory.take(2 << 20)
    assert pages_of(memory) == 2 << 20
    memory.close()


def test_memory_that_the_kernel_refuses_is_said_by_who_needs_it() -> None:
    (memory,) = MemoryAhead(1, 1 << 62).hand_over()
    assert memory.num_taken == 0
    with pytest.raises(OSError, match=r"\S"):
        memory.take(1 << 62)
    memory.close()

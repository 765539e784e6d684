"""Memory that is taken before anybody needs it: what has pages, and who owns it."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from kunserve.host import memory as module
from kunserve.host.memory import NICENESS, STEP_BYTES, HostMemory, MemoryAhead, MemoryBehind

MIB = 1 << 20


def pages_of(memory: HostMemory) -> int:
    """Bytes of the file that have pages."""
    return os.fstat(memory.fd).st_blocks * 512


def touched(memory: HostMemory) -> list[int]:
    """Numbers of the pages that are more than reserved."""
    num_bytes = os.fstat(memory.fd).st_size
    with mmap.mmap(memory.fd, num_bytes) as mapped:
        view = (ctypes.c_char * num_bytes).from_buffer(mapped)
        found = (ctypes.c_ubyte * (num_bytes // mmap.PAGESIZE))()
        assert (
            ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(num_bytes), found) == 0
        )
        del view
    return [page for page, is_there in enumerate(found) if is_there & 1]


def pages(start: int, num_bytes: int) -> list[int]:
    return list(range(start // mmap.PAGESIZE, (start + num_bytes) // mmap.PAGESIZE))


def open_files() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("num_bytes", [0, 4096, 3 << 20, 2 * STEP_BYTES + (2 << 20)])
def test_each_byte_has_a_page(num_bytes: int) -> None:
    memory = HostMemory("test")
    memory.reserve(num_bytes)
    memory.take(num_bytes)
    assert (memory.num_taken, os.fstat(memory.fd).st_size, pages_of(memory)) == (num_bytes,) * 3
    assert num_bytes == 0 or touched(memory) == pages(0, num_bytes)
    memory.close()


def test_what_is_reserved_has_pages_that_nobody_has_touched() -> None:
    size = 2 * STEP_BYTES + 12288
    memory = HostMemory("test")
    memory.reserve(size)
    assert (memory.num_reserved, memory.num_taken, pages_of(memory)) == (size, 0, size)
    assert touched(memory) == []
    memory.take(STEP_BYTES)
    assert (memory.num_taken, touched(memory)) == (STEP_BYTES, pages(0, STEP_BYTES))
    memory.take(1 << 40)  # no more than is reserved
    assert (memory.num_taken, pages_of(memory)) == (size, size)
    memory.close()


def test_it_grows_and_shrinks_and_keeps_what_is_written() -> None:
    memory = HostMemory("test")
    memory.reserve(4 * MIB)
    os.pwrite(memory.fd, b"kept", MIB)
    os.pwrite(memory.fd, b"too", 6 * MIB)
    memory.reserve(8 * MIB)
    assert pages_of(memory) == 8 * MIB
    memory.take(8 * MIB)
    assert os.pread(memory.fd, 3, 6 * MIB) == b"too"
    memory.reserve(2 * MIB)
    assert (memory.num_reserved, memory.num_taken, pages_of(memory)) == (2 * MIB,) * 3
    assert os.pread(memory.fd, 4, MIB) == b"kept"
    memory.close()


def test_it_ends_early_and_goes_on_later() -> None:
    memory, looks = HostMemory("test"), iter([True, False, True, False])
    memory.reserve(3 * STEP_BYTES, lambda: next(looks))
    assert (memory.num_reserved, pages_of(memory)) == (STEP_BYTES, STEP_BYTES)
    memory.reserve(3 * STEP_BYTES)
    assert pages_of(memory) == 3 * STEP_BYTES
    memory.take(3 * STEP_BYTES, lambda: next(looks))
    assert (memory.num_taken, touched(memory)) == (STEP_BYTES, pages(0, STEP_BYTES))
    memory.close()


def test_pieces_are_taken_where_they_are_and_keep_what_is_written() -> None:
    memory = HostMemory("test")
    memory.reserve(8 * MIB)
    os.pwrite(memory.fd, b"kept", 5 * MIB)
    memory.take_pieces([(4 * MIB, 2 * MIB), (MIB, 4096)])
    assert touched(memory) == pages(MIB, 4096) + pages(4 * MIB, 2 * MIB)
    assert os.pread(memory.fd, 4, 5 * MIB) == b"kept"
    memory.close()


def test_small_pages_do_where_there_are_no_huge_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MADV_COLLAPSE", -1)  # no advice that a kernel knows
    memory = HostMemory("test")
    memory.reserve(5 * MIB)
    memory.take(5 * MIB)
    assert touched(memory) == pages(0, 5 * MIB)
    memory.close()


def test_a_thread_takes_it_for_all_devices_and_hands_it_over() -> None:
    files, ahead = open_files(), MemoryAhead(2, 4 * MIB)
    for thread in threading.enumerate():
        if thread.name == "memory-ahead":
            thread.join(60)
    memories = ahead.hand_over()
    assert [(memory.num_reserved, memory.num_taken) for memory in memories] == [(4 * MIB, 4 * MIB)] * 2
    assert ahead.hand_over() == []
    for memory in memories:
        memory.close()
    assert open_files() == files


def test_devices_take_turns() -> None:
    """The weights of each lie at the beginning of its memory."""
    taken, real = list[str](), HostMemory.take_pieces
    with pytest.MonkeyPatch.context() as patch:

        def take_pieces(memory: HostMemory, pieces: list[tuple[int, int]]) -> None:
            taken.append(Path(os.readlink(f"/proc/self/fd/{memory.fd}")).name.split()[0])
            real(memory, pieces)

        patch.setattr(HostMemory, "take_pieces", take_pieces)
        ahead = MemoryAhead(2, 2 * STEP_BYTES)
        ahead._thread.join(60)
    assert taken == ["memfd:kunserve-cpu:0", "memfd:kunserve-cpu:1"] * 2
    for memory in ahead.hand_over():
        memory.close()


def test_who_needs_it_at_once_gets_what_there_is() -> None:
    (memory,) = MemoryAhead(1, 256 * MIB).hand_over()
    assert memory.num_reserved == pages_of(memory)
    memory.reserve(2 * MIB)
    assert pages_of(memory) == 2 * MIB
    memory.close()


def test_memory_that_the_kernel_refuses_is_said_by_who_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    (memory,) = MemoryAhead(1, 4 * MIB).hand_over()
    assert (memory.num_reserved, memory.num_taken) == (0, 0)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        memory.reserve(4 * MIB)
    memory.close()


def test_the_rest_is_taken_in_order_by_a_thread_that_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, order, real = HostMemory("test"), list[int](), module._take
    niceness = set[int]()

    def take(address: int, num_bytes: int) -> None:
        niceness.add(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        order.append(num_bytes)
        real(address, num_bytes)

    monkeypatch.setattr(module, "_take", take)
    memory.reserve(8 * MIB)
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    behind = MemoryBehind("cpu:0", memory, [(6 * MIB, 2 * MIB), (0, MIB)])
    assert behind.wait(60)
    assert order == [2 * MIB, MIB] and touched(memory) == pages(0, MIB) + pages(6 * MIB, 2 * MIB)
    assert niceness == {max(NICENESS, before)}
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
    behind.stop()
    memory.close()


def test_what_is_written_while_the_rest_is_taken_stays() -> None:
    memory = HostMemory("test")
    memory.reserve(32 * MIB)
    behind = MemoryBehind("cpu:0", memory, [(start, 2 * MIB) for start in range(0, 32 * MIB, 2 * MIB)])
    with mmap.mmap(memory.fd, 32 * MIB) as mapped:
        for turn in range(200):
            for start in range(0, 32 * MIB, 2 * MIB):
                at = start + 4096 * (turn % 512)
                mapped[at : at + 2] = turn.to_bytes(2, "little")
        assert behind.wait(60)
        for start in range(0, 32 * MIB, 2 * MIB):
            for turn in range(200):
                at = start + 4096 * turn
                assert mapped[at : at + 2] == turn.to_bytes(2, "little")
    behind.stop()
    memory.close()


def test_the_rest_is_left_when_the_device_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, has_begun, may_end = HostMemory("test"), threading.Event(), threading.Event()

    def take(address: int, num_bytes: int) -> None:
        has_begun.set()
        assert may_end.wait(60)

    monkeypatch.setattr(module, "_take", take)
    memory.reserve(4 * MIB)
    behind = MemoryBehind("cpu:0", memory, [(0, MIB), (MIB, MIB)])
    assert has_begun.wait(60) and not behind.wait(0)
    has_begun.clear()
    threading.Timer(0.01, may_end.set).start()
    behind.stop()
    assert may_end.is_set() and not has_begun.is_set()  # it waited for the first piece and took no second
    memory.close()


def test_a_rest_that_the_kernel_refuses_is_said_once_and_stays_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: int, num_bytes: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    memory = HostMemory("test")
    memory.reserve(4 * MIB)
    monkeypatch.setattr(module, "_populate", refuse)
    with capture_logs() as lines:
        behind = MemoryBehind("cpu:7", memory, [(0, MIB), (MIB, MIB)])
        assert behind.wait(60)
    (line,) = lines
    assert (line["log_level"], line["device"], line["because"]) == ("warning", "cpu:7", "Cannot allocate memory")
    assert pages_of(memory) == 4 * MIB
    behind.stop()
    memory.close()


def test_nothing_is_taken_at_once_while_a_device_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, has_looked = HostMemory("test"), threading.Event()

    def is_busy() -> bool:
        has_looked.set()
        return True

    monkeypatch.setattr(module, "PAUSE_S", 600)
    memory.reserve(4 * MIB)
    behind = MemoryBehind("cpu:0", memory, [(0, MIB)], is_busy)
    assert has_looked.wait(60) and not behind.wait(0) and touched(memory) == []
    behind.stop()  # does not wait for the pause
    assert touched(memory) == []
    memory.close()


def test_devices_that_are_always_busy_get_it_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, looks = HostMemory("test"), list[int]()

    def is_busy() -> bool:
        looks.append(len(touched(memory)))
        return True

    monkeypatch.setattr(module, "PAUSE_S", 0.001)
    memory.reserve(4 * MIB)
    behind = MemoryBehind("cpu:0", memory, [(0, MIB), (2 * MIB, MIB)], is_busy)
    assert behind.wait(60)
    assert looks == [0, MIB // 4096]  # one before each piece
    assert touched(memory) == pages(0, MIB) + pages(2 * MIB, MIB)
    behind.stop()
    memory.close()

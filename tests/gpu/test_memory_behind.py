"""A device of which only the first chunks are taken at the start: what it takes then, in which order, and its end."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from kunserve.errors import ConfigError, DeviceError
from kunserve.gpu import host
from kunserve.gpu.host import HostDevice
from kunserve.host import memory as module
from kunserve.host.memory import HUGE_BYTES, HostMemory

NUM_CHUNKS = 12
WAIT_S = 60

Pieces = list[tuple[int, int]]


class Taking:
    """Notes the chunks that are taken, by call; `may_go_on` holds back those who are not the test's own thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[list[int]] = []
        self.may_go_on, self._real, self._owner = threading.Event(), HostMemory.take_pieces, threading.current_thread()
        taking = self

        def take_pieces(memory: HostMemory, pieces: Pieces, goes_on: object = None) -> None:
            if threading.current_thread() is not taking._owner:
                assert taking.may_go_on.wait(WAIT_S)
            for start, num_bytes in pieces:
                first = start // HUGE_BYTES
                taking.calls.append(list(range(first, first + num_bytes // HUGE_BYTES)))
            taking._real(memory, pieces)

        monkeypatch.setattr(HostMemory, "take_pieces", take_pieces)

    @property
    def chunks(self) -> list[int]:
        return [chunk for call in self.calls for chunk in call]


@pytest.fixture
def taking(monkeypatch: pytest.MonkeyPatch) -> Taking:
    return Taking(monkeypatch)


@pytest.fixture
def device(taking: Taking) -> Iterator[HostDevice]:
    device = HostDevice(40, NUM_CHUNKS, num_first=2)
    yield device
    taking.may_go_on.set()
    device.close()


def pages_of(device: HostDevice) -> int:
    assert device._memory is not None
    return os.fstat(device._memory.fd).st_blocks * 512


def finish(device: HostDevice, taking: Taking) -> None:
    taking.may_go_on.set()
    assert device._behind is not None and device._behind.wait(WAIT_S)


def test_all_is_reserved_and_the_first_chunks_are_taken(device: HostDevice, taking: Taking) -> None:
    assert pages_of(device) == NUM_CHUNKS * HUGE_BYTES
    assert taking.chunks == [0, 1]


def test_all_is_taken_if_nothing_else_is_asked_for(taking: Taking) -> None:
    device = HostDevice(41, NUM_CHUNKS)
    assert taking.chunks == list(range(NUM_CHUNKS))
    device.close()


def test_the_rest_comes_in_the_order_that_is_asked_for(device: HostDevice, taking: Taking) -> None:
    device.take_rest([0, 1, 4, 5], [8, 9, 2, 7, 6])
    assert taking.calls == [[0, 1], [4], [5]]  # the others wait
    finish(device, taking)
    assert taking.calls[3:] == [[8], [9], [2], [7], [6]]


@pytest.mark.parametrize("order", [(), (0, 1)])
def test_nothing_is_begun_where_nothing_is_left(device: HostDevice, order: Sequence[int]) -> None:
    device.take_rest(order, order)
    assert device._behind is None


def test_chunks_are_mapped_and_written_before_they_are_taken(device: HostDevice, taking: Taking) -> None:
    device.take_rest([], range(NUM_CHUNKS))
    address = device.reserve(NUM_CHUNKS * HUGE_BYTES)
    device.map(address, range(NUM_CHUNKS)[::-1])
    tensor = device.tensor(address, NUM_CHUNKS * HUGE_BYTES).view(NUM_CHUNKS, HUGE_BYTES)
    for place in range(NUM_CHUNKS):
        tensor[place] = place + 1
    device.unmap(address, NUM_CHUNKS)
    device.map(address, range(NUM_CHUNKS))  # as after a drop: content goes with its chunk
    finish(device, taking)
    for place in range(NUM_CHUNKS):
        assert bool((tensor[place] == NUM_CHUNKS - place).all())
    assert pages_of(device) == NUM_CHUNKS * HUGE_BYTES


def test_closing_waits_for_what_is_being_taken(device: HostDevice, taking: Taking) -> None:
    device.take_rest([], range(NUM_CHUNKS))
    closing = threading.Thread(target=device.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    taking.may_go_on.set()
    closing.join(WAIT_S)
    assert not device.is_open
    files = [os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
    assert not any("kunserve-cpu:40" in file for file in files)


def test_a_kernel_that_refuses_pages_refuses_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a request, later."""

    def refuse(*args: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(DeviceError, match="cpu:42: cannot populate memory: Cannot allocate memory"):
        HostDevice(42, NUM_CHUNKS, num_first=1)


def test_memory_that_is_not_there_refuses_the_start_although_little_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "available_bytes", lambda: 5 * HUGE_BYTES)
    with pytest.raises(ConfigError, match=r"cpu:43: --device-memory of 24 MiB does not fit: 10 MiB of host memory"):
        HostDevice(43, NUM_CHUNKS, num_first=1)
    memory = HostMemory("test")  # what the process has reserved is not available any more, and its own
    memory.reserve(7 * HUGE_BYTES)
    HostDevice(43, NUM_CHUNKS, memory=memory, num_first=1).close()


def test_a_refusal_later_is_said_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: int, num_bytes: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    device = HostDevice(44, NUM_CHUNKS, num_first=0)
    monkeypatch.setattr(module, "_populate", refuse)
    with pytest.raises(DeviceError, match="cpu:44: cannot populate memory: Cannot allocate memory"):
        device.take_rest([0], [])
    with capture_logs() as lines:
        device.take_rest([], [0])
        assert device._behind is not None and device._behind.wait(WAIT_S)
    assert [(line["log_level"], line["device"]) for line in lines] == [("warning", "cpu:44")]
    assert pages_of(device) == NUM_CHUNKS * HUGE_BYTES
    device.close()

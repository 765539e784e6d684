"""Whoever waits for a device goes on when it is lost, and what it does later changes nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch

from kunserve.errors import DeviceError, DeviceLostError
from kunserve.gpu.host import HostDevice
from kunserve.gpu.watched import WatchedDevice


class Watcher:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.num_begun, self.reasons = 0, list[str]()

    def has_work(self) -> None:
        self.num_begun += 1

    def lost(self, device: WatchedDevice, reason: str) -> None:
        assert device.is_lost and not device.has_work
        self.reasons.append(reason)


@pytest.fixture
def device() -> Iterator[WatchedDevice]:
    watched = WatchedDevice(HostDevice(91, 4, 1 << 16))
    watched.watcher = Watcher()
    yield watched
    watched.close()


def watcher_of(device: WatchedDevice) -> Watcher:
    assert isinstance(device.watcher, Watcher)
    return device.watcher


async def test_results_and_errors_come_through(device: WatchedDevice) -> None:
    def fail() -> None:
        raise DeviceError("refused")

    assert await device.run(lambda: 7) == 7
    with pytest.raises(DeviceError, match="refused"):
        await device.run_copy(fail)
    assert not device.is_lost and not device.has_work and watcher_of(device).num_begun == 2


async def test_all_who_wait_go_on_when_it_is_lost(device: WatchedDevice) -> None:
    begun, ends, done = threading.Event(), threading.Event(), list[int]()

    def hang() -> None:
        begun.set()
        ends.wait()
        done.append(1)

    hanging = asyncio.ensure_future(device.run(hang))
    behind = asyncio.ensure_future(device.run(lambda: done.append(2)))
    await asyncio.to_thread(begun.wait)
    assert device.has_work
    device.lose("it hangs")
    device.lose("once more")
    for waiting in (hanging, behind, asyncio.ensure_future(device.run_copy(lambda: done.append(3)))):
        with pytest.raises(DeviceLostError, match="is lost"):
            await waiting
    assert watcher_of(device).reasons == ["it hangs"]
    ends.set()
    await asyncio.to_thread(device.close)
    assert done == [1]  # what had begun; nothing that had not


async def test_a_fault_of_its_own_is_the_end_of_it(device: WatchedDevice) -> None:
    def fault() -> None:
        raise DeviceLostError("illegal address")

    with pytest.raises(DeviceLostError, match="illegal address"):
        await device.run(fault)
    assert device.is_lost and device.has_faulted and watcher_of(device).reasons == ["illegal address"]


async def test_a_cancelled_caller_waits_for_the_device_but_not_for_a_lost_one(device: WatchedDevice) -> None:
    ends = threading.Event()
    waiting = asyncio.ensure_future(device.run(ends.wait))
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.sleep(0.01)
    assert not waiting.done()
    device.lose("it hangs")
    with suppress(asyncio.CancelledError):
        await waiting
    assert waiting.cancelled()
    ends.set()


async def test_silence_is_counted_while_there_is_work_and_none_ends(device: WatchedDevice) -> None:
    assert device.tick(1.0) == (0.0, 0.0, 0.0)
    ends = threading.Event()
    waiting = asyncio.ensure_future(device.run(ends.wait))
    await asyncio.sleep(0)
    assert [device.tick(0.5) for _ in range(2)] == [(0.5, 0.0, 0.0), (1.0, 0.0, 0.0)]
    assert await device.run_copy(lambda: 3) == 3
    ends.set()
    await waiting
    assert device.tick(0.5) == (0.0, 0.0, 0.0)


async def test_memory_of_a_lost_device_stays_until_its_work_has_ended(device: WatchedDevice) -> None:
    ends, inner = threading.Event(), device.inner
    assert isinstance(inner, HostDevice)
    waiting = asyncio.ensure_future(device.run(ends.wait))
    await asyncio.sleep(0.01)
    device.lose("it hangs")
    with pytest.raises(DeviceLostError):
        await waiting
    await asyncio.to_thread(device.close)
    assert inner.is_open
    ends.set()
    await asyncio.to_thread(device.close)
    assert not inner.is_open


async def test_nothing_is_copied_from_a_lost_device(device: WatchedDevice) -> None:
    source = WatchedDevice(HostDevice(92, 4, 1 << 16))
    source.lose("it hangs")
    read, write = torch.ones(4), torch.zeros(4)
    for copying in (device.copy([], source), device.copy_tensor(read, write, source)):
        with pytest.raises(DeviceLostError, match="cpu:92 is lost"):
            await copying
    assert not device.is_lost and not write.any()
    await asyncio.to_thread(source.close)


async def test_copies_of_a_lost_device_that_still_run_are_known(device: WatchedDevice) -> None:
    ends = threading.Event()
    waiting = asyncio.ensure_future(device.run_copy(ends.wait))
    await asyncio.sleep(0.01)
    device.lose("it hangs")
    with pytest.raises(DeviceLostError):
        await waiting
    assert not device.copies_have_ended(0.0)
    ends.set()
    assert device.copies_have_ended(60.0)


async def test_work_may_end_in_the_moment_in_which_its_device_is_lost(device: WatchedDevice) -> None:
    ended, loop, unseen = threading.Event(), asyncio.get_running_loop(), list[dict[str, object]]()
    loop.set_exception_handler(lambda _, context: unseen.append(context))
    waiting = asyncio.ensure_future(device.run(lambda: 5))
    await asyncio.sleep(0)
    behind = asyncio.ensure_future(device.inner.run(ended.set))
    ended.wait()  # so that the loop is told of the first one before it is told of the loss
    loop.call_soon_threadsafe(device.lose, "it hangs")
    assert await waiting == 5
    await behind
    assert device.is_lost and not device.has_work and unseen == []

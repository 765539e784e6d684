"""What a device whose memory holds bytes promises besides: content, copies, failing maps, cancelled callers."""

from __future__ import annotations

import asyncio
import gc
import threading
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from functools import partial
from typing import Any

import pytest
import torch
from device_contract import (
    ALL_UNITS,
    NUM_CHUNKS,
    SIZE,
    DeviceContract,
    fill,
    firsts,
    layers_of,
    new_memory,
    read,
    reserve,
)
from torch import Tensor

from kunserve.errors import DeviceError
from kunserve.gpu.chunk_pool import ChunkPool, ChunkUse
from kunserve.gpu.copies import BlockCopy, host_blocks, layer_copies
from kunserve.gpu.device import Device
from kunserve.gpu.device_memory import Layout
from kunserve.gpu.kv_memory import E4M3
from kunserve.gpu.range import Range


class MemoryContract(DeviceContract):
    """What holds where there are bytes behind the chunks and threads behind the queues."""

    @abstractmethod
    def refusing_to_map(self, device: Device, nth: int) -> AbstractContextManager[None]:
        """Let the n-th piece of what is mapped inside fail, as the system that maps it would."""

    @abstractmethod
    def queues(self, device: Device) -> Sequence[Callable[[Callable[[], Any]], Awaitable[Any]]]:
        """Return the `run` of all queues that the device has."""

    @asynccontextmanager
    async def busy(self, *devices: Device) -> AsyncIterator[Callable[[], None]]:
        """All queues work on something that ends when the function is called that the block gets."""
        may_end, queues = threading.Event(), [run for device in devices for run in self.queues(device)]
        begun = [threading.Event() for _ in queues]

        def work(has_begun: threading.Event) -> None:
            has_begun.set()
            may_end.wait(10)

        tasks = [asyncio.create_task(_await(run(partial(work, one)))) for run, one in zip(queues, begun, strict=True)]
        try:
            while not all(one.is_set() for one in begun):
                await asyncio.sleep(0)
            yield may_end.set
        finally:
            may_end.set()
            await asyncio.gather(*tasks)

    async def idle(self, *devices: Device) -> None:
        """Return when the queues have done all that they were given."""
        await asyncio.gather(*(run(lambda: None) for device in devices for run in self.queues(device)))

    # --- content ------------------------------------------------------------------------------------------------

    def test_content_follows_its_chunk(self, device: Device) -> None:
        a, b = reserve(device), reserve(device)
        device.map(a, [0, 1, 2, 3])
        fill(device, a, [10, 11, 12, 13])
        kept = device.tensor(a, SIZE * device.chunk_bytes)
        device.unmap(a + 2 * device.chunk_bytes, 2)
        device.map(b, [3, 2, 5])  # out of order, with a new one
        assert read(device, b, 2) == [13, 12]
        assert [int(kept[0]), int(kept[device.chunk_bytes])] == [10, 11]  # untouched, same tensor
        device.unmap(b, 3)
        device.map(a + 2 * device.chunk_bytes, [2, 3])
        assert read(device, a, 4) == [10, 11, 12, 13]  # the old tensor sees the old bytes again
        assert int(kept[3 * device.chunk_bytes]) == 13

    def test_content_stays_when_its_range_is_released(self, device: Device) -> None:
        a, b = reserve(device), reserve(device)
        device.map(a, [6, 2])
        fill(device, a, [16, 12])
        device.release(a, SIZE * device.chunk_bytes)
        device.map(b, [2, 6])
        assert read(device, b, 2) == [12, 16]

    def test_a_tensor_over_unmapped_addresses_can_be_made_before_mapping(self, device: Device) -> None:
        size = 2 * device.chunk_bytes
        address = device.reserve(size)
        early = device.tensor(address, size).view(torch.float32)
        device.map(address, [7, 0])
        early.fill_(1.5)
        assert early.sum() == 1.5 * early.numel()

    # --- errors change nothing ----------------------------------------------------------------------------------

    @pytest.mark.parametrize("nth", [1, 2, 4])
    def test_a_map_that_fails_in_the_middle_changes_nothing(self, nth: int, device: Device) -> None:
        a, b = reserve(device), reserve(device)
        device.map(a, [3, 8])
        fill(device, a, [13, 18])
        before, tail = self.mapped(device), a + 2 * device.chunk_bytes
        with self.refusing_to_map(device, nth), pytest.raises(DeviceError):
            device.map(tail, [5, 1, 7, 0])  # no neighbours: four pieces
        assert self.mapped(device) == before and read(device, a, 2) == [13, 18]
        device.map(b, [1, 5])  # nobody has them
        fill(device, b, [11, 15])
        device.map(tail, [0, 7])
        assert read(device, a, 2) == [13, 18] and read(device, b, 2) == [11, 15]

    @pytest.mark.parametrize("nth", [1, 2])
    def test_chunks_of_a_range_whose_map_fails_are_nobodys(self, nth: int, device: Device) -> None:
        pool = ChunkPool(device.num_chunks)
        kv, hole, weights = (Range(device, pool, use, SIZE) for use in (ChunkUse.KV, ChunkUse.KV, ChunkUse.WEIGHTS))
        kv.resize(1)
        hole.resize(1)
        weights.resize(1)
        hole.resize(0)  # the chunks that come next are no neighbours
        before = self.mapped(device)
        with self.refusing_to_map(device, nth), pytest.raises(DeviceError):
            kv.resize(4)
        pool.check({ChunkUse.KV: kv.chunks, ChunkUse.WEIGHTS: weights.chunks})
        assert pool.num_free == NUM_CHUNKS - 2 and self.mapped(device) == before
        kv.resize(4)
        pool.check({ChunkUse.KV: kv.chunks, ChunkUse.WEIGHTS: weights.chunks})

    @pytest.mark.parametrize("nth", [1, 2])
    def test_a_rearrangement_that_fails_keeps_the_layout_and_the_kv(self, nth: int, device: Device) -> None:
        memory = new_memory(device)
        layout = Layout(ALL_UNITS, (2, 2))
        memory.rearrange(layout)
        counts, kv = memory.counts, [layer[: memory.kv.num_blocks(0)] for layer in memory.kv.layers]
        for i, layer in enumerate(kv):
            layer.copy_(torch.arange(layer.numel()).view(layer.shape) % 251 + i)
        expected = [layer.clone() for layer in kv]
        fewer = tuple(unit for unit in ALL_UNITS if unit != "layers.1")
        with self.refusing_to_map(device, nth), pytest.raises(DeviceError):
            memory.rearrange(Layout(fewer, (4, 5)))
        memory.check()
        assert (memory.layout, memory.counts) == (layout, counts)
        assert sorted(self.mapped(device).values()) == sorted(memory.weights.mapped_chunks + memory.kv.mapped_chunks)
        assert all(torch.equal(layer, its) for layer, its in zip(kv, expected, strict=True))

    # --- copies -------------------------------------------------------------------------------------------------

    async def test_blocks_are_copied_between_devices(self, devices: tuple[Device, Device]) -> None:
        source, target = devices
        kv, other = layers_of(source, 100), layers_of(target)
        await target.copy(layer_copies(kv, [3, 1], other, [0, 5], range(2)), source)
        for layer in range(2):
            assert firsts(other[layer]) == [firsts(kv[layer])[3], 0, 0, 0, 0, firsts(kv[layer])[1]]

    async def test_blocks_are_copied_within_a_device(self, device: Device) -> None:
        (kv, other) = layers_of(device, 100)
        before, its = firsts(kv), firsts(other)
        await device.copy([BlockCopy(kv, [0, 4], kv, [2, 1]), BlockCopy(kv, [5], other, [0])])
        assert firsts(kv) == [before[i] for i in (0, 4, 0, 3, 4, 5)]
        assert firsts(other) == [before[5], *its[1:]]

    async def test_blocks_go_to_the_host_and_come_back_elsewhere(self, devices: tuple[Device, Device]) -> None:
        source, target = devices
        kv, other = layers_of(source, 100), layers_of(target)
        host = host_blocks(3, kv[0])
        host.zero_()
        await source.copy([BlockCopy(kv[0], [5, 2], host, [2, 0])], is_to_host=True)
        assert firsts(host) == [firsts(kv[0])[2], 0, firsts(kv[0])[5]]
        await target.copy([BlockCopy(host, [0, 2], other[1], [1, 3])])
        assert firsts(other[1]) == [0, firsts(kv[0])[2], 0, firsts(kv[0])[5], 0, 0] and firsts(other[0]) == [0] * 6

    async def test_kv_of_8_bits_keeps_every_byte(self, devices: tuple[Device, Device]) -> None:
        """Those that stand for no number, too: from device to device, to the host and back."""
        source, target = devices
        (kv, back), (other, _) = ([t.view(torch.uint8) for t in layers_of(device)] for device in devices)
        written = torch.randint(256, kv.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        kv.copy_(written)
        await target.copy([BlockCopy(kv.view(E4M3), [3, 1], other.view(E4M3), [0, 5])], source)
        host = host_blocks(2, other.view(E4M3))
        await target.copy([BlockCopy(other.view(E4M3), [5, 0], host, [0, 1])], is_to_host=True)
        await source.copy([BlockCopy(host, [0, 1], back.view(E4M3), [4, 2])])
        assert torch.equal(back[4].cpu(), written[1]) and torch.equal(back[2].cpu(), written[3])

    async def test_a_tensor_is_copied_from_another_device(self, devices: tuple[Device, Device]) -> None:
        source, target = devices
        size = 2 * source.chunk_bytes
        addresses = [device.reserve(size) for device in devices]
        for device, address in zip(devices, addresses, strict=True):
            device.map(address, [1, 0])
        read, write = (device.tensor(address, size) for device, address in zip(devices, addresses, strict=True))
        read.copy_(torch.arange(size) % 251)
        write.zero_()
        await target.copy_tensor(read[5:-3], write[5:-3], source)
        assert torch.equal(write[5:-3], read[5:-3]) and not write[:5].any() and not write[-3:].any()

    async def test_copies_and_work_see_what_was_awaited_before(self, devices: tuple[Device, Device]) -> None:
        source, target = devices
        (kv, _), (other, _) = layers_of(source), layers_of(target)
        for i in range(1, 20):
            await source.run(partial(kv[1].fill_, i))
            await target.copy([BlockCopy(kv, [1], other, [2])], source)
            await target.run(lambda: other[3].copy_(other[2]))
            await source.copy_tensor(other[3], kv[4], target)
            assert await source.run(lambda: float(kv[4].min())) == i == float(kv[4].max())

    async def test_a_copy_that_fails_is_an_error_and_the_next_one_works(self, devices: tuple[Device, Device]) -> None:
        source, target = devices
        (kv, _), (other, _) = layers_of(source, 100), layers_of(target)
        for to, away in ((target, source), (target, None)):
            with pytest.raises((IndexError, RuntimeError)):
                await to.copy([BlockCopy(kv, [1, 1 << 40], other, [0, 1])], away)
        assert firsts(other) == [0] * 6
        await target.copy([BlockCopy(kv, [1], other, [0])], source)
        assert firsts(other) == [firsts(kv)[1], 0, 0, 0, 0, 0]

    async def test_copies_go_beside_compute(self, devices: tuple[Device, Device]) -> None:
        source, target = devices
        (kv, _), (other, _) = layers_of(source, 100), layers_of(target)
        may_end = threading.Event()
        computing = [asyncio.create_task(_await(device.run(partial(may_end.wait, 10)))) for device in devices]
        await target.copy([BlockCopy(kv, [1], other, [0])], source)
        await target.copy_tensor(kv[2], other[1], source)
        assert await target.run_copy(lambda: firsts(other)[:2]) == firsts(kv)[1:3]
        assert not any(task.done() for task in computing)
        may_end.set()
        await asyncio.gather(*computing)

    # --- a cancelled caller waits -------------------------------------------------------------------------------

    @pytest.mark.parametrize("num_cancels", [1, 3])
    @pytest.mark.parametrize("queue", ["run", "run_copy"])
    async def test_a_caller_cancelled_however_often_waits_for_its_work(
        self, queue: str, num_cancels: int, device: Device
    ) -> None:
        begun, may_end, has_ended = threading.Event(), threading.Event(), threading.Event()

        def work() -> None:
            begun.set()
            may_end.wait(10)
            has_ended.set()

        caller = asyncio.create_task(_await(getattr(device, queue)(work)))
        while not begun.is_set():
            await asyncio.sleep(0)
        await cancelled(caller, num_cancels)
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert has_ended.is_set()

    @pytest.mark.parametrize("num_cancels", [1, 3])
    @pytest.mark.parametrize("kind", ["between", "within", "to host", "from host", "tensor"])
    async def test_a_cancelled_caller_waits_until_nothing_touches_its_tensors(
        self, kind: str, num_cancels: int, devices: tuple[Device, Device]
    ) -> None:
        source, target = devices
        (kv, _), (other, spare) = layers_of(source, 100), layers_of(target, 50)
        host = torch.ones_like(kv)
        copies: dict[str, tuple[Callable[[], Awaitable[None]], Tensor]] = {
            "between": (lambda: target.copy([BlockCopy(kv, [1, 2], other, [3, 4])], source), other),
            "within": (lambda: target.copy([BlockCopy(other, [1, 2], spare, [3, 4])]), spare),
            "to host": (lambda: target.copy([BlockCopy(other, [1, 2], host, [3, 4])], is_to_host=True), host),
            "from host": (lambda: target.copy([BlockCopy(host, [1, 2], other, [3, 4])]), other),
            "tensor": (lambda: target.copy_tensor(kv, other, source), other),
        }
        copy, written = copies[kind]
        async with self.busy(*devices) as end:
            caller = asyncio.create_task(_await(copy()))
            await cancelled(caller, num_cancels)
            end()
            await asyncio.wait([caller])
            assert caller.cancelled()
            written.fill_(-1)  # the caller goes on, and gives the memory to somebody else
        await self.idle(*devices)
        assert bool((written == -1).all())

    async def test_a_cancelled_caller_of_work_that_fails_leaves_no_unseen_error(self, device: Device) -> None:
        unseen: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(context))
        may_fail = threading.Event()

        def work() -> None:
            may_fail.wait(10)
            raise ZeroDivisionError

        caller = asyncio.create_task(_await(device.run(work)))
        await cancelled(caller, 1)
        may_fail.set()
        with pytest.raises(asyncio.CancelledError):
            await caller
        del caller
        gc.collect()
        assert unseen == []

    async def test_closing_waits_for_what_runs(self) -> None:
        device, other = self.open()
        begun, may_end, has_ended = threading.Event(), threading.Event(), threading.Event()
        address = reserve(device)
        device.map(address, [0])
        flat = device.tensor(address, device.chunk_bytes)

        def work() -> None:
            begun.set()
            may_end.wait(10)
            flat.fill_(9)  # ends the process if it is not mapped any more
            has_ended.set()

        working = asyncio.create_task(_await(device.run(work)))
        while not begun.is_set():
            await asyncio.sleep(0)
        closing = asyncio.create_task(asyncio.to_thread(device.close))
        await let_others_run()
        assert not closing.done()
        may_end.set()
        await closing
        assert has_ended.is_set()
        await asyncio.wait([working])
        working.exception()  # nobody is promised an answer by a device that closes
        await asyncio.to_thread(other.close)
        assert self.is_clean(device) and self.is_clean(other)


async def _await(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


async def let_others_run() -> None:
    """Let every task go as far as it can without a thread."""
    for _ in range(20):
        await asyncio.sleep(0)


async def cancelled(caller: asyncio.Task[Any], num_cancels: int) -> None:
    """Cancel a caller so often; it is still waiting afterwards."""
    await let_others_run()
    for _ in range(num_cancels):
        caller.cancel()
        await let_others_run()
        assert not caller.done()

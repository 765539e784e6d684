"""What every kind of device promises (kunserve/gpu/device.py): a new kind subclasses one of these and passes.

`DeviceContract` holds also on devices without bytes or threads, `MemoryContract` (memory_contract.py) on those that
have both.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from kunserve.errors import DeviceError
from kunserve.gpu.chunk_pool import ChunkPool, ChunkUse
from kunserve.gpu.copies import BlockCopy, layer_copies
from kunserve.gpu.device import Device
from kunserve.gpu.device_memory import DeviceMemory, Layout
from kunserve.gpu.kv_memory import KVShape
from kunserve.gpu.range import Range
from kunserve.model.config import ModelConfig
from kunserve.model.layout import weight_units

NUM_CHUNKS = 16
SIZE = 8  # chunks of a reserved range
MODEL = ModelConfig("llama", 64, 16, 32, 2, 2, 1, 8, 64)
UNITS = weight_units(MODEL, "float32")
ALL_UNITS = tuple(unit.name for unit in UNITS)


class DeviceContract(ABC):
    """What holds on every device."""

    @abstractmethod
    def open(self) -> tuple[Device, Device]:
        """Open two devices of `NUM_CHUNKS` chunks each that copy to each other."""

    @abstractmethod
    def mapped(self, device: Device) -> dict[int, int]:
        """Return the chunk that may be touched at each address, as whoever does the mapping for the device knows it."""

    @abstractmethod
    def is_clean(self, device: Device) -> bool:
        """Return whether a closed device has given everything back."""

    @pytest.fixture
    def devices(self) -> Iterator[tuple[Device, Device]]:
        opened = self.open()
        yield opened
        for device in opened:
            device.close()
        assert all(self.is_clean(device) for device in opened)

    @pytest.fixture
    def device(self, devices: tuple[Device, Device]) -> Device:
        return devices[0]

    def chunks_at(self, device: Device, address: int) -> dict[int, int]:
        """Return the chunks that are mapped in a range of `SIZE`, by their place in it."""
        places = range(address, address + SIZE * device.chunk_bytes, device.chunk_bytes)
        mapped = self.mapped(device)
        return {i: mapped[place] for i, place in enumerate(places) if place in mapped}

    # --- addresses and chunks -----------------------------------------------------------------------------------

    def test_reserved_ranges_are_aligned_and_apart(self, device: Device) -> None:
        size = 3 * device.chunk_bytes
        a, b = device.reserve(size), device.reserve(size)
        assert a % device.chunk_bytes == 0 and b % device.chunk_bytes == 0
        assert a + size <= b or b + size <= a
        device.release(a, size)
        device.release(b, size)

    def test_chunks_are_mapped_where_they_are_wanted_and_free_afterwards(self, device: Device) -> None:
        a, b = reserve(device), reserve(device)
        device.map(a, range(SIZE))
        device.unmap(a + 3 * device.chunk_bytes, 2)
        device.map(b, [4, 9, 3])  # in any order
        assert self.chunks_at(device, a) == {0: 0, 1: 1, 2: 2, 5: 5, 6: 6, 7: 7}
        assert self.chunks_at(device, b) == {0: 4, 1: 9, 2: 3}
        device.release(a, SIZE * device.chunk_bytes)
        device.map(b + 3 * device.chunk_bytes, [0, 1, 7])
        assert sorted(self.mapped(device).values()) == [0, 1, 3, 4, 7, 9]

    def test_no_chunks_are_mapped_and_unmapped_without_effect(self, device: Device) -> None:
        address = reserve(device)
        device.map(address, [])
        device.unmap(address, 0)
        device.map(address, [5])
        device.unmap(address, 0)
        assert self.chunks_at(device, address) == {0: 5}

    def test_a_tensor_over_a_range_is_flat_and_as_long(self, device: Device) -> None:
        tensor = device.tensor(reserve(device), SIZE * device.chunk_bytes)
        assert tensor.shape == (SIZE * device.chunk_bytes,) and tensor.dtype == torch.uint8
        assert tensor.device.type == device.torch_device.type

    # --- errors change nothing ----------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("place", "chunks"),
        [
            pytest.param(2, [9, 10, 0], id="a chunk that is mapped in the same range"),
            pytest.param(2, [9, 5], id="a chunk that is mapped in another range"),
            pytest.param(2, [9, 9], id="a chunk twice"),
            pytest.param(2, [9, NUM_CHUNKS], id="no such chunk"),
            pytest.param(2, [9, -1], id="a chunk counted from the end"),
            pytest.param(0, [9, 10, 11], id="a place that is taken"),
            pytest.param(SIZE - 1, [9, 10], id="beyond the end of the range"),
            pytest.param(2.5, [9], id="between two places"),
        ],
    )
    def test_what_must_not_be_mapped_is_refused(self, device: Device, place: float, chunks: list[int]) -> None:
        a, b = reserve(device), reserve(device)
        device.map(a, [0, 1])
        device.map(b + 4 * device.chunk_bytes, [5])
        before = self.mapped(device)
        with pytest.raises(DeviceError, match=device.name):
            device.map(a + int(place * device.chunk_bytes), chunks)
        assert self.mapped(device) == before
        device.map(a + 2 * device.chunk_bytes, [9, 10])
        assert self.chunks_at(device, a) == {0: 0, 1: 1, 2: 9, 3: 10}

    def test_nothing_is_mapped_outside_of_ranges(self, device: Device) -> None:
        """There may be anything at all, in the end the interpreter's own memory."""
        ranges = [reserve(device) for _ in range(3)]
        for outside in (min(ranges) - device.chunk_bytes, max(ranges) + SIZE * device.chunk_bytes):
            with pytest.raises(DeviceError, match=device.name):
                device.map(outside, [9])
        assert self.mapped(device) == {}

    @pytest.mark.parametrize(("place", "num_chunks"), [(1, 2), (2, 1), (-1, 2), (0, SIZE)])
    def test_what_is_not_mapped_is_not_unmapped(self, device: Device, place: int, num_chunks: int) -> None:
        a = reserve(device)
        device.map(a, [0, 1])
        device.map(a + 3 * device.chunk_bytes, [2])
        with pytest.raises(DeviceError, match=f"{device.name}: .* is not mapped"):
            device.unmap(a + place * device.chunk_bytes, num_chunks)
        assert self.chunks_at(device, a) == {0: 0, 1: 1, 3: 2}

    def test_only_a_whole_range_is_released(self, device: Device) -> None:
        a, size = reserve(device), SIZE * device.chunk_bytes
        device.map(a, [3])
        for wrong in ((a + device.chunk_bytes, size), (a, size - device.chunk_bytes), (a + 3 * size, size)):
            with pytest.raises(DeviceError, match="is not a reserved range"):
                device.release(*wrong)
        assert self.chunks_at(device, a) == {0: 3}
        device.release(a, size)
        with pytest.raises(DeviceError, match="is not a reserved range"):
            device.release(a, size)

    def test_a_range_that_finds_too_few_chunks_stays_as_it_was(self, device: Device) -> None:
        pool = ChunkPool(device.num_chunks)
        kv, weights = (Range(device, pool, use, NUM_CHUNKS) for use in (ChunkUse.KV, ChunkUse.WEIGHTS))
        kv.resize(10)
        weights.resize(4)
        before = self.mapped(device)
        with pytest.raises(DeviceError, match="3 chunks wanted for weights, 2 free"):
            weights.resize(7)
        assert self.mapped(device) == before
        pool.check({ChunkUse.KV: kv.chunks, ChunkUse.WEIGHTS: weights.chunks})

    def test_a_layout_that_does_not_fit_leaves_the_old_one(self, device: Device) -> None:
        memory = new_memory(device)
        memory.rearrange(Layout(ALL_UNITS, (2, 2)))
        before, counts = self.mapped(device), memory.counts
        with pytest.raises(DeviceError, match="out of device memory"):
            memory.rearrange(Layout(ALL_UNITS[:-1], (1, NUM_CHUNKS)))
        memory.check()
        assert (memory.layout, memory.counts) == (Layout(ALL_UNITS, (2, 2)), counts)
        assert self.mapped(device).keys() == before.keys()

    # --- work and copies ----------------------------------------------------------------------------------------

    @pytest.mark.parametrize("queue", ["run", "run_copy"])
    async def test_work_runs_in_the_order_of_asking(self, queue: str, device: Device) -> None:
        run, order = getattr(device, queue), list[int]()
        await asyncio.gather(*(run(partial(order.append, i)) for i in range(20)))
        assert order == list(range(20))
        assert await run(lambda: 7) == 7

    @pytest.mark.parametrize("queue", ["run", "run_copy"])
    async def test_errors_come_back_and_work_goes_on(self, queue: str, device: Device) -> None:
        run = getattr(device, queue)
        work: list[Callable[[], int]] = [lambda: 1, lambda: 1 // 0, lambda: 2]
        first, error, last = await asyncio.gather(*map(run, work), return_exceptions=True)
        assert (first, last) == (1, 2) and isinstance(error, ZeroDivisionError)

    async def test_copies_between_devices_return(self, devices: tuple[Device, Device]) -> None:
        source, target = devices
        kv = [layers_of(device) for device in devices]
        await target.copy(layer_copies(kv[0], [3, 1], kv[1], [0, 5], range(2)), source)
        await target.copy([BlockCopy(kv[1][0], [0], kv[1][1], [2])])
        await target.copy_tensor(kv[0][0][:3], kv[1][0][3:6], source)

    # --- the end ------------------------------------------------------------------------------------------------

    def test_closing_gives_back_what_is_mapped_and_closing_again_does_nothing(self) -> None:
        devices = self.open()
        for device in devices:
            device.map(reserve(device), [3, 1])
            device.close()
            device.close()
        assert all(self.is_clean(device) for device in devices)


# --- parts ------------------------------------------------------------------------------------------------------------


def reserve(device: Device) -> int:
    return device.reserve(SIZE * device.chunk_bytes)


def fill(device: Device, address: int, values: Sequence[int]) -> None:
    flat = device.tensor(address, len(values) * device.chunk_bytes)
    for i, value in enumerate(values):
        flat[i * device.chunk_bytes : (i + 1) * device.chunk_bytes] = value


def read(device: Device, address: int, num_chunks: int) -> list[int]:
    """First byte of each chunk, after checking that the chunk is uniform."""
    flat = device.tensor(address, num_chunks * device.chunk_bytes).view(num_chunks, -1)
    assert (flat == flat[:, :1]).all()
    return [int(v) for v in flat[:, 0]]


def new_memory(device: Device) -> DeviceMemory:
    return DeviceMemory(device, UNITS, MODEL.num_layers, KVShape.of(MODEL, 4, torch.float32))


def layers_of(device: Device, base: int | None = None) -> list[Tensor]:
    """Map a chunk for each of two layers of six blocks; block b of layer l is filled with `base` + 10 l + b, or 0."""
    layers = []
    for layer in range(2):
        address = device.reserve(device.chunk_bytes)
        device.map(address, [NUM_CHUNKS - 1 - layer])
        blocks = device.tensor(address, 6 * 1024).view(torch.float32).view(6, 2, -1)
        for block in range(6):
            blocks[block].fill_(0 if base is None else base + 10 * layer + block)
        layers.append(blocks)
    return layers


def firsts(blocks: Tensor) -> list[int]:
    """The value of each block, after checking that the block is uniform."""
    flat = blocks.reshape(len(blocks), -1)
    assert (flat == flat[:, :1]).all()
    return [int(value) for value in flat[:, 0]]

"""Where units come from, and that nobody copies from a device whose own content has not arrived."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import ExitStack, asynccontextmanager
from typing import Any, TypeVar

import pytest
import torch

from kunserve.engine.regroup.weight_loader import WeightLoader
from kunserve.errors import DeviceError
from kunserve.gpu.device_memory import DeviceMemory
from kunserve.gpu.host import HostDevice
from kunserve.gpu.host_weights import keep_host_copy
from kunserve.gpu.kv_memory import KVShape
from kunserve.gpu.links import HOST, Links, Priority
from kunserve.model.checkpoint import DummySource
from kunserve.model.config import ModelConfig
from kunserve.model.host_copy import HostCopy, LoadedFrom
from kunserve.model.layout import weight_units

T = TypeVar("T")

MODEL = ModelConfig("llama", 500, 64, 96, 2, 4, 2, 16, 256)
CHUNK_BYTES = 1 << 16
UNITS = {unit.name: unit for unit in weight_units(MODEL, "float32")}
LAYER_BYTES = 4 * (64 + 64 * 64 + 2 * 32 * 64 + 64 * 64 + 64 + 3 * 64 * 96)
MATE, DISK, FROM_HOST = LoadedFrom.MATE, LoadedFrom.DISK, LoadedFrom.HOST


class CountingSource(DummySource):
    """Stands for the files: knows what was read of them, by unit."""

    def __init__(self) -> None:
        super().__init__(MODEL)
        self.num_bytes = Counter[str]()
        self._unit_of = {spec.name: unit.name for unit in UNITS.values() for spec in unit.tensors}

    def copy_into(self, name: str, out: torch.Tensor) -> None:
        self.num_bytes[self._unit_of[name]] += out.nbytes
        super().copy_into(name, out)


class SeenLinks(Links):
    """Links that remember who took a turn, for how many bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.turns: list[tuple[int, int, Priority, int]] = []

    def turn(self, source: int, destination: int, priority: Priority, num_bytes: int) -> Any:
        self.turns.append((source, destination, priority, num_bytes))
        return super().turn(source, destination, priority, num_bytes)


class Gate:
    """Holds the copies of a device until it is removed."""

    def __init__(self, memory: DeviceMemory) -> None:
        self.is_reached, self._is_open = asyncio.Event(), asyncio.Event()
        self._device: Any = memory.device.inner
        self._copy = self._device.run_copy
        self._device.run_copy = self._run  # type: ignore[method-assign]

    async def _run(self, work: Callable[[], T]) -> T:
        self.is_reached.set()
        await self._is_open.wait()
        result: T = await self._copy(work)
        return result

    def remove(self) -> None:
        self._is_open.set()
        self._device.run_copy = self._copy


@asynccontextmanager
async def loading(
    num_devices: int, kind: HostCopy = HostCopy.NONE, islands: Iterable[int] = ()
) -> AsyncIterator[tuple[list[DeviceMemory], WeightLoader, CountingSource]]:
    """Devices with all units mapped and none of them filled, a loader for them, and the files that it reads."""
    source, shape = CountingSource(), KVShape.of(MODEL, 4, torch.float32)
    with ExitStack() as stack:
        memories = []
        for i in range(num_devices):
            device = HostDevice(i, 16, CHUNK_BYTES)
            stack.callback(device.close)
            memories.append(DeviceMemory(device, list(UNITS.values()), MODEL.num_layers, shape))
            for unit in UNITS:
                memories[-1].weights.map(unit)
                memories[-1].weights.content(unit).fill_(0xAB)
        host = keep_host_copy(kind, source, list(UNITS.values()))
        yield memories, WeightLoader(memories, host, islands), source


def assert_right(memory: DeviceMemory, units: Iterable[str] = UNITS) -> None:
    """Every tensor of these units holds the bits that a source gives it."""
    source = DummySource(MODEL)
    for unit in units:
        assert memory.weights.is_filled(unit)
        for spec in UNITS[unit].tensors:
            expected = torch.empty(spec.shape)
            source.copy_into(spec.name, expected)
            assert torch.equal(memory.weights.tensor(unit, spec.name), expected), spec.name


async def test_the_files_are_read_once_however_many_ask_at_once() -> None:
    async with loading(3) as (memories, loader, source):
        total = sum(memories[0].weights.num_tensor_bytes(unit) for unit in UNITS)
        assert memories[0].weights.num_tensor_bytes("layers.0") == LAYER_BYTES

        async def load_all(device: int) -> None:
            for unit in UNITS:
                await loader.load(device, unit, Links())

        await asyncio.gather(*map(load_all, range(3)))
        assert loader.num_bytes == {DISK: total, MATE: 2 * total}
        assert source.num_bytes == {unit: memories[0].weights.num_tensor_bytes(unit) for unit in UNITS}
        for memory in memories:
            assert_right(memory)


@pytest.mark.parametrize("kind", [HostCopy.PINNED, HostCopy.MAPPED])
async def test_a_host_copy_serves_all_devices(kind: HostCopy) -> None:
    async with loading(2, kind) as (memories, loader, source):
        for device in (0, 1):
            await loader.load(device, "layers.0", Links())
            assert_right(memories[device], ["layers.0"])
        assert loader.num_bytes == {FROM_HOST: 2 * LAYER_BYTES}
        assert source.num_bytes == {"layers.0": LAYER_BYTES * (1 if kind is HostCopy.PINNED else 2)}


async def test_chunks_whose_content_has_not_arrived_are_no_source() -> None:
    async with loading(2) as (memories, loader, _):
        gate = Gate(memories[0])
        first = asyncio.create_task(loader.load(0, "layers.1", Links()))
        await gate.is_reached.wait()
        second = asyncio.create_task(loader.load(1, "layers.1", Links()))
        for _ in range(10):
            await asyncio.sleep(0)
        assert memories[0].weights.unfilled == memories[1].weights.unfilled == list(UNITS)
        assert not loader.num_bytes
        gate.remove()
        await asyncio.gather(first, second)
        assert loader.num_bytes == {DISK: LAYER_BYTES, MATE: LAYER_BYTES}
        assert_right(memories[1], ["layers.1"])


@pytest.mark.parametrize("is_cancelled", [True, False])
async def test_a_load_that_ends_before_its_end_leaves_no_source(is_cancelled: bool) -> None:
    async with loading(2) as (memories, loader, _):
        device: Any = memories[0].device.inner
        run_copy, is_reached = device.run_copy, asyncio.Event()

        async def fail(work: Callable[[], object]) -> None:
            memories[0].weights.content("layers.0")[:100] = 0  # something has arrived
            is_reached.set()
            if is_cancelled:
                await asyncio.Event().wait()
            raise DeviceError("broken")

        device.run_copy = fail
        first = asyncio.create_task(loader.load(0, "layers.0", Links()))
        await is_reached.wait()
        if is_cancelled:
            first.cancel()
        with pytest.raises(asyncio.CancelledError if is_cancelled else DeviceError):
            await first
        assert not memories[0].weights.is_filled("layers.0")
        device.run_copy = run_copy
        await loader.load(1, "layers.0", Links())
        assert loader.num_bytes == {DISK: LAYER_BYTES}
        await loader.load(0, "layers.0", Links())
        assert loader.num_bytes == {DISK: LAYER_BYTES, MATE: LAYER_BYTES}
        assert_right(memories[0], ["layers.0"])


async def test_a_unit_that_was_dropped_and_mapped_again_is_no_source() -> None:
    async with loading(3) as (memories, loader, _):
        await loader.load(0, "layers.0", Links())
        weights = memories[0].weights
        weights.drop("layers.0")
        weights.map("layers.0")
        assert "layers.0" in weights.present and "layers.0" in weights.unfilled
        await loader.load(1, "layers.0", Links())
        assert loader.num_bytes == {DISK: 2 * LAYER_BYTES}
        assert_right(memories[1], ["layers.0"])


async def test_the_nearest_mate_is_asked_and_of_several_the_one_that_fewest_ask() -> None:
    async with loading(5, islands=[0, 0, 1, 1, 1]) as (memories, loader, _):
        links = SeenLinks()
        for device in (0, 2):
            await loader.load(device, "layers.0", links)
        links.turns.clear()
        gates = [Gate(memories[device]) for device in (1, 3, 4)]
        tasks = [asyncio.create_task(loader.load(device, "layers.0", links)) for device in (3, 1)]
        for gate in gates[:2]:
            await gate.is_reached.wait()
        assert [turn[:2] for turn in links.turns] == [(2, 3), (0, 1)]  # each of its own island
        gates[0].remove()
        gates[1].remove()
        await asyncio.gather(*tasks)
        links.turns.clear()
        for unit in ("embed", "head"):  # so that two are asked for two units at once
            for device in (2, 3):
                await loader.load(device, unit, Links())
        both = [asyncio.create_task(loader.load(4, unit, links)) for unit in ("embed", "head")]
        await gates[2].is_reached.wait()
        for _ in range(10):
            await asyncio.sleep(0)
        gates[2].remove()
        await asyncio.gather(*both)
        assert [turn[:2] for turn in links.turns] == [(2, 4), (3, 4)]


async def test_units_take_turns_on_the_link_that_they_come_over_in_slices_from_mates() -> None:
    async with loading(2) as (memories, loader, _):
        links = SeenLinks()
        links.slice_bytes = 40_000
        await loader.load(0, "layers.0", links)
        mapped_bytes = memories[0].weights.num_chunks("layers.0") * CHUNK_BYTES
        assert links.turns == [(HOST, 0, Priority.WEIGHTS, mapped_bytes)]
        links.turns.clear()
        await loader.load(1, "layers.0", links)
        size = UNITS["layers.0"].num_bytes
        pieces = [40_000] * (size // 40_000) + [size % 40_000]
        assert links.turns == [(0, 1, Priority.WEIGHTS, piece) for piece in pieces] and len(pieces) > 2
        assert_right(memories[1], ["layers.0"])

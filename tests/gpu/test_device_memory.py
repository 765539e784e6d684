"""The memory of one device: remapped whole or not at all, in one budget, whoever looks meanwhile."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from kunserve.errors import DeviceError
from kunserve.gpu.chunk_pool import ChunkUse
from kunserve.gpu.copies import BlockCopy
from kunserve.gpu.device_memory import DeviceMemory, Layout
from kunserve.gpu.host import HostDevice
from kunserve.gpu.kv_memory import KVShape
from kunserve.gpu.null import NullDevice
from kunserve.model.config import ModelConfig
from kunserve.model.layout import units_of_stage, weight_units

NUM_LAYERS, NUM_CHUNKS = 4, 64
MODEL = ModelConfig(
    family="llama",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=NUM_LAYERS,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
)
KV = KVShape(2, 4, 8, torch.float32)


def new_memory(device: Any) -> DeviceMemory:
    return DeviceMemory(device, weight_units(MODEL, "float32"), NUM_LAYERS, KV)


def layout_of(first: int, last: int, chunks: Sequence[int]) -> Layout:
    return Layout(tuple(units_of_stage(MODEL, first, last)), tuple(chunks))


WHOLE = layout_of(0, 4, [2, 2, 2, 2])
FRONT = layout_of(0, 2, [6, 6, 2, 2])
BACK = layout_of(2, 4, [0, 0, 9, 9])


def test_layouts_are_reached_from_each_other() -> None:
    memory = new_memory(NullDevice(0, NUM_CHUNKS, 4096))
    rng = random.Random(0)
    for _ in range(100):
        layout = rng.choice([WHOLE, FRONT, BACK, Layout((), (0, 0, 0, 0)), layout_of(0, 4, [3, 0, 1, 5])])
        memory.rearrange(layout)
        memory.check()
        assert set(memory.layout.units) == set(layout.units) and memory.layout.kv_chunks == layout.kv_chunks
        counts = memory.counts
        assert counts.free + counts.weights + counts.kv == counts.budget == NUM_CHUNKS
        assert counts.kv == sum(layout.kv_chunks)


@pytest.mark.parametrize("name", ["map", "unmap"])
def test_any_call_may_fail(name: str) -> None:
    device: Any = NullDevice(0, NUM_CHUNKS, 4096)
    memory = new_memory(device)
    call, number = getattr(device, name), -1

    def fail_once(*arguments: Any) -> None:
        nonlocal number
        number -= 1
        if number == -1:
            raise DeviceError("refused")
        call(*arguments)

    setattr(device, name, fail_once)
    num_failed = 0
    for at in range(100):
        number = -1
        memory.rearrange(WHOLE)
        number = at
        try:
            memory.rearrange(FRONT)
        except DeviceError:
            num_failed += 1
            assert set(memory.layout.units) == set(WHOLE.units) and memory.layout.kv_chunks == WHOLE.kv_chunks
            memory.check()
        else:
            break
    assert num_failed >= 2 and memory.layout.kv_chunks == FRONT.kv_chunks


def test_too_much_is_refused_and_nothing_changes() -> None:
    memory = new_memory(NullDevice(0, NUM_CHUNKS, 4096))
    memory.rearrange(WHOLE)
    with pytest.raises(DeviceError, match="out of device memory"):
        memory.rearrange(layout_of(0, 4, [20, 20, 20, 20]))
    assert memory.layout.kv_chunks == WHOLE.kv_chunks
    memory.check()


def test_who_looks_sees_it_before_or_after() -> None:
    """As a scrape of the metrics does, while a worker thread remaps."""
    device: Any = NullDevice(0, NUM_CHUNKS, 4096)
    memory = new_memory(device)
    memory.rearrange(WHOLE)
    seen, map_ = [], device.map

    def look(address: int, chunks: Sequence[int]) -> None:
        looking = threading.Thread(target=lambda: seen.append((memory.counts, memory.layout)))
        looking.start()
        lookers.append(looking)
        looking.join(0.01)  # it waits for us
        map_(address, chunks)

    lookers: list[threading.Thread] = []
    before = memory.counts, memory.layout
    device.map = look
    memory.rearrange(FRONT)
    for looking in lookers:
        looking.join()
    after = memory.counts, memory.layout
    assert lookers and set(seen) <= {before, after}


def test_a_check_that_is_overtaken_counts_nothing_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has begun to look, and then the device's thread begins to rearrange."""
    memory = new_memory(NullDevice(0, NUM_CHUNKS, 4096))
    memory.rearrange(WHOLE)
    check = memory.pool.check

    def check_late(mapped: Any) -> None:
        memory.rearrange(FRONT)
        check(mapped)  # raises

    monkeypatch.setattr(memory.pool, "check", check_late)
    memory.check()
    monkeypatch.undo()
    memory.check()
    memory.pool.alloc(1, ChunkUse.WEIGHTS)  # which no range has mapped
    with pytest.raises(AssertionError):  # nobody rearranges: it counts
        memory.check()


async def test_kv_that_stays_keeps_its_bytes() -> None:
    device = HostDevice(0, NUM_CHUNKS, 4096)
    try:
        memory = new_memory(device)
        memory.rearrange(WHOLE)
        blocks = memory.kv.num_blocks(0)
        for layer in range(NUM_LAYERS):
            memory.kv.layers[layer][:blocks] = float(layer + 1)
        await device.run(lambda: memory.rearrange(FRONT))
        for layer in range(NUM_LAYERS):
            assert bool((memory.kv.layers[layer][:blocks] == layer + 1).all())
        memory.kv.layers[0][blocks : memory.kv.num_blocks(0)] = 9.0  # what came is writable
        assert bool((memory.kv.layers[1][:blocks] == 2).all())
    finally:
        device.close()


async def test_copies_touch_only_the_named_blocks() -> None:
    devices = [HostDevice(i, NUM_CHUNKS, 4096) for i in range(2)]
    try:
        source, target = (new_memory(device) for device in devices)
        for memory in (source, target):
            memory.rearrange(WHOLE)
        num_blocks = source.kv.num_blocks(0)
        read, write = source.kv.layers[1], target.kv.layers[3]
        read[:num_blocks] = torch.arange(num_blocks, dtype=torch.float32)[:, None, None, None, None] + 1
        write[:num_blocks] = 0
        await devices[1].copy([BlockCopy(read, [2, 0], write, [1, 3])], devices[0])
        firsts = write[:num_blocks, 0, 0, 0, 0].tolist()
        assert firsts == [0, 3, 0, 1] + [0] * (num_blocks - 4)
        assert all(bool((write[i] == write[i, 0, 0, 0, 0]).all()) for i in range(num_blocks))
        await devices[0].copy([BlockCopy(read, [0], read, [3])])  # on one device
        assert read[:4, 0, 0, 0, 0].tolist() == [1, 2, 3, 1]
    finally:
        await asyncio.gather(*(asyncio.to_thread(device.close) for device in devices))

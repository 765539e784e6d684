"""Chunk pool and ranges under random use, with `check()` after every operation."""

from __future__ import annotations

import random

import pytest
import torch
from seeds import seeds

from kunserve.errors import DeviceError
from kunserve.gpu.chunk_pool import ChunkPool, ChunkUse
from kunserve.gpu.kv_memory import KVMemory, KVShape, max_layer_chunks
from kunserve.gpu.null import NullDevice
from kunserve.gpu.range import Range
from kunserve.planner.snapshot import ModelShape


@pytest.mark.parametrize("seed", seeds(20))
def test_random_resizes_keep_the_budget(seed: int) -> None:
    rng = random.Random(seed)
    device, pool = NullDevice(0, 40), ChunkPool(40)
    uses = [ChunkUse.WEIGHTS] * 3 + [ChunkUse.KV] * 3
    ranges = [Range(device, pool, use, 40) for use in uses]
    for _ in range(200):
        range_, target = rng.choice(ranges), rng.randrange(25)
        before = list(range_.chunks)
        try:
            range_.resize(target)
        except DeviceError:
            assert target - len(before) > pool.num_free and range_.chunks == before
        else:
            assert len(range_.chunks) == target
            assert range_.chunks[: min(target, len(before))] == before[:target]  # the front never moves
        pool.check(
            {use: [c for r, o in zip(ranges, uses, strict=True) if o is use for c in r.chunks] for use in ChunkUse}
        )
    for range_ in ranges:
        range_.release()
    assert pool.num_free == 40


def test_a_failed_map_gives_the_chunks_back(monkeypatch: pytest.MonkeyPatch) -> None:
    device, pool = NullDevice(0, 4), ChunkPool(4)
    range_ = Range(device, pool, ChunkUse.KV, 4)

    def refuse(address: int, chunks: object) -> None:
        raise DeviceError("no")

    monkeypatch.setattr(device, "map", refuse)
    with pytest.raises(DeviceError):
        range_.resize(2)
    assert pool.num_free == 4 and range_.chunks == []


def test_check_sees_a_leak() -> None:
    pool = ChunkPool(4)
    taken = pool.alloc(2, ChunkUse.KV)
    pool.check({ChunkUse.KV: taken})
    with pytest.raises(AssertionError):
        pool.check({ChunkUse.KV: taken[:1]})
    with pytest.raises(AssertionError):
        pool.check({ChunkUse.WEIGHTS: taken})
    with pytest.raises(DeviceError, match="3 chunks wanted for weights, 2 free"):
        pool.alloc(3, ChunkUse.WEIGHTS)
    pool.free(taken)
    with pytest.raises(AssertionError):
        pool.free(taken[:1])


def test_addresses_are_left_for_eight_large_devices() -> None:
    chunk = 64 << 20
    for num_layers in (1, 32, 80, 126):
        device = NullDevice(0, (141 << 30) // chunk, chunk)
        shape = KVShape(8, 16, 128, torch.bfloat16)
        memory = KVMemory(device, ChunkPool(device.num_chunks), num_layers, shape)
        reserved = sum(device.mappings.reserved.values())
        assert 8 * reserved <= 64 << 40  # half of what a process has
        one_layer = max_layer_chunks(num_layers, chunk)
        assert reserved == num_layers * min(one_layer, device.num_chunks) * chunk
        assert one_layer >= device.num_chunks or one_layer * chunk >= 64 << 30
        assert len(memory.layers) == num_layers


def test_no_plan_gives_a_layer_more_than_its_addresses_hold() -> None:
    shape = ModelShape(4, 3, 2, 1, False, 100, 1000, 16, max_layer_chunks=20)
    assert shape.kv_chunks(1000, 0, 4) == 20
    assert shape.kv_chunks(4 * 3 + 3 + 4 * 19, 0, 4) == 19
    assert shape.kv_chunks(0, 0, 4) < 0


def test_blocks_get_to_the_first_chunks_of_all_layers_before_the_second() -> None:
    device, pool = NullDevice(0, 40), ChunkPool(40)
    memory = KVMemory(device, pool, 3, KVShape(2, 4, 8, torch.float32))
    assert memory.chunks_by_turn == []
    for layer, num_chunks in enumerate((6, 0, 3)):
        memory.resize(layer, num_chunks)  # chunks 0 to 5, and 6 to 8
    assert memory.chunks_by_turn == [[0, 6], [1, 7], [2, 8], [3], [4], [5]]
    memory.resize(0, 1)
    memory.resize(2, 0)
    assert memory.chunks_by_turn == [[0]]

"""GPU check: the device contract, and what the driver's calls cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from gpucheck.bench import GIB, Bench, RandomSource, llama_1b, llama_8b
from gpucheck.worker import tell
from kunserve.gpu.cuda.device import CudaDevice, open_cuda_devices, open_drivers
from kunserve.gpu.device_memory import Layout
from kunserve.model.config import ModelConfig
from kunserve.model.layout import units_of_stage


def contract(bench: Bench) -> dict[str, Any]:
    """Check that content follows its chunk, that tensors outlive remaps, and a remap beside another device's work."""
    device, other = open_cuda_devices(open_drivers([bench.ordinal] * 2, bench.open_driver), 8, 32 << 20)
    try:
        size = device.chunk_bytes
        a, b = device.reserve(8 * size), device.reserve(8 * size)
        at_a, at_b = device.tensor(a, 8 * size).view(8, -1), device.tensor(b, 8 * size).view(8, -1)
        device.map(a, [0, 1, 2, 3])
        for i in range(4):
            at_a[i].fill_(10 + i)
        bench.synchronize()
        device.unmap(a + 2 * size, 2)
        device.map(b, [3, 2, 5])
        assert _values(at_b[:2]) == [13, 12] and _values(at_a[:2]) == [10, 11]
        device.unmap(b, 3)
        device.map(a + 2 * size, [2, 3])
        assert _values(at_a[:4]) == [10, 11, 12, 13]
        _remap_beside_work(bench, device, other, b)
        assert _values(at_a[:4]) == [10, 11, 12, 13]
    finally:
        device.close()
        other.close()
    return {"ok": True}


def _remap_beside_work(bench: Bench, device: CudaDevice, other: CudaDevice, address: int) -> None:
    """Remap one device while another logical device of the same GPU computes: its results must be right."""
    busy = other.reserve(8 * other.chunk_bytes)
    other.map(busy, range(8))
    x = other.tensor(busy, 8 * other.chunk_bytes)
    with other.driver.on(other.copy_in.stream):
        x.fill_(1)
        for _ in range(50):
            device.map(address, [4, 5, 6, 7])
            x.add_(1)
            device.unmap(address, 4)
    bench.synchronize()
    assert _values(x.view(1, -1)) == [51]


def _values(rows: torch.Tensor) -> list[int]:
    assert bool((rows == rows[:, :1]).all()), "a chunk has lost its content"
    return [int(v) for v in rows[:, 0]]


def driver_calls(bench: Bench) -> dict[str, Any]:
    """Time each call in microseconds, and a GiB in milliseconds, with chunks of 2, 16, 32 and 64 MiB."""
    (driver,) = open_drivers([bench.ordinal], bench.open_driver)
    figures: dict[str, Any] = {}
    total = GIB // 8 if bench.is_quick else 2 * GIB
    for mib in (2, 16, 32, 64):
        size, count = mib << 20, total // (mib << 20)
        created_s, handles = _timed(lambda size=size, count=count: [driver.create(size) for _ in range(count)])  # type: ignore[misc]
        base = driver.reserve(total)

        def map_all(base: int = base, size: int = size, handles: list[int] = handles) -> None:
            for i, handle in enumerate(handles):
                driver.map(base + i * size, size, handle)

        mapped_s, _ = _timed(map_all)
        access_s, _ = _timed(lambda base=base: driver.set_access(base, total))  # type: ignore[misc]
        unmapped_s, _ = _timed(lambda base=base: driver.unmap(base, total))  # type: ignore[misc]
        driver.free(base, total)

        def release_all(handles: list[int] = handles) -> None:
            for handle in handles:
                driver.release(handle)

        released_s, _ = _timed(release_all)
        gib = total / GIB
        figures[f"{mib} MiB"] = {
            "create_us": created_s / count * 1e6,
            "map_us": mapped_s / count * 1e6,
            "release_us": released_s / count * 1e6,
            "set_access_ms_per_gib": access_s / gib * 1e3,
            "unmap_ms_per_gib": unmapped_s / gib * 1e3,
            "move_ms_per_gib": (mapped_s + access_s + unmapped_s) / gib * 1e3,
        }
        tell(figures)
    driver.close()
    return figures


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def remap(bench: Bench, config: ModelConfig | None = None) -> dict[str, Any]:
    """Give the chunks of half a model's layers to the KV of those that stay, and take them back."""
    config = config or (llama_1b() if bench.is_quick else llama_8b())
    half = config.num_layers // 2
    with bench.place(
        config, torch.bfloat16, RandomSource(), num_tokens=64, num_seqs=8, num_blocks=1024, enforce_eager=True
    ) as (placed,):
        memory, full = placed.memory, placed.memory.layout
        units = units_of_stage(config, 0, half)
        gone = sum(memory.weights.num_chunks(u) for u in full.units if u not in units)
        extra = (gone + sum(full.kv_chunks[half:])) // half
        dropped = Layout(units, tuple(n + extra if i < half else 0 for i, n in enumerate(full.kv_chunks)))
        drops, returns = [], []
        for _ in range(5):
            drops.append(_timed(lambda: memory.rearrange(dropped))[0])
            returns.append(_timed(lambda: memory.rearrange(full))[0])
        memory.check()
        return tell(
            {
                "layers": half,
                "gib": gone * placed.device.chunk_bytes / GIB,
                "chunk_mib": placed.device.chunk_bytes >> 20,
                "drop_ms": sorted(drops)[2] * 1e3,
                "drop_ms_all": [s * 1e3 for s in drops],
                "return_ms": sorted(returns)[2] * 1e3,
            }
        )

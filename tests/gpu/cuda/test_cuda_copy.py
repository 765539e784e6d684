"""Copies between CUDA devices, to the host and back, on drivers that keep CUDA's rules."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda
from test_cuda import CHUNK, until

from kunserve.errors import DeviceError
from kunserve.gpu.copies import BlockCopy, host_blocks, layer_copies
from kunserve.gpu.cuda import copy
from kunserve.gpu.cuda.copy import transfer
from kunserve.gpu.cuda.device import (
    open_cuda_devices,
)


@pytest.mark.parametrize("reachable", [True, False])
async def test_transfer_between_gpus(reachable: bool) -> None:
    drivers = [FakeCuda(0, reachable=[1] if reachable else []), FakeCuda(1, reachable=[0] if reachable else [])]
    source, target = open_cuda_devices(drivers, 2, CHUNK)
    addresses = [device.reserve(2 * CHUNK) for device in (source, target)]
    for device, address in zip((source, target), addresses, strict=True):
        device.map(address, [1, 0])
    src, dst = (d.tensor(address, 2 * CHUNK) for d, address in zip((source, target), addresses, strict=True))
    src.copy_(torch.arange(2 * CHUNK) % 251)
    await transfer(source, src, target, dst, slice_bytes=1_000_000)  # slices that divide nothing
    assert torch.equal(src, dst)
    source.close()
    target.close()
    assert all(driver.is_clean() for driver in drivers)


@pytest.mark.parametrize("kind", ["one GPU", "peers", "staged"])
async def test_blocks_are_copied_between_devices_and_to_the_host(kind: str) -> None:
    ordinals, is_peer = ((0, 0) if kind == "one GPU" else (0, 1)), kind == "peers"
    drivers = [FakeCuda(o, reachable=[0, 1] if is_peer else []) for o in ordinals]
    source, target = open_cuda_devices(drivers, 2, CHUNK)
    kv = []
    for device in (source, target):
        address = device.reserve(2 * CHUNK)
        device.map(address, [1, 0])
        kv.append(device.tensor(address, 2 * CHUNK).view(torch.float32).view(2, 32, -1))  # two layers
        kv[-1].zero_()
    kv[0].copy_(torch.arange(32)[None, :, None] + torch.tensor([0, 100])[:, None, None])
    await target.copy(layer_copies(list(kv[0]), [3, 30], list(kv[1]), [31, 2], range(2)), source)
    assert [kv[1][layer, [31, 2], -1].tolist() for layer in range(2)] == [[3, 30], [103, 130]]
    assert int(kv[1].count_nonzero()) == 4 * kv[1].shape[-1]  # nothing else was touched
    host = host_blocks(2, kv[1][1])
    await target.copy([BlockCopy(kv[1][1], [2, 31], host, range(2))], is_to_host=True)
    await target.copy([BlockCopy(host, range(2), kv[1][0], [7, 8])])
    assert kv[1][0, [7, 8], 0].tolist() == [130, 103]
    for device in (source, target):
        device.close()
    assert all(driver.is_clean() for driver in drivers)


def test_host_memory_that_is_not_there_is_a_device_error() -> None:
    with pytest.raises(DeviceError, match="no host memory for 1152921504606846976 blocks of KV"):
        host_blocks(1 << 60, torch.zeros(1, 2))


async def test_staging_buffers_are_not_filled_before_they_are_empty() -> None:
    """The fake checks every wait when work completes: slices go out and in, alternately."""
    drivers = [FakeCuda(0), FakeCuda(1)]
    source, target = open_cuda_devices(drivers, 1, CHUNK)
    out, into = source.copy_out.stream, target.copy_in.stream
    waits: list[tuple[int, int]] = []
    drivers[0].wait = lambda stream, event: waits.append((0, event.mark.stream))  # type: ignore[method-assign]
    drivers[1].wait = lambda stream, event: waits.append((1, event.mark.stream))  # type: ignore[method-assign]
    await transfer(source, torch.ones(40), target, torch.zeros(40), slice_bytes=40)
    assert waits == [(1, out), (1, out), (0, into), (1, out), (0, into), (1, out)]
    source.close()
    target.close()


async def test_a_cancelled_caller_of_a_staged_copy_waits_for_both_devices() -> None:
    drivers = [FakeCuda(0), FakeCuda(1)]
    source, target = open_cuda_devices(drivers, 1, CHUNK)
    streams = source.copy_out.stream, target.copy_in.stream
    for driver, stream in zip(drivers, streams, strict=True):
        driver.submit(stream)
    read, write = torch.ones(40), torch.zeros(40)
    caller = asyncio.ensure_future(target.copy_tensor(read, write, source))
    await until(lambda: bool(write.all()))  # launched on both
    caller.cancel()
    drivers[0].complete(streams[0])
    await source.copy_out.run(lambda: None)  # nobody waits for the first device any more
    for _ in range(20):
        await asyncio.sleep(0)
    assert not caller.done()
    drivers[1].complete(streams[1])
    with pytest.raises(asyncio.CancelledError):
        await caller
    source.close()
    target.close()


async def test_devices_that_copy_to_each_other_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both launch on a stream of theirs, and only then ask for one of the other's."""
    drivers = [FakeCuda(0, reachable=[1]), FakeCuda(1, reachable=[0])]
    a, b = open_cuda_devices(drivers, 1, CHUNK)
    both, take_over = threading.Barrier(2), copy.take_over

    def together(*ends: Any) -> torch.Tensor:
        both.wait(10)
        return take_over(*ends)

    monkeypatch.setattr(copy, "take_over", together)
    kv = [torch.arange(8.0).view(4, 2) + 10 * i for i in range(2)]
    async with asyncio.timeout(30):
        await asyncio.gather(
            b.copy([BlockCopy(kv[0], [0], kv[1], [3])], a), a.copy([BlockCopy(kv[1], [1], kv[0], [2])], b)
        )
    assert kv[1][3].tolist() == [0, 1] and kv[0][2].tolist() == [12, 13]
    a.close()
    b.close()

"""The contract every device keeps, run against each implementation that this machine can open."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kunserve.errors import ConfigError, DeviceError
from kunserve.gpu.device import Device
from kunserve.gpu.host import HostDevice
from kunserve.gpu.null import NullDevice

NUM_CHUNKS = 8


@pytest.fixture(params=["host", "null"])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    device: Device = HostDevice(0, NUM_CHUNKS) if request.param == "host" else NullDevice(0, NUM_CHUNKS)
    yield device
    device.close()


def fill(device: Device, address: int, values: list[int]) -> None:
    flat = device.tensor(address, len(values) * device.chunk_bytes)
    for i, value in enumerate(values):
        flat[i * device.chunk_bytes : (i + 1) * device.chunk_bytes] = value


def read(device: Device, address: int, num_chunks: int) -> list[int]:
    """First byte of each chunk, after checking that the chunk is uniform."""
    flat = device.tensor(address, num_chunks * device.chunk_bytes).view(num_chunks, -1)
    assert (flat == flat[:, :1]).all()
    return [int(v) for v in flat[:, 0]]


def holds_bytes(device: Device) -> bool:
    return device.torch_device.type != "meta"


def test_reserved_ranges_are_aligned_and_apart(device: Device) -> None:
    size = 3 * device.chunk_bytes
    a, b = device.reserve(size), device.reserve(size)
    assert a % device.chunk_bytes == 0 and b % device.chunk_bytes == 0
    assert a + size <= b or b + size <= a
    device.release(a, size)
    device.release(b, size)


def test_content_follows_its_chunk(device: Device) -> None:
    size = NUM_CHUNKS * device.chunk_bytes
    a, b = device.reserve(size), device.reserve(size)
    device.map(a, [0, 1, 2, 3])
    if holds_bytes(device):
        fill(device, a, [10, 11, 12, 13])
    kept = device.tensor(a, size)
    device.unmap(a + 2 * device.chunk_bytes, 2)
    device.map(b, [3, 2, 5])  # out of order, with a new one
    if holds_bytes(device):
        assert read(device, b, 2) == [13, 12]
        assert [int(kept[0]), int(kept[device.chunk_bytes])] == [10, 11]  # untouched, same tensor
    device.unmap(b, 3)
    device.map(a + 2 * device.chunk_bytes, [2, 3])
    if holds_bytes(device):
        assert read(device, a, 4) == [10, 11, 12, 13]  # the old tensor sees the old bytes again
        assert int(kept[3 * device.chunk_bytes]) == 13


def test_a_tensor_over_unmapped_addresses_can_be_made_before_mapping(device: Device) -> None:
    size = 2 * device.chunk_bytes
    address = device.reserve(size)
    early = device.tensor(address, size).view(torch.float32)
    device.map(address, [7, 0])
    if holds_bytes(device):
        early.fill_(1.5)
        assert early.sum() == 1.5 * early.numel()


async def test_work_runs_in_order_and_errors_come_back(device: Device) -> None:
    order: list[int] = []
    for i in range(5):
        await device.run(lambda i=i: order.append(i))  # type: ignore[misc]
    assert order == list(range(5))
    with pytest.raises(ZeroDivisionError):
        await device.run(lambda: 1 // 0)
    assert await device.run(lambda: 7) == 7
    assert await device.run_copy(lambda: 8) == 8


async def test_a_tensor_is_copied_from_another_device(device: Device) -> None:
    other: Device = type(device)(1, NUM_CHUNKS)  # type: ignore[call-arg]
    try:
        size = 2 * device.chunk_bytes
        read, write = (d.tensor(d.reserve(size), size) for d in (other, device))
        for d, tensor in ((other, read), (device, write)):
            d.map(tensor.data_ptr() if holds_bytes(d) else d.chunk_bytes, [0, 1])
        if holds_bytes(device):
            read.copy_(torch.arange(size) % 251)
            write.zero_()
        await device.copy_tensor(read[5:-3], write[5:-3], other)
        if holds_bytes(device):
            assert torch.equal(write[5:-3], read[5:-3]) and not write[:5].any() and not write[-3:].any()
    finally:
        other.close()


def test_close_twice() -> None:
    device = HostDevice(0, 1)
    device.close()
    device.close()


def test_more_memory_than_the_host_has_is_refused_with_figures() -> None:
    with pytest.raises(ConfigError, match=r"cpu:3: --device-memory of 2097152\.0 GiB does not fit: [\d.]+ [MG]iB"):
        HostDevice(3, 1 << 30)


def test_null_enforces_the_rules() -> None:
    device = NullDevice(0, 4)
    address = device.reserve(2 * device.chunk_bytes)
    device.map(address, [0])
    for wrong in ([1, 2], [0], [9]):
        with pytest.raises(DeviceError):
            device.map(address + device.chunk_bytes, wrong)
    with pytest.raises(DeviceError):
        device.unmap(address + device.chunk_bytes, 1)
    with pytest.raises(DeviceError):
        device.release(address + 1, 5)

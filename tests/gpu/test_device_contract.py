"""The contract that every device keeps, run on each kind that this machine can open."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
from device_contract import NUM_CHUNKS, DeviceContract
from fake_cuda import GRANULARITY, FakeCuda
from memory_contract import MemoryContract

from kunserve.errors import ConfigError, DeviceError
from kunserve.gpu import host
from kunserve.gpu.cuda.device import CudaDevice, open_cuda_devices
from kunserve.gpu.device import Device
from kunserve.gpu.host import HostDevice
from kunserve.gpu.null import NullDevice

CHUNK_BYTES = 3 << 14  # no power of two, as in life
Run = Callable[[Callable[[], Any]], Awaitable[Any]]


class TestHostDevice(MemoryContract):
    """Virtual CPU devices, seen through what the kernel says of this process: no other test's have these names."""

    def open(self) -> tuple[Device, Device]:
        return HostDevice(70, NUM_CHUNKS, CHUNK_BYTES), HostDevice(71, NUM_CHUNKS, CHUNK_BYTES)

    def mapped(self, device: Device) -> dict[int, int]:
        mapped = {}
        for line in Path("/proc/self/maps").read_text().splitlines():
            if f"/memfd:kunserve-{device.name} " in line:
                addresses, access, offset, *_ = line.split()
                assert access == "rw-s"
                start, end = (int(address, 16) for address in addresses.split("-"))
                for address in range(start, end, device.chunk_bytes):
                    mapped[address] = (int(offset, 16) + address - start) // device.chunk_bytes
        return mapped

    def is_clean(self, device: Device) -> bool:
        files = [os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
        return not self.mapped(device) and not any(f"kunserve-{device.name} " in file for file in files)

    @contextmanager
    def refusing_to_map(self, device: Device, nth: int) -> Iterator[None]:
        real, num_calls = host.map_memory, 0

        def mmap(address: int | None, num_bytes: int, prot: int, flags: int, fd: int = -1, offset: int = 0) -> int:
            nonlocal num_calls
            num_calls += fd != -1
            if fd != -1 and num_calls == nth:
                raise DeviceError(f"{device.name}: mmap failed: Cannot allocate memory")
            return real(address, num_bytes, prot, flags, fd, offset)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(host, "map_memory", mmap)
            yield

    def queues(self, device: Device) -> Sequence[Run]:
        return device.run, device.run_copy

    def test_more_memory_than_the_host_has_is_refused_with_figures(self) -> None:
        with pytest.raises(ConfigError, match=r"cpu:3: --device-memory of 2097152\.0 GiB does not fit: [\d.]+ [MG]iB"):
            HostDevice(3, 1 << 30)


class TestNullDevice(DeviceContract):
    """Devices of simulations: no bytes, and work runs at once."""

    def open(self) -> tuple[Device, Device]:
        return NullDevice(0, NUM_CHUNKS), NullDevice(1, NUM_CHUNKS)

    def mapped(self, device: Device) -> dict[int, int]:
        assert isinstance(device, NullDevice)
        return dict(device.mappings.chunks)

    def is_clean(self, device: Device) -> bool:
        return not self.mapped(device)


class TestCudaDevice(MemoryContract):
    """Two devices of one GPU, on a driver that keeps CUDA's rules."""

    ordinals: ClassVar = (0, 0)
    reachable: ClassVar[tuple[int, ...]] = ()

    def open(self) -> tuple[Device, Device]:
        drivers = [FakeCuda(ordinal, reachable=self.reachable) for ordinal in self.ordinals]
        first, second = open_cuda_devices(drivers, NUM_CHUNKS, 3 * GRANULARITY)
        return first, second

    def mapped(self, device: Device) -> dict[int, int]:
        return self._driver(device).usable_chunks()

    def is_clean(self, device: Device) -> bool:
        return self._driver(device).is_clean()

    @contextmanager
    def refusing_to_map(self, device: Device, nth: int) -> Iterator[None]:
        driver = self._driver(device)
        driver.fail_at["map"] = driver.calls["map"] + nth
        yield
        del driver.fail_at["map"]

    def queues(self, device: Device) -> Sequence[Run]:
        assert isinstance(device, CudaDevice)
        return device.run, device.sampling.run, device.copy_in.run, device.copy_out.run, device.peer.run

    @staticmethod
    def _driver(device: Device) -> FakeCuda:
        assert isinstance(device, CudaDevice) and isinstance(device.driver, FakeCuda)
        return device.driver


class TestCudaDevicesWithPeerAccess(TestCudaDevice):
    """Two GPUs that reach each other's memory."""

    ordinals: ClassVar = (0, 1)
    reachable: ClassVar = (0, 1)


class TestCudaDevicesWithoutPeerAccess(TestCudaDevice):
    """Two GPUs between which everything goes through host memory."""

    ordinals: ClassVar = (0, 1)

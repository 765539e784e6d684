"""Null devices: they count chunks and keep their content's name, but hold no bytes. For simulation and planner tests.

Enforces the rules every device has (no double map, nothing mapped outside a reserved range), so whatever runs on it
runs on the real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from kunserve.errors import DeviceError
from kunserve.gpu.copies import BlockCopy, copy_blocks
from kunserve.gpu.device import Device

T = TypeVar("T")


class NullDevice:
    """A device of `num_chunks` chunks without memory behind it; work runs at once, on the caller's loop."""

    torch_device = torch.device("meta")

    def __init__(self, index: int, num_chunks: int, chunk_bytes: int = 2 << 20) -> None:
        self.name = f"null:{index}"
        self.chunk_bytes, self.num_chunks = chunk_bytes, num_chunks
        self._next_address = chunk_bytes
        self._reserved: dict[int, int] = {}
        self._mapped: dict[int, int] = {}  # address -> chunk
        self._in_use: set[int] = set()  # chunks that are mapped

    def reserve(self, num_bytes: int) -> int:
        """See `Device.reserve`."""
        address, self._next_address = self._next_address, self._next_address + num_bytes + self.chunk_bytes
        self._reserved[address] = num_bytes
        return address

    def release(self, address: int, num_bytes: int) -> None:
        """See `Device.release`."""
        if self._reserved.pop(address, None) != num_bytes:
            raise DeviceError(f"{self.name}: {address:#x} is not a reserved range")
        for at in range(address, address + num_bytes, self.chunk_bytes):
            self._in_use.discard(self._mapped.pop(at, -1))

    def map(self, address: int, chunks: Sequence[int]) -> None:
        """See `Device.map`."""
        places = [address + i * self.chunk_bytes for i in range(len(chunks))]
        if not any(
            a <= address and address + len(chunks) * self.chunk_bytes <= a + n for a, n in self._reserved.items()
        ):
            raise DeviceError(f"{self.name}: {address:#x} is not in a reserved range")
        if not self._in_use.isdisjoint(chunks) or not all(0 <= chunk < self.num_chunks for chunk in chunks):
            raise DeviceError(f"{self.name}: mapped twice, or no such chunk")
        if any(place in self._mapped for place in places):
            raise DeviceError(f"{self.name}: {address:#x} is mapped already")
        self._mapped.update(zip(places, chunks, strict=True))
        self._in_use.update(chunks)

    def unmap(self, address: int, num_chunks: int) -> None:
        """See `Device.unmap`."""
        places = [address + i * self.chunk_bytes for i in range(num_chunks)]
        if not all(p in self._mapped for p in places):
            raise DeviceError(f"{self.name}: {address:#x} is not mapped")
        for place in places:
            self._in_use.remove(self._mapped.pop(place))

    def tensor(self, address: int, num_bytes: int) -> Tensor:
        """See `Device.tensor`; on the meta device, so that shapes are right and bytes are not there."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.torch_device)

    async def run(self, work: Callable[[], T]) -> T:
        """See `Device.run`."""
        return work()

    async def run_copy(self, work: Callable[[], T]) -> T:
        """See `Device.run_copy`."""
        return work()

    async def copy(
        self, copies: Sequence[BlockCopy], source: Device | None = None, *, is_to_host: bool = False
    ) -> None:
        """See `Device.copy`: there are no bytes."""
        await self.run_copy(partial(copy_blocks, copies))

    async def copy_tensor(self, read: Tensor, write: Tensor, source: Device) -> None:
        """See `Device.copy_tensor`: there are no bytes."""
        await self.run_copy(partial(write.copy_, read))

    def close(self) -> None:
        """See `Device.close`."""
        self._mapped.clear()
        self._in_use.clear()

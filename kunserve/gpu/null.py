"""Null devices: they map and count chunks, but hold no bytes. For simulations, and tests of what decides.

They enforce the rules that every device enforces (`Mappings`), so that what runs on them breaks none on real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from kunserve.gpu.copies import BlockCopy, copy_blocks
from kunserve.gpu.device import Device
from kunserve.gpu.mappings import Mappings

T = TypeVar("T")


class NullDevice:
    """A device of `num_chunks` chunks without memory behind it; work runs at once, on the caller's loop."""

    torch_device = torch.device("meta")

    def __init__(self, index: int, num_chunks: int, chunk_bytes: int = 2 << 20) -> None:
        self.name, self.is_lost = f"null:{index}", False
        self.chunk_bytes, self.num_chunks = chunk_bytes, num_chunks
        self._next_address = chunk_bytes
        self.mappings = Mappings(self.name, num_chunks, chunk_bytes)

    def reserve(self, num_bytes: int) -> int:
        """See `Device.reserve`."""
        address, self._next_address = self._next_address, self._next_address + num_bytes + self.chunk_bytes
        self.mappings.reserved[address] = num_bytes
        return address

    def release(self, address: int, num_bytes: int) -> None:
        """See `Device.release`."""
        self.mappings.check_reserved(address, num_bytes)
        self.mappings.release(address, num_bytes)

    def map(self, address: int, chunks: Sequence[int]) -> None:
        """See `Device.map`."""
        self.mappings.check_map(address, chunks)
        self.mappings.map(address, chunks)

    def unmap(self, address: int, num_chunks: int) -> None:
        """See `Device.unmap`."""
        self.mappings.check_unmap(address, num_chunks)
        self.mappings.unmap(address, num_chunks)

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

    def abandon(self) -> None:
        """See `Device.abandon`."""
        self.is_lost = True

    def copies_have_ended(self, timeout_s: float) -> bool:
        """See `Device.copies_have_ended`."""
        return True

    def close(self) -> None:
        """See `Device.close`."""
        self.mappings.clear()

"""A range: reserved virtual addresses that chunks are mapped into, from the front on. Its address never changes."""

from __future__ import annotations

from torch import Tensor

from kunserve.gpu.chunk_pool import ChunkPool, ChunkUse
from kunserve.gpu.device import Device


class Range:
    """Addresses for up to `max_chunks` chunks, the first `len(chunks)` of them mapped; grown and shrunk at the tail."""

    def __init__(self, device: Device, pool: ChunkPool, use: ChunkUse, max_chunks: int) -> None:
        self._device, self._pool, self._use = device, pool, use
        self.max_chunks = max_chunks
        self.num_bytes = max_chunks * device.chunk_bytes
        self.address = device.reserve(self.num_bytes)
        self.tensor: Tensor = device.tensor(self.address, self.num_bytes)  # uint8; touch only what is mapped
        self.chunks: list[int] = []

    @property
    def num_mapped_bytes(self) -> int:
        """Return the number of bytes from the front that may be touched."""
        return len(self.chunks) * self._device.chunk_bytes

    def resize(self, num_chunks: int) -> None:
        """Map or unmap at the tail until `num_chunks` are mapped. All or nothing; `DeviceError` if it cannot be."""
        have = len(self.chunks)
        assert 0 <= num_chunks <= self.max_chunks, f"{num_chunks} chunks in a range of {self.max_chunks}"
        tail = self.address + min(have, num_chunks) * self._device.chunk_bytes
        if num_chunks > have:
            added = self._pool.alloc(num_chunks - have, self._use)
            try:
                self._device.map(tail, added)
            except BaseException:
                self._pool.free(added)
                raise
            self.chunks += added
        elif num_chunks < have:
            self._device.unmap(tail, have - num_chunks)
            self._pool.free(self.chunks[num_chunks:])
            del self.chunks[num_chunks:]

    def release(self) -> None:
        """Unmap everything and give the addresses back."""
        self.resize(0)
        self._device.release(self.address, self.num_bytes)

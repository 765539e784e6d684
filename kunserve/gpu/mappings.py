"""Where a device's chunks are mapped, and the rules of mapping: the same for every kind of device.

Neither an operating system nor a driver keeps them for us. mmap replaces whatever lies at an address, be it another
range or the interpreter's own memory, and CUDA maps a chunk in two places without a word.
"""

from __future__ import annotations

from collections.abc import Sequence

from kunserve.errors import DeviceError


class Mappings:
    """Reserved ranges of one device and the chunks mapped into them. `check_map` and `check_unmap` change nothing."""

    def __init__(self, device: str, num_chunks: int, chunk_bytes: int) -> None:
        self._device, self._num_chunks, self._chunk_bytes = device, num_chunks, chunk_bytes
        self.reserved: dict[int, int] = {}  # address -> bytes
        self.chunks: dict[int, int] = {}  # address -> the chunk mapped there
        self._in_use: set[int] = set()  # chunks that are mapped: always the values of `chunks`

    def check_reserved(self, address: int, num_bytes: int) -> None:
        """Raise DeviceError unless exactly this range was reserved."""
        if self.reserved.get(address) != num_bytes:
            raise DeviceError(f"{self._device}: {address:#x} is not a reserved range of {num_bytes} bytes")

    def release(self, address: int, num_bytes: int) -> None:
        """Forget a reserved range and what is mapped in it."""
        for mapped in self.mapped_in(address, num_bytes):
            self._in_use.remove(self.chunks.pop(mapped))
        del self.reserved[address]

    def mapped_in(self, address: int, num_bytes: int) -> list[int]:
        """Return the addresses in a range where a chunk is mapped, in order."""
        return [a for a in range(address, address + num_bytes, self._chunk_bytes) if a in self.chunks]

    def check_map(self, address: int, chunks: Sequence[int]) -> None:
        """Raise DeviceError unless these chunks are mapped nowhere, and all their places are reserved and empty."""
        end = address + len(chunks) * self._chunk_bytes
        if not any(
            start <= address and end <= start + size and (address - start) % self._chunk_bytes == 0
            for start, size in self.reserved.items()
        ):
            raise DeviceError(f"{self._device}: {address:#x} has no reserved room for {len(chunks)} chunks")
        if not all(0 <= chunk < self._num_chunks for chunk in chunks):
            raise DeviceError(f"{self._device}: only chunks 0 to {self._num_chunks - 1} can be mapped")
        if not self._in_use.isdisjoint(chunks) or len(set(chunks)) != len(chunks):
            raise DeviceError(f"{self._device}: a chunk cannot be mapped in two places")
        if self.mapped_in(address, end - address):
            raise DeviceError(f"{self._device}: {address:#x} is mapped already")

    def map(self, address: int, chunks: Sequence[int]) -> None:
        """Remember what was mapped."""
        self.chunks.update((address + i * self._chunk_bytes, chunk) for i, chunk in enumerate(chunks))
        self._in_use.update(chunks)

    def check_unmap(self, address: int, num_chunks: int) -> None:
        """Raise DeviceError unless a chunk is mapped at each of these places."""
        if len(self.mapped_in(address, num_chunks * self._chunk_bytes)) != num_chunks:
            raise DeviceError(f"{self._device}: {address:#x} is not mapped")

    def unmap(self, address: int, num_chunks: int) -> None:
        """Forget what was unmapped."""
        for mapped in range(address, address + num_chunks * self._chunk_bytes, self._chunk_bytes):
            self._in_use.remove(self.chunks.pop(mapped))

    def clear(self) -> None:
        """Forget everything, when the device closes."""
        for mine in (self.reserved, self.chunks, self._in_use):
            mine.clear()

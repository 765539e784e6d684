"""What each chunk of a device is used for: weights, KV or nothing. Invariant 2: these add up to its budget."""

from __future__ import annotations

import enum
from collections.abc import Iterable

from kunserve.errors import DeviceError


class ChunkUse(enum.StrEnum):
    """What chunks are used for."""

    WEIGHTS = "weights"
    KV = "kv"


class ChunkPool:
    """Hands out the chunks `0..num_chunks` of one device and remembers what each is used for."""

    def __init__(self, num_chunks: int) -> None:
        self.num_chunks = num_chunks
        # Ascending ids come out first: neighbours in a range are then neighbours in memory, and map in one call.
        self._free = list(range(num_chunks - 1, -1, -1))
        self._uses: dict[int, ChunkUse] = {}
        self._num_used = dict.fromkeys(ChunkUse, 0)  # always counts `_uses`: a GPU has 40,000 chunks, and many look

    @property
    def num_free(self) -> int:
        """Return the number of chunks that are used for nothing."""
        return len(self._free)

    def num_used(self, use: ChunkUse) -> int:
        """Return the number of chunks of one use."""
        return self._num_used[use]

    def alloc(self, num_chunks: int, use: ChunkUse) -> list[int]:
        """Take chunks for `use`; `DeviceError` when there are not enough, and nothing is taken."""
        if num_chunks > len(self._free):
            raise DeviceError(f"out of device memory: {num_chunks} chunks wanted for {use}, {len(self._free)} free")
        taken = [self._free.pop() for _ in range(num_chunks)]
        self._uses.update((chunk, use) for chunk in taken)
        self._num_used[use] += num_chunks
        return taken

    def free(self, chunks: Iterable[int]) -> None:
        """Give chunks back."""
        for chunk in chunks:
            assert chunk in self._uses, f"chunk {chunk} freed twice"
            self._num_used[self._uses.pop(chunk)] -= 1
            self._free.append(chunk)
        self._free.sort(reverse=True)

    def check(self, mapped: dict[ChunkUse, list[int]]) -> None:
        """Assert invariant 2 against the chunks that ranges say they have mapped."""
        assert len(self._free) + len(self._uses) == self.num_chunks
        assert set(self._free).isdisjoint(self._uses) and len(set(self._free)) == len(self._free)
        for use in ChunkUse:
            chunks = mapped.get(use, [])
            assert len(chunks) == self._num_used[use]
            assert len(set(chunks)) == len(chunks), f"a chunk of {use} is mapped twice"
            assert set(chunks) == {c for c, taken_for in self._uses.items() if taken_for is use}, f"{use}: not mapped"

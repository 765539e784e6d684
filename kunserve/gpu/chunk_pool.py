"""Who owns each chunk of a device: weights, KV or nobody. Invariant 2: free + weights + KV = budget, at all times."""

from __future__ import annotations

import enum
from collections.abc import Iterable

from kunserve.errors import DeviceError


class Owner(enum.StrEnum):
    """The two owners of chunks."""

    WEIGHTS = "weights"
    KV = "kv"


class ChunkPool:
    """Hands out the chunks `0..num_chunks` of one device and remembers their owners."""

    def __init__(self, num_chunks: int) -> None:
        self.num_chunks = num_chunks
        # Ascending ids come out first: neighbours in a range are then neighbours in memory, and map in one call.
        self._free = list(range(num_chunks - 1, -1, -1))
        self._owners: dict[int, Owner] = {}
        self._num_owned = dict.fromkeys(Owner, 0)  # always counts `_owners`: a GPU has 40,000 chunks, and many look

    @property
    def num_free(self) -> int:
        """Chunks that nobody owns."""
        return len(self._free)

    def num_owned(self, owner: Owner) -> int:
        """Return the number of chunks of one owner."""
        return self._num_owned[owner]

    def alloc(self, num_chunks: int, owner: Owner) -> list[int]:
        """Take chunks for `owner`; `DeviceError` when there are not enough, and nothing is taken."""
        if num_chunks > len(self._free):
            raise DeviceError(f"out of device memory: {num_chunks} chunks wanted for {owner}, {len(self._free)} free")
        taken = [self._free.pop() for _ in range(num_chunks)]
        self._owners.update((chunk, owner) for chunk in taken)
        self._num_owned[owner] += num_chunks
        return taken

    def free(self, chunks: Iterable[int]) -> None:
        """Give chunks back."""
        for chunk in chunks:
            assert chunk in self._owners, f"chunk {chunk} freed twice"
            self._num_owned[self._owners.pop(chunk)] -= 1
            self._free.append(chunk)
        self._free.sort(reverse=True)

    def check(self, mapped: dict[Owner, list[int]]) -> None:
        """Assert invariant 2 against the chunks that ranges say they have mapped."""
        assert len(self._free) + len(self._owners) == self.num_chunks
        assert set(self._free).isdisjoint(self._owners) and len(set(self._free)) == len(self._free)
        for owner in Owner:
            chunks = mapped.get(owner, [])
            assert len(chunks) == self._num_owned[owner]
            assert len(set(chunks)) == len(chunks), f"a chunk of {owner} is mapped twice"
            assert set(chunks) == {c for c, o in self._owners.items() if o is owner}, f"{owner}: owned is not mapped"

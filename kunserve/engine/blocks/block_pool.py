"""The blocks of one stage: ids `0..num_blocks`, reference-counted; the end of the memory flow.

An id names the same offset in the KV range of every layer of the stage. The pool grows when a drop maps chunks at the
tail of those ranges; before they shrink, `limit` keeps new allocations out of the tail until it is empty.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from itertools import chain


class BlockPool:
    """Hands out block ids, lowest first, so that the tail empties by itself."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks  # ids that are mapped
        self._limit = num_blocks  # ids from here on are not handed out
        self._free = list(range(num_blocks))  # a heap; may hold ids >= limit, which are skipped
        self._num_free_below_limit = num_blocks
        self._ref_counts: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        """Return the number of blocks that `alloc` could hand out now."""
        return self._num_free_below_limit

    @property
    def num_used(self) -> int:
        """Return the number of blocks that somebody holds."""
        return len(self._ref_counts)

    @property
    def limit(self) -> int:
        """Return the first id that is not handed out, nor are those above it."""
        return self._limit

    def alloc(self, num_blocks: int, *, is_beyond_limit: bool = False) -> list[int] | None:
        """Take blocks, each with one reference; None, and nothing taken, when there are not enough.

        `is_beyond_limit`: the last ids, for KV that is on its way to a range not mapped so far.
        """
        if num_blocks > (len(self._free) if is_beyond_limit else self._num_free_below_limit):
            return None
        if is_beyond_limit:
            self._free.sort()  # and it stays a heap
            first = len(self._free) - num_blocks
            taken, self._free = self._free[first:], self._free[:first]
        else:
            taken = [heapq.heappop(self._free) for _ in range(num_blocks)]
        self._num_free_below_limit -= sum(1 for block in taken if block < self._limit)
        self._ref_counts.update(dict.fromkeys(taken, 1))
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to blocks that are in use (a common prefix)."""
        for block in blocks:
            self._ref_counts[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """Take a reference away; a block without references is free."""
        for block in blocks:
            count = self._ref_counts[block] - 1
            if count:
                self._ref_counts[block] = count
                continue
            del self._ref_counts[block]
            heapq.heappush(self._free, block)
            if block < self._limit:
                self._num_free_below_limit += 1

    def grow(self, num_blocks: int) -> None:
        """Take in more ids that are mapped now: `num_blocks` in all. Lifts the limit."""
        assert num_blocks >= self.num_blocks
        self._free += range(self.num_blocks, num_blocks)
        heapq.heapify(self._free)
        self.num_blocks = num_blocks
        self.set_limit(num_blocks)

    def set_limit(self, limit: int) -> None:
        """Hand out only ids below `limit` from now on (never more than are mapped)."""
        self._limit = min(limit, self.num_blocks)
        self._num_free_below_limit = sum(1 for block in self._free if block < self._limit)

    def used_beyond(self, limit: int) -> list[int]:
        """Return the used ids that stand in the way of shrinking to `limit`."""
        return sorted(block for block in self._ref_counts if block >= limit)

    def shrink(self, num_blocks: int) -> None:
        """Give up ids that are mapped no more; none of those that go may be in use."""
        assert not self.used_beyond(num_blocks), "shrinking under blocks in use"
        self._free = [block for block in self._free if block < num_blocks]
        heapq.heapify(self._free)
        self.num_blocks = num_blocks
        self.set_limit(num_blocks)

    def check(self, holders: Iterable[Iterable[int]] | None = None) -> None:
        """Assert that every id is free or used, once; and used exactly as often as `holders` hold it."""
        free, used = set(self._free), self._ref_counts  # tests check at every step: sets are faster than loops
        assert len(free) == len(self._free) and free.isdisjoint(used) and len(free) + len(used) == self.num_blocks
        assert all(min(ids) >= 0 and max(ids) < self.num_blocks for ids in (free, used) if ids)
        is_bounded = self._limit < self.num_blocks
        assert self._num_free_below_limit == (sum(map(self._limit.__gt__, free)) if is_bounded else len(free))
        assert min(self._ref_counts.values(), default=1) > 0
        if holders is not None:
            counts = Counter(chain.from_iterable(holders))
            assert dict(counts) == self._ref_counts, "references are not what requests hold"

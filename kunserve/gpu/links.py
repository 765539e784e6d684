"""Links between devices: one transfer at a time on each, activations first, then KV, weights, cached KV."""

from __future__ import annotations

import asyncio
import enum
import heapq
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from kunserve.averages import smooth

HOST = -1  # the host as an end of a link


class Priority(enum.IntEnum):
    """The order in which transfers that wait get a link: the least first."""

    ACTIVATION = 0
    KV = 1
    WEIGHTS = 2
    CACHED_KV = 3  # that no request uses


@dataclass(slots=True)
class _Link:
    is_busy: bool = False
    num_asked: int = 0
    waiting: list[tuple[Priority, int, asyncio.Future[None]]] = field(default_factory=list)


class Links:
    """All links of a machine, named by source and destination device.

    Long transfers take a turn per slice, so that an activation waits for one slice at most, and follow each other.
    `is_coordinated = False`, for comparison, sends everything at once, each request's KV in one piece.
    """

    slice_bytes = 4 << 20  # of one turn: a millisecond or two between CPU devices
    is_coordinated = True

    def __init__(self, usual_bytes_per_s: float = 0.5e9) -> None:
        """Make the links. `usual_bytes_per_s`: of KV, until some has gone (171 MB in 0.37 s between CPU devices)."""
        self._links: defaultdict[tuple[int, int], _Link] = defaultdict(_Link)
        self.kv_bytes_per_s = self.host_kv_bytes_per_s = usual_bytes_per_s  # from device to device; to or from the host

    def layers_in_turn(self, layer_bytes: int) -> int:
        """Return how many layers of so many bytes go in one turn: one at least."""
        return max(1, self.slice_bytes // max(1, layer_bytes))

    @asynccontextmanager
    async def turn(self, source: int, destination: int, priority: Priority, num_bytes: int) -> AsyncIterator[None]:
        """Hold the link for one transfer, after all waiting ones of higher priority and earlier ones of the same.

        The caller copies its `num_bytes` meanwhile. Where nothing is copied, a subclass lets that much time pass.
        """
        link = self._links[source, destination]
        if link.is_busy:
            ready = asyncio.get_running_loop().create_future()
            link.num_asked += 1
            heapq.heappush(link.waiting, (priority, link.num_asked, ready))
            try:
                await ready
            except asyncio.CancelledError:
                if ready.done() and not ready.cancelled():
                    self._pass_on(link)
                raise
        link.is_busy = True
        begun_s = asyncio.get_running_loop().time()
        try:
            yield
            taken_s = asyncio.get_running_loop().time() - begun_s
            if priority is Priority.KV and num_bytes and taken_s > 0:
                self._measured(num_bytes / taken_s, is_host=HOST in (source, destination))
        finally:
            self._pass_on(link)

    def _measured(self, bytes_per_s: float, *, is_host: bool) -> None:
        if is_host:
            self.host_kv_bytes_per_s = smooth(self.host_kv_bytes_per_s, bytes_per_s)
        else:
            self.kv_bytes_per_s = smooth(self.kv_bytes_per_s, bytes_per_s)

    @staticmethod
    def _pass_on(link: _Link) -> None:
        while link.waiting:
            _, _, ready = heapq.heappop(link.waiting)
            if not ready.done():
                ready.set_result(None)  # the link stays busy: it is the next one's
                return
        link.is_busy = False

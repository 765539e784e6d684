"""Simulated links: a turn lasts as long as its bytes take, and everything that leaves a device shares its port."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from kunserve.gpu.links import HOST, Links, Priority


class TimedLinks(Links):
    """Links with a bandwidth, in bytes per second, and a latency.

    A device sends to one other at a time, as through a network card, and copies from and to the host beside that.
    What arrives at a device from several others at once is not bounded.
    is_coordinated: activations overtake KV, and KV overtakes weights; else all wait in the order of asking, behind
    whole requests' KV. slice_bytes: of KV in one turn, if it is.
    """

    def __init__(
        self,
        bandwidth: Callable[[int, int], float],
        latency_s: float = 10e-6,
        *,
        is_coordinated: bool = True,
        slice_bytes: int = Links.slice_bytes,
    ) -> None:
        super().__init__(bandwidth(0, 1))
        self._bandwidth, self._latency_s, self.is_coordinated = bandwidth, latency_s, is_coordinated
        self.slice_bytes = slice_bytes if is_coordinated else sys.maxsize
        self.num_bytes = dict.fromkeys(Priority, 0)  # that went over all links so far

    @asynccontextmanager
    async def turn(self, source: int, destination: int, priority: Priority, num_bytes: int) -> AsyncIterator[None]:
        """See `Links.turn`."""
        ends = (source, destination) if HOST in (source, destination) else (source, source)
        order = priority if self.is_coordinated else Priority.KV
        async with super().turn(*ends, order, num_bytes):
            await asyncio.sleep(self._latency_s + num_bytes / self._bandwidth(source, destination))
            self.num_bytes[priority] += num_bytes
            yield

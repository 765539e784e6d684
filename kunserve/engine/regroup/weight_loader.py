"""Weights on their way to devices: from the host copy, or, where none is kept, from a device that has them, or disk."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import partial

from kunserve.gpu.device_memory import DeviceMemory
from kunserve.gpu.host_weights import HostWeights
from kunserve.gpu.links import HOST, Links, Priority
from kunserve.model.host_copy import HostCopy, LoadedFrom


class WeightLoader:
    """Fills mapped units of all devices.

    No unit leaves a device that others copy from meanwhile: transitions see to that (regroup/transition.py).

    islands: of each device; one of the same island is the better mate.
    """

    def __init__(self, memories: Sequence[DeviceMemory], host: HostWeights, islands: Iterable[int] = ()) -> None:
        self._memories, self.host = memories, host
        self._islands = list(islands) or [0] * len(memories)
        self._reading = defaultdict[str, asyncio.Lock](asyncio.Lock)  # unit -> held by who reads it from disk
        self._num_sending = Counter[int]()  # device -> units that others copy from it now
        self.num_bytes = Counter[LoadedFrom]()  # loaded since the start, without what pads tensors and chunks

    async def load(self, device: int, unit: str, links: Links) -> None:
        """Fill one unit beside compute, in turns on the link that it comes over; returns when its content is there."""
        if self.host.kind is not HostCopy.NONE:
            await self._read(device, unit, links, LoadedFrom.HOST)
            return
        async with self._reading[unit]:  # else all devices of a launch, which ask at once, would read the files
            mate = self._mate(device, unit)
            if mate is None:
                await self._read(device, unit, links, LoadedFrom.DISK)
                return
        await self._copy(mate, device, unit, links)

    async def _read(self, device: int, unit: str, links: Links, loaded_from: LoadedFrom) -> None:
        memory = self._memories[device]
        weights, chunk_bytes = memory.weights, memory.device.chunk_bytes
        with weights.filling(unit):
            async with links.turn(HOST, device, Priority.WEIGHTS, weights.num_chunks(unit) * chunk_bytes):
                await memory.device.run_copy(partial(weights.fill, unit, self.host.source))
        self.num_bytes[loaded_from] += weights.num_tensor_bytes(unit)

    async def _copy(self, mate: int, device: int, unit: str, links: Links) -> None:
        """Copy a unit from a mate, in slices: activations that go the same way wait for one of them at most."""
        source, target = self._memories[mate], self._memories[device]
        read, write = source.weights.content(unit), target.weights.content(unit)
        self._num_sending[mate] += 1
        try:
            with target.weights.filling(unit):
                for start in range(0, len(read), links.slice_bytes):
                    piece = slice(start, start + links.slice_bytes)
                    async with links.turn(mate, device, Priority.WEIGHTS, len(read[piece])):
                        await target.device.copy_tensor(read[piece], write[piece], source.device)
        finally:
            self._num_sending[mate] -= 1
        self.num_bytes[LoadedFrom.MATE] += target.weights.num_tensor_bytes(unit)

    def _mate(self, device: int, unit: str) -> int | None:
        """Return the nearest device whose copy of a unit is whole, of several the one that fewest copy from."""
        holders = [
            i
            for i, memory in enumerate(self._memories)
            if i != device and memory.weights.is_filled(unit) and not memory.device.is_lost
        ]
        islands = self._islands
        return min(holders, key=lambda i: (islands[i] != islands[device], self._num_sending[i], i), default=None)

"""Transfers: KV of some layers goes to another device, to the host or back, in slices that take turns on its link.

Whoever wants KV moved asks for a transfer, after the fleet has reserved blocks at its end. It ends in one of three
ways: all has arrived, nobody wanted it any more, or an error was raised and it is lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kunserve.engine.signals import loop_time
from kunserve.gpu.copies import BlockCopy, layer_copies
from kunserve.gpu.device_memory import DeviceMemory
from kunserve.gpu.links import HOST, Links, Priority


@dataclass(frozen=True, slots=True)
class Transfer:
    """The same blocks of each of `layers`, from one device to another, or between a device and the host."""

    source: int  # a device, or HOST
    destination: int
    layers: Sequence[int]
    num_blocks: int
    copies: Callable[[Sequence[int]], list[BlockCopy]]  # of some of the layers; asked for before each slice
    is_wanted: Callable[[], bool]
    priority: Priority = Priority.KV


class Pace(Protocol):
    """Slows a transfer down so that it costs no request time."""

    async def grant(self, layer_bytes: int, num_layers: int) -> int:
        """Return how many of `num_layers` may be copied in the next slice, once that is at least one."""

    def copied(self, num_bytes: int, seconds: float) -> None:
        """Learn how long a slice took."""


class Transfers:
    """Runs transfers between the devices of a machine, and counts what they copy."""

    def __init__(self, memories: Sequence[DeviceMemory], links: Links) -> None:
        self._memories, self._links = memories, links
        self._bytes_to = Counter[int]()  # copied so far, by where to

    @property
    def num_bytes(self) -> int:
        """Return the bytes that were copied so far."""
        return self._bytes_to.total()

    def bytes_to(self, devices: Iterable[int]) -> int:
        """Return the bytes that were copied to these devices so far."""
        return sum(self._bytes_to[device] for device in devices)

    @property
    def is_coordinated(self) -> bool:
        """Return whether links carry one transfer after the other, in slices (see `Links`)."""
        return self._links.is_coordinated

    def blocks_in_turn(self, device: int) -> int:
        """Return how many blocks of one layer go in one turn on a link: one at least."""
        return self._links.layers_in_turn(self._memories[device].kv.shape.block_bytes)

    async def run(self, transfer: Transfer, pace: Pace | None = None) -> bool:
        """Return True when all has arrived, False if it was given up because nobody wants it. Raises as `Device.copy`.

        What was copied before an error, or before it was given up, is at its end, and worth nothing.
        """
        device = transfer.source if transfer.destination == HOST else transfer.destination
        layer_bytes = transfer.num_blocks * self._memories[device].kv.shape.block_bytes
        layers = transfer.layers
        while layer_bytes and layers:
            if not transfer.is_wanted():
                return False
            num_layers = min(self._links.layers_in_turn(layer_bytes), len(layers))
            if pace is not None:
                num_layers = await pace.grant(layer_bytes, num_layers)
            copies, num_bytes = transfer.copies(layers[:num_layers]), num_layers * layer_bytes
            async with self._links.turn(transfer.source, transfer.destination, transfer.priority, num_bytes):
                started = loop_time()
                await self._copy(transfer, copies)
                if pace is not None:
                    pace.copied(num_bytes, loop_time() - started)
            self._bytes_to[transfer.destination] += num_bytes
            layers = layers[num_layers:]
        return True

    async def _copy(self, transfer: Transfer, copies: Sequence[BlockCopy]) -> None:
        if transfer.destination == HOST:
            await self._memories[transfer.source].device.copy(copies, is_to_host=True)
        else:
            source = None if transfer.source == HOST else self._memories[transfer.source].device
            await self._memories[transfer.destination].device.copy(copies, source)

    async def between(
        self,
        source: int,
        destination: int,
        layers: Sequence[int],
        read: Sequence[int],
        write: Sequence[int],
        is_wanted: Callable[[], bool],
        priority: Priority = Priority.KV,
    ) -> bool:
        """Run a transfer of blocks `read` of a device to blocks `write` of another; as `run`."""
        kv, target = self.kv(source), self.kv(destination)

        def copies(some: Sequence[int]) -> list[BlockCopy]:
            return layer_copies(kv, read, target, write, some)

        return await self.run(Transfer(source, destination, layers, len(read), copies, is_wanted, priority))

    async def within(self, device: int, layers: Iterable[int], moved: Mapping[int, int]) -> None:
        """Copy blocks of a device to other ids there, in each of `layers`: no link is in the way."""
        kv = self.kv(device)
        for layer in layers if moved else ():
            await self._memories[device].device.copy(layer_copies(kv, list(moved), kv, list(moved.values()), [layer]))

    def kv(self, device: int) -> Sequence[Tensor]:
        """Return the KV of all layers of a device."""
        return self._memories[device].kv.layers

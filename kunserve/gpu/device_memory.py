"""Everything one device holds, under one budget: its chunk pool, its weights and its KV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kunserve.gpu.chunk_pool import ChunkPool, ChunkUse
from kunserve.gpu.device import Device
from kunserve.gpu.kv_memory import KVMemory, KVShape
from kunserve.gpu.watched import WatchedDevice
from kunserve.gpu.weights import Weights
from kunserve.model.layout import WeightUnit


@dataclass(frozen=True, slots=True)
class Layout:
    """What a device's chunks are for: the weight units present, and the chunks of each layer's KV (0: not served)."""

    units: tuple[str, ...]
    kv_chunks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChunkCounts:
    """Chunks of a device by use; they add up to `budget`."""

    budget: int
    weights: int
    kv: int
    free: int


class DeviceMemory:
    """The memory of one device: who has its chunks now, and the verbs that move them.

    `rearrange` runs on the device's queue while others look: they see it before or after, never in between.
    """

    def __init__(
        self,
        device: Device,
        units: Sequence[WeightUnit],
        num_layers: int,
        kv_shape: KVShape,
    ) -> None:
        self.device = WatchedDevice(device)
        self.pool = ChunkPool(device.num_chunks)
        self.weights = Weights(self.device, self.pool, units)
        self.kv = KVMemory(self.device, self.pool, num_layers, kv_shape)
        # What others see while `rearrange` runs. Not behind a lock: a driver that hangs in it would hold up everybody.
        self._before: tuple[ChunkCounts, Layout] | None = None
        self._num_rearranged = 0

    @property
    def counts(self) -> ChunkCounts:
        """Return the chunks by use."""
        counts: ChunkCounts = self._seen(lambda: (self._counts(), None))[0]
        return counts

    @property
    def layout(self) -> Layout:
        """Return what the chunks are for now."""
        layout: Layout = self._seen(lambda: (None, self._layout()))[1]
        return layout

    def _seen(self, look: Callable[[], Any]) -> Any:
        """Return what was there before the `rearrange` that runs, or what `look` finds while none does."""
        while True:
            number, before = self._num_rearranged, self._before
            if before is not None:
                return before
            seen = look()
            if number == self._num_rearranged:
                return seen

    def _counts(self) -> ChunkCounts:
        weights, kv = self.pool.num_used(ChunkUse.WEIGHTS), self.pool.num_used(ChunkUse.KV)
        return ChunkCounts(self.pool.num_chunks, weights, kv, self.pool.num_free)

    def _layout(self) -> Layout:
        kv = tuple(self.kv.num_chunks(layer) for layer in range(len(self.kv.layers)))
        return Layout(tuple(self.weights.present), kv)

    def rearrange(self, layout: Layout) -> None:
        """Remap until `layout` holds: first what leaves, then what comes. Units that come are mapped, not filled.

        No work may be running on what leaves. All or nothing: on `DeviceError` the old layout is back, with the
        units that had left mapped but to be filled again.
        """
        before = self._layout()
        self._before = self._counts(), before
        self._num_rearranged += 1
        try:
            self._unmap_beyond(layout)
            self._map_up_to(layout)
        except BaseException:
            self._unmap_beyond(before)
            self._map_up_to(before)
            raise
        finally:
            self._before = None

    def _unmap_beyond(self, layout: Layout) -> None:
        for unit in self.weights.present:
            if unit not in layout.units:
                self.weights.drop(unit)
        for layer, num_chunks in enumerate(layout.kv_chunks):
            if self.kv.num_chunks(layer) > num_chunks:
                self.kv.resize(layer, num_chunks)

    def _map_up_to(self, layout: Layout) -> None:
        for unit in layout.units:
            self.weights.map(unit)
        for layer, num_chunks in enumerate(layout.kv_chunks):
            if self.kv.num_chunks(layer) < num_chunks:
                self.kv.resize(layer, num_chunks)

    def check(self) -> None:
        """Assert invariant 2: every chunk is free, or owned by exactly the range it is mapped in."""
        number = self._num_rearranged
        if self._before is not None:  # it is being rearranged
            return
        try:
            self.pool.check({ChunkUse.WEIGHTS: self.weights.mapped_chunks, ChunkUse.KV: self.kv.mapped_chunks})
        except (AssertionError, RuntimeError):  # of these, one is of a dict that changes while it is read
            if number == self._num_rearranged:  # else this was something in between
                raise

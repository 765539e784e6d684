"""Everything one device holds, under one budget: its chunk pool, its weights and its KV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kunserve.gpu.chunk_pool import ChunkPool, Owner
from kunserve.gpu.device import Device
from kunserve.gpu.kv_memory import KVMemory, KVShape
from kunserve.gpu.weights import Weights
from kunserve.model.layout import WeightUnit


@dataclass(frozen=True, slots=True)
class ChunkCounts:
    """Chunks of a device by owner; they add up to `budget`."""

    budget: int
    weights: int
    kv: int
    free: int


class DeviceMemory:
    """The memory of one device: who has its chunks now, and the verbs that move them."""

    def __init__(
        self,
        device: Device,
        units: Sequence[WeightUnit],
        num_layers: int,
        kv_shape: KVShape,
        dtype: torch.dtype,
    ) -> None:
        self.device = device
        self.pool = ChunkPool(device.num_chunks)
        self.weights = Weights(device, self.pool, units, dtype)
        self.kv = KVMemory(device, self.pool, num_layers, kv_shape)

    @property
    def counts(self) -> ChunkCounts:
        """Chunks by owner."""
        weights, kv = self.pool.num_owned(Owner.WEIGHTS), self.pool.num_owned(Owner.KV)
        return ChunkCounts(self.pool.num_chunks, weights, kv, self.pool.num_free)

    def check(self) -> None:
        """Assert invariant 2: every chunk is free, or owned by exactly the range it is mapped in."""
        self.pool.check({Owner.WEIGHTS: self.weights.mapped_chunks, Owner.KV: self.kv.mapped_chunks})
